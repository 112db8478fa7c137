"""Multi-marginal Schroedinger bridges: snapshots of a population in, its trajectories and a fitted drift out.

Shen, Berlinghieri & Broderick, Multi-marginal Schroedinger Bridges with Iterative Reference Refinement
(https://arxiv.org/abs/2408.06277). Nothing is trained by gradient: every drift is a regression in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.polynomial.legendre import legvander
from pydantic import Field
from torch import Tensor

from ..errors import Refused
from ..part import Part
from ..rng import Source, normal

Features = Callable[[Tensor], Tensor]
Drift = Callable[[Tensor, float], Tensor]


class BridgeOptions(Part):
    sigma: float = Field(1.0, gt=0, description="of the noise in dX = b dt + sigma dW; it must be right")
    steps: int = Field(40, ge=1, description="of the simulation between two snapshots")
    rounds: int = Field(10, ge=1, description="of proportional fitting, for each pair of snapshots")
    refinements: int = Field(10, ge=0, description="times that the reference is fitted anew; 0: Brownian bridges")
    relax: float = Field(
        1.0, gt=0, lt=2, description="how far the reference goes to each new fit; above 1 it is quicker"
    )
    family: Literal["affine", "quadratic"] = Field(
        "affine", description="of the reference drift, the same at all times"
    )
    basis: Literal["affine", "waves"] = Field(
        "affine", description="of the bridges' drifts; waves: random, for any law"
    )
    waves: int = Field(64, ge=1, description="random waves beside the affine part")
    width: float = Field(1.0, gt=0, description="length of the waves, in standard deviations of the snapshots")
    time_degree: int = Field(4, ge=0, description="of the polynomial in time that every coefficient of a bridge is")
    ridge: float = Field(1e-6, ge=0, description="added to the mean square of every feature in a regression")


@dataclass(frozen=True)
class Fitted:
    """A drift ``features(x)^T weight``, its coefficients polynomials in time on [low, high]."""

    features: Features
    weight: Tensor  # [terms of time, features, dimension]
    low: float
    high: float
    spread: Mapping[float, Tensor] = field(
        default_factory=dict
    )  # by time: a root of a step's covariance, per unit time

    def __call__(self, x: Tensor, t: float) -> Tensor:
        terms = legendre((2 * t - self.low - self.high) / (self.high - self.low), len(self.weight))
        return self.features(x) @ torch.einsum("k,kfd->fd", terms.to(x), self.weight)


@dataclass(frozen=True)
class Bridges:
    """What was found.

    times: [steps + 1], all simulated times. paths: [particles, steps + 1, dimension], one particle for each sample of
    each snapshot, through all times. reference: the fitted drift. forward: the bridges' drifts, an interval each.
    history: the reference's weights [features, dimension] after each refinement.
    """

    times: Tensor
    paths: Tensor
    reference: Fitted
    forward: tuple[Drift, ...]
    backward: tuple[Drift, ...]
    history: tuple[Tensor, ...]


def multi_marginal_bridge(
    snapshots: Sequence[Tensor], times: Sequence[float], options: BridgeOptions, rng: Source
) -> Bridges:
    """The most likely population through all snapshots, under a reference drift that is fitted with it.

    In turns: (a) for each pair of consecutive snapshots the Schroedinger bridge, the law nearest to the reference
    ``dX = b(X) dt + sigma dW`` with these marginals, by proportional fitting (``fit_bridge``); (b) the reference, the
    nearest in its family to the bridges: a regression of dX/dt on X over all trajectories. Both lower the same
    divergence. The reference begins as Brownian motion, b = 0.

    ``snapshots`` are [count, dimension], at rising ``times``. Refused where there are fewer than two, or they do not
    fit together.
    """
    if len(snapshots) < 2 or len(snapshots) != len(times):
        raise Refused(f"{len(snapshots)} snapshots at {len(times)} times: pass two or more, and a time for each")
    if any(b <= a for a, b in zip(times, times[1:], strict=False)):
        raise Refused(f"the times of snapshots rise, got {', '.join(f'{t:g}' for t in times)}")
    if len({s.shape[1:] for s in snapshots}) != 1 or snapshots[0].ndim != 2:
        raise Refused(f"snapshots are [count, dimension], got {', '.join(str(tuple(s.shape)) for s in snapshots)}")
    pooled = torch.cat(list(snapshots))
    spatial, own = _basis(pooled, options, rng), polynomial(pooled, options.family)
    size = own(pooled[:1]).shape[1]
    reference = Fitted(own, pooled.new_zeros(1, size, pooled.shape[1]), times[0], times[-1])
    history = []
    for k in range(options.refinements + 1):
        pairs = [
            fit_bridge(a, b, (s, t), reference, spatial, options, rng)
            for a, b, s, t in zip(snapshots, snapshots[1:], times, times[1:], strict=False)
        ]
        grid, paths = _trajectories(snapshots, times, pairs, options, rng)
        if k == options.refinements:
            break
        per = options.steps
        rows = [
            (float(grid[i]), paths[:, i], pairs[i // per][0](paths[:, i], float(grid[i]))) for i in range(len(grid) - 1)
        ]
        fitted = regress(own, rows, 1, options.ridge)
        weight = reference.weight + options.relax * (fitted.weight - reference.weight)
        reference = Fitted(own, weight, times[0], times[-1])
        history.append(weight[0])
    forward, backward = zip(*pairs, strict=True)
    return Bridges(grid, paths, reference, forward, backward, tuple(history))


def fit_bridge(
    first: Tensor,
    second: Tensor,
    times: tuple[float, float],
    reference: Drift,
    features: Features,
    options: BridgeOptions,
    rng: Source,
) -> tuple[Fitted, Fitted]:
    """The forward and backward drifts of the Schroedinger bridge from one sample to the other, by iterated regression.

    Iterative proportional fitting: simulate forward from ``first``, regress the backward drift
    ``E[(X_k - X_k+1) / dt | X_k+1]``; simulate backward from ``second``, regress the forward drift
    ``E[(X_k+1 - X_k) / dt | X_k]``; and again. The backward drift is per unit of elapsed time, so that it is added
    while time falls. Each half keeps one marginal; together they come to both.
    """
    low, high = times
    grid = torch.linspace(low, high, options.steps + 1, dtype=torch.float64).tolist()
    forward: Drift = reference
    for _ in range(options.rounds):
        backward = reversed_drift(simulate(first, forward, grid, options.sigma, rng), forward, grid, features, options)
        down = grid[::-1]
        forward = fitted = reversed_drift(
            simulate(second, backward, down, options.sigma, rng), backward, down, features, options
        )
    return fitted, backward


def matched(noise: Tensor, x: Tensor) -> Tensor:
    """The noise with the moments that it has in the mean: none, the identity, and no correlation with x.

    Drawn at random these are off by ``1 / sqrt(count)``, in every step and every round. Left alone where there are
    fewer than ten rows for each coordinate.
    """
    count, dimension = x.shape
    if count < 10 * (dimension + 1):
        return noise
    basis = torch.linalg.qr(torch.cat([x.new_ones(count, 1), x - x.mean(0)], 1)).Q
    noise = noise - basis @ (basis.T @ noise)
    root = torch.linalg.cholesky(noise.T @ noise / count)
    return torch.linalg.solve_triangular(root, noise.T, upper=False).T


def reversed_drift(
    paths: Sequence[Tensor], drift: Drift, times: Sequence[float], features: Features, options: BridgeOptions
) -> Fitted:
    """The drift that runs simulated paths the other way: the regression of ``(X_k - X_k+1) / dt`` on ``X_k+1``.

    ``X_k+1 = X_k + dt drift(X_k) + sqrt(dt) L z``, so that the target is ``-drift(X_k) - L z / sqrt(dt)``. The noise,
    large for small dt, is taken in the mean by Stein's identity, ``E[phi(X_k+1) z^T] = sqrt(dt) E[phi'(X_k+1)] L``.
    """
    low, high = min(times), max(times)
    dimension, spread = paths[0].shape[1], getattr(drift, "spread", {})
    rows, pulls = [], []
    for k in range(len(times) - 1):
        root = spread.get(times[k])
        noise = options.sigma**2 * torch.eye(dimension).to(paths[0]) if root is None else root @ root.T
        rows.append((times[k + 1], paths[k + 1], -drift(paths[k], times[k])))
        pulls.append(slope_sum(features, paths[k + 1]) @ noise)
    fitted = regress(features, rows, options.time_degree + 1, options.ridge, (low, high), pulls)
    left = {}
    for k in range(len(times) - 1):
        gap, t = abs(times[k + 1] - times[k]), times[k + 1]
        rest = paths[k] - paths[k + 1] - gap * fitted(paths[k + 1], t)
        values, vectors = torch.linalg.eigh(rest.T @ rest / (gap * len(rest)))
        left[t] = vectors * values.clamp(min=0).sqrt()
    return replace(fitted, spread=left)


def slope_sum(features: Features, x: Tensor) -> Tensor:
    """The derivatives of the features in each coordinate, summed over rows: [features, dimension]."""
    columns = []
    for k in range(x.shape[1]):
        way = torch.zeros_like(x)
        way[:, k] = 1
        columns.append(torch.func.jvp(features, (x,), (way,))[1].sum(0))
    return torch.stack(columns, 1)


def simulate(x: Tensor, drift: Drift, times: Sequence[float], sigma: float, rng: Source) -> list[Tensor]:
    """Euler-Maruyama through times that rise or fall; the drift is per unit of elapsed time. All points.

    Where a fitted drift knows what its regression left over at a time, that is the step's noise: with steps of finite
    length it is less than sigma near a snapshot, and a bridge of Gaussians is then exact at every length.
    """
    paths, spread = [x], getattr(drift, "spread", {})
    for t, s in zip(times, times[1:], strict=False):
        gap = abs(s - t)
        noise = matched(normal(x, rng), x)
        known = spread.get(t)
        noise = sigma * noise if known is None else noise @ known.T
        x = x + gap * drift(x, t) + math.sqrt(gap) * noise
        paths.append(x)
    return paths


def regress(
    features: Features,
    rows: Sequence[tuple[float, Tensor, Tensor]],
    terms: int,
    ridge: float,
    span: tuple[float, float] | None = None,
    pulls: Sequence[Tensor] | None = None,
) -> Fitted:
    """Least squares of targets on ``features(x)`` times Legendre polynomials of time: (t, x, target) for each time.

    ``pulls`` are taken from ``features^T target``: the part of the targets that is known in the mean.
    """
    low, high = span or (rows[0][0], rows[-1][0])
    gram: Tensor | float = 0.0
    right: Tensor | float = 0.0
    for k, (t, x, target) in enumerate(rows):
        time = legendre((2 * t - low - high) / (high - low), terms).to(x)
        value = features(x)
        own = value.T @ value
        size = own.shape[0]
        gram = gram + torch.einsum("k,l,fg->kflg", time, time, own).reshape(terms * size, terms * size)
        moment = value.T @ target - (0 if pulls is None else pulls[k])
        right = right + torch.einsum("k,fd->kfd", time, moment).reshape(terms * size, -1)
    assert isinstance(gram, Tensor) and isinstance(right, Tensor)
    gram = gram + ridge * torch.diag(gram.diagonal())
    weight = torch.linalg.solve(gram, right).reshape(terms, -1, right.shape[1])
    return Fitted(features, weight, low, high)


def legendre(u: float, count: int) -> Tensor:
    """The first polynomials on [-1, 1], at one point: [count].

    >>> legendre(0.5, 3).tolist()
    [1.0, 0.5, -0.125]
    """
    return torch.from_numpy(legvander(np.array([u]), count - 1)[0])


def polynomial(like: Tensor, family: str) -> Features:
    """``1, x`` and, for quadratic, all products of two coordinates."""
    first, second = torch.triu_indices(like.shape[1], like.shape[1])

    def features(x: Tensor) -> Tensor:
        parts = [x.new_ones(len(x), 1), x]
        if family == "quadratic":
            parts.append(x[:, first] * x[:, second])
        return torch.cat(parts, 1)

    return features


def _basis(pooled: Tensor, options: BridgeOptions, rng: Source) -> Features:
    """The features of the bridges' drifts: affine, with random waves of the data's own size where asked for."""
    affine = polynomial(pooled, "affine")
    if options.basis == "affine":
        return affine
    middle, scale = pooled.mean(0), pooled.std(0) * options.width
    draws = normal(pooled.new_empty(options.waves, pooled.shape[1] + 1), rng)
    rates, phase = draws[:, :-1] / scale, 2 * math.pi * draws[:, -1]

    def features(x: Tensor) -> Tensor:
        return torch.cat([affine(x), torch.cos((x - middle) @ rates.T + phase)], 1)

    return features


def _trajectories(
    snapshots: Sequence[Tensor],
    times: Sequence[float],
    pairs: Sequence[tuple[Fitted, Fitted]],
    options: BridgeOptions,
    rng: Source,
) -> tuple[Tensor, Tensor]:
    """Every sample of every snapshot, carried through all intervals, forward and backward."""
    steps = options.steps
    grids = [torch.linspace(a, b, steps + 1, dtype=torch.float64) for a, b in zip(times, times[1:], strict=False)]
    whole = torch.cat([grids[0][:1], *(g[1:] for g in grids)])
    gathered = []
    for i, start in enumerate(snapshots):
        later, earlier = [start], [start]
        for k in range(i, len(pairs)):
            later += simulate(later[-1], pairs[k][0], grids[k].tolist(), options.sigma, rng)[1:]
        for k in range(i - 1, -1, -1):
            earlier += simulate(earlier[-1], pairs[k][1], grids[k].flip(0).tolist(), options.sigma, rng)[1:]
        gathered.append(torch.stack([*earlier[:0:-1], *later], 1))
    return whole, torch.cat(gathered)
