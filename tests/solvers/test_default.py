"""The recommended plan: calls, finiteness, error by calls, and the figure that it was chosen for."""

import math

import pytest
import torch
from laws import PATHS, draw, mixture, seeded

from fewstep.denoiser import Counted, Guided
from fewstep.grid import grid
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.solvers import DPM2M, recommended, sample, solver_named, start_noise
from fewstep.solvers.default import placement
from fewstep.teachers import Mixture

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def ring(path):
    """Eight modes at radius 1, std 0.08, two classes in turn: the ring of ``benchmarks/solvers.py``."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture([1.0] * 8, centres, 0.08, labels=[k % 2 for k in range(8)], path=path)


def ends_of(model, x, cond=None):
    """The end of the flow, by third order on 160 levels even in log-SNR."""
    path = model.path
    lam = torch.linspace(max(float(path.lam(path.t_max)), -7.0), math.log(1e3), 160, dtype=torch.float64)
    times = path.time(lam)
    times[0] = path.t_max
    return sample(model, x, torch.cat([times, times.new_zeros(1)]), solver_named("unipc3"), cond=cond)


def away(ends, exact):
    return float((ends - exact).square().mean().sqrt())


@pytest.mark.parametrize("path", [Straight(), Exploding()], ids=["straight", "exploding"])
def test_error_on_the_ring_falls_with_the_calls_and_is_half_of_2m_s(path):
    """Half, at ten calls, of DPM-Solver++ 2M on its best grid of three."""
    law = ring(path)
    x = draw(law, 128, path.t_max)
    exact = ends_of(law, x)
    errors = [away(sample(law, x, recommended(path, nfe)), exact) for nfe in (1, 3, 5, 8, 10, 15, 20, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    others = [away(sample(law, x, grid(path, 10, kind), DPM2M()), exact) for kind in ("karras", "logsnr", "uniform")]
    assert errors[4] < min(others) / 2


def test_under_guidance_few_calls_throw_no_sample_far_out():
    """Guidance 5 on two classes: a corrected step or a high order below unit noise would (see ``recommended``)."""
    law = ring(Straight())
    x, cond = draw(law, 128, 1.0), torch.arange(128) % 2
    guided = Guided(law, 5.0, lambda cond: torch.full_like(cond, law.classes))
    exact = ends_of(guided, x, cond)
    reach = float(exact.norm(dim=1).max())
    for nfe in (4, 5, 6, 7, 8, 10, 12, 20, 30):
        ends = sample(guided, x, recommended(law.path, nfe), cond=cond)
        assert float(ends.norm(dim=1).max()) < 3 * reach, nfe
    assert away(ends, exact) < 0.05


@every_path
def test_it_is_finite_from_pure_noise_in_any_number_of_calls_and_precision(path):
    law = mixture(path)
    noise = torch.randn(4, 2, generator=seeded(0))
    for nfe, dtype in ((1, torch.float32), (2, torch.bfloat16), (7, torch.bfloat16), (13, torch.float32)):
        counted = Counted(law)
        ends = sample(counted, start_noise(path, path.t_max, noise).to(dtype), recommended(path, nfe))
        assert ends.isfinite().all() and ends.dtype == dtype
        assert counted.calls == nfe


@every_path
def test_its_levels_fall_from_the_path_s_noisiest_for_every_number_of_calls(path):
    for nfe in (*range(1, 30), 50, 100, 300):
        times = recommended(path, nfe).times(path)
        assert len(times) == nfe + 1
        assert times[0] == path.t_max and times[-1] == path.t_min
        assert all(s < t for t, s in zip(times[:-1], times[1:], strict=True))


def test_a_path_with_little_noise_is_served_too():
    for path in (Straight(end=0.05), Exploding(sigma_min=0.002, sigma_max=0.02)):
        for nfe in (1, 2, 3, 10):
            assert recommended(path, nfe).times(path)[0] == path.t_max


def test_levels_do_not_depend_on_a_top_that_is_far_above_the_knee():
    """Up there a guess is the data's mean: one call is enough, wherever it stands."""
    near, far = (placement(top, 12)[-6:] for top in (1e4, math.inf))
    assert near == pytest.approx(far, rel=1e-2)


def test_paths_with_equal_ratios_get_equal_plans():
    one, other = recommended(VariancePreserving(schedule="cosine", zero_snr=True), 9), recommended(Straight(), 9)
    assert one.steps == other.steps
    assert one.levels[1:] == pytest.approx(other.levels[1:])


def test_without_a_call_there_is_no_plan():
    with pytest.raises(ValueError, match="at least 1 call, got 0"):
        recommended(Straight(), 0)
