"""Low resolution: pictures of another task, conditioned on what is left of them at a smaller scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..cond import Cond
from ..errors import Refused
from ..method import Batch
from ..part import Part
from ..registry import task
from ..rng import Rng
from . import task_named
from .base import Split, Task
from .split import data_hash

Resize = Literal["nearest", "bilinear", "bicubic"]
LOW = "low"


class LowResOptions(Part):
    of: str = Field("digits", description="the task whose pictures are made small (fewstep list tasks)")
    of_options: dict[str, Any] = Field(default_factory=dict, description="that task's own options")
    scales: tuple[int, ...] = Field(
        (4,), min_length=1, description="factors, rising, each a multiple of the one before; the last is the task's"
    )
    blur: float = Field(0.0, ge=0, le=100, description="Gaussian blur before, standard deviation in pixels")
    noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Gaussian noise in the sharpest small picture, in samples' units"
    )
    resize: Resize = Field("bilinear", description="how small pictures are brought back to the grid of the large ones")
    labels: bool = Field(False, description="keep the labels in the condition, as its part 'label'")


@task("lowres")
class LowRes(Task):
    """Super-resolution: the condition is a dictionary, its part ``low`` the picture at the last of ``scales``.

    Small pictures stand on the grid of the large ones, channel for channel, for a network to read beside the sample
    (``beside = { low = 1 }``). With several scales the better ones are parts too, by their factor: ``x2``. Blur,
    then means over blocks, then noise make the sharpest; each worse one is made of means of the better one alone,
    so that it says nothing that the better one does not.
    """

    Options = LowResOptions

    def __init__(self, options: LowResOptions | None = None) -> None:
        self.options = o = options or LowResOptions()
        self.of = of = task_named(o.of, o.of_options)
        if not of.has_data or len(of.shape) != 3 or getattr(getattr(of, "options", None), "patch", 1) != 1:
            raise Refused(f"task {o.of!r} has no pictures as they are: give one that has, with patch = 1")
        before = 1
        for scale in o.scales:
            if scale <= before or scale % before:
                raise Refused(f"scales rise by whole factors from above 1, got {list(o.scales)}: [2, 4], say")
            before = scale
        if any(side % before for side in of.shape[1:]):
            raise Refused(f"pictures of {of.shape[1]}x{of.shape[2]} are no multiple of {before}: take smaller scales")
        if o.labels and of.classes is None:
            raise Refused(f"task {o.of!r} has no labels: leave out labels")
        self.shape, self.data_std, self.value_range = of.shape, of.data_std, of.value_range
        self.classes = of.classes if o.labels else None
        self._train, self._test = (
            Split(split.held, Lowered(split, self.options, name))
            for name, split in (("train", of.train), ("test", of.test))
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pictures and of what was made of them."""
        return data_hash(self.of.train.data, self.of.test.data, self.options.model_dump_json())

    def summary(self) -> str | None:
        return self.of.summary()

    def pictures(self, x: Tensor) -> Tensor | None:
        return self.of.pictures(x)

    def null(self, cond: Cond) -> Cond:
        if isinstance(cond, dict) and "label" in cond and self.classes is not None:
            return {**cond, "label": torch.full_like(cond["label"], self.classes)}
        return cond

    def views(self, data: Tensor) -> tuple[Tensor, ...]:
        return self.of.views(data)

    def augment(self, data: Tensor, rng: Rng) -> Tensor:
        return self.of.augment(data, rng)

    def batch(self, size: int, seed: int, step: int, turn: int = 0, rows: tuple[int, int] | None = None) -> Batch:
        """The batch of the large pictures, varied as they are, with small ones made of them as they now are."""
        large = self.of.batch(size, seed, step, turn, rows)
        rng = Rng(seed, "lowres", step, turn, rows=None if rows is None else (*rows, size))
        noise = rng.normal(_small(large.data, self.options)) if self.options.noise else None
        return replace(large, cond=condition(large.data, large.cond, self.options, noise))


def _small(data: Tensor, options: LowResOptions) -> tuple[int, ...]:
    return (*data.shape[:2], *(side // options.scales[0] for side in data.shape[2:]))


@dataclass(frozen=True)
class Lowered:
    """The conditions of a split, made when they are asked for; a row's noise is its own, whoever asks."""

    split: Split
    options: LowResOptions
    name: str

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Tensor | slice) -> Cond:
        part, noise = self.split.rows(index), None
        data, labels = part.data, part.cond
        if self.options.noise:
            numbers = torch.arange(len(self.split))[index].tolist()
            shape = (1, *_small(data, self.options)[1:])
            noise = torch.cat([Rng(0, "lowres", self.name, row).normal(shape) for row in numbers])
        return condition(data, labels, self.options, noise)


def condition(data: Tensor, labels: Cond, options: LowResOptions, noise: Tensor | None = None) -> dict[str, Tensor]:
    """The condition of large pictures [batch, channels, height, width]."""
    found = lowered(data, options.scales, blur=options.blur, noise=options.noise, drawn=noise, resize=options.resize)
    cond = {f"x{scale}": one for scale, one in zip(options.scales[:-1], found[:-1], strict=True)}
    cond[LOW] = found[-1]
    if options.labels and isinstance(labels, Tensor):
        cond["label"] = labels
    return cond


def lowered(
    x: Tensor,
    scales: Sequence[int],
    *,
    blur: float = 0.0,
    noise: float = 0.0,
    drawn: Tensor | None = None,
    resize: Resize = "bilinear",
) -> list[Tensor]:
    """Pictures [batch, channels, height, width] at each factor of ``scales``, back on their own grid.

    Each is made of means over blocks of the one before, so that it is a function of it; ``drawn`` are standard normal
    numbers like the first small picture, times ``noise`` added to it.

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> [one[0, 0, 0].tolist() for one in lowered(x, (2, 4), resize="nearest")]
    [[2.5, 2.5, 4.5, 4.5], [7.5, 7.5, 7.5, 7.5]]
    """
    size, small, before, found = x.shape[2:], blurred(x, blur), 1, []
    for scale in scales:
        small = F.avg_pool2d(small, scale // before)
        if before == 1 and drawn is not None:
            small = small + noise * drawn.to(small)
        before = scale
        smooth = {} if resize == "nearest" else {"align_corners": False}
        found.append(F.interpolate(small, size=size, mode=resize, **smooth))
    return found


def blurred(x: Tensor, std: float) -> Tensor:
    """A Gaussian blur of ``std`` pixels; beyond its edge a picture goes on as it ends there."""
    if std == 0:
        return x
    reach = max(1, math.ceil(3 * std))
    place = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    bell = torch.exp(-0.5 * (place / std).square())
    bell = bell / bell.sum()
    channels = x.shape[1]
    for axis in (2, 3):
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        kernel = bell.view(shape).expand(channels, 1, *shape[2:])
        x = F.conv2d(F.pad(x, pad, mode="replicate"), kernel, groups=channels)
    return x
