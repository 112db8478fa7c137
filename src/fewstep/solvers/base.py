"""The one sampling loop, and what a solver is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..cond import Cond
from ..errors import Refused
from ..grid import descending
from ..path import Path
from ..rng import Source

if TYPE_CHECKING:
    from .plan import SolverPlan


@dataclass(frozen=True)
class Stage:
    """One step's levels as plain floats: no look-up by value, no device sync."""

    t: float
    s: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    lam_t: float
    lam_s: float
    scale_t: float
    tau_t: float
    scale_s: float
    tau_s: float


@dataclass
class State:
    """What a solver carries: its stages, computed once, and the guesses it has seen."""

    path: Path
    times: tuple[float, ...]
    stages: tuple[Stage, ...]
    history: list[Tensor] = field(default_factory=list)

    @property
    def last(self) -> int:
        return len(self.stages) - 1


class Solver(ABC):
    """One step of a sampler; ``sample`` owns the loop."""

    name: ClassVar[str]
    order: ClassVar[int]
    stochastic: ClassVar[bool] = False

    def init(self, path: Path, times: tuple[float, ...]) -> State:
        """All coefficients of a grid, once, as plain floats computed in float64."""
        points = torch.tensor(times, dtype=torch.float64)
        coefs, lam = path.coefs(points), path.lam(points)
        scale, tau = path.frame(points)
        columns = [v.tolist() for v in (points, coefs.alpha, coefs.sigma, lam, scale, tau)]
        at = list(zip(*columns, strict=True))
        stages = tuple(
            Stage(t, s, at_, st, as_, ss, lt, ls, ct, tt, cs, ts)
            for (t, at_, st, lt, ct, tt), (s, as_, ss, ls, cs, ts) in zip(at[:-1], at[1:], strict=True)
        )
        return State(path, tuple(times), stages)

    @abstractmethod
    def step(
        self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None
    ) -> tuple[Tensor, State]: ...

    @classmethod
    @abstractmethod
    def steps_for(cls, nfe: int) -> int | None:
        """How many steps cost exactly ``nfe`` calls down to clean data; None where none does."""


def steps_of(solver: Solver, nfe: int) -> int:
    """The steps of a solver that cost exactly ``nfe`` calls; Refused, with the counts that work, where none do.

    >>> from fewstep.solvers import Heun
    >>> steps_of(Heun(), 5)
    3
    """
    steps = solver.steps_for(nfe) if nfe > 0 else None
    if steps is None:
        possible = [n for n in range(1, max(nfe, 0) + 9) if solver.steps_for(n)]
        near = sorted(sorted(possible, key=lambda n: abs(n - nfe))[:2])
        raise Refused(f"{solver.name} cannot make {nfe} calls of the network: take {' or '.join(map(str, near))}")
    return steps


def sample(
    model: Any,
    x: Tensor,
    times: Tensor | tuple[float, ...] | list[float] | SolverPlan,
    solver: Solver | None = None,
    *,
    cond: Cond = None,
    rng: Source | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Take x from ``times[0]`` to ``times[-1]``.

    ``x`` is the noisy sample itself at ``times[0]`` (see ``start_noise``), ``times`` descend, ``model`` is a
    denoiser; ``watch(i, x)`` sees each state. Guidance, clipping and counting wrap the model. A ``SolverPlan`` in
    place of times brings its own solver.
    """
    from .plan import SolverPlan

    if isinstance(times, SolverPlan):
        if solver is not None:
            raise ValueError("a plan brings its own solver: pass the plan alone")
        plan = times
        times, solver = plan.times(model.path), plan.solver()
    if solver is None:
        raise ValueError("times need a solver; a SolverPlan in their place brings its own")
    grid = tuple(descending(times).tolist())
    state = solver.init(model.path, grid)
    for i in range(len(grid) - 1):
        x, state = solver.step(model, x, i, state, cond, rng)
        if watch is not None:
            watch(i, x)
    return x


def start_noise(path: Path, t: float, noise: Tensor) -> Tensor:
    """Standard normal noise as the sample at the start of a grid: ``sigma noise``."""
    return float(path.coefs(t).sigma) * noise
