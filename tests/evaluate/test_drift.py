"""Bits are judged by the law of the samples: a shift of a known size is found, and what is harmless is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.cond import Cond
from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.evaluate.drift import drift, wasserstein
from fewstep.path import Straight
from fewstep.student import Student
from fewstep.teachers.laws import Mixture


class Affine(nn.Module):
    """x0 = scale x + shift, with weights that a narrow type can or cannot say."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None) -> Tensor:
        return self.scale * x + self.shift


def student(scale: float, shift: float) -> Student:
    return Student(Wrapped(Affine(scale, shift), Straight(), "x0", "t"), (4,))


def test_the_distance_of_two_normal_laws_is_that_of_their_means():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=rng)
    b = torch.randn(20_000, 3, generator=rng) + torch.tensor([0.5, -0.5, 0.0])
    assert wasserstein(a, b) == pytest.approx(1 / 3, abs=0.02)
    assert wasserstein(a, a[torch.randperm(20_000)]) == 0


def test_rounding_that_moves_no_law_is_enough():
    found = drift(student(1.0, 0.5), (4,))
    assert found.enough and found.control > 0
    assert found.distance < 0.2 * found.control and "are enough" in found.line()
    assert 0 < found.paired < 2**-7


def test_a_shift_that_a_narrow_type_cannot_say_is_found_with_its_size():
    """Samples near 1000, a spread of 1: bfloat16 has a number every 4 there."""
    found = drift(student(1.0, 1001.0), (4,))  # 1001 becomes 1000
    assert not found.enough and "not enough" in found.line()
    assert found.distance > 3 * found.control
    fine = drift(student(1.0, 1001.0), (4,), dtype=torch.float16)  # a number every 0.5
    assert fine.distance < 0.3 * found.distance


def test_the_model_is_left_as_it_was_and_a_teacher_is_followed_along_its_way():
    model = student(0.7, 0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    again = drift(model, (4,))
    assert again == drift(model, (4,))
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in model.state_dict().items())
    assert drift(model.denoiser, (4,)).enough


def test_an_exact_law_has_no_bits_to_save():
    law = Mixture(torch.ones(1, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64), 1.0, path=Straight())
    with pytest.raises(Refused, match="no network"):
        drift(law, (4,))
