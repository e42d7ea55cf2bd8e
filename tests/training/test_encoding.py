"""encoding.py in parts: processes share the pictures, and what a lost process leaves is encoded all the same."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_networks

from clip_gen.training.datasets import EncodedPictures, JoinedRows, open_rows
from clip_gen.training.encoding import encode_in_parts, encode_once, parts_of, remove_incomplete_parts
from clip_gen.worlds.shapes.pairs import RenderedPictures

SLOW = """
import sys, time
from pathlib import Path
from conftest import tiny_networks
from clip_gen.training.encoding import encode_in_parts, parts_of
from clip_gen.worlds.shapes.pairs import RenderedPictures

def slow(part):
    for number, batch in enumerate(part()):
        print("batch", flush=True)
        time.sleep(float(sys.argv[2]))
        yield batch

parts = [lambda part=part: slow(part) for part in parts_of(RenderedPictures(150, 0, 16))]
encode_in_parts(parts, 150, tiny_networks(), Path(sys.argv[1]))
"""


def process(folder: Path, seconds: float, rank: int) -> subprocess.Popen:
    """A process of the same training, which takes `seconds` for each batch."""
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", SLOW, str(folder), str(seconds)]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder, networks = tmp_path_factory.mktemp("whole"), tiny_networks()
    encode_once(RenderedPictures(150, 0, 16), {folder / "tokens.npy": networks.vqgan})
    return np.load(folder / "tokens.npy")


def test_parts_give_the_rows_of_one_array(tmp_path: Path, whole: np.ndarray) -> None:
    parts = parts_of(RenderedPictures(150, 0, 16))
    assert len(parts) == 5
    embeddings, tokens = encode_in_parts(parts, 150, tiny_networks(), tmp_path)
    rows = open_rows(tokens)
    assert np.array_equal(rows[:], whole)
    assert np.array_equal(rows[np.array([149, 3, 40, 3])], whole[[149, 3, 40, 3]])
    assert rows[31].tolist() == whole[31].tolist()
    assert rows[32].dtype == np.uint16
    assert open_rows(embeddings)[0].dtype == np.float16
    assert len(EncodedPictures(embeddings, tokens)) == 150
    with pytest.raises(IndexError):
        rows[150]


def test_two_processes_share_the_parts_and_wait_for_each_other(tmp_path: Path, whole: np.ndarray) -> None:
    with process(tmp_path, 0.3, 1) as second:
        assert second.stdout.readline() == "batch\n"
        _, tokens = encode_in_parts(parts_of(RenderedPictures(150, 0, 16)), 150, tiny_networks(), tmp_path)
        assert second.wait(60) == 0
        assert second.stdout.read().count("batch") < 4  # it had one of the five before, and this process had some
    assert np.array_equal(open_rows(tokens)[:], whole)


def test_the_part_of_a_lost_process_is_encoded_by_another_one(tmp_path: Path, whole: np.ndarray) -> None:
    with process(tmp_path, 600, 1) as second:
        assert second.stdout.readline() == "batch\n"
        second.send_signal(signal.SIGKILL)
        _, tokens = encode_in_parts(parts_of(RenderedPictures(150, 0, 16)), 150, tiny_networks(), tmp_path)
    assert np.array_equal(open_rows(tokens)[:], whole)
    assert not list(tmp_path.glob("parts/*.lock"))


def test_a_resumed_encoding_keeps_the_parts_that_are_done(tmp_path: Path, whole: np.ndarray) -> None:
    parts, networks = parts_of(RenderedPictures(150, 0, 16)), tiny_networks()

    def lost() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_in_parts([*parts[:3], lost, parts[4]], 150, networks, tmp_path)
    remove_incomplete_parts(tmp_path)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*.npy")}
    assert len(done) == 6
    _, tokens = encode_in_parts([lost, lost, lost, *parts[3:]], 150, networks, tmp_path)
    assert np.array_equal(open_rows(tokens)[:], whole)
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*.npy")}.items()


def test_parts_cut_short_by_a_time_limit_are_encoded_again_with_more_time(
    tmp_path: Path, whole: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pictures = RenderedPictures(150, 0, 16)

    def part() -> object:
        for group in parts_of(pictures):
            yield from group()

    _, tokens = encode_in_parts([part], 150, tiny_networks(), tmp_path, seconds=0)
    assert len(open_rows(tokens)) == 32
    assert not json.loads(tokens.read_text())["is_complete"]
    assert caplog.messages[-1].startswith("encoding: 32 of 150 views, ")
    remove_incomplete_parts(tmp_path)
    assert not list(tmp_path.glob("**/*.npy"))
    _, tokens = encode_in_parts([part], 150, tiny_networks(), tmp_path)
    assert np.array_equal(open_rows(tokens)[:], whole)
    remove_incomplete_parts(tmp_path)
    assert tokens.is_file()


def test_rows_after_a_missing_part_do_not_count_unless_gaps_are_allowed(tmp_path: Path) -> None:
    parts = parts_of(RenderedPictures(150, 0, 16))
    for gaps, rows in ((False, 32), (True, 32 + 22)):
        folder = tmp_path / str(gaps)
        encode_in_parts(parts, 150, tiny_networks(), folder)
        for path in (*folder.glob("parts/*-00000[123].npy"), *folder.glob("*.json")):
            path.unlink()
        _, tokens = encode_in_parts([lambda: iter(()), *parts[1:]], 150, tiny_networks(), folder, seconds=-1, gaps=gaps)
        assert len(open_rows(tokens)) == rows + 32  # part 1 was encoded again


def test_a_part_without_pictures_has_no_rows(tmp_path: Path, whole: np.ndarray) -> None:
    parts = parts_of(RenderedPictures(150, 0, 16))
    _, tokens = encode_in_parts([parts[0], lambda: iter(()), *parts[1:]], 150, tiny_networks(), tmp_path)
    assert np.array_equal(open_rows(tokens)[:], whole)


def test_joined_rows_are_read_by_number_slice_and_numbers() -> None:
    arrays = [np.arange(6).reshape(3, 2), np.arange(6, 8).reshape(1, 2), np.arange(8, 12).reshape(2, 2)]
    joined, plain = JoinedRows(arrays), np.concatenate(arrays)
    assert len(joined) == 6
    assert [joined[i].tolist() for i in range(6)] == plain.tolist()
    assert joined[1:5].tolist() == plain[1:5].tolist()
    assert joined[:99].tolist() == plain.tolist()
    assert joined[np.array([5, 0, 3])].tolist() == plain[[5, 0, 3]].tolist()
