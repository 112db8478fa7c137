"""The running average of weights, which is what ships."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .processes import local


class Average:
    """``average += (1 - decay_n) (weights - average)`` in one fused call.

    ``decay_n = min(decay, (1 + n) / (warmup + n))`` at the n-th update, so that early weights are forgotten.
    Of a sharded module each process averages its own part.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: float = 10.0) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        learning = {name: local(p) for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.weights = list(learning), list(learning.values())
        self.values: list[Tensor] = [_wide(weight.detach().clone()) for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.values, [_wide(w) for w in self.weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with the averaged weights; the learning ones come back afterwards."""
        kept = [w.detach().clone() for w in self.weights]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, kept)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averaged weights in place for good."""
        torch._foreach_copy_(self.weights, self.values)

    def forget(self, gone: set[int]) -> None:
        """Restart the average of re-initialised parameters at their new values."""
        for value, weight in zip(self.values, self.weights, strict=True):
            if weight.data_ptr() in gone:
                value.copy_(weight)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        self.updates = updates
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])


def _wide(x: Tensor) -> Tensor:
    """At least float32: in 16 bits an average of decay 0.999 stands still."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
