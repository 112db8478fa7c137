"""Conditions: nothing, a tensor, or a dictionary of tensors; always batch first."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import Refused

Cond = None | Tensor | dict[str, Tensor]


def rows(cond: Cond, index: Tensor | slice) -> Cond:
    """Some rows of a condition."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {key: value[index] for key, value in cond.items()}
    return cond[index]


def join(first: Cond, second: Cond) -> Cond:
    """Two conditions, one after the other along the batch."""
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: torch.cat([first[key], second[key]]) for key in first}
    raise ValueError(f"conditions of different kinds cannot be joined: {_kind(first)} and {_kind(second)}")


def move(cond: Cond, device: torch.device | str) -> Cond:
    """A condition on another device."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {key: value.to(device) for key, value in cond.items()}
    return cond.to(device)


def count(cond: Cond) -> int | None:
    """How many rows a condition has; None without a condition."""
    if cond is None:
        return None
    return len(next(iter(cond.values()))) if isinstance(cond, dict) else len(cond)


def part_of(cond: Cond, key: str) -> Tensor:
    """One tensor of a condition by its name; Refused where there is none of that name."""
    if not isinstance(cond, dict) or key not in cond:
        have = f"its parts are {', '.join(sorted(cond))}" if isinstance(cond, dict) else "it has no named parts"
        raise Refused(f"the condition has no {key!r}: {have}")
    return cond[key]


def _kind(cond: Cond) -> str:
    return f"keys {sorted(cond)}" if isinstance(cond, dict) else type(cond).__name__
