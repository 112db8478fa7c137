"""The engine against closed forms: orders, textbook weights, laws of the stochastic solvers, cost."""

import math

import pytest
import torch
from laws import PATHS, draw, gaussian, mixture, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.denoiser import Counted
from fewstep.grid import grid
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.registry import SOLVERS
from fewstep.rng import Rng
from fewstep.solvers import engine, sample, solver_named
from fewstep.solvers.engine import Decision, Engine
from fewstep.solvers.weights import FORMS, VARIABLES, Level, convert, gauss, integrate

NAMES = [entry.name for entry in SOLVERS]
FLOWS = [name for name in NAMES if not solver_named(name).stochastic]
NOISY = [name for name in NAMES if solver_named(name).stochastic and name != "consistency"]
every_flow = pytest.mark.parametrize("name", FLOWS)
every_name = pytest.mark.parametrize("name", NAMES)
VE = Exploding(sigma_min=0.01, sigma_max=1e4)


def level(rho):
    return Level(rho, 1.0, rho, -math.log(rho))


def even(path, high, low, steps):
    """Times even in log-SNR."""
    lam = path.lam(torch.tensor([high, low], dtype=torch.float64))
    part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return path.time(lam[0] + part * (lam[1] - lam[0])).tolist()


def slope(solver, steps=112):
    """Measured order between ``steps`` and twice as many, on a Gaussian, from far above its spread.

    Up there a guess hardly changes, so that the low-order first steps of a multistep rule cost nothing.
    """
    law = gaussian(std=(0.5, 1.0), path=VE)
    x, errors = draw(law, 8, 1e3), []
    for count in (steps, 2 * steps):
        times = even(VE, 1e3, 0.3, count)
        ends = law.flow_map(x, times[0], times[-1])
        errors.append((sample(law, x, times, solver) - ends).square().mean().sqrt().item())
    return math.log2(errors[0] / errors[1])


@every_flow
def test_every_solver_has_the_order_that_it_claims(name):
    claimed = 2 if name == "ipndm" else solver_named(name).order  # 4 where sigma is even: see below
    assert slope(solver_named(name)) > claimed - 0.2


def test_a_tilted_polynomial_is_caught_by_the_order_test(monkeypatch):
    """Broken twin of every multistep solver: part of the oldest weight on the newest guess, the sum as before."""
    whole = engine.integrate

    def tilted(*args, **options):
        made = whole(*args, **options)
        if len(made.values) < 2:
            return made
        first, *middle, last = made.values
        return made._replace(values=(first + 0.05 * last, *middle, 0.95 * last))

    for name in FLOWS:
        solver = solver_named(name)
        if isinstance(solver, Engine) and name not in ("ipndm", "dpm2s"):
            # compiled rules are remembered by path and grid: another span asks for new ones
            with monkeypatch.context() as patch:
                patch.setattr(engine, "integrate", tilted)
                engine.compiled.cache_clear()
                broken = slope(solver, 56)
            engine.compiled.cache_clear()
            assert broken < solver.order - 0.2, name


@pytest.mark.parametrize("name", ["midpoint", "rk4", "deis_rk"])
def test_a_wrong_tableau_is_caught_by_the_order_test(name):
    kind = type(solver_named(name))
    *rows, weights = kind.rule

    class Broken(kind):
        rule = (*rows, (weights[0] + 0.02, *weights[1:-1], weights[-1] - 0.02))

    assert slope(Broken(), 56) < kind.order - 0.2


def test_half_a_second_difference_is_not_third_order():
    """The 3M formula in circulation has half of the term it needs."""

    class Halved(Engine):
        name, order = "halved", 3

        def decide(self, path, stages):
            made = [Decision(order=1), Decision(order=2)]
            for i in range(2, len(stages)):
                t, before, first = stages[i].lam_t, stages[i - 1].lam_t, stages[i - 2].lam_t
                h = stages[i].lam_s - t
                r0, r1 = (t - before) / h, (before - first) / h
                size, d1, d2 = -math.expm1(-h), math.expm1(-h) / h + 1, (math.expm1(-h) + h) / h**2 - 0.5
                p = torch.tensor([[1.0, -1, 0], [0, 1, -1]], dtype=torch.float64) / torch.tensor([[r0], [r1]])
                first_slope, second = p[0] + r0 / (r0 + r1) * (p[0] - p[1]), (p[0] - p[1]) / (r0 + r1)
                w = d1 * first_slope - self.share * d2 * second
                w[0] += size
                made.append(Decision(order=3, shares=tuple((w / size).tolist())))
            return tuple(made)

    Halved.share = 1.0
    assert slope(Halved()) < 2.3
    Halved.share = 2.0
    times, law = even(VE, 50.0, 0.3, 12), mixture(VE)
    x = draw(law, 4, 50.0)
    assert torch.allclose(sample(law, x, times, Halved()), sample(law, x, times, solver_named("dpm3m")), atol=1e-10)


