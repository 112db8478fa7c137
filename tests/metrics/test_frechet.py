import numpy as np
import pytest
import torch

from fewstep.errors import Refused
from fewstep.metrics import Sample, metric_named
from fewstep.metrics.frechet import Moments, frechet_distance


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def points(count, width, seed=0):
    mixed = torch.randn(width, width, generator=seeded(seed + 1), dtype=torch.float64) / width**0.5
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64) @ mixed + 0.3 * seed


def distance(a, b):
    return frechet_distance(Moments.of(a), Moments.of(b)).item()


def test_between_diagonal_gaussians_it_is_the_squared_difference_of_means_and_stds():
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 3.0])
    other, wide = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([2.0, 1.0, 0.1])
    found = frechet_distance(Moments.known(mean, std.square().diag()), Moments.known(other, wide.square().diag()))
    assert found.item() == pytest.approx(float((mean - other).square().sum() + (std - wide).square().sum()), rel=1e-6)


def test_between_rotated_gaussians_it_is_scipys_formula():
    from scipy.linalg import sqrtm

    a, b = points(500, 6, 0), points(400, 6, 3)
    left, right = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = sqrtm(left @ right).real
    expected = np.square((a.mean(0) - b.mean(0)).numpy()).sum() + np.trace(left + right - 2 * root)
    assert distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_it_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = points(300, 64, 0), points(350, 64, 1)
    expected = fid._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_it_is_exact_with_fewer_samples_than_features():
    a = points(20, 100)
    shift = torch.ones(100, dtype=torch.float64)
    assert distance(a, a + shift) == pytest.approx(100.0, rel=1e-12)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-11)


def test_many_draws_at_once_give_what_each_gives_alone():
    draws = torch.stack([points(80, 7, seed) for seed in range(3)])
    real = points(90, 7, 9)
    together = frechet_distance(Moments.of(draws), Moments.of(real))
    assert torch.allclose(together, torch.tensor([distance(d, real) for d in draws], dtype=torch.float64), rtol=1e-12)


def test_it_grows_with_fewer_samples_of_the_same_law():
    real = points(4000, 16)
    few, many = distance(real[:100], real[2000:]), distance(real[:2000], real[2000:])
    assert few > 3 * many


def test_the_metric_gives_no_spread_from_one_sample():
    score = metric_named("frechet")(Sample(points(50, 4, 0)), Sample(points(60, 4, 1)), seeded(0))
    assert score.spread is None
    assert score.count == 50
    assert score.value == pytest.approx(distance(points(50, 4, 0), points(60, 4, 1)))


def test_a_single_sample_is_refused():
    with pytest.raises(Refused, match="at least 2 samples"):
        Moments.of(torch.zeros(1, 3))
