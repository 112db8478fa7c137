"""Guidance around every solver: rescale and dynamic thresholding, whatever prediction a solver asks for."""

import pytest
import torch
from laws import draw, mixture, seeded

from fewstep.denoiser import Denoiser, Guided, Thresholded
from fewstep.grid import grid
from fewstep.path import Straight
from fewstep.registry import SOLVERS
from fewstep.solvers import sample, solver_named


class Says(Denoiser):
    """Guesses what it is told for each class."""

    def __init__(self, values):
        super().__init__()
        self.values, self.path = values, Straight()

    def forward(self, x, t, cond=None, want="x0", s=None):
        return self.path.convert(self.values[cond].expand_as(x), x, t, "x0", want)

    def null(self, cond):
        return torch.full_like(cond, len(self.values) - 1)


ROWS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 0.3, -0.4]], dtype=torch.float64)


@pytest.mark.parametrize("want", ["x0", "eps", "flow", "velocity"])
def test_rescaled_guidance_has_the_conditional_guess_s_spread(want):
    model, cond = Says(ROWS), torch.tensor([0, 0])
    x = torch.randn(2, 4, generator=seeded(0), dtype=torch.float64)
    answer = Guided(model, 5.0, rescale=1.0)(x, 0.4, cond, want)
    guess = model.path.convert(answer, x, 0.4, want, "x0")
    mixed = ROWS[1] + 5 * (ROWS[0] - ROWS[1])
    assert torch.allclose(guess.std(1, correction=0), ROWS[0].std(correction=0).expand(2), atol=1e-6)
    assert torch.allclose(guess[0] / guess[0, 0], mixed / mixed[0], atol=1e-9)


def test_half_a_rescale_is_half_way_to_it():
    model, cond, x = Says(ROWS), torch.tensor([0]), torch.zeros(1, 4, dtype=torch.float64)
    none, half, whole = (Guided(model, 5.0, rescale=r)(x, 0.4, cond) for r in (0.0, 0.5, 1.0))
    assert torch.allclose(half, (none + whole) / 2, atol=1e-7)
    with pytest.raises(ValueError, match="share in"):
        Guided(model, 5.0, rescale=1.5)


@pytest.mark.parametrize("want", ["x0", "eps", "flow"])
def test_thresholding_holds_each_row_to_its_own_quantile(want):
    x = torch.zeros(2, 4, dtype=torch.float64)
    rows = torch.tensor([[4.0, -2.0, 1.0, 0.5], [0.5, -0.5, 0.25, 0.1]], dtype=torch.float64)
    held = Thresholded(Says(rows), quantile=0.75, bound=1.0)
    guess = held.path.convert(held(x, 0.4, torch.tensor([0, 1]), want), x, 0.4, want, "x0")
    assert torch.allclose(guess[0], torch.tensor([1.0, -1.0, 0.5, 0.25], dtype=torch.float64))
    assert torch.allclose(guess[1], rows[1])  # inside the bound: untouched
    with pytest.raises(ValueError, match="quantile in"):
        Thresholded(Says(rows), quantile=0.0)


@pytest.mark.parametrize("name", [entry.name for entry in SOLVERS])
def test_every_solver_samples_under_the_whole_of_guidance(name):
    """All at once: interval, rescale, a negative condition, thresholding; ends stay inside the bound."""
    law = mixture(classes=True)
    guided = Guided(law, 6.0, lambda cond: 1 - cond, interval=(0.1, 0.9), rescale=0.7)
    steps = next(n for n in (solver_named(name).steps_for(k) for k in (6, 7, 8)) if n is not None)
    x, cond = draw(law, 8, 1.0), torch.arange(8) % 2
    free = sample(guided, x, grid(Straight(), steps, "uniform"), solver_named(name), cond=cond, rng=seeded(0))
    model = Thresholded(guided, 0.9, 1.0)
    held = sample(model, x, grid(Straight(), steps, "uniform"), solver_named(name), cond=cond, rng=seeded(0))
    assert free.isfinite().all() and held.isfinite().all()
    assert held.abs().mean() < free.abs().mean()
