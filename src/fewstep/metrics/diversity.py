"""Diversity: how far apart samples of one condition lie."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ..errors import Refused
from ..registry import metric
from ..rng import Source
from .base import Metric, Sample, Score, mean_score
from .distances import blocks


@metric("diversity")
class Diversity(Metric):
    """Mean distance between the features of two samples of the same label, over the same of real ones.

    1 is as varied as real data, 0 is one sample for each label. Without labels all samples are one group.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        if "apart" not in real.memo:
            real.memo["apart"] = float(apart(real).mean())
        return mean_score(apart(fake) / real.memo["apart"], rng)


def apart(sample: Sample) -> torch.Tensor:
    """Of every sample that has a peer: its mean distance to the others of its label."""
    labels = torch.zeros(len(sample)) if sample.labels is None else sample.labels
    means = []
    for label in labels.unique():
        group = sample.features[labels == label]
        for _, table in blocks(group, group) if len(group) > 1 else ():
            means.append(table.sum(1) / (len(group) - 1))
    if not means:
        raise Refused("diversity needs at least two samples of some label")
    return torch.cat(means)
