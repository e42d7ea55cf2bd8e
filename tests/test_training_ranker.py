"""training/ranker.py: the image tower learns from what the generator draws, and nothing else moves."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_networks

from clip_gen.checkpoint import load_networks
from clip_gen.images import to_tensor
from clip_gen.shapes.captions import caption, describe
from clip_gen.shapes.pairs import CaptionedPairs, _first_scene, training_rng
from clip_gen.shapes.rendering import render
from clip_gen.training.clip_trainer import Collate
from clip_gen.training.ranker import DrawnPairs, RankerTrainer, draw_pictures
from clip_gen.training.run import fit
from clip_gen.training.stage import FitConfig

PAIRS = CaptionedPairs(40, 3, 16)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tiny_networks(), PAIRS, 3, tmp_path_factory.mktemp("drawn") / "drawn.npy")


def test_each_group_has_what_was_drawn_for_its_first_caption_last_among_the_spoilt(drawn: Path) -> None:
    groups, networks = DrawnPairs(PAIRS, drawn), tiny_networks()
    assert np.array_equal(groups[42].spoilt[0], PAIRS[2].spoilt[0])
    assert np.array_equal(groups[42].spoilt[1], np.load(drawn)[2])
    asked, encode_text = [], networks.clip.encode_text
    networks.clip.encode_text = lambda prompts: asked.extend(prompts) or encode_text(prompts)
    other = draw_pictures(networks, PAIRS, 4, drawn.with_name("other.npy"))
    assert not np.array_equal(np.load(other), np.load(drawn))
    assert asked == [PAIRS[i].captions[0] for i in range(40)]


def test_the_text_tower_and_what_prompts_become_stay_as_they_are(drawn: Path, tmp_path: Path) -> None:
    networks = tiny_networks()
    prompts = PAIRS[0].captions
    before, text = deepcopy(networks.clip.state_dict()), networks.clip.encode_text(prompts)
    config = FitConfig(steps=4, batch_size=8, warmup=1, ema_decay=0.5, workers=0)
    trainer = RankerTrainer(networks.clip, networks.vqgan, config)
    groups = DrawnPairs(PAIRS, drawn)
    fit("toy", trainer, groups, groups, tmp_path, seed=0, collate=Collate(16))
    networks.clip.eval()
    assert torch.equal(networks.clip.encode_text(prompts), text)
    for name, value in networks.clip.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == name.startswith("clip.visual."), name


def test_a_fault_of_the_drawings_comes_to_cost_them_their_place(tmp_path: Path) -> None:
    """The bundled CLIP, and a generator that leaves a pinhole in whatever it draws."""
    networks = load_networks(Path(__file__).parents[1] / "checkpoints" / "shapes")
    pairs = CaptionedPairs(32, 3, 64)
    # The very scenes that the groups begin with, and so what their captions say.
    scenes = [_first_scene(training_rng(3, i)) for i in range(32)]
    whole = np.stack([render(scene, 64) for scene in scenes])
    assert np.abs(whole - np.stack([pairs[i].pictures[0] for i in range(32)]).astype(int)).mean() < 10
    faulty = whole.copy()
    for picture, scene in zip(faulty, scenes, strict=True):
        x, y = (round(64 * place) for place in (scene.items[0].x, scene.items[0].y))
        picture[y - 1 : y + 1, x - 1 : x + 1] = picture[0, 0]
    np.save(tmp_path / "drawn.npy", faulty)
    text = networks.clip.encode_text([caption(describe(scene)) for scene in scenes])
    right = networks.vqgan.decode(networks.vqgan.encode(to_tensor(list(whole))))

    def lead() -> float:
        true, drawn = (networks.clip.encode_image(images) for images in (right, to_tensor(list(faulty))))
        return float(((text * true).sum(dim=1) - (text * drawn).sum(dim=1)).mean())

    before = lead()
    config = FitConfig(steps=16, batch_size=8, learning_rate=5e-4, warmup=2, ema_decay=0.5, workers=0)
    trainer = RankerTrainer(networks.clip, networks.vqgan, config)
    groups = DrawnPairs(pairs, tmp_path / "drawn.npy")
    fit("toy", trainer, groups, groups, tmp_path / "work", seed=0, collate=Collate(32))
    trainer.visual.eval()
    assert lead() > before + 0.02, before
