"""Distances between many points in little memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**24
"""Entries of one block of a distance matrix: 128 MB in float64."""


def blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix of distances between a [n, d] and b [m, d], block by block."""
    rows = max(1, BLOCK // max(1, len(b)))
    for start in range(0, len(a), rows):
        where = slice(start, start + rows)
        yield where, distance(a[where], b)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [n, m]. In few dimensions by differences, which keep small distances exact."""
    few = a.shape[1] <= 8
    mode = "donot_use_mm_for_euclid_dist" if few else "use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=mode)


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For every row of a: the distance to the nearest row of b, and that row's number."""
    found, where = a.new_empty(len(a)), torch.empty(len(a), dtype=torch.long)
    for part, table in blocks(a, b):
        found[part], where[part] = table.min(1)
    return found, where


def kth(a: Tensor, k: int) -> Tensor:
    """For every row of a: the distance to its k-th nearest other row."""
    found = a.new_empty(len(a))
    for part, table in blocks(a, a):
        found[part] = table.kthvalue(k + 1, 1).values  # the nearest is the row itself
    return found
