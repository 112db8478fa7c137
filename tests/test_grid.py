import math

import pytest
import torch
from laws import PATHS

from fewstep.grid import GRIDS, descending, grid
from fewstep.path import Exploding, Straight, VariancePreserving

STEPS = (1, 2, 3, 5, 18, 100)
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@pytest.mark.parametrize("kind", GRIDS)
@every_path
def test_every_grid_falls_from_noise_to_clean_data_and_meets_both_exactly(path, kind):
    for steps in STEPS:
        times = grid(path, steps, kind)
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        assert (times.diff() < 0).all()
        assert times[0].item() == path.t_max
        assert times[-1].item() == path.t_min


def test_the_power_grid_is_equation_5_of_edm():
    times = grid(Exploding(sigma_min=0.002, sigma_max=80.0), 18, "karras", rho=7)
    for i in range(18):
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        assert times[i].item() == pytest.approx((high + i / 17 * (low - high)) ** 7, rel=1e-11)


def test_the_power_grid_runs_the_same_noise_ratios_on_a_variance_preserving_path():
    path = VariancePreserving()
    ratio = torch.exp(-path.lam(grid(path, 8, "karras")[:-1])) ** (1 / 7)
    assert ratio.diff().std() < 1e-9


def test_another_rho_gives_another_grid():
    path = Exploding()
    assert grid(path, 5, rho=3)[2] > grid(path, 5, rho=7)[2]


def test_the_log_snr_grid_is_even_in_log_snr():
    for path in (Exploding(), VariancePreserving()):
        lam = path.lam(grid(path, 9, "logsnr")[:-1])
        assert lam.diff().std() < 1e-9


def test_trailing_is_the_table_of_lin_and_others():
    index = grid(VariancePreserving(), 10, "trailing") * 1000 - 1
    assert index[:-1].tolist() == pytest.approx([999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    uneven = grid(VariancePreserving(), 7, "trailing") * 1000
    assert uneven.tolist() == pytest.approx([round(1000 * k / 7) for k in range(7, -1, -1)])


def test_the_plain_grids_are_what_they_are_called():
    path = Straight()
    assert grid(path, 4, "uniform").tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert grid(path, 4, "quadratic").sqrt().tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid_may_start_lower(kind):
    times = grid(Exploding(sigma_min=0.02, sigma_max=20.0), 6, kind, high=2.5)
    assert times[0].item() == 2.5
    assert (times.diff() < 0).all()


def test_a_grid_may_visit_a_lower_level_before_the_end():
    assert grid(Exploding(), 6, "karras", low=0.1)[-2].item() == pytest.approx(0.1, rel=1e-12)


def test_one_step_is_from_noise_to_clean():
    for kind in GRIDS:
        assert grid(Straight(), 1, kind).tolist() == [1.0, 0.0]


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        grid(Straight(), 0)


def test_an_unknown_grid_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="unknown grid 'karas': one of uniform, karras"):
        grid(Straight(), 3, "karas")


def test_a_rising_list_is_refused_where_it_rises():
    with pytest.raises(ValueError, match=r"grid must descend, got 0.1 then 0.4"):
        descending([0.9, 0.1, 0.4])
    with pytest.raises(ValueError, match=r"got 0.5 then 0.5"):
        descending([0.5, 0.5])


@pytest.mark.parametrize("times", [[1.0], [[1.0, 0.0]], []])
def test_a_grid_is_a_list_of_times(times):
    with pytest.raises(ValueError, match="at least 2 times"):
        descending(times)


def test_a_grid_with_a_time_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        descending([1.0, math.nan, 0.0])


@every_path
def test_a_shift_holds_the_ends_and_moves_the_rest_to_higher_noise(path):
    for kind in GRIDS:
        plain, moved = grid(path, 5, kind), grid(path, 5, kind, shift=3.0)
        assert moved[0] == plain[0] and moved[-1] == plain[-1]
        assert (moved[1:-1] > plain[1:-1]).all()


def test_a_shift_acts_once():
    """diffusers' flow scheduler gives 1, .90, .75, .50, .009, 0 for five steps: there it acts twice at the low end."""
    expected = [3 * t / (1 + 2 * t) for t in (1, 0.8, 0.6, 0.4, 0.2, 0)]
    assert grid(Straight(), 5, "uniform", shift=3.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(ValueError, match="a shift is a positive number"):
        grid(Straight(), 3, shift=shift)
