"""vqgan.py: images to tokens and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from taming.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor
from torch.nn import functional as F

from clip_gen.config import VQGANConfig
from clip_gen.networks.quantizers import quantizer_log
from clip_gen.networks.vqgan import VQGAN

SIZES = {
    "cosine": TINY.vqgan,
    "taming": replace(TINY.vqgan, quantizer="taming"),
    "local": replace(TINY.vqgan, local=True, ch=64),
    "halving": replace(TINY.vqgan, patch=1, ch_mult=(1, 2, 2), attn_resolutions=(4,)),
}


def started(config: VQGANConfig) -> VQGAN:
    """With a codebook initialised by a first batch."""
    torch.manual_seed(0)
    vqgan = VQGAN(config)
    vqgan(pictures(8))
    return vqgan.eval()


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", SIZES)
def test_shapes_and_ranges_of_tokens_and_images(name: str) -> None:
    vqgan = started(SIZES[name])
    tokens = vqgan.encode(pictures(3))
    assert tokens.shape == (3, vqgan.config.grid**2)
    assert tokens.dtype == torch.long
    assert 0 <= tokens.min() <= tokens.max() < 32
    images = vqgan.decode(tokens)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


@pytest.mark.parametrize("name", SIZES)
def test_decoded_tokens_equal_the_reconstruction(name: str) -> None:
    vqgan = started(SIZES[name])
    with torch.no_grad():
        out = vqgan(pictures(3))
    assert torch.equal(out.tokens, vqgan.encode(pictures(3)))
    assert torch.allclose(out.images.clamp(-1, 1), vqgan.decode(out.tokens), atol=1e-5)


def test_tokens_are_in_row_major_order() -> None:
    vqgan = started(TINY.vqgan)
    features = F.normalize(vqgan.features(pictures(1))[0][0], dim=0)  # (C, h, w)
    codes = vqgan.quantizer.lookup(vqgan.encode(pictures(1)))[0]  # (T, C)
    alike = torch.einsum("tc,chw->thw", codes, features)
    every = vqgan.quantizer.lookup(torch.arange(32))
    best = torch.einsum("kc,chw->khw", every, features).amax(dim=0)
    for t in range(16):
        y, x = divmod(t, 4)
        assert torch.isclose(alike[t, y, x], best[y, x], atol=1e-6)
    assert torch.equal(vqgan.decode(torch.arange(16)[None]), rows_decoded(vqgan))


def rows_decoded(vqgan: VQGAN) -> Tensor:
    grid = vqgan.quantizer.lookup(torch.arange(16)).reshape(4, 4, 4)  # (h, w, C)
    with torch.no_grad():
        return vqgan.pixels(grid.permute(2, 0, 1)[None]).clamp(-1, 1)


@pytest.mark.parametrize("name", ["cosine", "taming", "local"])
def test_gradients_reach_the_encoder_through_the_codebook(name: str) -> None:
    vqgan = started(SIZES[name]).train()
    vqgan(pictures(2)).images.square().mean().backward()
    assert vqgan.encoder.conv_in.weight.grad.abs().sum() > 0


def test_a_local_token_depends_on_its_patch_only() -> None:
    vqgan = started(SIZES["local"])
    before, changed = pictures(2), pictures(2)
    changed[0, :, 4:8, 8:12] = pictures(4)[3, :, :4, :4]
    differ = (vqgan.encode(before) != vqgan.encode(changed)).nonzero().tolist()
    assert differ == [[0, 1 * 4 + 2]]


def test_patches_of_a_plain_image_have_one_token_when_local() -> None:
    vqgan = started(SIZES["local"])
    assert len(vqgan.encode(torch.full((2, 3, 16, 16), 0.3)).unique()) == 1


def test_frequent_patches_do_not_weigh_more_in_a_local_codebook() -> None:
    codebooks = []
    for often in (1, 9):
        vqgan = started(SIZES["local"]).train()
        vqgan(torch.cat([pictures(4), torch.zeros(often, 3, 16, 16)]))
        codebooks.append(vqgan.quantizer.lookup(torch.arange(32)))
    assert torch.allclose(*codebooks)


def test_the_commitment_loss_has_weight_one_quarter() -> None:
    """beta weighs the loss of the encoder. taming's legacy order swaps the two."""
    vqgan = started(SIZES["taming"])
    features = vqgan.features(pictures(1))[0].detach().requires_grad_()
    codes, _, loss = vqgan.quantizer(features)
    loss.backward()
    difference = features.detach() - codes.detach()
    assert torch.allclose(features.grad, 0.25 * 2 * difference / difference.numel(), atol=1e-7)


@pytest.mark.parametrize("quantizer", ["taming", "cosine", "gumbel"])
def test_the_nearest_code_is_found_in_float32_under_autocast(quantizer: str) -> None:
    vqgan, seen = VQGAN(replace(TINY.vqgan, quantizer=quantizer, codebook_dim=TINY.vqgan.z_channels)), []

    def note(_: object, features: tuple[torch.Tensor, ...]) -> None:
        seen.append((features[0].dtype, torch.is_autocast_enabled("cpu")))

    vqgan.quantizer.register_forward_pre_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        vqgan.encode(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert seen == [(torch.float32, False)]


def test_codes_of_the_cosine_codebook_have_unit_length() -> None:
    vqgan = started(TINY.vqgan)
    codes = vqgan.quantizer.lookup(torch.arange(32)[None])
    assert torch.allclose(codes.norm(dim=-1), torch.ones(1, 32), atol=1e-5)


def test_a_first_batch_with_fewer_patches_than_codes_logs_nothing() -> None:
    said: list[str] = []
    listening = quantizer_log.add(said.append)
    try:
        assert VQGAN(TINY.vqgan)(pictures(1)).tokens.numel() < TINY.vqgan.codebook_size
    finally:
        quantizer_log.remove(listening)
    assert not said


def test_the_decoder_is_tamings() -> None:
    vqgan = started(SIZES["halving"])
    assert isinstance(vqgan.decoder, Decoder)
    codes = torch.randn(1, 4, 4, 4)
    assert torch.equal(vqgan.pixels(codes), vqgan.decoder(vqgan.post_quant_conv(codes)))


def test_building_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    VQGAN(TINY.vqgan)
    assert capsys.readouterr().out == ""


def test_an_unknown_quantizer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'"magic".*cosine'):
        VQGAN(replace(TINY.vqgan, quantizer="magic"))


def test_the_encoder_of_single_pixels_computes_what_tamings_does() -> None:
    """Up to rounding: outputs, the names of the parameters, and their gradients."""
    torch.manual_seed(0)
    config = SIZES["local"]
    ours = VQGAN(config).encoder
    channels = 3 * config.patch**2
    sizes = {name: getattr(config, name) for name in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions")}
    side = config.resolution // config.patch
    tamings = Encoder(
        **sizes, out_ch=channels, in_channels=channels, resolution=side, z_channels=config.z_channels, double_z=False
    )
    tamings.load_state_dict(ours.state_dict())  # in float64: groups of two channels amplify rounding
    pixels = torch.randn(5, channels, 1, 1, dtype=torch.float64)
    results = [encoder.double()(pixels) for encoder in (ours, tamings)]
    assert torch.allclose(*results, atol=1e-5)
    for result in results:
        result.square().sum().backward()
    expected = dict(tamings.named_parameters())
    assert list(expected) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4), name
