"""Labelled: another task's samples with their labels beside them, in further channels."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from ..errors import Refused
from ..joint import Code, Joint, joined
from ..method import Batch
from ..part import Part
from ..registry import task
from ..rng import Rng
from .base import Split, Task


class LabelledOptions(Part):
    of: str = Field("digits", description="the task whose samples and labels these are")
    options: dict[str, Any] = Field(default_factory=dict, description="that task's own options")
    code: Code = Field("one_hot", description="what stands for a label: a level in one channel, or a channel for each")
    width: float = Field(
        0.2, ge=0, description="of the uniform noise that makes the codes of labels, in [-1, 1], a density"
    )


@task("labelled")
class Labelled(Task):
    """Pairs: samples of another task, each with its label (or its mask) in the channels behind.

    ``train`` and ``test`` are the other task's, labels as conditions. In a batch (``joint.joined``) the data is
    (picture, noise), the noise (noise, label). Sampling starts from ``begin(noise, labels)``, and what is looked at is
    the picture.
    """

    Options = LabelledOptions

    def __init__(self, options: LabelledOptions | None = None) -> None:
        from . import task_named

        self.options = options or LabelledOptions()
        name = self.options.of
        if name == self.name:
            raise Refused(f"of = {name!r}: take a task that has labels and does not hold them in its samples yet")
        pixels = self.pixels = task_named(name, self.options.options)
        kinds = pixels.classes or pixels.places
        if not pixels.has_data or kinds is None or kinds < 2:
            raise Refused(f"task {name!r} has no two labels under these options: take one whose samples are labelled")
        picture = pixels.shape[0]
        self.joint = Joint(
            picture=picture,
            classes=kinds,
            code=self.options.code,
            places=pixels.places is not None,
            width=self.options.width,
        )
        self.shape = (picture + self.joint.channels, *pixels.shape[1:])
        self.classes, self.places = pixels.classes, pixels.places
        self.value_range, self.data_std = pixels.value_range, pixels.data_std

    @property
    def train(self) -> Split:
        return self.pixels.train

    @property
    def test(self) -> Split:
        return self.pixels.test

    def summary(self) -> str | None:
        return self.pixels.summary()

    def finish(self, x: Tensor) -> Tensor:
        return self.pixels.finish(self.seen(x))

    def pictures(self, x: Tensor) -> Tensor | None:
        return self.pixels.pictures(self.seen(x))

    def batch(self, size: int, seed: int, step: int, turn: int = 0, rows: tuple[int, int] | None = None) -> Batch:
        plain = self.pixels.batch(size, seed, step, turn, rows)
        assert self.joint is not None
        if not isinstance(plain.cond, Tensor):
            raise Refused(f"samples of task {self.options.of!r} are captioned, and captions do not fit into channels")
        rng = Rng(seed, "joint", step, turn, rows=None if rows is None else (*rows, size))
        return joined(plain.data, plain.cond, plain.noise, self.joint.book, rng, self.joint.width)
