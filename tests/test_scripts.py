"""script/*: each works from any current folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import missing
from conftest import TINY

from clip_gen import ClipGen
from clip_gen.config import write_config
from clip_gen.files import MARK, ROOT
from clip_gen.training.stage import FitConfig
from clip_gen.worlds.recipe_config import RecipeConfig

UI = pytest.param("ui", marks=pytest.mark.skipif(bool(missing()), reason=f"the page needs {missing()}"))


@pytest.mark.parametrize(
    "name", ["predict", "serve", "test", "train-shapes", "train-emoji", "bench", "pack-drawings", UI]
)
def test_a_script_works_through_a_link_and_with_cdpath(tmp_path: Path, name: str) -> None:
    (tmp_path / "script").mkdir()
    (link := tmp_path / "script" / name).symlink_to(ROOT / "script" / name)
    run = subprocess.run(
        [link.relative_to(tmp_path), "--help"],
        **{"cwd": tmp_path, "env": {**os.environ, "CDPATH": "."}, "capture_output": True, "text": True},
    )
    # script/test says so on a machine without chromium or Gradio.
    errors = [line for line in run.stderr.splitlines() if not line.startswith("script/test: the page is not tested: ")]
    assert (run.returncode, errors) == (0, [])
    assert run.stdout.startswith("usage: ")
    if name.startswith("train-"):
        assert name in run.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("environment", "words", "sentence"),
    [
        ({"PORT": "abc"}, [], "--host 127.0.0.1, PORT abc (invalid literal for int"),
        ({"PORT": "99999"}, [], "--host 127.0.0.1, PORT 99999 (bind(): port must be 0-65535"),
        ({}, ["--host", "localhost"], "--host localhost, PORT 5000 ('localhost' does not appear to be an IPv4 or IPv6"),
        ({}, ["--host=::1"], "--host ::1, PORT 5000 (write it as [::1])"),
        ({}, ["--host", "192.0.2.1"], "--host 192.0.2.1, PORT 5000 (Cannot assign requested address); give an IP"),
    ],
)
def test_a_server_that_cannot_be_started_says_why(environment: dict[str, str], words: list[str], sentence: str) -> None:
    said = refused_to_serve(environment, *words)
    assert said.startswith(f"script/serve: cannot listen on {sentence}")
    assert said.count("\n") == 1


def test_a_missing_host_is_an_error_of_the_script() -> None:
    assert refused_to_serve({}, "--host", status=2).endswith(
        "script/serve: error: argument --host: expected one argument\n"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_a_port_in_use_is_reported_in_one_sentence(host: str) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        said = refused_to_serve({"PORT": str(port)}, "--host", host)
    assert f"PORT {port} (Address already in use); give" in said
    assert said.endswith("a free port, as in PORT=5001 script/serve\n")


def refused_to_serve(environment: dict[str, str], *words: str, status: int = 1) -> str:
    command = [ROOT / "script" / "serve", *words]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert run.returncode == status
    return run.stderr


@pytest.mark.slow
def test_a_bundled_models_recipe_is_one_command(tmp_path: Path) -> None:
    """The recipe of emoji is trained in tests/worlds/test_recipe.py; its script differs in one word."""
    fit = FitConfig(steps=2, batch_size=32, ema_decay=0.5)
    fits = {f"{name}_fit": fit for name in ("clip", "vqgan", "gpt", "ranker")}
    recipe = RecipeConfig("shapes", TINY, encoded_pictures=64, drawn_pictures=64, **fits)
    write_config(recipe, tmp_path / "tiny.yaml")
    words = ["--config", tmp_path / "tiny.yaml", "--work", tmp_path / "work", "--out", tmp_path / "model"]
    run = subprocess.run([ROOT / "script" / "train-shapes", *words], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    model = ClipGen.load(tmp_path / "model", "cpu")
    assert len(model.generate("a red circle", candidates=1, num_outputs=1).images) == 1
    for name in ("clip", "vqgan", "gpt", "ranker"):
        assert f"{name} 2/2" in run.stderr


@contextmanager
def endless_recipe(folder: Path) -> Iterator[subprocess.Popen]:
    """script/train-shapes at toy size, with endless parts, in its own process group."""
    fits = {f"{name}_fit": FitConfig(steps=10**6, batch_size=4) for name in ("clip", "vqgan")}
    write_config(RecipeConfig(model=TINY, **fits), folder / "endless.yaml")
    words = ["--config", folder / "endless.yaml", "--work", folder / "work", "--out", folder / "model"]
    with subprocess.Popen(
        [ROOT / "script" / "train-shapes", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        try:
            yield script
        finally:
            if not group_is_gone(script.pid):
                os.killpg(script.pid, signal.SIGKILL)


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.1)
    return done()


def group_is_gone(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_failing_part_ends_the_other_and_prints_the_reason(tmp_path: Path) -> None:
    (tmp_path / "work" / "vqgan").mkdir(parents=True)
    (tmp_path / "work" / MARK).write_text("train-shapes\n")
    (tmp_path / "work" / "vqgan" / "record.json").write_text("{}")
    with endless_recipe(tmp_path) as script:
        said = script.communicate(timeout=120)[1]
        assert script.returncode == 1
        assert f"{tmp_path / 'work' / 'vqgan'} was trained by another recipe" in said
        assert "Traceback" not in said
        assert wait_until(lambda: group_is_gone(script.pid), 20)


def test_ending_the_recipe_ends_its_trainings(tmp_path: Path) -> None:
    begun = [tmp_path / "work" / part / "history.jsonl" for part in ("clip", "vqgan")]
    with endless_recipe(tmp_path) as script:
        assert wait_until(lambda: all(path.is_file() for path in begun), 120)
        script.terminate()
        assert script.wait(20) == 143
        assert wait_until(lambda: group_is_gone(script.pid), 20)


@pytest.mark.parametrize("path", sorted((ROOT / "script").iterdir()), ids=lambda path: path.name)
def test_every_script_resolves_links_to_the_project_or_needs_nothing_of_it(path: Path) -> None:
    text = path.read_text()
    assert 'readlink -f "$0"' in text or (text.startswith("#!/usr/bin/env python3") and "clip_gen" not in text)
