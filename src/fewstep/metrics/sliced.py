"""Sliced Wasserstein distance, for few dimensions."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import Paper, metric
from ..rng import Source
from .base import Metric, Sample, Score, generator, mean_score

DIRECTIONS = 128


def sliced_squares(a: Tensor, b: Tensor, rng: Source, directions: int = DIRECTIONS) -> Tensor:
    """Squared 2-Wasserstein distances of the projections on random unit directions: [directions]."""
    line = torch.randn(a.shape[1], directions, generator=generator(rng), dtype=torch.float64)
    line = line / line.norm(dim=0)
    p, q = (a.double() @ line).sort(0).values, (b.double() @ line).sort(0).values
    if len(p) != len(q):  # quantile functions are steps: compare them on a grid that both divide evenly
        level = (torch.arange(max(len(p), len(q)), dtype=torch.float64) + 0.5) / max(len(p), len(q))
        p, q = (v[(level * len(v)).long()] for v in (p, q))
    return (p - q).square().mean(0)


@metric("sliced", Paper("1902.00434", "Generalized Sliced Wasserstein Distances", "SW"))
class Sliced(Metric):
    """Sliced 2-Wasserstein distance: the root of the mean squared transport along 128 random lines.

    In data units, so 0.05 means a twentieth of a unit. Meant for few dimensions.
    """

    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        square = mean_score(sliced_squares(fake.features, real.features, rng), rng)
        value = math.sqrt(square.value)
        spread = (square.spread or 0.0) / (2 * value) if value else 0.0
        return Score(value, spread, len(fake))
