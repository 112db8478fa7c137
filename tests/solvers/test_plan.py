"""Plans: they say what a named solver does, survive a file, and refuse what makes no sense."""

import json
import math

import pytest
import torch
from laws import PATHS, draw, gaussian, mixture, seeded

from fewstep.denoiser import Counted
from fewstep.errors import Refused
from fewstep.grid import grid
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.solvers import SolverPlan, StepPlan, recommended, sample, solver_named

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def plan_of(path, times, **step):
    lams = path.lam(torch.as_tensor(times, dtype=torch.float64)).tolist()
    levels = tuple(None if math.isinf(lam) else lam for lam in lams[:-1])
    return SolverPlan(levels=levels, steps=tuple(StepPlan(**step) for _ in levels))


@pytest.mark.parametrize(
    "name, step",
    [
        ("dpm3m", {"order": 3}),
        ("unipc3", {"order": 3, "corrector": "bh2"}),
        ("deis_rho", {"order": 4, "prediction": "eps", "variable": "rho"}),
        ("euler", {"prediction": "flow"}),
    ],
)
def test_a_plan_does_what_the_named_solver_does(name, step):
    for path in (Straight(), VariancePreserving()):
        law, times = mixture(path), grid(path, 6, "uniform")
        x = draw(law, 4, times[0].item())
        plan = plan_of(path, times, **step)
        assert torch.allclose(sample(law, x, plan), sample(law, x, times, solver_named(name)), atol=1e-9)


def test_a_single_step_with_a_middle_is_dpm2s():
    path = VariancePreserving()
    law, lam = mixture(path), [-1.0, -0.25, 0.5, 1.25, 2.0]
    first, second = StepPlan(), StepPlan(order=2, start=1, weights=(1.0, 0.0))
    plan = SolverPlan(levels=tuple(lam[:-1]), end=lam[-1], steps=(first, second, first, second))
    times = path.time(torch.tensor(lam[::2], dtype=torch.float64))
    x = draw(law, 4, times[0].item())
    assert torch.allclose(sample(law, x, plan), sample(law, x, times, solver_named("dpm2s")), atol=1e-10)


def test_relaxation_changes_the_slope_and_nothing_else():
    """On a law without a slope, a single point, any relaxation is exact; elsewhere it is seen."""
    path = Straight()
    point, law = gaussian(mean=(2.0, -1.0), std=(0.0, 0.0)), mixture()
    times, x = grid(path, 5, "uniform"), torch.randn(3, 2, generator=seeded(0), dtype=torch.float64)
    plain, bent = (plan_of(path, times, order=2, relax=r) for r in (1.0, 0.5))
    assert torch.allclose(sample(point, x, bent), point.mean.expand(3, 2), atol=1e-9)
    assert not torch.allclose(sample(law, x, bent), sample(law, x, plain), atol=1e-4)


def test_a_plan_is_the_same_after_a_file(tmp_path):
    plan = recommended(VariancePreserving(), 5)
    plan.save(tmp_path / "plan.json")
    assert SolverPlan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    json.loads((tmp_path / "plan.json").read_text(), parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not a plan"),
        ("[1, 2]", "not a plan"),
        ("[" * 100000, "not a plan"),
        ('{"version": 2}', "version 2"),
        ('{"levels": [null], "steps": [{}], "extra": 1}', "extra"),
        ('{"levels": [null, 0.0], "steps": [{}]}', "2 levels for 1 steps"),
        ('{"levels": [1.0, 0.0], "steps": [{}, {}]}', "must rise, got 1 then 0"),
        ('{"levels": [null, null], "steps": [{}, {}]}', "only the first"),
        ('{"levels": [NaN], "steps": [{}]}', "finite"),
        ('{"levels": [null], "steps": [{"start": 1}]}', "cannot start 1"),
        ('{"levels": [null], "steps": [{"weights": [1.5, -0.5]}]}', "2 weights and 1 guesses"),
        ('{"levels": [null], "steps": [{"prediction": "eps", "churn": 1.0}]}', "needs prediction 'x0'"),
        ('{"levels": [null], "steps": [{"prediction": "flow", "corrector": "bh2"}]}', "'exact' is for all"),
        ('{"levels": [null], "steps": [{"order": 99}]}', "order"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path, text, says):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(Refused, match=says) as caught:
        SolverPlan.load(file)
    assert "\n" not in str(caught.value)


def test_a_missing_plan_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot read the plan"):
        SolverPlan.load(tmp_path / "none.json")


def test_a_level_that_the_path_does_not_reach_is_refused_before_any_call():
    plan = SolverPlan(levels=(-4.0, 0.0), steps=(StepPlan(), StepPlan()))
    counted = Counted(gaussian(path=Exploding(sigma_max=20.0)))
    with pytest.raises(ValueError, match="does not reach the plan's level lam = -4"):
        sample(counted, torch.zeros(1, 2), plan)
    assert counted.calls == 0


def test_times_and_a_plan_each_bring_what_they_need():
    plan = recommended(Straight(), 2)
    with pytest.raises(ValueError, match="brings its own solver"):
        sample(gaussian(), torch.zeros(1, 2), plan, solver_named("euler"))
    with pytest.raises(ValueError, match="times need a solver"):
        sample(gaussian(), torch.zeros(1, 2), (1.0, 0.0))


# -- the recommended plan -------------------------------------------------------------------------


@every_path
def test_the_recommended_plan_costs_its_calls_on_every_path(path):
    for nfe in (1, 2, 3, 6):
        counted = Counted(mixture(path))
        sample(counted, draw(counted.inner, 2, path.t_max), recommended(path, nfe))
        assert counted.calls == nfe
    with pytest.raises(ValueError, match="at least 1 call, got 0"):
        recommended(path, 0)


@every_path
def test_the_recommended_plan_gets_better_with_every_call(path):
    law = mixture(path)
    x, ends = draw(law, 32, path.t_max), []
    lam = torch.linspace(max(float(path.lam(path.t_max)), -7.0), 6.0, 160, dtype=torch.float64)
    times = path.time(lam)
    times[0] = path.t_max
    exact = sample(law, x, torch.cat([times, times.new_zeros(1)]), solver_named("unipc3"))
    for nfe in (3, 5, 8, 12, 20):
        ends.append((sample(law, x, recommended(path, nfe)) - exact).square().mean().sqrt().item())
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < 0.01


@every_path
def test_the_recommended_plan_reaches_a_single_point_exactly(path):
    law = gaussian(mean=(2.0, -1.0), std=(0.0, 0.0), path=path)
    for nfe in (1, 3, 6):
        assert torch.allclose(
            sample(law, draw(law, 3, path.t_max), recommended(path, nfe)), law.mean.expand(3, 2), atol=1e-9
        )
