"""importers/lpips.py and FrozenLPIPS: the two published files give the distances of taming's LPIPS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lpips_files import linear_state, vgg_state
from taming.modules.losses import lpips as tamings
from torch import Tensor, nn
from torchvision.models import vgg16

from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.skip_init import SkipInit
from clip_gen.training.losses import perceptual_distance
from clip_gen.weights.importers.lpips import convert_lpips, import_lpips
from clip_gen.weights.importers.state_dict import Checkpoint
from clip_gen.weights.model_folder import load_part


@pytest.fixture(scope="module")
def ours(lpips_folder: Path) -> nn.Module:
    return loaded(lpips_folder)


def loaded(folder: Path) -> nn.Module:
    with SkipInit():
        network = FrozenLPIPS()
    load_part(network, folder / "lpips.safetensors")
    return network


def pictures(seed: int) -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distances_equal_those_of_tamings_lpips(
    ours: nn.Module, lpips_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def published(pretrained: bool) -> nn.Module:
        assert pretrained
        with SkipInit():
            network = vgg16(weights=None)
        features = {name: tensor for name, tensor in vgg_state().items() if name.startswith("features.")}
        network.load_state_dict(features, strict=False)  # the classifier, which LPIPS stops before, stays unfilled
        return network

    monkeypatch.setattr(tamings.models, "vgg16", published)
    monkeypatch.setattr(tamings, "get_ckpt_path", lambda *_: lpips_files / "vgg.pth")
    theirs = tamings.LPIPS().eval()
    a, b = pictures(0), pictures(1)
    wanted = theirs(a, b)
    assert wanted.shape == (3, 1, 1, 1)
    assert wanted.min() > 0.01
    assert torch.equal(ours(a, b), wanted)
    assert float(perceptual_distance(ours, a, b)) == pytest.approx(float(wanted.mean()))


def test_float16_weights_change_distances_by_less_than_one_percent(
    ours: nn.Module, lpips_files: Path, tmp_path: Path
) -> None:
    urls = {"vgg": "", "linear": ""}
    import_lpips(lpips_files / "vgg16-397923af.pth", lpips_files / "vgg.pth", tmp_path / "half", urls, torch.float16)
    a, b = pictures(0), pictures(1)
    assert torch.allclose(loaded(tmp_path / "half")(a, b), ours(a, b), rtol=0.01)


def test_lpips_is_frozen_and_has_no_dropout(ours: nn.Module) -> None:
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    parent = nn.ModuleList([ours]).train()
    assert parent.training
    assert torch.equal(ours(pictures(0), pictures(1)), ours(pictures(0), pictures(1)))
    assert not any(module.training for module in ours.modules())


def test_the_loss_is_in_float32_under_autocast(ours: nn.Module) -> None:
    fakes = pictures(0).bfloat16()
    wanted = ours(fakes.float(), pictures(1)).mean()
    with torch.autocast("cpu", torch.bfloat16):
        distance = perceptual_distance(ours, fakes, pictures(1))
    assert distance.dtype == torch.float32
    assert torch.equal(distance, wanted)


def test_zero_activations_have_a_zero_gradient_not_nan(lpips_folder: Path) -> None:
    network = loaded(lpips_folder)
    for name, parameter in network.named_parameters():
        if name.endswith("slice5.28.bias"):
            parameter.fill_(-1e6)
    images = pictures(0).requires_grad_()
    perceptual_distance(network, images, pictures(1)).backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("features.17.bias", None, "a.pth: has no key features.17.bias"),
        ("features.0.weight", torch.zeros(64, 1, 3, 3), "a.pth: features.0.weight has shape (64, 1, 3, 3), wanted is"),
        ("features.30.weight", torch.zeros(1), "a.pth: has an unexpected key features.30.weight"),
        ("classifier.7.weight", torch.zeros(1), "a.pth: has an unexpected key classifier.7.weight"),
        ("features.2.bias", torch.full((64,), torch.nan), "a.pth: features.2.bias holds numbers that are not finite"),
        ("lin3.model.1.weight", None, "b.pth: has no key lin3.model.1.weight"),
        ("lin0.model.1.weight", torch.zeros(64), "b.pth: lin0.model.1.weight has shape (64,), wanted is (1, 64, 1, 1)"),
        ("lin5.model.1.weight", torch.zeros(1), "b.pth: has an unexpected key lin5.model.1.weight"),
    ],
)
def test_a_key_that_does_not_fit_is_named(name: str, tensor: Tensor | None, sentence: str) -> None:
    files = []
    for path, state in (("a.pth", vgg_state()), ("b.pth", linear_state())):
        if name.startswith("lin") == (path == "b.pth"):
            state |= {name: tensor}
        files.append(Checkpoint(Path(path), {key: value for key, value in state.items() if value is not None}))
    with pytest.raises(ValueError, match=r".") as raised:
        convert_lpips(*files, torch.float16)
    assert sentence in str(raised.value)


def test_swapped_files_are_refused_and_nothing_is_written(lpips_files: Path, tmp_path: Path) -> None:
    linear = lpips_files / "vgg.pth"
    with pytest.raises(ValueError, match=r"vgg\.pth: has no key features\.0\.weight"):
        import_lpips(linear, linear, tmp_path / "out", {"vgg": "", "linear": ""}, torch.float16)
    assert not list(tmp_path.iterdir())
