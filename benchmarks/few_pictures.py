"""Fine-tuning on few pictures: does the model take over their style, keep its words, and draw no copies?

    .venv/bin/python -m benchmarks few-pictures BASE artists/new --others artists --out /tmp/few [--minutes 10]

PICTURES is a folder of one kind, such as the drawings of an artist whom the base does not know, NAME.png each. BASE is
fine-tuned on some of them. Then the things of the others are drawn: the prompt is the text in NAME.txt, or else
"a NAME". `--others` has a folder for each other kind, such as the artists of the base; PICTURES may be among them, and
does not count there. It prints

accepted: the share of drawn pictures that a classifier of the kinds takes for the new kind; `accepted_before` is that
of the base's, `accepted_of_pictures` that of pictures that the classifier has not seen, after the VQGAN, and
`others_refused` the share of unseen pictures of the other kinds that it does not take for the new one.
named: the share of drawn things of the emoji world that its judge network names right, and `named_before`.
close: the share of drawn pictures that are close to a picture of the training; half is usual, all are copies.

sheet.png has what the base drew, what the new model drew, and the nearest training picture; result.json the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.data.decoding import load_picture
from clip_gen.images import from_bytes, letterboxed
from clip_gen.metrics.features import choose_features
from clip_gen.metrics.neighbours import is_close, nearest
from clip_gen.training.job import Training
from clip_gen.training.plan import LORA, TrainSettings
from clip_gen.training.squares import edges
from clip_gen.worlds.emoji import judge_network
from clip_gen.worlds.emoji.words import things

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
SIDE = 64  # pixels, of what the classifier sees
WIDTHS = (3, 32, 64, 96, 128)
BATCH, RATE = 64, 3e-3
HELD_OUT = 5  # every so manieth name is not shown to the classifier
SHOWN = 16  # on the sheet
PLAIN = 24  # levels of 255 by which a background may vary
AROUND = 1.25  # the judge network's squares, over the extent of the thing in them


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks few-pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a model folder, or its weights tar")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--others", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder; an interrupted training in it resumes")
    parser.add_argument("--learn", type=int, default=50, help="pictures to train on; default %(default)s")
    parser.add_argument("--draw", type=int, default=100, help="pictures to draw; default %(default)s")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training; default %(default)s")
    parser.add_argument("--lora", choices=LORA, default="auto")
    parser.add_argument("--classifier-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = measure(arguments)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    learnt, unseen = divided(pictures_in(arguments.pictures), arguments.learn, arguments.seed)
    asked = unseen[: arguments.draw]
    prompts, names = [prompt_of(path) for path in asked], [path.stem for path in asked]
    base = ClipGen.load(arguments.base, "cpu")
    settings = TrainSettings(
        base=arguments.base, lora=arguments.lora, max_minutes=arguments.minutes, seed=arguments.seed
    )
    Training([str(path) for path in learnt], arguments.out / "trained", settings).run()
    model = ClipGen.load(arguments.out / "trained" / "model", "cpu")
    before, after = drawn(base, prompts), drawn(model, prompts)
    folders = (path for path in sorted(arguments.others.iterdir()) if path.is_dir())
    others = [folder for folder in folders if not folder.samefile(arguments.pictures)]
    kinds = [pictures_in(folder) for folder in (arguments.pictures, *others)]
    judged = judge(model, kinds, [before, after], arguments.classifier_steps, arguments.seed)
    close, neighbours = copied(model, after, learnt)
    sheet(before, after, [squares([learnt[i]], len(after[0]))[0] for i in neighbours]).save(arguments.out / "sheet.png")
    record = json.loads((arguments.out / "trained" / "model" / "training.json").read_text())
    steps = {name: stage["steps"] for name, stage in record["stages"].items()}
    names_found = {"named": named(after, names), "named_before": named(before, names)}
    trained = {"learnt": len(learnt), "drawn": len(asked), "minutes": record["minutes"], "steps": steps}
    return trained | judged | names_found | {"close": close, "warnings": record["warnings"]}


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def divided(paths: Sequence[Path], learn: int, seed: int) -> tuple[list[Path], list[Path]]:
    """`learn` of the paths at random, and the others. ValueError if there are no others."""
    if len(paths) <= learn:
        raise ValueError(f"there are {len(paths)} pictures, and {learn} are to be learnt; give fewer with --learn")
    order = np.random.default_rng(seed).permutation(len(paths))
    return [paths[i] for i in order[:learn]], [paths[i] for i in order[learn:]]


def prompt_of(path: Path) -> str:
    text = path.with_suffix(".txt")
    if text.is_file():
        return text.read_text(encoding="utf-8").strip().splitlines()[0]
    return "a " + path.stem.replace("-", " ").replace("_", " ")


def drawn(model: ClipGen, prompts: Sequence[str]) -> Tensor:
    """The best of 16 for each prompt, (N, S, S, 3) uint8."""
    pictures = [model.generate(prompt, num_outputs=1, seed=i).images[0] for i, prompt in enumerate(prompts)]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def squares(paths: Sequence[Path], side: int) -> Tensor:
    """Whole pictures, a transparent background in white, (N, side, side, 3) uint8."""
    return torch.from_numpy(np.stack([np.array(letterboxed(load_picture(path), side)) for path in paths]))


@torch.inference_mode()
def judge(
    model: ClipGen, kinds: Sequence[Sequence[Path]], drawings: Sequence[Tensor], steps: int, seed: int
) -> dict[str, float]:
    """Trains the classifier of the kinds, the first of which is the new one, and shows it what was drawn."""
    names = sorted({path.stem for paths in kinds for path in paths})
    held_out, side = set(names[::HELD_OUT]), model.config.vqgan.resolution
    seen, unseen = [], []
    for paths in kinds:
        for parts, is_held_out in ((seen, False), (unseen, True)):
            pixels = squares([path for path in paths if (path.stem in held_out) is is_held_out], side)
            images = from_bytes(pixels)
            decoded = [model.vqgan.decode(model.vqgan.encode(some)).clamp(-1, 1) for some in images.split(32)]
            # Half of what it learns has been through the VQGAN, as everything that is drawn.
            parts.append(small(torch.cat([*([] if is_held_out else [images]), *decoded])))
    with torch.inference_mode(False):
        classifier = train_classifier([part.clone() for part in seen], steps, seed)
    accepted = [(classifier(part).argmax(dim=1) == 0).float().mean().item() for part in unseen]
    before, after = ((classifier(small(from_bytes(part))).argmax(dim=1) == 0) for part in drawings)
    return {
        "accepted": after.float().mean().item(),
        "accepted_before": before.float().mean().item(),
        "accepted_of_pictures": accepted[0],
        "others_refused": 1 - sum(accepted[1:]) / (len(accepted) - 1),
    }


def small(images: Tensor) -> Tensor:
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)


def train_classifier(kinds: Sequence[Tensor], steps: int, seed: int) -> nn.Module:
    """A small network from images (B, 3, SIDE, SIDE) in [-1, 1] to logits of the kinds, each with its images."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(WIDTHS):
        layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], len(kinds)))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        labels = torch.arange(BATCH) % len(kinds)
        images = torch.stack([kinds[kind][torch.randint(len(kinds[kind]), ())] for kind in labels.tolist()])
        loss = F.cross_entropy(network(varied(images)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def varied(images: Tensor) -> Tensor:
    """Moved, scaled and mirrored a little: what is drawn may lie elsewhere than in the pictures."""
    count = len(images)
    scale = 1.1 + 0.2 * torch.rand(count)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    move, zero = 0.2 * (torch.rand(2, count) - 0.5), torch.zeros(count)
    rows = torch.stack([scale * mirror, zero, move[0], zero, scale, move[1]]).T.view(count, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def named(pictures: Tensor, names: Sequence[str]) -> float | None:
    """The share of pictures (N, S, S, 3) uint8 that the judge network of the emoji world names right, of those with one
    of its names; None if there are none.
    """
    known = {name: number for number, name in enumerate(things())}
    rows = [i for i, name in enumerate(names) if name in known]
    if not rows:
        return None
    crops = torch.cat([thing_of(pictures[i].numpy()) for i in rows])
    found = judge_network.network()(crops).argmax(dim=1)
    return (found == torch.tensor([known[names[i]] for i in rows])).float().mean().item()


def thing_of(pixels: np.ndarray) -> Tensor:
    """The square around what differs from the background, as offsets from it, (1, 3, 32, 32)."""
    ground = np.median(edges(pixels), axis=0)
    rows, columns = np.nonzero((np.abs(pixels - ground) > PLAIN).any(axis=2))
    if not len(rows):
        rows = columns = np.array([0, len(pixels) - 1])
    half = round(AROUND * int(max(np.ptp(rows), np.ptp(columns))) / 2) + 1
    middle = [int(part.min() + part.max()) // 2 + half for part in (rows, columns)]
    padded = np.pad((pixels - ground) / 255, ((half, half), (half, half), (0, 0)))
    crop = padded[middle[0] - half : middle[0] + half, middle[1] - half : middle[1] + half]
    images = torch.from_numpy(crop.astype(np.float32)).permute(2, 0, 1)[None]
    return F.interpolate(images, (judge_network.SIDE, judge_network.SIDE), mode="bilinear", antialias=True)


def copied(model: ClipGen, pictures: Tensor, learnt: Sequence[Path]) -> tuple[float, list[int]]:
    """The share of pictures (N, S, S, 3) uint8 that are close to one of the training, and each one's nearest."""
    network = choose_features("auto", model.clip_encoder, model.config.name, torch.device("cpu"))
    features, drawn_features = (
        network(from_bytes(part) for part in pixels.split(32))
        for pixels in (squares(learnt, model.config.vqgan.resolution), pictures)
    )
    distances, indices = nearest(drawn_features, features)
    return is_close(distances, features).float().mean().item(), indices.tolist()


def sheet(*rows: Sequence[Tensor]) -> Image.Image:
    """The first SHOWN pictures (S, S, 3) uint8 of each row."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row[:SHOWN]), axis=1) for row in rows]))
