import numpy as np
import pytest
import torch

from fewstep.errors import MissingExtra, Refused
from fewstep.rng import Rng
from fewstep.tasks import task_named


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="needs fewstep[evaluate]")
    return task_named("digits")


def test_the_digits_are_those_of_scikit_learn_split_in_two(digits):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    both = torch.cat([digits.train.data, digits.test.data]).flatten(1)
    given = torch.tensor(np.c_[pixels, labels])
    ours = torch.cat([(both + 1) * 8, torch.cat([digits.train.cond, digits.test.cond])[:, None]], 1)
    assert (len(digits.train), len(digits.test)) == (898, 899)
    assert sorted(map(tuple, ours.double().tolist())) == sorted(map(tuple, given.double().tolist()))


def test_both_halves_hold_every_class_alike(digits):
    halves = [part.cond.bincount(minlength=10) for part in (digits.train, digits.test)]
    assert (halves[0] - halves[1]).abs().max() <= 1


def test_what_a_digit_is(digits):
    assert digits.train.data.shape[1:] == digits.shape == (1, 8, 8)
    assert digits.train.data.min() == -1
    assert digits.train.data.max() == 1
    assert digits.data_std == pytest.approx(digits.train.data.std().item(), abs=0.01)
    assert digits.classes == 10
    assert digits.pictures(digits.test.data[:2]).shape == (2, 8, 8, 1)


def test_recipes_are_chosen_on_digits_of_the_training_half_alone(digits):
    chosen = task_named("digits", {"hold_out": 198})
    assert (len(chosen.train), len(chosen.test)) == (700, 198)
    assert chosen.test.cond.bincount().min() >= 19
    rows = [set(map(tuple, part.data.flatten(1).tolist())) for part in (chosen.train, chosen.test, digits.train)]
    assert rows[0] | rows[1] == rows[2]
    assert not rows[0] & rows[1]


@pytest.mark.parametrize("count", [5, 890])
def test_a_validation_set_that_misses_classes_is_refused(count, digits):
    with pytest.raises(Refused, match="pass 0, or 10 to 888"):
        task_named("digits", {"hold_out": count})


def test_a_fingerprint_tells_splits_apart(digits):
    assert digits.fingerprint == task_named("digits", {"augment": True}).fingerprint
    assert digits.fingerprint != task_named("digits", {"hold_out": 198}).fingerprint


def test_shifting_moves_some_digits_and_loses_no_ink(digits):
    task, data = task_named("digits", {"augment": True}), digits.train.data
    moved = task.augment(data, Rng(0))
    assert 0.1 < (moved != data).flatten(1).any(1).float().mean() < 0.9
    assert torch.equal(moved.flatten(1).sort(1).values, data.flatten(1).sort(1).values)
    wide = torch.nn.functional.pad(data, (1, 1, 1, 1), value=-1.0)
    shifts = [wide[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]  # none wraps round the edge
    assert torch.stack([(moved == shift).flatten(1).all(1) for shift in shifts]).any(0).all()


def test_digits_are_shifted_only_on_request(digits):
    assert torch.equal(digits.augment(digits.train.data, Rng(0)), digits.train.data)


def test_without_scikit_learn_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fewstep\[evaluate\]'"):
        task_named("digits")
