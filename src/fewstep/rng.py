"""Random draws: every one has a named source, and is the same for any number of processes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def mix(*keys: int | str) -> int:
    """One 63-bit seed from any keys: equal keys, equal seed; near keys, unrelated seeds.

    >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0)
    (True, False)
    """
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Rng:
    """Draws for a whole batch and keeps the rows of this process.

    ``Rng(seed, step, turn)`` is the source behind one loss. With ``rows = (start, stop, total)`` every
    draw is made for ``total`` rows and cut to this process's own, so that results do not depend on how
    many processes share the batch. ``shared`` is a plain generator for decisions that all must agree on.

    >>> whole = Rng(0, 7).normal((4, 2))
    >>> part = Rng(0, 7, rows=(1, 3, 4)).normal((2, 2))
    >>> torch.equal(whole[1:3], part)
    True
    """

    def __init__(
        self,
        *keys: int | str,
        rows: tuple[int, int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.device = rows, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(mix(*keys))
        self.shared = torch.Generator().manual_seed(mix(*keys, "shared"))

    def _cut(self, draw: Tensor, count: int) -> Tensor:
        if self.rows is None:
            return draw
        start, stop, _ = self.rows
        if stop - start != count:
            raise ValueError(f"this process holds rows {start}..{stop} but {count} were asked for")
        return draw[start:stop]

    def _total(self, count: int) -> int:
        return count if self.rows is None else self.rows[2]

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        draw = torch.randn(
            (self._total(shape[0]), *shape[1:]), generator=self.generator, device=self.device, dtype=dtype
        )
        return self._cut(draw, shape[0])

    def uniform(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        draw = torch.rand(self._total(count), generator=self.generator, device=self.device, dtype=dtype)
        return self._cut(draw, count)

    def integers(self, high: int, count: int) -> Tensor:
        draw = torch.randint(high, (self._total(count),), generator=self.generator, device=self.device)
        return self._cut(draw, count)


Source = Rng | torch.Generator


def normal(like: Tensor, rng: Source) -> Tensor:
    """Standard normal noise of the shape, type and device of ``like``."""
    if isinstance(rng, Rng):
        return rng.normal(tuple(like.shape), like.dtype).to(like.device)
    return torch.randn(like.shape, generator=rng, device=rng.device, dtype=like.dtype).to(like.device)


def uniform(like: Tensor, rng: Source) -> Tensor:
    """One uniform draw in [0, 1) a row of ``like``: shape [batch], at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
    if isinstance(rng, Rng):
        return rng.uniform(like.shape[0], dtype).to(like.device)
    return torch.rand(like.shape[0], generator=rng, device=rng.device, dtype=dtype).to(like.device)


def integers(like: Tensor, high: int, rng: Source) -> Tensor:
    """One uniform integer in [0, high) a row of ``like``: shape [batch]."""
    if isinstance(rng, Rng):
        return rng.integers(high, like.shape[0]).to(like.device)
    return torch.randint(high, (like.shape[0],), generator=rng, device=rng.device).to(like.device)
