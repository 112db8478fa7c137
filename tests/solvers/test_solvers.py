import math

import pytest
import torch
from laws import PATHS, clean_error, draw, flow_error, full_gaussian, gaussian, mixture, seeded

from fewstep.denoiser import Counted, Guided, Reframed
from fewstep.errors import Refused
from fewstep.grid import grid
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.registry import SOLVERS, UnknownName
from fewstep.solvers import DPM2M, Euler, Heun, sample, solver_named, start_noise, steps_of

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_solver = pytest.mark.parametrize("solver", [Euler(), Heun(), DPM2M()], ids=lambda s: s.name)
SPANS = {
    "exploding": (Exploding(sigma_min=0.02, sigma_max=20.0), 5.0, 0.2),
    "variance_preserving": (VariancePreserving(), 0.8, 0.1),
    "straight": (Straight(), 0.9, 0.1),
    "cosine": (VariancePreserving(schedule="cosine"), 0.9, 0.1),
}


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@every_solver
def test_error_falls_at_the_stated_order(solver, span):
    path, high, low = span
    law = gaussian(path=path)
    coarse, fine = (flow_error(law, solver, steps, high, low, "logsnr") for steps in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_heun_without_its_second_slope_is_only_first_order(span):
    """Broken twin: what the order test would say of it."""

    class Lazy(Heun):
        def step(self, model, x, i, state, cond, rng):
            return Euler().step(model, x, i, state, cond, rng)

    path, high, low = span
    coarse, fine = (flow_error(gaussian(path=path), Lazy(), steps, high, low, "logsnr") for steps in (64, 128))
    assert math.log2(coarse / fine) < Heun.order - 0.5


def test_2m_with_its_history_upside_down_is_only_first_order():
    """Broken twin: extrapolating backwards."""

    class Backwards(DPM2M):
        def step(self, model, x, i, state, cond, rng):
            stage, guess = state.stages[i], model(x, state.stages[i].t, cond, "x0")
            keep = stage.sigma_s / stage.sigma_t
            mixed = guess if not state.history else 1.5 * state.history[0] - 0.5 * guess
            state.history[:] = [guess]
            return keep * x + (stage.alpha_s - stage.alpha_t * keep) * mixed, state

    path, high, low = SPANS["straight"]
    coarse, fine = (flow_error(gaussian(path=path), Backwards(), steps, high, low, "logsnr") for steps in (64, 128))
    assert math.log2(coarse / fine) < 1.5


@every_path
@every_solver
def test_more_steps_come_closer_from_noise_to_clean_data(solver, path):
    law = full_gaussian(path)
    errors = [clean_error(law, solver, steps) for steps in (12, 24, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / (3 if solver.order == 1 else 8)


@every_path
@every_solver
def test_a_single_point_is_reached_exactly_in_any_number_of_steps(solver, path):
    law = gaussian(mean=(2.0, -1.0), std=(0.0, 0.0), path=path)
    for steps in (1, 2, 5):
        times = grid(path, steps)
        x = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64) * path.coefs(times[0]).sigma
        x = x + path.coefs(times[0]).alpha * law.mean
        ends = sample(law, x, times, solver)
        assert torch.allclose(ends, law.mean.expand(4, 2), atol=1e-9)


@every_path
def test_euler_follows_a_single_point_exactly_between_any_two_times(path):
    law = gaussian(mean=(2.0, -1.0), std=(0.0, 0.0), path=path)
    times = grid(path, 6)[:-1]
    x = path.corrupt(law.mean.expand(3, 2), times[0], torch.randn(3, 2, generator=seeded(0), dtype=torch.float64))
    for solver in (Euler(), DPM2M()):
        ends = sample(law, x, times, solver)
        exact = law.flow_map(x, times[0].item(), times[-1].item())
        assert torch.allclose(ends, exact, atol=1e-8)


@every_path
def test_every_solver_gives_the_same_single_step_to_clean_data(path):
    law = mixture(path)
    x = start_noise(path, path.t_max, torch.randn(5, 2, generator=seeded(0), dtype=torch.float64))
    times = (path.t_max, path.t_min)
    guess = law(x, path.t_max)
    for solver in (Euler(), Heun(), DPM2M()):
        assert torch.allclose(sample(law, x, times, solver), guess, atol=1e-10)


@every_solver
def test_a_solver_costs_the_calls_that_it_states(solver):
    path = Straight()
    for nfe in range(1, 10):
        steps = solver.steps_for(nfe)
        if steps is None:
            assert solver.name == "heun"
            assert nfe % 2 == 0
            continue
        counted = Counted(gaussian(path=path))
        sample(counted, draw(counted.inner, 3, 1.0), grid(path, steps), solver)
        assert (counted.calls, counted.images) == (nfe, 3 * nfe)


def test_2m_is_algorithm_2_of_its_paper():
    path = VariancePreserving()
    law, times = mixture(path), grid(path, 6, "logsnr")[:-1]
    x = start_noise(path, times[0].item(), torch.randn(4, 2, generator=seeded(0), dtype=torch.float64))
    ours, before, lams = sample(law, x, times, DPM2M()), None, path.lam(times)
    for i in range(len(times) - 1):
        a, b = path.coefs(times[i]), path.coefs(times[i + 1])
        h, guess = lams[i + 1] - lams[i], law(x, times[i].item())
        mixed = guess
        if before is not None:
            r = (lams[i] - lams[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * guess - 1 / (2 * r) * before
        x, before = b.sigma / a.sigma * x - b.alpha * (torch.exp(-h) - 1) * mixed, guess
    assert torch.allclose(ours, x, atol=1e-12)


def test_heun_is_algorithm_1_of_edm():
    path = Exploding(sigma_min=0.002, sigma_max=80.0)
    law, sigma = mixture(path), grid(path, 7)
    ours = x = 80 * torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)
    ours = sample(law, ours, sigma, Heun())
    for i in range(7):
        t, s = sigma[i].item(), sigma[i + 1].item()
        d = (x - law(x, t)) / t
        ahead = x + (s - t) * d
        if s > 0:
            ahead = x + (s - t) * (d + (ahead - law(ahead, s)) / s) / 2
        x = ahead
    assert torch.allclose(ours, x, atol=1e-11)


def test_euler_on_the_straight_path_is_euler_s_rule():
    law, times = mixture(), grid(Straight(), 7, "uniform")
    ours = x = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)
    ours = sample(law, ours, times, Euler())
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = x + (s - t) * law.velocity(x, t)
    assert torch.allclose(ours, x, atol=1e-12)


def test_euler_on_a_diffusion_is_ddim():
    path = VariancePreserving()
    law, times = mixture(path), grid(path, 7, "trailing")
    ours = x = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)
    ours = sample(law, ours, times, Euler())
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        next_ = path.coefs(s)
        x = next_.alpha * law(x, t) + next_.sigma * law(x, t, want="eps")
    assert torch.allclose(ours, x, atol=1e-11)


@every_solver
def test_a_diffusion_and_its_exploding_twin_take_the_same_way(solver):
    """Same noise-to-signal ratios, samples scaled by alpha: no solver here may tell them apart."""
    ve, vp = Exploding(sigma_min=0.02, sigma_max=20.0), VariancePreserving()
    times = grid(ve, 6)[:-1]
    there = vp.time(ve.lam(times))
    x = draw(mixture(ve), 5, times[0].item())
    alpha = vp.coefs(there).alpha
    one = sample(mixture(ve), x, times, solver)
    other = sample(mixture(vp), alpha[0] * x, there, solver)
    assert torch.allclose(one, other / alpha[-1], atol=1e-9)


@every_solver
def test_a_reframed_teacher_samples_like_its_own_twin(solver):
    ve, straight = Exploding(sigma_min=0.02, sigma_max=20.0), Straight(end=0.95)
    law, seen, times = mixture(straight), Reframed(mixture(ve), straight), grid(straight, 5)
    x = draw(law, 4, 0.95)
    assert torch.allclose(sample(law, x, times, solver), sample(seen, x, times, solver), atol=1e-10)


@every_solver
def test_rows_are_sampled_each_for_itself(solver):
    law, times = mixture(classes=True), grid(Straight(), 4, "uniform")
    x, labels = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    whole = sample(law, x, times, solver, cond=labels)
    rows = [sample(law, x[i : i + 1], times, solver, cond=labels[i : i + 1]) for i in range(4)]
    assert torch.allclose(whole, torch.cat(rows), atol=1e-12)


@every_solver
def test_sampling_leaves_the_noise_as_it_was(solver):
    x = torch.randn(3, 2, generator=seeded(0), dtype=torch.float64)
    before = x.clone()
    sample(mixture(), x, (1.0, 0.5, 0.0), solver)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_solver
def test_samples_keep_their_precision(solver, dtype):
    x = torch.randn(3, 2, generator=seeded(0)).to(dtype)
    assert sample(gaussian(), x, (1.0, 0.5, 0.0), solver).dtype == dtype


@every_solver
def test_the_watcher_sees_every_state_and_the_last_is_the_sample(solver):
    seen = []
    ends = sample(
        mixture(), torch.ones(2, 2).double(), (1.0, 0.7, 0.2, 0.0), solver, watch=lambda i, x: seen.append((i, x))
    )
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], ends)


