import math

import pytest
import torch

from fewstep.errors import Refused
from fewstep.path import Exploding, VariancePreserving
from fewstep.tasks import task_named

FOUR = {"modes": 4, "std": 0.25, "weights": [0.4, 0.3, 0.2, 0.1]}


def test_samples_follow_the_stated_law():
    task = task_named("mixture", FOUR)
    x = task.train.data.double()
    nearest = torch.cdist(x, task.law.mean)
    share = nearest.argmin(1).bincount() / len(x)
    assert torch.allclose(share, torch.tensor(FOUR["weights"]), atol=0.015)
    inside = x - task.law.mean[nearest.argmin(1)]
    assert inside.std(0).tolist() == pytest.approx([0.25, 0.25], rel=0.02)


def test_the_modes_stand_on_a_ring():
    law = task_named("mixture", {"modes": 8, "radius": 3.0}).law
    assert torch.allclose(law.mean.norm(dim=1), torch.full((8,), 3.0).double())
    gaps = (law.mean - law.mean.roll(1, 0)).norm(dim=1)
    assert torch.allclose(gaps, torch.full((8,), 6 * math.sin(math.pi / 8)).double())


@pytest.mark.parametrize("dimension", [1, 2, 3, 16])
def test_a_mixture_lives_in_any_dimension(dimension):
    task = task_named("mixture", {"dimension": dimension, "modes": 5, "train_count": 4000})
    assert task.train.data.shape == (4000, dimension)
    assert task.law(task.test.data.double(), 0.5).shape == task.test.data.shape
    assert len(task.law.mean.unique(dim=0)) == 5
    assert task.law.mean.norm(dim=1).max() == pytest.approx(2.0)


@pytest.mark.parametrize("options", [{}, FOUR, {"dimension": 1, "modes": 3}, {"modes": 1}])
def test_the_stated_spread_is_that_of_the_data(options):
    task = task_named("mixture", options)
    data = task.train.data
    assert (data - data.mean(0)).square().mean().sqrt().item() == pytest.approx(task.data_std, rel=0.02)


def test_classes_share_the_modes_and_label_the_samples():
    task = task_named("mixture", {**FOUR, "classes": 2})
    nearest = torch.cdist(task.train.data.double(), task.law.mean).argmin(1)
    assert torch.equal(nearest % 2, task.train.cond)
    assert (task.classes, task.law.classes) == (2, 2)
    assert task.train.cond.float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert task.null(task.train.cond[:2]).tolist() == [2, 2]


def test_without_classes_there_is_no_condition():
    task = task_named("mixture")
    assert task.classes is None
    assert task.train.cond is None
    assert task.batch(3, 0, 0).cond is None


def test_the_law_is_the_same_on_any_path():
    task = task_named("mixture", FOUR)
    x = task.test.data.double()
    for path in (Exploding(), VariancePreserving()):
        law = task.law_on(path)
        assert law.path == path
        assert torch.allclose(law.log_density(x), task.law.log_density(x))


def test_train_and_test_are_different_samples_fixed_by_the_seed():
    one, same, other = (task_named("mixture", {"seed": seed}) for seed in (0, 0, 1))
    assert torch.equal(one.train.data, same.train.data)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert not set(map(tuple, one.train.data.tolist())) & set(map(tuple, one.test.data.tolist()))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"modes": 3, "weights": [0.5, 0.5]}, "2 weights for 3 modes"),
        ({"modes": 2, "weights": [1.0, -0.5]}, "weights must be positive, got -0.5"),
        ({"modes": 2, "classes": 3}, "3 classes for 2 modes"),
    ],
)
def test_a_law_that_cannot_be_is_refused(options, complaint):
    with pytest.raises(Refused, match=complaint):
        task_named("mixture", options)
