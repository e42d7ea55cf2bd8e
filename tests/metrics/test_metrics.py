"""clip_gen/metrics: each figure agrees with another implementation on the same features."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import scipy.stats
import torch
import torchmetrics
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from clip_gen.metrics.clip_scores import clip_scores, retrieved
from clip_gen.metrics.distributions import cmmd, fid, kid
from clip_gen.metrics.inception_score import inception_score
from clip_gen.metrics.intervals import T9, Estimate, Share, jackknife, mean, of_tenths, share
from clip_gen.metrics.neighbours import is_close, nearest, overlap, usual_distance
from clip_gen.metrics.reconstruction import similarities


def features(count: int, seed: int, shift: float = 0.0, scale: float = 1.0, dim: int = 16) -> Tensor:
    """Correlated normal numbers (count, dim)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return shift + scale * torch.randn(count, dim, generator=generator) @ mixing


REAL, OTHER = features(700, 1), features(500, 2, shift=0.4, scale=0.8)


def test_fid_is_that_of_scipys_matrix_square_root_and_of_torch_fidelity() -> None:
    covariances = [np.cov(part.double().numpy(), rowvar=False) for part in (REAL, OTHER)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    gap = (REAL.double().mean(dim=0) - OTHER.double().mean(dim=0)).numpy()
    wanted = gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert fid(REAL, OTHER) == pytest.approx(wanted, rel=1e-6)
    statistics = [fid_features_to_statistics(part) for part in (REAL, OTHER)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert fid(REAL, OTHER) == pytest.approx(theirs, rel=1e-5)


def test_fid_of_a_set_with_itself_is_zero_and_grows_with_a_shift() -> None:
    assert abs(fid(REAL, REAL)) < 1e-3
    shifts = [0.0, 0.1, 0.3, 1.0, 3.0]
    distances = [fid(REAL, REAL + shift) for shift in shifts]
    assert distances == pytest.approx([16 * shift**2 for shift in shifts], abs=1e-4)  # the means' distance, squared


def test_fid_of_fewer_pictures_than_features_is_finite_and_of_a_set_with_itself_zero() -> None:
    few = features(40, 3, dim=128)
    assert abs(fid(few, few)) < 1e-3
    assert math.isfinite(fid(few, features(40, 4, dim=128)))


def test_small_sets_have_a_higher_fid_but_not_a_higher_kid() -> None:
    """Of sets from one distribution: the reason why reports state the numbers of pictures."""
    small = [fid(features(100, 10 + i), features(100, 20 + i)) for i in range(5)]
    large = [fid(features(1000, 10 + i), features(1000, 20 + i)) for i in range(5)]
    assert min(small) > 5 * max(large)
    kids = torch.tensor([kid(features(100, 10 + i), features(100, 20 + i)).value for i in range(20)])
    assert abs(kids.mean()) < 3 * kids.std() / math.sqrt(20)


def test_kid_is_the_unbiased_mean_discrepancy_and_agrees_with_torch_fidelity() -> None:
    real, other = REAL[:300].double(), OTHER[:300].double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(kernel(part, part).sum() - kernel(part, part).trace()) / (300 * 299) for part in (real, other)]
    wanted = 1000 * float(sum(within) - 2 * kernel(real, other).mean())
    assert kid(real, other).value == pytest.approx(wanted, rel=1e-9)
    assert kid(real.float(), other.float()).value == pytest.approx(wanted, rel=1e-5)
    options = {"kid_subsets": 2, "kid_subset_size": 300, "kid_kernel": "poly", "kid_degree": 3, "kid_gamma": None}
    options |= {"kid_coef0": 1, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(real, other, **options)["kernel_inception_distance_mean"]
    assert kid(real, other).value == pytest.approx(1000 * theirs, rel=1e-6)
    options |= {"kid_subsets": 400, "kid_subset_size": 100}
    subsets = kid_features_to_metric(real, other, **options)  # as papers give it
    error = 3 * subsets["kernel_inception_distance_std"] / math.sqrt(400)
    assert kid(real, other).value == pytest.approx(1000 * subsets["kernel_inception_distance_mean"], abs=1000 * error)


def test_cmmd_is_the_published_formula() -> None:
    real, other = (torch.nn.functional.normalize(part.double(), dim=1) for part in (REAL, OTHER))

    def kernel(a: Tensor, b: Tensor) -> float:
        squared = scipy.spatial.distance.cdist(a.numpy(), b.numpy(), "sqeuclidean")
        return float(np.exp(-squared / 200).mean())

    wanted = 1000 * (kernel(real, real) + kernel(other, other) - 2 * kernel(real, other))
    assert cmmd(real.float(), other.float())[0].value == pytest.approx(wanted, rel=1e-4)
    assert cmmd(real, real)[0].value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", [kid, lambda real, other: cmmd(real, other)[0]])
def test_the_intervals_of_kid_and_cmmd_are_the_jackknifes(distance: Callable[[Tensor, Tensor], Estimate]) -> None:
    real, other = (torch.nn.functional.normalize(part[:123].double(), dim=1) for part in (REAL, OTHER))
    found = distance(real, other[:95])
    wanted = jackknife(lambda first, second: distance(first, second).value, real, other[:95])
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high), rel=1e-6)
    assert math.isnan(distance(real[:19], other).low)