# -- weights ------------------------------------------------------------------------------------


def test_gauss_is_exact_to_twice_its_nodes():
    for power in range(24):
        found = sum(w * x**power for x, w in gauss(12))
        assert found == pytest.approx(0.0 if power % 2 else 2 / (power + 1), abs=1e-13)


def test_even_steps_give_the_weights_of_adams_and_bashforth():
    nodes = tuple(level(rho) for rho in (4.0, 5.0, 6.0, 7.0))
    for count, row in ((2, (3, -1)), (3, (23, -16, 5)), (4, (55, -59, 37, -9))):
        made = integrate(VE, "noise", "rho", nodes[0], level(3.0), nodes[:count])
        whole = sum(row)
        assert made.values == pytest.approx([-v / whole for v in row], abs=1e-13)


@pytest.mark.parametrize("h", [1e-3, 0.1, 2.0])
def test_the_data_form_integrates_powers_of_log_snr_as_the_recurrence_says(h):
    """``int_0^h e^u u^j du``: I_0 = e^h - 1, I_j = h^j e^h - j I_(j-1)."""
    t, s, back = (Level(0.0, 1.0, math.exp(-lam), lam) for lam in (0.0, h, -h))
    made = integrate(VE, "data", "lam", t, s, (t, back))
    first = h * math.exp(h) - math.expm1(h)
    slope = s.sigma * first / h  # weight of value(t) - value(back), its slope being that over h
    assert made.values[1] == pytest.approx(-slope, rel=1e-8)
    assert sum(made.values) == pytest.approx(s.sigma * math.expm1(h), rel=1e-12)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("form", FORMS)
def test_a_rule_is_exact_for_its_own_polynomials(form, variable):
    """A value that is a parabola in the variable: the step equals a very fine sum."""
    path = VariancePreserving()
    levels = []
    for t in (0.8, 0.7, 0.5, 0.3):
        coefs = path.coefs(t)
        levels.append(Level(t, float(coefs.alpha), float(coefs.sigma), float(path.lam(t))))
    fine = path.time(torch.linspace(levels[2].lam, levels[3].lam, 20001, dtype=torch.float64))
    coefs, lam = path.coefs(fine), path.lam(fine)
    clock = {"data": coefs.alpha / coefs.sigma, "noise": coefs.sigma / coefs.alpha}.get(form, path.straight(fine))
    scale = {"data": coefs.sigma, "noise": coefs.alpha}.get(form, coefs.alpha + coefs.sigma)[-1]
    u = {"lam": lam, "rho": torch.exp(-lam), "tau": path.straight(fine), "time": fine}[variable]
    made = integrate(path, form, variable, levels[2], levels[3], tuple(reversed(levels[:3])))
    for power in range(3):
        value = u**power
        exact = float(scale * ((value[1:] + value[:-1]) / 2 * clock.diff()).sum())
        lams = torch.tensor([at.lam for at in reversed(levels[:3])], dtype=torch.float64)
        places = {"lam": lams, "rho": torch.exp(-lams), "tau": torch.sigmoid(-lams), "time": path.time(lams)}[variable]
        assert sum(w * p**power for w, p in zip(made.values, places.tolist(), strict=True)) == pytest.approx(
            exact, rel=1e-6, abs=1e-7
        )


@pytest.mark.parametrize("form", FORMS)
def test_with_one_guess_every_form_is_ddim(form):
    path = VariancePreserving()
    law, times = mixture(path), grid(path, 5, "uniform")

    class One(Engine):
        name, order = "one", 1

        def decide(self, path, stages):
            return tuple(Decision(form, "lam") for _ in stages)

    x = draw(law, 4, 1.0)
    assert torch.allclose(sample(law, x, times, One()), sample(law, x, times, solver_named("euler")), atol=1e-11)


