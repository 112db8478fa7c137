"""Plans as candidates: every named sampler on every grid to begin with, and how one plan leads to another.

The decisions of each step, levels, order, prediction, variable, start, corrector and relaxation, are those of the
unified sampling framework (Liu et al. 2023, "Unified Sampling Framework", S3): a sampler is a schedule of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import get_args

import torch

from ..grid import GRIDS, grid
from ..path import Path
from ..registry import SOLVERS
from ..solvers import SolverPlan, StepPlan, recommended, solver_named
from ..solvers.engine import Engine
from ..solvers.plan import FORM_OF
from ..solvers.weights import Variable
from .evolve import Space

GAP = 1e-3
"""Least distance in lam between two calls."""
NOISE = 0.08
"""Spread of a moved level, as a part of the whole range (the released S3 search)."""
ORDERS = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}
"""How often an order is drawn (the released S3 search)."""
FIELD = 0.3
"""Chance that a field of a step changes."""
PREDICTIONS = tuple(FORM_OF)
VARIABLES: tuple[str, ...] = get_args(Variable)
CORRECTORS = ("none", "exact", "bh1", "bh2")


def fixed_samplers(path: Path, nfe: int, grids: Sequence[str] = GRIDS) -> dict[str, SolverPlan]:
    """Every deterministic sampler on every grid that costs ``nfe`` calls, and the recommended plan, as plans.

    >>> from fewstep.path import Straight
    >>> plans = fixed_samplers(Straight(), 4)
    >>> plans["recommended"].nfe, plans["dpm2m karras"].nfe, "heun karras" in plans
    (4, 4, False)
    """
    made = {"recommended": recommended(path, nfe)}
    for entry in SOLVERS:
        steps = None if entry.thing.stochastic else entry.thing.steps_for(nfe)
        for kind in grids if steps is not None else ():
            assert steps is not None
            times = grid(path, steps, kind)  # type: ignore[arg-type]
            solver = solver_named(entry.name)
            try:
                plan = decided(path, solver, times) if isinstance(solver, Engine) and steps == nfe else None
                plan = SolverPlan.of(path, solver, times) if plan is None else plan
            except ValueError:  # a level that no plan can name, or a guess read where it says nothing
                continue
            if plan.nfe == nfe and apart(path, plan):
                made[f"{entry.name} {kind}"] = plan
    return made


def variants(path: Path, nfe: int) -> list[SolverPlan]:
    """The recommended plan's levels, each with one rule at every step: none of them is a sampler that has a name.

    >>> from fewstep.path import Straight
    >>> len(variants(Straight(), 4)), len(variants(Straight(), 1))
    (20, 3)
    """
    plan, made = recommended(path, nfe), dict[str, SolverPlan]()
    for prediction, variable in (("x0", "lam"), ("x0", "tau"), ("eps", "lam"), ("flow", "lam"), ("flow", "tau")):
        for order in (2, 3):
            for corrector in ("none", "exact"):
                rule = StepPlan.model_validate(
                    {"order": order, "prediction": prediction, "variable": variable, "corrector": corrector}
                )
                one = plainly(plan.model_copy(update={"steps": (rule,) * nfe}))
                made[one.model_dump_json()] = one
    return list(made.values())


def decided(path: Path, solver: Engine, times: torch.Tensor) -> SolverPlan | None:
    """The plan of a solver that is a list of decisions, with its decisions as they are; None for another's times."""
    grid_ = tuple(times.tolist())
    state = solver.init(path, grid_)
    if state.inner is not state.stages and state.inner != state.stages:
        return None
    form = {value: key for key, value in FORM_OF.items()}
    steps = tuple(
        StepPlan(
            order=d.order, prediction=form[d.form], variable=d.variable, start=d.back,  # type: ignore[arg-type]
            corrector=d.corrector, relax=d.relax, churn=d.churn, weights=d.shares,
        )
        for d in solver.decide(path, state.inner)
    )  # fmt: skip
    lam = [stage.lam_t for stage in state.inner]
    levels = (None if grid_[0] == path.t_max else lam[0], *lam[1:])
    return SolverPlan(levels=levels, end=None if grid_[-1] == path.t_min else state.inner[-1].lam_s, steps=steps)


def lams(path: Path, plan: SolverPlan) -> list[float]:
    """lam of every call; pure noise counts as -7."""
    first = max(float(path.lam(path.t_max)), -7.0) if plan.levels[0] is None else plan.levels[0]
    return [first, *(lam for lam in plan.levels[1:] if lam is not None)]


def apart(path: Path, plan: SolverPlan) -> bool:
    """Whether no two calls of a plan stand at one level."""
    known = [*lams(path, plan), *([] if plan.end is None else [plan.end])]
    return all(b - a >= GAP for a, b in zip(known[:-1], known[1:], strict=True))


def plainly(plan: SolverPlan) -> SolverPlan:
    """The same sampler with every decision that changes nothing at its default: two names for it would cost twice."""
    steps = []
    for i, step in enumerate(plan.steps):
        change: dict[str, object] = {}
        corrector = "none" if i + 1 == plan.nfe and step.corrector == "exact" else step.corrector  # no guess at its end
        change["corrector"] = corrector
        nodes = min(step.order, i + 1)
        if step.weights is not None:
            change["order"] = 1
        else:
            change["order"] = nodes
        if corrector == "none" and (step.weights is not None or nodes == 1):
            change |= {"variable": "lam", "relax": 1.0}
        steps.append(step.model_copy(update=change))
    return plan.model_copy(update={"steps": tuple(steps)})


