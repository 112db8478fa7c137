"""A task seen through an autoencoder: networks learn latents, people and metrics see pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path as File

import torch
from torch import Tensor, cat

from ..cond import Cond, join
from .base import Picked, Split, Task
from .shards import Shards
from .split import data_hash

BLOCK = 32


class Encoded(Task):
    """``pixels`` with its training samples encoded; finished samples are decoded before they are measured.

    Latents are made once. With ``encoder``, the hash of the autoencoder, they are kept in shards in ``cache``, named
    by it and by the pixels. What is kept are the latents of the pictures as they were resized and cropped, and of
    every view that a random variation would draw (mirrored ones, where pictures are flipped): as latents cannot be
    mirrored, ``train`` holds all views, and an epoch sees each of them once.
    """

    name = "encoded"

    def __init__(
        self,
        pixels: Task,
        shape: tuple[int, ...],
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        *,
        encoder: str | None = None,
        cache: File | None = None,
    ) -> None:
        self.pixels, self.shape, self.encode, self.decode = pixels, tuple(shape), encode, decode
        self.classes, self.value_range = pixels.classes, pixels.value_range
        self.encoder, self.cache = encoder, cache if encoder is not None else None

    @cached_property
    def latents(self) -> Shards:
        """Latents of all views of the training pictures, one view after the other."""
        split = self.pixels.train
        views = len(self.pixels.views(split.rows(slice(1)).data))
        count = len(split)

        def make(rows: range) -> Tensor:
            view, first = divmod(rows.start, count)
            picked = split.rows(slice(first, first + len(rows))).data  # a view begins with a batch of its own
            found = self.encode(self.pixels.views(picked)[view])
            if tuple(found.shape[1:]) != self.shape:
                raise ValueError(f"the autoencoder gives {tuple(found.shape[1:])}, the network takes {self.shape}")
            return found

        facts = {"what": "latents", "encoder": self.encoder, "shape": list(self.shape), "views": views}
        if self.cache is not None:
            blocks = (split.rows(slice(k, k + 256)).data for k in range(0, count, 256))
            facts["data"] = data_hash("".join(data_hash(block) for block in blocks))
        return Shards("latents", facts, count * views, _apart(make, count), folder=self.cache, batch=BLOCK)

    @cached_property
    def train(self) -> Split:  # type: ignore[override]
        latents, split = self.latents, self.pixels.train
        latents.fill()
        views = len(latents) // len(split)
        return Split(latents, _repeated(split.held_cond, len(split), views))

    @cached_property
    def data_std(self) -> float:  # type: ignore[override]
        """The spread of all latents: exact, shard by shard."""
        self.latents.fill()
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for shard in self.latents.shards():
            rows = shard["rows"].double()
            total, squares, count = total + rows.sum(), squares + rows.square().sum(), count + rows.numel()
        return float(((squares - total.square() / count) / max(count - 1, 1)).clamp(min=0).sqrt()) or 1.0

    @property
    def test(self) -> Split:
        return self.pixels.test

    def null(self, cond: Cond) -> Cond:
        return self.pixels.null(cond)

    def summary(self) -> str | None:
        return self.pixels.summary()

    def finish(self, x: Tensor) -> Tensor:
        """Decoded, and held to the value range; samples that are pictures already are only held."""
        if tuple(x.shape[1:]) == self.shape:
            x = cat([self.decode(part) for part in x.split(BLOCK)])
        return self.pixels.finish(x)

    def pictures(self, x: Tensor) -> Tensor | None:
        return self.pixels.pictures(self.finish(x))


def _apart(make: Callable[[range], Tensor], count: int) -> Callable[[range], Tensor]:
    """Rows that belong to two views are made view by view."""

    def parts(rows: range) -> Tensor:
        edges = [rows.start, *(k for k in range(count, rows.stop, count) if k > rows.start), rows.stop]
        return cat([make(range(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)])

    return parts


def _repeated(cond: Cond | object, count: int, times: int) -> Cond | Picked:
    if times == 1 or cond is None:
        return cond  # type: ignore[return-value]
    if isinstance(cond, Tensor | dict):
        whole: Cond = cond
        for _ in range(times - 1):
            whole = join(whole, cond)
        return whole
    return Picked(cond, torch.arange(count).repeat(times))  # type: ignore[arg-type]
