"""Solvers that put noise back: churn, restart, and the multi-step sampler of consistency models."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cond import Cond
from ..path import Path
from ..registry import Paper, solver
from ..rng import Source, normal
from .base import Solver, State
from .euler import Heun
from .weights import silent


def noisier(x: Tensor, path: Path, t: float, to: float, rng: Source) -> Tensor:
    """The sample at ``t`` taken back to the noisier time ``to``: ``(alpha' / alpha) x + fresh noise``."""
    here, there = path.coefs(t), path.coefs(to)
    keep = float(there.alpha / here.alpha)
    extra = math.sqrt(max(0.0, float(there.sigma) ** 2 - (keep * float(here.sigma)) ** 2))
    return torch.add(keep * x, normal(x, rng), alpha=extra)


def needed(rng: Source | None, name: str) -> Source:
    if rng is None:
        raise ValueError(f"{name} draws noise: pass rng")
    return rng


@solver("churn", Paper("2206.00364", "Elucidating the Design Space of Diffusion-Based Generative Models", "EDM"))
class Churn(Solver):
    """Stochastic Euler: a little noise before each step (Karras et al. 2022, Algorithm 2, with Euler's rule).

    sigma / alpha grows by ``min(CHURN / steps, sqrt(2) - 1)`` inside (LOW, HIGH), as far as the path goes.
    """

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    CHURN: ClassVar[float] = 10.0
    LOW: ClassVar[float] = 0.05
    HIGH: ClassVar[float] = 50.0

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        stage, path = state.stages[i], state.path
        t = stage.t
        if not silent(stage.alpha_t, stage.sigma_t) and self.LOW < stage.sigma_t / stage.alpha_t < self.HIGH:
            grow = 1 + min(self.CHURN / len(state.stages), math.sqrt(2) - 1)
            t = max(t, float(path.time(stage.lam_t - math.log(grow))))
            x = noisier(x, path, stage.t, t, needed(rng, self.name))
        return path.move(x, model(x, t, cond, path.slope), t, stage.s), state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return nfe


@solver("consistency", Paper("2303.01469", "Consistency Models", "CM"))
class Consistency(Solver):
    """Guess the clean sample, noise it to the next level (Song et al. 2023, Algorithm 1): for consistency models.

    No solver of the flow: with a denoiser in place of a consistency model it does not converge.
    """

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        stage = state.stages[i]
        guess = model(x, stage.t, cond, "x0")
        if not stage.sigma_s:
            return guess, state
        return torch.add(stage.alpha_s * guess, normal(x, needed(rng, self.name)), alpha=stage.sigma_s), state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return nfe


@solver("restart", Paper("2306.14878", "Restart Sampling for Improving Generative Processes", "Restart"))
class Restart(Heun):
    """Heun's rule, with one stretch of the grid taken twice: noised back to its start, solved again (Xu et al. 2023).

    The stretch is the third quarter of the steps, so that the calls are known: ``2 n - 1 + 2 max(1, n // 4)``.
    """

    stochastic: ClassVar[bool] = True

    @staticmethod
    def stretch(steps: int) -> tuple[int, int]:
        """The levels between which it restarts; equal where the grid is too short."""
        start = steps // 2
        return (start, start + max(1, steps // 4)) if steps > 2 else (0, 0)

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        x, state = super().step(model, x, i, state, cond, rng)
        first, last = self.stretch(len(state.stages))
        if i + 1 == last:
            x = noisier(x, state.path, state.times[last], state.times[first], needed(rng, self.name))
            for k in range(first, last):
                x, state = super().step(model, x, k, state, cond, rng)
        return x, state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        for steps in range(1, nfe + 1):
            first, last = cls.stretch(steps)
            if 2 * steps - 1 + 2 * (last - first) == nfe:
                return steps
        return None
