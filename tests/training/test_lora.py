"""training/lora.py and copies.py: a base's transformer is fine-tuned on few pictures, at toy size."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from importer_files import VIT, clip_state, hfailab_files
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.images import to_pil
from clip_gen.networks.gpt import GPT
from clip_gen.training import copies
from clip_gen.training.copies import DRAWN, find_copies, mixtures
from clip_gen.training.datasets import PictureFiles
from clip_gen.training.fit import Machine
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.job import Training
from clip_gen.training.lora import LoRALinear, choose_parameters, merge_lora
from clip_gen.training.plan import LORA_RANK, Tokens, TrainSettings, plan
from clip_gen.training.squares import Squares
from clip_gen.training.stage import FitConfig, adamw
from clip_gen.weights.model_folder import load_base, save_networks

TOY = TrainSettings(stage="transformer", transformer_steps=8, batch_size=4, precision="32-true", crop=False, flip=False)
WITH_SKETCH = replace(TINY.gpt, neighbour_context=True, sketch_drawings=1, sketch_cells=2)
SKETCHED = "sketch.", "condition.", "null_condition"  # what the sketch depends on
KNOWN = Tokens(kept=True, known=True)


def trained_names(gpt: GPT) -> set[str]:
    return {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}


def test_an_addition_is_zero_at_first_and_merged_at_the_end() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(6, 10), torch.randn(3, 6)
    layer = LoRALinear(plain, 2)
    assert torch.equal(layer(x), plain(x))
    nn.init.normal_(layer.up)
    merged = layer.merged()
    assert torch.allclose(merged(x), layer(x), atol=1e-5)
    assert not torch.allclose(merged(x), plain(x), atol=1e-2)
    assert type(merged) is nn.Linear


def test_lora_trains_additions_and_the_null_condition_only() -> None:
    gpt = GPT(TINY.gpt)
    choose_parameters(gpt, 4, knows_tokens=True)
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")]
    parts = {f"{layer}.{part}" for layer in (*layers, "head") for part in ("down", "up")}
    assert trained_names(gpt) == {*parts, "null_condition"}


def test_a_sketch_stays_as_it_is_if_it_knows_the_tokens() -> None:
    every = set(GPT(WITH_SKETCH).state_dict())
    gpt = GPT(WITH_SKETCH)
    choose_parameters(gpt, 4, knows_tokens=True)
    assert {name.rpartition(".")[2] for name in trained_names(gpt)} == {"down", "up"}
    gpt = GPT(WITH_SKETCH)
    choose_parameters(gpt, 0, knows_tokens=True)
    assert trained_names(gpt) == {name for name in every if not name.startswith(SKETCHED)}
    gpt = GPT(WITH_SKETCH)
    choose_parameters(gpt, 0, knows_tokens=False)
    assert trained_names(gpt) == every - {"sketch.head.weight", "sketch.head.bias"}


def test_lora_beside_a_sketch_learns_and_leaves_a_plain_transformer() -> None:
    torch.manual_seed(0)
    gpt = GPT(WITH_SKETCH).train()
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    choose_parameters(gpt, 4, knows_tokens=True)
    config = FitConfig(learning_rate=0.02)
    trainer, optimizer = GPTTrainer(gpt, config), adamw(gpt, config, betas=(0.9, 0.95))
    trainer.log_dict = lambda *_, **__: None
    conditions, tokens = torch.randn(8, 16), torch.randint(0, 32, (8, 16))
    batch = conditions, tokens, torch.zeros(8, dtype=torch.bool), conditions, conditions
    losses = []
    for _ in range(20):
        losses.append(trainer.training_step(batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    gpt.eval()
    with torch.no_grad():
        logits = gpt(conditions, tokens[:, :-1])
        merge_lora(gpt)
        assert torch.allclose(gpt(conditions, tokens[:, :-1]), logits, atol=1e-4)
    after = gpt.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "head.weight",
        *(name for name in before if name.startswith("blocks.") and ".ln_" not in name and name.endswith("weight")),
    }


def test_few_pictures_are_fine_tuned_by_lora_unless_told_otherwise() -> None:
    def planned(pictures: int, tokens: Tokens = KNOWN, **settings: object) -> tuple[int, int, int]:
        made = plan(TrainSettings(**settings), TINY, pictures, tokens=tokens)
        return made.lora_rank, made.vqgan.steps, made.transformer.steps

    assert planned(50) == (LORA_RANK, 300, 1200)
    assert planned(200)[0] == planned(5000, lora="on")[0] == LORA_RANK
    assert planned(50, lora="off") == (0, 1500, 2000)
    assert planned(201)[0] == 0
    assert planned(50, Tokens()) == (0, 1500, 2000)
    assert planned(50, Tokens(True, True, very_well=True))[1] == 0
    assert planned(50, Tokens(True, True, very_well=True), vqgan_steps=70)[1] == 70
    assert planned(50, stage="vqgan") == (0, 1500, 2000)
    with pytest.raises(ValueError, match="lora is on, but the base has no transformer that knows its tokens"):
        planned(50, Tokens(), lora="on")
    with pytest.raises(ValueError, match=r"lora is on, .* leave out size laptop"):
        TrainSettings(lora="on", size="laptop").check()


def test_a_training_on_few_pictures_keeps_what_it_does_not_need_to_change(
    photos: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As if the base's VQGAN reconstructed the pictures very well: stage 1 is left out."""
    for name in ("GOOD_DB", "BETTER_DB", "VERY_GOOD_DB", "MUCH_BETTER_DB"):
        monkeypatch.setattr(f"clip_gen.training.decisions.{name}", -99)
    with caplog.at_level(logging.INFO):
        Training(photos, tmp_path, replace(TOY, stage="both", base=str(tiny_model_folder))).run()
    logged = "\n".join(caplog.messages)
    assert "stage 1   left out: the base's VQGAN reconstructs the pictures very well" in logged
    assert "LoRA      trains" in logged
    for part in ("vqgan", "clip"):
        base, after = (load_file(folder / f"{part}.safetensors") for folder in (tiny_model_folder, tmp_path / "model"))
        assert all(torch.equal(value, after[name]) for name, value in base.items())
    base, after = (load_file(folder / "gpt.safetensors") for folder in (tiny_model_folder, tmp_path / "model"))
    assert base.keys() == after.keys()
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    assert {"blocks.0.attn.qkv.weight", "head.weight"} <= changed
    assert not changed & {"token_embedding.weight", "condition.weight", "blocks.0.ln_1.weight"}
    assert len(ClipGen.load(tmp_path / "model", "cpu").generate("a star", 2, 1, guidance=2.0, seed=0).images) == 1

    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["stages"]["vqgan"]["steps"] == 0
    assert record["stages"]["gpt"]["drawn"] == DRAWN
    page = (tmp_path / "report.html").read_text()
    for words in (
        f"A small part of the transformer (LoRA of rank {LORA_RANK}) of the base",
        "to copy training pictures: ",
        "on, of rank",
    ):
        assert words in page, words


