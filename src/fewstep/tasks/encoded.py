"""A task seen through an autoencoder: networks learn latents, people and metrics see pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor, cat

from .base import Split, Task


class Encoded(Task):
    """``pixels`` with its training samples encoded; finished samples are decoded before they are measured."""

    name = "encoded"

    def __init__(
        self,
        pixels: Task,
        shape: tuple[int, ...],
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
    ) -> None:
        self.pixels, self.shape, self.encode, self.decode = pixels, tuple(shape), encode, decode
        self.classes, self.value_range = pixels.classes, pixels.value_range

    @cached_property
    def train(self) -> Split:  # type: ignore[override]
        split = self.pixels.train
        latents = cat([self.encode(part) for part in split.data.split(32)])
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(f"the autoencoder gives {tuple(latents.shape[1:])}, the network takes {self.shape}")
        self.data_std = float(latents.std())
        return Split(latents, split.cond)

    @property
    def test(self) -> Split:
        return self.pixels.test

    def finish(self, x: Tensor) -> Tensor:
        """Decoded, and held to the value range; samples that are pictures already are only held."""
        if tuple(x.shape[1:]) == self.shape:
            x = cat([self.decode(part) for part in x.split(32)])
        return self.pixels.finish(x)

    def pictures(self, x: Tensor) -> Tensor | None:
        return self.pixels.pictures(self.finish(x))
