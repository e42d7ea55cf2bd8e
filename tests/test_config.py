"""config.py: YAML in, frozen dataclasses out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from conftest import TINY

from clip_gen.config import Completion, GPTConfig, ModelConfig, VQGANConfig, read_config, write_config
from clip_gen.files import ROOT


def test_a_config_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_config(TINY, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", ModelConfig) == TINY


def test_missing_fields_have_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("gpt: {n_layer: 3}\n")
    config = read_config(tmp_path / "config.yaml", ModelConfig)
    assert config.gpt == replace(GPTConfig(), n_layer=3)
    assert config.vqgan == VQGANConfig()


def test_a_date_is_text_as_in_the_name_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: 2024-05-01\n")
    assert read_config(tmp_path / "config.yaml", ModelConfig).name == "2024-05-01"


def test_a_field_loads_under_its_former_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("gpt: {looks_around: true}\n")
    assert read_config(tmp_path / "config.yaml", ModelConfig).gpt.neighbour_context
    bundled = read_config(ROOT / "checkpoints" / "shapes" / "config.yaml", ModelConfig)
    assert bundled.gpt.neighbour_context


def test_values_are_frozen_and_hashable(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("vqgan: {ch_mult: [1, 2]}\n")
    config = read_config(tmp_path / "config.yaml", ModelConfig)
    assert isinstance(hash(config), int)
    with pytest.raises(FrozenInstanceError):
        config.vqgan.ch = 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gpt: {n_layers: 3}", "n_layers"),
        ("gpt: {n_layer: many}", "many"),
        ("gpt: [", "config.yaml"),
        ("- 1", "config.yaml"),
        ("name: a\nname: b", "duplicate key name"),
        ("[" * 2**16, "more than 20 levels deep"),
    ],
)
def test_a_bad_file_gives_one_sentence_that_names_the_fault(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=named):
        read_config(tmp_path / "config.yaml", ModelConfig)


def test_mismatched_parts_are_refused_with_both_numbers() -> None:
    wrong = replace(TINY, gpt=replace(TINY.gpt, block_size=15))
    with pytest.raises(ValueError, match="15 and 16"):
        wrong.check()
    with pytest.raises(ValueError, match=r"n_embd \(16\)"):
        replace(TINY, gpt=replace(TINY.gpt, n_head=3)).check()
    with pytest.raises(ValueError, match="multiple of 4, not 2"):
        replace(TINY, gpt=replace(TINY.gpt, n_head=8, rotary=True)).check()
    with pytest.raises(ValueError, match=r"not ch_mult \(1, 2\)"):
        replace(TINY, vqgan=replace(TINY.vqgan, local=True, patch=2, ch_mult=(1, 2))).check()
    with pytest.raises(ValueError, match=r"and ch 32"):
        replace(TINY, vqgan=replace(TINY.vqgan, local=True)).check()


def test_a_file_reads_nothing_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text("name: ${oc.env:SECRET}\n")
    with pytest.raises(ValueError, match="is not filled in here"):
        read_config(tmp_path / "config.yaml", ModelConfig)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"vocab_size": 100}, "clip.vocab_size is 100; give 49408 to"),
        ({"context_length": 2}, "clip.context_length is 2; give 3 to"),
        ({"image_resolution": 31}, "clip.image_resolution is 31; this CLIP sees nothing below 32"),
        ({"image_resolution": 31, "vision_patch_size": 40}, "sees nothing below 40"),
        ({"transformer_layers": 257}, "clip.transformer_layers is 257; give 1 to 256"),
        ({"vision_layers": (1, 1, 999, 1)}, "clip.vision_layers is 999; give 1 to 256"),
    ],
)
def test_a_clip_with_unusable_sizes_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, clip=replace(TINY.clip, **values)).check()


@pytest.mark.parametrize("size", [0, -3, 10**9])
def test_sizes_out_of_range_are_refused_by_name(size: int) -> None:
    with pytest.raises(ValueError, match=rf"gpt\.n_layer is {size}; give 1 to"):
        replace(TINY, gpt=replace(TINY.gpt, n_layer=size)).check()
    with pytest.raises(ValueError, match=r"vqgan\.ch_mult is"):
        replace(TINY, vqgan=replace(TINY.vqgan, ch_mult=(1, size))).check()
    with pytest.raises(ValueError, match=rf"vqgan\.num_res_blocks is {size or 33}; give 1 to 32"):
        replace(TINY, vqgan=replace(TINY.vqgan, num_res_blocks=size or 33)).check()


def test_the_grid_counts_patches_and_halvings() -> None:
    assert VQGANConfig(resolution=256, patch=1, ch_mult=(1, 1, 2, 2, 4)).grid == 16
    assert VQGANConfig(resolution=64, patch=4, ch_mult=(1,)).grid == 16


def test_completions_are_read_written_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("bridge: {likelihood_weight: 0.5, completions: [{phrases: [on red, on blue], unless: ['on']}]}\n")
    config = read_config(path, ModelConfig)
    assert config.bridge.completions == (Completion(["on red", "on blue"], unless=["on"]),)
    assert isinstance(hash(config), int)
    write_config(config, path)
    assert read_config(path, ModelConfig) == config
    for text, sentence in (
        ("completions: [{unless: ['on']}]", r"bridge.completions\[0\].phrases has 0 items; give 1 to 64"),
        ("completions: [{phrase: [on]}]", "Did you mean: 'phrases'"),
        ("completions: [red]", "not a subclass of Completion"),
        ("completions: [{phrases: [[red]]}]", r"phrases has \['red'\]; give words"),
        ("completions: [{phrases: [red], unless: [{red: blue}]}]", r"unless has {'red': 'blue'}; give words"),
        ("completions: [{phrases: [red], replaces: ['']}]", "replaces has ''; give words, up to 100 characters"),
        (f"completions: [{{phrases: [{'x' * 101}]}}]", "phrases has 'xxx.*; give words, up to 100"),
        (f"completions: [{{phrases: [{'x, ' * 65}]}}]", "phrases has 65 items; give 1 to 64"),
        (f"completions: [{'{phrases: [x]}, ' * 17}]", "completions has 17 items; give 16 or fewer"),
        ("likelihood_weight: -1", "bridge.likelihood_weight is -1.0; give 0 to 100"),
    ):
        path.write_text(f"bridge: {{{text}}}\n")
        with pytest.raises(ValueError, match=sentence):
            read_config(path, ModelConfig).check()
