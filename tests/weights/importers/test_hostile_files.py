"""Files that try to run code: no command that reads foreign weights runs it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from bad_server import bad_server
from importer_files import KINDS, VIT, clip_state, hfailab_files, taming_settings, write_archive
from lpips_files import write_lpips_files
from torch import Tensor, nn

from clip_gen.__main__ import main
from clip_gen.weights import pull
from clip_gen.weights.importers.lpips import import_lpips
from clip_gen.weights.importers.openai_clip import read_clip
from clip_gen.weights.importers.reader import read_checkpoint
from clip_gen.weights.model_folder import ModelFolderError, load_discriminator

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

SCRIPTS = ["a script that writes", "a script that prints"]
HOSTILE = [*SCRIPTS, "a pickle", "a pickle before torch 1.6"]


class Script(nn.Module):
    """TorchScript that writes to a path while it is loaded, or prints if the path is empty."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.register_buffer("weight", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.training, self.path, self.weight

    @torch.jit.export
    def __setstate__(self, state):
        # type: (Tuple[bool, str, Tensor]) -> None
        self.training, self.path, self.weight = state
        if len(self.path) > 0:
            self.weight = torch.from_file(self.path, True, 16)
        else:
            print("the script was run")


class Touch:
    """Pickles as a call of os.system."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def write_hostile(kind: str, path: Path, mark: Path) -> None:
    """Writes a file that leaves the mark, or prints, when it is loaded without care."""
    if kind in SCRIPTS:
        torch.jit.script(Script(str(mark) if kind == SCRIPTS[0] else "")).save(str(path))
    else:
        content = {"state_dict": {"a": torch.ones(1)}, "x": Touch(mark)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "a pickle")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_run_code_in_unsafe_loaders(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_hostile(kind, tmp_path / "bad", tmp_path / "mark")
    if kind in SCRIPTS:
        torch.jit.load(str(tmp_path / "bad"))
    else:
        torch.load(tmp_path / "bad", weights_only=False)
    assert (tmp_path / "mark").exists() or "the script was run" in capfd.readouterr().out


def refused(folder: Path, format: str, **files: str) -> None:
    words = [word for option, name in files.items() for word in (f"--{option}", str(folder / name))]
    assert main(["import", format, *words, "--out", str(folder / "out")]) == 1


def lpips(vgg: Path, linear: Path) -> None:
    with pytest.raises(ValueError, match="bad: "):
        import_lpips(vgg, linear, vgg.parent / "out", {"vgg": "", "linear": ""}, torch.float16)


def discriminator(folder: Path) -> None:
    shutil.copyfile(folder / "bad", folder / "discriminator.safetensors")
    with pytest.raises(ModelFolderError, match=r"discriminator\.safetensors: is damaged"):
        load_discriminator(folder)


def pulled(folder: Path, what: list[str], *bad: str) -> None:
    files = {"vqgan_coco.pt": (folder / "vqgan.pt").read_bytes()}
    with bad_server(files | dict.fromkeys(bad, (folder / "bad").read_bytes())) as server:
        assert main(["pull", *what, "--mirror", server.address, "--out", str(folder / "out")]) == 1
    assert len(server.requests) >= len(bad)


COMMANDS: dict[str, Callable[[Path], None]] = {
    "import clip": lambda folder: refused(folder, "clip", checkpoint="bad"),
    "import taming": lambda folder: refused(folder, "taming", config="model.yaml", checkpoint="bad"),
    "import hfailab, vqgan": lambda folder: refused(folder, "hfailab", vqgan="bad", gpt="gpt.pt"),
    "import hfailab, gpt": lambda folder: refused(folder, "hfailab", vqgan="vqgan.pt", gpt="bad"),
    "import hfailab, clip": lambda folder: refused(folder, "hfailab", vqgan="vqgan.pt", gpt="gpt.pt", clip="bad"),
    "lpips, vgg": lambda folder: lpips(folder / "bad", folder / "vgg.pth"),
    "lpips, linear": lambda folder: lpips(folder / "vgg16-397923af.pth", folder / "bad"),
    "discriminator": discriminator,
    "pull coco": lambda folder: pulled(folder, ["coco"], "gpt_coco.pt", "ViT-B-32.pt"),
    "pull clip": lambda folder: pulled(folder, ["clip", "ViT-B/32"], "ViT-B-32.pt"),
    "pull lpips": lambda folder: pulled(folder, ["lpips"], "vgg16-397923af.pth", "vgg.pth"),
}


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hfailab_files(tmp_path_factory.mktemp("good"))
    (folder / "model.yaml").write_text(yaml.safe_dump(taming_settings(*KINDS["f4"])))
    return write_lpips_files(folder)


@pytest.fixture
def folder(good_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The good files, with low limits on the disk space for pulling."""
    for path in good_files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("COCO_BYTES", "CLIP_BYTES", "LPIPS_BYTES"):
        monkeypatch.setattr(pull, name, 10**8)
    return tmp_path


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_in_a_hostile_file(
    command: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_hostile(kind, folder / "bad", folder / "mark")
    digest = hashlib.sha256((folder / "bad").read_bytes()).hexdigest()
    for published in (pull.CLIPS, pull.COCO, pull.LPIPS):  # as if the publishers' own files were hostile
        for name, file in list(published.items()):
            known = {"sha256": digest} if file.sha256 else {}
            monkeypatch.setitem(published, name, replace(file, **known))
    COMMANDS[command](folder)
    captured = capfd.readouterr()
    assert not (folder / "mark").exists()
    assert "the script was run" not in captured.out
    assert not (folder / "out").exists()
    assert "Traceback" not in captured.err
    if kind in SCRIPTS and command.startswith(("import", "pull")):
        assert ": is a TorchScript archive, " in captured.err


def test_a_script_is_loaded_only_if_its_sha256_is_allowed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clip.pt"
    write_hostile("a script that prints", path, tmp_path)
    with pytest.raises(ValueError, match="is a TorchScript archive"):
        read_clip(path)
    assert "the script was run" not in capfd.readouterr().out
    assert list(read_clip(path, {hashlib.sha256(path.read_bytes()).hexdigest()}).tensors) == ["weight"]
    assert "the script was run" in capfd.readouterr().out


def test_the_hashed_bytes_are_the_loaded_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.pt"
    write_hostile("a script that prints", path, tmp_path)
    hostile, sha256 = path.read_bytes(), hashlib.sha256
    write_archive({"known": torch.ones(1)}, path)
    known = sha256(path.read_bytes()).hexdigest()

    def exchange(content: bytes) -> object:
        """Replaces the file by a hostile one while it is hashed, as another process might."""
        path.write_bytes(hostile)
        return sha256(content)

    monkeypatch.setattr(hashlib, "sha256", exchange)
    assert "known" in read_checkpoint(path, scripts={known}).tensors
    assert path.read_bytes() == hostile
    assert "the script was run" not in capfd.readouterr().out


def test_a_state_dict_made_as_the_message_says_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_archive(clip_state(VIT), Path("FILE"))
    assert main(["import", "clip", "--checkpoint", "FILE", "--out", "out"]) == 1
    exec(capsys.readouterr().err.split('python -c "')[1].split('"')[0], {})
    assert main(["import", "clip", "--checkpoint", "weights.pt", "--out", "out"]) == 0
