"""DPM-Solver++: exponential integrators of the guess of the clean sample."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cond import Cond
from ..registry import Paper, solver
from ..rng import Source
from .base import Solver, State


@solver("dpm2m", Paper("2211.01095", "DPM-Solver++: Fast Solver for Guided Sampling", "DPM-Solver++"))
class DPM2M(Solver):
    """DPM-Solver++ 2M: second order from two guesses, one call a step (Lu et al. 2022, Algorithm 2).

    ``x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) D`` with
    ``D = x0 + (h / 2 h_last) (x0 - x0_last)`` and h the step in log(alpha / sigma). First order on the
    first step, and wherever a step is infinite: leaving pure noise, or landing on clean data.
    """

    order: ClassVar[int] = 2

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        stage = state.stages[i]
        guess = model(x, stage.t, cond, "x0")
        keep = stage.sigma_s / stage.sigma_t
        weight = stage.alpha_s - stage.alpha_t * keep
        mixed, extra = guess, 0.0
        if state.history:
            before = state.stages[i - 1]
            step, last = stage.lam_s - stage.lam_t, before.lam_s - before.lam_t
            extra = step / (2 * last)
        if extra and math.isfinite(extra):
            mixed = torch.lerp(state.history[0], guess, 1 + extra)
        state.history[:] = [guess]
        return torch.add(keep * x, mixed, alpha=weight), state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return nfe
