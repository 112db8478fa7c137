"""Precision, recall, density, coverage: what share of one sample lies in the neighbourhood of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Refused
from ..registry import Paper, metric
from ..rng import Source
from .base import Metric, Sample, Score, mean_score
from .distances import blocks, kth

KYNKAANNIEMI = Paper("1904.06991", "Improved Precision and Recall Metric for Assessing Generative Models", "P&R")
NAEEM = Paper("2002.09797", "Reliable Fidelity and Diversity Metrics for Generative Models", "D&C")


@dataclass(frozen=True)
class Manifold:
    """Per generated sample: inside some real ball, and inside how many; per real one: inside some generated
    ball, and whether some generated sample lies in its own."""

    precise: Tensor
    balls: Tensor
    recalled: Tensor
    covered: Tensor


def radii(sample: Sample, k: int) -> Tensor:
    """Distance of every sample to its k-th nearest other one: computed once for a sample."""
    if len(sample) <= k:
        raise Refused(f"{k} neighbours need at least {k + 1} samples, got {len(sample)}: pass fewer neighbours")
    if ("radii", k) not in sample.memo:
        sample.memo["radii", k] = kth(sample.features, k)
    found: Tensor = sample.memo["radii", k]
    return found


def manifold(fake: Sample, real: Sample, k: int = 5) -> Manifold:
    """All four questions from one pass over the distances; balls are closed and reach the k-th neighbour."""
    key = ("manifold", id(real), k)
    if key not in fake.memo:
        own, theirs = radii(fake, k), radii(real, k)
        precise, balls = torch.empty(len(fake), dtype=torch.bool), torch.empty(len(fake), dtype=torch.float64)
        recalled = torch.zeros(len(real), dtype=torch.bool)
        closest = torch.full((len(real),), torch.inf, dtype=torch.float64)
        for part, table in blocks(fake.features, real.features):
            inside = table <= theirs
            precise[part], balls[part] = inside.any(1), inside.sum(1).double()
            recalled |= (table <= own[part, None]).any(0)
            closest = torch.minimum(closest, table.min(0).values)
        fake.memo[key] = real, Manifold(precise, balls, recalled, closest <= theirs)  # held: an id is one's own in life
    found: Manifold = fake.memo[key][1]
    return found


@metric("precision", KYNKAANNIEMI)
class Precision(Metric):
    """Share of generated samples inside the k-nearest-neighbour balls of real ones: fidelity."""

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def __init__(self, k: int = 5) -> None:
        self.k = k

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        return mean_score(manifold(fake, real, self.k).precise, rng)


@metric("recall", KYNKAANNIEMI)
class Recall(Metric):
    """Share of real samples inside the k-nearest-neighbour balls of generated ones: variety.

    One far outlier has a large ball, which flatters; coverage does not have this fault.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def __init__(self, k: int = 5) -> None:
        self.k = k

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        return mean_score(manifold(fake, real, self.k).recalled, rng)


@metric("density", NAEEM)
class Density(Metric):
    """Real balls that hold a generated sample, over k: precision that counts crowding; about 1 between equals."""

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def __init__(self, k: int = 5) -> None:
        self.k = k

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        return mean_score(manifold(fake, real, self.k).balls / self.k, rng)


@metric("coverage", NAEEM)
class Coverage(Metric):
    """Share of real samples whose own ball holds a generated one: variety that outliers cannot flatter.

    Between two equal laws with equal counts it is about ``1 - 2^-k`` (.969 at k = 5).
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def __init__(self, k: int = 5) -> None:
        self.k = k

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        return mean_score(manifold(fake, real, self.k).covered, rng)
