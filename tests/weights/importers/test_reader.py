"""importers/reader.py, importers/state_dict.py: foreign files are read and never executed."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from clip_gen.weights.importers.reader import read_checkpoint
from clip_gen.weights.importers.state_dict import Checkpoint, Source


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}


CALLS = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "subprocess": lambda mark: Calls(subprocess.call, ["touch", str(mark)]),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "getattr": lambda mark: Calls(getattr, Calls(__import__, "os"), "system"),
    "torch.load": lambda mark: Calls(torch.load, str(mark), None, None),
    "path": lambda mark: Calls(Path.touch, mark),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_executed(name: str, zipped: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bad.ckpt"
    content = {"callbacks": CALLS[name](mark), "state_dict": weights()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with suppress(ValueError):  # or the call was to something inert, and the weights beside it can be had
        assert torch.equal(read_checkpoint(path).tensors["a"], weights()["a"])
    assert not mark.exists()


def test_malicious_pickles_run_code_in_unsafe_loaders(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(CALLS["eval"](tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_blocked_module_is_refused_in_one_sentence(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "x": CALLS["os.system"](tmp_path / "mark")}, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=r"bad\.ckpt: asks for posix\.system, .* is not loaded: .* save its state dict"
    ) as raised:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert "\n" not in str(raised.value)


def test_calls_instead_of_tensors_are_refused(tmp_path: Path) -> None:
    for content in ({"state_dict": CALLS["eval"](tmp_path / "mark")}, {"a": CALLS["eval"](tmp_path / "mark")}, [1]):
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=r"bad\.ckpt: "):
            read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_from_the_top_level_or_a_wrapper(wrapper: str | None, zipped: bool, tmp_path: Path) -> None:
    content = {wrapper: weights(), "epoch": 3} if wrapper else weights()
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    tensors = read_checkpoint(tmp_path / "a.pt").tensors
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {n: t.tolist() for n, t in weights().items()}


def test_the_log_names_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"ema": weights(), "optimizer": {"state": {}}, "model": weights()}, tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        read_checkpoint(tmp_path / "a.pt")
    assert caplog.messages == [f"{tmp_path / 'a.pt'}: takes the tensors under model and leaves out ema, optimizer"]


def test_a_zipped_checkpoint_is_memory_mapped(tmp_path: Path) -> None:
    torch.save({"big": torch.zeros(2**24)}, tmp_path / "a.pt")
    before = resident()
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert checkpoint.tensors["big"].shape == (2**24,)
    assert resident() - before < 16e6  # of 67 MB


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named_with_the_remedy(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.pt: is damaged, .*; download it again"):
        read_checkpoint(path)


def zip_of(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def saved(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def tar_of_weights() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return file.getvalue()


NOT_WEIGHTS = {
    "page": (b"<!DOCTYPE html><title>Sign in</title>", "is text that begins with '<!DOCTYPE html>.*', not weights"),
    "page with a mark": (b"\xef\xbb\xbf\n <html>", "is text .*, not weights"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is text .*, not weights; .* want a login"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is text .*; for a Git LFS pointer run git lfs"),
    "text": (
        b"Entry not found\n",
        "is text that begins with 'Entry not found', not weights; download the file itself",
    ),
    "json": (b'{"error": {"code": 404}}', "is text .*, not weights"),
    "tar": (tar_of_weights(), "is damaged, larger than the memory, or not a file of torch.save or safetensors"),
    "pictures": (zip_of(**{"1.png": b""}), "is damaged, .* or not a file of torch.save or safetensors"),
    "no files": (zip_of(), "is damaged, .* or not a file of torch.save or safetensors"),
    "photo": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(600), "is damaged, .* or not a file of torch.save"),
    "cut safetensors": (save({"a": torch.ones(9)})[:-1], "is damaged, .* or not a file of torch.save or safetensors"),
    "legacy, cut": (saved(weights(), _use_new_zipfile_serialization=False)[:-1], "is damaged"),
    "network": (saved(torch.nn.Linear(2, 2)), "holds no tensors by name; give a state dict"),
    "mixed": (saved({"state_dict": {"a": torch.ones(1), "b": "text"}}), "its entry 'b' is not a tensor with a name"),
    "escape": (saved({"\x1b[2J": torch.ones(1)}), r"its entry '\\x1b\[2J' is not a tensor with a name"),
    "float8": (saved({"a": torch.ones(1).to(torch.float8_e4m3fn)}), "a is stored in a form that cannot be converted"),
    "sparse": (saved({"a": torch.eye(2).to_sparse()}), "a is stored in a form that cannot be converted"),
    "pickle protocol 4": (saved(weights(), pickle_protocol=4), "is damaged, .* or save its state dict with torch.save"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_other_kinds_of_files_give_a_clear_error(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    content, sentence = NOT_WEIGHTS[name]
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.pt: {sentence}") as raised:
        read_checkpoint(tmp_path / "a.pt")
    assert len(str(raised.value).splitlines()) == 1
    assert "weights_only" not in str(raised.value)
    assert "PyTorch" not in str(raised.value)
    assert not recwarn.list


def test_a_folder_and_a_missing_file_give_different_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file; give a checkpoint file"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a folder; give a checkpoint file"):
        read_checkpoint(tmp_path)


class Callback:
    """A class that a training saves in its checkpoint."""

    def __init__(self):
        self.best = torch.ones(2)


def test_unknown_classes_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    for zipped in (True, False):
        content = {"callbacks": {Callback: Callback()}, "state_dict": weights()}
        torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        assert torch.equal(read_checkpoint(tmp_path / "a.ckpt").tensors["a"], weights()["a"])


def test_the_remedy_for_a_refused_pickle_works(tmp_path: Path) -> None:
    class Objects(list):
        pass

    Objects.__qualname__ = Objects.__name__ = "Objects"
    globals()["Objects"] = Objects
    torch.save({"kept": Objects([1]), "state_dict": weights()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"asks for Python objects, .* If you trust the file, save its state dict"):
        read_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", map_location="cpu", weights_only=False)  # as the sentence says
    torch.save(content["state_dict"], tmp_path / "weights.pt")
    assert list(read_checkpoint(tmp_path / "weights.pt").tensors) == ["a", "b"]


def test_safetensors_are_memory_mapped(tmp_path: Path) -> None:
    save_file({"big": torch.ones(2**24), **weights()}, tmp_path / "a.safetensors")
    before = resident()
    checkpoint = read_checkpoint(tmp_path / "a.safetensors").tensors
    assert resident() - before < 16e6  # of 67 MB
    assert torch.equal(checkpoint["a"], weights()["a"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module._orig_mod."])
def test_prefixes_of_wrappers_are_removed_and_logged(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in weights().items()}}, tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["a", "b"]
    assert f"the prefix {prefix} of every key is left out" in caplog.text
    with pytest.raises(ValueError, match=rf"has no key {prefix}c, only others such as {prefix}a"):
        checkpoint.find("c")


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert list(read_checkpoint(tmp_path / "a.pt").tensors) == ["module.a", "b"]


def test_torchs_averaged_model_is_read(tmp_path: Path) -> None:
    torch.save(torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3)).state_dict(), tmp_path / "a.pt")
    assert list(read_checkpoint(tmp_path / "a.pt").tensors) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("outer", "inner", "of"), [("", "", ""), ("module.", "", ""), ("", "model.", ""), ("", "model.", "model")]
)
def test_moving_averages_replace_raw_weights_and_are_logged(
    outer: str, inner: str, of: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = {"encoder.conv.weight": torch.zeros(2), "bn.running_mean": torch.zeros(2), "loss.d.weight": torch.zeros(2)}
    state = {inner + name: tensor for name, tensor in raw.items()}
    state |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    state |= {f"model_ema.{of}{name}": torch.ones(2) for name in ("encoderconvweight", "lossdweight")}
    torch.save({outer + name: tensor for name, tensor in state.items()}, tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        checkpoint = read_checkpoint(tmp_path / "a.pt").tensors
    assert {name: tensor.tolist() for name, tensor in checkpoint.items()} == {
        **{"encoder.conv.weight": [1, 1], "bn.running_mean": [0, 0], "loss.d.weight": [0, 0]}
    }
    assert "takes the moving averages (model_ema.*) of 1 tensors, not their raw weights" in caplog.text


def test_an_average_without_a_parameter_is_named(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(1), "model_ema.ac": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"model_ema\.ac is the average of no key in the file; give the whole"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_missing_size_gives_an_error() -> None:
    checkpoint = Checkpoint(Path("a.pt"), {"scalar": torch.ones(()), "empty": torch.ones(0, 3)})
    for name, axis in (("scalar", 0), ("scalar", -1), ("empty", 0)):
        with pytest.raises(ValueError, match=rf"a\.pt: {name} has shape"):
            checkpoint.size(name, axis)


def test_one_foreign_tensor_can_become_several_of_ours() -> None:
    theirs = torch.arange(12.0).reshape(6, 2)
    sources = [Source("qkv", part, of=3, trailing_ones=2) for part in range(3)]
    wanted = torch.Size((2, 2, 1, 1))
    assert {source.shape(wanted) for source in sources} == {(6, 2)}
    assert torch.equal(torch.cat([source.take(theirs, wanted) for source in sources])[..., 0, 0], theirs)
    assert Source("position", leading_one=True).shape(torch.Size((4, 2))) == (1, 4, 2)
    assert Source("count").shape(torch.Size(())) == ()


def test_errors_show_names_with_their_prefix() -> None:
    checkpoint = Checkpoint(Path("a.pt"), {"loss.main.0.weight": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"a\.pt: has no key loss\.main\.1\.weight, only others such as loss\.main\.0\.weight"
    ):
        checkpoint.under("loss.").size("main.1.weight")
