"""Condition accuracy: does the classifier see the class that was asked for?"""

from __future__ import annotations

from typing import ClassVar, Literal

from ..errors import Refused
from ..registry import metric
from ..rng import Source
from .base import Metric, Sample, Score, mean_score


@metric("accuracy")
class Accuracy(Metric):
    """Share of samples in which the measuring classifier sees the label that was asked for."""

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        if fake.labels is None or fake.predicted is None:
            raise Refused("accuracy needs the labels asked for and those that a classifier saw")
        return mean_score(fake.labels == fake.predicted, rng)
