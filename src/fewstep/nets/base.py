"""What every small network shares: its configuration, time features, condition embeddings."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond, part_of
from ..part import Part

Beside = Annotated[
    dict[str, Annotated[int, Field(ge=1, le=2**12)]],
    Field(description="parts of the condition that are read as further channels, by name: how many channels each has"),
]


class NetConfig(Part):
    """The base of a network's description; ``kind`` names the class."""

    kind: str
    depth: int = 1

    def widest(self) -> tuple[int, int]:
        """The largest width, and the step in which widths can be chosen."""
        raise ValueError(f"networks of kind {self.kind!r} come in one size")

    def scaled(self, width: int, depth: int) -> NetConfig:
        """The same network with another largest width, the others in proportion, and another depth."""
        raise ValueError(f"networks of kind {self.kind!r} come in one size")


class Net(nn.Module):
    """A network ``net(x, time, cond, span) -> like x``.

    ``time`` [batch] is what the denoiser's clock gives, of the order of 1 to 1000. ``span`` [batch] in [0, 1],
    the length of a flow map's jump, is read where ``reads_s``; it is embedded by slow waves (the fastest is
    ``cos(span)``), because average velocities are learned through their derivative in time, which a fast wave
    would dominate. ``cond`` is None or labels [batch], the number of classes standing for "no condition"; or a
    dictionary with ``label`` and whatever the network reads ``beside`` the sample: pictures on its grid
    [batch, channels, ...], say a low-resolution one. Other parts are for others to read.
    """

    config: NetConfig
    reads_s: bool = False
    _no_split_modules: tuple[str, ...] = ("_Block",)  # what a sharded network gathers at a time, in diffusers' words

    def null(self, cond: Cond) -> Cond:
        """ "No condition" for every row of a condition; ValueError for a network without labels."""
        classes = getattr(self.config, "classes", None)
        if classes is not None and isinstance(cond, dict) and "label" in cond:  # what stands beside stays
            return {**cond, "label": torch.full_like(cond["label"], classes)}
        if classes is None or not isinstance(cond, Tensor):
            raise ValueError("this network has no labels, so it has no negative condition to guide against")
        return torch.full_like(cond, classes)


def sinusoids(time: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of ``time`` at ``width / 2`` frequencies from 1 down to 1 / period: [batch, width]."""
    half = width // 2
    rates = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angle = time[:, None].to(torch.promote_types(time.dtype, torch.float32)) * rates
    return torch.cat([torch.cos(angle), torch.sin(angle)], 1)


class TimeEmbedding(nn.Module):
    """Two linear layers on sinusoids; ``silent`` starts it at zero, so that it changes nothing at first."""

    def __init__(self, width: int, out: int, silent: bool = False) -> None:
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)
        if silent:
            nn.init.zeros_(self.linear_2.weight)
            nn.init.zeros_(self.linear_2.bias)

    def forward(self, time: Tensor) -> Tensor:
        entry = sinusoids(time, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(entry)))


def labels_of(cond: Cond, classes: int, count: int, device: torch.device) -> Tensor:
    """The labels to embed: "no condition" where none is given. ValueError for other conditions."""
    if isinstance(cond, dict):
        cond = cond.get("label", cond)
    if cond is None:
        return torch.full((count,), classes, device=device)
    if not isinstance(cond, Tensor):
        raise ValueError(
            "this network is conditioned on labels: pass a tensor of integers, alone or as the part 'label'"
        )
    return cond


def with_beside(x: Tensor, cond: Cond, parts: dict[str, int]) -> Tensor:
    """The sample with parts of its condition as further channels: [batch, channels + ..., *sides].

    Where there is no condition at all they are zeros. Refused for a condition without such a part, ValueError for
    one of another size.

    >>> with_beside(torch.ones(1, 2), {"low": torch.zeros(1, 1)}, {"low": 1}).tolist()
    [[1.0, 1.0, 0.0]]
    """
    found = [x]
    for name, width in parts.items():
        wanted = (width, *x.shape[2:])
        if cond is None:
            found.append(x.new_zeros(len(x), *wanted))
            continue
        value = part_of(cond, name)
        if tuple(value.shape[1:]) != wanted:
            raise ValueError(f"the network reads {name!r} as {list(wanted)}, got {list(value.shape[1:])}")
        found.append(value.to(x.dtype))
    return torch.cat(found, 1) if parts else x
