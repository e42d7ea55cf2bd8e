"""training/: both stages, trained at toy size."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from torch.nn import functional as F
from torch.utils.data import Dataset

from clip_gen.files import ROOT
from clip_gen.hardware import choose_dtype, prefers_bfloat16
from clip_gen.images import from_bytes
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training import encoding, processes
from clip_gen.training import stage as stage_module
from clip_gen.training.datasets import (
    NEAR_MISS_NEIGHBOURS,
    Batches,
    EncodedPictures,
    Endless,
    drawn_places,
    enough_places,
    informative,
)
from clip_gen.training.encoding import encode_once, find_neighbours
from clip_gen.training.fit import fit
from clip_gen.training.gpt_trainer import MAX_ROUNDING, GPTTrainer, embedding_loss, start_from_codes, token_nats
from clip_gen.training.losses import hinge_loss, perceptual_distance
from clip_gen.training.processes import wait_for
from clip_gen.training.stage import FitConfig, Muon, Stage, adamw, orthogonal
from clip_gen.training.vqgan_trainer import VQGANLoss, VQGANTrainer
from clip_gen.weights.model_folder import Networks, load_networks
from clip_gen.worlds.shapes.pairs import RenderedPictures

FIT = FitConfig(steps=6, batch_size=8, warmup=2, ema_decay=0.5)


def encode(networks: Networks, pictures: Dataset, folder: Path, seconds: float = math.inf) -> EncodedPictures:
    embeddings, tokens = folder / "embeddings.npy", folder / "tokens.npy"
    encode_once(pictures, {embeddings: networks.clip, tokens: networks.vqgan}, seconds)
    return EncodedPictures(embeddings, tokens)


def test_pictures_are_encoded_in_order_once_and_read_back(tmp_path: Path) -> None:
    networks = tiny_networks()
    pictures = RenderedPictures(70, 0, 16)  # more than a batch
    encoded = encode(networks, pictures, tmp_path)
    assert len(encoded) == 70
    for i in (0, 13, 69):
        image = from_bytes(torch.from_numpy(pictures[i][None]))
        condition, tokens, unconditional, embedding, near_miss = encoded[i]
        assert torch.equal(condition, embedding)
        assert torch.equal(near_miss, embedding)
        assert not unconditional
        assert torch.equal(tokens, networks.vqgan.encode(image)[0])
        assert torch.allclose(embedding, networks.clip.encode_image(image)[0], atol=1e-3)
    before = (tmp_path / "tokens.npy").stat().st_mtime_ns
    encode(networks, pictures, tmp_path)
    assert (tmp_path / "tokens.npy").stat().st_mtime_ns == before


def test_compiled_networks_encode_uncompiled(tmp_path: Path) -> None:
    networks, compilations = tiny_networks(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        compilations.append(graph)
        return graph.forward

    networks.vqgan.encoder.compile(backend=backend)
    encode(networks, RenderedPictures(8, 0, 16), tmp_path)
    assert not compilations  # a training that resumes here has compiled nothing, and gets the same tokens


def test_tokens_of_a_large_codebook_are_stored_completely(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(replace(TINY.vqgan, quantizer="taming", codebook_size=2**17)).eval()
    pictures = RenderedPictures(8, 0, 16)
    encoded = encode(replace(tiny_networks(), vqgan=vqgan), pictures, tmp_path)
    tokens = vqgan.encode(from_bytes(torch.stack([torch.from_numpy(pictures[i]) for i in range(8)])))
    assert tokens.max() >= 2**16
    assert torch.equal(torch.stack([encoded[i][1] for i in range(8)]), tokens)
    assert encoded.tokens.dtype == np.uint32
    small = encode(tiny_networks(), pictures, tmp_path / "small")
    assert small.tokens.dtype == np.uint16


def test_interrupted_encoding_leaves_no_files(tmp_path: Path) -> None:
    class Broken(RenderedPictures):
        def __getitem__(self, index: int) -> np.ndarray:
            if index == 65:
                raise OSError("unreadable")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="unreadable"):
        encode(tiny_networks(), Broken(70, 0, 16), tmp_path)
    assert not list(tmp_path.iterdir())


def test_encoding_without_enough_memory_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(vqgan: VQGAN, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VQGAN, "encode", out_of_memory)
    with pytest.raises(ValueError, match="out of memory while encoding 32 pictures; train with a smaller resolution"):
        encode(tiny_networks(), RenderedPictures(70, 0, 16), tmp_path)


def test_encoding_stops_after_its_time_and_keeps_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pictures, networks = RenderedPictures(150, 0, 16), tiny_networks()
    whole = np.array(encode(networks, pictures, tmp_path / "whole").tokens)
    some = np.array(encode(networks, pictures, tmp_path / "some", seconds=0).tokens)
    assert len(some) == 32 < len(whole) == 150
    assert np.array_equal(some, whole[:32])
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["embeddings.npy", "tokens.npy"]
    assert caplog.messages[-1].startswith("embeddings.npy, tokens.npy: 32 of 150 views, ")
    assert caplog.messages[-1].endswith(" a second; about 32 fit into 0 minutes")


def one_step(gpt: GPT, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(1)
    embedding = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=1)
    gpt(embedding, torch.randint(0, 32, (4, 15), generator=generator)).square().mean().backward()
    optimizer.step()


def matrices_of(gpt: GPT) -> list[torch.nn.Parameter]:
    return [parameter for parameter in gpt.blocks.parameters() if parameter.dim() == 2]


def test_muon_updates_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    gpt = GPT(TINY.gpt).eval()
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    one_step(gpt, Muon(gpt, matrices_of(gpt), FitConfig(muon_rate=1e-2, learning_rate=1e-4, weight_decay=0.0)))
    moved = {name: value - before[name] for name, value in gpt.state_dict().items()}
    turned = torch.linalg.svdvals(moved["blocks.0.mlp.fc.weight"])
    pushed = torch.linalg.svdvals(gpt.blocks[0].mlp.fc.weight.grad)
    assert turned.median() > 0.5 * turned.max()
    assert pushed.median() < 0.3 * pushed.max()
    assert moved["head.weight"].abs().max() < 1.1e-4
    assert moved["blocks.0.mlp.fc.bias"].abs().max() < 1.1e-4


@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_steps_like_torchs(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's always uses bfloat16, so in float32 ours differs by that rounding."""
    monkeypatch.setattr(stage_module, "prefers_bfloat16", lambda device, training: bfloat16)
    torch.manual_seed(0)
    ours = GPT(TINY.gpt).eval()
    theirs, before = deepcopy(ours), deepcopy(ours.blocks.state_dict())
    options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = Muon(ours, matrices_of(ours), FitConfig(muon_rate=1e-2, learning_rate=1e-12, weight_decay=0.1))
    reference = torch.optim.Muon(matrices_of(theirs), **options)
    for _ in range(3):
        one_step(ours, optimizer)
        one_step(theirs, reference)
    for name, start in before.items():
        if start.dim() == 2:
            mine, other = (gpt.blocks.get_parameter(name) - start for gpt in (ours, theirs))
            assert (mine - other).norm() < 0.15 * other.norm(), name


