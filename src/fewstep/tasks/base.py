"""What a task is: data, its condition, and how a person looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..cond import Cond, rows
from ..joint import Joint
from ..method import Batch
from ..part import Part
from ..rng import Rng, mix


class Lazy(Protocol):
    """Rows of samples or of conditions that are made when they are asked for: ``lazy[index]`` for some of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor | slice, /) -> Any: ...


class Split:
    """Clean samples [count, *shape] in the network's range, with their conditions and, where known, their captions.

    Samples and conditions are tensors, or ``Lazy``: pixels kept as bytes, latents on disk, captions that a text
    encoder reads. ``data`` and ``cond`` are all rows, made anew at each look where they are lazy: ask for ``rows``.
    """

    def __init__(self, data: Tensor | Lazy, cond: Cond | Lazy, captions: tuple[str, ...] | None = None) -> None:
        self.held, self.held_cond, self.captions = data, cond, captions

    def __len__(self) -> int:
        return len(self.held)

    @property
    def data(self) -> Tensor:
        whole: Tensor = self.held if isinstance(self.held, Tensor) else self.held[:]
        return whole

    @property
    def cond(self) -> Cond:
        held = self.held_cond
        return held if held is None or isinstance(held, Tensor | dict) else held[:]

    def rows(self, index: Tensor | slice) -> Split:
        held = self.held_cond
        cond = rows(held, index) if held is None or isinstance(held, Tensor | dict) else held[index]
        return Split(self.held[index], cond)


@dataclass(frozen=True)
class Picked:
    """Chosen rows of a ``Lazy``, by number."""

    source: Lazy
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor | slice) -> Any:
        return self.source[self.index[index]]


class Task:
    """Data, condition and rendering.

    Attributes
    ----------
    shape: of one sample. ``classes``: how many labels a condition has, None where it is not a label.
    places: how many labels a condition has at every place of a picture, None where it is no such mask.
    joint: how samples hold their labels; None where they do not, and networks are told them.
    has_data: whether there are samples to learn from; a task without has conditions alone.
    data_std: one number for the spread of the training data, for preconditioning.
    value_range: the range that samples are held to before they are measured or drawn; None for no limit.
    law: the task's distribution in closed form, where there is one.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Part]] = Part
    has_data: ClassVar[bool] = True
    shape: tuple[int, ...]
    classes: int | None = None
    places: int | None = None
    joint: Joint | None = None
    data_std: float = 1.0
    value_range: tuple[float, float] | None = None
    law: Any = None

    _train: Split
    _test: Split

    @property
    def train(self) -> Split:
        """The samples to learn from."""
        return self._train

    @property
    def test(self) -> Split:
        """Held-out samples: the reference that students are measured against. Nothing learns from them."""
        return self._test

    def null(self, cond: Cond) -> Cond:
        """ "No condition" for every row of a condition: the label one past the last."""
        if isinstance(cond, Tensor) and self.classes is not None:
            return torch.full_like(cond, self.classes)
        return cond

    def begin(self, noise: Tensor, cond: Cond) -> Tensor:
        """What sampling starts from: the noise, with the label in its channels where samples hold one."""
        return noise if self.joint is None else self.joint.begin(noise, cond)

    def seen(self, x: Tensor) -> Tensor:
        """What of a sample is looked at: all of it, or where it holds its label the picture."""
        return x if self.joint is None else self.joint.seen(x)

    def finish(self, x: Tensor) -> Tensor:
        """Samples as they are delivered: held to the value range."""
        x = self.seen(x)
        return x if self.value_range is None else x.clamp(*self.value_range)

    def pictures(self, x: Tensor) -> Tensor | None:
        """Samples as images, uint8 [count, height, width, 1 or 3]; None where a sample is no image.

        Maps the value range to 0..255.
        """
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or self.value_range is None:
            return None
        low, high = self.value_range
        scaled = (self.finish(x.float()) - low) / (high - low) * 255
        return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def augment(self, data: Tensor, rng: Rng) -> Tensor:
        """A random variation of training samples that keeps their law; none by default."""
        return data

    def views(self, data: Tensor) -> tuple[Tensor, ...]:
        """All variations that ``augment`` draws from, equally likely: what encoded samples are kept of."""
        return (data,)

    def summary(self) -> str | None:
        """What was found, in one line, where the data is a user's own."""
        return None

    def batch(self, size: int, seed: int, step: int, turn: int = 0, rows: tuple[int, int] | None = None) -> Batch:
        """The training batch of a turn: a pure function of (seed, step, turn), epochs without replacement.

        ``rows`` (start, stop) are those of it that this process wants; others are not read.
        """
        index = epoch_rows(len(self.train), size, mix(seed, "rows", turn), step)
        if rows is not None:
            index = index[slice(*rows)]
        part = self.train.rows(index)
        rng = Rng(seed, "batch", step, turn, rows=None if rows is None else (*rows, size))
        data = self.augment(part.data, rng)
        return Batch(data, part.cond, rng.normal(tuple(data.shape), data.dtype))


def epoch_rows(total: int, size: int, seed: int, step: int) -> Tensor:
    """Row numbers of the step-th batch of an endless shuffled pass: each epoch has its own order."""
    start = step * size
    picked = []
    while size > 0:
        epoch, offset = divmod(start, total)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(mix(seed, epoch)))
        part = order[offset : offset + size]
        picked.append(part)
        start, size = start + len(part), size - len(part)
    return torch.cat(picked)
