"""worlds/recipe.py and worlds/clip_trainer.py at toy size: the parts of the bundled model."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.config import BridgeConfig, read_config, write_config
from clip_gen.files import MARK, ROOT, folder_lock
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.model_folder import save_networks
from clip_gen.weights.tarball import open_weights
from clip_gen.worlds.clip_trainer import UNSAID, ClipTrainer, Naming, contrastive_loss
from clip_gen.worlds.pairs import SeededPictures
from clip_gen.worlds.recipe import CONFIGS, NEEDS, Recipe
from clip_gen.worlds.recipe_config import RecipeConfig
from clip_gen.worlds.recipe_pictures import RecipePictures
from clip_gen.worlds.shapes.pairs import CHOICES, CaptionedPairs
from clip_gen.worlds.shapes.recipe import WORLD
from clip_gen.worlds.world import WORLDS, load_world

FEW = 64  # pictures, where a part is validated and where the bridge is measured
FIT = FitConfig(steps=6, batch_size=8, warmup=2, ema_decay=0.5)
RECIPE = RecipeConfig(
    model=replace(TINY, bridge=BridgeConfig(memory=32, memory_axes=8)),
    clip_fit=FIT,
    vqgan_fit=FIT,
    gpt_fit=FIT,
    ranker_fit=FIT,
    encoded_pictures=64,
    hard_pictures=32,
    contrast=4.0,
    drawn_pictures=48,
    condition_blur=0.5,
)


@pytest.fixture(scope="module", autouse=True)
def _few_pictures() -> Iterator[None]:
    """Otherwise each part is validated with 512 pictures or more, and the bridge measured with 8,000."""
    pictures = RecipePictures.of

    def few(recipe: RecipePictures, kind: type[SeededPictures], count: int, *more: int) -> SeededPictures:
        return pictures(recipe, kind, min(count, FEW), *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipePictures, "of", few)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = Recipe(RECIPE, tmp_path_factory.mktemp("work"))
    for part in NEEDS:
        recipe.load_or_train(part)
    return recipe


def test_the_recipe_makes_a_model_folder_that_predicts(trained: Recipe, tmp_path: Path) -> None:
    save_networks(trained.networks, tmp_path / "model", trained.training_record())
    result = ClipGen.load(tmp_path / "model", "cpu").generate("a red circle", candidates=2, num_outputs=2, seed=0)
    assert len(result.images) == 2
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    for part in ("clip", "vqgan", "gpt", "ranker"):
        assert record["stages"][part]["steps"] == 6
        assert [(start["from_step"], start["to_step"]) for start in record["stages"][part]["starts"]] == [(0, 6)]
        assert record["config"][f"{part}_fit"]["steps"] == 6
    assert record["held_out"] == ["cyan diamond", "green cross", "orange ring", "purple star", "yellow heart"]
    assert not (tmp_path / "model" / "LICENSES.md").exists()
    assert len(trained.networks.bridge.memory.rows.unique(dim=0)) > 16


def test_the_transformer_trains_on_hard_pictures_too(trained: Recipe) -> None:
    pictures = trained.pictures
    seen, usual = pictures.encoded(), pictures.encode("train", SeededPictures(64, 0, 16), "clip", "vqgan")
    assert len(seen) == 64 + 32
    assert np.array_equal(seen.embeddings[:64], np.load(usual[0]))
    assert np.array_equal(seen.tokens[:64], np.load(usual[1]))
    assert len(np.unique(seen.tokens[64:], axis=0)) > 16
    samples = [seen.draw(number, np.random.default_rng(number)) for number in (3, 70)]
    assert [torch.equal(condition, near_miss) for condition, _, _, _, near_miss, *_ in samples] == [False, True]


def test_a_transformer_can_start_from_that_of_a_model_folder(trained: Recipe, tmp_path: Path) -> None:
    model = replace(RECIPE.model, gpt=replace(TINY.gpt, sketch_drawings=1, sketch_cells=2))
    config = replace(RECIPE, model=model, sketch_fit=FIT, temperature=0.5, contrast=0.0)
    parts, left_out = ("sketch", "gpt"), shutil.ignore_patterns("sketch", "gpt")
    first = Recipe(config, Path(shutil.copytree(trained.work, tmp_path / "first", ignore=left_out)))
    for part in parts:
        first.load_or_train(part)
    save_networks(first.networks, tmp_path / "model", {})

    still = FitConfig(steps=2, batch_size=8, learning_rate=1e-9, ema_decay=0.0)
    config = replace(config, start=str(tmp_path / "model"), gpt_fit=still)
    again = Recipe(config, Path(shutil.copytree(trained.work, tmp_path / "again", ignore=left_out)))
    for part in parts:
        again.load_or_train(part)
    sketched = load_file(again.weights("sketch"))
    for name, tensor in first.networks.gpt.state_dict().items():
        wanted = sketched[name].float() if name in sketched else tensor
        assert torch.allclose(again.networks.gpt.state_dict()[name], wanted, atol=1e-3), name
    assert not torch.allclose(sketched["sketch.head.weight"].float(), first.networks.gpt.sketch.head.weight, atol=1e-3)
    with pytest.raises(ValueError, match="another recipe"):
        Recipe(replace(config, start=""), again.work).load_or_train("sketch")


def test_without_pictures_to_rank_clip_stays_as_it_is(trained: Recipe, tmp_path: Path) -> None:
    work = Path(shutil.copytree(trained.work, tmp_path / "work", ignore=shutil.ignore_patterns("ranker")))
    recipe = Recipe(replace(RECIPE, drawn_pictures=0), work)
    for part in NEEDS:
        recipe.load_or_train(part)
    assert json.loads((work / "ranker" / "record.json").read_text()) == {}
    ranked, words = (load_file(work / part / f"{part}.safetensors") for part in ("ranker", "words"))
    assert all(torch.equal(tensor, ranked[name]) for name, tensor in words.items())


def test_a_finished_part_is_not_trained_again(trained: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Recipe(RECIPE, trained.work)
    monkeypatch.setattr("clip_gen.worlds.recipe.fit", None)
    again.load_or_train("vqgan")
    for name, tensor in load_file(trained.work / "vqgan" / "vqgan.safetensors").items():
        assert torch.equal(tensor.float(), again.networks.vqgan.state_dict()[name].float()), name


def test_parts_are_trained_after_those_that_they_need(
    trained: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, parts = Path(shutil.copytree(trained.work, tmp_path / "work")), []
    load_or_train = Recipe.load_or_train

    def watched(recipe: Recipe, name: str) -> None:
        parts.append(name)
        load_or_train(recipe, name)

    monkeypatch.setattr(Recipe, "load_or_train", watched)
    write_config(RECIPE, tmp_path / "recipe.yaml")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--work", str(work), "--out", str(tmp_path / "model")]
    (work / MARK).write_text("train-shapes\n")
    assert main(["train-shapes", *words, "--parts", "bridge", "vqgan"]) == 0
    assert parts == ["clip", "vqgan", "text", "words", "bridge"]
    assert not (tmp_path / "model").exists()
    parts.clear()
    assert main(["train-shapes", *words, "--parts", "ranker"]) == 0
    assert parts == list(NEEDS)
    assert ClipGen.load(tmp_path / "model", "cpu").config.name == TINY.name


def test_a_recipe_of_another_world_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(RECIPE, tmp_path / "recipe.yaml")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--work", str(tmp_path / "work")]
    assert main(["train-emoji", *words, "--out", str(tmp_path / "model")]) == 1
    assert "recipe.yaml is a recipe of the world shapes; use train-shapes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_unknown_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no world is called "cats"; give shapes or emoji'):
        Recipe(replace(RECIPE, world="cats"), tmp_path)


@pytest.mark.parametrize("world", WORLDS)
def test_the_recipe_of_each_world_is_valid_and_names_its_world(world: str) -> None:
    config = read_config(CONFIGS / f"{world}.yaml", RecipeConfig)
    config.model.check()
    assert config.world == load_world(world).name == config.model.name == world


def test_a_model_of_emoji_and_the_tar_of_a_model_fine_tuned_from_it_name_the_artists(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = replace(TINY, gpt=replace(TINY.gpt, sketch_drawings=1, sketch_cells=2))
    recipe = replace(RECIPE, world="emoji", model=model, sketch_fit=FIT, text_steps=2, word_steps=2)
    write_config(recipe, tmp_path / "recipe.yaml")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--work", str(tmp_path / "work")]
    with caplog.at_level(logging.INFO):
        assert main(["train-emoji", *words, "--out", str(tmp_path / "model")]) == 0
    for part in ("clip", "vqgan", "sketch", "gpt", "ranker"):
        assert any(f"{part} 6/6" in line for line in caplog.messages)
    assert len(ClipGen.load(tmp_path / "model", "cpu").generate("a cat", candidates=1, num_outputs=1).images) == 1
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert {name: len(rows) for name, rows in record["held_out"].items()} == {
        **{"backgrounds": 60, "colours": 60, "styles": 30, "relations": 60}
    }
    licenses = (tmp_path / "model" / "LICENSES.md").read_bytes()
    assert licenses == load_world("emoji").licenses.read_bytes()
    for package in ("@iconify-json/noto 1.2.9", "@iconify-json/twemoji 1.2.5", "@lobehub/fluent-emoji-3d 1.1.0"):
        assert package in licenses.decode()

    settings = TrainSettings(base=str(tmp_path / "model"), vqgan_steps=1, transformer_steps=1)
    tar = Training(photos, tmp_path / "tuned", settings).run()
    unpacked = open_weights(tar)
    assert (unpacked.path / "LICENSES.md").read_bytes() == licenses
    assert len(ClipGen.load(unpacked.path, "cpu").generate("a cat", candidates=1, num_outputs=1).images) == 1
    unpacked.close()


def test_other_processes_wait_for_a_part_that_the_first_trains_alone(
    trained: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.worlds.recipe.rank_zero_only.rank", 1)
    again = Recipe(RECIPE, Path(shutil.copytree(trained.work, tmp_path / "work")))
    record, waited = again.work / "ranker" / "record.json", []
    kept = record.read_bytes()
    record.unlink()
    monkeypatch.setattr("clip_gen.worlds.recipe.fit", None)
    monkeypatch.setattr("clip_gen.worlds.recipe.wait_for", lambda path: waited.append(path.write_bytes(kept)))
    again.load_or_train("ranker")
    assert waited


def test_an_interrupted_part_resumes_from_its_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = replace(RECIPE, vqgan_fit=replace(FIT, steps=4))
    Recipe(half, tmp_path).load_or_train("vqgan")
    (tmp_path / "vqgan" / "record.json").unlink()
    with caplog.at_level(logging.INFO):
        Recipe(RECIPE, tmp_path).load_or_train("vqgan")
    record = json.loads((tmp_path / "vqgan" / "record.json").read_text())
    assert record["steps"] == 6
    assert [(start["from_step"], start["to_step"]) for start in record["starts"]] == [(0, 4), (4, 6)]
    assert sum("vqgan 6/6" in line for line in caplog.messages) == 1
    assert not any("4/6" in line for line in caplog.messages)


def test_a_resumed_part_trains_on_the_pictures_it_has_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = VQGANTrainer.training_step

    def watched(self: VQGANTrainer, batch: torch.Tensor) -> torch.Tensor:
        seen.extend(hash(picture.numpy().tobytes()) for picture in batch)
        return step(self, batch)

    monkeypatch.setattr(VQGANTrainer, "training_step", watched)
    Recipe(replace(RECIPE, vqgan_fit=replace(FIT, steps=4)), tmp_path).load_or_train("vqgan")
    (tmp_path / "vqgan" / "record.json").unlink()
    Recipe(RECIPE, tmp_path).load_or_train("vqgan")
    assert len(seen) == 48
    assert len(set(seen)) == 48


def test_resuming_after_the_last_step_keeps_the_averaged_weights(tmp_path: Path) -> None:
    first = Recipe(RECIPE, tmp_path)
    first.load_or_train("vqgan")
    (tmp_path / "vqgan" / "record.json").unlink()
    again = Recipe(RECIPE, tmp_path)
    again.load_or_train("vqgan")
    for name, tensor in first.networks.vqgan.state_dict().items():
        assert torch.equal(tensor, again.networks.vqgan.state_dict()[name]), name


def test_a_finished_part_of_another_recipe_is_refused(trained: Recipe) -> None:
    other = Recipe(replace(RECIPE, vqgan_fit=replace(FIT, steps=7)), trained.work)
    with pytest.raises(ValueError, match="vqgan was trained by another recipe; remove it"):
        other.load_or_train("vqgan")


@pytest.mark.parametrize(
    "other",
    [
        {"vqgan_fit": replace(FIT, learning_rate=0.5)},
        {"vqgan_fit": replace(FIT, steps=7), "seed": 1},
        {"model": replace(TINY, vqgan=replace(TINY.vqgan, codebook_dim=8))},
    ],
)
def test_an_unfinished_part_of_another_recipe_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    Recipe(replace(RECIPE, vqgan_fit=replace(FIT, steps=4)), tmp_path).load_or_train("vqgan")
    (tmp_path / "vqgan" / "record.json").unlink()
    kept = (tmp_path / "vqgan" / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match="vqgan was trained by another recipe; remove it"):
        Recipe(replace(RECIPE, **other), tmp_path).load_or_train("vqgan")
    assert (tmp_path / "vqgan" / "last.ckpt").read_bytes() == kept


def test_samples_of_another_transformer_are_refused(trained: Recipe, tmp_path: Path) -> None:
    work = Path(shutil.copytree(trained.work, tmp_path / "work"))
    (work / "ranker" / "record.json").unlink()
    settings = json.loads((work / "ranker" / "settings.json").read_text())
    (work / "ranker" / "settings.json").write_text(json.dumps(settings | {"gpt": "another"}))
    with pytest.raises(ValueError, match="ranker was trained by another recipe; remove it"):
        Recipe(RECIPE, work).load_or_train("ranker")


def test_two_processes_do_not_train_one_part(trained: Recipe, tmp_path: Path) -> None:
    work = Path(shutil.copytree(trained.work, tmp_path / "work"))
    (work / "vqgan" / "record.json").unlink()
    with folder_lock(work / "vqgan", ""), pytest.raises(ValueError, match="vqgan is in use by another training; wait"):
        Recipe(RECIPE, work).load_or_train("vqgan")
    assert not (work / "vqgan" / "record.json").is_file()


def test_a_part_killed_after_its_last_step_keeps_its_record(trained: Recipe, tmp_path: Path) -> None:
    again = Recipe(RECIPE, Path(shutil.copytree(trained.work, tmp_path / "work")))
    record = again.work / "vqgan" / "record.json"
    before = json.loads(record.read_text())
    record.unlink()
    again.load_or_train("vqgan")
    assert json.loads(record.read_text()) == before
    assert before["val_psnr"] > 0


def test_the_bundled_recipe_selects_informative_places_and_starts_from_the_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_config(ROOT / "clip_gen" / "configs" / "shapes.yaml", RecipeConfig)
    whole.model.check()
    short = replace(whole.gpt_fit, steps=2, batch_size=16, compile=False)
    recipe = Recipe(replace(whole, gpt_fit=short, encoded_pictures=64), tmp_path)
    (tmp_path / "encoded").mkdir()
    for name, unseen in (("clip", np.zeros((4, 128), np.float16)), ("vqgan", np.zeros((4, 256), np.uint16))):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "checkpoints" / "shapes" / f"{name}.safetensors", tmp_path / name)
        (tmp_path / name / "settings.json").write_text(json.dumps(recipe.settings(name)))
        (tmp_path / name / "record.json").write_text("{}")
        recipe.load_or_train(name)
        np.save(tmp_path / "encoded" / f"{name}-{recipe.fingerprint(name)}-unseen-{FEW}.npy", unseen)

    batches, step = [], GPTTrainer.training_step

    def watched(self: GPTTrainer, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        batches.append(batch)
        return step(self, batch)

    monkeypatch.setattr(GPTTrainer, "training_step", watched)
    recipe.load_or_train("sketch")
    recipe.load_or_train("gpt")
    for conditions, tokens, _, _, near_misses, places, chances in batches:
        assert places.shape == chances.shape
        assert tokens.shape[1] / 8 < places.shape[1] < tokens.shape[1] / 2
        assert 0 < (near_misses != conditions).any(dim=1).sum() < len(conditions)
    codes = F.normalize(recipe.networks.vqgan.quantizer.lookup(torch.arange(1024)[None])[0].float(), dim=1)
    tokens = F.normalize(recipe.networks.gpt.token_embedding.weight.float(), dim=1)
    alike = torch.corrcoef(torch.stack([(codes @ codes.T).flatten(), (tokens @ tokens.T).flatten()]))[0, 1]
    assert alike > 0.9


def test_training_changes_the_weights_it_should_and_keeps_the_others(trained: Recipe) -> None:
    fresh = Recipe(RECIPE, Path("unused")).networks
    for part in ("vqgan", "gpt", "clip"):
        before = dict(getattr(fresh, part).named_parameters())
        moved = [
            not torch.allclose(before[name], parameter, atol=1e-3)
            for name, parameter in getattr(trained.networks, part).named_parameters()
        ]
        assert sum(moved) > len(moved) / 2, part


def test_the_batch_norms_of_clip_are_trained(trained: Recipe) -> None:
    norm = trained.networks.clip.clip.visual.bn1
    assert norm.num_batches_tracked == 6 + 6  # and again as a ranker
    assert norm.running_mean.abs().sum() > 0


def test_muon_trains_the_towers_of_clip_but_not_the_large_matrices_of_its_attention_pool() -> None:
    encoder = ClipEncoder(TINY.clip)
    trainer = ClipTrainer(encoder, CHOICES, replace(FIT, muon_rate=1e-3))
    matrices, others = trainer.configure_optimizers()["optimizer"].param_groups
    names = {id(parameter): name for name, parameter in encoder.clip.named_parameters()}
    with_muon = {names[id(parameter)] for parameter in matrices["params"]}
    with_adamw = {names.get(id(parameter), "naming") for parameter in others["params"]}
    assert {"visual.conv1.weight", "transformer.resblocks.0.mlp.c_fc.weight"} <= with_muon
    assert {"visual.attnpool.q_proj.weight", "token_embedding.weight", "text_projection", "naming"} <= with_adamw
    assert not with_muon & with_adamw


def test_words_never_trained_have_zero_embeddings(trained: Recipe) -> None:
    clip = trained.networks.clip
    table = clip.clip.token_embedding.weight
    known, unknown = (clip.tokenize([word])[0, 1] for word in ("shape", "zebra"))
    assert table[unknown].abs().sum() == 0
    assert table[known].abs().sum() > 0


def test_true_captions_of_other_pictures_are_no_wrong_answers() -> None:
    # Caption 0 is true of both pictures, so only caption 1 may change to separate them.
    is_true = torch.tensor([[True, True], [False, True]])
    logits = torch.tensor([[0.0, 9.0], [0.0, 9.0]], requires_grad=True)
    contrastive_loss(logits, is_true).backward()
    assert logits.grad[0, 1] == 0
    assert logits.grad[1, 0] > 0


def test_spoilt_pictures_are_wrong_answers_for_all_captions() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    contrastive_loss(logits, torch.eye(2, dtype=torch.bool)).backward()
    assert (logits.grad[:, 2] > 0).all()


@pytest.mark.parametrize("naming_only", [0.0, 1.0])
def test_the_small_clip_learns(naming_only: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.worlds.clip_trainer.NAMING_ONLY", naming_only)
    torch.manual_seed(0)
    encoder = ClipEncoder(TINY.clip)
    trainer = ClipTrainer(encoder, CHOICES, FitConfig(steps=40, learning_rate=3e-3, warmup=5, weight_decay=0.0))
    trainer.log_dict = lambda *_, **__: None
    pairs = CaptionedPairs(8, 0, 32)
    batch = WORLD.collate(TINY.clip.context_length * 2)([pairs[i] for i in range(8)])
    batch = batch._replace(tokens=batch.tokens[:, :16])
    optimizer = trainer.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(40):
        loss = trainer.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_naming_ignores_questions_without_an_answer() -> None:
    torch.manual_seed(0)
    naming = Naming(8, CHOICES)
    circle = torch.tensor([[0, 0, 0, UNSAID, 1, UNSAID, UNSAID, UNSAID]])
    naming(torch.randn(1, 8), circle).backward()
    asked = [gradient.any().item() for gradient in naming.read[-1].bias.grad.split(CHOICES)]
    assert asked == [True, True, True, False, True, False, False, False]
    both, embeddings = torch.cat([circle, torch.full((1, 8), UNSAID)]), torch.randn(2, 8)
    assert torch.allclose(naming(embeddings, both), naming(embeddings[:1], circle))
