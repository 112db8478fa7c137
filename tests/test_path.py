import math

import numpy as np
import pytest
import torch
from laws import BETAS, PATHS, TABLE, full_gaussian, inner_times, seeded

from fewstep.path import (
    PREDICTIONS,
    Exploding,
    NoiseSampler,
    Straight,
    Tabulated,
    VariancePreserving,
    column,
    karras_time,
    path_from,
)

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
unit_variance = pytest.mark.parametrize(
    "path", [p for p in PATHS.values() if not isinstance(p, Straight | Exploding)], ids=lambda p: p.kind
)


def close(a, b, bar=1e-9):
    return ((a - b).abs() <= bar * (1 + b.abs())).all().item()


def pair_of(name, x0, eps, coefs):
    """Every prediction by its definition, written out once more."""
    a, s, da, ds = (column(c, x0) for c in coefs)
    return {
        "x0": x0,
        "eps": eps,
        "v": a * eps - s * x0,
        "velocity": da * x0 + ds * eps,
        "flow": eps - x0,
        "score": -eps / s,
    }[name]


@every_path
def test_the_rates_are_the_derivatives_of_the_coefficients(path):
    t = inner_times(path)
    for value, rate in ((0, 2), (1, 3)):
        _, slope = torch.func.jvp(lambda u, k=value: path.coefs(u)[k], (t,), (torch.ones_like(t),))
        assert close(path.coefs(t)[rate], slope, 1e-10)


@every_path
def test_time_is_the_inverse_of_lam(path):
    t = inner_times(path, 20)
    assert close(path.time(path.lam(t)), t, 1e-8)


@every_path
def test_lam_falls_as_time_rises_and_is_half_the_log_snr(path):
    t = inner_times(path, 20)
    assert (path.lam(t).diff() < 0).all()
    assert close(path.snr(t).log() / 2, path.lam(t))


@every_path
def test_time_of_any_level_stays_inside_the_path(path):
    t = path.time(torch.tensor([-200.0, 0.0, 200.0]))
    assert path.t_min <= t.min() <= t.max() <= path.t_max


@every_path
def test_every_prediction_converts_to_every_other(path):
    x0, eps = torch.randn(2, 7, 3, dtype=torch.float64, generator=seeded(0))
    t = inner_times(path)
    x_t, coefs = path.corrupt(x0, t, eps), path.coefs(t)
    for given in PREDICTIONS:
        for want in PREDICTIONS:
            read = path.convert(pair_of(given, x0, eps, coefs), x_t, t, given, want)
            assert close(read, pair_of(want, x0, eps, coefs), 1e-7), (given, want)


@every_path
def test_conversion_there_and_back_changes_nothing(path):
    value, x_t = torch.randn(2, 7, 3, dtype=torch.float64, generator=seeded(1))
    t = inner_times(path)
    for given in PREDICTIONS:
        for want in PREDICTIONS:
            there = path.convert(value, x_t, t, given, want)
            assert close(path.convert(there, x_t, t, want, given), value, 1e-7), (given, want)


def test_a_velocity_with_its_sign_turned_is_caught():
    """Broken twin of the conversion table: v = sigma x0 - alpha eps."""
    path, t = VariancePreserving(), torch.tensor([0.3], dtype=torch.float64)
    x0, eps = torch.randn(2, 1, 3, dtype=torch.float64, generator=seeded(0))
    wrong = -pair_of("v", x0, eps, path.coefs(t))
    assert not close(path.convert(wrong, path.corrupt(x0, t, eps), t, "v", "x0"), x0, 1e-2)


@every_path
def test_velocity_is_how_the_noised_sample_moves(path):
    x0, eps = torch.randn(2, 7, 3, dtype=torch.float64, generator=seeded(2))
    t = inner_times(path)
    x_t, moves = torch.func.jvp(lambda u: path.corrupt(x0, u, eps), (t,), (torch.ones_like(t),))
    assert close(path.convert(x0, x_t, t, "x0", "velocity"), moves, 1e-8)


@every_path
def test_the_exact_flow_moves_by_the_slope_in_the_path_s_own_frame(path):
    law = full_gaussian(path)
    x = torch.randn(5, 3, dtype=torch.float64, generator=seeded(0))
    start, t = inner_times(path)[-1].item(), inner_times(path)[3:4]

    def seen(u):
        scale, tau = path.frame(u)
        return law.flow_map(x, start, u) / scale, tau

    (_, _), (rate, tau_rate) = torch.func.jvp(seen, (t,), (torch.ones_like(t),))
    here = law.flow_map(x, start, t)
    assert close(rate / tau_rate, law(here, t.expand(5), want=path.slope), 1e-8)


@every_path
def test_a_step_along_the_true_slope_of_one_point_lands_on_the_path(path):
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64, generator=seeded(0))
    s, t = inner_times(path)[[1, 4]]
    x_t, slope = path.corrupt(x0, t, eps), pair_of(path.slope, x0, eps, path.coefs(t))
    for later, now in ((s.item(), t.item()), (s, t), (s.expand(3), t.expand(3))):
        assert close(path.move(x_t, slope, now, later), path.corrupt(x0, s, eps), 1e-10)


