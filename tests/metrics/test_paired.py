import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fewstep.errors import Refused
from fewstep.metrics.paired import looks, paired


def noisy(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_equal_pictures_are_at_no_distance_and_fully_alike():
    found = paired(noisy(3, 3, 16, 16), noisy(3, 3, 16, 16))
    assert found["rmse"].tolist() == [0] * 3
    assert found["psnr"].tolist() == [100] * 3
    assert found["ssim"].tolist() == [1] * 3


def test_decibels_are_those_of_the_root_mean_square():
    a, b = noisy(20, 1, 9, 7), noisy(20, 1, 9, 7, seed=1)
    found = paired(a, b)
    error = ((a.double() - b.double()) / 255).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(found["rmse"], error)
    assert torch.allclose(found["psnr"], -20 * error.log10(), atol=1e-4)


def test_likeness_is_the_papers_formula():
    a, b = noisy(1, 1, 24, 24), noisy(1, 1, 24, 24, seed=1)
    b = (0.7 * a.double() + 0.3 * b.double()).round().to(torch.uint8)
    x, y = (v[0, 0].double().numpy() for v in (a, b))

    def mean(v):
        return gaussian_filter(v, 1.5, truncate=3.5, mode="mirror")

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    known = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert paired(a, b)["ssim"].item() == pytest.approx(np.mean(known), abs=2e-3)


@pytest.mark.parametrize("side", [3, 4, 8, 11])
def test_small_pictures_have_a_narrower_window_and_a_finite_likeness(side):
    found = paired(noisy(2, 1, side, side), noisy(2, 1, side, side, seed=1))
    assert found["ssim"].abs().max() < 0.9


def test_two_pixels_have_no_likeness_and_vectors_their_own_units():
    assert set(paired(noisy(2, 3, 2, 2), noisy(2, 3, 2, 2))) == {"rmse", "psnr"}
    found = paired(torch.zeros(4, 2), torch.tensor([3.0, 4.0]).expand(4, 2))
    assert set(found) == {"rmse"}
    assert found["rmse"].tolist() == pytest.approx([math.sqrt(12.5)] * 4)


def test_pairs_of_two_shapes_are_refused():
    with pytest.raises(Refused, match="one shape"):
        paired(torch.zeros(2, 3), torch.zeros(3, 3))


def test_looks_of_pictures_whose_answer_is_known():
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 255
    assert looks(red)["saturation"].item() == 1
    assert looks(noisy(1, 1, 4, 4).expand(1, 3, 4, 4))["saturation"].item() == 0
    assert looks(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8))["saturation"].item() == 1
    checks = (torch.arange(8)[:, None] + torch.arange(8)[None]) % 2 * 255
    checks = checks.to(torch.uint8)[None, None]
    blocks = checks[..., :4, :4].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert looks(checks)["high_frequency"].item() == 0.25  # of values 0 and 1, half each
    assert looks(blocks)["high_frequency"].item() == 0
