"""What a metric is: two samples in, a score with its spread and its count out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Refused
from ..rng import Rng, Source

BOOTSTRAP = 200
"""Rounds of a bootstrap: its own error is then a twentieth of the spread."""


@dataclass(frozen=True)
class Score:
    """A figure, its standard error (None where one sample cannot tell), and how many samples made it."""

    value: float
    spread: float | None
    count: int


class Sample:
    """Generated or real samples, as metrics see them.

    ``features`` are [n, d] and become float64. ``flat`` are the samples themselves [n, D]; ``train`` are the
    training samples [N, D] in the same form, for what asks about copying. ``labels`` were asked for,
    ``predicted`` were seen by the classifier: both [n]. Radii and distances that several metrics share are
    computed once and kept in ``memo``.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        flat: Tensor | None = None,
        labels: Tensor | None = None,
        predicted: Tensor | None = None,
        train: Tensor | None = None,
    ) -> None:
        if features.ndim != 2:
            raise Refused(f"features are [samples, width], got shape {list(features.shape)}")
        for name, value in (("flat", flat), ("labels", labels), ("predicted", predicted)):
            if value is not None and len(value) != len(features):
                raise Refused(f"{len(features)} rows of features but {len(value)} of {name}")
        self.features = features.double()
        self.flat = None if flat is None else flat.flatten(1)
        self.train = None if train is None else train.flatten(1)
        self.labels, self.predicted = labels, predicted
        self.memo: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.features)


class Metric(ABC):
    """``metric(fake, real, rng) -> Score``; ``rng`` is behind every resampling and every random direction."""

    name: ClassVar[str]
    better: ClassVar[Literal["lower", "higher"]]

    @abstractmethod
    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score: ...


def generator(rng: Source) -> torch.Generator:
    return rng.generator if isinstance(rng, Rng) else rng


def mean_score(values: Tensor, rng: Source) -> Score:
    """The mean of one number a sample, with its bootstrap standard error.

    >>> mean_score(torch.ones(10), torch.Generator().manual_seed(0))
    Score(value=1.0, spread=0.0, count=10)
    """
    values = values.double()
    pick = torch.randint(len(values), (BOOTSTRAP, len(values)), generator=generator(rng))
    spread = float(values[pick].mean(1).std(correction=0))
    return Score(float(values.mean()), spread, len(values))
