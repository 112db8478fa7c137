"""Samples made block by block: each block from noise, given the clean ones before it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...cond import Cond
from ...method import Batch
from ...rng import Rng, Source
from ...student import Student

BEFORE, WHICH, ALL = "before", "block", "cond"


def given(blocks: Tensor, which: Tensor, cond: Cond = None) -> dict[str, Tensor]:
    """The condition of one block of each row: the clean blocks before it, which one it is, and what it had before.

    ``blocks`` [batch, count, ...] clean, ``which`` [batch]. Under ``before`` blocks from ``which`` on are zero, so
    that nothing of what is to be made leaks into its own condition.
    """
    count = blocks.shape[1]
    past = torch.arange(count, device=blocks.device) < which[:, None]
    own = {} if cond is None else {ALL: cond} if isinstance(cond, Tensor) else dict(cond)
    return {**own, BEFORE: blocks * past.view(*past.shape, *[1] * (blocks.ndim - 2)).to(blocks), WHICH: which}


def by_block(batch: Batch, count: int) -> Batch:
    """A batch of sequences as ``count`` times as many rows, one for each block: teacher forcing, from the data.

    Data and noise [batch, count m, ...] become [batch count, m, ...]. ValueError where they do not divide.
    """
    size = batch.data.shape[1]
    if size % count:
        raise ValueError(f"a sample of {size} along its first axis is not {count} blocks: take a divisor")
    data, noise = (v.unflatten(1, (count, size // count)) for v in (batch.data, batch.noise))
    which = torch.arange(count, device=data.device).repeat(len(data))
    cond = batch.cond
    if isinstance(cond, dict):
        cond = {key: value.repeat_interleave(count, 0) for key, value in cond.items()}
    elif cond is not None:
        cond = cond.repeat_interleave(count, 0)
    return Batch(data.flatten(0, 1), given(data.repeat_interleave(count, 0), which, cond), noise.flatten(0, 1))


def rng_of_blocks(rng: Source, count: int) -> Source:
    """The same source for ``count`` rows in the place of each one; a process still takes its own."""
    if not isinstance(rng, Rng) or rng.rows is None:
        return rng
    other = copy.copy(rng)
    first, last, total = rng.rows
    other.rows = (first * count, last * count, total * count)
    return other


@torch.no_grad()
def free_running(
    student: Student, noise: Tensor, cond: Cond = None, rng: Source | None = None, steps: int | None = None
) -> Tensor:
    """Blocks [batch, count, m, ...] from noise of that shape: each from the student's own blocks before it.

    This is use, where training was given the data's blocks: what it gets wrong here is the exposure error.
    """
    made = torch.zeros_like(noise)
    for k in range(noise.shape[1]):
        which = torch.full((len(noise),), k, device=noise.device)
        made[:, k] = student.generate(noise[:, k], given(made, which, cond), rng, steps)
    return made
