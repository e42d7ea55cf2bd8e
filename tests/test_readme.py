"""README.md: what it says is so."""

from __future__ import annotations

import re
from pathlib import Path

from clip_gen.cog_schema import project_signatures
from clip_gen.files import ROOT

README = (ROOT / "README.md").read_text()


def test_the_file_map_names_every_module_and_script() -> None:
    rows = re.findall(r"^\| (`.+?) \| ", README, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    modules = {path.name for path in (ROOT / "clip_gen").glob("*.py")} - {"__init__.py"}
    missing = {m for m in modules if not any(n.split("/")[-1] == m for n in named) and not m.startswith("cog_")}
    assert not missing
    scripts = {path.name for path in (ROOT / "script").iterdir()}
    line = next(row for row in README.splitlines() if row.startswith("| `script/`"))
    assert not [name for name in scripts if name not in line]
    folders = {path.parent.name for path in (ROOT / "clip_gen").glob("*/__init__.py")}
    assert not [name for name in folders if f"clip_gen/{name}/" not in README]


def test_what_the_file_map_names_exists() -> None:
    for name in re.findall(r"`(clip_gen/[\w./*]+|script/\w+|tests/|configs/|checkpoints/|docs/[\w.]+)`", README):
        assert list(ROOT.glob(name.rstrip("/"))), name
    for row in re.findall(r"^\| (`clip_gen/\w+\.py`, `.+?) \| ", README, re.MULTILINE):
        for name in re.findall(r"`(\w+\.py)`", row):  # beside the first
            assert (ROOT / "clip_gen" / name).is_file(), name


def test_the_input_table_has_every_input_with_its_default() -> None:
    table = README[README.index("| input | default |") : README.index("Candidate *i*")]
    rows = {}
    for line in table.splitlines()[2:]:
        if line.startswith("|"):
            names, defaults = line.split("|")[1:3]
            rows.update(zip(re.findall(r"`(\w+)`", names), [d.strip() for d in defaults.split(",")], strict=True))
    for field in project_signatures()[0].inputs:
        default = field.arguments.get("default")
        assert field.name in rows
        if default is not None:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[field.name] == shown


def test_pictures_and_links_point_at_files() -> None:
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")):
        for target, _, heading in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.is_file(), target
            assert not heading or heading in headings(linked), (target, heading)


def headings(page: Path) -> set[str]:
    """Those of a page, as links name them."""
    titles = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
