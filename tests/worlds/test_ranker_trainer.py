"""ranker_trainer.py: the image tower learns from generated pictures, and nothing else changes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_networks
from torch import Tensor

from clip_gen.files import ROOT
from clip_gen.images import from_bytes, to_bytes, to_tensor
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.training.fit import fit
from clip_gen.training.stage import FitConfig
from clip_gen.weights.model_folder import load_networks
from clip_gen.worlds import ranker_trainer
from clip_gen.worlds.ranker_trainer import RankedPictures, RankerTrainer, ranked_pictures, resample_tokens
from clip_gen.worlds.shapes.pairs import CaptionedPictures

CAPTIONED = CaptionedPictures(40, 3, 16)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> RankedPictures:
    return ranked_pictures(tiny_networks(), CAPTIONED, 3, tmp_path_factory.mktemp("ranked"), "drawn")


def test_an_item_has_two_captions_and_four_pictures(ranked: RankedPictures, tmp_path: Path) -> None:
    networks = tiny_networks()
    text, pictures = ranked[82]  # in the third round
    assert np.array_equal(ranked[42][1], pictures[:, :, ::-1])
    assert np.array_equal(ranked[42][0], text)
    true, captions = CAPTIONED[2]
    assert np.array_equal(pictures[0], true)
    # A GPU rounds differently.
    assert np.allclose(text, networks.clip.encode_text(captions).numpy(), atol=1e-3)
    through = to_bytes(networks.vqgan.decode(networks.vqgan.encode(to_tensor([true]))))[0].numpy()
    assert np.abs(pictures[1].astype(int) - through).max() <= 1

    other = ranked_pictures(networks, CAPTIONED, 4, tmp_path, "drawn")
    same = [np.array_equal(ranked.pictures[0][:, place], other.pictures[0][:, place]) for place in range(4)]
    assert same == [True, True, False, False]


def test_pictures_are_sampled_in_the_number_format_of_inference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_in, sample = [], ranker_trainer.sample_tokens

    def watched(gpt: GPT, *given: object) -> Tensor:
        drawn_in.append(gpt.blocks[0].mlp.fc.weight.dtype)
        return sample(gpt, *given)

    monkeypatch.setattr(ranker_trainer, "sample_tokens", watched)
    monkeypatch.setattr(ranker_trainer, "choose_dtype", lambda wanted, device: torch.bfloat16)
    ranked_pictures(tiny_networks(), CaptionedPictures(4, 3, 16), 3, tmp_path, "drawn")
    assert drawn_in == [torch.bfloat16]


def test_interrupted_sampling_resumes_after_the_last_file_with_the_same_result(
    ranked: RankedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranker_trainer, "FILE_SIZE", 16)
    monkeypatch.setattr(ranker_trainer, "BATCH_SIZE", 8)
    networks = tiny_networks()
    whole = ranked_pictures(networks, CAPTIONED, 3, tmp_path / "whole", "drawn")
    assert [len(part) for part in whole.pictures] == [16, 16, 8]

    sample, calls = ranker_trainer.sample_tokens, []

    def interrupted(*given: object) -> Tensor:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(*given)

    monkeypatch.setattr(ranker_trainer, "sample_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranked_pictures(networks, CAPTIONED, 3, tmp_path / "interrupted", "drawn")
    again = ranked_pictures(networks, CAPTIONED, 3, tmp_path / "interrupted", "drawn")
    assert len(calls) == 4 + 3  # the first file of two batches was complete, the second was not
    for number in (0, 15, 16, 39, 40):
        for one, other in zip(whole[number], again[number], strict=True):
            assert np.array_equal(one, other)


def test_resampling_keeps_the_other_tokens() -> None:
    gpt = tiny_networks().gpt
    condition, tokens = torch.randn(64, gpt.config.embed_dim), torch.randint(gpt.config.codebook_size, (64, 16))
    touched = resample_tokens(gpt, condition, tokens, np.random.default_rng(0))
    kept = (touched == tokens).float().mean(dim=1)
    # From a tenth to all of the tokens are resampled; an untrained transformer changes nearly all of these.
    assert kept.min() < 0.3
    assert kept.max() > 0.8
    assert torch.equal(touched, resample_tokens(gpt, condition, tokens, np.random.default_rng(0)))


def test_the_text_tower_does_not_change(ranked: RankedPictures, tmp_path: Path) -> None:
    networks = tiny_networks()
    prompts = CAPTIONED[0][1]
    before, text = deepcopy(networks.clip.state_dict()), networks.clip.encode_text(prompts)
    config = FitConfig(steps=4, batch_size=8, warmup=1, ema_decay=0.5)
    fit("toy", RankerTrainer(networks.clip, config), ranked, ranked, tmp_path, seed=0)
    networks.clip.eval()
    assert torch.equal(networks.clip.encode_text(prompts), text)
    for name, value in networks.clip.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == name.startswith("clip.visual."), name


def pictures_and_texts(clip: ClipEncoder, captioned: CaptionedPictures) -> tuple[np.ndarray, Tensor]:
    """All pictures, (n, S, S, 3) uint8, and the embeddings of both captions of each, (n, 2, E)."""
    pictures, captions = zip(*(captioned[i] for i in range(len(captioned))), strict=True)
    return np.stack(pictures), torch.stack([clip.encode_text(pair) for pair in captions])


@pytest.mark.parametrize(
    ("place", "which"), [(2, 0), (3, 1)], ids=["resampled, by its caption", "sampled, by the shorter one"]
)
def test_pictures_with_a_fault_come_to_rank_lower(tmp_path: Path, place: int, which: int) -> None:
    """The bundled CLIP, with a pinhole in each sampled or resampled picture. The other caption's embedding is zero."""
    networks = load_networks(ROOT / "checkpoints" / "shapes")
    captioned = CaptionedPictures(32, 3, 64)
    scenes = [captioned.scene(i, captioned.rng(i)) for i in range(32)]
    whole, text = pictures_and_texts(networks.clip, captioned)
    through = to_bytes(networks.vqgan.decode(networks.vqgan.encode(to_tensor(list(whole))))).numpy()
    faulty = through.copy()
    for picture, scene in zip(faulty, scenes, strict=True):
        x, y = (round(64 * at) for at in (scene.items[0].x, scene.items[0].y))
        picture[y - 1 : y + 1, x - 1 : x + 1] = picture[0, 0]
    pictures = np.stack([whole, through, through, through], axis=1)
    pictures[:, place] = faulty
    text[:, 1 - which] = 0
    np.save(tmp_path / "texts.npy", text.numpy())
    np.save(tmp_path / "pictures.npy", pictures)

    def lead() -> float:
        right, wrong = (networks.clip.encode_image(from_bytes(torch.from_numpy(shown))) for shown in (through, faulty))
        return float(((right - wrong) * text[:, which]).sum(dim=1).mean())

    before = lead()
    config = FitConfig(steps=16, batch_size=8, learning_rate=5e-4, warmup=2, ema_decay=0.5)
    trainer = RankerTrainer(networks.clip, config)
    ranked = RankedPictures([(tmp_path / "texts.npy", tmp_path / "pictures.npy")])
    fit("toy", trainer, ranked, ranked, tmp_path / "work", seed=0)
    trainer.visual.eval()
    assert lead() > before + 0.02, before


def test_embeddings_of_true_pictures_stay_in_place(tmp_path: Path) -> None:
    """If samples are as good as true pictures, there is nothing to learn."""
    networks = load_networks(ROOT / "checkpoints" / "shapes")
    whole, text = pictures_and_texts(networks.clip, CaptionedPictures(32, 3, 64))
    np.save(tmp_path / "texts.npy", text.numpy())
    np.save(tmp_path / "pictures.npy", np.repeat(whole[:, None], 4, axis=1))
    before = networks.clip.encode_image(to_tensor(list(whole)))
    config = FitConfig(steps=16, batch_size=8, learning_rate=5e-4, warmup=2, ema_decay=0.5)
    trainer = RankerTrainer(networks.clip, config)
    ranked = RankedPictures([(tmp_path / "texts.npy", tmp_path / "pictures.npy")])
    fit("toy", trainer, ranked, ranked, tmp_path / "work", seed=0)
    trainer.visual.eval()
    after = networks.clip.encode_image(to_tensor(list(whole)))
    assert float((before * after).sum(dim=1).mean()) > 0.98
