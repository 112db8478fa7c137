"""Losses: pure functions. Distances give one value a row, the mean over the row's elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
_reduce: list[Reduce] = []


def squared_error(guess: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row: [batch]."""
    return (guess - target).square().flatten(1).mean(1)


def absolute_error(guess: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each row: [batch]."""
    return (guess - target).abs().flatten(1).mean(1)


def pseudo_huber(guess: Tensor, target: Tensor, c: float) -> Tensor:
    """``sqrt(||guess - target||^2 + c^2) - c`` of each row, the norm over the whole row: [batch].

    iCT's distance (Song & Dhariwal 2023, eq. 7), there with ``c = 0.00054 sqrt(D)``. Not divided by the
    number of elements: its gradient has at most unit length.
    """
    return torch.sqrt((guess - target).square().flatten(1).sum(1) + c**2) - c


def distance(name: str, guess: Tensor, target: Tensor, c: float = 0.0) -> Tensor:
    """One of ``l2``, ``l1``, ``huber`` (pseudo-Huber of the whole row; c = 0 there is the norm)."""
    match name:
        case "l2":
            return squared_error(guess, target)
        case "l1":
            return absolute_error(guess, target)
        case "huber":
            return pseudo_huber(guess, target, c)
    raise ValueError(f"unknown distance {name!r}: one of l2, l1, huber")


def _row_mean(value: Tensor) -> Tensor:
    """The mean of each row: [batch] from [batch] or [batch, ...]."""
    return value.reshape(value.shape[0], -1).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``softplus(-real) + softplus(fake)`` over logits [batch, ...], a mean a row.

    Its optimum over functions is ``logit = log p_real - log p_fake``, its value there 2 log 2 - 2 JS.
    """
    return _row_mean(F.softplus(-real)) + _row_mean(F.softplus(fake))


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: ``softplus(-fake)``, a mean a row (Goodfellow et al. 2014)."""
    return _row_mean(F.softplus(-fake))


def r1_penalty(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``||d sum(logits) / dx||^2`` of each row, at real samples (Mescheder et al. 2018): [batch].

    The derivative is exact and itself differentiable. ``logits`` gives [batch, ...] for x; its mean over
    everything but the batch is the discriminator's value.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        value = _row_mean(logits(x))
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1)


def r1_by_difference(real: Tensor, moved: Tensor, step: float) -> Tensor:
    """R1 without a second derivative: ``(D(x + step n) - D(x))^2 / step^2`` of each row, n ~ N(0, I).

    Its mean over n is ``||dD/dx||^2`` to first order in the step.
    """
    return (_row_mean(moved) - _row_mean(real)).square() / step**2


def stopped_pull(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient in x is ``direction / numel`` of each row: ``<direction, x>``, stopped."""
    return (direction.detach() * x).flatten(1).mean(1)


def dispersive(features: Tensor, kind: str = "infonce", temperature: float = 0.5) -> Tensor:
    """How close together the rows of ``features`` [batch, ...] lie, over all pairs: a scalar, lower when they spread.

    With squared distance D_ij, the mean over a row's elements, and the pairs i != j:

    - ``infonce``: ``log mean exp(-D_ij / T)`` (Wang & He 2025, eq. 6);
    - ``cosine``: the same with D_ij = 1 - the cosine of the angle;
    - ``hinge``: ``mean max(0, 1 - ||f_i - f_j||)^2``, 0 once every pair is one apart;
    - ``covariance``: ``mean offdiag(C)^2 + mean max(0, 1 - diag(C))``, C the covariance over the batch;
    - ``dm1``: what the code of DM1 does, ``-mean_i log(e^10 + sum_j exp(min(||f_i - f_j|| / T, 10)))``: its masked
      diagonal, clamped and then turned over, is the e^10, which flattens the gradient. For comparison.

    0 for a single row. Of several processes each compares its own rows.
    """
    f = features.flatten(1)
    count = len(f)
    if count < 2:
        return f.sum() * 0.0
    if kind == "covariance":
        centred = f - f.mean(0)
        covariance = centred.T @ centred / (count - 1)
        diagonal = covariance.diagonal()
        off = covariance.square().sum() - diagonal.square().sum()
        return off / max(len(diagonal) * (len(diagonal) - 1), 1) + F.relu(1 - diagonal).mean()
    first, second = torch.triu_indices(count, count, 1, device=f.device)
    if kind == "cosine":
        unit = F.normalize(f, dim=1)
        distance = 1 - (unit @ unit.T)[first, second]
        return torch.logsumexp(-distance / temperature, 0) - math.log(len(first))
    square = (f[first] - f[second]).square().sum(1)
    match kind:
        case "infonce":
            return torch.logsumexp(-square / (f.shape[1] * temperature), 0) - math.log(len(first))
        case "hinge":
            return F.relu(1 - torch.sqrt(square + 1e-12)).square().mean()
        case "dm1":
            near = torch.exp((torch.sqrt(square + 1e-12) / temperature).clamp(max=10.0))
            rows = f.new_zeros(count).index_add(0, first, near).index_add(0, second, near)
            return -torch.log(math.exp(10.0) + rows).mean()
    raise ValueError(f"unknown kind {kind!r}: one of infonce, cosine, hinge, covariance, dm1")


def batch_mean(value: Tensor, each: bool = False) -> Tensor:
    """The mean over the whole batch, over all processes: the only way to a batch statistic.

    ``each``: of [batch, ...] one for each place of a row, instead of one for all.
    """
    mean = value.mean(0) if each else value.mean()
    return _reduce[-1](mean) if _reduce else mean


def set_reduction(reduce: Reduce | None) -> None:
    """Give ``batch_mean`` the mean over processes; None takes it away. For the trainer."""
    _reduce.clear()
    if reduce is not None:
        _reduce.append(reduce)


def ict_c(dimension: int) -> float:
    """iCT's Huber constant, ``0.00054 sqrt(D)``."""
    return 0.00054 * math.sqrt(dimension)
