"""importers/taming.py: VQGANs of taming-transformers give the outputs of taming's modules."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from importer_files import CODES, KINDS, VIT, clip_state, taming_settings
from safetensors.torch import load_file, save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.discriminator.model import NLayerDiscriminator
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.__main__ import main
from clip_gen.config import VQGANConfig
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.model_folder import load_base, load_config, load_networks, load_part, save_networks


class Reference(nn.Module):
    """VQModel or GumbelVQ, built of taming's modules: its Lightning classes need an old Lightning."""

    def __init__(self, gumbel: bool, sizes: dict[str, object], layers: int = 2):
        super().__init__()
        self.encoder, self.decoder = Encoder(**sizes), Decoder(**sizes)
        self.loss = nn.Module()
        self.loss.discriminator = NLayerDiscriminator(ndf=8, n_layers=layers)
        self.loss.perceptual_loss = nn.Linear(3, 4)
        self.quantize = GumbelQuantize(32, 32, CODES) if gumbel else VectorQuantizer2(CODES, 32, beta=0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        features = self.quant_conv(self.encoder(images))
        if isinstance(self.quantize, GumbelQuantize):
            return self.quantize(features, return_logits=True)[3].argmax(dim=1).flatten(1)
        return self.quantize(features)[2][2].view(len(images), -1)

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        codes = self.quantize.get_codebook_entry(tokens.flatten(), (len(tokens), side, side, 32))
        return self.decoder(self.post_quant_conv(codes)).clamp(-1, 1)


def lightning_checkpoint(reference: Reference) -> dict[str, object]:
    """A checkpoint as Lightning saves it, with optimiser states, callback classes and objects."""
    optimizer = torch.optim.Adam(reference.encoder.parameters())
    reference.encoder(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    module = sys.modules["published_callbacks"]
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": reference.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "callbacks": {module.ModelCheckpoint: {"best": torch.tensor(1.0), "kept": module.AttributeDict(mode="min")}},
        "hyper_parameters": module.Container({"model": ["taming"]}),
    }


@pytest.fixture(autouse=True)
def _callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that a checkpoint names and that are missing when it is read."""
    module = types.ModuleType("published_callbacks")
    body = "class ModelCheckpoint: pass\nclass AttributeDict(dict): pass\nclass Container:\n"
    body += " def __init__(self, content): self.content = content\n"
    exec(compile(body, "published_callbacks", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "published_callbacks", module)


def published(folder: Path, kind: str) -> tuple[Reference, list[str]]:
    """Writes a random VQGAN of this kind like a published one; returns it and the command to import it."""
    torch.manual_seed(0)
    configuration = taming_settings(*KINDS[kind])
    reference = Reference(KINDS[kind][0], configuration["model"]["params"]["ddconfig"]).eval()
    (folder / "model.yaml").write_text(yaml.safe_dump(configuration))
    torch.save(lightning_checkpoint(reference), folder / "last.ckpt")
    del sys.modules["published_callbacks"]
    words = ["--config", str(folder / "model.yaml"), "--checkpoint", str(folder / "last.ckpt")]
    return reference, ["import", "taming", *words, "--out", str(folder / "base")]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_images_equal_those_of_tamings_modules(kind: str, tmp_path: Path) -> None:
    reference, command = published(tmp_path, kind)
    assert main(command) == 0
    config = load_config(tmp_path / "base").vqgan
    vqgan = VQGAN(config).eval()
    load_part(vqgan, tmp_path / "base" / "vqgan.safetensors")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = reference.tokens(images)
    assert len(tokens.unique()) > 3
    assert torch.equal(vqgan.encode(images), tokens)
    some = torch.randint(0, CODES, tokens.shape, generator=torch.Generator().manual_seed(2))
    # taming finds a Gumbel code by a product that leaves another memory order, in which convolutions round otherwise.
    tolerance = 1e-4 if "gumbel" in kind else 0
    for drawn in (some, tokens):
        assert torch.allclose(vqgan.decode(drawn), reference.pictures(drawn), rtol=0, atol=tolerance)


def test_the_discriminator_is_kept_and_the_perceptual_network_is_not(tmp_path: Path) -> None:
    reference, command = published(tmp_path, "f4")
    assert main(command) == 0
    kept = load_file(tmp_path / "base" / "discriminator.safetensors")
    assert set(kept) == set(reference.loss.discriminator.state_dict())
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == [
        *("config.yaml", "discriminator.safetensors", "training.json", "vqgan.safetensors")
    ]


def test_a_checkpoint_without_losses_is_imported(tmp_path: Path) -> None:
    reference, command = published(tmp_path, "f4")
    bare = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("loss.")}
    torch.save(bare, tmp_path / "last.ckpt", _use_new_zipfile_serialization=False)
    assert main(command) == 0
    assert not (tmp_path / "base" / "discriminator.safetensors").exists()


def test_a_gumbel_vqgan_samples_codes_in_training_only(tmp_path: Path) -> None:
    _, command = published(tmp_path, "gumbel f8")
    assert main(command) == 0
    vqgan = VQGAN(load_config(tmp_path / "base").vqgan)
    load_part(vqgan, tmp_path / "base" / "vqgan.safetensors")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = vqgan.train()(images)
    (out.images.square().mean() + out.loss).backward()
    assert vqgan.encoder.conv_in.weight.grad.abs().sum() > 0
    assert not torch.equal(out.tokens, vqgan(images).tokens)
    assert torch.equal(vqgan.eval().encode(images), vqgan.encode(images))


def test_an_imported_vqgan_accepts_a_clip_and_can_be_trained(tmp_path: Path) -> None:
    _, command = published(tmp_path, "gumbel f8")
    assert main(command) == 0
    config = load_config(tmp_path / "base")
    assert (config.gpt.block_size, config.gpt.codebook_size) == (16, CODES)
    torch.save(clip_state(VIT), tmp_path / "clip.pt")
    assert main(["import", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "base")]) == 0
    config = load_config(tmp_path / "base")
    assert (config.gpt.embed_dim, config.gpt.codebook_size, config.clip) == (24, CODES, VIT)
    base = load_base(tmp_path / "base")
    tokens = base.vqgan.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    before = base.gpt.requires_grad_()(base.clip.encode_image(torch.rand(2, 3, 32, 32)), tokens[:, :-1])
    assert before.isfinite().all()
    assert before.std() > 0
    F.cross_entropy(before.flatten(0, 1), tokens.flatten()).backward()
    save_networks(base, tmp_path / "trained", {})
    assert load_networks(tmp_path / "trained").config == base.config


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("encoder.mid.attn_1.q.weight", None, "has no key encoder.mid.attn_1.q.weight"),
        ("quantize.embedding.weight", None, "has no key quantize.embedding.weight"),
        ("loss.discriminator.main.3.bias", None, "has no key loss.discriminator.main.3.bias"),
        ("quant_conv.bias", torch.zeros(7), "quant_conv.bias has shape (7,), wanted is (32,)"),
        ("more.weight", torch.zeros(1), "has an unexpected key more.weight"),
        ("model_ema.more", torch.zeros(1), "model_ema.more is the average of no key in the file"),
        ("encoder.conv_in.bias", torch.full((32,), torch.nan), "encoder.conv_in.bias holds numbers"),
    ],
)
def test_a_key_that_does_not_fit_is_named_and_nothing_is_written(
    name: str, tensor: Tensor | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, command = published(tmp_path, "f4")
    state = reference.state_dict() | {name: tensor}
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, tmp_path / "last.ckpt")
    before = sorted(tmp_path.iterdir())
    assert main(command) == 1
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": "taming.models.vqgan.VQSegmentationModel"}, "its model is VQSegmentationModel"),
        ({"ddconfig": {"double_z": True}}, "double_z is True"),
        ({"ddconfig": {"in_channels": 182}}, "in_channels is 182; only VQGANs whose in_channels is 3"),
        ({"ddconfig": {"attn_type": "none"}}, "attn_type is none; only VQGANs whose attn_type is vanilla"),
        ({"ddconfig": {"ch": 33}}, "model.yaml: its sizes describe no network"),
        ({"ddconfig": {"ch": "wide"}}, "model.yaml: Value 'wide' of type 'str' could not be converted to Integer"),
        ({"ddconfig": {"ch_mult": 4}}, "model.yaml: Invalid value assigned"),
        ({"ddconfig": {"ch_mult": []}}, "model.yaml: its sizes describe no network"),
        ({"ddconfig": {"num_res_blocks": 10**9}}, "num_res_blocks is 1000000000; give 1 to 32; give the YAML file"),
        ({"n_embed": None}, "has not all settings of a VQGAN"),
        ({"n_embed": [5]}, "full_key: codebook_size"),
        ({"remap": "indices.npy"}, "remap is indices.npy"),
    ],
)
def test_unsupported_configurations_are_refused_with_a_reason(
    change: dict, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command = published(tmp_path, "f4")
    configuration = taming_settings(*KINDS["f4"])
    model = configuration["model"]
    for name, value in change.items():
        if name == "target":
            model[name] = value
        elif isinstance(value, dict):
            model["params"][name] |= value
        elif value is None:
            del model["params"][name]
        else:
            model["params"][name] = value
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(configuration))
    assert main(command) == 1
    assert sentence in capsys.readouterr().err


STRANGE = {
    "1": "is not a YAML file of settings",
    "- 1": "holds no settings",
    "words": "has not all settings of a VQGAN",
    "model: 5": "has not all settings of a VQGAN",
    "model: {target: taming.models.vqgan.VQModel}": "has not all settings of a VQGAN",
    "model: {params: 5}": "has not all settings of a VQGAN",
    "model: {target: a.VQModel, params: {ddconfig: 5}}": "has not all settings of a VQGAN",
    "model: {target: a.VQModel, params: {ddconfig: {}}}": "has not all settings of a VQGAN",
    "model: {target: 7, params: {}}": "has not all settings of a VQGAN",
    "model: {params: {first_stage_config: [1]}}": "has not all settings of a VQGAN",
    "[": "is not a YAML file of settings",
    "\0": "is not a YAML file of settings",
}


@pytest.mark.parametrize("text", STRANGE)
def test_an_unusual_yaml_file_gives_one_error_sentence(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command = published(tmp_path, "f4")
    (tmp_path / "model.yaml").write_text(text)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert STRANGE[text] in error
    assert len(error.splitlines()) == 1


def test_a_missing_yaml_file_and_a_folder_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, command = published(tmp_path, "f4")
    (tmp_path / "model.yaml").unlink()
    assert main(command) == 1
    assert "model.yaml: is not a YAML file of settings ([Errno 2] No such file or directory" in capsys.readouterr().err
    (tmp_path / "model.yaml").mkdir()
    assert main(command) == 1
    assert "model.yaml: is not a YAML file of settings ([Errno 21] Is a directory" in capsys.readouterr().err


def imported(command: list[str], folder: Path) -> dict[str, Tensor]:
    assert main(command) == 0
    return load_file(folder / "base" / "vqgan.safetensors")


@pytest.mark.parametrize("kind", ["VQModelInterface", "VQNoDiscModel"])
def test_the_same_network_under_another_class_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    _, command = published(tmp_path, "f4")
    wanted = imported(command, tmp_path)
    text = (tmp_path / "model.yaml").read_text()
    (tmp_path / "model.yaml").write_text(text.replace("taming.models.vqgan.VQModel", f"ldm.models.autoencoder.{kind}"))
    tensors = imported(command, tmp_path)
    assert {name: tensor.sum() for name, tensor in tensors.items()} == {n: t.sum() for n, t in wanted.items()}


@pytest.mark.parametrize("yaml_of", ["transformer", "vqgan"])
def test_a_vqgan_is_read_from_the_checkpoint_of_a_transformer(
    yaml_of: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference, command = published(tmp_path, "f4")
    wanted = imported(command, tmp_path)
    state = {f"first_stage_model.{name}": tensor for name, tensor in reference.state_dict().items()}
    # The averages are of the transformer here.
    state |= {"transformer.head.weight": torch.ones(2), "model_ema.transformerheadweight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    if yaml_of == "transformer":
        inner = taming_settings(*KINDS["f4"])["model"]
        params = {"transformer_config": {"target": "GPT", "params": {}}, "first_stage_config": inner}
        outer = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}}
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(outer))
    with caplog.at_level("INFO"):
        tensors = imported(command, tmp_path)
    assert {name: tensor.sum() for name, tensor in tensors.items()} == {n: t.sum() for n, t in wanted.items()}
    assert "takes first_stage_model.* and leaves out 2 other tensors" in caplog.text
    assert (tmp_path / "base" / "discriminator.safetensors").is_file()


def test_moving_averages_of_a_vqgan_are_imported(tmp_path: Path) -> None:
    reference, command = published(tmp_path, "f4")
    wanted = imported(command, tmp_path)
    names = [name for name, _ in reference.named_parameters()]
    averages = {"model_ema." + name.replace(".", ""): reference.state_dict()[name] * 2 for name in names}
    torch.save({"state_dict": reference.state_dict() | averages}, tmp_path / "last.ckpt")
    tensors = imported(command, tmp_path)
    assert all(torch.equal(tensor, wanted[name] * 2) for name, tensor in tensors.items())
    discriminator = load_file(tmp_path / "base" / "discriminator.safetensors")
    assert torch.equal(discriminator["main.0.weight"], reference.loss.discriminator.main[0].weight)


def test_a_vqgan_in_safetensors_is_imported(tmp_path: Path) -> None:
    reference, command = published(tmp_path, "f4")
    wanted = imported(command, tmp_path)
    save_file(reference.state_dict(), tmp_path / "last.ckpt")  # by its content, whatever its name
    assert imported(command, tmp_path).keys() == wanted.keys()


def test_published_sizes_give_grids_of_16_and_32_tokens() -> None:
    f16 = VQGANConfig(quantizer="taming", codebook_size=16384, codebook_dim=256)
    assert f16.grid == 16
    assert replace(f16, ch_mult=(1, 1, 2, 4), attn_resolutions=(32,), quantizer="gumbel", codebook_size=8192).grid == 32
