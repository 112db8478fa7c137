"""The sampler to use where nothing is known but the path and the number of calls."""

from __future__ import annotations

import math

from ..path import Path
from .plan import SolverPlan, StepPlan

KNEE = 3.0
"""sigma / alpha above which levels thin out: up there a guess is the data's mean and hardly changes."""


def recommended(path: Path, nfe: int) -> SolverPlan:
    """The recommended plan for a path and a number of calls: no search, no knowledge of the data.

    It integrates ``eps - x0`` as a polynomial in ``tau = sigma / (alpha + sigma)``, each step corrected by the guess at
    its end. This form is finite from pure noise to clean data, so that no step is special, the last one included.
    Levels are even in ``log(r / (1 + r / KNEE))``, ``r = sigma / alpha``, from the path's noisiest to a lowest level
    that falls with the number of calls.

    >>> from fewstep.path import Straight
    >>> recommended(Straight(), 4).nfe
    4
    """
    if nfe < 1:
        raise ValueError(f"a plan needs at least 1 call, got {nfe}")
    coefs = path.coefs(path.t_max)
    top = math.inf if float(coefs.alpha) < 1e-6 else float(coefs.sigma / coefs.alpha)
    first, last = math.log(KNEE if math.isinf(top) else top / (1 + top / KNEE)), math.log(lowest(nfe))
    last -= math.log1p(lowest(nfe) / KNEE)
    levels: list[float | None] = [None]
    for k in range(1, nfe):
        bent = math.exp(first + (last - first) * k / (nfe - 1))
        levels.append(math.log1p(-bent / KNEE) - math.log(bent))
    steps = tuple(StepPlan(order=2, prediction="flow", variable="tau", corrector="exact") for _ in range(nfe))
    return SolverPlan(levels=tuple(levels), steps=steps)


def lowest(nfe: int) -> float:
    """sigma / alpha at the last call."""
    return 0.05
