"""A second judge: a small network that names things, trained on other artists' drawings than the model draws.

The templates of judge.py know the very drawings that the model was trained on. This network has not seen them, so it
tells whether a drawing shows the thing at all. It only gives the names; the rest of a reading is that of judge.py.

    python -m clip_gen.worlds.emoji.judge_network DRAWINGS [--steps 900]

trains it on DRAWINGS/ARTIST/NAME.png, RGBA pictures of the things in words.yaml, and prints how often it names the
world's own drawings right. judge_network.safetensors took about a minute on one core: 900 steps with 1,389 drawings of
noto-v1 (Apache-2.0), EmojiTwo (CC BY 4.0), FxEmojis (CC BY 4.0), Fluent Emoji Flat (MIT) and Streamline Emojis
(CC BY 4.0). It names 69 % of the world's noto drawings right (85 % in the first five) and 64 % (82 %) of the flat ones.
Of the 3D ones it names 97 % (99 %); their artist also drew Fluent Emoji Flat.
Of 200 scenes it named all things right in 70 % of the renders, and in 29 % of the spoilt ones.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clip_gen.weights.model_folder import load_part, save_part
from clip_gen.worlds.emoji.drawings import STYLES
from clip_gen.worlds.emoji.judge import TOP, Reading, resized, squares
from clip_gen.worlds.emoji.rendering import OUTLINE, centred, sprite
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, Item
from clip_gen.worlds.emoji.words import things

WEIGHTS = Path(__file__).parent / "judge_network.safetensors"
SIDE = 32  # pixels of a thing's square
WIDTHS = (32, 64, 128, 160)
BATCH = 128
RATE = 3e-3
MIN_CONFIDENCE = 0.2  # probability of the first name; below it a thing is not clear


class NameNetwork(nn.Module):
    """Squares (B, 3, 32, 32), as offsets from their background in [-1, 1], to logits of all names (B, N)."""

    def __init__(self) -> None:
        super().__init__()
        before = (3, *WIDTHS[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False)
            for inner, outer in zip(before, WIDTHS, strict=True)
        )
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, WIDTHS))
        self.names = nn.Linear(4 * WIDTHS[-1], len(things()))

    def forward(self, pictures: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pictures = F.relu(norm(convolution(pictures)))
        return self.names(F.dropout(pictures.flatten(1), 0.3, self.training))  # (B, 160 * 2 * 2)


@cache
def network() -> NameNetwork:
    """The trained network."""
    trained = NameNetwork()
    load_part(trained, WEIGHTS)
    return trained.eval().requires_grad_(False)


@torch.inference_mode()
def renamed(reading: Reading | None, picture: np.ndarray) -> Reading | None:
    """A reading of judge.py with the names that the network gives to its things."""
    if reading is None:
        return None
    offsets = torch.from_numpy(resized(picture) - np.float32(BACKGROUNDS[reading.background]) / 255)
    crops = [offsets[square.inside()].permute(2, 0, 1)[None] for square in squares(reading.layout)]
    fitted = [F.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True) for crop in crops]
    shares, numbers = network()(torch.cat(fitted)).softmax(dim=1).topk(TOP)  # (things, TOP)
    names = list(things())
    renamed_things = (
        thing._replace(names=tuple(names[i] for i in row), clear=share > MIN_CONFIDENCE)
        for thing, row, share in zip(reading.things, numbers.tolist(), shares[:, 0].tolist(), strict=True)
    )
    return replace(reading, things=tuple(renamed_things))


def read_drawings(folder: Path) -> tuple[Tensor, Tensor]:
    """All drawings without outlines, (N, 4, 32, 32) float32 of colour times alpha and alpha in [0, 1], and the numbers
    of their names.

    ValueError if there are none.
    """
    paths = [(path, number) for number, name in enumerate(things()) for path in sorted(folder.glob(f"*/{name}.png"))]
    if not paths:
        raise ValueError(f"{folder}: has no ARTIST/NAME.png of a thing in words.yaml")
    drawings = np.stack([centred(Image.open(path).convert("RGBA"), SIDE, OUTLINE) for path, _ in paths])
    return torch.from_numpy(drawings).permute(0, 3, 1, 2) / 255, torch.tensor([number for _, number in paths])


def varied(drawings: Tensor) -> Tensor:
    """Random views of drawings with outlines on random backgrounds, as offsets from these, (B, 3, 32, 32).

    Turned, shifted, stretched and mirrored a little; in other colours, blurred and noisy.
    """
    count = len(drawings)
    turn = torch.randn(count) * 0.1
    scale = 1.05 + 0.08 * torch.randn(2, count)
    mirror = torch.where(torch.rand(count) < 0.3, -1.0, 1.0)
    rows = (
        torch.stack([turn.cos() * mirror, -turn.sin(), turn.sin() * mirror, turn.cos()]).view(2, 2, count)
        * scale[:, None]
    )
    shift = 0.06 * torch.randn(2, 1, count)
    grid = F.affine_grid(torch.cat([rows, shift], dim=1).permute(2, 0, 1), list(drawings.shape), align_corners=False)
    moved = F.grid_sample(drawings, grid, align_corners=False)
    colours, alpha = moved[:, :3], moved[:, 3:]
    mixes = torch.eye(3).repeat(count, 1, 1) + torch.randn(count, 3, 3) * 0.05
    mixes[: count // 2] = torch.rand(count // 2, 3, 3).softmax(dim=2) + 0.3 * torch.randn(count // 2, 3, 3)
    colours = torch.einsum("bij,bjhw->bihw", mixes, colours)
    colours = torch.minimum(colours.clamp(min=0), alpha)
    outlined = F.max_pool2d(alpha, 2 * OUTLINE + 1, stride=1, padding=OUTLINE)
    colours, alpha = colours + outlined - alpha, outlined
    ground = torch.rand(count, 3, 1, 1)
    palette = torch.tensor(list(BACKGROUNDS.values())) / 255
    named = palette[torch.randint(len(palette), (count,))][..., None, None]
    offsets = colours - alpha * torch.where(torch.rand(count, 1, 1, 1) < 0.5, named, ground)
    blur = torch.rand(count, 1, 1, 1).square()
    offsets = offsets + blur * (F.avg_pool2d(offsets, 3, 1, 1) - offsets)
    return offsets + torch.randn_like(offsets) * 0.08 * torch.rand(count, 1, 1, 1)


def train(drawings: Tensor, numbers: Tensor, steps: int) -> NameNetwork:
    """Prints the loss now and then."""
    torch.manual_seed(0)
    learner = NameNetwork().train()
    optimizer = torch.optim.AdamW(learner.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(drawings), (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            logits = learner(varied(drawings[chosen]))
        loss = F.cross_entropy(logits.float(), numbers[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return learner.eval()


@torch.inference_mode()
def accuracy(trained: NameNetwork, style: str) -> tuple[float, float]:
    """How often the first name and one of the first five are right, for the world's drawings on white."""
    pixels = np.stack([sprite(Item(name, style), SIDE, 1) for name in things()]) / np.float32(255)
    offsets = torch.from_numpy(pixels[..., :3] - pixels[..., 3:]).permute(0, 3, 1, 2)
    right = trained(offsets).topk(TOP).indices == torch.arange(len(pixels))[:, None]
    return right[:, 0].float().mean().item(), right.any(dim=1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser("python -m clip_gen.worlds.emoji.judge_network")
    parser.add_argument("drawings", type=Path, help="a folder with ARTIST/NAME.png")
    parser.add_argument("--steps", type=int, default=900, help="batches of 128 views; default 900")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    trained = train(*read_drawings(arguments.drawings), arguments.steps)
    save_part(trained, arguments.out)
    for style in STYLES:
        print("{}: first name right {:.3f}, in the first five {:.3f}".format(style, *accuracy(trained, style)))


if __name__ == "__main__":
    main()