def test_ipndm_is_adams_and_bashforth_where_sigma_is_even():
    law = mixture(VE)
    x, times = draw(law, 4, 9.0), torch.linspace(9.0, 1.0, 9).tolist()
    one, other = (sample(law, x, times, solver_named(name)) for name in ("ipndm", "deis_rho"))
    assert torch.allclose(one, other, atol=1e-11)


def test_values_asked_in_another_form_are_converted():
    path = VariancePreserving()
    law = mixture(path)
    x = draw(law, 3, 0.6)
    coefs = path.coefs(0.6)
    at = Level(0.6, float(coefs.alpha), float(coefs.sigma), float(path.lam(0.6)))
    for given in ("x0", "eps", "flow"):
        for want in ("x0", "eps", "flow"):
            a, b = convert(at, given, want)
            assert torch.allclose(a * x + b * law(x, 0.6, want=given), law(x, 0.6, want=want), atol=1e-10)


def test_mixed_forms_in_one_plan_keep_the_order():
    class Mixed(Engine):
        name, order = "mixed", 3

        def decide(self, path, stages):
            forms = ("data", "noise", "flow")
            return tuple(Decision(forms[i % 3], "lam", 3, corrector="exact") for i in range(len(stages)))

    assert slope(Mixed(), 56) > 2.8


def test_dpm2s_is_algorithm_1_of_its_paper():
    path = VariancePreserving()
    law, times = mixture(path), even(path, 0.9, 0.1, 4)
    ours = x = draw(law, 4, times[0])
    ours = sample(law, ours, times, solver_named("dpm2s"))
    for t, s in zip(times[:-1], times[1:], strict=True):
        lam_t, lam_s = path.lam(t), path.lam(s)
        h, mid = lam_s - lam_t, float(path.time((lam_t + lam_s) / 2))
        a, b, c = (path.coefs(v) for v in (t, mid, s))
        u = b.sigma / a.sigma * x - b.alpha * torch.expm1(-h / 2) * law(x, t)
        x = c.sigma / a.sigma * x - c.alpha * torch.expm1(-h) * law(u, mid)
    assert torch.allclose(ours, x, atol=1e-10)


# -- the stochastic solvers -----------------------------------------------------------------------


class Basis(Rng):
    """Noise that is one unit at a time: row k + 2 of the batch gets the k-th draw, the others none."""

    def __init__(self):
        super().__init__(0)
        self.count = 0

    def normal(self, shape, dtype=None):
        draw = torch.zeros(shape, dtype=dtype)
        draw[2 + self.count] = 1.0
        self.count += 1
        return draw


def law_error(name, steps, low=0.3):
    """How far the law at the end is from the exact one, with no sampling: on a Gaussian all is linear in the noises."""
    law = gaussian(mean=(2.0,), std=(1.0,), path=VE)
    times, source = even(VE, 200.0, low, steps), Basis()
    x = torch.zeros(3 * steps + 8, 1, dtype=torch.float64)
    x[1] = 1.0
    ends = sample(law, x, times, solver_named(name), rng=source)
    mean = ends[0] + 2.0 * (ends[1] - ends[0])
    parts = ends[1:] - ends[0]
    parts[0] *= math.sqrt(1 + times[0] ** 2)
    std = parts.square().sum(0).sqrt()
    return max(abs(mean.item() - 2.0), abs(std.item() / math.sqrt(1 + low**2) - 1))


@pytest.mark.parametrize("name", NOISY)
def test_the_law_of_a_stochastic_solver_converges_at_its_order(name):
    coarse, fine = law_error(name, 60), law_error(name, 120)
    assert math.log2(coarse / fine) > solver_named(name).order - 0.2
    assert fine < 0.05


def test_noise_of_the_wrong_size_is_caught_by_the_law(monkeypatch):
    """Broken twin: sigma sqrt(e^(2h) - 1) in place of sigma sqrt(1 - e^(-2h))."""
    whole = engine.integrate

    def loud(path, form, variable, start, end, nodes, **options):
        return whole(path, form, variable, start, end, nodes, **options)._replace(
            noise=end.sigma * math.sqrt(math.expm1(2 * (end.lam - start.lam)))
        )

    with monkeypatch.context() as patch:
        patch.setattr(engine, "integrate", loud)
        engine.compiled.cache_clear()
        found = law_error("dpm2m_sde", 60)
    engine.compiled.cache_clear()
    assert found > 2 * law_error("dpm2m_sde", 60)


