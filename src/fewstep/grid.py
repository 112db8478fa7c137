"""Time grids: descending times from noise to data, the last one clean."""

from __future__ import annotations

from typing import Literal, get_args

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
) -> Tensor:
    """``steps + 1`` descending times in float64: the first is ``high``, the last ``path.t_min``.

    ``uniform``: even in t. ``quadratic``: t runs as a square, dense near the data (DDIM's).
    ``karras``: sigma / alpha as a power ``rho`` between ``high`` and ``low`` (EDM eq. 5), then clean.
    ``logsnr``: even in log-SNR between the same ends, then clean (DPM-Solver). ``trailing``: even in the
    index of a thousand-step table, counted from its end (Lin et al. 2023, Table 2). ``low`` and ``high``
    are times; None takes the path's ``t_low`` and ``t_max``.

    >>> from fewstep.path import Exploding
    >>> [round(t, 3) for t in grid(Exploding(sigma_min=0.02, sigma_max=20.0), 3).tolist()]
    [20.0, 1.435, 0.02, 0.0]

    Raises ValueError for fewer than one step, or an unknown kind.
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
    return descending(times)


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
