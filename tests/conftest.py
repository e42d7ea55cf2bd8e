"""Toy models of the real classes, built in milliseconds, for every test that needs one."""

from __future__ import annotations

import gc
import io
import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips_files import write_lpips_files
from PIL import Image
from upscaler_files import upscaler_bytes

from clip_gen import ClipGen
from clip_gen.config import ClipConfig, GPTConfig, ModelConfig, VQGANConfig
from clip_gen.hardware import supports_float16
from clip_gen.weights.importers.lpips import import_lpips
from clip_gen.weights.importers.upscaler import import_upscaler
from clip_gen.weights.model_folder import Networks, build, save_networks
from clip_gen.worlds.shapes.pairs import RenderedPictures

FIXTURES = Path(__file__).parent / "fixtures"
FLOAT16 = pytest.mark.skipif(not supports_float16(), reason="float16 is for x86 with AVX2")

TINY = ModelConfig(
    name="tiny",
    clip=ClipConfig(
        embed_dim=16,
        image_resolution=32,
        vision_layers=(1, 1, 1, 1),
        vision_width=8,
        vision_patch_size=None,
        context_length=16,
        transformer_width=16,
        transformer_heads=2,
        transformer_layers=1,
    ),
    vqgan=VQGANConfig(
        resolution=16,
        patch=4,
        ch=32,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=(),
        z_channels=32,
        codebook_size=32,
        codebook_dim=4,
    ),
    gpt=GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, codebook_size=32, embed_dim=16),
)


LONGEST = ("training", "serving", "test_bundled.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process of pytest-xdist is left with one of them at the end."""
    items.sort(key=lambda item: not {item.path.name, item.path.parent.name} & {*LONGEST})


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a training with several processes leaves there, such as its port, would be taken up by the next test's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _skip_imported_modules_in_collections() -> None:
    """The garbage collector looks at all objects of torch and Lightning again and again otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _short_waits_for_loading_processes() -> None:
    """After an error in a training, torch waits so many seconds for each process that loads pictures, here in vain."""
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two threads on a busy machine can be many times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A suite started in the background inherits signals as ignored, and would hand that on to what it starts."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _bundled_model() -> Iterator[None]:
    """Whatever was pulled into checkpoints/, tests use the bundled model, and neither LPIPS nor an upscaler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COG_WEIGHTS", "checkpoints/shapes")
        patch.setenv("CLIP_GEN_LPIPS", "nowhere")
        patch.setenv("CLIP_GEN_UPSCALER", "nowhere")
        yield


def tiny_networks(seed: int = 0, config: ModelConfig = TINY) -> Networks:
    """A toy model whose codebook counts as trained, so that loading needs no first batch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = build(config)
        networks.vqgan.train()
        networks.vqgan(torch.rand(8, 3, 16, 16) * 2 - 1)  # the codebook starts from its first batch
    for network in (networks.clip, networks.vqgan, networks.gpt, networks.bridge):
        network.eval().requires_grad_(False)
    return networks


def picture_bytes(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of 24 pictures, a duplicate and a text."""
    path, pictures = tmp_path_factory.mktemp("photos") / "photos.zip", RenderedPictures(24, 5, 24)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(24):
            archive.writestr(f"album/{i:02}.png", picture_bytes(pictures[i]))
        archive.writestr("album/again.png", picture_bytes(pictures[0]))
        archive.writestr("album/notes.txt", "not a picture")
    return path


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files that LPIPS is made of."""
    return write_lpips_files(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def lpips_folder(lpips_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pull lpips` makes of them, but in float32."""
    out = tmp_path_factory.mktemp("checkpoints") / "lpips"
    files = lpips_files / "vgg16-397923af.pth", lpips_files / "vgg.pth"
    import_lpips(*files, out, {"vgg": "", "linear": ""}, torch.float32)
    return out


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_networks(tiny_networks(), folder, training={"seed": 0})
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> ClipGen:
    return ClipGen.load(tiny_model_folder, device="cpu")


@pytest.fixture
def upscaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a pulled upscaler."""
    (tmp_path / "published.pth").write_bytes(upscaler_bytes())
    import_upscaler(tmp_path / "published.pth", tmp_path / "upscaler", "https://example.com")
    monkeypatch.setenv("CLIP_GEN_UPSCALER", str(tmp_path / "upscaler"))
    return tmp_path / "upscaler"
