"""files.py: files and folders are written completely or not at all, and only in folders of this program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_gen.files import (
    MARK,
    PARTIAL,
    ROOT,
    atomic_file,
    atomic_folder,
    check_claimable,
    claim_folder,
    folder_lock,
    list_names,
    remove_leftovers,
    set_compile_cache_folders,
    shortened,
    write_text_atomic,
)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def saved(folder: Path) -> dict[str, str]:
    return {name: text for name, text in contents(folder).items() if not name.startswith(PARTIAL)}


def replace_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "config.yaml").write_text("new")
        (folder / "more.yaml").write_text("new")


NEW = ({"config.yaml": "new"}, {"config.yaml": "new", "more.yaml": "new"})


class Stop(BaseException):
    """An interruption that `except Exception` does not catch, like KeyboardInterrupt."""


def stop_at_call(number: int, call: Callable[..., object], after: bool) -> Callable[..., object]:
    """`call`, with Stop raised before or after the n-th call."""
    seen = 0

    def stopping(*arguments: object, **options: object) -> object:
        nonlocal seen
        seen += 1
        if seen == number and not after:
            raise Stop
        result = call(*arguments, **options)
        if seen == number:
            raise Stop
        return result

    return stopping


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["replace", "fsync", "open", "chmod", "mkdir"])
@pytest.mark.parametrize("replace", [replace_folder, lambda path: write_text_atomic(path / "config.yaml", "new")])
def test_an_interruption_at_any_call_leaves_the_old_or_the_new_version(
    replace: Callable[[Path], None], name: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 20):
        path = tmp_path / str(number) / "model"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text("old")
        with monkeypatch.context() as patched:
            patched.setattr(os, name, stop_at_call(number, getattr(os, name), after))
            try:
                replace(path)
            except Stop:
                assert saved(path) in ({"config.yaml": "old"}, *NEW)
            else:
                break
    assert saved(path) in NEW
    if name not in ("open", "mkdir"):  # an interruption while the temporary folder is made or removed leaves some of it
        assert all(os.listdir(tmp_path / folder) == ["model"] for folder in os.listdir(tmp_path))
        assert not list(tmp_path.rglob(".*"))


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    replace_folder(tmp_path / "model")

    def fail() -> None:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "config.yaml").write_text("newer")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert contents(tmp_path) == {"model/config.yaml": "new", "model/more.yaml": "new"}


def test_data_is_synced_before_the_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"{a} to {b}"), replace(a, b)))
    with atomic_file(tmp_path / "file") as temporary:
        Path(temporary).write_text("text")
    assert calls == [temporary, f"{temporary} to {tmp_path / 'file'}", str(tmp_path)]
    calls.clear()
    replace_folder(tmp_path / "model")
    moved = next(i for i, call in enumerate(calls) if call.endswith(f"to {tmp_path / 'model'}"))
    assert {Path(call).name for call in calls[:moved]} == {"config.yaml", "more.yaml", "new"}
    assert calls[moved + 1 :] == [str(tmp_path)]
    calls.clear()
    with atomic_file(tmp_path / "file", durable=False) as temporary:
        Path(temporary).write_text("text")
    assert len(calls) == 1


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    replace_folder(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert contents(tmp_path / "disk") == {"config.yaml": "new", "more.yaml": "new"}


def test_a_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    hold = "import sys; from pathlib import Path; from clip_gen.files import folder_lock"
    hold += "\nwith folder_lock(Path(sys.argv[1]), ''): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # a refused process must not change the holder's id
            busy = rf"^busy \(process {holder.pid} holds it\)$"
            with pytest.raises(ValueError, match=busy), folder_lock(tmp_path, "busy"):
                pass
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path, "busy"):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_only_new_empty_or_marked_folders_are_claimed(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new" / "folder", "training")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_text("")
    claim_folder(tmp_path / "empty", "training")
    (tmp_path / "empty" / "more").write_text("")
    claim_folder(tmp_path / "empty", "training")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"own holds thesis\.txt and is no training folder of this"):
        claim_folder(tmp_path / "own", "training")
    assert contents(tmp_path / "own") == {"thesis.txt": "years of work"}
    claim_folder(tmp_path / "own", "training", made_here=True)
    with pytest.raises(ValueError, match=r"thesis\.txt and is no evaluation folder of this program; name"):
        check_claimable(tmp_path / "own", "evaluation", made_here=True)
    assert (tmp_path / "own" / MARK).read_text().startswith("training\n")


def test_an_unusable_folder_gives_one_error_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused = {
        tmp_path / "file": r"file: cannot be used \(Not a directory\); name another folder",
        tmp_path / "file" / "a" / "b": r"b: cannot be used \(Not a directory\); name another folder",
        tmp_path / "link": r"link: cannot be used \(No such file or directory\); name another folder",
        tmp_path / ("x" * 300): r"cannot be used \(File name too long\); name another folder",
        Path("/proc/new"): r"/proc/new: cannot be used \(No such file or directory\); name another folder",
    }
    for path, sentence in refused.items():
        with pytest.raises(ValueError, match=sentence):
            claim_folder(path, "training", made_here=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_folder_without_permission_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    check = "import os, sys; from pathlib import Path; from clip_gen.files import claim_folder"
    check += "\nos.getuid() or os.setuid(65534)\nclaim_folder(Path(sys.argv[1]), 'training', made_here=True)"
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        run = subprocess.run([sys.executable, "-c", check, tmp_path / name], capture_output=True, text=True)
        assert "cannot be " in run.stderr.splitlines()[-1], run.stderr


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    write = "import os, sys; from pathlib import Path; from clip_gen.files import atomic_folder, atomic_file"
    write += "\nwith atomic_folder(Path(sys.argv[1])), atomic_file(Path('f')):"
    write += " print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", write, "model"],
        **{"cwd": tmp_path, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout.readline() == "held\n"
        remove_leftovers(tmp_path, seconds=0)
        assert len(os.listdir(tmp_path)) == 2
        process.kill()
        process.wait()
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 2  # too new to be sure
    remove_leftovers(tmp_path, seconds=0)
    assert os.listdir(tmp_path) == []


def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    replace_folder(tmp_path / "model")
    kill = "import os, sys, tempfile; from pathlib import Path; from clip_gen.files import atomic_folder"
    kill += "\nreplace = os.replace\nos.replace = lambda a, b: (replace(a, b), os.kill(os.getpid(), 9))"
    kill += "\nwith atomic_folder(Path(sys.argv[1])): pass"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", kill, tmp_path / "model"], env=environment).returncode == -9
    assert not (tmp_path / "model").exists()
    remove_leftovers(tmp_path, seconds=0)
    assert contents(tmp_path) == {"model/config.yaml": "new", "model/more.yaml": "new"}


def test_a_users_files_with_a_similar_prefix_are_kept(tmp_path: Path) -> None:
    own = tmp_path / ".saving-photos"
    own.mkdir()
    (own / "a.jpg").write_text("mine")
    os.utime(own, (0, 0))
    write_text_atomic(tmp_path / "new.txt", "text")
    assert (own / "a.jpg").is_file()
    assert list_names(tmp_path) == [".saving-photos", "new.txt"]


def test_a_long_path_keeps_its_file_name_in_messages() -> None:
    assert shortened("a/weights.tar") == "a/weights.tar"
    text = shortened(f"/{'folder/' * 90}weights.tar")
    assert len(text) == 200
    assert text.startswith("/folder/")
    assert text.endswith("folder/weights.tar")


def test_caches_go_to_the_temporary_folder_if_the_home_folder_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("TRITON_CACHE_DIR", "MPLCONFIGDIR")
    for home, are_set in ((tmp_path, False), (tmp_path / "missing", True)):
        monkeypatch.setattr(os, "environ", {"HOME": str(home)})
        set_compile_cache_folders()
        assert [name in os.environ for name in names] == [are_set] * 2