def test_the_bias_of_cmmd_is_what_equal_distributions_have() -> None:
    """Its value without the bias is 0 on average, and so small sets do not look worse once it is known."""
    pairs = [[torch.nn.functional.normalize(features(40, seed), dim=1) for seed in (i, 100 + i)] for i in range(20)]
    found = [cmmd(*pair) for pair in pairs]
    left = torch.tensor([estimate.value - bias for estimate, bias in found])
    assert min(bias for _, bias in found) > 5 * abs(left.mean())
    assert abs(left.mean()) < 3 * left.std() / math.sqrt(20)


def test_inception_score_is_that_of_torch_fidelity_and_of_the_published_formula() -> None:
    weight = torch.randn(16, 30, generator=torch.Generator().manual_seed(1))
    scores = inception_score(REAL, lambda rows: rows @ weight)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric((REAL @ weight)[order], splits=10, shuffle=False)
    assert float(scores.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert float(scores.std(correction=0)) == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    classes = scipy.special.softmax((REAL @ weight)[order[:70]].double().numpy(), axis=1)
    divergences = [scipy.stats.entropy(own, classes.mean(axis=0)) for own in classes]
    assert float(scores[0]) == pytest.approx(math.exp(np.mean(divergences)), rel=1e-5)


def test_inception_score_is_the_number_of_classes_that_are_certain() -> None:
    certain = 1000 * torch.eye(5).repeat(400, 1)
    scores = inception_score(certain, lambda rows: rows)
    assert (scores > 4.7).all()  # a random part of 200 has each class about as often
    assert (scores <= 5 + 1e-9).all()
    assert inception_score(certain[:1].expand(200, 5), lambda rows: rows).tolist() == pytest.approx([1] * 10)
    assert inception_score(torch.zeros(200, 5), lambda rows: rows).tolist() == pytest.approx([1] * 10)
    wanted = scipy.stats.t.interval(0.95, 9, scores.mean(), scipy.stats.sem(scores))
    assert (of_tenths(scores).low, of_tenths(scores).high) == pytest.approx(wanted, rel=1e-5)


def test_precision_recall_density_and_coverage_are_the_published_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.metrics.neighbours.BLOCK", 64)  # several blocks, the last one incomplete
    found = overlap(REAL, OTHER)
    options = {"prc_neighborhood": 3, "prc_batch_size": 99, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(OTHER, REAL, **options)
    assert found.precision.value == pytest.approx(theirs["precision"], abs=1e-6)
    assert found.recall.value == pytest.approx(theirs["recall"], abs=1e-6)
    own = np.sort(scipy.spatial.distance.cdist(REAL, REAL), axis=1)[:, 5]
    between = scipy.spatial.distance.cdist(REAL, OTHER)
    assert found.density.value == pytest.approx((between < own[:, None]).sum(axis=0).mean() / 5, abs=1e-6)
    assert found.coverage.value == pytest.approx((between.min(axis=1) < own).mean(), abs=1e-6)


def test_the_intervals_of_precision_and_recall_are_the_jackknifes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.metrics.neighbours.BLOCK", 64)
    found = overlap(REAL[:203], OTHER[:151])
    for metric, estimate in vars(found).items():
        wanted = jackknife(
            lambda real, other, metric=metric: getattr(overlap(real, other), metric).value, REAL[:203], OTHER[:151]
        )
        most = math.inf if metric == "density" else 1.0
        ends = (max(0.0, wanted.low), min(most, wanted.high))
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((wanted.value, *ends), abs=1e-5)
    assert math.isnan(overlap(REAL, OTHER[:19]).recall.low)


def test_the_intervals_of_precision_and_recall_are_as_wide_as_samples_differ() -> None:
    """Pictures share neighbours, so intervals for independent samples would be far too narrow: recall's a third.

    The jackknife's are up to twice too wide, since the metrics are steps of the radii.
    """
    samples = [overlap(features(100, i), features(200, 1000 + i, scale=0.9)) for i in range(40)]
    for metric in ("precision", "recall", "density"):  # coverage is 1
        found = [getattr(sample, metric) for sample in samples]
        spread = float(torch.tensor([estimate.value for estimate in found]).std())
        width = float(torch.tensor([estimate.high - estimate.low for estimate in found]).median())
        assert 0.7 < width / (2 * T9 * spread) < 2.2, metric


def test_sets_of_one_kind_overlap_and_distant_ones_do_not() -> None:
    alike, apart = overlap(REAL, features(700, 5)), overlap(REAL, REAL + 100)
    assert alike.precision.value > 0.8
    assert alike.coverage.value > 0.8
    assert alike.density.value == pytest.approx(1, abs=0.1)
    assert [part.value for part in vars(apart).values()] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="a set has 5 pictures; precision, recall and coverage need 6"):
        overlap(REAL, OTHER[:5])


def test_copies_of_training_pictures_are_found() -> None:
    distances, indices = nearest(REAL[40:60] + 1e-3, REAL)
    assert is_close(distances, REAL).all()
    new = nearest(features(700, 6), REAL)[0]
    assert float(is_close(new, REAL).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert indices.tolist() == list(range(40, 60))
    others, indices = nearest(REAL[40:60] + 1e-3, REAL, left_out=torch.arange(40, 60))
    assert (distances < others).all()
    assert (indices != torch.arange(40, 60)).all()


def test_copies_are_found_among_training_pictures_that_are_there_twice() -> None:
    twice = torch.cat([REAL, REAL])
    assert is_close(nearest(REAL[:50], twice)[0], twice).all()
    assert usual_distance(twice) == pytest.approx(usual_distance(REAL), rel=1e-4)
    same = REAL[:1].repeat(30, 1)
    assert is_close(torch.zeros(5), same).all()
    assert not is_close(torch.ones(5), same).any()


def test_clip_score_is_torchmetrics_scale_and_not_below_zero() -> None:
    texts = torch.eye(3)
    assert clip_scores(torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, -1]]), texts).tolist() == pytest.approx(
        [100, 80, 0]
    )


