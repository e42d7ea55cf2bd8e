"""weights/model_folder.py: loading a model folder takes little memory besides its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_networks
from safetensors.torch import load_file, save_file

from clip_gen.files import ROOT
from clip_gen.networks.grid import grid_rotation
from clip_gen.weights.model_folder import PARTS, Networks, build, load_networks, save_networks, write_part

MEGABYTE = 2**20

MEASURE = """
import json, sys
import clip_gen.pipeline
from clip_gen.weights.model_folder import load_networks

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

load_networks(sys.argv[1])  # the tokenizer and what else is loaded only once
figures = []
for folder in sys.argv[2:]:
    before = status("RssAnon"), status("VmHWM")
    kept = load_networks(folder)
    figures.append([status("RssAnon") - before[0], status("VmHWM") - before[1]])
    del kept
print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A transformer of 42 MB (as float32) between toy networks, in each type on disk."""
    folder = tmp_path_factory.mktemp("loading")
    sizes = replace(TINY.gpt, n_layer=5, n_embd=384, n_head=6, codebook_size=2048)
    config = replace(TINY, gpt=sizes, vqgan=replace(TINY.vqgan, codebook_size=2048, quantizer="taming"))
    networks = build(config)
    made = {"tiny": tiny_model_folder}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # the largest last: a peak shows only once
        name = str(dtype).removeprefix("torch.")
        save_networks(networks, folder / name, {})
        write_part({n: t.to(dtype) for n, t in networks.gpt.state_dict().items()}, folder / name / "gpt.safetensors")
        made[name] = folder / name
    return made


@pytest.fixture(scope="module")
def growth(folders: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """By type on disk: how many bytes loading added to the private memory and to its peak.

    Without what a toy model takes, which is CLIP's vocabulary.
    """
    words = [sys.executable, "-c", MEASURE, *(str(folders[name]) for name in ("tiny", *folders))]
    root = ROOT
    # What is freed goes back to the system at once, or one folder's figures would depend on the one before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True, env=environment)
    figures = dict(zip(folders, json.loads(run.stdout), strict=True))
    toy = figures.pop("tiny")
    return {name: (own - toy[0], peak - toy[1]) for name, (own, peak) in figures.items()}


def weights(folder: Path) -> int:
    return (folder / "gpt.safetensors").stat().st_size


def test_float32_weights_stay_memory_mapped(growth: dict[str, tuple[int, int]], folders: dict[str, Path]) -> None:
    assert weights(folders["float32"]) > 39 * MEGABYTE
    assert growth["float32"][0] < 0.25 * weights(folders["float32"])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_weights_are_in_memory_once(
    name: str, growth: dict[str, tuple[int, int]], folders: dict[str, Path]
) -> None:
    memory = 2 * weights(folders[name])  # as float32
    assert 0.6 * memory < growth[name][0] < 1.2 * memory
    assert growth[name][1] < 1.2 * (memory + weights(folders[name]))  # the file's own pages are counted too


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_weights_of_all_types_are_loaded_as_float32(name: str, folders: dict[str, Path]) -> None:
    gpt = load_networks(folders[name]).gpt
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    found, whole = gpt.head.weight, load_networks(folders["float32"]).gpt.head.weight
    assert torch.equal(found, whole.to(getattr(torch, name)).float())


def test_loading_leaves_the_random_state_unchanged(tiny_model_folder: Path) -> None:
    before = torch.get_rng_state()
    load_networks(tiny_model_folder)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(params=["resnet", "vit"])
def saved(request: pytest.FixtureRequest) -> Networks:
    """Networks with buffers that are not saved: rotations, masks, positions."""
    config = replace(TINY, gpt=replace(TINY.gpt, rotary=True, neighbour_context=True))
    if request.param == "vit":
        sizes = {"vision_layers": (1,), "vision_width": 64, "vision_patch_size": 8}
        config = replace(config, clip=replace(config.clip, **sizes))
    torch.manual_seed(0)
    networks = build(config)
    networks.vqgan.train()(torch.rand(8, 3, 16, 16) * 2 - 1)  # the codebook starts from its first batch
    for part in PARTS:
        for parameter in getattr(networks, part).eval().parameters():
            parameter.data = parameter.data.half().float()
    return networks


@torch.no_grad()
def test_loaded_networks_give_the_outputs_of_the_saved_ones(saved: Networks, tmp_path: Path) -> None:
    save_networks(saved, tmp_path / "model", {})
    loaded = load_networks(tmp_path / "model")
    images, prompts = torch.rand(2, 3, 16, 16) * 2 - 1, ["a red circle", "two"]
    assert torch.equal(loaded.clip.encode_text(prompts), saved.clip.encode_text(prompts))
    assert torch.equal(loaded.clip.encode_image(images), saved.clip.encode_image(images))
    tokens = saved.vqgan.encode(images)
    assert torch.equal(loaded.vqgan.encode(images), tokens)
    assert torch.equal(loaded.vqgan.decode(tokens), saved.vqgan.decode(tokens))
    embedding = loaded.bridge(saved.clip.encode_text(prompts))
    assert torch.equal(loaded.gpt(embedding, tokens[:, :-1]), saved.gpt(embedding, tokens[:, :-1]))
    assert torch.equal(loaded.gpt.rotation, grid_rotation(4, 8))


def test_training_loaded_weights_leaves_the_file_unchanged(tmp_path: Path) -> None:
    save_networks(tiny_networks(), tmp_path / "model", {})
    path = tmp_path / "model" / "gpt.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    before = path.read_bytes()
    gpt = load_networks(tmp_path / "model").gpt.requires_grad_()
    gpt(torch.rand(2, 16), torch.zeros(2, 3, dtype=torch.long)).square().mean().backward()
    torch.optim.SGD(gpt.parameters(), lr=1.0).step()
    assert not torch.equal(gpt.head.weight, load_networks(tmp_path / "model").gpt.head.weight)
    assert path.read_bytes() == before
