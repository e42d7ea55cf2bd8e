"""Toy models of the real classes, built in milliseconds, for every test that needs one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clip_gen import ClipGen
from clip_gen.checkpoint import Networks, build, save_networks
from clip_gen.config import ClipConfig, GPTConfig, ModelConfig, VQGANConfig

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two threads on a busy machine can be many times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _bundled_model() -> Iterator[None]:
    """Whatever was pulled into checkpoints/, tests draw with the bundled model when they name none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_GEN_MODEL", "checkpoints/shapes")
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


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_networks(tiny_networks(), folder, training={"seed": 0})
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> ClipGen:
    return ClipGen.load(tiny_model_folder, device="cpu")
