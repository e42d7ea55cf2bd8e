"""importers/hfailab.py: HFAiLab's published CLIP-GEN gives the outputs of the published code."""

from __future__ import annotations

from errno import EACCES
from pathlib import Path

import pytest
import torch
from importer_files import HFAILAB, VIT, clip_state, hfailab_checkpoint, hfailab_files, published_keys
from safetensors.torch import load_file
from torch import Tensor

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.config import GPTConfig, VQGANConfig
from clip_gen.networks.discriminator import build_discriminator
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.sampling.sampler import Sampling, filtered_probabilities, sample_tokens
from clip_gen.weights.importers.hfailab import convert_gpt, convert_vqgan, gpt_sources, vqgan_config, vqgan_sources
from clip_gen.weights.importers.state_dict import Checkpoint
from clip_gen.weights.model_folder import ModelFolderError, Networks, load_base, load_networks, save_networks


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(HFAILAB / "expected_tiny.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixtures, imported by the command with a random CLIP that has their embedding size."""
    files = hfailab_files(tmp_path_factory.mktemp("hfailab"))
    torch.save(clip_state(VIT), files / "clip.pt")
    words = ["--vqgan", str(files / "vqgan.pt"), "--gpt", str(files / "gpt.pt"), "--clip", str(files / "clip.pt")]
    assert main(["import", "hfailab", *words, "--out", str(files / "coco")]) == 0
    return files / "coco"


@pytest.fixture(scope="module")
def networks(folder: Path) -> Networks:
    return load_networks(folder)


def test_logits_are_the_published_ones(networks: Networks, expected: dict[str, Tensor]) -> None:
    with torch.no_grad():
        logits = networks.gpt(expected["embedding"], expected["idx"])
    assert torch.allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def test_greedy_tokens_are_the_published_ones(networks: Networks, expected: dict[str, Tensor]) -> None:
    uniforms = torch.full((3, 16), 0.5)
    for sampling in (Sampling(top_k=1), Sampling(temperature=0)):
        tokens = sample_tokens(networks.gpt, expected["embedding"], uniforms, sampling)
        assert torch.equal(tokens, expected["greedy_tokens"])


def test_codes_and_pictures_are_the_published_ones(networks: Networks, expected: dict[str, Tensor]) -> None:
    vqgan, image = networks.vqgan, expected["image"]
    with torch.no_grad():
        assert torch.allclose(vqgan.features(image)[0], expected["latent"], rtol=0, atol=1e-5)
        assert torch.allclose(vqgan(image).images, expected["reconstruction"], rtol=0, atol=1e-5)
    assert torch.equal(vqgan.encode(image), expected["codes"].flatten(1))
    decoded = vqgan.decode(expected["greedy_tokens"])
    assert torch.allclose(decoded, expected["generated"].clamp(-1, 1), rtol=0, atol=1e-5)


def test_filtered_probabilities_are_the_published_ones(expected: dict[str, Tensor]) -> None:
    names = [name for name in expected if name.startswith("probs_")]
    assert len(names) == 6
    for name in names:
        k, p = name.removeprefix("probs_k").split("_p")
        sampling = Sampling(top_k=0 if k == "None" else int(k), top_p=float(p))
        probabilities = filtered_probabilities(expected["filter_logits"], sampling)
        assert torch.allclose(probabilities, expected[name], rtol=0, atol=1e-6), name


def test_the_discriminator_is_saved_with_tamings_names(folder: Path) -> None:
    kept, theirs = load_file(folder / "discriminator.safetensors"), hfailab_checkpoint("vqgan")["model"]
    build_discriminator().load_state_dict(kept)
    assert torch.equal(kept["main.5.weight"], theirs["discriminator.features.5.weight"])
    assert torch.equal(kept["main.11.bias"], theirs["discriminator.head.bias"])


def test_prompt_to_pictures_from_the_imported_folder(folder: Path) -> None:
    model = ClipGen.load(folder, device="cpu")
    result = model.generate("a cat", candidates=4, num_outputs=2, seed=1, top_k=50, top_p=0.95)
    assert [image.size for image in result.images] == [(16, 16)] * 2
    assert model.config.name == "coco"


def test_guidance_is_refused_with_the_value_and_the_remedy(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance is 3\.0, but.*without a null condition.*fine-tune"):
        ClipGen.load(folder, device="cpu").generate("a cat", 4, 2, guidance=3.0)


def test_training_adds_a_null_condition_and_guidance(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    gpt = base.gpt.requires_grad_()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    tokens = base.vqgan.encode(torch.rand(4, 3, 16, 16) * 2 - 1)
    embedding, losses = base.clip.encode_image(torch.rand(4, 3, 16, 16)), []
    for _ in range(5):
        logits = gpt(embedding, tokens[:, :-1], torch.tensor([True, False, False, False]))
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    save_networks(base, tmp_path / "tuned", {})
    model = ClipGen.load(tmp_path / "tuned", device="cpu")
    assert len(model.generate("a cat", 2, 1, guidance=3.0, seed=0).images) == 1


def test_without_a_clip_the_error_tells_how_to_add_one(tmp_path: Path) -> None:
    hfailab_files(tmp_path)
    out = tmp_path / "coco"
    words = ["import", "hfailab", "--vqgan", str(tmp_path / "vqgan.pt"), "--gpt", str(tmp_path / "gpt.pt")]
    assert main([*words, "--out", str(out)]) == 0
    with pytest.raises(ModelFolderError, match=r"clip\.safetensors: missing.*python -m clip_gen import clip"):
        load_networks(out)
    torch.save(clip_state(VIT), tmp_path / "clip.pt")
    assert main(["import", "clip", "--checkpoint", str(tmp_path / "clip.pt"), "--out", str(out)]) == 0
    assert load_networks(out).config.clip == VIT
    assert (out / "discriminator.safetensors").is_file()


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), (None, torch.float32)]
)
def test_parameters_are_saved_in_the_requested_type(tmp_path: Path, dtype: str | None, wanted: torch.dtype) -> None:
    hfailab_files(tmp_path)
    words = ["--vqgan", str(tmp_path / "vqgan.pt"), "--gpt", str(tmp_path / "gpt.pt"), "--out", str(tmp_path / "out")]
    assert main(["import", "hfailab", *words, *(["--dtype", dtype] if dtype else [])]) == 0
    for part in ("gpt", "vqgan"):
        assert {t.dtype for t in load_file(tmp_path / "out" / f"{part}.safetensors").values()} == {wanted}


