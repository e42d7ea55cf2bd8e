"""training/job.py: a zip of pictures to weights that predict, at toy size."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, picture_bytes, tiny_networks
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.files import ROOT, folder_lock
from clip_gen.images import from_bytes
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.discriminator import build_discriminator
from clip_gen.training import cli, job
from clip_gen.training import folder as training_folder
from clip_gen.training.datasets import PictureFiles, Views
from clip_gen.training.decisions import TOKENS, settle_tokens
from clip_gen.training.fit import Machine
from clip_gen.training.job import Training
from clip_gen.training.plan import MODEL_SIZES, NEW_TOKENS, Tokens, TrainSettings, plan
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.model_folder import ModelFolderError, save_networks, save_part, transformer_matches
from clip_gen.weights.tarball import resolve_weights
from clip_gen.worlds.shapes.pairs import RenderedPictures

TOY = TrainSettings(
    vqgan_steps=8,
    transformer_steps=8,
    batch_size=4,
    sample_prompts="a red circle | a star",
    precision="32-true",  # in bfloat16 eight steps hardly change the validation loss, so the stage would end early
    seed=3,
    crop=False,  # one view of each picture: many take time to encode
    flip=False,
)


def prepared(images: Path, out: Path, settings: TrainSettings, machine: Machine | None = None) -> Training:
    """A training that has begun: its pictures are unpacked and its stages planned."""
    training = Training(images, out, settings, machine)
    training.check()
    training.load_base()
    training_folder.claim(out)
    training.pictures = training_folder.unpack_once(training.images, out, settings)
    training.plan_stages()
    training.clean_folder()
    training.build_networks()
    return training


@pytest.fixture
def toy(tiny_model_folder: Path) -> TrainSettings:
    return replace(TOY, base=str(tiny_model_folder))


def test_a_zip_becomes_a_tar_that_predicts(
    photos: Path, toy: TrainSettings, tiny_model: ClipGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    tar = Training(photos, tmp_path / "out", replace(toy, crop=True, flip=True)).run()
    model = ClipGen.load(resolve_weights(str(tar)), "cpu")
    assert model.config.name == "trained"  # not its base's name
    assert len(model.generate("a red circle", candidates=2, num_outputs=2, seed=0).images) == 2
    for part in ("vqgan", "gpt"):
        before = getattr(tiny_model, part).state_dict()
        assert any(not torch.equal(before[name], value) for name, value in getattr(model, part).state_dict().items())
    for name, value in model.clip_encoder.state_dict().items():
        assert torch.equal(value, tiny_model.clip_encoder.state_dict()[name])
    bridge: Bridge = model.bridge
    assert not torch.equal(bridge.image_mean, tiny_model.bridge.image_mean)
    assert torch.equal(bridge.text_mean, tiny_model.bridge.text_mean)

    record = json.loads((tmp_path / "out" / "model" / "training.json").read_text())
    assert record["pictures"]["used"] == 24
    assert {one["name"] for one in record["pictures"]["skipped"]} == {"album/again.png", "album/notes.txt"}
    assert record["pictures"]["held_back"] == 2
    assert record["stages"]["vqgan"]["steps"] == record["stages"]["gpt"]["steps"] == 8
    assert record["settings"]["seed"] == 3
    assert record["settings"]["base"] == "tiny"  # not its path
    assert record["warnings"] == []


def test_prompts_shift_towards_the_pictures_if_the_mean_of_texts_is_known(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    networks = tiny_networks()
    networks.bridge.text_mean.fill_(0.1)
    save_networks(networks, tmp_path / "known", training={})
    for base, shift in ((toy.base, 0.0), (str(tmp_path / "known"), 1.0)):
        training = prepared(photos, tmp_path / str(shift), replace(toy, base=base))
        training.measure_pictures()
        moved = training.networks.bridge(torch.eye(16))
        assert torch.allclose(moved, torch.eye(16), atol=1e-6) == (shift == 0)
        save_networks(training.networks, tmp_path / "out", training={})
        assert ClipGen.load(tmp_path / "out", "cpu").bridge.config.mean_shift == shift


def test_the_report_has_curves_grids_and_skipped_files(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    Training(photos, tmp_path, toy).run()
    page = (tmp_path / "report.html").read_text()
    for stage in ("vqgan", "gpt"):
        assert {"0000000.png", "0000008.png"} <= {path.name for path in (tmp_path / "work" / stage / "grids").iterdir()}
    assert page.count("<th>before training</th>") == 2
    shown = ("what the VQGAN makes of them", "what is drawn from their embeddings", "“a red circle”", "“a star”")
    for words in ("album/notes.txt", "a duplicate", "A training on 24 pictures", "<td>val_psnr</td>", *shown):
        assert words in page, words
    assert not re.search("https?://|http-equiv", page)  # loads nothing, and does not renew itself when finished
    assert page.count("data:image/svg+xml;base64") >= 8 or find_spec("matplotlib") is None  # curves
    with Image.open(tmp_path / "work" / "vqgan" / "grids" / "0000008.png") as grid:
        assert grid.height == 2 * 98 + 2  # two rows: pictures and reconstructions
    with Image.open(tmp_path / "work" / "gpt" / "grids" / "0000008.png") as grid:
        assert grid.height == 4 * 98 + 2  # decoded tokens, samples from embeddings, and two prompts


def test_a_size_trains_new_networks_for_the_clip_of_the_base(
    photos: Path, toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_laptop(monkeypatch)
    Training(photos, tmp_path, replace(toy, size="laptop", resolution=16, codebook_size=32, vqgan_steps=2)).run()
    model = ClipGen.load(tmp_path / "model", "cpu")
    assert model.config.vqgan.resolution == 16
    assert model.config.gpt.codebook_size == model.config.vqgan.codebook_size == 32


@pytest.mark.parametrize("size", ["base", "laptop"])
def test_a_trained_model_keeps_the_vocabulary_and_the_licences_of_its_base(
    photos: Path, toy: TrainSettings, tmp_path: Path, size: str
) -> None:
    base = Path(shutil.copytree(toy.base, tmp_path / "base"))
    texts = {"vocabulary.txt": "stars\n", "LICENSES.md": "by an artist\n"}
    for name, text in texts.items():
        (base / name).write_text(text)
    training = prepared(photos, tmp_path / "out", replace(toy, base=str(base), size=size))
    assert training.networks.texts == texts


def test_stage_2_trains_on_the_informative_tokens_of_drawings(
    toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training killed between encoding and the first checkpoint ends with the same weights."""
    for i in range(12):
        drawing = np.full((64, 64, 3), 255, np.uint8)
        drawing[16:40, 8 + i : 32 + i] = 20 * i
        (tmp_path / "drawings").mkdir(exist_ok=True)
        Image.fromarray(drawing).save(tmp_path / "drawings" / f"{i}.png")
    small_laptop(monkeypatch)
    chosen = replace(toy, size="laptop", resolution=32, codebook_size=32, vqgan_steps=2, flip=True, shift=True)

    def trained(folder: str, settings: TrainSettings) -> tuple[object, dict[str, torch.Tensor]]:
        out = tmp_path / folder
        Training(tmp_path / "drawings", out, settings).run()
        record = json.loads((out / "model" / "training.json").read_text())
        return record["stages"]["gpt"]["places"], load_file(out / "work" / "gpt" / "gpt.safetensors")

    places, weights = trained("few", chosen)
    assert places == 32  # of 64
    shutil.rmtree(tmp_path / "few" / "work" / "gpt")
    again = trained("few", chosen)[1]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert trained("contrast", replace(chosen, contrast_weight=1.0))[0] == 32
    assert trained("whole", replace(chosen, embedding_loss_weight=1.0))[0] == "all"


