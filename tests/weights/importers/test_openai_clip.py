"""importers/openai_clip.py: OpenAI's CLIPs give the embeddings of the `clip` package."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from conftest import FIXTURES, TINY
from importer_files import RESNET, VIT, clip_state, write_archive
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.__main__ import main
from clip_gen.config import BridgeConfig, ClipConfig
from clip_gen.files import sha256_of
from clip_gen.images import CLIP_MEAN, CLIP_STD, for_clip, to_tensor
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.clip_encoder import ClipEncoder, build_clip
from clip_gen.weights.importers import openai_clip
from clip_gen.weights.importers.openai_clip import clip_config, convert_clip, read_clip
from clip_gen.weights.importers.state_dict import Checkpoint
from clip_gen.weights.model_folder import build, load_config, load_networks, load_part, save_networks, save_part

PHOTOS = FIXTURES / "photos"


def check_embeddings(ours: ClipEncoder, theirs: clip.model.CLIP) -> None:
    images, prompts = torch.rand(2, 3, 32, 32) * 2 - 1, ["a cat", "two dogs on a hill"]
    theirs = theirs.float().eval()
    with torch.no_grad():
        wanted = theirs.encode_image(for_clip(images, 32)), theirs.encode_text(clip.tokenize(prompts))
    for mine, embedding in zip((ours.encode_image(images), ours.encode_text(prompts)), wanted, strict=True):
        assert torch.allclose(mine, embedding / embedding.norm(dim=1, keepdim=True), atol=1e-6)


FORMS = {
    "state dict": torch.save,
    "wrapped": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "safetensors": lambda state, path: save_file({name: t.contiguous() for name, t in state.items()}, path),
    "open_clip, trained": lambda state, path: torch.save(
        {"epoch": 1, "name": "run", "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path
    ),
    "open_clip, CustomTextCLIP": lambda state, path: torch.save(
        {name if name.startswith(("visual.", "logit")) else f"text.{name}": t for name, t in state.items()}, path
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [VIT, RESNET], ids=["vit", "resnet"])
def test_embeddings_are_those_of_the_clip_package(sizes: ClipConfig, form: str, tmp_path: Path) -> None:
    state = clip_state(sizes)
    theirs = clip.model.build_model({name: tensor.clone() for name, tensor in state.items()})
    # Official files are what build_model makes of them: float16, but for the layer norms.
    FORMS[form]({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "clip.pt")
    assert main(["import", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "out")]) == 0
    config = load_config(tmp_path / "out")
    assert config.clip == sizes
    assert config.gpt.embed_dim == 24
    ours = ClipEncoder(config.clip)
    load_part(ours, tmp_path / "out" / "clip.safetensors")
    check_embeddings(ours, theirs)


@pytest.mark.parametrize("sizes", [VIT, RESNET], ids=["vit", "resnet"])
def test_openais_archives_give_the_embeddings_of_the_clip_package(sizes: ClipConfig, tmp_path: Path) -> None:
    theirs = clip.model.build_model({name: tensor.clone() for name, tensor in clip_state(sizes).items()})
    write_archive({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "clip.pt")
    config, tensors = convert_clip(read_clip(tmp_path / "clip.pt", {sha256_of(tmp_path / "clip.pt")}))
    assert config == sizes
    ours = ClipEncoder(config)
    ours.load_state_dict(tensors)
    check_embeddings(ours, theirs)


def import_clip(folder: Path, *words: str) -> int:
    return main(["import", "clip", "--checkpoint", str(folder / "clip.pt"), "--out", str(folder / "out"), *words])


@pytest.mark.parametrize("sizes", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("activation", [None, "quick_gelu", "gelu"])
def test_the_activation_is_saved_in_the_config(
    activation: str | None, sizes: ClipConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(clip_state(sizes), tmp_path / "clip.pt")
    assert import_clip(tmp_path, *(["--activation", activation] if activation else [])) == 0
    assert ("weights do not show the activation" in caplog.text) == (activation is None)
    config = load_config(tmp_path / "out").clip
    assert config.activation == (activation or "quick_gelu")
    ours, theirs = ClipEncoder(config), build_clip(VIT if sizes == VIT else RESNET)
    load_part(ours, tmp_path / "out" / "clip.safetensors")
    theirs.load_state_dict(clip_state(sizes))
    if activation == "gelu":  # open_clip's
        for tower in [theirs.transformer, *([theirs.visual.transformer] if sizes == VIT else [])]:
            for block in tower.resblocks:
                block.mlp[1] = nn.GELU()
    check_embeddings(ours, theirs)


def test_another_clip_leaves_the_licences_in_the_folder(tmp_path: Path) -> None:
    torch.save(clip_state(VIT), tmp_path / "clip.pt")
    assert import_clip(tmp_path) == 0
    (tmp_path / "out" / "LICENSES.md").write_text("by Ada")
    assert import_clip(tmp_path) == 0
    assert (tmp_path / "out" / "LICENSES.md").read_text() == "by Ada"


def test_an_old_config_without_activation_means_quick_gelu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(clip_state(VIT), tmp_path / "clip.pt")
    assert import_clip(tmp_path) == 0
    path = tmp_path / "out" / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("  activation: quick_gelu\n", ""))
    assert path.read_text() != text
    assert load_config(tmp_path / "out").clip == VIT
    path.write_text(text.replace("quick_gelu", "relu"))
    assert import_clip(tmp_path) == 1
    assert 'clip.activation is "relu"; give quick_gelu or gelu' in capsys.readouterr().err


def test_openais_files_get_quick_gelu_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "clip.pt").write_bytes(b"as published")
    monkeypatch.setitem(openai_clip.SHA256, "ViT-B/32", sha256_of(tmp_path / "clip.pt"))
    for asked in (None, "quick_gelu"):
        assert openai_clip.chosen_activation(tmp_path / "clip.pt", asked) == "quick_gelu"
    with pytest.raises(
        ValueError, match=r"--activation is gelu, but .* is OpenAI's, trained with quick_gelu; leave it"
    ):
        openai_clip.chosen_activation(tmp_path / "clip.pt", "gelu")
    assert not caplog.text


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"text_model.embeddings.token_embedding.weight": torch.ones(1)}, "give the open_clip file of the same model"),
        ({"visual.conv1.weight": torch.ones(1280, 3, 8, 8)}, "its image tower has width 1280. Published ViTs wider"),
        ({"visual.conv1.weight": torch.ones(())}, "visual.conv1.weight has shape ()"),
        ({"visual.positional_embedding": torch.ones(0, 64)}, "visual.positional_embedding has shape (0, 64)"),
    ],
)
def test_a_clip_of_another_kind_is_refused_with_the_remedy(
    changed: dict[str, Tensor], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(clip_state(VIT) | changed, tmp_path / "clip.pt")
    assert import_clip(tmp_path) == 1
    assert sentence in capsys.readouterr().err


# From the published architectures (width, layers, patch, resolution, embedding, text width).
PUBLISHED = {
    "RN50": (64, (3, 4, 6, 3), None, 224, 1024, 512),
    "RN101": (64, (3, 4, 23, 3), None, 224, 512, 512),
    "RN50x4": (80, (4, 6, 10, 6), None, 288, 640, 640),
    "RN50x16": (96, (6, 8, 18, 8), None, 384, 768, 768),
    "RN50x64": (128, (3, 15, 36, 10), None, 448, 1024, 1024),
    "ViT-B/32": (768, (12,), 32, 224, 512, 512),
    "ViT-B/16": (768, (12,), 16, 224, 512, 512),
    "ViT-L/14": (1024, (24,), 14, 224, 768, 768),
    "ViT-L/14@336px": (1024, (24,), 14, 336, 768, 768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_of_every_published_model_follow_from_its_shapes(name: str) -> None:
    width, layers, patch, resolution, embedding, text = PUBLISHED[name]
    config = ClipConfig(embedding, resolution, layers, width, patch, 77, 49408, text, text // 64, 12)
    with torch.device("meta"):
        state = ClipEncoder(config).clip.state_dict()
    assert clip_config(Checkpoint(Path("clip.pt"), state)) == config


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("text_projection", None, "has no key text_projection"),
        ("visual.layer3.0.bn1.running_var", None, "has no key visual.layer3.0.bn1.running_var"),
        ("visual.attnpool.c_proj.bias", torch.zeros(3), "visual.attnpool.c_proj.bias has shape (3,), wanted is (24,)"),
        ("visual.layer5.0.conv1.weight", torch.zeros(3), "has an unexpected key visual.layer5.0.conv1.weight"),
        (
            "ln_final.bias",
            torch.full((64,), torch.inf),
            "ln_final.bias holds numbers that are not finite",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named_and_nothing_is_written(
    name: str, tensor: Tensor | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = clip_state(RESNET) | {name: tensor}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "clip.pt")
    assert main(["import", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "out")]) == 1
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.pt"]


def test_a_damaged_archive_gives_one_error_sentence(tmp_path: Path) -> None:
    write_archive(clip_state(VIT), tmp_path / "clip.pt")
    with zipfile.ZipFile(tmp_path / "clip.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content[: len(content) // 2] if name.endswith("/data.pkl") else content)
    with pytest.raises(ValueError, match=r"clip\.pt: is damaged, .* download it again"):
        read_clip(tmp_path / "clip.pt", {sha256_of(tmp_path / "clip.pt")})


def test_a_clip_of_another_embedding_size_is_refused(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(clip_state(VIT), tmp_path / "clip.pt")
    before = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()}
    words = ["import", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(tiny_model_folder)]
    assert main(words) == 1
    assert "its embeddings have 24 numbers, but the transformer in" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()} == before


@pytest.mark.parametrize(
    ("record", "sentence"),
    [("[]", "training.json: cannot be read (not a JSON object)"), ("{", "training.json: "), ('{"imported": 5}', None)],
)
def test_an_unusual_training_record_is_refused_or_kept(
    record: str, sentence: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(clip_state(VIT), tmp_path / "clip.pt")
    assert import_clip(tmp_path) == 0
    (tmp_path / "out" / "training.json").write_text(record)
    assert import_clip(tmp_path) == (1 if sentence else 0)
    assert (sentence or "") in capsys.readouterr().err


def test_a_new_clip_replaces_the_old_one_and_its_bridge(tmp_path: Path) -> None:
    for sizes in (VIT, replace(VIT, embed_dim=40)):
        torch.save(clip_state(sizes), tmp_path / "clip.pt")
        assert main(["import", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "out")]) == 0
        assert load_config(tmp_path / "out").clip == sizes
        assert not (tmp_path / "out" / "bridge.safetensors").exists()
        save_part(Bridge(sizes.embed_dim, BridgeConfig()), tmp_path / "out" / "bridge.safetensors")


@pytest.mark.parametrize("size", [24, 640])
def test_embeddings_of_any_size_work(size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = replace(TINY, clip=replace(VIT, embed_dim=size), gpt=replace(TINY.gpt, embed_dim=size))
    networks = build(config)
    networks.vqgan.train()(torch.rand(8, 3, 16, 16) * 2 - 1)  # the codebook starts from its first batch
    save_networks(networks, tmp_path / "model", {})
    loaded = load_networks(tmp_path / "model")
    text = loaded.clip.encode_text(["a cat"])
    assert text.shape == (1, size)
    assert loaded.gpt(loaded.bridge(text), torch.zeros(1, 3, dtype=torch.long)).shape == (1, 4, 32)


@pytest.mark.parametrize(
    "box", [(0, 0, 300, 200), (80, 0, 280, 200), (100, 0, 230, 200)], ids=["wide", "square", "tall"]
)
@pytest.mark.parametrize("resolution", [32, 224, 336])
@pytest.mark.parametrize("name", ["cat", "coffee"])
def test_preprocessing_equals_openais_within_one_grey_level(name: str, box: tuple[int, ...], resolution: int) -> None:
    photo = Image.open(PHOTOS / f"{name}.jpg").crop(box)
    ours = for_clip(to_tensor([photo]), resolution)[0]
    theirs = clip.clip._transform(resolution)(photo)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    grey, their_grey = ((pixels * std + mean).round() for pixels in (ours, theirs))
    assert ours.shape == theirs.shape
    assert (grey - their_grey).abs().max() <= 1
    assert np.asarray(photo).std() > 20  # not a plain colour


def test_image_embeddings_equal_those_of_the_clip_package() -> None:
    """The published demo does not normalise its pictures for CLIP, so its embeddings differ."""
    state = clip_state(VIT)
    encoder = ClipEncoder(VIT)
    encoder.clip.load_state_dict(state)
    photos = [Image.open(PHOTOS / f"{name}.jpg") for name in ("cat", "coffee")]
    theirs = torch.stack([clip.clip._transform(32)(photo) for photo in photos])
    raw = F.interpolate(to_tensor(photos), (32, 32), mode="bilinear")
    with torch.no_grad():
        wanted, demos = (F.normalize(encoder.clip.encode_image(pixels), dim=1) for pixels in (theirs, raw))
    embeddings = encoder.encode_image(to_tensor(photos))
    assert (embeddings * wanted).sum(dim=1).min() > 0.9999
    assert (embeddings * demos).sum(dim=1).max() < 0.999
