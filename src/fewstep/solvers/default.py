"""The sampler to use where nothing is known but the path and the number of calls."""

from __future__ import annotations

import math

from ..path import Path
from .plan import SolverPlan, StepPlan

HIGHEST_ORDER = 4


def recommended(path: Path, nfe: int) -> SolverPlan:
    """The recommended plan for a path and a number of calls: no search, no knowledge of the data.

    It integrates ``eps - x0`` as a polynomial in ``tau = sigma / (alpha + sigma)``: finite from pure noise to clean
    data, so that no step is special, the last one included. While there is more noise than signal, each step is
    corrected by the guess at its end; below, where guidance makes the flow stiff and a corrected step unstable, none
    is. The order rises with the logarithm of the calls, and is the higher one while steps are corrected. Levels are
    even in ``log(r / (1 + r / knee))``, ``r = sigma / alpha``, from the path's noisiest to a lowest one: see
    ``placement``. The few constants were chosen once, on mixtures in 2 and 64 dimensions with and without guidance
    (``docs/solvers.md``).

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
    orders = max(2, int(1.35 * math.log2(nfe)))  # of both stretches together
    noisy = StepPlan(
        order=min(HIGHEST_ORDER, orders - orders // 2), prediction="flow", variable="tau", corrector="exact"
    )
    clear = StepPlan(order=min(HIGHEST_ORDER, orders // 2), prediction="flow", variable="tau")
    steps = tuple(noisy if r > 1 else clear for r in (top, *ratios))
    return SolverPlan(levels=(None, *(-math.log(r) for r in ratios)), steps=steps)


def placement(top: float, nfe: int) -> list[float]:
    """sigma / alpha at each call after the first, which is at ``top``, the path's noisiest.

    Above the knee levels thin out: up there a guess is the data's mean and hardly changes. The fewer the calls, the
    higher the knee and the lowest level, and the more of the noisiest part the first step crosses at once: three calls
    must stand where the data's modes part, fifty may also look at what is small.
    """
    knee = 4 + 40 / nfe
    lowest = min(0.044, 0.75 / nfe) + 0.11 * max(0, 5.3 - nfe) * (1 + 6 / top)
    lowest = min(lowest, top / 2)
    first, last = (math.log(knee) if math.isinf(r) else math.log(r / (1 + r / knee)) for r in (top, lowest))
    ahead = 2.5 * (3 / nfe) ** 6  # steps that the first one is longer by
    made = []
    for k in range(1, nfe):
        bent = math.exp(first + (last - first) * (k + ahead) / (nfe - 1 + ahead))
        made.append(bent / (1 - bent / knee))
    return made
