"""The command `evaluate --images`: figures, files, resuming and sharing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.evaluation.measuring import Drawn, Measuring
from clip_gen.evaluation.pictures import bias_of
from clip_gen.files import MODULE
from clip_gen.images import resized_square, to_tensor
from clip_gen.metrics.distributions import cmmd, fid
from clip_gen.metrics.features import FeatureNetwork, weights_sha256
from clip_gen.metrics.inception_score import inception_score
from clip_gen.prompts_file import MANIFEST

PROMPTS = "a large red circle\na star\na small blue heart:2 | a ring\na star\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "pictures"
    assert main(["shapes", "--count", "24", "--seed", "3", "--out", str(folder)]) == 0
    return folder


def command(model: Path, images: Path, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    words = ["evaluate", str(model), "--images", str(images), "--prompts", str(tmp_path / "prompts.txt")]
    return [*words, "--count", "20", "--out", str(tmp_path / "out"), *more]


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "report.json").read_text())


def figures(tmp_path: Path) -> dict[tuple[str, str], dict]:
    return {(figure["source"], figure["name"]): figure for figure in report(tmp_path)["figures"]}


@pytest.fixture(scope="module")
def evaluated(
    tiny_model_folder: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[tuple[str, str], dict]]:
    """The folder of an evaluation, and its figures."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert main(command(tiny_model_folder, images, folder)) == 0
    return folder, figures(folder)


def test_every_metric_is_reported_with_its_features_and_counts(evaluated: tuple[Path, dict]) -> None:
    found = evaluated[1]
    distances = {"FID", "KID × 1000", "CMMD"}
    drawn = distances | {"close to a real picture", "CLIP score"}
    overlap = {"precision", "recall", "density", "coverage"}
    by_source = {source: {name for other, name in found if other == source} for source, _ in found}
    assert by_source == {
        "reconstructions": distances | {"PSNR", "SSIM"},
        "from image embeddings": drawn | overlap,
        "from prompts": drawn | {"R-precision"},  # four pictures are too few for precision and recall
    }
    for (source, name), figure in found.items():
        assert figure["features"] == ("pixels" if name in ("PSNR", "SSIM") else "CLIP of tiny (16)")
        assert figure["pictures"] == (4 if source == "from prompts" else 20)
        assert figure["real"] == (24 if name in distances | overlap | {"close to a real picture"} else 0)
        assert bool(figure["weights"]) == (figure["features"] == "CLIP of tiny (16)")
        assert figure["low"] is None or figure["low"] <= figure["value"] <= figure["high"]
    assert found["from image embeddings", "FID"]["note"] == "few pictures bias FID upwards"
    assert found["from prompts", "FID"]["note"] == "fewer pictures than features (16) bias FID upwards"
    assert "this CLIP also conditioned the pictures" in found["from prompts", "CLIP score"]["note"]


def test_the_figures_are_those_of_the_pictures_in_its_folder(
    evaluated: tuple[Path, dict], tiny_model: ClipGen, images: Path
) -> None:
    """Measured again from the files, by the metrics' own functions."""
    folder, found = evaluated
    encoder = tiny_model.clip_encoder
    real = [resized_square(Image.open(path).convert("RGB"), 16) for path in sorted(images.glob("*.png"))]
    files = sorted((folder / "out" / "from-image-embeddings").glob("*.0.png"))
    numbers = [int(file.name[:4]) - 1 for file in files]  # of the pictures that they were drawn from
    assert len(numbers) == 20
    assert numbers != list(range(20))  # not the first ones: folders are often sorted by what pictures show
    drawn = [Image.open(file) for file in files]
    embeddings = [encoder.encode_image(to_tensor(pictures)) for pictures in (real, drawn)]
    source = "from image embeddings"
    assert found[source, "FID"]["value"] == pytest.approx(fid(*embeddings), rel=1e-4)
    assert found[source, "CMMD"]["value"] == pytest.approx(cmmd(*embeddings)[0].value, rel=1e-4)
    between = torch.cdist(embeddings[1], embeddings[0])
    between[torch.arange(20), numbers] = torch.inf  # a picture's copy of what it was drawn from does not count
    own = torch.cdist(embeddings[0], embeddings[0]).fill_diagonal_(torch.inf).amin(dim=1)
    wanted = (between.amin(dim=1) <= own.median()).float().mean()
    assert found[source, "close to a real picture"]["value"] == pytest.approx(float(wanted))
    scores = 100 * (embeddings[0][numbers] * embeddings[1]).sum(dim=1)
    assert found[source, "CLIP score"]["value"] == pytest.approx(float(scores.mean()), rel=1e-5)


