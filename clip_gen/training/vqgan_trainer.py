"""Stage 1: trains the VQGAN to encode images as tokens and to decode them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.discriminator import build_discriminator
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.losses import (
    adaptive_weight,
    hinge_loss,
    mean_decibels,
    perceptual_distance,
    reconstruction_errors,
)
from clip_gen.training.stage import FitConfig, Muon, Stage, adamw, compiled, recompute_activations


@dataclass(frozen=True)
class VQGANLoss:
    """The weights of the parts of the loss; the pixels' weight is 1."""

    perceptual: float = 0.0
    adversarial: float = 0.0  # times the adaptive weight
    adversarial_from: float = 0.5  # the fraction of the stage after which the discriminator is used


def half(images: Tensor) -> Tensor:
    """The first half of a batch, at least one. Batches are random, so it stands for all of them."""
    return images[: -(-len(images) // 2)]


class VQGANTrainer(Stage):
    """Trains on batches of pictures, (B, S, S, 3) uint8. The perceptual and adversarial losses, which take longer than
    the network itself, see half of each batch: more steps in a minute teach more than their other half.

    perceptual: LPIPS or a CLIP, for the perceptual loss. discriminator: a trained one; else a new one.
    decoder_only: the encoder and the codebook are frozen, so every picture keeps its tokens.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        config: FitConfig,
        loss: VQGANLoss = VQGANLoss(),
        perceptual: FrozenLPIPS | ClipEncoder | None = None,
        *,
        discriminator: nn.Module | None = None,
        decoder_only: bool = False,
    ):
        super().__init__(config, frozen=[perceptual] if loss.perceptual else [])
        self.decoder_only = decoder_only
        if decoder_only:
            vqgan.requires_grad_(False)
            for part in (vqgan.decoder, vqgan.post_quant_conv):
                part.requires_grad_(True)
            vqgan.quantizer.eval()
        # Convolutions are fastest with channels last, but torch's group norms on a CPU are slow then, unless compiled.
        if config.compile or torch.cuda.is_available():
            vqgan.to(memory_format=torch.channels_last)
        self.vqgan, self.weights = vqgan, loss
        if config.gradient_checkpointing:
            recompute_activations(vqgan.blocks)
        # On a GPU the backward pass that torch 2.11 compiles fails at the memory format of its own weight gradients.
        if config.compile and not torch.cuda.is_available():
            compiled(vqgan.encoder, dynamic=vqgan.config.local)  # the number of distinct patches varies
            compiled(vqgan.decoder)
        layers = 3 if vqgan.config.resolution >= 32 else 2  # small pictures are too small for three
        self.discriminator = (discriminator or build_discriminator(layers=layers)) if loss.adversarial else None

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.world_size > 1:
            self.vqgan.quantizer.share_between_processes()

    def train(self, mode: bool = True) -> VQGANTrainer:
        super().train(mode)
        if self.decoder_only:
            self.vqgan.quantizer.eval()  # in training mode it would update its codes
        return self

    def training_step(self, batch: Tensor) -> Tensor:
        images = from_bytes(batch)
        out = self.vqgan(images)
        decoded = out.images.float()
        # The losses see a copy, so that their gradients at it serve twice: to weigh them, and to train the decoder.
        fakes = decoded.detach().requires_grad_()
        values = self._codebook_use(out.tokens)
        reconstruction = self._reconstruction(images, fakes, values)
        (gradient,) = torch.autograd.grad(reconstruction, fakes)
        loss = out.loss
        values["loss"] = reconstruction.detach() + out.loss.detach()
        if self.discriminator is not None:
            adversarial, told_apart = self._adversarial(images, fakes, decoded, gradient, values)
            gradient, loss = gradient + adversarial, loss + told_apart
        self.log_dict({"loss": values.pop("loss"), **values}, batch_size=len(batch), sync_dist=True)
        return loss + (gradient * decoded).sum()

    def _reconstruction(self, images: Tensor, fakes: Tensor, values: dict[str, Tensor]) -> Tensor:
        difference = fakes - images
        # The absolute error keeps edges sharp; the squared error avoids large errors of single pixels.
        values["l1"] = difference.abs().mean()
        loss = values["l1"] + difference.square().mean()
        if self.weights.perceptual:
            values["perceptual"] = perceptual_distance(*self.frozen, half(fakes), half(images))
            loss = loss + self.weights.perceptual * values["perceptual"]
        return loss

    def _adversarial(
        self, images: Tensor, fakes: Tensor, decoded: Tensor, reconstruction: Tensor, values: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the generator's loss at the fakes, (B, 3, S, S), and the discriminator's loss.

        decoded: the fakes as the decoder's output. reconstruction: the gradient of the other losses at the fakes.
        """
        if self.fraction_done < self.weights.adversarial_from:
            # DDP needs a gradient for every parameter, even zero.
            unused = 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
            return torch.zeros_like(fakes), unused
        self.discriminator.requires_grad_(False)
        fooled = -self.discriminator(half(fakes)).mean()
        (gradient,) = torch.autograd.grad(fooled, fakes)
        self.discriminator.requires_grad_(True)
        weight = adaptive_weight(decoded, reconstruction, gradient, self.vqgan.decoder.conv_out.weight)
        told_apart = hinge_loss(self.discriminator(half(images)), self.discriminator(half(fakes).detach()))
        share = self.weights.adversarial * weight
        values["loss"] = values["loss"] + share * fooled.detach() + told_apart.detach()
        values |= {"fooled": fooled, "told_apart": told_apart, "adversarial_weight": weight}
        return share * gradient, told_apart

    def _codebook_use(self, tokens: Tensor) -> dict[str, Tensor]:
        """The share of codes in this batch, and the perplexity of their distribution."""
        shares = torch.bincount(tokens.flatten(), minlength=self.vqgan.config.codebook_size) / tokens.numel()
        return {"codes_in_batch": (shares > 0).float().mean(), "perplexity": torch.special.entr(shares).sum().exp()}

    def on_validation_epoch_start(self) -> None:
        self.errors: list[Tensor] = []

    def validation_step(self, batch: Tensor) -> None:
        self.errors.append(reconstruction_errors(self.vqgan, from_bytes(batch)))

    def on_validation_epoch_end(self) -> None:
        psnr, mean_colour = mean_decibels(torch.cat(self.errors, dim=1))
        self.log("val_psnr", psnr, sync_dist=True)
        self.log("val_mean_colour_psnr", mean_colour, sync_dist=True)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clips each network separately: the discriminator's gradient is much larger."""
        for network in (self.vqgan, self.discriminator):
            if network is not None:
                nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> dict[str, object]:
        if self.config.muon_rate:
            convolutions = [p for p in self.vqgan.parameters() if p.dim() == 4 and p.requires_grad]
            return self.learning(Muon(self, convolutions, self.config))
        return self.learning(adamw(self, self.config, betas=(0.9, 0.95)))