@every_path
def test_straight_time_has_the_same_noise_ratio(path):
    t = inner_times(path)
    assert close(Straight().lam(path.straight(t)), path.lam(t), 1e-8)


@every_path
def test_noised_samples_have_the_stated_mean_and_spread(path):
    count, t = 100_000, inner_times(path)[4].item()
    eps = torch.randn(count, 1, dtype=torch.float64, generator=seeded(0))
    x_t = path.corrupt(torch.full_like(eps, 1.7), t, eps)
    alpha, sigma, _, _ = path.coefs(t)
    assert abs(x_t.mean() - 1.7 * alpha) < 4 * sigma / math.sqrt(count)
    assert abs(x_t.std() / sigma - 1) < 4 / math.sqrt(2 * count)


@every_path
def test_a_time_for_each_row_is_the_same_as_one_row_at_a_time(path):
    x0, eps = torch.randn(2, 7, 2, 3, dtype=torch.float64, generator=seeded(0))
    t = inner_times(path)
    whole = path.corrupt(x0, t, eps)
    rows = [path.corrupt(x0[i : i + 1], t[i].item(), eps[i : i + 1]) for i in range(7)]
    assert close(whole, torch.cat(rows), 1e-14)
    single = path.convert(x0, whole, t, "x0", "eps")
    each = [path.convert(x0[i : i + 1], whole[i : i + 1], t[i].item(), "x0", "eps") for i in range(7)]
    assert close(single, torch.cat(each), 1e-10)


@every_path
def test_a_description_makes_the_same_path(path):
    assert path_from(path.model_dump()) == path


@every_path
def test_clean_data_has_no_noise(path):
    alpha, sigma, _, _ = path.coefs(path.t_min)
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)


