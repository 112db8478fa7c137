"""What a search makes small, and the fixed starts on which it looks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..metrics.frechet import Moments, frechet_distance
from ..solvers import SolverPlan, recommended, sample
from .gradient import Pairs

FINE = 48
"""Calls of the fine solution. Networks are rough in time, so that many more only follow that."""


class Objective(ABC):
    """``objective(samples, pairs) -> number``, lower is better.

    Samples [n, *shape] are ends of a plan from the starts of ``pairs``. ``smooth``: it is the squared distance to the
    ends in a disguise, so that a fit by gradient serves it.
    """

    name: str
    smooth: bool = False

    @abstractmethod
    def __call__(self, samples: Tensor, pairs: Pairs) -> float: ...


class Distance(Objective):
    """Root mean square distance to the end of the exact flow from the same start, over the spread of the ends."""

    name, smooth = "distance", True

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, samples: Tensor, pairs: Pairs) -> float:
        return math.sqrt(float((samples - pairs.ends).double().square().mean())) / self.std


class FrechetTo(Objective):
    """Fréchet distance of features to those of reference samples: of the fine solution, or of data.

    No part of it is the network that measures: that would be teaching to the test.
    """

    name = "frechet"

    def __init__(self, features: Callable[[Tensor], Tensor], reference: Tensor) -> None:
        self.features, self.reference = features, Moments.of(features(reference))

    def __call__(self, samples: Tensor, pairs: Pairs) -> float:
        if not samples.isfinite().all():
            return math.inf
        return float(frechet_distance(Moments.of(self.features(samples)), self.reference))


class Scorer(Objective):
    """A function of one's own: ``scorer(samples, cond)`` gives a number, or one for each sample; lower is better."""

    def __init__(self, function: Callable[..., Any], name: str, finish: Callable[[Tensor], Tensor]) -> None:
        self.function, self.name, self.finish = function, name, finish

    def __call__(self, samples: Tensor, pairs: Pairs) -> float:
        found = torch.as_tensor(self.function(self.finish(samples), pairs.cond), dtype=torch.float64)
        if found.ndim > 1 or found.ndim == 1 and len(found) != len(samples):
            raise ValueError(
                f"{self.name} gave shape {list(found.shape)}: one number, or one for each sample, is asked for"
            )
        return float(found.mean())


class Judge:
    """Scores plans on the first starts of a fixed set, so that every plan meets the same ones.

    Starts are taken ``batch`` at a time; on a CPU the batches are spread over torch's threads, one each, which changes
    no result.
    """

    def __init__(self, model: Denoiser, pairs: Pairs, objective: Objective, batch: int = 64) -> None:
        self.model, self.pairs, self.objective, self.batch = model, pairs, objective, batch

    def __call__(self, plan: SolverPlan, count: int | None = None) -> float:
        pairs = self.pairs if count is None else self.pairs.rows(slice(0, count))
        return self.objective(ends(self.model, plan, pairs, self.batch), pairs)


def ends(model: Denoiser, plan: SolverPlan, pairs: Pairs, batch: int = 64) -> Tensor:
    """Where a plan takes the starts."""

    def run(part: Pairs) -> Tensor:
        with torch.no_grad():
            return sample(model, part.x, plan, cond=part.cond)

    parts = [pairs.rows(slice(at, at + batch)) for at in range(0, len(pairs), batch)]
    return torch.cat(list(side_by_side(run, parts, pairs.x.device)))


def side_by_side(run: Callable[[Pairs], Tensor], parts: Sequence[Pairs], device: torch.device) -> Sequence[Tensor]:
    """The results of independent batches; on a CPU several at a time, each on one thread."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(parts) == 1:
        return [run(part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, parts))
    finally:
        torch.set_num_threads(threads)


def solved(model: Denoiser, x: Tensor, cond: Any, calls: int = FINE, batch: int = 64) -> Pairs:
    """Starts with their fine solution."""
    pairs = Pairs(x, cond, x)
    return Pairs(x, cond, ends(model, recommended(model.path, calls), pairs, batch))