def test_contrast_finds_neighbours_and_shows_in_the_report(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for weight in (4.0, 0.0):
        out = tmp_path / str(weight)
        Training(photos, out, replace(toy, stage="transformer", contrast_weight=weight, condition_blur=0.0)).run()
        history = (out / "work" / "gpt" / "history.jsonl").read_text()
        found = out / "work" / "encoded" / "neighbours-learnt.npy"
        assert ('"contrast"' in history) == found.exists() == (weight > 0)
        assert ('alt="Contrast"' in (out / "report.html").read_text()) == (weight > 0)


def test_one_stage_alone_leaves_the_other_network_unchanged(
    photos: Path, toy: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_file(Path(toy.base) / "vqgan.safetensors")
    Training(photos, tmp_path / "gpt", replace(toy, stage="transformer")).run()
    after = load_file(tmp_path / "gpt" / "model" / "vqgan.safetensors")
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert "does not know these tokens" not in caplog.text
    poor = r"the base's VQGAN reconstructs these pictures at (\d+\.\d) dB, .* and drawn pictures look no better;"
    quality = float(re.search(poor, caplog.text)[1])
    record = json.loads((tmp_path / "gpt" / "model" / "training.json").read_text())["stages"]["gpt"]
    assert record["psnr"] == pytest.approx(quality, abs=0.06)
    assert quality < 18
    base = load_file(Path(toy.base) / "gpt.safetensors")
    Training(photos, tmp_path / "vqgan", replace(toy, stage="vqgan")).run()
    after = load_file(tmp_path / "vqgan" / "model" / "gpt.safetensors")
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert "the transformer does not know these tokens yet" in caplog.text
    assert "draws noise" not in caplog.text
    ClipGen.load(tmp_path / "vqgan" / "model", "cpu")
    assert "its transformer was not trained on the tokens of its VQGAN, so that it draws noise" in caplog.text


def small_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    vqgan, gpt = MODEL_SIZES["laptop"]
    small = (replace(vqgan, ch=64, z_channels=64), replace(gpt, n_layer=1, n_head=2, n_embd=16))
    monkeypatch.setitem(MODEL_SIZES, "laptop", small)


def test_too_few_steps_are_a_warning_at_the_start_and_at_the_end(
    photos: Path, toy: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New networks: a stage in which too few steps fit has a warning, one with enough steps has none."""
    small_laptop(monkeypatch)
    chosen = replace(toy, size="laptop", resolution=16, codebook_size=32, max_minutes=0.15, sample_prompts="")
    chosen = replace(chosen, vqgan_steps=10**6, transformer_steps=1, perceptual_weight=0.0, adversarial_weight=0.0)
    with caplog.at_level(logging.INFO):
        Training(photos, tmp_path, chosen).run()
    logged = caplog.messages
    begins = r"stage 1 of 2: the VQGAN, ends by time at about step [\d,]+ of 1,000,000, after 0.03 mi"
    first = next(i for i, line in enumerate(logged) if re.match(begins, line))
    assert "minutes: too few for more than blobs; give max_minutes of about " in logged[first]
    assert logged[first].endswith(", or a smaller size or resolution")
    over = next(i for i, line in enumerate(logged) if "minutes are over at step" in line)
    assert first < over
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    vqgan, gpt = (record["stages"][name] for name in ("vqgan", "gpt"))
    assert (vqgan["planned_steps"], vqgan["ended_by"], gpt["ended_by"]) == (10**6, "time", "steps")
    assert vqgan["forecast_steps"] == int(re.search(r"step ([\d,]+)", logged[first])[1].replace(",", ""))
    assert 0.2 < vqgan["forecast_steps"] / vqgan["steps"] < 5
    # After a single step the transformer may also draw copies, which is another warning.
    (last,) = [warning for warning in record["warnings"] if warning.startswith("vqgan")]
    assert logged.index(last) > over
    assert last.startswith(f"vqgan: its time ended after {vqgan['steps']:,} of 1,000,000 steps, too few for more than")
    minutes = float(re.search("about ([0-9,.]+),", last)[1].replace(",", ""))
    assert minutes == pytest.approx(0.15 * 250_000 / vqgan["steps"], rel=0.05)
    assert last in (tmp_path / "report.html").read_text()


def test_warnings_for_few_steps_on_a_base_and_for_pictures_left_out(
    toy: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = replace(toy, stage="transformer", sample_prompts="", crop=True, flip=True)
    many = tmp_path / "many"
    write_folder(many, 100)
    with caplog.at_level(logging.INFO):
        Training(many, tmp_path / "few", replace(chosen, transformer_steps=10**6, max_minutes=1e-3)).run()
    logged = "\n".join(caplog.messages)
    assert re.search(r"encoding: 32 of 3,040 views, \d+ a second; about 32 fit into 5e-05 minutes", logged)
    steps, pictures = json.loads((tmp_path / "few" / "model" / "training.json").read_text())["warnings"]
    assert re.search(
        r"stage 1 of 1: the transformer, ends by time at about step [\d,]+ of 1,000,000, after 0.1 minutes: too few, "
        "so the model draws worse than its base",
        logged,
    )
    assert pictures == (
        "gpt: its time sufficed to encode 32 of 95 pictures, and it learns from no others; give 3.0 times as many "
        "max_minutes, in another folder"
    )
    assert re.match(
        r"gpt: its time ended after [\d,]+ of 1,000,000 steps, too few, so the model draws worse than its base", steps
    )
    assert logged.index(pictures.removesuffix(", in another folder")) < logged.index("stage 1 of 1")
    assert logged.count(pictures.removesuffix(", in another folder")) == 2


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "A process that loads pictures was killed"),
        ("[gloo/transport/tcp/pair.cc:538] Connection reset by peer", "Another process of this training has ended"),
    ],
)
def test_the_death_of_another_process_is_one_sentence(
    message: str, sentence: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    def killed(training: Training) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(Training, "run", killed)
    monkeypatch.setattr(cli, "process_count", lambda: 2)
    assert main(["train", str(photos), "--out", str(tmp_path / "out")]) == 1
    logged = capsys.readouterr().err
    assert logged.startswith(f"train: {sentence}")
    assert "this command starts the training" in logged


def test_a_folder_of_another_training_is_refused(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    prepared(photos, tmp_path, toy)
    prepared(photos, tmp_path, replace(toy, max_minutes=5, sample_prompts="a blue star"))
    prepared(photos, tmp_path, replace(toy, sample_prompts=""))
    with pytest.raises(ValueError, match="with vqgan_steps 8, not 9; give the same value to resume it"):
        prepared(photos, tmp_path, replace(toy, vqgan_steps=9))


def test_a_training_resumes_after_its_base_and_pictures_were_moved(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    prepared(photos, tmp_path / "out", toy)
    moved = Path(shutil.copytree(toy.base, tmp_path / "base"))
    prepared(Path(shutil.copy(photos, tmp_path)), tmp_path / "out", replace(toy, base=str(moved)))
    gpt = moved / "gpt.safetensors"
    weights = load_file(gpt)
    save_file({**weights, "head.weight": weights["head.weight"] + 1}, gpt)
    with pytest.raises(ValueError, match=r"holds a training from another base than .*/base; give the same model"):
        prepared(photos, tmp_path / "out", replace(toy, base=str(moved)))


def test_a_setting_missing_in_an_old_folder_has_its_default(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    prepared(photos, tmp_path, toy)
    saved = tmp_path / "work" / "settings.json"
    saved.write_text(json.dumps({k: v for k, v in json.loads(saved.read_text()).items() if k != "tokens"}))
    with pytest.raises(ValueError, match="holds a training with tokens 'auto', not 'learn'"):
        prepared(photos, tmp_path, replace(toy, tokens="learn"))
    prepared(photos, tmp_path, toy)


def test_a_training_that_an_earlier_version_began_without_lora_resumes_without_it(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    toy = replace(toy, stage="transformer")
    assert prepared(photos, tmp_path, toy).plan.lora_rank
    saved = tmp_path / "work" / "settings.json"
    saved.write_text(json.dumps({k: v for k, v in json.loads(saved.read_text()).items() if k != "lora"}))
    for _ in range(2):
        assert not prepared(photos, tmp_path, toy).plan.lora_rank
    with pytest.raises(ValueError, match="holds a training with lora 'off', not 'on'"):
        prepared(photos, tmp_path, replace(toy, lora="on"))


def test_two_trainings_do_not_share_a_folder(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    busy = f"{tmp_path} is in use by another training; wait for it to end, or name another folder"
    busy += rf" \(process {os.getpid()} holds it\)"
    training_folder.claim(tmp_path)
    training = Training(photos, tmp_path, toy)
    with folder_lock(tmp_path / "work", ""), pytest.raises(ValueError, match=busy):
        training.run()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["lock"]


def test_other_processes_wait_for_the_first_and_ignore_files_of_earlier_starts(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    """As under torchrun, which starts all of them at once; the earlier start had time for few views."""
    chosen = replace(toy, stage="transformer", transformer_steps=2, flip=True)
    earlier = prepared(photos, tmp_path, replace(chosen, max_minutes=1e-6))
    assert earlier.encode_train_pictures().rows == 32
    earlier.ready.close()  # as when its process ends
    code = f"""
import sys
from pathlib import Path
from clip_gen.training.job import Training, TrainSettings, training_folder, wait_for_announcement
print("begun", flush=True)
training = Training(Path({str(photos)!r}), Path({str(tmp_path)!r}), {chosen!r})
training.check()
training.load_base()
wait_for_announcement(training.work / "ready")
training.pictures = training_folder.unpack_once(training.images, training.out, training.settings)
training.plan_stages()
training.clean_folder()
training.build_networks()
print(training.encode_train_pictures().rows, flush=True)
"""
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as second:
        assert second.stdout.readline() == "begun\n"
        assert not select.select([second.stdout], [], [], 1.5)[0]
        assert second.poll() is None
        first = prepared(photos, tmp_path, chosen)
        assert first.encode_train_pictures().rows == 22 * 2
        assert second.stdout.readline() == f"{22 * 2}\n"


def test_incomplete_files_of_a_killed_training_are_removed(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    prepared(photos, tmp_path, toy)
    left = tmp_path / "work" / "vqgan" / ".clip-gen-saving-x1y2"
    left.write_text("half a checkpoint")
    prepared(photos, tmp_path, toy)
    assert not left.exists()


def test_a_training_killed_before_its_first_checkpoint_ends_with_the_same_weights(
    photos: Path, toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = replace(toy, stage="vqgan", adversarial_weight=1.0)
    Training(photos, tmp_path / "whole", toy).run()

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "fit", cut)
        with pytest.raises(KeyboardInterrupt):
            Training(photos, tmp_path / "cut", toy).run()
    Training(photos, tmp_path / "cut", toy).run()
    whole, found = (load_file(tmp_path / out / "model" / "vqgan.safetensors") for out in ("whole", "cut"))
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_stage_1_gets_a_fifth_of_max_minutes(
    photos: Path, toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(*_: object, machine: Machine, **__: object) -> None:
        raise KeyboardInterrupt(machine.max_minutes)

    monkeypatch.setattr(job, "fit", given)
    for stage, minutes in (("both", 2.0), ("vqgan", 10.0)):
        with pytest.raises(KeyboardInterrupt) as raised:
            Training(photos, tmp_path / stage, replace(toy, stage=stage, max_minutes=10)).run()
        assert raised.value.args == pytest.approx((minutes,), abs=0.5)


def test_tokens_that_the_bases_transformer_does_not_know_are_not_kept(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(toy.base, tmp_path / "base"))
    record = {"settings": {"stage": "vqgan"}, "stages": {"vqgan": {"tokens_kept": False}}}
    (base / "training.json").write_text(json.dumps(record))
    assert prepared(photos, tmp_path / "out", replace(toy, base=str(base))).tokens == NEW_TOKENS
    assert not (tmp_path / "out" / "work" / TOKENS).exists()


def test_a_published_discriminator_is_fine_tuned(
    photos: Path, toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(toy.base, tmp_path / "base"))
    published = build_discriminator(channels=8, layers=1).half().float()  # as it is saved
    save_part(published, base / "discriminator.safetensors")

    class Begun(Exception):
        pass

    def begun(name: str, trainer: VQGANTrainer, *_: object, **__: object) -> None:
        raise Begun(trainer.discriminator)

    monkeypatch.setattr(job, "fit", begun)
    chosen = replace(toy, adversarial_weight=1.0, base=str(base))
    with pytest.raises(Begun) as found:
        Training(photos, tmp_path / "further", chosen).run()
    assert torch.equal(found.value.args[0].main[0].weight, published.main[0].weight)
    with pytest.raises(Begun) as found:
        Training(photos, tmp_path / "new", replace(chosen, size="laptop")).run()
    assert len(found.value.args[0].main[0].weight) == 64


def test_minutes_of_all_starts_are_added(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    stages = {"vqgan": {"steps": 1, "minutes": 5.0}, "gpt": {"steps": 1, "minutes": 7.5}}
    training = prepared(photos, tmp_path, toy)
    assert training.record(stages)["minutes"] == pytest.approx(12.5, abs=0.5)
    (tmp_path / "work" / "minutes").write_text("20")
    assert prepared(photos, tmp_path, toy).record(stages)["minutes"] == pytest.approx(32.5, abs=0.5)


class Killed(Exception):
    """Interrupts a training."""


def test_a_resumed_training_has_the_rest_of_its_minutes(
    photos: Path, toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def killed(*_: object, machine: Machine, **__: object) -> None:
        given.append(machine.max_minutes)
        raise Killed

    monkeypatch.setattr(job, "fit", killed)
    toy = replace(toy, stage="transformer", max_minutes=10)
    for minutes_before in (0, 3, 0):
        training = Training(photos, tmp_path, toy)
        training.minutes.began -= minutes_before * 60  # as if it had taken so long to load and encode
        with pytest.raises(Killed):
            training.run()
    assert given == pytest.approx([10, 7, 7], abs=0.5)


def test_a_finished_training_continues_only_with_more_minutes(
    photos: Path, toy: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.training.minutes.MIN_MINUTES", 0.002)
    toy = replace(toy, vqgan_steps=2, transformer_steps=100, adversarial_weight=0.0)
    toy = replace(toy, sample_prompts="a prompt of over sixteen words " * 4)

    def trained(minutes: float) -> tuple[dict, dict[str, torch.Tensor]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            Training(photos, tmp_path, replace(toy, max_minutes=minutes)).run()
        record = json.loads((tmp_path / "model" / "training.json").read_text())
        return record, load_file(tmp_path / "model" / "gpt.safetensors")

    first, weights = trained(0.01)
    assert first["stages"]["gpt"]["ended_by"] == "time"
    assert sum("longer than CLIP reads" in message for message in caplog.messages) == 1
    fewer, same = trained(0.005)
    steps = ", ".join(f"{name}: {stage['steps']} steps" for name, stage in first["stages"].items())
    more = (
        "nothing is trained. To train further, give more than 0.01 max_minutes, or start a training in another folder"
    )
    logged = f"{tmp_path} holds a finished training ({steps}), so {more}"
    assert any(message.startswith(logged) for message in caplog.messages)
    assert fewer == first
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    longer, others = trained(0)
    assert longer["stages"]["gpt"]["steps"] > first["stages"]["gpt"]["steps"]
    assert longer["stages"]["gpt"]["ended_by"] != "time"
    assert longer["stages"]["vqgan"] == first["stages"]["vqgan"]
    assert longer["settings"]["max_minutes"] == 0
    assert any(not torch.equal(value, others[name]) for name, value in weights.items())


def test_pictures_of_a_refused_training_are_replaced(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelFolderError, match="no such file"):
        prepared(photos, out, replace(toy, base="nope.tar"))
    others = tmp_path / "others.zip"
    write_zip(others, 12)
    training = prepared(others, out, toy)
    assert len(training.pictures.paths) == 12
    assert prepared(others, out, toy).pictures == training.pictures


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_changed_pictures_are_refused(toy: TrainSettings, tmp_path: Path, kind: str) -> None:
    images = tmp_path / "album"
    write = write_zip if kind == "zip" else write_folder
    write(images, 10)
    prepared(images, tmp_path / "out", toy)
    write(images, 10)  # the same contents
    if kind == "folder":
        for left in (".DS_Store", "Icon\r", "__MACOSX/00.png", ".git/config"):  # by a file manager, or hidden
            (images / left).parent.mkdir(exist_ok=True)
            (images / left).write_text("no picture of anybody's")
    assert len(prepared(images, tmp_path / "out", toy).pictures.paths) == 10
    write(images, 11)
    with pytest.raises(ValueError, match=r"album is not what it was when the training in .*out began; name another"):
        prepared(images, tmp_path / "out", toy)
    shutil.rmtree(tmp_path / "out" / "work" / "pictures")
    with pytest.raises(ValueError, match="is not what it was"):
        prepared(images, tmp_path / "out", toy)
    write(images, 10)
    prepared(images, tmp_path / "out", toy)
    (images.unlink if kind == "zip" else lambda: shutil.rmtree(images))()
    assert len(prepared(images, tmp_path / "out", toy).pictures.paths) == 10  # the unpacked pictures are enough


def write_zip(path: Path, count: int) -> None:
    pictures = RenderedPictures(count, 5, 24)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(zipfile.ZipInfo(f"{i:02}.png"), picture_bytes(pictures[i]))


def write_folder(path: Path, count: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    pictures = RenderedPictures(count, 5, 24)
    for i in range(count):
        (path / f"{i:02}.png").write_bytes(picture_bytes(pictures[i]))


def test_the_command_line_prints_one_sentence_for_unusable_pictures(
    toy: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.zip").write_bytes(b"no archive")
    assert main(["train", str(tmp_path / "few.zip"), "--out", str(tmp_path / "out"), "--base", toy.base]) == 1
    logged = capsys.readouterr().err
    assert logged.startswith("train: ")
    assert logged.count("\n") == 1
    assert not (tmp_path / "out" / "weights.tar").exists()


def command(photos: Path, out: Path, base: str, *more: str) -> list[str]:
    words = f"train {photos} --out {out} --base {base} --vqgan-steps 24 --transformer-steps 24 --batch-size 4 --seed 3"
    return [sys.executable, "-m", "clip_gen", *words.split(), "--save-seconds", "0", *more]


@pytest.mark.slow
def test_a_training_interrupted_many_times_ends_with_the_same_weights(
    photos: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    whole, ended, scratch = tmp_path / "whole", tmp_path / "ended", tmp_path / "scratch"
    subprocess.run(command(photos, whole, str(tiny_model_folder)), check=True, capture_output=True)
    scratch.mkdir()
    words, environment = command(photos, ended, str(tiny_model_folder)), {**os.environ, "TMPDIR": str(scratch)}
    chance, ends = random.Random(0), 0
    for stage, number in itertools.product(("vqgan", "gpt"), (signal.SIGKILL, signal.SIGTERM)):
        shutil.rmtree(scratch)
        scratch.mkdir()
        with (tmp_path / "logged").open("w+") as logged:
            process = subprocess.Popen(words, stdout=logged, stderr=logged, start_new_session=True, env=environment)
            # A checkpoint is written at every step, so some signals arrive while one is written.
            seen = steps_done(ended, stage)
            while process.poll() is None and steps_done(ended, stage) < seen + 3:
                time.sleep(0.02)
            time.sleep(chance.random() / 5)
            if process.poll() is None:
                ends += 1
                os.killpg(process.pid, number)  # workers get it too
                assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
                logged.seek(0)
                if number == signal.SIGTERM:
                    text = logged.read()
                    assert "Traceback" not in text, text
                    resume = f"{ended} holds a checkpoint; this command resumes the training: {shlex.join(words)}\n"
                    assert text.endswith(resume), text
                    assert not list(scratch.iterdir())
    assert ends >= 3
    subprocess.run(words, check=True, capture_output=True)
    for part in ("vqgan", "gpt", "bridge"):
        expected, found = (load_file(out / "model" / f"{part}.safetensors") for out in (whole, ended))
        for name, value in expected.items():
            assert torch.equal(value, found[name]), f"{part} {name}"


def steps_done(out: Path, stage: str) -> int:
    path = out / "work" / stage / "history.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.parametrize(("stage", "strategy"), [("vqgan", "auto"), ("transformer", "ddp")])
def test_two_processes_have_the_losses_of_one(photos: Path, tmp_path: Path, stage: str, strategy: str) -> None:
    # taming's quantizer and no dropout: the other quantizer replaces dead codes at random, differently in each process.
    base = replace(TINY, vqgan=replace(TINY.vqgan, quantizer="taming"), gpt=replace(TINY.gpt, dropout=0.0))
    save_networks(tiny_networks(config=base), tmp_path / "base", training={})
    options = ["--stage", stage, "--adversarial-weight", "0", "--precision", "32-true", "--save-seconds", "60"]
    options += ["--vqgan-steps", "12", "--transformer-steps", "12", "--no-crop", "--no-flip"]
    # At higher rates rounding grows from step to step.
    options += ["--vqgan-learning-rate", "3e-4", "--transformer-learning-rate", "3e-4"]
    for devices in ("1", "2"):
        words = command(photos, tmp_path / devices, str(tmp_path / "base"), *options, "--devices", devices)
        if devices == "1":
            assert main(words[3:]) == 0
        else:
            words += ["--strategy", strategy]
            run = subprocess.run(words, capture_output=True, timeout=300, text=True)
            assert run.returncode == 0, run.stderr
    part = "gpt" if stage == "transformer" else "vqgan"
    one, two = (
        [json.loads(line) for line in (tmp_path / devices / "work" / part / "history.jsonl").open()]
        for devices in ("1", "2")
    )
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "val_loss", "val_psnr"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3), (a, b)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stage": "all"}, 'stage is "all"; it takes one of both, vqgan, transformer'),
        ({"size": "huge"}, 'size is "huge"; it takes one of base, laptop'),
        ({"resolution": 128}, "resolution is 128, but the base model has its own"),
        ({"tokens": "lose"}, 'tokens is "lose"; it takes one of auto, keep, learn'),
        ({"size": "laptop", "tokens": "keep"}, "tokens is keep, but new networks have none yet: leave out size laptop"),
        (
            {"stage": "transformer", "tokens": "learn"},
            "tokens is learn, but stage transformer leaves the VQGAN as it is",
        ),
        ({"mean_shift": -1.0}, "mean_shift is -1.0; give 0 or more"),
        ({"size": "laptop", "stage": "transformer"}, "needs the base model's VQGAN"),
        ({"size": "laptop", "resolution": 30}, "resolution is 30; size laptop takes multiples of 4 from 16 on"),
        ({"size": "laptop", "resolution": 8}, "resolution is 8; size laptop takes multiples of 4 from 16 on"),
        ({"condition_dropout": 1.0}, "condition_dropout is 1.0; give 0.9 or less"),
        ({"condition_blur": -0.1}, "condition_blur is -0.1; give 0 or more"),
        ({"batch_size": -3}, "batch_size is -3; give 0 or more"),
        ({"batch_size": 5000}, "batch_size is 5000; give 4096 or less"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"vqgan_learning_rate": math.nan}, "vqgan_learning_rate is nan; give 0 or more"),
        ({"max_minutes": math.inf}, "max_minutes is inf; give 0 or more"),
        ({"size": "laptop", "codebook_size": 16385}, "codebook_size is 16385; give 16384 or less"),
        ({"size": "laptop", "codebook_size": 1}, "codebook_size is 1; give 16 or more, or 0 for the usual one"),
        ({"size": "laptop", "codebook_size": 15}, "codebook_size is 15; give 16 or more, or 0"),
        ({"contrast_weight": -1.0}, "contrast_weight is -1.0; give 0 or more"),
        ({"precision": "8"}, 'precision is "8"; it takes one of auto, 32-true, bf16-mixed'),
        ({"max_minutes": -1.0}, "max_minutes is -1.0; give 0 or more"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, object], sentence: str, tiny_model: ClipGen) -> None:
    def planned() -> None:
        chosen = TrainSettings(**settings)
        chosen.check()
        plan(chosen, tiny_model.config, 100)

    with pytest.raises(ValueError, match=sentence):
        planned()


def test_unusable_devices_are_refused_before_anything_is_written(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    refused = {
        'devices auto, nodes 1 and strategy "foo" .*; give devices auto or': Machine(strategy="foo"),
        "cannot train with devices 0, nodes 1": Machine(devices="0"),
        "cannot train with devices all, nodes 1": Machine(devices="all"),
        "cannot train with devices auto, nodes 0": Machine(nodes=0),
    }
    for sentence, machine in refused.items():
        with pytest.raises(ValueError, match=sentence):
            prepared(photos, tmp_path / "out", toy, machine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("chosen", "good", "kept"), [("keep", 99, True), ("auto", 99, False)])
def test_tokens_are_kept_if_the_base_reconstructs_the_pictures_well(
    photos: Path,
    toy: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str,
    good: float,
    kept: bool,
) -> None:
    monkeypatch.setattr("clip_gen.training.decisions.GOOD_DB", good)
    monkeypatch.setattr("clip_gen.training.decisions.BETTER_DB", -99)
    base = load_file(Path(toy.base) / "vqgan.safetensors")
    Training(photos, tmp_path, replace(toy, stage="vqgan", tokens=chosen)).run()
    after = load_file(tmp_path / "model" / "vqgan.safetensors")
    changed = {name.split(".")[0] for name, value in base.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder", "post_quant_conv"} if kept else changed >= {"decoder", "encoder", "quantizer"}
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["stages"]["vqgan"]["tokens_kept"] is kept
    assert transformer_matches(tmp_path / "model") is kept
    (tmp_path / "model" / "gpt.safetensors").unlink()
    assert not transformer_matches(tmp_path / "model")


@pytest.mark.parametrize(("pale", "kept"), [(False, True), (True, False)])
def test_pale_pictures_do_not_count_as_well_reconstructed(tmp_path: Path, pale: bool, kept: bool) -> None:
    rng, shapes = np.random.default_rng(0), RenderedPictures(8, 5, 64)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        noise = np.uint8(128 + 8 * rng.standard_normal((64, 64, 3)))
        Image.fromarray(noise if pale else shapes[i]).save(tmp_path / "pictures" / f"{i}.png")
    training = prepared(
        tmp_path / "pictures", tmp_path / "out", TrainSettings(base=str(ROOT / "checkpoints" / "shapes"))
    )
    assert training.tokens.kept is kept
    (training.work / TOKENS).write_text(json.dumps(not kept))  # an earlier version's decision is kept
    assert settle_tokens(training) == Tokens(not kept, not kept)


def test_pictures_of_one_colour_do_not_decide_whether_tokens_are_kept(tmp_path: Path) -> None:
    shapes = RenderedPictures(60, 5, 64)
    (tmp_path / "pictures").mkdir()
    for i in range(60):
        Image.fromarray(shapes[i]).save(tmp_path / "pictures" / f"{i}.png")
    for i in range(3):
        white = np.full((64, 128, 3), 255, np.uint8)
        white[:, : 8 + i] = 0  # outside the central square
        Image.fromarray(white).save(tmp_path / "pictures" / f"white{i}.png")
    for seed in (1, 4):  # decides which pictures are held back
        settings = TrainSettings(base=str(ROOT / "checkpoints" / "shapes"), seed=seed)
        training = prepared(tmp_path / "pictures", tmp_path / str(seed), settings)
        assert len(training.pictures.paths) == 63
        assert training.tokens.kept


def test_learning_rates_are_lower_for_base_models_and_wide_networks(tiny_model: ClipGen) -> None:
    def rates(**settings: object) -> tuple[float, float, float]:
        made = plan(TrainSettings(**settings), tiny_model.config, 2000)
        return made.vqgan.learning_rate, made.transformer.learning_rate, made.transformer.muon_rate

    laptop, small, published = (rates(size=size) for size in ("laptop", "small", "published"))
    assert laptop == pytest.approx((2e-3, 4.5e-3, 6e-3))
    assert small == pytest.approx((1e-3, 2.25e-3, 3e-3))
    assert published == pytest.approx((3e-4, 1.125e-3, 1.5e-3))
    assert rates() == pytest.approx((1.2e-3, 9e-4, 3.6e-3))
    assert rates(transformer_learning_rate=1e-4, vqgan_learning_rate=2e-4) == (2e-4, 1e-4, 4e-4)
    assert rates(size="laptop", transformer_learning_rate=3e-4) == pytest.approx((2e-3, 3e-4, 4e-4))


def test_muon_trains_the_convolutions_of_vqgans_with_one_level(tiny_model: ClipGen) -> None:
    def fits(**settings: object) -> tuple[float, float]:
        fit = plan(TrainSettings(**settings), tiny_model.config, 2000).vqgan
        return fit.learning_rate, fit.muon_rate

    assert fits(size="laptop") == (2e-3, 2e-3)
    assert fits(size="laptop", vqgan_learning_rate=1e-4) == (1e-4, 1e-4)
    assert fits(size="small") == (1e-3, 0.0)


@pytest.mark.parametrize(("on_gpu", "vqgan", "transformer"), [(False, [8, 8], [16, 16]), (True, [16, 32], [16, 32])])
def test_batches_are_larger_on_a_gpu(
    tiny_model: ClipGen, on_gpu: bool, vqgan: list[int], transformer: list[int]
) -> None:
    plans = [plan(TrainSettings(), tiny_model.config, count, on_gpu) for count in (300, 2000)]
    assert [made.vqgan.batch_size for made in plans] == vqgan
    assert [made.transformer.batch_size for made in plans] == transformer
    asked = plan(TrainSettings(batch_size=6), tiny_model.config, 300, on_gpu)
    assert asked.vqgan.batch_size == asked.transformer.batch_size == 6


def test_a_training_that_resumes_on_another_machine_keeps_its_plan(
    photos: Path, toy: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = replace(toy, batch_size=0, tokens="keep")  # or the base's VQGAN would be measured on the GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = prepared(photos, tmp_path, chosen).plan
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prepared(photos, tmp_path, chosen).plan == there
    assert prepared(photos, tmp_path / "new", chosen).plan != there


def test_more_pictures_get_more_codes_and_more_steps(tiny_model: ClipGen) -> None:
    plans = [plan(TrainSettings(size="laptop"), tiny_model.config, count) for count in (50, 1000, 50_000, 200_000)]
    codes = [one.model.vqgan.codebook_size for one in plans]
    assert codes == sorted(codes)
    assert codes[0] < codes[-1]
    steps = [one.vqgan.steps for one in plans]
    assert steps == sorted(steps)
    for one in plans:
        one.model.check()


def test_views_are_encoded_while_there_is_time_and_the_rest_with_more_time(
    photos: Path, toy: TrainSettings, tmp_path: Path
) -> None:
    def begun(max_minutes: float) -> int:
        settings = replace(toy, stage="transformer", max_minutes=max_minutes, crop=True, flip=True)
        training = prepared(photos, tmp_path, settings)
        encoded = training.encode_train_pictures()
        assert len(encoded) == len(training.train_paths) == 22
        assert training.plan.views == 32
        # Row v · n + i is a view of picture i.
        views = Views(training.picture_files(training.train_paths), 32, toy.seed)
        for row in (0, 21, 22, 31):
            image = from_bytes(torch.from_numpy(views[row][None]))
            assert encoded.tokens[row].tolist() == training.networks.vqgan.encode(image)[0].tolist()
        return encoded.rows

    assert begun(1e-6) == 32  # one batch
    assert begun(0) == 22 * 32


def test_views_go_through_the_pictures_in_order() -> None:
    class Numbered:
        def __len__(self) -> int:
            return 5

        def draw(self, index: int, rng: np.random.Generator) -> tuple[int, float]:
            return index, rng.random()

    shown = [Views(Numbered(), 3, seed=0)[row] for row in range(15)]
    assert [index for index, _ in shown] == [0, 1, 2, 3, 4] * 3
    assert len({chance for _, chance in shown}) == 15


def test_shift_moves_content_over_a_plain_background_and_keeps_it_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawing = np.full((64, 64, 3), 200, np.uint8) + rng.integers(0, 5, (64, 64, 3), np.uint8)  # noise as from JPEG
    thing = rng.integers(0, 100, (10, 20, 3), np.uint8)
    thing[:, :, 2] = 0
    drawing[30:40, 5:25] = thing
    at_edge, photograph = drawing.copy(), rng.integers(0, 255, (64, 64, 3), np.uint8)
    at_edge[:20, 40:44] = 0  # touches the upper edge
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, (drawing, at_edge, photograph), strict=True):
        Image.fromarray(pixels).save(path)

    files = PictureFiles(paths, 64, crop=1.0, flip=False, shift=True)
    places, across = set(), set()
    for chance in range(300):
        shown = files.draw(0, np.random.default_rng(chance))
        rows, columns = (np.flatnonzero((shown[:, :, 2] == 0).any(axis=axis)) for axis in (1, 0))
        assert (shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == thing).all()
        places.add((rows[0], columns[0]))
        sideways = files.draw(1, np.random.default_rng(chance))
        across.add(int(np.flatnonzero((sideways[0] == 0).all(axis=1))[0]))
        assert (np.sort(sideways, axis=1) == np.sort(at_edge, axis=1)).all()
        assert (files.draw(2, np.random.default_rng(chance)) == photograph).all()
    rows, columns = zip(*places, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (2, 52, 2, 42)  # a 32nd of the side from the edge
    assert len(across) > 10
    assert (files[0] == drawing).all()


def test_letterbox_shows_pictures_whole(tmp_path: Path) -> None:
    picture = np.full((32, 64, 3), (200, 30, 30), np.uint8)
    picture[8:24, 16:48] = 0
    Image.fromarray(picture).save(tmp_path / "wide.png")
    files = PictureFiles([tmp_path / "wide.png"], 32, letterbox=True)
    for shown in (files[0], files.draw(0, np.random.default_rng(0)), files.draw(0, np.random.default_rng(1))):
        assert shown.shape == (32, 32, 3)
        assert (shown[0] == (200, 30, 30)).all()  # a bar in the colour of the edges
        assert (shown[14:18, 10:22] == 0).all()
        assert (shown[16, :5] == (200, 30, 30)).all()
    cut = PictureFiles([tmp_path / "wide.png"], 32)[0]
    assert (cut[16, :5] == 0).all()


def test_the_plan_says_how_pictures_become_squares(photos: Path, toy: TrainSettings, tmp_path: Path) -> None:
    training = prepared(photos, tmp_path, replace(toy, letterbox=True))
    assert training.plan.squares.startswith("letterbox: each picture whole")
    assert training.picture_files([]).squares.letterbox
    assert plan(replace(toy, crop=True), training.networks.config, 9).squares.startswith("random crop")
    assert plan(toy, training.networks.config, 9).squares.startswith("centre crop")


def test_fewer_pictures_get_more_views(tiny_model: ClipGen) -> None:
    def views(pictures: int, **settings: bool) -> int:
        return plan(TrainSettings(**settings), tiny_model.config, pictures).views

    assert [views(count) for count in (50, 2000, 20_000, 100_000, 1_000_000)] == [32, 20, 8, 4, 1]
    assert views(50, crop=False) == 2  # each picture and its mirror image
    assert views(50, crop=False, flip=False) == 1
    assert views(50, flip=False) == 32
    assert views(50, letterbox=True) == 2
    assert views(50, crop=False, flip=False, shift=True) == 32


def test_long_trainings_are_compiled(tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(**settings: object) -> bool:
        return plan(TrainSettings(**settings), tiny_model.config, 2000).transformer.compile

    monkeypatch.setattr("clip_gen.training.plan.shutil.which", lambda name: f"/usr/bin/{name}")
    assert compiles()
    assert compiles(max_minutes=45)
    assert not compiles(max_minutes=2)
    assert not compiles(transformer_steps=100)
    monkeypatch.setattr("clip_gen.training.plan.shutil.which", lambda name: None)
    assert not compiles()


def test_the_log_shows_progress(
    photos: Path, toy: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        Training(photos, tmp_path, toy).run()
    logged = "\n".join(caplog.messages)
    samples = f"samples of step 8: {tmp_path / 'work' / 'gpt' / 'grids' / '0000008.png'}"
    live = f"report: {tmp_path / 'report.html'}, renewed while the training runs"
    for words in ("24 usable pictures; skipped:", "vqgan 8/8  ", "gpt 8/8  ", "pictures/s", "weights: ", samples, live):
        assert words in logged, words


def test_a_folder_inside_the_folder_of_pictures_is_refused(toy: TrainSettings, tmp_path: Path) -> None:
    write_folder(tmp_path / "album", 10)
    with pytest.raises(ValueError, match=r"trained: is inside the folder of pictures .*album; name"):
        prepared(tmp_path / "album", tmp_path / "album" / "trained", toy)
    assert not (tmp_path / "album" / "trained").exists()