def test_features_with_classes_give_an_inception_score(tiny_model: ClipGen) -> None:
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    encoder = tiny_model.clip_encoder
    network = FeatureNetwork("classes", encoder.encode_image, lambda features: 10 * features @ weight)
    measuring = Measuring(network, encoder, "tiny", tiny_model.device)
    pictures = [torch.rand(60, 3, 16, 16) * 2 - 1 for _ in range(2)]
    real, drawn = (measuring.features(iter([images])) for images in pictures)
    measuring.drawn("from prompts", Drawn([Path()] * 60, drawn), real, real, None)
    [found] = [figure for figure in measuring.figures if figure.name == "IS"]
    assert found.value == pytest.approx(float(inception_score(drawn.features, network.classify).mean()))
    assert 1 < found.low < found.value < found.high
    assert (found.features, found.counts, found.arrow) == ("classes", "60", "↑")
    assert found.note == "few pictures bias IS downwards"
    [cmmd_figure] = [figure for figure in measuring.figures if figure.name == "CMMD"]
    assert cmmd_figure.note == f"few pictures add {cmmd(real.embeddings, drawn.embeddings)[1]:.3f} to it"


def test_the_pictures_are_those_that_generate_draws(evaluated: tuple[Path, dict], tiny_model: ClipGen) -> None:
    for number, prompt in enumerate(PROMPTS.splitlines()):
        picture = Image.open(evaluated[0] / "out" / "from-prompts" / f"{number + 1:04}.0.png")
        wanted = tiny_model.generate(prompt, candidates=1, num_outputs=1, seed=number).images[0]
        assert picture.tobytes() == wanted.tobytes()


def test_a_second_run_draws_only_what_is_missing(
    tiny_model_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tiny_model_folder, images, tmp_path, "--candidates", "2")
    assert main(words) == 0
    before, folder = report(tmp_path), tmp_path / "out" / "from-prompts"
    kept = folder / "0001.0.png"
    (folder / "0002.0.png").unlink()
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(line for line in lines if "0003.0" not in line))  # killed before it wrote it
    changed = kept.stat().st_mtime_ns
    assert main(words) == 0
    assert kept.stat().st_mtime_ns == changed
    assert report(tmp_path) == before
    assert "biased: this CLIP also chose the best of 2" in capsys.readouterr().out
    other = images.parent / "others"
    assert main(["shapes", "--count", "8", "--seed", "1", "--out", str(other)]) == 0
    words[words.index(str(images))] = str(other)
    assert main(words) == 1
    assert f"holds an evaluation on other pictures than {other}; name another folder" in capsys.readouterr().err


