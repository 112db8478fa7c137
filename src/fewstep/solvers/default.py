"""The sampler to use where nothing is known but the path and the number of calls."""

from __future__ import annotations

import math

from ..path import Path
from .plan import SolverPlan, StepPlan

ORDERS = ((48, 4, 4), (24, 3, 3), (12, 3, 2), (8, 2, 2), (1, 1, 1))
"""From so many calls on: the order of corrected steps, and the order below."""
CORRECTED = 0.42
"""Steps that end at a higher sigma / alpha are corrected."""


def recommended(path: Path, nfe: int) -> SolverPlan:
    """The recommended plan for a path and a number of calls: no search, no knowledge of the data.

    It integrates ``eps - x0`` as a polynomial in ``tau = sigma / (alpha + sigma)``: finite from pure noise to clean
    data, so that no step is special, the last one included. Steps in the noise, where the data's modes part, are
    corrected by the guess at their end; steps below are not, for there guidance makes the flow stiff and a corrected
    step unstable. The order rises with the calls, slowly: under guidance a high order in long steps throws samples far
    out. Levels are even in ``log(r / (1 + r / knee))``, ``r = sigma / alpha``: see ``placement``. The few constants
    were chosen once, on mixtures in 2, 16 and 64 dimensions with and without guidance (``docs/solvers.md``).

    Raises ValueError for fewer than one call.

    >>> from fewstep.path import Straight
    >>> recommended(Straight(), 4).nfe
    4
    """
    if nfe < 1:
        raise ValueError(f"a plan needs at least 1 call, got {nfe}")
    coefs = path.coefs(path.t_max)
    top = math.inf if float(coefs.alpha) < 1e-6 else float(coefs.sigma / coefs.alpha)
    ratios = placement(top, nfe)
    above, below = next(pair for least, *pair in ORDERS if nfe >= least)
    noisy = StepPlan(order=above, prediction="flow", variable="tau", corrector="exact")
    clear = StepPlan(order=below, prediction="flow", variable="tau")
    steps = tuple(noisy if r > CORRECTED else clear for r in (*ratios, 0.0))  # r: where the step ends
    return SolverPlan(levels=(None, *(-math.log(r) for r in ratios)), steps=steps)


def placement(top: float, nfe: int) -> list[float]:
    """sigma / alpha at each call after the first, which is at ``top``, the path's noisiest.

    Above the knee levels thin out: up there a guess is the data's mean and hardly changes. The fewer the calls, the
    higher the knee and the lowest level: three calls must stand where the data's modes part, fifty may also look at
    what is small.
    """
    knee = 4 + 40 / nfe
    lowest = min(0.044, 0.75 / nfe) + 0.11 * max(0, 5.3 - nfe) * (1 + 6 / top)
    lowest = min(lowest, top / 2)
    first, last = (math.log(knee) if math.isinf(r) else math.log(r / (1 + r / knee)) for r in (top, lowest))
    made = []
    for k in range(1, nfe):
        bent = math.exp(first + (last - first) * k / (nfe - 1))
        made.append(bent / (1 - bent / knee))
    return made