def test_ancestral_is_the_posterior_of_ddpm():
    path, steps = VariancePreserving(), 4
    law, times = mixture(path), grid(path, steps, "uniform").tolist()
    ours = x = draw(law, 4, 1.0)
    ours = sample(law, ours, times, solver_named("ancestral"), rng=seeded(1))
    rng = seeded(1)
    for t, s in zip(times[:-1], times[1:], strict=True):
        a, b = path.coefs(t), path.coefs(s)
        step = (a.alpha / b.alpha) ** 2  # alpha of the forward step from s to t, squared
        guess = law(x, t)
        x = b.alpha * (1 - step) / a.sigma**2 * guess + step.sqrt() * b.sigma**2 / a.sigma**2 * x
        if s > 0:
            extra = (1 - step) * b.sigma**2 / a.sigma**2
            x = x + extra.sqrt() * torch.randn(x.shape, generator=rng, dtype=x.dtype)
    assert torch.allclose(ours, x, atol=1e-10)


def test_a_stochastic_solver_without_a_source_of_noise_says_so():
    for name in (*NOISY, "consistency"):
        with pytest.raises(ValueError, match="draws noise: pass rng"):
            sample(gaussian(path=Exploding()), torch.zeros(1, 2), grid(Exploding(), 6), solver_named(name))


def test_consistency_sampling_of_a_finished_point_is_that_point():
    law = gaussian(mean=(2.0, -1.0), std=(0.0, 0.0))
    x = torch.randn(3, 2, generator=seeded(0), dtype=torch.float64)
    ends = sample(law, x, (1.0, 0.6, 0.2, 0.0), solver_named("consistency"), rng=seeded(1))
    assert torch.allclose(ends, law.mean.expand(3, 2))


# -- every solver ---------------------------------------------------------------------------------


@every_name
def test_every_solver_makes_exactly_the_calls_that_it_states(name):
    for nfe in (1, 2, 3, 4, 7, 12):
        steps = solver_named(name).steps_for(nfe)
        if steps is not None:
            counted = Counted(gaussian())
            x = draw(counted.inner, 2, 1.0)
            sample(counted, x, grid(Straight(), steps, "uniform"), solver_named(name), rng=seeded(0))
            assert counted.calls == nfe


@every_name
def test_a_small_part_of_the_matrix_is_finite(name):
    """Paths x grids x calls x precision; ``benchmarks/solvers.py --matrix`` runs the whole of it."""
    for label in ("straight", "cosine", "tabulated", "exploding"):
        law = mixture(PATHS[label])
        for kind, nfe, dtype in (
            ("karras", 2, torch.float32),
            ("logsnr", 9, torch.bfloat16),
            ("uniform", 5, torch.float32),
        ):
            steps = solver_named(name).steps_for(nfe)
            if steps is None:
                continue
            times = grid(law.path, steps, kind)
            x = draw(law, 2, times[0].item()).to(dtype)
            ends = sample(law, x, times, solver_named(name), rng=seeded(0))
            assert ends.dtype == dtype
            assert ends.isfinite().all(), (label, kind, nfe, dtype)


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Free:
    """A network that costs nothing, with its path."""

    path = Exploding()

    def __call__(self, x, t, cond=None, want="x0"):
        return x


@pytest.mark.parametrize("name", [n for n in FLOWS if isinstance(solver_named(n), Engine) and n != "dpm2s"])
def test_a_multistep_step_costs_at_most_twelve_operators(name):
    times, x = grid(Free.path, 20), torch.ones(4)
    solver = solver_named(name)
    with Operators() as seen:
        state, after = solver.init(Free.path, tuple(times.tolist())), seen.count
        for i in range(20):
            x, state = solver.step(Free(), x, i, state, None, None)
        assert (seen.count - after) / 20 <= 12


def test_a_solver_forgets_what_it_will_not_read():
    solver, x = solver_named("unipc3"), torch.ones(2)
    state = solver.init(Free.path, tuple(grid(Free.path, 20).tolist()))
    for i in range(20):
        x, state = solver.step(Free(), x, i, state, None, None)
        assert len(state.values) <= 4
        assert len(state.bases) <= 2
        assert not state.samples
