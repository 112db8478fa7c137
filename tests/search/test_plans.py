"""Plans that are read off solvers, and the space of plans that a search walks."""

import math

import pytest
import torch
from laws import PATHS, draw, mixture

from fewstep.grid import grid
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.registry import SOLVERS
from fewstep.solvers import SolverPlan, StepPlan, recommended, sample, solver_named

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
FLOWS = [entry.name for entry in SOLVERS if not entry.thing.stochastic]
TWICE = {"heun", "rk4", "deis_rk"}  # ask some levels twice


@pytest.mark.parametrize("name", FLOWS)
def test_a_plan_read_off_a_solver_gives_the_same_samples(name):
    for path in (Straight(), Exploding(), VariancePreserving(), PATHS["tabulated"]):
        law, solver = mixture(path), solver_named(name)
        steps = next(s for n in (7, 6) if (s := solver.steps_for(n)))
        times = grid(path, steps, "logsnr")
        x = draw(law, 8, path.t_max)
        plan = SolverPlan.of(path, solver, times)
        close = {"rtol": 0, "atol": 0.02 if name in TWICE else 1e-8}
        assert torch.allclose(sample(law, x, plan), sample(law, x, times, solver), **close)
        lam = [v for v in plan.levels if v is not None]
        assert min(b - a for a, b in zip(lam[:-1], lam[1:], strict=True)) > 1.9e-3


@every_path
def test_a_plan_read_off_a_plan_is_the_same_sampler_in_one_form(path):
    law, plan = mixture(path), recommended(path, 6)
    read = SolverPlan.of(path, plan.solver(), plan.times(path))
    x = draw(law, 8, path.t_max)
    assert torch.allclose(sample(law, x, read), sample(law, x, plan), atol=1e-8)
    assert all(step.prediction == "x0" and step.corrector == "none" for step in read.steps)
    # consistent rules leave a guess that never changes alone: their weights are shares of one
    assert all(sum(step.weights) == pytest.approx(1, abs=1e-7) for step in read.steps)


def test_a_plan_that_stops_early_and_one_with_free_weights_are_read_off_exactly():
    path = VariancePreserving()
    steps = (StepPlan(weights=(0.9,)), StepPlan(weights=(1.7, -0.8)), StepPlan(weights=(1.0, 0.3, -0.1)))
    plan = SolverPlan(levels=(None, -1.0, 0.5), end=2.0, steps=steps)
    read = SolverPlan.of(path, plan.solver(), plan.times(path))
    assert read.end == pytest.approx(2.0)
    for one, other in zip(read.steps, steps, strict=True):
        assert one.weights == pytest.approx(other.weights, abs=1e-9)


def test_free_weights_outnumber_the_orders_and_keep_the_constant_guess():
    """Ten guesses with weights 1/10 each take a law of one point to that point: a polynomial through ten would too,
    but its weights are huge."""
    path = Straight()
    lam = [-3 + 0.7 * k for k in range(1, 10)]
    steps = tuple(StepPlan(weights=(1 / (k + 1),) * (k + 1)) for k in range(10))
    plan = SolverPlan(levels=(None, *lam), steps=steps)
    law = mixture(path)
    assert sample(law, draw(law, 4, 1.0), plan).isfinite().all()
    from laws import gaussian

    point = gaussian(mean=(2.0, -1.0), std=(0.0, 0.0), path=path)
    assert torch.allclose(sample(point, draw(point, 3, 1.0), plan), point.mean.expand(3, 2), atol=1e-12)


def test_a_solver_that_draws_noise_is_no_plan():
    with pytest.raises(ValueError, match="dpm2m_sde draws noise"):
        SolverPlan.of(Straight(), solver_named("dpm2m_sde"), (1.0, 0.5, 0.0))
    assert math.isfinite(1.0)
