"""What a search makes small, and the fixed starts on which it looks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cond import Cond
from ..denoiser import Denoiser
from ..metrics.frechet import Moments, frechet_distance
from ..solvers import SolverPlan, recommended, sample
from .gradient import Pairs, squares

CLEAR = 2.0
"""lam at which the teacher's features look at a sample: sigma / alpha is 0.14."""
CHUNK = 64
"""Samples whose distance is taken at a time."""
FINE = 48
"""Calls of the fine solution. Networks are rough in time, so that many more only follow that."""


class Objective(ABC):
    """``objective(samples, pairs) -> number``, lower is better.

    Samples [n, *shape] are ends of a plan from the starts of ``pairs``.
    """

    name: str
    law: ClassVar[bool] = False
    """Whether it compares laws, not samples one by one. Then few samples say little."""

    @abstractmethod
    def __call__(self, samples: Tensor, pairs: Pairs) -> float: ...


class Distance(Objective):
    """Root mean square distance to the end of the exact flow from the same start, over the spread of the ends."""

    name = "distance"

    def __init__(self, std: float) -> None:
        self.std = std

    def squares(self, samples: Tensor, pairs: Pairs) -> Tensor:
        """The square of the distance, sample by sample: what a fit by gradient makes small."""
        return squares(samples, pairs) / self.std**2

    def __call__(self, samples: Tensor, pairs: Pairs) -> float:
        total = 0.0
        with torch.no_grad():
            for at in range(0, len(pairs), CHUNK):
                part = slice(at, at + CHUNK)
                total += float(self.squares(samples[part], pairs.rows(part)).double().sum())
        return math.sqrt(total / len(pairs))


class FeatureDistance(Distance):
    """The same distance as the teacher's own layers see it, when they look at a nearly clean sample.

    Few calls blur: a distance of pixels likes that, features do not. The mean over the denoiser's features of the
    squared distance, each over its variance among the ``reference`` ends. Raises ValueError for a denoiser without
    features.
    """

    name = "features"

    def __init__(self, model: Denoiser, reference: Pairs) -> None:
        self.model = model
        self.t = float(model.path.time(min(CLEAR, float(model.path.lam(model.path.t_low)))))
        self.alpha = float(model.path.coefs(self.t).alpha)
        marks = self.marked(reference).marks
        self.spread = [float(mark.double().var(0).mean()) + 1e-12 for mark in marks]

    def marked(self, pairs: Pairs) -> Pairs:
        """Pairs that carry the features of their ends, so that these are asked for once."""
        with torch.no_grad():
            parts = [pairs.rows(slice(at, at + CHUNK)) for at in range(0, len(pairs), CHUNK)]
            seen = zip(*(self.seen(part.ends, part) for part in parts), strict=True)
            return replace(pairs, marks=tuple(torch.cat(feature) for feature in seen))

    def seen(self, samples: Tensor, pairs: Pairs) -> list[Tensor]:
        found = self.model((self.alpha * samples).to(samples.dtype), self.t, pairs.cond, "features")
        return [feature.flatten(1) for feature in found]

    def squares(self, samples: Tensor, pairs: Pairs) -> Tensor:
        marks = pairs.marks or self.marked(pairs).marks
        parts = [
            (here - there).square().mean(1) / spread
            for here, there, spread in zip(self.seen(samples, pairs), marks, self.spread, strict=True)
        ]
        return torch.stack(parts).mean(0)


class FrechetTo(Objective):
    """Fréchet distance of features to those of ``reference`` samples: real data, or the fine solution.

    ``finish`` takes the ends of a plan to where the reference is (decoded, held to their range). A network is as far
    from the data as its fine solution is, and a few calls may come nearer: the distance to the data sees it, every
    distance to the fine solution calls it an error. No part of it is the network that measures: that would be teaching
    to the test.
    """

    name = "frechet"
    law = True

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        reference: Tensor,
        finish: Callable[[Tensor], Tensor] = lambda samples: samples,
    ) -> None:
        self.features, self.finish, self.reference = features, finish, Moments.of(features(reference))

    def __call__(self, samples: Tensor, pairs: Pairs) -> float:
        if not samples.isfinite().all():
            return math.inf
        return float(frechet_distance(Moments.of(self.features(self.finish(samples))), self.reference))


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
    no result. A plan that is judged on more starts in the next call is taken there from the rest of them alone.
    """

    def __init__(self, model: Denoiser, pairs: Pairs, objective: Objective, batch: int = 64) -> None:
        self.model, self.pairs, self.objective, self.batch = model, pairs, objective, batch
        self.last: tuple[SolverPlan, Tensor] | None = None

    def __call__(self, plan: SolverPlan, count: int | None = None) -> float:
        pairs = self.pairs if count is None else self.pairs.rows(slice(0, count))
        return self.objective(self._ends(plan, pairs), pairs)

    def _ends(self, plan: SolverPlan, pairs: Pairs) -> Tensor:
        known = pairs.x[:0] if self.last is None or self.last[0] != plan else self.last[1]
        if len(known) > len(pairs) or len(known) % self.batch:  # other batches would round otherwise
            known = known[:0]
        rest = pairs.rows(slice(len(known), None))
        made = torch.cat([known, ends(self.model, plan, rest, self.batch)]) if len(rest) else known
        self.last = plan, made
        return made


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


def solved(model: Denoiser, x: Tensor, cond: Cond = None, calls: int = FINE, batch: int = 64) -> Pairs:
    """Starts with their fine solution."""
    pairs = Pairs(x, cond, x)
    return Pairs(x, cond, ends(model, recommended(model.path, calls), pairs, batch))