@pytest.mark.parametrize(
    ("capability", "trains_in_bfloat16", "sampling_dtype"),
    [
        ("amx_bf16", True, torch.bfloat16),
        ("avx512_bf16", True, torch.float16),
        ("avx2", False, None),
    ],
)
def test_cpus_that_multiply_bfloat16_train_in_it(
    capability: str, trains_in_bfloat16: bool, sampling_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    monkeypatch.setattr("clip_gen.hardware.supports_float16", lambda: sampling_dtype is not None)
    assert prefers_bfloat16(torch.device("cpu"), training=True) is trains_in_bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == (sampling_dtype or torch.float32)


@pytest.mark.parametrize("shape", [(2, 12, 12), (2, 12, 40), (2, 40, 12)])
def test_singular_values_become_nearly_one_for_any_shape(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "prefers_bfloat16", lambda device, training: False)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonal(matrices)
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(result, u @ torch.diag_embed(values) @ v, atol=1e-4)


def test_muon_updates_the_convolutions_of_a_vqgan_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(TINY.vqgan).train()
    config = FitConfig(muon_rate=1e-2, learning_rate=1e-4, weight_decay=0.0)
    trainer = VQGANTrainer(vqgan, config, VQGANLoss(adversarial=1.0))
    optimizer = trainer.configure_optimizers()["optimizer"]
    for group, rate in zip(optimizer.param_groups, (1e-2, 1e-4), strict=True):
        group["lr"] = rate  # as after the warm-up
    before = deepcopy(vqgan.state_dict())
    reconstruction = vqgan(torch.rand(4, 3, 16, 16) * 2 - 1)
    (reconstruction.images.square().mean() + reconstruction.loss).backward()
    optimizer.step()
    moved = vqgan.decoder.conv_in.weight - before["decoder.conv_in.weight"]
    turned, pushed = (torch.linalg.svdvals(w.flatten(1)) for w in (moved, vqgan.decoder.conv_in.weight.grad))
    assert turned.median() > 0.5 * turned.max()
    assert pushed.median() < 0.4 * pushed.max()
    assert (vqgan.decoder.conv_in.bias - before["decoder.conv_in.bias"]).abs().max() < 1.1e-4
    convolutions, others = (set(map(id, group["params"])) for group in optimizer.param_groups)
    assert convolutions.isdisjoint(map(id, trainer.discriminator.parameters()))
    assert others.issuperset(map(id, trainer.discriminator.parameters()))


def test_gradients_are_clipped_for_each_network_separately() -> None:
    trainer = VQGANTrainer(VQGAN(TINY.vqgan).train(), FIT, VQGANLoss(adversarial=1.0))
    for network, size in ((trainer.vqgan, 1e-4), (trainer.discriminator, 1e2)):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, size)
    small = trainer.vqgan.decoder.conv_in.weight.grad.clone()
    trainer.configure_gradient_clipping(None, 1.0, None)
    assert torch.equal(trainer.vqgan.decoder.conv_in.weight.grad, small)
    norms = torch.stack([parameter.grad.norm() for parameter in trainer.discriminator.parameters()])
    assert float(norms.norm()) == pytest.approx(1, abs=1e-3)