def test_processes_of_torchrun_share_the_drawing(
    tiny_model_folder: Path, images: Path, tmp_path: Path, evaluated: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(tiny_model_folder, images, tmp_path)
    monkeypatch.setattr("clip_gen.evaluation.pictures.wait_for", lambda path: None)
    assert main([*words, "--count", "0"]) == 0  # unpacks the pictures
    (tmp_path / "out" / "report.json").unlink()
    for path in (tmp_path / "out" / "from-prompts").iterdir():
        path.unlink()
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(words) == 0
        assert (tmp_path / "out" / "report.json").is_file() == (rank == "0")  # the first measures
    assert figures(tmp_path) == evaluated[1]


def test_a_clip_of_other_weights_is_not_biased(
    tiny_model_folder: Path, images: Path, tmp_path: Path, evaluated: tuple[Path, dict]
) -> None:
    """The CLIP's folder has another name than the model; the weights tell."""
    for name, folder in (("same", tiny_model_folder), ("other", tmp_path / "changed")):
        if name == "other":
            shutil.copytree(tiny_model_folder, folder)
            tensors = load_file(folder / "clip.safetensors")
            tensors["clip.visual.conv1.weight"] *= 1.01
            save_file(tensors, folder / "clip.safetensors")
        where = tmp_path / name
        where.mkdir()
        words = command(tiny_model_folder, images, where, "--clip", str(folder), "--count", "0")
        assert main([*words, "--compare", str(evaluated[0] / "out" / "report.json")]) == 0
        note = figures(where)["from prompts", "CLIP score"]["note"]
        assert note == ("biased: this CLIP also conditioned the pictures" if name == "same" else "")
        page = (where / "out" / "report.html").read_text()
        assert ("do not compare" in page) == (name == "other")


def test_weights_are_the_same_in_any_precision(tiny_model: ClipGen) -> None:
    own = copy.deepcopy(tiny_model.clip_encoder).half()
    assert weights_sha256(own) == weights_sha256(copy.deepcopy(own).float())
    other = copy.deepcopy(own)
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1
    assert weights_sha256(other) != weights_sha256(own)


def test_a_file_of_prompts_may_choose_among_candidates(tiny_model_folder: Path, images: Path, tmp_path: Path) -> None:
    words = command(tiny_model_folder, images, tmp_path, "--count", "0")
    (tmp_path / "prompts.csv").write_text("prompt,candidates\na star,4\na ring,2\n")
    words[words.index(str(tmp_path / "prompts.txt"))] = str(tmp_path / "prompts.csv")
    assert main(words) == 0
    assert figures(tmp_path)["from prompts", "CLIP score"]["note"] == bias_of(4)
    assert "the best of 4 candidates each" in (tmp_path / "out" / "report.html").read_text()


def test_two_pictures_can_be_measured(tiny_model_folder: Path, images: Path, tmp_path: Path) -> None:
    """One picture has no distribution, but a reconstruction."""
    assert main(command(tiny_model_folder, images, tmp_path, "--count", "1")) == 0
    names = {name for source, name in figures(tmp_path) if source == "reconstructions"}
    assert names == {"PSNR", "SSIM"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--candidates", "0"], "candidates is 0; give"),
        (["--count", "-1"], "count is -1; give"),
        (["--seed", "-3"], "seed is -3; give"),
        (["--count", "0", "--prompts", ""], "nothing would be measured; give --prompts or --count"),
        (
            ["--baseline", "nowhere.json"],
            "nowhere.json: cannot be read (No such file or directory); give what optimise",
        ),
        (["--top-p", "2"], "top_p is 2.0; give a number, 0 to 1"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (
            ["--compare", "nowhere.json"],
            "nowhere.json: cannot be read (No such file or directory); give the report.json",
        ),
        (["--images", "nowhere"], "nowhere"),
        (["--features", "inception"], f"no such file; run {MODULE} pull inception, or give --features clip"),
    ],
)
def test_a_bad_value_is_one_sentence(
    more: list[str], sentence: str, tiny_model_folder: Path, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CLIP_GEN_INCEPTION", str(tmp_path))
    assert main(command(tiny_model_folder, images, tmp_path, *more)) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_prompts_of_a_world_are_a_number(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_model_folder), "--prompts", "a.txt"]) == 1
    assert "prompts is 'a.txt'; give a number, or --images with a file of prompts" in capsys.readouterr().err