class PlanSpace(Space[SolverPlan]):
    """Plans of one number of calls on a path; ``only_levels`` leaves the rule of every step as it is.

    ``start``: what a search begins with, in place of every fixed sampler.
    """

    def __init__(
        self, path: Path, nfe: int, start: Sequence[SolverPlan] | None = None, *, only_levels: bool = False
    ) -> None:
        if nfe < 1:
            raise ValueError(f"a plan needs at least 1 call, got {nfe}")
        self.path, self.nfe, self.only_levels = path, nfe, only_levels
        begin = list(fixed_samplers(path, nfe).values()) if start is None else start
        self.start = [plainly(plan) for plan in begin]
        self.high = max(float(path.lam(path.t_max)), -7.0)
        self.low = float(path.lam(path.t_low))

    def seeds(self) -> list[SolverPlan]:
        return self.start

    def write(self, genome: SolverPlan) -> str:
        return genome.model_dump_json(exclude_defaults=True)

    def sound(self, genome: SolverPlan) -> bool:
        return genome.nfe == self.nfe and apart(self.path, genome)

    def features(self, genome: SolverPlan) -> list[float]:
        found = [(lam - self.high) / (self.low - self.high) for lam in lams(self.path, genome)[1:]]
        for i, step in enumerate(genome.steps):
            free = step.weights is not None
            found += [0.0 if free else min(step.order, i + 1), float(free), math.log(step.relax), float(step.start)]
            found += [float(step.prediction == name) for name in PREDICTIONS]
            found += [float(step.variable == name) for name in VARIABLES]
            found += [float(step.corrector == name) for name in CORRECTORS]
        return found

    def mutate(self, genome: SolverPlan, rng: random.Random) -> SolverPlan:
        levels, steps = lams(self.path, genome), list(genome.steps)
        if self.nfe > 2 and rng.random() < 0.2:  # a step less here, a step more there
            gone = rng.randrange(1, self.nfe)
            del levels[gone], steps[gone]
            at = rng.randrange(1, self.nfe)
            after = levels[at] if at < len(levels) else min(self.low, levels[-1] + 1.0)
            levels.insert(at, levels[at - 1] + rng.random() * (after - levels[at - 1]))
            steps.insert(at, steps[at - 1])
        size = rng.choice((0.1, 0.3, 1.0)) * NOISE * (self.low - self.high)
        for i in range(1, self.nfe):
            if rng.random() < FIELD:
                levels[i] += rng.gauss(0, size)
        if not self.only_levels:
            steps = [self._changed(step, i, rng) if rng.random() < FIELD else step for i, step in enumerate(steps)]
        return self._made(genome, levels, steps)

    def cross(self, one: SolverPlan, other: SolverPlan, rng: random.Random) -> SolverPlan:
        """The first steps of one plan and the last of another, or a plan between two."""
        a, b = lams(self.path, one), lams(self.path, other)
        if rng.random() < 0.5:
            part = rng.random()
            steps = [rng.choice(pair) for pair in zip(one.steps, other.steps, strict=True)]
            return self._made(one, [x + part * (y - x) for x, y in zip(a, b, strict=True)], steps)
        cut = rng.randrange(self.nfe + 1)
        return self._made(one, a[:cut] + b[cut:], [*one.steps[:cut], *other.steps[cut:]])

    def _changed(self, step: StepPlan, i: int, rng: random.Random) -> StepPlan:
        """One decision of a step, drawn anew."""
        change: dict[str, object] = {}
        match rng.choice(("order", "order", "prediction", "variable", "corrector", "relax", "start")):
            case "order":
                change = {"order": rng.choices(list(ORDERS), list(ORDERS.values()))[0], "weights": None}
            case "prediction":
                change = {"prediction": rng.choice(PREDICTIONS)}
            case "variable":
                change = {"variable": rng.choice(VARIABLES)}
            case "corrector":
                change = {"corrector": rng.choice(CORRECTORS)}
            case "relax":
                change = {"relax": math.exp(max(-1.0, min(1.0, math.log(step.relax) + rng.gauss(0, 0.2))))}
            case "start":
                change = {"start": min(rng.choice((0, 0, 1, 2)), i)}
        return step.model_copy(update=change)

    def _made(self, like: SolverPlan, levels: list[float], steps: Sequence[StepPlan]) -> SolverPlan:
        """A plan of sorted levels inside the path, with steps that fit their place."""
        inner = sorted(min(lam, self.low) for lam in levels[1:])
        if inner and inner[0] <= levels[0] or any(b <= a for a, b in zip(inner[:-1], inner[1:], strict=True)):
            return like  # known already: it costs nothing
        fitting = []
        for i, step in enumerate(steps):
            change: dict[str, object] = {"start": min(step.start, i)}
            if step.weights is not None and len(step.weights) > i + 1:
                change |= {"weights": None}
            if step.corrector in ("bh1", "bh2") and (step.prediction == "flow" or step.churn):
                change |= {"corrector": "exact"}
            fitting.append(StepPlan.model_validate({**step.model_dump(), **change}))
        return plainly(SolverPlan(levels=(like.levels[0], *inner), end=like.end, steps=tuple(fitting)))