def foreign(part: str) -> Checkpoint:
    return Checkpoint(Path(f"{part}.pt"), hfailab_checkpoint(part)["model"])


def convert(checkpoint: Checkpoint) -> None:
    convert_gpt(checkpoint) if checkpoint.path.stem == "gpt" else convert_vqgan(checkpoint, 16)


@pytest.mark.parametrize("part", ["gpt", "vqgan"])
def test_any_missing_key_is_named(part: str) -> None:
    whole = foreign(part)
    for name in sorted(whole.tensors)[:: 3 if part == "gpt" else 11]:
        left = {key: tensor for key, tensor in whole.tensors.items() if key != name}
        with pytest.raises(ValueError, match=rf"{part}\.pt: has no key {name}, only others such as "):
            convert(Checkpoint(whole.path, left))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("gpt", "blocks.1.encoder.linear1.weight"),
        ("gpt", "head.bias"),
        ("gpt", "blocks.0.encoder.self_attn.in_proj_bias"),
        ("vqgan", "encoder.down.4.shortcut.weight"),
        ("vqgan", "decoder.mid.1.attn.in_proj_weight"),
        ("vqgan", "discriminator.head.weight"),
        ("vqgan", "discriminator.features.3.num_batches_tracked"),
    ],
)
def test_a_misshapen_key_is_named_with_both_shapes(part: str, name: str) -> None:
    checkpoint = foreign(part)
    checkpoint.tensors[name] = torch.zeros(5, 7)
    with pytest.raises(ValueError, match=rf"{name} has shape \(5, 7\), wanted is \("):
        convert(checkpoint)


@pytest.mark.parametrize("name", ["blocks.0.encoder.norm3.weight", "encoder.down.0.extra", "discriminator.more"])
def test_an_unknown_key_is_named(name: str) -> None:
    checkpoint = foreign("gpt" if "blocks" in name else "vqgan")
    checkpoint.tensors[name] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"has an unexpected key {name};"):
        convert(checkpoint)


def test_a_mask_that_is_not_causal_is_named() -> None:
    checkpoint = foreign("gpt")
    checkpoint.tensors["blocks.1.mask"] = torch.zeros(16, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"blocks\.1\.mask is not a causal mask of 16 positions"):
        convert(checkpoint)