class Killed(Exception):
    """Interrupts a training."""


def test_an_interrupted_training_by_lora_ends_with_the_same_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a base with a sketch, which is not trained."""
    save_networks(tiny_networks(config=replace(TINY, gpt=WITH_SKETCH)), tmp_path / "base", training={})
    settings = replace(TOY, base=str(tmp_path / "base"))
    step: Callable = GPTTrainer.training_step

    def killed(stage: GPTTrainer, batch: tuple) -> torch.Tensor:
        if stage.global_step == 5:
            raise Killed
        return step(stage, batch)

    Training(photos, tmp_path / "whole", settings).run()
    monkeypatch.setattr(GPTTrainer, "training_step", killed)
    with pytest.raises(Killed):
        Training(photos, tmp_path / "cut", settings, Machine(save_seconds=0)).run()
    monkeypatch.undo()
    saved = torch.load(tmp_path / "cut" / "work" / "gpt" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert "gpt.head.up" in saved["state_dict"]
    Training(photos, tmp_path / "cut", settings).run()
    folders = (tmp_path / "base", tmp_path / "whole" / "model", tmp_path / "cut" / "model")
    base, whole, found = (load_file(folder / "gpt.safetensors") for folder in folders)
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
    assert all(torch.equal(value, whole[name]) for name, value in base.items() if name.startswith(SKETCHED))
    assert not torch.equal(base["blocks.0.mlp.fc.weight"], whole["blocks.0.mlp.fc.weight"])


def test_lora_fine_tunes_an_imported_model_and_gives_it_a_null_condition(photos: Path, tmp_path: Path) -> None:
    """In the layout of the published COCO weights, whose transformer has none."""
    files, base = hfailab_files(tmp_path), tmp_path / "coco"
    torch.save(clip_state(VIT), files / "clip.pt")
    words = ["--vqgan", str(files / "vqgan.pt"), "--gpt", str(files / "gpt.pt"), "--clip", str(files / "clip.pt")]
    assert main(["import", "hfailab", *words, "--out", str(base)]) == 0
    Training(photos, tmp_path / "out", replace(TOY, base=str(base), lora="on")).run()
    start, tuned = load_base(base).gpt, load_base(tmp_path / "out" / "model").gpt
    before, after = start.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-3)}
    assert {"null_condition", "head.weight"} <= changed
    assert not changed & {"head.bias", "token_embedding.weight", "condition.weight"}
    model = ClipGen.load(tmp_path / "out" / "model", "cpu")
    assert len(model.generate("a cat", 2, 1, guidance=3.0, seed=0).images) == 1


def test_copies_are_found(tmp_path: Path) -> None:
    """Of two transformers one draws pictures like those of the training, the other always the first of these."""
    networks, count, length = tiny_networks(), 24, TINY.gpt.block_size
    networks.vqgan.requires_grad_(False)
    tokens = torch.randint(0, TINY.gpt.codebook_size, (count, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i, picture in enumerate(to_pil(networks.vqgan.decode(tokens))):
            picture.save(tmp_path / f"{i:02}.png")
        pictures = PictureFiles(sorted(tmp_path.iterdir()), TINY.vqgan.resolution)
        new = find_copies(networks, pictures, seed=0)
        gpt = networks.gpt
        for parameter in gpt.parameters():
            parameter.zero_()
        gpt.position_embedding.weight.copy_(torch.eye(length))
        gpt.ln_f.weight.fill_(10.0)
        gpt.head.weight.index_add_(0, tokens[0], 10 * torch.eye(length))
    copied = find_copies(networks, pictures, seed=0)
    assert new["drawn"] == copied["drawn"] == copied["close_to_training"] == DRAWN
    assert new["close_to_training"] < 0.75 * DRAWN
    assert not copies.warning(new)
    assert copies.warning(copied).startswith("the transformer draws copies of its training pictures: 32 of 32 ")
    assert not copies.warning({})
    assert not copies.in_words({})


def test_mixtures_are_of_two_different_pictures() -> None:
    mixed = mixtures(torch.eye(5), 40, seed=0)
    assert mixed.shape == (40, 5)
    assert torch.allclose(mixed.norm(dim=1), torch.ones(40))
    assert ((mixed > 0).sum(dim=1) == 2).all()


def test_drawings_are_scattered_whole_and_photographs_cropped() -> None:
    drawing = np.full((48, 48, 3), 255, np.uint8)
    drawing[12:36, 6:42] = (200, 0, 0)
    photo = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    squares, rng, sizes, places = (
        Squares(48, crop=0.65, flip=False, scatter=True),
        np.random.default_rng(1),
        set(),
        set(),
    )
    for _ in range(40):
        pixels = squares.draw(Image.fromarray(drawing), rng)
        rows, columns = np.nonzero((pixels != 255).any(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.6 * 24 <= height <= 24
        assert 1.3 < width / height < 1.7
        sizes.add(int(height))
        places.add((int(rows[0]), int(columns.min())))
    assert 24 in sizes
    assert len(sizes) > 5
    assert len(places) > 15
    cropped = [squares.draw(Image.fromarray(photo), rng) for _ in range(4)]
    assert all(not np.array_equal(pixels, photo) and len(np.unique(pixels)) > 100 for pixels in cropped)
