"""Copying: generated samples that are too near to a training sample."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Refused
from ..registry import metric
from ..rng import Source
from .base import Metric, Sample, Score, mean_score
from .distances import nearest

QUANTILE = 0.05
WORK = 2.5e10
"""Products that one figure may cost: above that, evenly spaced samples stand for all."""


def to_train(sample: Sample, train: Tensor) -> Tensor:
    """Distance of samples to their nearest training sample, in the samples' own space; kept with them."""
    key = ("to_train", id(train))
    if key not in sample.memo:
        if sample.flat is None:
            raise Refused("copying is measured on the samples themselves: pass flat")
        flat = sample.flat
        most = max(500, int(WORK / train.numel()))
        if len(flat) > most:
            flat = flat[torch.linspace(0, len(flat) - 1, most).round().long()]
        exact = flat.shape[1] <= 8
        a, b = (flat.double(), train.double()) if exact else (flat.float(), train.float())
        sample.memo[key] = train, nearest(a, b)[0]  # held, so that its id stays its own
    found: Tensor = sample.memo[key][1]
    return found


@metric("copied")
class Copied(Metric):
    """Share of samples nearer to a training sample than the nearest 5 % of held-out real ones are.

    Distances are Euclidean on pixels (or coordinates). 0.05 is honest; much more is memorising. It does not
    see copies that are shifted or recoloured. ``real`` is held-out data and carries ``train``.
    """

    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        if real.train is None:
            raise Refused("copying needs the training samples: pass train with the real ones")
        limit = torch.quantile(to_train(real, real.train).double(), QUANTILE)
        return mean_score(to_train(fake, real.train).double() < limit, rng)