def test_r_precision_chooses_among_a_hundred_other_prompts() -> None:
    texts = torch.nn.functional.normalize(features(400, 7), dim=1)
    prompts = [f"prompt {i}" for i in range(400)]
    assert retrieved(texts, texts, prompts).all()
    assert not retrieved(-texts, texts, prompts).any()
    by_chance = retrieved(texts.roll(1, dims=0), texts, prompts).float().mean()
    assert by_chance < 0.06  # 1 of 100
    same = retrieved(texts[:1].repeat(4, 1), texts[:1].repeat(4, 1), ["a star"] * 4)
    assert same.all()  # no prompt of equal text is an alternative


def test_intervals_are_wilsons_and_normal() -> None:
    assert Share(50, 100).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert Share(500, 500).interval == pytest.approx((0.9924, 1.0), abs=1e-4)
    for total in (5, 10, 500, 1000):  # without rounding errors: the share itself must lie in its interval
        assert Share(0, total).interval[0] == 0
        assert Share(total, total).interval[1] == 1
    found = share(torch.tensor([True] * 3 + [False]))
    assert (found.value, found.low, found.high) == (0.75, *Share(3, 4).interval)
    values = features(200, 8)[:, 0]
    wanted = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    assert (mean(values).low, mean(values).high) == pytest.approx(wanted, rel=1e-5)


def test_the_jackknife_interval_of_a_mean_is_students_and_holds_the_truth() -> None:
    """The difference of two means, whose standard error is known: about 95 of 100 intervals hold it."""
    held = 0
    for seed in range(100):
        real, other = features(100, 2 * seed)[:, :1], features(100, 2 * seed + 1, shift=1.0)[:, :1]
        found = jackknife(lambda a, b: float(b.mean() - a.mean()), real, other)
        held += found.low < 1.0 < found.high
    assert 88 <= held <= 100
    assert math.isnan(jackknife(lambda a, b: 0.0, REAL[:19], OTHER).low)


def test_reconstructions_are_scored_one_by_one() -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    worse = torch.stack([images[0], images[1] * 0.9, images[2] * 0.5])
    found = similarities(worse, images)
    assert found["SSIM"][0] == pytest.approx(1)
    assert found["PSNR"][0] > 100
    assert (found["PSNR"].diff() < 0).all()
    assert (found["SSIM"].diff() < 0).all()
    error = (worse[2] - images[2]).square().mean()
    assert float(found["PSNR"][2]) == pytest.approx(10 * math.log10(4 / float(error)), abs=1e-3)


def test_the_jackknife_keeps_no_features_in_memory() -> None:
    """The metrics of 50,000 pictures needed 9.5 GB, because eleven copies of the features waited to be collected."""
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, 40, 8, generator=generator)
    gc.collect()
    gc.disable()
    try:
        jackknife(fid, real, generated)
        assert not [kept for kept in gc.get_objects() if isinstance(kept, torchmetrics.Metric)]
    finally:
        gc.enable()