def test_guidance_towards_a_class_ends_nearer_to_it():
    """On two classes of one Gaussian each, guidance pushes past the class's own mean, away from the other."""
    law = mixture(classes=True)
    labels = torch.zeros(64, dtype=torch.long)
    x, times = torch.randn(64, 2, generator=seeded(0), dtype=torch.float64), grid(Straight(), 16, "uniform")
    guided = Guided(law, 2.0, lambda cond: torch.full_like(cond, law.classes))
    other = law.mean[law.labels == 1]
    near = [torch.cdist(sample(m, x, times, Heun(), cond=labels), other).min(1).values.mean() for m in (law, guided)]
    assert near[1] > near[0]


def test_a_grid_that_rises_is_refused_before_any_call():
    counted = Counted(gaussian())
    with pytest.raises(ValueError, match="must descend"):
        sample(counted, torch.zeros(1, 2), (0.5, 0.9), Euler())
    assert counted.calls == 0


def test_start_noise_is_as_large_as_the_path_s_noise():
    noise = torch.ones(2, 2)
    assert torch.equal(start_noise(Exploding(sigma_max=80.0), 80.0, noise), 80 * noise)
    assert torch.equal(start_noise(Straight(), 1.0, noise), noise)


def test_solvers_are_found_by_name():
    for entry in SOLVERS:
        assert solver_named(entry.name).name == entry.name
        assert entry.papers
    with pytest.raises(UnknownName, match="unknown sampler 'huen': did you mean 'heun'"):
        solver_named("huen")


@pytest.mark.parametrize("entry", list(SOLVERS), ids=lambda e: e.name)
def test_a_number_of_calls_that_no_steps_cost_is_refused_by_name_with_those_that_work(entry):
    solver = solver_named(entry.name)
    for nfe in range(1, 30):
        if solver.steps_for(nfe) is not None:
            assert steps_of(solver, nfe) == solver.steps_for(nfe)
            continue
        with pytest.raises(Refused, match=f"^{entry.name} cannot make {nfe} calls of the network: take ") as error:
            steps_of(solver, nfe)
        for other in str(error.value).split("take ")[1].split(" or "):
            assert solver.steps_for(int(other))
    with pytest.raises(Refused, match="cannot make 0 calls"):
        steps_of(solver, 0)
