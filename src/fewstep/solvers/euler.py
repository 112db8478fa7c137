"""Euler's rule, which in a path's own frame is DDIM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cond import Cond
from ..registry import Paper, solver
from ..rng import Source
from .base import Solver, State


@solver("euler", Paper("2010.02502", "Denoising Diffusion Implicit Models", "DDIM"))
class Euler(Solver):
    """First order, one call a step: DDIM without noise, on every path.

    ``x_s / scale_s = x_t / scale_t + (tau_s - tau_t) slope``: exact where the guess does not change.
    """

    order: ClassVar[int] = 1

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        stage = state.stages[i]
        slope = model(x, stage.t, cond, state.path.slope)
        keep, move = stage.scale_s / stage.scale_t, stage.scale_s * (stage.tau_s - stage.tau_t)
        return torch.add(keep * x, slope, alpha=move), state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return nfe


@solver("heun", Paper("2206.00364", "Elucidating the Design Space of Diffusion-Based Generative Models", "EDM"))
class Heun(Solver):
    """Second order, two calls a step and one on the last (Karras et al. 2022, Algorithm 1)."""

    order: ClassVar[int] = 2

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        stage = state.stages[i]
        keep, move = stage.scale_s / stage.scale_t, stage.scale_s * (stage.tau_s - stage.tau_t)
        slope = model(x, stage.t, cond, state.path.slope)
        ahead = torch.add(keep * x, slope, alpha=move)
        if stage.s <= state.path.t_min:  # a clean sample has no noise to read a slope from
            return ahead, state
        later = model(ahead, stage.s, cond, state.path.slope)
        return torch.add(keep * x, slope + later, alpha=move / 2), state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return (nfe + 1) // 2 if nfe % 2 else None
