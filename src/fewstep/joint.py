"""Pictures and their labels in one tensor: labels as further channels, for networks that move both."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .cond import Cond
from .errors import Refused
from .method import Batch
from .part import Part
from .rng import Source, normal

Code = Literal["level", "one_hot"]


class Joint(Part):
    """How a sample holds a picture and, behind it, the label that belongs to it."""

    picture: int = Field(ge=1, le=2**16, description="leading channels that are the picture")
    classes: int = Field(ge=2, le=2**12, description="different labels")
    code: Code = Field("one_hot", description="what stands for a label: a level in one channel, or a channel for each")
    places: bool = Field(False, description="every place has a label of its own: a mask")
    width: float = Field(0.0, ge=0, allow_inf_nan=False, description="of the uniform noise that labels had in training")

    @property
    def book(self) -> Tensor:
        return codes(self.classes, self.code)

    @property
    def channels(self) -> int:
        """Of the label."""
        return self.classes if self.code == "one_hot" else 1

    def begin(self, noise: Tensor, labels: Cond) -> Tensor:
        """Where generation starts: noise [batch, picture + channels, ...] with the label in its channels.

        What stood there becomes the label's own uniform noise: the flow makes the label's Gaussian noise of it, and a
        bare code would end in the middle of that noise, where no training sample was. Refused where the labels are
        missing, or are no numbers below ``classes``.
        """
        kind = "masks [batch, ...]" if self.places else "labels [batch]"
        rank = noise.ndim - 1 if self.places else 1
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != rank:
            raise Refused(f"this model makes pictures for {kind} of whole numbers: pass them as the condition")
        if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise Refused(f"labels are 0 to {self.classes - 1}, got {int(labels.min())} to {int(labels.max())}")
        picture = noise[:, : self.picture]
        blur = self.width * (torch.special.ndtr(noise[:, self.picture :]) - 0.5)
        return torch.cat([picture, label_map(labels, self.book, picture) + blur], 1)

    def seen(self, x: Tensor) -> Tensor:
        """The picture of samples; what is a picture alone stays as it is."""
        return x[:, : self.picture]


def codes(classes: int, kind: Code = "level") -> Tensor:
    """What stands for each class in the label's channels: [classes, channels], within [-1, 1].

    >>> codes(3).tolist(), codes(2, "one_hot").tolist()
    ([[-1.0], [0.0], [1.0]], [[1.0, -1.0], [-1.0, 1.0]])
    """
    if kind == "one_hot":
        return 2 * torch.eye(classes) - 1
    return torch.linspace(-1, 1, classes)[:, None]


def label_map(labels: Tensor, book: Tensor, like: Tensor, rng: Source | None = None, width: float = 0.0) -> Tensor:
    """Labels as channels over a picture: [batch, channels, ...] like ``like`` behind its channels.

    ``labels`` are [batch], one for a picture, or [batch, ...], one for each place. With a generator they are blurred by
    uniform noise ``width`` wide (dequantised), so that the label is a density.
    """
    whole = book.to(like)[labels.long()]  # [batch, (places,) channels]
    places = like.shape[2:]
    if labels.ndim == 1:
        chart = whole.reshape(*whole.shape, *[1] * len(places)).expand(*whole.shape, *places)
    else:
        chart = whole.movedim(-1, 1)
    if rng is None or width == 0:
        return chart.clone()
    return chart + width * (torch.special.ndtr(normal(chart, rng)) - 0.5)


def joined(x0: Tensor, labels: Tensor, eps: Tensor, book: Tensor, rng: Source, width: float = 0.0) -> Batch:
    """The batch that moves both ways: data (x0, fresh noise), noise (eps, label)."""
    chart = label_map(labels, book, x0, rng, width)
    return Batch(torch.cat([x0, normal(chart, rng)], 1), None, torch.cat([eps, chart], 1))


def nearest(chart: Tensor, book: Tensor, places: bool = False) -> Tensor:
    """The class whose code is nearest: of a picture's mean, [batch], or at every place, [batch, ...]."""
    value = chart.movedim(1, -1)
    if not places and value.ndim > 2:
        value = value.flatten(1, -2).mean(1)
    return (value.unsqueeze(-2) - book.to(chart)).square().sum(-1).argmin(-1)
