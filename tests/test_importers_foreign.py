"""importers/foreign.py: a stranger's file is read, never obeyed."""

from __future__ import annotations

import os
import pickle
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from clip_gen.importers.foreign import Foreign, Source, read_checkpoint


class Calls:
    """Pickles as a call of a function with arguments of its own choice."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}


HARM = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "subprocess": lambda mark: Calls(subprocess.call, ["touch", str(mark)]),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "getattr": lambda mark: Calls(getattr, Calls(__import__, "os"), "system"),
    "torch.load": lambda mark: Calls(torch.load, str(mark), None, None),
    "path": lambda mark: Calls(Path.touch, mark),
}


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_nothing(name: str, zipped: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bad.ckpt"
    content = {"callbacks": HARM[name](mark), "state_dict": weights()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with suppress(ValueError):  # or the call was to something inert, and the weights beside it can be had
        assert torch.equal(read_checkpoint(path).tensors["a"], weights()["a"])
    assert not mark.exists()


def test_the_malice_in_these_tests_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(HARM["eval"](tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_blocked_module_is_refused_in_one_sentence(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "x": HARM["os.system"](tmp_path / "mark")}, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=r"bad\.ckpt: cannot be read as a checkpoint \(.*posix.system.*blocked"
    ) as raised:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert "\n" not in str(raised.value)


def test_harm_in_the_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    for content in ({"state_dict": HARM["eval"](tmp_path / "mark")}, {"a": HARM["eval"](tmp_path / "mark")}, [1]):
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=r"bad\.ckpt: "):
            read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_found_at_the_top_or_where_trainings_put_them(
    wrapper: str | None, zipped: bool, tmp_path: Path
) -> None:
    content = {wrapper: weights(), "epoch": 3} if wrapper else weights()
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "a.pt").tensors
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in weights().items()}


def test_a_modern_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    torch.save({"big": torch.zeros(2**24)}, tmp_path / "a.pt")
    before = resident()
    found = read_checkpoint(tmp_path / "a.pt")
    assert found.tensors["big"].shape == (2**24,)
    assert resident() - before < 16e6  # of 67 MB


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named_with_the_remedy(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.pt: cannot be read as a checkpoint.*get it again"):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "page.pt").write_text("<html>404 Not Found</html>")
    with pytest.raises(ValueError, match=r"page\.pt: cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "page.pt")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("1.png", b"")
    with pytest.raises(ValueError, match=r"pictures\.zip: cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "pictures.zip")
    torch.save({"state_dict": {"a": torch.ones(1), "b": "text"}}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"mixed\.pt: b is no plain tensor"):
        read_checkpoint(tmp_path / "mixed.pt")


def test_one_tensor_of_theirs_can_be_several_of_ours() -> None:
    theirs = torch.arange(12.0).reshape(6, 2)
    sources = [Source("qkv", part, of=3, trimmed=2) for part in range(3)]
    wanted = torch.Size((2, 2, 1, 1))
    assert {source.shape(wanted) for source in sources} == {(6, 2)}
    assert torch.equal(torch.cat([source.take(theirs, wanted) for source in sources])[..., 0, 0], theirs)
    assert Source("position", framed=True).shape(torch.Size((4, 2))) == (1, 4, 2)
    assert Source("count").shape(torch.Size(())) == ()


def test_a_name_in_an_error_is_the_whole_one() -> None:
    found = Foreign(Path("a.pt"), {"loss.main.0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"a\.pt: has no key loss\.main\.1\.weight"):
        found.under("loss.").size("main.1.weight")