def test_stage_1_trains_by_the_gradient_of_the_weighted_sum_of_its_losses() -> None:
    """As when the sum is passed backwards as a whole. CLIP and the discriminator see half of the batch."""
    torch.manual_seed(0)
    networks = tiny_networks()
    loss = VQGANLoss(perceptual=0.5, adversarial=0.5, adversarial_from=0.0)
    vqgan = networks.vqgan.train().requires_grad_(True)
    trainer = VQGANTrainer(deepcopy(vqgan), FIT, loss, networks.clip)
    trainer.log_dict = lambda values, **_: logged.update(values)
    logged: dict[str, torch.Tensor] = {}
    batch = torch.from_numpy(np.stack([RenderedPictures(2, 2, 16)[i] for i in range(2)]))
    trainer.training_step(batch).backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.named_parameters()}

    images, critic = from_bytes(batch), trainer.discriminator
    out = vqgan(images)
    difference = out.images - images
    reconstruction = difference.abs().mean() + difference.square().mean()
    reconstruction = reconstruction + 0.5 * perceptual_distance(networks.clip, out.images[:1], images[:1])
    fooled, last = -critic(out.images[:1]).mean(), vqgan.decoder.conv_out.weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, fooled)]
    weight = norms[0] / (norms[1] + 1e-4)
    generator = reconstruction + out.loss + 0.5 * weight.detach() * fooled
    told_apart = hinge_loss(critic(images[:1]), critic(out.images[:1].detach()))
    assert float(logged["loss"]) == pytest.approx(float((generator + told_apart).detach()), rel=1e-4)
    for prefix, network, part in (("vqgan", vqgan, generator), ("discriminator", critic, told_apart)):
        gradients = torch.autograd.grad(part, list(network.parameters()), retain_graph=True)
        for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
            assert torch.allclose(found[f"{prefix}.{name}"], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("stage", ["vqgan", "gpt"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(stage: str) -> None:
    networks, generator = tiny_networks(), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
    conditions, tokens = torch.randn(8, 16, generator=generator), torch.randint(0, 32, (8, 16), generator=generator)
    batch = images if stage == "vqgan" else (conditions, tokens, torch.zeros(8, dtype=torch.bool), *[conditions] * 2)

    def trained(is_checkpointed: bool) -> tuple[int, list[torch.Tensor]]:
        """The bytes of the tensors that are kept for the backward pass, and the gradients."""
        network = deepcopy(getattr(networks, stage)).train().requires_grad_(True)
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        config = replace(FIT, gradient_checkpointing=is_checkpointed)
        trainer = VQGANTrainer(network, config) if stage == "vqgan" else GPTTrainer(network, config)
        trainer.log_dict = lambda *_, **__: None
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trainer.training_step(batch)
        loss.backward()
        return sum(tensor.nbytes for tensor in kept.values()), [p.grad for p in network.parameters()]

    (plain, expected), (checkpointed, found) = trained(False), trained(True)
    assert checkpointed < 0.6 * plain
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_reconstruction_is_not_measured_on_plain_pictures() -> None:
    vqgan = tiny_networks().vqgan
    pictures = torch.from_numpy(np.stack([RenderedPictures(6, 2, 16)[i] for i in range(6)]))
    images = from_bytes(pictures)
    errors = (vqgan.decode(vqgan.encode(images)) - images).square().mean(dim=(1, 2, 3))
    expected = float(10 * torch.log10(4 / errors.mean()))
    plain = torch.full((3, 16, 16, 3), 255, dtype=torch.uint8)
    plain[1, ::2] -= 3  # like JPEG artefacts

    def measured(*batches: torch.Tensor) -> float:
        trainer, logged = VQGANTrainer(vqgan, FIT), {}
        trainer.log = lambda name, value, **_: logged.update({name: float(value)})
        trainer.on_validation_epoch_start()
        for batch in batches:
            trainer.validation_step(batch)
        trainer.on_validation_epoch_end()
        return logged["val_psnr"]

    assert measured(pictures) == pytest.approx(expected, abs=1e-4)
    assert measured(pictures[:4], torch.cat([pictures[4:], plain])) == pytest.approx(expected, abs=1e-4)
    assert np.isfinite(measured(plain))  # when all pictures are plain, all count


def test_muon_resumed_from_a_checkpoint_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    gpt = GPT(TINY.gpt).eval()
    optimizer = Muon(gpt, matrices_of(gpt), FitConfig(muon_rate=1e-2, learning_rate=1e-3, weight_decay=0.1))
    one_step(gpt, optimizer)
    weights, state = deepcopy(gpt.state_dict()), deepcopy(optimizer.state_dict())
    one_step(gpt, optimizer)
    other = GPT(TINY.gpt).eval()
    other.load_state_dict(weights)
    resumed = Muon(other, matrices_of(other), FitConfig(muon_rate=0.0, learning_rate=0.0, weight_decay=0.0))
    resumed.load_state_dict(state)
    one_step(other, resumed)
    for name, value in gpt.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_discriminator_starts_by_steps_or_by_time_and_trains_the_decoder(
    tmp_path: Path,
) -> None:
    def trained(folder: Path, adversarial_from: float, time_spent: float = 0.0) -> tuple[dict, dict]:
        torch.manual_seed(0)
        loss = VQGANLoss(adversarial=1.0, adversarial_from=adversarial_from)
        trainer = VQGANTrainer(VQGAN(TINY.vqgan).train(), replace(FIT, weight_decay=0.0), loss)
        trainer.time_spent = time_spent
        before = deepcopy(trainer.discriminator.state_dict())
        fit("toy", trainer, RenderedPictures(100, 0, 16), RenderedPictures(8, 1, 16), folder, seed=0)
        after = trainer.discriminator.state_dict()
        moved = {name: not torch.equal(value, after[name]) for name, value in before.items() if "weight" in name}
        return moved, trainer.vqgan.state_dict()

    never, plain = trained(tmp_path / "never", 1.0)
    late, touched = trained(tmp_path / "late", 0.5)
    in_time, _ = trained(tmp_path / "in time", 0.9, time_spent=0.95)
    assert not any(never.values())
    assert all(late.values())
    assert all(in_time.values())
    assert not torch.equal(plain["decoder.conv_out.weight"], touched["decoder.conv_out.weight"])


@pytest.mark.filterwarnings("ignore:You are trying to")
def test_contrast_trains_a_detail_that_hardly_changes_the_loss() -> None:
    """Two kinds of pictures differ in one of sixteen tokens, and their conditions differ little."""
    generator = torch.Generator().manual_seed(0)
    shared, hint = torch.randn(2, 1, 16, generator=generator)
    kind = torch.arange(32) % 2
    conditions = torch.nn.functional.normalize(shared + 0.15 * (2 * kind[:, None] - 1) * hint, dim=1)
    tokens = torch.randint(0, 32, (32, 16), generator=generator)
    tokens[:, 9] = kind
    batch = conditions, tokens, torch.zeros(32, dtype=torch.bool), conditions, conditions[1 - kind]

    def advantage(contrast: float) -> float:
        torch.manual_seed(0)
        trainer = GPTTrainer(GPT(TINY.gpt), FIT, contrast=contrast)
        optimizer = torch.optim.AdamW(trainer.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            trainer.training_step(batch).backward()
            optimizer.step()
        with torch.no_grad():
            own, other = (token_nats(trainer.gpt(c, tokens[:, :-1]), tokens).sum(dim=1) for c in (conditions, batch[4]))
        return float((other - own).mean())

    assert advantage(0.0) < 0.5
    assert advantage(4.0) > 1.5


def four_pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (4, 16) and tokens (4, 16) at random."""
    embeddings = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    return embeddings, torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:You are trying to")
@torch.no_grad()
def test_contrast_changes_nothing_without_near_misses() -> None:
    gpt = GPT(TINY.gpt).eval()
    conditions, tokens = four_pictures()
    never, always = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    plain = GPTTrainer(gpt, FIT).training_step((conditions, tokens, never, conditions, conditions))
    trainer = GPTTrainer(gpt, FIT, contrast=4.0)
    same = trainer.training_step((conditions, tokens, never, conditions, conditions))
    assert float(same) == pytest.approx(float(plain), abs=1e-6)
    # A dropped condition has no near miss.
    dropped = trainer.training_step((conditions, tokens, always, conditions, -conditions))
    without = GPTTrainer(gpt, FIT).training_step((conditions, tokens, always, conditions, -conditions))
    assert float(dropped) == pytest.approx(float(without), abs=1e-6)


@pytest.mark.filterwarnings("ignore:You are trying to")
@torch.no_grad()
def test_losses_of_sampled_places_are_divided_by_their_probabilities() -> None:
    gpt = GPT(TINY.gpt).eval()
    conditions, tokens = four_pictures()
    batch = conditions, tokens, torch.zeros(4, dtype=torch.bool), conditions, conditions
    plain = GPTTrainer(gpt, FIT).training_step(batch)
    every = torch.arange(16).expand(4, 16)
    result = GPTTrainer(gpt, FIT).training_step((*batch, every, torch.ones(4, 16)))
    assert float(result) == pytest.approx(float(plain), abs=1e-6)

    places, probabilities = (
        torch.tensor([[0, 4, 9, 14]]).expand(4, 4),
        torch.tensor([[1.0, 0.2, 0.2, 0.5]]).expand(4, 4),
    )
    nats = token_nats(gpt(conditions, tokens[:, :-1], None, places, probabilities), tokens.gather(1, places))
    result = GPTTrainer(gpt, FIT).training_step((*batch, places, probabilities))
    assert float(result) == pytest.approx(float((nats * torch.tensor([1.0, 5.0, 5.0, 2.0])).sum() / 64), abs=1e-6)


@pytest.mark.filterwarnings("ignore:You are trying to")
@torch.no_grad()
def test_contrast_uses_the_sampled_places() -> None:
    gpt = GPT(TINY.gpt).eval()
    conditions, tokens = four_pictures()
    missed = conditions.roll(1, dims=0)
    missed[:2] = conditions[:2]  # no near miss
    batch = conditions, tokens, torch.zeros(4, dtype=torch.bool), conditions, missed
    trainer = GPTTrainer(gpt, FIT, contrast=2.0)
    whole, every = trainer.training_step(batch), (torch.arange(16).expand(4, 16), torch.ones(4, 16))
    assert float(trainer.training_step((*batch, *every))) == pytest.approx(float(whole), abs=1e-5)

    rows = torch.tensor([[0, 3, 4, 9], [0, 4, 9, 14], [0, 1, 2, 3], [0, 5, 6, 7]])  # other places for each picture
    places, probabilities = rows, torch.tensor([[1.0, 0.2, 0.2, 0.5]]).expand(4, 4)
    nats, missed_nats = (
        (token_nats(gpt(c, tokens[:, :-1], None, places, probabilities), tokens.gather(1, places)) / probabilities).sum(
            dim=1
        )
        for c in (conditions, missed)
    )
    # One of four pictures is compared: one of the two with a near miss, and it counts for both.
    expected = [(nats.sum() + 2.0 * 2 * F.softplus(nats - missed_nats)[one]) / 64 for one in (2, 3)]
    result = float(trainer.training_step((*batch, places, probabilities)))
    assert any(result == pytest.approx(float(value), abs=1e-5) for value in expected)


def test_tokens_of_similar_patches_start_similar() -> None:
    networks = tiny_networks()
    start_from_codes(networks.gpt, networks.vqgan, seed=0)
    codes = F.normalize(networks.vqgan.quantizer.lookup(torch.arange(32)[None])[0], dim=1)
    started = F.normalize(networks.gpt.token_embedding.weight.detach(), dim=1)
    alike = torch.stack([(vectors @ vectors.T)[torch.ones(32, 32).tril(-1) > 0] for vectors in (codes, started)])
    assert torch.corrcoef(alike)[0, 1] > 0.7


@torch.no_grad()
def test_context_noise_shows_tokens_of_other_images_and_not_as_targets() -> None:
    class Recording(GPT):
        def forward(self, embedding: torch.Tensor, tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            self.seen = tokens
            return super().forward(embedding, tokens, *others)

    torch.manual_seed(0)
    gpt = Recording(TINY.gpt).eval()
    trainer = GPTTrainer(gpt, FIT, context_noise=0.5)
    trainer.log_dict = lambda *_, **__: None
    conditions, tokens = torch.randn(400, 16), torch.arange(400)[:, None].remainder(32).expand(400, 16)
    batch = conditions, tokens, torch.zeros(400, dtype=torch.bool), conditions, conditions
    loss = trainer.training_step(batch)
    replaced = gpt.seen != tokens[:, :-1]
    assert torch.equal(gpt.seen[replaced], tokens.roll(1, dims=0)[:, :-1][replaced])
    rates = replaced.float().mean(dim=1)
    assert (rates > 0).float().mean() == pytest.approx(0.5 * 15 / 16, abs=0.1)
    assert torch.histc(rates[rates > 0], 3, 0, 1).min() > 40  # few in some images, nearly all in others
    assert loss == token_nats(gpt(conditions, gpt.seen), tokens).mean()


def test_muon_updates_the_matrix_of_the_neighbour_context() -> None:
    gpt = GPT(replace(TINY.gpt, neighbour_context=True))
    optimizer = GPTTrainer(gpt, replace(FIT, muon_rate=1e-3)).configure_optimizers()["optimizer"]
    matrices, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert id(gpt.around.weight) in matrices
    assert {id(gpt.outside), id(gpt.token_embedding.weight)} <= others


@pytest.mark.filterwarnings("ignore:You are trying to")
@pytest.mark.parametrize("neighbour_context", [False, True])
@torch.no_grad()
def test_without_neighbour_context_the_last_third_trains_on_whole_images(neighbour_context: bool) -> None:
    trainer = GPTTrainer(GPT(replace(TINY.gpt, neighbour_context=neighbour_context)).eval(), FIT)
    conditions, tokens = four_pictures()
    batch = conditions, tokens, torch.zeros(4, dtype=torch.bool), conditions, conditions
    sampled = torch.tensor([[0, 4, 9, 14]]).expand(4, 4), torch.tensor([[1.0, 0.2, 0.2, 0.5]]).expand(4, 4)
    whole, few = trainer.training_step(batch), trainer.training_step((*batch, *sampled))
    assert not torch.isclose(whole, few)
    trainer.time_spent = 0.6
    assert torch.equal(trainer.training_step((*batch, *sampled)), few)
    trainer.time_spent = 0.7
    assert torch.equal(trainer.training_step((*batch, *sampled)), few if neighbour_context else whole)


def test_samples_of_encoded_pictures_contain_places(encoded: EncodedPictures, tmp_path: Path) -> None:
    tokens = np.zeros((400, 16), np.uint16)
    tokens[:, 5] = np.arange(400) % 7 + 1
    np.save(tmp_path / "drawings.npy", tokens)
    pictures = EncodedPictures(tmp_path / "embeddings.npy", tmp_path / "drawings.npy", pictures=200, places=8)
    assert len(pictures[0]) == 5
    for number in range(50):
        *sampled, places, probabilities = Endless(pictures, seed=0)[number]
        assert torch.equal(places, Endless(pictures, seed=0)[number][5])
        assert {0, 5, 6, 9} <= set(places.tolist())  # tokens that differ from a neighbour
        assert probabilities[places == 5] == probabilities[0] == 1
        assert (probabilities[~torch.isin(places, torch.tensor([0, 5, 6, 9]))] == 4 / 12).all()
        assert len(sampled) == 5


@pytest.mark.parametrize("edges", [0, 1, 2, 4])
def test_places_are_sampled_with_their_probabilities(edges: int) -> None:
    """Of a plain picture, of drawings, and of a photograph."""
    tokens = np.zeros((16, 16), np.int64)
    side = 4 * edges
    tokens[:side, :side] = np.arange(side**2).reshape(side, side)
    rng, of_all = np.random.default_rng(0), np.zeros(256)
    for _ in range(2000):
        places, probabilities = drawn_places(tokens.ravel(), 96, rng)
        assert places[0] == 0
        assert probabilities[0] == 1
        assert len(places) == len(probabilities) == 96
        assert (np.diff(places) > 0).all()
        of_all[places] += 1 / probabilities
    sampled = of_all > 0
    assert sampled.all()
    assert np.allclose(of_all / 2000, 1, atol=0.25)
    assert of_all.mean() / 2000 == pytest.approx(1, abs=0.02)


def test_enough_places_are_the_informative_ones_and_an_eighth() -> None:
    tokens = np.zeros((10, 16, 16), np.uint16)
    tokens[:, 4:9, 4:9] = 7  # differs where each of five rows and columns begins and ends
    assert informative(tokens.reshape(10, -1)).sum(axis=1).tolist() == [1 + 19] * 10  # the first counts too
    assert enough_places(tokens.reshape(10, -1)) == 64  # 20 + 256 / 8, rounded up to a multiple of 16
    photographs = np.random.default_rng(0).integers(0, 512, (10, 256))
    assert enough_places(photographs) == 0


def test_the_embedding_loss_trains_the_transformer_only() -> None:
    # The bundled CLIP and VQGAN: an untrained CLIP gives all pictures the same embedding.
    networks = load_networks(ROOT / "checkpoints" / "shapes")
    vqgan, clip = networks.vqgan, networks.clip
    torch.manual_seed(0)
    gpt = GPT(replace(networks.gpt.config, n_layer=1, n_head=2, n_embd=64, null_condition=False)).eval()
    images = from_bytes(torch.stack([torch.from_numpy(RenderedPictures(4, 0, 64)[i]) for i in range(4)]))
    embeddings, tokens = clip.encode_image(images), vqgan.encode(images)
    optimizer = torch.optim.Adam(gpt.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = embedding_loss(gpt(embeddings, tokens[:, :-1]), embeddings, vqgan, clip)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for part in (vqgan, clip) for parameter in part.parameters())
    # The loss does not fall at every step, and how far depends on the processor's rounding.
    assert min(losses) < 0.9 * losses[0]


def test_the_embedding_loss_is_that_of_the_likeliest_tokens() -> None:
    networks = tiny_networks()
    logits = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    sampled = networks.clip.encode_image(networks.vqgan.decode(logits.argmax(dim=2)))
    expected = 1 - (sampled * embeddings).sum(dim=1).mean()
    result = embedding_loss(logits, embeddings, networks.vqgan, networks.clip)
    assert float(result) == pytest.approx(float(expected), abs=1e-5)


@pytest.fixture
def encoded(tmp_path: Path) -> EncodedPictures:
    """Two views each of 200 pictures, of random embeddings and tokens."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(400, 16)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    np.save(tmp_path / "tokens.npy", np.arange(400)[:, None] + np.zeros((1, 16), np.uint16))
    return EncodedPictures(tmp_path / "embeddings.npy", tmp_path / "tokens.npy", pictures=200, noise=0.5, dropout=0.1)


def test_a_tenth_of_the_conditions_are_dropped_and_the_rest_are_noisy(encoded: EncodedPictures) -> None:
    samples = Endless(encoded, seed=0)
    conditions, _, dropped, embeddings, near_misses = zip(*(samples[n] for n in range(4000)), strict=True)
    assert abs(np.mean(dropped) - 0.1) < 0.02
    cosine = (torch.stack(conditions) * torch.stack(embeddings)).sum(dim=1)
    assert cosine.min() > 1 / 1.25**0.5 - 0.2
    assert 0.9 < cosine.mean() < 0.99
    assert torch.equal(torch.stack(near_misses), torch.stack(conditions))  # without near misses


def test_a_near_miss_gets_the_noise_of_the_condition(encoded: EncodedPictures, tmp_path: Path) -> None:
    embeddings, tokens, missed = (tmp_path / f"{name}.npy" for name in ("embeddings", "tokens", "missed"))
    rows = np.array(encoded.embeddings)
    # Every second near miss is the picture itself, encoded a second time.
    np.save(missed, np.where(np.arange(400)[:, None] % 2, -rows, rows + np.float32(2e-4)))
    samples = Endless(EncodedPictures(embeddings, tokens, pictures=200, noise=0.5, near_misses=missed), seed=0)
    for n in range(100):
        condition, tokens, _, embedding, near_miss = samples[n]
        if int(tokens[0]) % 2:
            assert near_miss @ embedding < -0.8
        else:
            assert torch.allclose(near_miss, condition, rtol=0, atol=MAX_ROUNDING)


@pytest.mark.parametrize("pool", [2048, 150])
def test_neighbours_are_similar_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: int) -> None:
    monkeypatch.setattr(encoding, "POOL_SIZE", pool)
    monkeypatch.setattr(encoding, "MAX_NEIGHBOURS", 10)
    rng = np.random.default_rng(0)
    # Ten kinds of twenty pictures each. The two views of a picture are the most similar rows.
    pictures = np.arange(400) % 200
    kinds = pictures // 20
    rows = rng.normal(size=(10, 16))[kinds] + 0.1 * rng.normal(size=(200, 16))[pictures]
    np.save(tmp_path / "embeddings.npy", (rows + 0.01 * rng.normal(size=rows.shape)).astype(np.float16))
    result = np.load(find_neighbours(tmp_path / "embeddings.npy", 200, tmp_path / "result.npy", 0))
    assert result.shape == (400, 10)
    assert (pictures[result] != pictures[:, None]).all()
    assert (kinds[result] == kinds[:, None]).mean() > (0.99 if pool > 400 else 0.85)
    rows = np.load(tmp_path / "embeddings.npy").astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = (rows[result] * rows[:, None]).sum(axis=2)
    assert (np.diff(similarity, axis=1) <= 1e-6).all()  # the most similar first

    again = np.load(find_neighbours(tmp_path / "embeddings.npy", 200, tmp_path / "again.npy", 0))
    assert np.array_equal(again, result)


def test_a_row_without_other_pictures_is_its_only_neighbour(tmp_path: Path) -> None:
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32))
    result = np.load(find_neighbours(tmp_path / "embeddings.npy", 1, tmp_path / "result.npy", 0))
    assert np.array_equal(result, np.arange(3)[:, None] + np.zeros((1, 3), int))


def test_some_conditions_are_means_with_their_neighbours(encoded: EncodedPictures, tmp_path: Path) -> None:
    embeddings, tokens = tmp_path / "embeddings.npy", tmp_path / "tokens.npy"
    neighbours = find_neighbours(embeddings, 200, tmp_path / "neighbours.npy", 0)
    rows, result = torch.from_numpy(np.load(embeddings)), np.load(neighbours)

    def sampled(blur: float) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        samples = Endless(EncodedPictures(embeddings, tokens, pictures=200, neighbours=neighbours, blur=blur), seed=0)
        sampled = (samples[n] for n in range(400))
        return [(int(tokens[0]), condition, missed) for condition, tokens, _, _, missed in sampled]

    for row, condition, missed in sampled(0.0):
        assert torch.allclose(condition, rows[row])
        assert any(torch.allclose(missed, rows[other]) for other in result[row, :NEAR_MISS_NEIGHBOURS])

    counts = []
    for row, condition, missed in sampled(0.5):
        means = [F.normalize(rows[row] + rows[result[row, :count]].sum(dim=0), dim=0) for count in range(64)]
        off = [float((condition - mean).abs().max()) for mean in means]
        assert min(off) < 1e-5
        counts.append(int(np.argmin(off)))
        assert torch.equal(condition, missed) == (counts[-1] > 0)  # a mean has no near miss
    blurred = np.array([count for count in counts if count])
    assert abs(len(blurred) / 400 - 0.5) < 0.1
    assert blurred.min() == 1
    assert blurred.max() > 50
    assert 5 < np.median(blurred) < 12


def test_a_sample_depends_on_its_number_and_every_pass_has_all_pictures(
    encoded: EncodedPictures,
) -> None:
    samples = Endless(encoded, seed=5)
    passes = [[int(samples[n][1][0]) % 200 for n in range(200 * turn, 200 * (turn + 1))] for turn in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(200))
    assert passes[0] != passes[1] != list(range(200))
    for n in (399, 0, 250):
        for a, b in zip(samples[n], Endless(encoded, seed=5)[n], strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert not torch.equal(samples[0][0], Endless(encoded, seed=6)[0][0])


def test_all_views_of_a_picture_are_sampled(encoded: EncodedPictures) -> None:
    samples = Endless(encoded, seed=0)
    assert len({int(samples[n][1][0]) for n in range(2000)}) > 390


def test_incomplete_views_are_all_sampled(encoded: EncodedPictures, tmp_path: Path) -> None:
    for rows, pictures in ((250, 200), (150, 150)):
        np.save(tmp_path / "few.npy", encoded.tokens[:rows])
        few = EncodedPictures(tmp_path / "embeddings.npy", tmp_path / "few.npy", pictures=200)
        assert len(few) == pictures
        sampled = [int(Endless(few, seed=0)[n][1][0]) for n in range(20 * pictures)]
        assert set(sampled) == set(range(rows))
        assert {sampled.count(row) for row in range(50, pictures)} == {20}  # the only view of each


def test_processes_share_batches_and_a_resumed_run_starts_at_the_next_one() -> None:
    whole = list(Batches(5, 6))
    assert whole[2] == list(range(12, 18))
    shares = [list(Batches(5, 6, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == whole
    assert list(Batches(5, 6, first=3)) == whole[3:]
    assert len(Batches(5, 6, first=3)) == 5
    with pytest.raises(ValueError, match="batch_size is 6; 4 processes share it"):
        Batches(5, 6, ranks=4)


def test_only_matrices_have_weight_decay() -> None:
    groups = adamw(GPT(TINY.gpt), FitConfig(weight_decay=0.1), (0.9, 0.95)).param_groups
    assert {p.dim() for p in groups[0]["params"]} == {2}
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def rates(time_spent: float) -> list[float]:
    stage = Stage(FitConfig(steps=100, warmup=10))
    stage.time_spent = time_spent
    learning = stage.learning(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    optimizer, schedule = learning["optimizer"], learning["lr_scheduler"]["scheduler"]
    result = []
    for _ in range(101):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_the_rate_warms_up_and_falls_to_a_hundredth() -> None:
    result = rates(time_spent=0.0)
    assert result[0] == pytest.approx(0.1)
    assert max(result) == result[9] == result[10] == 1.0
    assert result[100] == pytest.approx(0.01)
    assert result[10:] == sorted(result[10:], reverse=True)


def test_the_rate_falls_with_the_time_even_if_steps_are_left() -> None:
    assert rates(time_spent=1.0)[20] == pytest.approx(0.01)
    assert rates(time_spent=0.5)[20] == pytest.approx(0.505)
    assert rates(time_spent=0.5)[90] == pytest.approx(rates(time_spent=0.0)[90])


def test_the_rate_rises_for_a_twentieth_of_the_time_and_then_falls() -> None:
    assert rates(time_spent=0.04)[3:5] == pytest.approx([0.8, 0.8])
    assert rates(time_spent=0.05)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, rates(time_spent=0.05)[10]])
    assert rates(time_spent=0.01)[5] == pytest.approx(0.6)
    assert rates(time_spent=0.5)[5] == pytest.approx(0.505)


LOADER = """
import numpy as np
from clip_gen.training import datasets

datasets.spare_cores = lambda: 4
loader = datasets.loader_with_workers([np.full(2**16, index, np.uint8) for index in range(256)], batch_size=64)
print(loader.num_workers, [int(picture[0]) for batch in loader for picture in batch] == list(range(256)))
"""


def load_in(temporary_folder: Path, *command: str) -> str:
    run = subprocess.run(
        [*command, sys.executable, "-c", LOADER],
        env={**os.environ, "TMPDIR": str(temporary_folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.stdout or run.stderr


def test_workers_need_little_shared_memory(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    mounted = "mount -t tmpfs -o size=1m tmpfs /dev/shm && "
    if subprocess.run([*namespace, mounted + "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces of mounts")
    assert load_in(tmp_path, *namespace, mounted + 'exec "$@"', "bash") == "4 True\n"


def test_workers_do_not_depend_on_the_length_of_the_temporary_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)  # the address of a socket has at most 107 bytes
    folder.mkdir()
    assert load_in(folder) == "4 True\n"


CONTAINER = """
import os, sys, time
from pathlib import Path
file, waiting = map(Path, sys.argv[1:])
if not (child := os.fork()):
    from clip_gen.training.processes import wait_for
    waiting.write_text(str(os.getppid()))
    wait_for(file)
    os._exit(0)
while not waiting.is_file():
    time.sleep(0.05)
time.sleep(0.5)
file.touch()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_waits_for_the_first_process_of_a_container(tmp_path: Path) -> None:
    """Process 1 of a namespace writes the file that its child waits for."""
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces of processes")
    words = [sys.executable, "-c", CONTAINER, str(tmp_path / "file"), str(tmp_path / "waiting")]
    assert subprocess.run([*namespace, *words], timeout=120).returncode == 0
    assert (tmp_path / "waiting").read_text() == "1"


def test_waiting_for_a_file_ends_with_the_process_that_writes_it(tmp_path: Path) -> None:
    said, waiting = tmp_path / "said", tmp_path / "waiting"
    if not (writer := os.fork()):
        if not os.fork():
            processes.PARENT = os.getppid()  # as when the child itself had imported the module
            waiting.touch()
            try:
                wait_for(tmp_path / "file")
            except OSError as error:
                said.write_text(str(error))
            os._exit(0)
        while not waiting.is_file():
            time.sleep(0.01)
        os._exit(0)
    os.waitpid(writer, 0)
    until = time.monotonic() + 60
    while not (said.is_file() and said.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "file is missing, and the process that writes it has ended" in said.read_text()
