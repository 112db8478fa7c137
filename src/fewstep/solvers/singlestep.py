"""Single-step solvers: several calls inside each step, no memory between steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..cond import Cond
from ..path import Path
from ..registry import Paper, solver
from ..rng import Source
from .base import Solver, Stage, State
from .engine import Course, Decision, Engine, compiled
from .multistep import DEIS, DPM
from .weights import PREDICTION, Form, silent

Tableau = tuple[tuple[float, ...], ...]
"""Rows of Butcher's tableau below the first, the weights last: row i gives stage i + 1 from the slopes before it."""

MIDPOINT: Tableau = ((1 / 2,), (0.0, 1.0))
HEUN3: Tableau = ((1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4))
KUTTA3: Tableau = ((1 / 2,), (-1.0, 2.0), (1 / 6, 2 / 3, 1 / 6))
KUTTA4: Tableau = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


@dataclass(frozen=True)
class Substage:
    """One slope of a step: where it is asked, and what of x and the slopes leads to the next place."""

    t: float
    keep: float
    weights: tuple[float, ...]


@dataclass
class Steps(State):
    """Substages and prediction of each step."""

    substages: tuple[tuple[Substage, ...], ...] = ()
    wants: tuple[str, ...] = ()


class RungeKutta(Solver):
    """An explicit Runge-Kutta rule on ``d(x / scale) / d clock = slope``.

    ``last`` is the rule of a step to clean data, where no slope can be asked at the end itself.
    """

    rule: ClassVar[Tableau]
    last: ClassVar[Tableau]

    def form(self, path: Path, stage: Stage) -> Form:
        return "flow" if path.slope == "flow" else "noise"

    def init(self, path: Path, times: tuple[float, ...]) -> Steps:
        plain = super().init(path, times)
        forms = [self.form(path, stage) for stage in plain.stages]
        cut = [self.last if stage.sigma_s == 0 else self.rule for stage in plain.stages]
        made = tuple(substages(path, s, f, rule) for s, f, rule in zip(plain.stages, forms, cut, strict=True))
        return Steps(path, plain.times, plain.stages, substages=made, wants=tuple(PREDICTION[f] for f in forms))

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        assert isinstance(state, Steps)
        here, slopes = x, list[Tensor]()
        start = x if x.dtype.itemsize > 2 else x.float()
        for stage in state.substages[i]:
            slopes.append(model(here, stage.t, cond, state.wants[i]))
            total = start * stage.keep
            for weight, slope in zip(stage.weights, slopes, strict=True):
                if weight:
                    total.add_(slope, alpha=weight)
            here = total.to(x.dtype)
        return here, state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        steps, left = divmod(nfe - len(cls.last), len(cls.rule))
        return None if left or steps < 0 else steps + 1


def substages(path: Path, stage: Stage, form: Form, rule: Tableau) -> tuple[Substage, ...]:
    """The places and weights of one step, in float64."""
    scale_t, clock_t = _clock(form, stage.alpha_t, stage.sigma_t)
    scale_s, clock_s = _clock(form, stage.alpha_s, stage.sigma_s)
    made, t = [], stage.t
    for k, row in enumerate(rule):
        if k == len(rule) - 1:
            there, scale = stage.s, scale_s
        else:
            part = sum(row)
            clock = clock_t + part * (clock_s - clock_t)
            lam = math.log((1 - clock) / clock) if form == "flow" else -math.log(clock)
            there = stage.s if part == 1 else float(path.time(lam))
            coefs = path.coefs(there)
            scale = _clock(form, float(coefs.alpha), float(coefs.sigma))[0]
        made.append(Substage(t, scale / scale_t, tuple(scale * (clock_s - clock_t) * a for a in row)))
        t = there
    return tuple(made)


def _clock(form: Form, alpha: float, sigma: float) -> tuple[float, float]:
    return (alpha + sigma, sigma / (alpha + sigma)) if form == "flow" else (alpha, sigma / alpha)


@solver("midpoint", Paper("2206.00364", "Elucidating the Design Space of Diffusion-Based Generative Models", "EDM"))
class Midpoint(RungeKutta):
    """Second order, two calls a step: the slope half-way, in the path's own frame, to clean data too."""

    order: ClassVar[int] = 2
    rule: ClassVar[Tableau] = MIDPOINT
    last: ClassVar[Tableau] = MIDPOINT


@solver("rk4", Paper("2011.13456", "Score-Based Generative Modeling through Stochastic Differential Equations", "SDE"))
class RK4(RungeKutta):
    """The classical fourth-order rule, four calls a step; Heun's third-order rule on the step to clean data."""

    order: ClassVar[int] = 4
    rule: ClassVar[Tableau] = KUTTA4
    last: ClassVar[Tableau] = HEUN3


@solver("deis_rk", DEIS)
class DeisRK(RungeKutta):
    """DEIS rhoRK: Kutta's third-order rule in sigma / alpha, three calls a step; out of pure noise in the flow form."""

    order: ClassVar[int] = 3
    rule: ClassVar[Tableau] = KUTTA3
    last: ClassVar[Tableau] = HEUN3

    def form(self, path: Path, stage: Stage) -> Form:
        return "flow" if silent(stage.alpha_t, stage.sigma_t) else "noise"


@solver("dpm2s", DPM)
class DPM2S(Engine):
    """DPM-Solver++ 2S: second order, two calls a step, the second half-way in log-SNR (Lu et al. 2022, Algorithm 1).

    The step to clean data, infinite in log-SNR, asks half-way in ``sigma / (alpha + sigma)`` and extends the line
    through both guesses to zero noise.
    """

    order: ClassVar[int] = 2

    def init(self, path: Path, times: tuple[float, ...]) -> Course:
        plain = Solver.init(self, path, times)
        between = [float(path.time(self._middle(stage))) for stage in plain.stages]
        finer = [t for pair in zip(plain.times, between, strict=False) for t in pair] + [plain.times[-1]]
        stages = Solver.init(self, path, tuple(finer)).stages
        return Course(
            path, plain.times, plain.stages, rules=compiled(path, stages, self.decide(path, stages)), inner=stages
        )

    def _middle(self, stage: Stage) -> float:
        if math.isfinite(stage.lam_t) and math.isfinite(stage.lam_s):
            return (stage.lam_t + stage.lam_s) / 2
        tau = (stage.sigma_t / (stage.alpha_t + stage.sigma_t) + stage.sigma_s / (stage.alpha_s + stage.sigma_s)) / 2
        return math.log((1 - tau) / tau)

    def decide(self, path: Path, stages: tuple[Stage, ...]) -> tuple[Decision, ...]:
        first = Decision("data", "lam", 1)
        seconds = [
            Decision("data", "lam", 2, back=1, shares=(1.0, 0.0) if math.isfinite(stage.lam_s) else None)
            for stage in stages[1::2]
        ]
        return tuple(d for second in seconds for d in (first, second))

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        for k in (2 * i, 2 * i + 1):
            x, state = super().step(model, x, k, state, cond, rng)
        return x, state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return None if nfe % 2 else nfe // 2
