"""A sampler as data: every level and every decision of each step, in a JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path as File
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from ..cond import Cond
from ..errors import Refused
from ..nets.skipping import leaving_out
from ..part import Part
from ..path import Path
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
        None, min_length=1, max_length=6, description="weights of the guesses, newest first, as fractions of their sum"
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
