"""Segments: handwritten digits of your own file on textured ground, with the mask of their ink."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from ..errors import Refused
from ..part import Part
from ..path import column
from ..registry import task
from ..rng import Rng
from .base import Split, Task
from .images import Images, ImagesOptions
from .split import data_hash

WAVES = 4
"""Plane waves in a texture."""
AT_ONCE = 1024
"""Pictures whose waves are in memory together."""


class SegmentsOptions(Part):
    path: str = Field(description="an .npz, or another source of grey pictures: light strokes on black, such as MNIST")
    size: int | None = Field(None, ge=4, le=2**10, description="side in pixels; None: as found")
    test_count: int | None = Field(None, ge=1, description="pictures to measure against; None: all, or a tenth")
    train_count: int | None = Field(None, ge=1, description="pictures to learn from; None: all")
    hold_out: int = Field(
        0, ge=0, description="this many training pictures take the place of the test split: to choose recipes"
    )
    contrast: float = Field(
        0.3, ge=0, le=1, description="of the ink, lighter or darker, to the mean of its ground at least; of [-1, 1]"
    )
    depth: float = Field(0.7, ge=0, le=1, description="how far the deepest texture swings to each side of its mean")
    seed: int = Field(0, description="of the textures, and of the split where the file has none")


@dataclass(frozen=True)
class Ground:
    """What a picture stands on: a few plane waves of grey, and the grey of its ink; a row for each picture.

    ``mean``, ``swing``, ``ink`` [n]; ``wave`` [n, WAVES, 4]: two frequencies in cycles a pixel, phase and share.
    """

    mean: Tensor
    swing: Tensor
    ink: Tensor
    wave: Tensor

    @classmethod
    def drawn(cls, count: int, contrast: float, depth: float, *keys: int | str) -> Ground:
        """The ink is ``contrast`` or more off the mean, on either side, and as often lighter as darker."""
        u = torch.rand(count, 3 + 4 * WAVES, generator=Rng(*keys).generator)
        swing = depth * (0.3 + 0.7 * u[:, 0])
        mean = 0.4 * (2 * u[:, 1] - 1)
        side = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
        room = (1 - side * mean - contrast).clamp(min=0)  # what is left behind the contrast on the ink's side
        ink = (mean + side * (contrast + u[:, 2] * room)).clamp(-1, 1)
        angle, length, phase, share = u[:, 3:].reshape(count, 4, WAVES).unbind(1)
        rate = (1 / 12) * 4**length  # wave lengths of 12 down to 3 pixels, about a stroke
        share = share / share.sum(1, keepdim=True)
        turn = math.pi * angle
        wave = torch.stack([rate * turn.cos(), rate * turn.sin(), 2 * math.pi * phase, share], 2)
        return cls(mean, swing, ink, wave)

    def texture(self, index: Tensor | slice, height: int, width: int) -> Tensor:
        """Grey in [-1, 1]: [n, 1, height, width]."""
        x, y = torch.arange(width, dtype=torch.float32), torch.arange(height, dtype=torch.float32)[:, None]
        shades = []
        for wave in self.wave[index].split(AT_ONCE):
            across, down, phase, share = (wave[..., k, None, None] for k in range(4))
            shades.append((share * torch.cos(2 * math.pi * (across * x + down * y) + phase)).sum(1, keepdim=True))
        grey = torch.cat(shades)
        return (column(self.mean[index], grey) + column(self.swing[index], grey) * grey).clamp(-1, 1)


@dataclass(frozen=True)
class Pictures:
    """Strokes [n, 1, h, w] in [-1, 1] laid over their grounds."""

    strokes: Split
    ground: Ground

    def __len__(self) -> int:
        return len(self.strokes)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        cover = (self.strokes.rows(index).data + 1) / 2
        ground = self.ground.texture(index, *cover.shape[2:])
        return (1 - cover) * ground + cover * column(self.ground.ink[index], cover)


@dataclass(frozen=True)
class Masks:
    """Where more than half of a pixel is ink: 1, else 0; uint8 [n, h, w]."""

    strokes: Split

    def __len__(self) -> int:
        return len(self.strokes)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return (self.strokes.rows(index).data[:, 0] > 0).to(torch.uint8)


@task("segments")
class Segments(Task):
    """Digits on textured ground, in [-1, 1]; the condition is the mask of the ink.

    Grey waves lie behind the strokes, and the ink is lighter or darker than their mean, so that no grey level tells ink
    from ground. Textures are functions of (seed, split, row): made when they are asked for, the same each time.
    """

    Options = SegmentsOptions
    value_range = (-1.0, 1.0)
    places = 2

    def __init__(self, options: SegmentsOptions) -> None:
        self.options = o = options
        same = ("path", "size", "test_count", "train_count", "hold_out", "seed")
        self.strokes = Images(ImagesOptions(channels=1, **{name: getattr(o, name) for name in same}))
        self.shape = self.strokes.shape
        if self.shape[0] != 1:
            raise Refused(f"{o.path} holds pictures of {self.shape[0]} channels: segments are made of grey ones")
        self._train, self._test = (
            self._laid(split, name) for split, name in ((self.strokes.train, "train"), (self.strokes.test, "test"))
        )
        self.data_std = float(self._train.rows(slice(2000)).data.std()) or 1.0

    def _laid(self, strokes: Split, name: str) -> Split:
        o = self.options
        ground = Ground.drawn(len(strokes), o.contrast, o.depth, o.seed, "ground", name)
        return Split(Pictures(strokes, ground), Masks(strokes))

    def summary(self) -> str:
        return f"{self.strokes.summary()}; on textured ground, with masks"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and masks of both splits."""
        return data_hash(self._train.data, self._train.cond, self._test.data, self._test.cond)
