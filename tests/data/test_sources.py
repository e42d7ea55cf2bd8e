"""sources.py: several archives, folders and pictures at once, text files that list them, and patterns of shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_archive import make_folder, make_tar, make_zip, picture, reasons

from clip_gen.data.archive import LIMITS, unpack
from clip_gen.data.limits import ArchiveError
from clip_gen.data.sources import find_sources


def test_several_archives_folders_and_pictures_are_read_as_one(tmp_path: Path) -> None:
    make_zip(tmp_path / "a.zip", {"1.png": picture(1), "2.png": picture(2)})
    make_tar(tmp_path / "b.tar", {"2.png": picture(2), "note.txt": b"text"})
    make_folder(tmp_path / "c", {"deep/3.png": picture(3)})
    (tmp_path / "d.png").write_bytes(picture(4))
    names = [str(tmp_path / name) for name in ("a.zip", "b.tar", "c", "d.png")]
    pictures = unpack(find_sources(names).paths, tmp_path / "out", replace(LIMITS, min_pictures=1))
    assert len(pictures.paths) == 4
    assert reasons(pictures) == {"b.tar/2.png": "a duplicate", "b.tar/note.txt": "a text file"}


def test_a_text_file_stands_for_the_paths_in_it_relative_to_its_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {f"{number}.png": picture(number) for number in range(3)})
    make_zip(tmp_path / "a.zip", {"5.png": picture(5)})
    lists = tmp_path / "list.txt"
    lists.write_text(f"# the best\nphotos/0.png\n\n  photos/2.png\n{tmp_path}/a.zip\n")
    sources = find_sources([lists])
    assert len(unpack(sources.paths, tmp_path / "out", replace(LIMITS, min_pictures=1)).paths) == 3
    assert not sources.shards
    before = sources.fingerprint()
    (tmp_path / "photos" / "2.png").write_bytes(picture(9))
    assert find_sources([lists]).fingerprint() != before


def test_a_list_may_name_shards(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://example.com/{00..02}.tar\nHTTP://example.com/a.tar.gz?key=1\n")
    sources = find_sources([tmp_path / "list.txt"])
    assert sources.shards[0] == "https://example.com/00.tar"
    assert len(sources.shards) == 4
    assert str(sources).endswith("02.tar and 1 more")


def test_a_pattern_stands_for_local_shards(tmp_path: Path) -> None:
    for number in range(11):
        make_tar(tmp_path / f"{number:04d}.tar", {})
    sources = find_sources([str(tmp_path / "{0000..0010}.tar")])
    assert sources.shards == tuple(str(tmp_path / f"{number:04d}.tar") for number in range(11))
    assert find_sources([str(tmp_path / "{0000..0002}.tar")]).fingerprint() != sources.fingerprint()


def test_secrets_in_urls_are_not_shown() -> None:
    sources = find_sources(["https://me:secret@example.com/{0..1}.tar?token=secret"])
    assert sources.shards[0] == "https://me:secret@example.com/0.tar?token=secret"
    assert str(sources) == "https://example.com/0.tar, https://example.com/1.tar"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["https://example.com/photos.zip"], "photos.zip: is no tar; shards end in .tar"),
        (["shards/{00..01}.tar"], "shards/00.tar: no such file; .* stands for 2 shards"),
        (["shards/{00..01.tar"], "its braces do not match"),
        (["https://example.com/0.tar", "photos.zip"], "photos.zip: cannot be read together with shards such as https"),
        (["missing.txt"], "missing.txt: cannot be read as a list of paths"),
    ],
)
def test_bad_sources_are_refused_with_the_remedy(names: list[str], sentence: str) -> None:
    with pytest.raises(ArchiveError, match=sentence):
        find_sources(names)


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ArchiveError, match=r"list.txt: lists no paths; write one path or URL a line"):
        find_sources([tmp_path / "list.txt"])


def test_a_missing_file_of_several_is_an_error(tmp_path: Path) -> None:
    make_zip(tmp_path / "a.zip", {"1.png": picture(1)})
    with pytest.raises(ArchiveError, match=r"b.zip: no such file or folder"):
        unpack([tmp_path / "a.zip", tmp_path / "b.zip"], tmp_path / "out")
