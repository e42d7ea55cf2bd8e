"""README.md and docs/ agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from clip_gen.files import ROOT
from predict import INPUTS

README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()


def test_the_design_document_names_every_file_of_the_package() -> None:
    rows, folder = {}, ""
    for line in DESIGN.splitlines():
        if header := re.match(r"\| `clip_gen/([\w/]*)` \|", line):
            folder = header[1]
        elif line.startswith("|"):
            for name in re.findall(r"`([\w/]+(?:\.py|/))`", line.split("|")[1]):
                rows[f"{folder}{name}"] = line
    for name in rows:
        assert (ROOT / "clip_gen" / name).exists(), name
    modules = {str(path.relative_to(ROOT / "clip_gen")) for path in (ROOT / "clip_gen").glob("**/*.py")}
    missing = {module for module in modules if module not in rows and not module.endswith("__init__.py")}
    assert {module for module in missing if not module.startswith("weights/importers/")} == set()
    assert all(path.name in DESIGN for path in (ROOT / "script").iterdir())


def test_the_input_table_has_every_input_with_its_default() -> None:
    table = README[README.index("| input | default |") : README.index("On a CPU candidate")]
    rows = {}
    for line in table.splitlines()[2:]:
        if line.startswith("|"):
            names, defaults = line.split("|")[1:3]
            rows.update(zip(re.findall(r"`(\w+)`", names), [d.strip() for d in defaults.split(",")], strict=True))
    for name, field in INPUTS.items():
        default = field.info.default
        assert name in rows
        if default is not None:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[name] == shown


def test_the_python_block_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block.replace("candidates=16", "candidates=4"), names)
    assert len(names["result"].images) == 4
    assert Image.open(tmp_path / "cat.png").size == (128, 128)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500


def test_pictures_and_links_point_at_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target, _, heading in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.is_file(), target
            assert not heading or heading in headings(linked), (target, heading)


def headings(page: Path) -> set[str]:
    """Those of a page, as links name them."""
    titles = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
