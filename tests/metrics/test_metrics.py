import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.errors import Refused
from fewstep.metrics import Sample, metric_named
from fewstep.metrics.base import mean_score
from fewstep.metrics.distances import blocks, kth, nearest
from fewstep.metrics.manifold import manifold
from fewstep.metrics.sliced import sliced_squares
from fewstep.registry import METRICS
from fewstep.rng import Rng

NAMES = ["accuracy", "copied", "coverage", "density", "diversity", "frechet", "kernel", "precision", "recall", "sliced"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(count, width, seed=0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def score(name, fake, real, rng=None):
    return metric_named(name)(fake, real, rng or seeded(0))


def sample(features, **more):
    return Sample(features, flat=features, **more)


def test_all_metrics_are_registered_under_their_names():
    assert [entry.name for entry in METRICS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_gives_the_same_score_from_the_same_seed(name):
    labels = torch.arange(40) % 2
    real = sample(normal(40, 3, 0), labels=labels, predicted=labels, train=normal(50, 3, 2))
    fakes = [sample(normal(40, 3, 1), labels=labels, predicted=labels.roll(1)) for _ in range(2)]
    assert score(name, fakes[0], real, Rng(3)) == score(name, fakes[1], real, Rng(3))


def test_importing_the_metrics_costs_no_heavy_library():
    heavy = "{'sklearn', 'scipy', 'torchmetrics', 'matplotlib'}"
    code = f"import sys, fewstep.metrics; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# -- kernel -----------------------------------------------------------------------------------


def brute_kernel(x, y):
    def k(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3

    xx, yy = k(x, x), k(y, y)
    m, n = len(x), len(y)
    return float((xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * k(x, y).mean())


def test_kernel_distance_is_the_full_u_statistic_at_unequal_counts():
    x, y = normal(30, 4, 0), normal(50, 4, 1) + 0.5
    assert score("kernel", Sample(x), Sample(y)).value == pytest.approx(brute_kernel(x, y), rel=1e-12)


def test_kernel_distance_agrees_with_torchmetrics_at_equal_counts():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(60, 8, 0), normal(60, 8, 1) + 0.3
    assert score("kernel", Sample(x), Sample(y)).value == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-12)


def test_kernel_distance_is_unbiased_and_its_spread_is_its_standard_error():
    scores = [score("kernel", Sample(normal(40, 3, 2 * s)), Sample(normal(40, 3, 2 * s + 1))) for s in range(300)]
    values = torch.tensor([s.value for s in scores])
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    assert values.std() / torch.tensor([s.spread for s in scores]).mean() == pytest.approx(1, abs=0.35)


# -- precision, recall, density, coverage -----------------------------------------------------


def brute_manifold(real, fake, k):
    """The four figures as Naeem et al. compute them, sorted row by row in numpy."""

    def apart(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    reach_real = np.sort(apart(real, real), 1)[:, k]
    reach_fake = np.sort(apart(fake, fake), 1)[:, k]
    between = apart(real, fake)
    return {
        "precision": (between <= reach_real[:, None]).any(0).mean(),
        "recall": (between <= reach_fake[None]).any(1).mean(),
        "density": (between <= reach_real[:, None]).sum(0).mean() / k,
        "coverage": (between.min(1) <= reach_real).mean(),
    }


def test_neighbourhood_figures_are_those_of_the_definition():
    real, fake = normal(120, 5, 0), 0.8 * normal(90, 5, 1) + 0.2
    expected = brute_manifold(real.numpy(), fake.numpy(), 5)
    found = {name: score(name, Sample(fake), Sample(real)).value for name in expected}
    assert found == pytest.approx(expected, abs=1e-12)


def test_distances_do_not_depend_on_the_size_of_a_block(monkeypatch):
    a, b = normal(50, 12, 0), normal(70, 12, 1)
    whole = [kth(a, 3), *nearest(a, b)]
    monkeypatch.setattr("fewstep.metrics.distances.BLOCK", 300)
    assert len(list(blocks(a, b))) > 10
    for one, other in zip(whole, [kth(a, 3), *nearest(a, b)], strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-12)


def test_a_sample_has_full_precision_recall_and_coverage_against_itself():
    x = normal(60, 4)
    for name in ("precision", "recall", "coverage"):
        assert score(name, Sample(x), Sample(x.clone())).value == 1


def test_a_distant_sample_has_no_precision_recall_or_coverage():
    for name in ("precision", "recall", "density", "coverage"):
        assert score(name, Sample(normal(60, 4) + 100), Sample(normal(60, 4, 1))).value == 0


def test_one_outlier_flatters_recall_but_not_coverage():
    real, fake = normal(200, 2, 0), 0.05 * normal(200, 2, 1)
    spoiled = torch.cat([fake[:-6], 30 * torch.eye(2).repeat(3, 1).double() * torch.tensor([[1.0], [-1.0]] * 3)])
    before, after = (score("recall", Sample(f), Sample(real)).value for f in (fake, spoiled))
    assert after > before + 0.5
    before, after = (score("coverage", Sample(f), Sample(real)).value for f in (fake, spoiled))
    assert abs(after - before) < 0.05


def test_coverage_between_equal_laws_is_one_minus_two_to_the_minus_k():
    found = score("coverage", Sample(normal(1500, 4, 0)), Sample(normal(1500, 4, 1))).value
    assert found == pytest.approx(1 - 2**-5, abs=0.015)


def test_radii_are_computed_once_for_all_samples():
    real = Sample(normal(40, 3))
    manifold(Sample(normal(40, 3, 1)), real)
    kept = real.memo["radii", 5]
    manifold(Sample(normal(40, 3, 2)), real)
    assert real.memo["radii", 5] is kept


def test_too_few_samples_for_the_neighbours_are_refused():
    with pytest.raises(Refused, match="5 neighbours need at least 6 samples, got 5"):
        score("recall", Sample(normal(5, 2)), Sample(normal(9, 2)))


# -- copied -----------------------------------------------------------------------------------


def test_held_out_samples_count_as_copied_in_one_of_twenty():
    train, real = normal(400, 20, 0), sample(normal(400, 20, 1), train=normal(400, 20, 0))
    assert score("copied", real, real).value == pytest.approx(0.05, abs=0.003)
    fresh = [score("copied", sample(normal(400, 20, 2 + s)), real).value for s in range(6)]
    assert np.mean(fresh) == pytest.approx(0.05, abs=0.02)
    assert len(train) == 400


def test_memorised_samples_count_as_copied():
    train = normal(400, 20, 0)
    real = sample(normal(400, 20, 1), train=train)
    assert score("copied", sample(train[:200] + 1e-3), real).value == 1


def test_copying_in_two_dimensions_sees_small_distances():
    train = 100 + 1e-3 * normal(300, 2, 0)  # squared norms would drown them
    real = sample(100 + 1e-3 * normal(300, 2, 1), train=train)
    assert score("copied", sample(train.clone()), real).value == 1


def test_copying_of_very_many_samples_is_measured_on_some_spread_over_all(monkeypatch):
    monkeypatch.setattr("fewstep.metrics.copied.WORK", 0)
    train = normal(100, 12, 0)
    real = sample(normal(2000, 12, 1), train=train)
    fake = torch.cat([train.repeat(10, 1), normal(1000, 12, 3)])  # the first half is copied
    found = score("copied", sample(fake), real)
    assert found.count == 500
    assert found.value == pytest.approx(0.525, abs=0.03)


def test_copying_without_training_data_is_refused():
    with pytest.raises(Refused, match="pass train"):
        score("copied", sample(normal(9, 2)), sample(normal(9, 2)))


# -- accuracy, diversity, sliced --------------------------------------------------------------


def test_accuracy_is_the_share_of_labels_seen_and_its_spread_is_binomial():
    labels = torch.arange(400) % 4
    seen = labels.clone()
    seen[:100] = (seen[:100] + 1) % 4
    fake = Sample(normal(400, 2), labels=labels, predicted=seen)
    found = score("accuracy", fake, fake)
    assert found.value == 0.75
    assert found.spread == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.2)


def test_diversity_is_one_like_real_data_and_zero_when_each_label_has_one_sample():
    labels = torch.arange(600) % 3
    real = Sample(normal(600, 4, 0) + 10 * labels[:, None], labels=labels)
    alike = Sample(normal(600, 4, 1) + 10 * labels[:, None], labels=labels)
    collapsed = Sample(10.0 * labels[:, None].expand(-1, 4), labels=labels)
    assert score("diversity", alike, real).value == pytest.approx(1, abs=0.03)
    assert score("diversity", collapsed, real).value == pytest.approx(0, abs=1e-9)


def test_sliced_distance_of_a_shift_along_a_line_is_the_shift():
    x = normal(500, 1)
    assert score("sliced", Sample(x + 0.7), Sample(x)).value == pytest.approx(0.7, rel=1e-12)


def test_sliced_distance_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    x = normal(300, 3)
    shift = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    found = sliced_squares(x + shift, x, seeded(0), directions=8000).mean()
    assert float(found) == pytest.approx(169 / 3, rel=0.05)


def test_sliced_distance_of_scaled_gaussians_is_the_difference_of_stds():
    found = score("sliced", Sample(3 * normal(5000, 2, 0)), Sample(normal(5000, 2, 1)))
    assert found.value == pytest.approx(2, rel=0.05)


def test_sliced_distance_takes_unequal_counts():
    x = normal(4000, 2, 0)
    assert score("sliced", Sample(x), Sample(x[:1000])).value < 0.1


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = normal(900, 1).flatten()
    assert mean_score(values, seeded(1)).spread == pytest.approx(1 / 30, rel=0.2)