def test_numbers_that_are_not_finite_or_too_large_for_float16_are_named() -> None:
    checkpoint = foreign("gpt")
    checkpoint.tensors["head.bias"][3] = 70_000
    with pytest.raises(ValueError, match=r"head\.bias holds numbers that float16 cannot; convert.*float32"):
        convert_gpt(checkpoint, dtype=torch.float16)
    checkpoint.tensors["head.bias"][3] = torch.nan
    with pytest.raises(ValueError, match=r"head\.bias holds numbers"):
        convert_gpt(checkpoint)


def test_an_error_is_one_sentence_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hfailab_files(tmp_path, vqgan={"quantizer.embedding.weight": None})
    before = sorted(tmp_path.iterdir())
    words = ["--vqgan", str(tmp_path / "vqgan.pt"), "--gpt", str(tmp_path / "gpt.pt"), "--out", str(tmp_path / "out")]
    assert main(["import", "hfailab", *words]) == 1
    assert "has no key quantizer.embedding.weight" in capsys.readouterr().err
    assert main(["import", "hfailab", *words, "--heads", "3"]) == 1
    assert "--heads is 3; give a divisor of the transformer's width, 128" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_parts_of_different_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hfailab_files(tmp_path, vqgan={"quantizer.embedding.weight": torch.zeros(32, 32)})
    words = ["--vqgan", str(tmp_path / "vqgan.pt"), "--gpt", str(tmp_path / "gpt.pt"), "--out", str(tmp_path / "out")]
    assert main(["import", "hfailab", *words]) == 1
    assert "codebook_size must be equal, but they are 64 and 32" in capsys.readouterr().err


def test_only_a_model_folder_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hfailab_files(tmp_path)
    words = ["import", "hfailab", "--vqgan", str(tmp_path / "vqgan.pt"), "--gpt", str(tmp_path / "gpt.pt")]
    assert main([*words, "--out", str(tmp_path)]) == 1
    assert "holds gpt.pt and is no model folder" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert main([*words, "--out", str(tmp_path / "out"), "--dtype", "float16"]) == 0


@pytest.mark.parametrize("name", ["config.yaml", "training.json", "clip.safetensors"])
def test_files_of_another_program_with_the_same_names_are_not_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = hfailab_files(tmp_path) / "out"
    words = ["import", "hfailab", "--vqgan", str(tmp_path / "vqgan.pt"), "--gpt", str(tmp_path / "gpt.pt")]
    out.mkdir()
    (out / name).write_text("theirs: 1\n")
    assert main([*words, "--out", str(out)]) == 1
    assert f"holds {name} and is no model folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "theirs: 1\n"


def test_an_unwritable_folder_is_refused_before_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    words = ["import", "hfailab", "--vqgan", "nowhere", "--gpt", "nowhere", "--out"]
    for out, sentence in (
        ("file", "file: cannot be used (Not a directory); name another folder"),
        ("file/out", "file/out: cannot be used (Not a directory)"),
    ):
        assert main([*words, str(tmp_path / out)]) == 1
        assert sentence in capsys.readouterr().err

    def refuse(**_: object) -> str:  # tests may run as root, who may write anywhere
        raise PermissionError(EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert main([*words, str(tmp_path / "new" / "out")]) == 1
    assert "out: cannot be used (Permission denied); name another folder" in capsys.readouterr().err


def test_every_published_key_is_converted_at_the_published_size() -> None:
    published = published_keys()
    shapes = published["vqgan"].items()
    vqgan = Checkpoint(Path("vqgan"), {name: torch.empty(shape, device="meta") for name, shape in shapes})
    config = VQGANConfig(quantizer="taming", codebook_size=16384, codebook_dim=256, norm_eps=1e-5)
    assert vqgan_config(vqgan, 256) == config
    with torch.device("meta"):
        networks = {"vqgan": VQGAN(config), "gpt": GPT(published_gpt())}
    sources = {"vqgan": vqgan_sources(networks["vqgan"]), "gpt": gpt_sources(networks["gpt"])}
    for part, network in networks.items():
        used = set()
        for name, tensor in network.state_dict().items():
            source = sources[part][name]
            used.add(source.name)
            assert source.shape(tensor.shape) == tuple(published[part][source.name]), name
        left = {key for key in set(published[part]) - used if not key.startswith("discriminator.")}
        assert left == ({f"blocks.{i}.mask" for i in range(24)} if part == "gpt" else set())
    assert sum(tensor.numel() for tensor in networks["gpt"].state_dict().values()) == pytest.approx(337e6, rel=0.01)


def published_gpt() -> GPTConfig:
    return GPTConfig(24, 16, 1024, 256, 16384, 512, head_bias=True, null_condition=False)
