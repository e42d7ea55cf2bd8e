"""weights/model_folder.py: loading and saving model folders."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_networks
from safetensors.torch import load_file, save, save_file

from clip_gen import ClipGen
from clip_gen.networks.discriminator import build_discriminator
from clip_gen.weights.model_folder import (
    PARTS,
    ModelFolderError,
    all_finite,
    load_base,
    load_discriminator,
    load_networks,
    part_digests,
    save_networks,
    transformer_matches,
    transformer_mismatch,
)


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def test_a_saved_model_is_loaded_completely(folder: Path) -> None:
    saved, loaded = tiny_networks(), load_networks(folder)
    assert loaded.config == TINY
    for part in PARTS:
        for name, tensor in getattr(saved, part).state_dict().items():
            found = getattr(loaded, part).state_dict()[name]
            assert found.dtype == tensor.dtype, name
            assert torch.allclose(found, tensor, rtol=1e-3, atol=1e-6), name


def test_texts_are_saved_and_loaded_with_the_networks(tmp_path: Path) -> None:
    texts = {"vocabulary.txt": "stars\n", "LICENSES.md": "# Künstler\n"}
    for _ in range(2):  # the second time it replaces a folder
        save_networks(replace(tiny_networks(), texts=texts), tmp_path / "model", {})
    assert load_networks(tmp_path / "model").texts == load_base(tmp_path / "model").texts == texts
    save_networks(tiny_networks(), tmp_path / "model", {})
    assert load_networks(tmp_path / "model").texts == {}


@pytest.mark.parametrize("content", [b"\xff", b"word " * 2**18])
def test_a_text_that_cannot_be_read_is_named(folder: Path, content: bytes) -> None:
    (folder / "vocabulary.txt").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"vocabulary\.txt: cannot be read \(.*; copy it again, or remove it"):
        load_networks(folder)


def test_parameters_are_float16_on_disk_and_buffers_keep_their_type(folder: Path) -> None:
    tensors = load_file(folder / "vqgan.safetensors")
    assert tensors["decoder.conv_in.weight"].dtype == torch.float16
    assert tensors["quantizer.quantize._codebook.embed"].dtype == torch.float32


def test_loaded_networks_are_frozen_and_in_eval_mode(folder: Path) -> None:
    networks = load_networks(folder)
    for part in PARTS:
        assert not any(p.requires_grad for p in getattr(networks, part).parameters())
        assert not any(module.training for module in getattr(networks, part).modules())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"nowhere: no such model folder"):
        load_networks(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", *(f"{part}.safetensors" for part in PARTS)])
def test_a_missing_file_is_named_with_the_remedy(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=rf"{name}: missing.*[Cc]opy the whole"):
        load_networks(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_a_truncated_file_is_named_with_the_remedy(folder: Path, part: str, kept: float) -> None:
    path = folder / f"{part}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    with pytest.raises(ModelFolderError, match=rf"{part}.safetensors: damaged.*copy it again"):
        load_networks(folder)


def damaged_discriminators() -> dict[str, bytes]:
    whole = {name: tensor.contiguous() for name, tensor in build_discriminator(8, 1).state_dict().items()}
    return {
        "empty": b"",
        "cut off": save(whole)[:-1],
        "of other names": save({"weight": torch.ones(1)}),
        "a scalar": save(whole | {"main.0.weight": torch.ones(())}),
        "of no channels": save(whole | {"main.0.weight": torch.ones(0, 3, 4, 4)}),
        "of another shape": save(whole | {"main.2.weight": torch.ones(7)}),
        "of more layers than it holds": save(whole | {f"{i}.running_mean": torch.ones(1) for i in range(100)}),
        "not finite": save(whole | {"main.0.bias": torch.full((8,), torch.nan)}),
    }


@pytest.mark.parametrize("damage", damaged_discriminators())
def test_a_damaged_discriminator_is_named_with_the_remedy(damage: str, tmp_path: Path) -> None:
    (tmp_path / "discriminator.safetensors").write_bytes(damaged_discriminators()[damage])
    with pytest.raises(
        ModelFolderError, match=r"discriminator\.safetensors: is damaged .* copy it again, or remove it"
    ):
        load_discriminator(tmp_path)


def test_a_discriminator_is_loaded_and_is_optional(tmp_path: Path) -> None:
    assert load_discriminator(tmp_path) is None
    (tmp_path / "discriminator.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelFolderError, match=r"discriminator\.safetensors: is damaged"):
        load_discriminator(tmp_path)
    (tmp_path / "discriminator.safetensors").unlink()
    published = build_discriminator(8, 1).state_dict()
    save_file(published, tmp_path / "discriminator.safetensors")
    for name, tensor in load_discriminator(tmp_path).state_dict().items():
        assert torch.equal(tensor, published[name])


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    path = folder / "gpt.safetensors"
    tensors = load_file(path)
    tensors["head.weight"] = tensors["head.weight"][:-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(
        ModelFolderError, match=r"gpt.safetensors: head.weight has shape \(31, 16\), wanted is \(32, 16\)"
    ):
        load_networks(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool])
def test_numbers_of_a_type_that_cannot_be_converted_are_refused(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "gpt.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"head.weight": tensors["head.weight"].to(dtype)}, path)
    with pytest.raises(
        ModelFolderError, match=r"gpt.safetensors: head.weight has numbers of type \w+, wanted is float32"
    ):
        load_networks(folder)


def test_missing_and_extra_tensors_are_named(folder: Path) -> None:
    path = folder / "gpt.safetensors"
    tensors = load_file(path)
    moved = {**tensors, "headless": torch.zeros(1)}
    save_file(moved, path)
    with pytest.raises(ModelFolderError, match="does not belong to this network, headless"):
        load_networks(folder)
    del moved["head.weight"], moved["headless"]
    save_file(moved, path)
    with pytest.raises(ModelFolderError, match=r"no tensor head\.weight"):
        load_networks(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n_layer: 2", "n_layer: two"),
        ("n_layer", "layers"),
        ("block_size: 16", "block_size: 9"),
        ("n_head: 2", "n_head: 0"),
        ("patch: 4", "patch: 0"),
        ("resolution: 16\n  patch: 4", "resolution: 65536\n  patch: 16384"),
        ("n_embd: 16", "n_embd: -16"),
        ("transformer_heads: 2", "transformer_heads: 3"),
        ("transformer_width: 16", "transformer_width: 400000000"),
        ("dropout: 0.0", "dropout: 7"),
        ("ch: 32", "ch: 33"),
        ("quantizer: cosine", "quantizer: magic"),
        ("name: tiny", "name: ${oc.env:HOME}"),
    ],
)
def test_an_invalid_config_is_named(folder: Path, old: str, new: str) -> None:
    path = folder / "config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ModelFolderError, match=r"config\.yaml"):
        load_networks(folder)


def test_sizes_far_beyond_the_weights_are_refused_before_memory_is_taken(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("vocab_size: 49408", "vocab_size: 200000").replace("ch: 32", "ch: 65536"))
    with pytest.raises(ModelFolderError, match="wanted is"):
        load_networks(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_infinite_or_nan_value_is_detected(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 500, 999):
        tensor = torch.randn(1000).to(dtype)
        assert all_finite(tensor)
        tensor[place] = bad
        assert not all_finite(tensor)


def test_infinite_numbers_are_refused_when_loading_and_saving(folder: Path) -> None:
    path = folder / "gpt.safetensors"
    tensors = load_file(path)
    tensors["head.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ModelFolderError, match=r"gpt\.safetensors: head\.weight holds numbers that are not finite"):
        load_networks(folder)
    networks = tiny_networks()
    networks.gpt.head.weight[0, 0] = 70_000
    with pytest.raises(ValueError, match=r"head\.weight holds numbers that float16 cannot"):
        save_networks(networks, folder, {})


@pytest.mark.parametrize("failing", [1, 3])
def test_a_failed_save_leaves_the_old_folder_unchanged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def full_disk(tensors: dict, path: str) -> None:
        calls.append(path)
        if len(calls) == failing:
            raise OSError("No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("clip_gen.weights.model_folder.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_networks(tiny_networks(1), folder, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_replaces_an_older_model(folder: Path) -> None:
    save_networks(tiny_networks(1), folder, {"seed": 1})
    assert torch.equal(load_networks(folder).gpt.head.weight, tiny_networks(1).gpt.head.weight.half().float())
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("part", ["vqgan", "gpt"])
def test_a_transformer_of_another_vqgan_gives_a_warning(
    folder: Path, tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_networks(tiny_networks(1), tmp_path / "other", {})
    for whole in (folder, tmp_path / "other"):
        ClipGen.load(whole, "cpu")
    assert not caplog.text
    shutil.copy(tmp_path / "other" / f"{part}.safetensors", folder)
    ClipGen.load(folder, "cpu")
    assert "its transformer was not trained on the tokens of its VQGAN" in caplog.text
    assert not transformer_matches(folder)


def test_a_transformer_added_later_is_detected(folder: Path, tmp_path: Path) -> None:
    (folder / "training.json").write_text('{"digests": {"vqgan": "' + part_digests(folder)["vqgan"] + '"}}')
    assert not transformer_matches(folder)
    (folder / "gpt.safetensors").unlink()
    assert transformer_mismatch(folder) is None


def test_a_folder_without_digests_gives_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "training.json").write_text("{}")
    ClipGen.load(folder, "cpu")
    assert not caplog.text
    assert transformer_matches(folder)


def test_a_fine_tuned_decoder_still_matches_its_transformer(folder: Path) -> None:
    tensors = load_file(folder / "vqgan.safetensors")
    tensors["decoder.conv_in.weight"] *= 2
    save_file(tensors, folder / "vqgan.safetensors")
    assert transformer_matches(folder)


RECORDS = {
    **{
        "list": "[]",
        "number": "3",
        "null": "null",
        "text": '"text"',
        "cut off": "{",
        "empty": "",
        "deep": "[" * 100_000,
    },
    **{"no UTF-8": "\udcff", "settings a number": '{"settings": 5}', "stages a list": '{"stages": [1]}'},
}


@pytest.mark.parametrize("text", RECORDS.values(), ids=RECORDS)
def test_any_training_record_loads_or_gives_a_clear_error(folder: Path, text: str) -> None:
    (folder / "training.json").write_bytes(text.encode(errors="surrogateescape"))
    if text.startswith('{"'):
        assert transformer_matches(folder)
        return
    with pytest.raises(ModelFolderError, match=r"training\.json: .*; copy it again, or remove it$"):
        transformer_mismatch(folder)


def test_a_training_record_that_needs_too_much_memory_is_refused(folder: Path) -> None:
    (folder / "training.json").write_text('{"a": [' + "[]," * 2**19 + "[]]}")  # 24 times as large once it is parsed
    with pytest.raises(ModelFolderError, match=r"training\.json: cannot be read \(over 524,288 lists and objects\)"):
        ClipGen.load(folder, "cpu")


@pytest.mark.parametrize("name", ["config.yaml", "training.json", *(f"{part}.safetensors" for part in PARTS)])
@pytest.mark.parametrize("kind", ["dangling link", "folder"])
def test_a_folder_or_a_broken_link_instead_of_a_file_is_named(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nowhere")
    with pytest.raises(ModelFolderError, match=name.partition(".")[0]):
        ClipGen.load(folder, "cpu")


# Each line has the one before ten times.
EXPANDING = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    "text",
    ["[" * 60_000, "a: {" * 10_000, "a: 1\n" * 20_000, "\0", "name: &a [*a]", EXPANDING],
    ids=["lists", "mappings", "long", "zero", "alias", "expanding"],
)
def test_a_hostile_config_gives_one_error_sentence(folder: Path, text: str) -> None:
    """The YAML parser is recursive."""
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ModelFolderError, match=r"config\.yaml: .*Copy the model folder again"):
        load_networks(folder)