@unit_variance
def test_variance_is_preserved(path):
    coefs = path.coefs(torch.linspace(0, path.t_max, 101, dtype=torch.float64))
    assert close(coefs.alpha**2 + coefs.sigma**2, torch.ones(101, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_alpha_is_the_exponential_of_half_the_integrated_rate(schedule):
    path = VariancePreserving(schedule=schedule)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(20))
    for end in (0.1, 0.5, 1.0):
        u = (nodes + 1) / 2 * end
        beta = 0.1 + 19.9 * u if schedule == "linear" else (0.85**0.5 + (12**0.5 - 0.85**0.5) * u) ** 2
        integral = (weights * beta).sum() * end / 2
        assert path.coefs(end).alpha.item() == pytest.approx(math.exp(-integral / 2), rel=1e-12)


def test_the_cosine_schedule_is_nichol_s():
    t = torch.linspace(0, 0.99, 12, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    assert close(PATHS["cosine"].coefs(t).alpha ** 2, f / f[0], 1e-13)


@pytest.mark.parametrize(("schedule", "rate"), [("linear", 0.1), ("scaled_linear", 0.85), ("cosine", None)])
def test_noise_is_exact_at_the_smallest_times(schedule, rate):
    """1 - alpha^2 loses every digit there; the path must not: sigma^2 is the first rate times t."""
    rate = math.pi / 1.008 * math.tan(math.pi / 2 * 0.008 / 1.008) if rate is None else rate
    sigma = VariancePreserving(schedule=schedule).coefs(1e-14).sigma.item()
    assert sigma == pytest.approx(math.sqrt(rate * 1e-14), rel=1e-9)
    assert math.sqrt(1 - (1 - rate * 1e-14 / 2) ** 2) != pytest.approx(math.sqrt(rate * 1e-14), rel=1e-9)


def test_a_table_is_met_at_its_entries():
    path = PATHS["tabulated"]
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    assert close(path.coefs(t).alpha ** 2, torch.tensor(TABLE, dtype=torch.float64), 1e-11)


def test_the_table_of_stable_diffusion_is_the_scaled_linear_path():
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    table, smooth = (PATHS[name].coefs(t).alpha for name in ("tabulated", "scaled_linear"))
    assert close(table, smooth, 5e-3)
    assert not close(table, PATHS["linear"].coefs(t).alpha, 5e-2)


@pytest.mark.parametrize("name", ["linear_zero_snr", "scaled_linear_zero_snr"])
def test_zero_snr_leaves_no_signal_at_all(name):
    path = PATHS[name]
    alpha, sigma, _, _ = path.coefs(1.0)
    assert (alpha.item(), sigma.item()) == (0.0, 1.0)
    x = torch.randn(3, 2, generator=seeded(0))
    assert torch.equal(path.corrupt(x, 1.0, torch.ones_like(x)), torch.ones_like(x))


def test_zero_snr_rescales_a_table_as_lin_does():
    path = Tabulated(alphas_cumprod=TABLE, zero_snr=True)
    root = torch.tensor(TABLE, dtype=torch.float64).sqrt()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    rescaled = (root - root[-1]) / (1 - root[-1])  # Algorithm 1, with the clean end at 1
    assert close(path.coefs(t).alpha, rescaled, 1e-10)


@pytest.mark.parametrize("name", ["straight", "linear_zero_snr", "scaled_linear_zero_snr"])
def test_pure_noise_says_nothing_about_the_picture(name):
    path, x = PATHS[name], torch.ones(1, 2)
    with pytest.raises(ValueError, match="says nothing about"):
        path.convert(x, x, path.t_max, "eps", "x0")


@pytest.mark.parametrize("name", ["linear_zero_snr", "scaled_linear_zero_snr", "cosine"])
def test_v_still_speaks_where_no_signal_is_left(name):
    path = PATHS[name]
    x0, eps = torch.randn(2, 4, 2, dtype=torch.float64, generator=seeded(0))
    read = path.convert(-x0, path.corrupt(x0, 1.0, eps), 1.0, "v", "x0")
    assert close(read, x0, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_is_no_worse_than_the_sample_s_own_rounding(dtype):
    path, t = Exploding(), 80.0
    x0, eps = torch.randn(2, 64, dtype=torch.float64, generator=seeded(0))
    x_t = path.corrupt(x0, t, eps).to(dtype)
    for time in (t, torch.full((64,), t)):
        read = path.convert(x0[:, None].to(dtype), x_t[:, None], time, "x0", "eps")
        exact = (x_t.double() - x0.to(dtype).double()) / t
        assert read.dtype == dtype
        assert (read[:, 0].double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_times_that_do_not_fit_the_batch_are_refused():
    with pytest.raises(ValueError, match="time has 2 rows, the sample has 3"):
        Straight().corrupt(torch.zeros(3, 1), torch.tensor([0.1, 0.2]), torch.zeros(3, 1))


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="unknown prediction 'noise': one of x0, eps"):
        Straight().convert(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, "noise", "x0")


def test_stable_diffusion_s_rates_make_the_table():
    assert TABLE[-1] == pytest.approx(0.00466, abs=1e-5)  # Lin et al. 2023, Table 1: sqrt is 0.068265
    assert math.sqrt(TABLE[-1]) == pytest.approx(0.068265, abs=1e-6)
    assert len(BETAS) == 1000


# -- noise levels ------------------------------------------------------------------------------

KINDS = ["uniform", "log_normal", "logit_normal", "karras"]
MANY = torch.empty(40_000, 1, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@every_path
def test_drawn_levels_stay_inside_the_path(path, kind):
    t = NoiseSampler(kind=kind, std=3.0).on(path)(MANY[:4000], seeded(0))
    assert t.shape == (4000,)
    assert path.t_min <= t.min() <= t.max() <= path.t_max


@pytest.mark.parametrize("name", ["exploding", "straight", "linear"])
def test_log_normal_levels_have_the_stated_quantiles(name):
    path = PATHS[name]
    t = NoiseSampler(kind="log_normal", mean=-0.6, std=1.2).on(path)(MANY, seeded(0))
    level = -path.lam(t)
    for quantile, z in ((0.1587, -1), (0.5, 0), (0.8413, 1)):
        assert level.quantile(quantile).item() == pytest.approx(-0.6 + 1.2 * z, abs=0.04)


def test_logit_normal_levels_have_the_stated_quantiles():
    t = NoiseSampler(kind="logit_normal", mean=0.5, std=1.0).on(Straight())(MANY, seeded(0))
    for quantile, z in ((0.1587, -1), (0.5, 0), (0.8413, 1)):
        assert torch.logit(t.quantile(quantile)).item() == pytest.approx(0.5 + z, abs=0.04)


def test_uniform_levels_fill_the_stated_part_evenly():
    t = NoiseSampler(kind="uniform", low=0.2, high=0.6).on(Straight())(MANY, seeded(0))
    assert 0.2 <= t.min() <= t.max() <= 0.6
    assert t.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist() == pytest.approx([0.3, 0.5], abs=0.005)


def test_karras_levels_are_uniform_in_the_index_of_the_power_grid():
    path = Exploding(sigma_min=0.002, sigma_max=80.0)
    t = NoiseSampler(kind="karras").on(path)(MANY, seeded(0))
    index = (t ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert index.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist() == pytest.approx(
        [0.25, 0.5, 0.75], abs=0.01
    )


def test_a_part_of_the_power_grid_can_be_drawn_alone():
    path = Exploding(sigma_min=0.002, sigma_max=80.0)
    t = NoiseSampler(kind="karras", low=0.5, high=1.0).on(path)(MANY[:2000], seeded(0))
    assert t.min() >= karras_time(path, torch.tensor(0.5)) - 1e-9


def test_levels_of_half_precision_samples_are_drawn_in_single():
    for kind in KINDS:
        t = NoiseSampler(kind=kind).on(Exploding())(torch.empty(8, 1, dtype=torch.bfloat16), seeded(0))
        assert t.dtype == torch.float32
