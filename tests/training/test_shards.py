"""shards.py: WebDataset shards over http and from the disk, streamed into small copies and into encodings."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import bad_server
from conftest import picture_bytes
from PIL import Image

from clip_gen.__main__ import main
from clip_gen.data.limits import ArchiveError
from clip_gen.data.manifest import Pictures, unpacked
from clip_gen.files import ROOT
from clip_gen.training import shards as shards_module
from clip_gen.training.datasets import open_rows
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings
from clip_gen.training.shards import gather, pictures_of, shard_parts
from clip_gen.training.squares import Squares
from clip_gen.worlds.shapes.pairs import RenderedPictures


def shard(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def photograph(width: int, height: int, seed: int) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def drawings(first: int, count: int) -> dict[str, bytes]:
    """Samples of a picture and a sentence."""
    pictures = RenderedPictures(first + count, 5, 24)
    files = {}
    for number in range(first, first + count):
        files[f"{number:06d}.json"] = b'{"key": 1}'
        files[f"{number:06d}.png"] = picture_bytes(pictures[number])
        files[f"{number:06d}.txt"] = b"a sentence"
    return files


SHARDS = {f"{number:02d}.tar": shard(drawings(10 * number, 10)) for number in range(4)}


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "WAITS", (0, 0, 0))


def test_all_pictures_are_kept_small_if_they_fit(tmp_path: Path) -> None:
    small = photograph(400, 320, 1)
    files = {
        "a.jpg": photograph(1600, 1280, 2),
        "b.jpg": small,
        "c.txt": b"no picture",
        "d.jpg": small,
        "e.jpg": small[:2000],
        "f.seg.png": picture_bytes(np.zeros((64, 64, 3), np.uint8)),
    }
    with bad_server({"00.tar": shard(files), "01.tar": SHARDS["01.tar"]}) as server:
        shards = [f"{server.address}/0{number}.tar?key=secret" for number in range(2)]
        pictures = gather(shards, tmp_path / "pictures", 64, 1e9, seed=0)
        assert len(server.requests) == 2
    assert pictures == unpacked(tmp_path / "pictures")
    assert (len(pictures.paths), pictures.count, pictures.estimated) == (12, 12, 0)
    assert pictures.names[:3] == ["00.tar/a.jpg", "00.tar/b.jpg", "01.tar/000010.png"]
    assert Image.open(pictures.paths[0]).size == (400, 320)
    assert pictures.paths[1].read_bytes() == small
    skipped = {one.name: one.reason for one in pictures.skipped}
    reasons = ["a text file", "a duplicate", "cut off or damaged", "one colour all over"]
    assert skipped == dict(
        zip([f"00.tar/{name}" for name in ("c.txt", "d.jpg", "e.jpg", "f.seg.png")], reasons, strict=True)
    )
    assert "secret" not in json.dumps(pictures.as_json())


@pytest.mark.parametrize("way", ["truncate", "drop", 503])
def test_a_download_that_breaks_off_is_tried_again(way: str | int) -> None:
    with bad_server(SHARDS, [way, way]) as server:
        names = [name for name, _ in pictures_of(f"{server.address}/02.tar")]
        assert len(server.requests) == 3
    assert names == [f"02.tar/{number:06d}.png" for number in range(20, 30)]


def test_a_shard_that_stays_broken_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    with bad_server(SHARDS, ["truncate"] * 9) as server:
        with pytest.raises(ArchiveError, match=r"02.tar: cannot be read \(.*\); make it available and give the same"):
            list(pictures_of(f"{server.address}/02.tar?key=secret"))
        del server.plan[:], server.requests[:]
        with pytest.raises(ArchiveError, match=r"http://[^?]*/missing.tar: cannot be read \(HTTP 404\)"):
            list(pictures_of(f"{server.address}/missing.tar?key=secret"))
        assert len(server.requests) == 1
    for content in (SHARDS["00.tar"][:9000], b"no tar at all" * 999):
        (tmp_path / "local.tar").write_bytes(content)
        with pytest.raises(ArchiveError, match=r"local.tar: cannot be read"):
            list(pictures_of(str(tmp_path / "local.tar")))


def test_shards_that_were_read_before_an_interruption_are_not_read_again(tmp_path: Path) -> None:
    with bad_server(SHARDS, ["well", "well", 404]) as server:
        shards = [f"{server.address}/{name}" for name in SHARDS]
        with pytest.raises(ArchiveError, match="404"):
            gather(shards, tmp_path / "pictures", 64, 1e9, seed=0)
        assert not (tmp_path / "pictures").exists()
        pictures = gather(shards, tmp_path / "pictures", 64, 1e9, seed=0)
        assert len(server.requests) == 5
    whole = gather(write_shards(tmp_path), tmp_path / "whole", 64, 1e9, seed=0)
    assert [path.read_bytes() for path in pictures.paths] == [path.read_bytes() for path in whole.paths]


def write_shards(folder: Path) -> list[str]:
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in SHARDS]


@pytest.mark.parametrize(("size", "given", "side"), [("base", 0, 640), ("laptop", 0, 320), ("laptop", 1024, 1280)])
def test_copies_are_large_enough_for_the_resolution_of_the_training(
    tiny_model_folder: Path, tmp_path: Path, size: str, given: int, side: int
) -> None:
    (tmp_path / "0.tar").write_bytes(shard({f"{number}.jpg": photograph(1296, 1296, number) for number in range(8)}))
    settings = TrainSettings(base=str(tiny_model_folder), size=size, resolution=given)
    training = Training([str(tmp_path / "{0..0}.tar")], tmp_path / "out", settings)
    training.check()
    training.load_base()
    config = training.networks.config
    vqgan = replace(config.vqgan, resolution=512)  # of a larger base
    training.networks = replace(training.networks, config=replace(config, vqgan=vqgan))
    pictures = training.unpack_pictures()
    assert Image.open(pictures.paths[0]).size == (side, side)


def test_only_a_sample_is_kept_if_the_disk_has_no_room_for_all(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    two = sum(len(content) for name in ("00.tar", "01.tar") for content in drawings(10 * int(name[1]), 10).values())
    pictures = gather(shards, tmp_path / "pictures", 64, 0.8 * two, seed=0)
    kept = {name.partition("/")[0] for name in pictures.names}
    assert len(kept) == 2  # of four, in random order
    assert len(pictures.paths) < 21
    assert pictures.count == pictures.estimated == 2 * len(pictures.paths)
    assert unpacked(tmp_path / "pictures") == pictures
    assert gather(shards, tmp_path / "again", 64, 0.8 * two, seed=0).names == pictures.names


def test_batches_of_a_shard_have_a_view_of_each_picture_but_those_left_out(tmp_path: Path) -> None:
    shards, squares = write_shards(tmp_path), Squares(24, crop=1.0, flip=False)
    paths = [Path(name) for name in ("31.png", "35.png", "39.png")]
    sample = Pictures(paths, [], names=[f"03.tar/0000{path}" for path in paths], estimated=40)
    parts = shard_parts(shards, sample, paths[:2], squares, seed=1)
    shown = torch.cat(list(parts[3]()))
    wanted = [number for number in range(30, 40) if number not in (31, 35)]
    pictures = RenderedPictures(40, 5, 24)
    assert torch.equal(shown, torch.stack([torch.from_numpy(pictures[number]) for number in wanted]))
    parts = shard_parts(shards, sample, [], Squares(24), seed=1)
    first, second = (torch.cat(list(parts[0]())) for _ in range(2))
    assert torch.equal(first, second)  # as after a resume
    assert not shard_parts(shards, Pictures(paths, []), [], Squares(24), seed=1)  # all are kept
    assert not torch.equal(first, torch.cat(list(shard_parts(shards, sample, [], Squares(24), seed=2)[0]())))


@pytest.mark.parametrize("shard_gb", [1e-6, 1.5])
def test_shards_over_http_train_a_model(
    tmp_path: Path, tiny_model_folder: Path, shard_gb: float, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--vqgan-steps", "2", "--transformer-steps", "2", "--batch-size", "4", "--no-crop", "--no-flip"]
    words = [*steps, "--base", str(tiny_model_folder), "--shard-gb", str(shard_gb), "--precision", "32-true"]
    out = tmp_path / "out"
    # With little room a part of one shard is read for stage 1, and both for stage 2.
    with bad_server({"0.tar": shard(drawings(0, 12)), "1.tar": shard(drawings(12, 12))}) as server:
        assert main(["train", f"{server.address}/{{0..1}}.tar?key=secret", "--out", str(out), *words]) == 0
        requests = len(server.requests)
    record = json.loads((out / "model" / "training.json").read_text())
    rows = len(open_rows(out / "work" / "encoded" / "tokens-learnt.json"))
    held_back = record["pictures"]["held_back"]
    assert "secret" not in (out / "report.html").read_text() + json.dumps(record)
    if shard_gb == 1.5:
        assert (requests, record["pictures"]["used"], rows) == (2, 24, 24 - held_back)
    else:
        assert requests == 1 + 2
        assert record["pictures"]["used"] == 8  # the least
        assert record["pictures"]["estimated"] == 16  # it does not know how much of the shard it has read
        assert rows == 24 - held_back
    assert (out / "weights.tar").is_file()


def test_shards_of_large_photographs_need_little_memory_and_disk(tmp_path: Path) -> None:
    """The full size: python -m benchmarks streaming --pictures 5000."""
    report = tmp_path / "report.json"
    words = ["streaming", "--pictures", "14", "--shard-gb", "0.001", "--out", str(report)]
    subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT, check=True)
    row = json.loads(report.read_text())["row"]
    assert row["GB of shards"] > 0.05
    assert row["GB of copies"] < 0.003
    assert row["GB of disk"] < 0.3  # most of it checkpoints and weights
    assert row["GB sent"] > row["GB of shards"]  # it was read again for stage 2
    assert row["encoded"] == 12
    assert row["GB of memory"] < 3  # pages that the training shares with its workers count twice
