"""A sampler as data: every level and every decision of each step, in a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from ..cond import Cond
from ..denoiser import Denoiser
from ..errors import Refused
from ..grid import descending
from ..nets.skipping import leaving_out
from ..part import Part
from ..path import Path, Time
from ..rng import Source
from .base import Solver, Stage, State
from .engine import Corrector, Decision, Engine
from .weights import Form, Variable

FORM_OF: dict[str, Form] = {"x0": "data", "eps": "noise", "flow": "flow"}


class StepPlan(Part):
    """How one step is taken; see ``engine.Decision``."""

    order: int = Field(1, ge=1, le=6, description="guesses in the polynomial; fewer while fewer are known")
    prediction: Literal["x0", "eps", "flow"] = Field("x0", description="what is interpolated")
    variable: Variable = Field("lam", description="what it is a polynomial in")
    start: int = Field(0, ge=0, le=4, description="levels back at which the step starts: 0 is a multistep rule")
    corrector: Corrector = Field("none", description="whether the next guess corrects the step, at no further call")
    relax: float = Field(1.0, gt=0, le=4, description="factor on the first-derivative term")
    churn: float = Field(0.0, ge=0, le=4, description="strength of fresh noise; x0 alone")
    weights: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="weights of the guesses, newest first, over the weight of a guess that never changes; in place of "
        "the polynomial, and for any number of guesses",
    )
    skip: tuple[str, ...] = Field((), description="blocks of the network that this step's call leaves out")

    @model_validator(mode="after")
    def _fits(self) -> StepPlan:
        if self.churn and self.prediction != "x0":
            raise ValueError(f"fresh noise needs prediction 'x0', got {self.prediction!r}")
        if self.corrector in ("bh1", "bh2") and (self.prediction == "flow" or self.churn):
            raise ValueError(f"corrector {self.corrector!r} is for 'x0' and 'eps' without noise: 'exact' is for all")
        if self.weights is not None and not all(map(math.isfinite, self.weights)):
            raise ValueError("weights must be finite")
        return self

    @property
    def decision(self) -> Decision:
        return Decision(
            FORM_OF[self.prediction],
            self.variable,
            self.order if self.weights is None else len(self.weights),
            self.start,
            self.corrector,
            self.relax,
            self.churn,
            self.weights,
        )


class SolverPlan(Part):
    """Where the network is asked, in ``lam = log(alpha / sigma)``, and how each step is taken.

    A plan belongs to noise levels, not to a path's clock: one file serves every path that reaches its levels.

    >>> plan = SolverPlan(levels=(None, 0.0), steps=(StepPlan(), StepPlan(order=2, variable="tau")))
    >>> from fewstep.path import Straight
    >>> plan.times(Straight())
    (1.0, 0.5, 0.0)
    >>> SolverPlan.model_validate_json(plan.model_dump_json()) == plan
    True
    """

    version: Literal[1] = 1
    levels: tuple[float | None, ...] = Field(
        min_length=1, max_length=1000, description="rising lam of each call; null at the first: the path's noisiest"
    )
    end: float | None = Field(None, description="lam where the plan ends; null: clean data")
    steps: tuple[StepPlan, ...] = Field(min_length=1, description="one for each call")

    @model_validator(mode="after")
    def _fits(self) -> SolverPlan:
        if len(self.levels) != len(self.steps):
            raise ValueError(f"{len(self.levels)} levels for {len(self.steps)} steps")
        if None in self.levels[1:]:
            raise ValueError("only the first level may be null")
        known = [lam for lam in (*self.levels, self.end) if lam is not None]
        if not all(map(math.isfinite, known)):
            raise ValueError("levels must be finite; null stands for the noisiest and for clean data")
        for low, high in zip(known[:-1], known[1:], strict=True):
            if not low < high:
                raise ValueError(f"levels must rise, got {low:.6g} then {high:.6g}")
        for i, step in enumerate(self.steps):
            if step.start > i:
                raise ValueError(f"step {i} cannot start {step.start} levels back")
            if step.weights is not None and len(step.weights) > i + 1:
                raise ValueError(f"step {i} has {len(step.weights)} weights and {i + 1} guesses")
        return self

    @property
    def nfe(self) -> int:
        """Calls of the network."""
        return len(self.levels)

    @classmethod
    def of(cls, path: Path, solver: Solver, times: Tensor | Sequence[float]) -> SolverPlan:
        """The plan that does what a deterministic solver does on a grid, in one form: x0 and free weights.

        A deterministic solver without thresholds is linear in its start and in the network's guesses. So it is asked
        what it makes of unit vectors in their place, and that is all there is to it; a plan in its turn is read the
        same way (``plan.solver(), plan.times(path)``). Levels that are asked twice (Heun's) are moved 0.002 apart in
        lam. Raises ValueError for a solver that draws noise, or that keeps another share of its start's noise than
        the level's.

        >>> from fewstep.path import Straight
        >>> from fewstep.solvers import Euler
        >>> SolverPlan.of(Straight(), Euler(), (1.0, 0.5, 0.0)).steps[1].weights
        (1.0, 0.0)
        """
        if solver.stochastic:
            raise ValueError(f"{solver.name} draws noise: a plan of it cannot be read off")
        if isinstance(solver, Planned) and any(step.skip for step in solver.plan.steps):
            bare = solver.plan.skipping([()] * solver.plan.nfe)
            return cls.of(path, bare.solver(), times).skipping([step.skip for step in solver.plan.steps])
        grid = tuple(descending(times if isinstance(times, Tensor) else tuple(times)).tolist())
        probe = _Probe(path)
        state = solver.init(path, grid)
        x = probe.start(4 * len(grid) + 4)
        for i in range(len(grid) - 1):
            x, state = solver.step(probe, x, i, state, None, None)
        count = len(probe.times)
        rows = torch.stack([*probe.rows, x[0]])[:, : count + 1]
        return _canonical(path, (*probe.times, grid[-1]), rows)

    def skipping(self, blocks: Sequence[Sequence[str]]) -> SolverPlan:
        """The same plan, whose calls leave out these blocks of the network, in place of those it left out before."""
        steps = zip(self.steps, blocks, strict=True)
        return self.model_copy(update={"steps": tuple(s.model_copy(update={"skip": tuple(b)}) for s, b in steps)})

    def times(self, path: Path) -> tuple[float, ...]:
        """The descending times on a path; ValueError where the path does not reach a level."""
        made = []
        for lam in self.levels:
            t = path.t_max if lam is None else float(path.time(lam))
            if lam is not None and abs(float(path.lam(t)) - lam) > 1e-6 * max(1.0, abs(lam)):
                raise ValueError(f"{type(path).__name__} does not reach the plan's level lam = {lam:.6g}")
            made.append(t)
        return (*made, path.t_min if self.end is None else float(path.time(self.end)))

    def solver(self) -> Solver:
        """The sampler that follows this plan."""
        return Planned(self)

    def save(self, file: str | File) -> None:
        """Write the plan, whole or not at all."""
        target = File(file)
        part = target.with_name(f".{target.name}.part")
        part.write_text(self.model_dump_json(indent=1, exclude_defaults=False) + "\n", encoding="utf-8")
        part.replace(target)

    @classmethod
    def load(cls, file: str | File) -> SolverPlan:
        """Read a plan; Refused, with the reason, where the file is not one."""
        try:
            text = File(file).read_text(encoding="utf-8")
            version = json.loads(text).get("version", 1)
        except OSError as error:
            raise Refused(f"cannot read the plan {file}: {error.strerror or error}") from None
        except (ValueError, AttributeError, RecursionError):
            raise Refused(f"{file} is not a plan: a JSON object with 'levels' and 'steps' would be") from None
        if version != 1:
            raise Refused(f"{file} is a plan of version {version!r}: this fewstep reads version 1")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "plan"
            raise Refused(f"{file} is not a plan: {place}: {first['msg']}") from None


APART = 2e-3
"""In lam, between two calls of a plan that was read off a solver which asks a level twice."""


class _Probe(Denoiser):
    """A denoiser whose k-th guess of x0 is the k-th unit vector; it remembers where and on what it was asked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.times, self.rows = path, list[float](), list[Tensor]()

    def start(self, most: int) -> Tensor:
        self.basis = torch.eye(most, dtype=torch.float64)
        return self.basis[:1].clone()

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Tensor:
        self.times.append(float(t))
        self.rows.append(x[0].clone())
        guess = self.basis[len(self.times)].unsqueeze(0)
        return self.path.convert(guess, x, float(t), "x0", want)


def _canonical(path: Path, times: tuple[float, ...], rows: Tensor) -> SolverPlan:
    """The plan whose sample at call k is ``rows[k]`` of (start, first guess, second guess, ...)."""
    points = torch.tensor(times, dtype=torch.float64)
    coefs, lam = path.coefs(points), path.lam(points)
    alpha, sigma, asked = coefs.alpha.tolist(), coefs.sigma.tolist(), lam.tolist()
    if not torch.allclose(rows[:, 0], coefs.sigma / sigma[0], rtol=1e-6, atol=1e-9):
        raise ValueError("the solver keeps another share of its start's noise than a level has: it is no plan")
    placed = [*asked]
    for k in range(1, len(times) - 1):
        if placed[k] - placed[k - 1] < APART:
            placed[k] = placed[k - 1] + APART
            moved = path.coefs(path.time(placed[k]))
            share = (alpha[k] - alpha[0] * sigma[k] / sigma[0]) or 1.0
            alpha[k], sigma[k] = float(moved.alpha), float(moved.sigma)
            rows[k] *= (alpha[k] - alpha[0] * sigma[k] / sigma[0]) / share
    steps = []
    for k in range(len(times) - 1):
        keep = sigma[k + 1] / sigma[k]
        weights = (rows[k + 1] - keep * rows[k])[1 : k + 2] / (alpha[k + 1] - alpha[k] * keep)
        steps.append(StepPlan(weights=tuple(weights.flip(0).tolist())))
    levels = (None if times[0] == path.t_max else placed[0], *placed[1:-1])
    return SolverPlan(levels=levels, end=None if times[-1] == path.t_min else placed[-1], steps=tuple(steps))


class Planned(Engine):
    """The sampler of a plan."""

    name = "plan"
    order = 0

    def __init__(self, plan: SolverPlan) -> None:
        self.plan = plan
        self.order = max(step.decision.order for step in plan.steps)  # type: ignore[misc]
        self.stochastic = any(step.churn for step in plan.steps)  # type: ignore[misc]

    def decide(self, path: Path, stages: tuple[Stage, ...]) -> tuple[Decision, ...]:
        if len(stages) != self.plan.nfe:
            raise ValueError(f"the plan has {self.plan.nfe} steps, the grid {len(stages)}")
        return tuple(step.decision for step in self.plan.steps)

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        skip = self.plan.steps[i].skip
        if not skip:
            return super().step(model, x, i, state, cond, rng)
        with leaving_out(model, skip):
            return super().step(model, x, i, state, cond, rng)
