"""Mixture: Gaussians whose law is known exactly, in any dimension."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from ..cond import Cond
from ..errors import Refused
from ..part import Part
from ..path import Path, Straight
from ..registry import task
from ..rng import mix
from ..teachers.laws import Mixture
from .base import Split, Task
from .split import data_hash


class MixtureOptions(Part):
    dimension: int = Field(2, ge=1, description="of a sample")
    modes: int = Field(8, ge=1, description="how many Gaussians")
    radius: float = Field(2.0, ge=0, description="distance of every mode from the origin")
    std: float = Field(0.1, gt=0, description="of each mode, in every direction")
    weights: tuple[float, ...] | None = Field(None, description="one for each mode; None: even")
    classes: int = Field(0, ge=0, description="0: no condition; else mode k has label k mod classes")
    train_count: int = Field(20_000, ge=1, description="samples to learn from")
    test_count: int = Field(4_000, ge=1, description="samples to measure against")
    seed: int = Field(0, description="of the samples and, above two dimensions, of the modes' directions")


@task("mixture")
class MixtureTask(Task):
    """A mixture of Gaussians with an exact law: every answer can be compared with the truth.

    In two dimensions the modes stand on a ring from angle 0; in one, evenly on [-radius, radius]; above,
    in random directions. ``modes=4, std=0.25, weights=[.4, .3, .2, .1]`` has uneven modes for a student to lose.
    """

    Options = MixtureOptions

    def __init__(self, options: MixtureOptions | None = None) -> None:
        self.options = o = options or MixtureOptions()
        weights = o.weights or (1.0,) * o.modes
        if len(weights) != o.modes:
            raise Refused(f"{len(weights)} weights for {o.modes} modes: pass one weight for each mode")
        if min(weights) <= 0:
            raise Refused(f"weights must be positive, got {min(weights):g}")
        if o.classes > o.modes:
            raise Refused(f"{o.classes} classes for {o.modes} modes: a class needs at least one mode")
        self.shape = (o.dimension,)
        self.classes = o.classes or None
        self._weights, self._means = torch.tensor(weights, dtype=torch.float64), centres(o)
        self._labels = torch.arange(o.modes) % o.classes if o.classes else None
        self.law = self.law_on(Straight())
        share = self._weights / self._weights.sum()
        middle = share @ self._means
        variance = share @ (self._means - middle).square() + o.std**2
        self.data_std = math.sqrt(variance.mean().item())
        self._train = self._draw(o.train_count, "train")
        self._test = self._draw(o.test_count, "test")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and labels of both splits."""
        return data_hash(self._train.data, self._train.cond, self._test.data, self._test.cond)

    def law_on(self, path: Path) -> Mixture:
        """The exact law as a teacher on a path."""
        return Mixture(self._weights, self._means, self.options.std, labels=self._labels, path=path)

    def _draw(self, count: int, split: str) -> Split:
        rng = torch.Generator().manual_seed(mix(self.options.seed, "mixture", split))
        cond: Cond = None
        if self._labels is not None:
            mode = torch.multinomial(self._weights, count, replacement=True, generator=rng)
            cond = self._labels[mode]
        return Split(self.law.sample(count, rng, cond, dtype=torch.float32), cond)


def centres(options: MixtureOptions) -> Tensor:
    """Where the modes stand: [modes, dimension]."""
    k, radius = options.modes, options.radius
    if options.dimension == 1:
        ends = (-radius, radius) if k > 1 else (radius, radius)
        return torch.linspace(*ends, k, dtype=torch.float64)[:, None]
    if options.dimension == 2:
        angle = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
        return radius * torch.stack([angle.cos(), angle.sin()], 1)
    rng = torch.Generator().manual_seed(mix(options.seed, "mixture", "modes"))
    direction = torch.randn(k, options.dimension, generator=rng, dtype=torch.float64)
    return radius * torch.nn.functional.normalize(direction, dim=1)
