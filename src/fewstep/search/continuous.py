"""Bayesian search and CMA-ES over what is continuous in a plan: its levels, and the relaxation of every step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Literal

from ..errors import need
from ..path import Path
from ..rng import mix
from ..solvers import SolverPlan
from .evolve import Scored
from .journal import Journal
from .plans import GAP, PlanSpace, lams

REACH = 1.0
"""How far a log gap may move (a factor e); relaxation reaches a quarter of it."""


class Moves:
    """A plan moved by numbers: the logs of its gaps in lam, then the logs of its relaxations.

    >>> from fewstep.path import Straight
    >>> from fewstep.solvers import recommended
    >>> plan = recommended(Straight(), 3)
    >>> moves = Moves(Straight(), plan)
    >>> moves.count, moves.plan([0.0] * 5).levels == plan.levels
    (5, True)
    """

    def __init__(self, path: Path, plan: SolverPlan) -> None:
        self.path, self.start = path, plan
        self.levels = lams(path, plan)
        self.count = 2 * plan.nfe - 1
        self.space = PlanSpace(path, plan.nfe, [plan])

    def plan(self, moves: list[float]) -> SolverPlan:
        """The plan; its last level is held inside the path."""
        inner, shift = list[float](), 0.0
        for before, lam, move in zip(self.levels[:-1], self.levels[1:], moves, strict=False):
            shift += max(2 * GAP, (lam - before) * math.exp(move)) - (lam - before)
            inner.append(lam + shift)
        if inner and inner[-1] > self.space.low:
            part = (self.space.low - self.levels[0]) / (inner[-1] - self.levels[0])
            inner = [self.levels[0] + part * (lam - self.levels[0]) for lam in inner]
        steps = tuple(
            step.model_copy(update={"relax": min(4.0, step.relax * math.exp(move / 4))})
            for step, move in zip(self.start.steps, moves[self.start.nfe - 1 :], strict=True)
        )
        return SolverPlan(levels=(self.start.levels[0], *inner), end=self.start.end, steps=steps)


def tune(
    path: Path,
    plan: SolverPlan,
    score: Callable[[SolverPlan], float],
    budget: int,
    *,
    by: Literal["tpe", "cma"] = "cma",
    seed: int = 0,
    journal: Journal | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> list[Scored[SolverPlan]]:
    """Plans around a first one, best first: ``budget`` of them scored, by optuna's TPE or by CMA-ES.

    Raises MissingExtra without the ``search`` extra.
    """
    if budget < 1:
        raise ValueError(f"a search scores at least 1 plan, got {budget}")
    moves, journal = Moves(path, plan), journal or Journal()
    found: dict[str, Scored[SolverPlan]] = {}

    def asked(numbers: list[float]) -> float:
        made = moves.plan(numbers)
        text = moves.space.write(made)
        value = journal.answer(json.dumps([text, by]), lambda: _plain(score(made)) if moves.space.sound(made) else None)
        one = Scored(made, math.inf if value is None else float(value))
        found[text] = one
        if tell is not None:
            tell(min(len(found), budget), min(s.score for s in found.values()))
        return min(one.score, 1e9)

    asked([0.0] * moves.count)
    (_tpe if by == "tpe" else _cma)(moves.count, asked, budget - 1, mix(seed, by) % 2**31)
    return sorted(found.values(), key=lambda one: one.score)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _tpe(count: int, asked: Callable[[list[float]], float], budget: int, seed: int) -> None:
    optuna = need("optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(budget):
        trial = study.ask()
        study.tell(trial, asked([trial.suggest_float(f"{k}", -REACH, REACH) for k in range(count)]))


def _cma(count: int, asked: Callable[[list[float]], float], budget: int, seed: int) -> None:
    cma = need("cma", "search")
    options = {"seed": seed + 1, "verbose": -9, "bounds": [-2 * REACH, 2 * REACH], "maxfevals": budget}
    strategy = cma.CMAEvolutionStrategy([0.0] * count, REACH / 5, options)
    left = budget
    while left > 0 and not strategy.stop():
        asked_for = strategy.ask()
        scores = [asked(list(map(float, numbers))) for numbers in asked_for[:left]]
        if len(scores) < len(asked_for):
            return
        left -= len(scores)
        strategy.tell(asked_for, scores)
