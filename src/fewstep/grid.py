"""Time grids: descending times from noise to data, the last one clean."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .path import Path, karras_time

GridKind = Literal["uniform", "karras", "logsnr", "trailing", "quadratic"]
GRIDS: tuple[str, ...] = get_args(GridKind)


def grid(
    path: Path,
    steps: int,
    kind: GridKind = "karras",
    *,
    rho: float = 7.0,
    low: float | None = None,
    high: float | None = None,
    shift: float = 1.0,
) -> Tensor:
    """``steps + 1`` descending times in float64: the first is ``high``, the last ``path.t_min``.

    ``uniform``: even in t. ``quadratic``: t runs as a square, dense near the data (DDIM's).
    ``karras``: sigma / alpha as a power ``rho`` between ``high`` and ``low`` (EDM eq. 5), then clean.
    ``logsnr``: even in log-SNR between the same ends, then clean (DPM-Solver). ``trailing``: even in the
    index of a thousand-step table, counted from its end (Lin et al. 2023, Table 2). ``low`` and ``high``
    are times; None takes the path's ``t_low`` and ``t_max``. ``shift`` moves every grid to higher noise once, its ends
    held: ``u -> shift u / (1 + (shift - 1) u)`` in the straight time relative to the first (Esser et al. 2024, eq. 23).

    >>> from fewstep.path import Exploding
    >>> [round(t, 3) for t in grid(Exploding(sigma_min=0.02, sigma_max=20.0), 3).tolist()]
    [20.0, 1.435, 0.02, 0.0]

    Raises ValueError for fewer than one step, a shift that is not positive, or an unknown kind.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    top = path.t_max if high is None else high
    bottom = path.t_low if low is None else low
    span = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    match kind:
        case "uniform":
            times = path.t_min + (top - path.t_min) * span
        case "quadratic":
            times = path.t_min + (top - path.t_min) * span**2
        case "trailing":
            times = path.t_min + (top - path.t_min) * torch.round(1000 * span) / 1000
        case "karras" | "logsnr":
            inner = (
                torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)
            )
            if kind == "karras":
                times = karras_time(path, inner, rho, bottom, top)
            else:
                ends = path.lam(karras_time(path, torch.tensor([0.0, 1.0]), rho, bottom, top))
                times = path.time(ends[0] + inner * (ends[1] - ends[0]))
            times = torch.cat([times, times.new_tensor([path.t_min])])
            times[0] = top  # exact, where the level was cut because no signal is left
        case _:
            raise ValueError(f"unknown grid {kind!r}: one of {', '.join(GRIDS)}")
    return descending(times if shift == 1 else shifted(path, times, shift))


def shifted(path: Path, times: Tensor, shift: float) -> Tensor:
    """A grid moved to higher noise, its ends held; once: a shifted grid is not shifted again by its solver.

    >>> from fewstep.path import Straight
    >>> [round(t, 3) for t in grid(Straight(), 4, "uniform", shift=3.0).tolist()]
    [1.0, 0.9, 0.75, 0.5, 0.0]
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"a shift is a positive number, got {shift}")
    top = path.straight(times[0])
    part = path.straight(times) / top
    tau = top * shift * part / (1 + (shift - 1) * part)
    moved = path.at_straight(tau)
    moved[0], moved[-1] = times[0], times[-1]
    return moved


def descending(times: Tensor | tuple[float, ...] | list[float]) -> Tensor:
    """The times as a float64 tensor, checked to fall strictly."""
    values = torch.as_tensor(times, dtype=torch.float64)
    if values.ndim != 1 or values.numel() < 2:
        raise ValueError(f"a grid is a list of at least 2 times, got shape {tuple(values.shape)}")
    rising = (~(values[1:] < values[:-1])).nonzero()  # so written that no-number rises too
    if rising.numel():
        i = int(rising[0])
        raise ValueError(f"grid must descend, got {values[i].item():.6g} then {values[i + 1].item():.6g}")
    return values


def even_steps(path: Path, start: float | None, counts: tuple[int, ...]) -> dict[str, Any]:
    """A student's start and, for each step count, times that are even on the straight path.

    >>> from fewstep.path import Straight
    >>> [round(t, 9) for t in even_steps(Straight(), None, (1, 4))["steps"][4]]
    [1.0, 0.75, 0.5, 0.25]
    """
    top = path.t_max if start is None else start
    whole = path.straight(top)
    steps: dict[int, tuple[float, ...]] = {}
    for count in counts:
        tau = whole * torch.arange(count - 1, 0, -1, dtype=torch.float64) / count
        steps[count] = (top, *path.at_straight(tau).tolist())
    return {"start": top, "steps": steps}
