"""Kernel distance: the unbiased squared maximum mean discrepancy of features."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Refused
from ..registry import Paper, metric
from ..rng import Source
from .base import Metric, Sample, Score
from .distances import BLOCK


def row_sums(a: Tensor, b: Tensor, same: bool) -> tuple[Tensor, Tensor]:
    """Sums of ``k(a_i, b_j) = (a_i . b_j / d + 1)^3`` over rows and over columns; ``same`` leaves i = j out."""
    d = a.shape[1]
    over_b, over_a = a.new_empty(len(a)), b.new_zeros(len(b))
    rows = max(1, BLOCK // len(b))
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        base = a[part] @ b.T / d + 1
        table = base * base * base
        if same:
            table[torch.arange(len(table)), torch.arange(start, start + len(table))] = 0
        over_b[part] = table.sum(1)
        over_a += table.sum(0)
    return over_b, over_a


@metric("kernel", Paper("1801.01401", "Demystifying MMD GANs", "KID"))
class Kernel(Metric):
    """Polynomial kernel distance, unbiased: its mean is 0 between equal laws, at any count; lower is better.

    The full U-statistic ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` over all pairs of different
    samples (often averaged over random subsets instead, which only adds noise). The spread is the jackknife's
    over both samples.
    """

    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        m, n = len(fake), len(real)
        if min(m, n) < 3:
            raise Refused(f"a kernel distance with a spread needs at least 3 samples of each, got {m} and {n}")
        if "kernel" not in real.memo:
            real.memo["kernel"] = row_sums(real.features, real.features, same=True)[0]
        yy = real.memo["kernel"]
        xx, _ = row_sums(fake.features, fake.features, same=True)
        xy, yx = row_sums(fake.features, real.features, same=False)
        value = xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.sum() / (m * n)
        without_x = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (xy.sum() - xy) / ((m - 1) * n)
        without_y = (yy.sum() - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (xy.sum() - yx) / ((n - 1) * m)
        variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
        return Score(float(value), math.sqrt(float(variance)), m)
