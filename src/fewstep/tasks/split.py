"""Splitting labelled samples, and telling data sets apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..cond import Cond
from ..errors import Refused
from ..rng import mix


def stratified(labels: Tensor | None, total: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers (kept, held out): ``count`` of ``total`` rows, the same share of every class.

    Each class gives the whole part of its share; rows that rounding left over come from the classes with the
    largest remainders. The draw depends on the seed alone; both answers are in rising order.

    >>> kept, held = stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 6, 3, seed=0)
    >>> sorted(torch.tensor([0, 0, 0, 0, 1, 1])[held].tolist())
    [0, 0, 1]
    """
    if not 0 <= count < total:
        raise Refused(f"cannot hold out {count} of {total} samples: pass a number from 0 to {total - 1}")
    rng = torch.Generator().manual_seed(mix(seed, "held out"))
    order = torch.randperm(total, generator=rng)
    if labels is None:
        return order[count:].sort().values, order[:count].sort().values
    shuffled = labels[order]
    share = torch.bincount(labels).double() * count / total
    take = share.floor().long()
    for i in (share - take).argsort(descending=True, stable=True)[: count - int(take.sum())]:
        take[i] += 1
    held = torch.cat([order[shuffled == c][:n] for c, n in enumerate(take.tolist())])
    mask = torch.ones(total, dtype=torch.bool)
    mask[held] = False
    return mask.nonzero().flatten(), held.sort().values


def data_hash(*parts: Tensor | Cond | str) -> str:
    """SHA-256 of the bytes, types and shapes of tensors, and of words: equal data, equal hash."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            value = part.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.numpy().data)
        elif isinstance(part, dict):
            digest.update("".join(f"{key}={data_hash(part[key])}" for key in sorted(part)).encode())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
