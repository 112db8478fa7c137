import math

import pytest
import torch
from laws import seeded

from fewstep.methods.bridge import BridgeOptions, fit_bridge, multi_marginal_bridge, polynomial, simulate


def sample(mean, covariance, count, seed):
    """A sample whose mean and covariance are exactly these."""
    z = torch.randn(count, len(mean), generator=seeded(seed), dtype=torch.float64)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.T)), z.T, upper=False).T
    return torch.tensor(mean, dtype=torch.float64) + z @ torch.linalg.cholesky(covariance).T


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)


def gaussian_bridge(first, second, entropy, u):
    """Mean and covariance at the share u of the way; entropy = sigma^2 T (Bunne et al. 2023, Theorem 3)."""
    (m, a), (n, b) = first, second
    half = root(a)
    inner = root(4 * half @ b @ half + entropy**2 * torch.eye(len(m), dtype=torch.float64))
    cross = (half @ inner @ torch.linalg.inv(half) - entropy * torch.eye(len(m), dtype=torch.float64)) / 2
    mean = (1 - u) * torch.tensor(m) + u * torch.tensor(n)
    middle = cross + cross.T + entropy * torch.eye(len(m), dtype=torch.float64)
    return mean.double(), (1 - u) ** 2 * a + u**2 * b + u * (1 - u) * middle


FIRST = ([0.0, 1.0], torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64))
SECOND = ([2.0, -1.0], torch.tensor([[0.4, -0.1], [-0.1, 1.2]], dtype=torch.float64))


def bridged(sigma, count=2000):
    options = BridgeOptions(sigma=sigma, rounds=16 if sigma < 1 else 8, steps=20)
    a, b = sample(*FIRST, count, 0), sample(*SECOND, count, 1)
    still = lambda x, t: torch.zeros_like(x)  # noqa: E731
    forward, backward = fit_bridge(a, b, (0.0, 1.0), still, polynomial(a, "affine"), options, seeded(2))
    grid = torch.linspace(0, 1, 21, dtype=torch.float64).tolist()
    there = simulate(a, forward, grid, sigma, seeded(3))
    back = simulate(b, backward, grid[::-1], sigma, seeded(4))
    return there, back


def off(x, mean, covariance):
    """How far mean (in standard deviations) and covariance are from these."""
    apart = (x.mean(0) - mean).norm() / covariance.trace().sqrt()
    return max(apart.item(), ((torch.cov(x.T) - covariance).norm() / covariance.norm()).item())


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_the_bridge_of_two_gaussians_is_the_closed_form(sigma):
    there, back = bridged(sigma)
    for k in (5, 10, 15):
        wanted = gaussian_bridge(FIRST, SECOND, sigma**2, k / 20)
        both = torch.cat([there[k], back[20 - k]])
        assert off(both, *wanted) < 0.01
    assert off(there[20], torch.tensor(SECOND[0]), SECOND[1]) < 0.01
    assert off(back[20], torch.tensor(FIRST[0]), FIRST[1]) < 0.01
    wrong = gaussian_bridge(FIRST, SECOND, (2 * sigma) ** 2, 0.5)
    assert off(there[10], *wrong) > 0.05  # the noise sets how far the bridge spreads


def test_a_backward_drift_of_the_other_sign_misses_the_snapshot():
    """The broken twin: the time convention flipped."""
    a, b = sample(*FIRST, 1000, 0), sample(*SECOND, 1000, 1)
    still = lambda x, t: torch.zeros_like(x)  # noqa: E731
    options = BridgeOptions(sigma=0.7, rounds=3)
    _, backward = fit_bridge(a, b, (0.0, 1.0), still, polynomial(a, "affine"), options, seeded(2))
    grid = torch.linspace(1, 0, 41, dtype=torch.float64).tolist()
    turned = simulate(b, lambda x, t: -backward(x, t), grid, 0.7, seeded(4))
    assert off(turned[-1], torch.tensor(FIRST[0]), FIRST[1]) > 0.5


RATE = torch.tensor([[-1.2, 0.8], [-0.8, -0.6]], dtype=torch.float64)
"""A spiral: drift RATE x + SHIFT."""
SHIFT = torch.tensor([0.5, 0.3], dtype=torch.float64)


def spiral(count, times, sigma, seed=0):
    """Independent samples of the population at each time, by plain draws."""
    rng, shots, gap = seeded(seed), [], 0.005
    for time in times:
        x = torch.tensor([2.0, -1.5]) + 0.55 * torch.randn(count, 2, generator=rng, dtype=torch.float64)
        for _ in range(round(time / gap)):
            noise = torch.randn(count, 2, generator=rng, dtype=torch.float64)
            x = x + gap * (x @ RATE.T + SHIFT) + sigma * math.sqrt(gap) * noise
        shots.append(x)
    return shots


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_snapshots_recover_the_drift_of_the_reference(seed):
    times, sigma = (0.0, 0.5, 1.0), 0.4
    options = BridgeOptions(sigma=sigma, steps=8, rounds=3, refinements=10, relax=1.8)
    found = multi_marginal_bridge(spiral(5000, times, sigma, seed), times, options, seeded(seed))
    weight = found.reference.weight[0]
    wanted = torch.cat([SHIFT[None], RATE.T])
    assert ((weight - wanted).norm() / wanted.norm()).item() < 0.1
    assert found.paths.shape == (15_000, 17, 2)


def test_a_fitted_reference_foretells_a_snapshot_that_was_left_out_better_than_brownian_bridges():
    times, sigma = (0.0, 0.5, 1.0), 0.4
    shots = spiral(2000, (0.0, 0.5, 1.0), sigma)
    truth = spiral(2000, (0.25,), sigma, 5)[0]

    def error(refinements):
        options = BridgeOptions(sigma=sigma, steps=8, rounds=3, refinements=refinements, relax=1.7)
        found = multi_marginal_bridge(shots, times, options, seeded(0))
        middle = found.paths[:2000, 4]
        return (middle.mean(0) - truth.mean(0)).norm() + (torch.cov(middle.T) - torch.cov(truth.T)).norm().sqrt()

    assert error(8) < 0.6 * error(0)


def test_waves_follow_what_no_affine_drift_can():
    """Two clouds from one: the bridge ends on both."""
    z = torch.randn(2000, 1, generator=seeded(0), dtype=torch.float64)
    first, second = 0.3 * z, torch.sign(z) * 1.5 + 0.2 * torch.randn(2000, 1, generator=seeded(1), dtype=torch.float64)

    def between(basis):
        options = BridgeOptions(sigma=0.7, basis=basis, waves=24, steps=15, rounds=3, refinements=0)
        end = multi_marginal_bridge([first, second], (0.0, 1.0), options, seeded(2)).paths[:2000, -1]
        return (end.abs() < 0.7).double().mean().item()

    assert between("waves") < 0.06
    assert between("affine") > 0.2


def test_bad_snapshots_are_refused_in_a_line():
    x = torch.zeros(4, 2)
    for shots, times, words in (
        ([x], (0.0,), "two or more"),
        ([x, x], (0.0,), "a time for each"),
        ([x, x], (1.0, 0.0), "times of snapshots rise"),
        ([x, x[:, :1]], (0.0, 1.0), "count, dimension"),
    ):
        with pytest.raises(ValueError, match=words):
            multi_marginal_bridge(shots, times, BridgeOptions(), seeded(0))
    assert math.isfinite(BridgeOptions().sigma)
