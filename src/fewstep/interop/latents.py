"""Between what a denoising network sees and what an autoencoder reads: how latents are packed and scaled.

Nothing is looked up by a pipeline's name: the last sample of a recorded run and what the autoencoder was given
for it are compared, and the packing and the scale of every channel follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Refused

EXACT = 1e-4  # of the largest value


@dataclass(frozen=True)
class Codec:
    """``z = unpacked(scale latents + shift)``, where scale and shift are one number a channel of the latents.

    ``shape``: of one z. ``patch``: (frames, height, width) of z in one token; None where latents are laid out as z.
    ``patch_first``: a token counts the places in its patch before the channels. ``axis``: the latents' channels.
    ``frame``: z has a dimension of one frame that latents have not.
    """

    shape: tuple[int, ...]
    scale: Tensor
    shift: Tensor
    patch: tuple[int, ...] | None = None
    patch_first: bool = False
    tokens: bool = False
    frame: bool = False

    def decode(self, latents: Tensor) -> Tensor:
        """What the autoencoder reads for latents."""
        axis = -1 if self.tokens else 1
        return self._unpack(latents * _along(self.scale, latents, axis) + _along(self.shift, latents, axis))

    def encode(self, z: Tensor) -> Tensor:
        """The latents that the autoencoder's code stands for."""
        latents = self.pack(z)
        axis = -1 if self.tokens else 1
        return (latents - _along(self.shift, latents, axis)) / _along(self.scale, latents, axis)

    def pack(self, z: Tensor) -> Tensor:
        """z in the latents' layout."""
        if self.patch is not None:
            z = _patched(z, self.patch, self.patch_first, self.tokens)
        return z.squeeze(2) if self.frame else z

    def _unpack(self, value: Tensor) -> Tensor:
        if self.frame:
            value = value.unsqueeze(2)
        if self.patch is None:
            return value
        channels, *sides = self.shape
        counts = [side // p for side, p in zip(sides, self.patch, strict=True)]
        n = len(sides)
        if self.tokens:
            value = value.reshape(value.shape[0], *counts, -1).movedim(-1, 1)
        inner = (*self.patch, channels) if self.patch_first else (channels, *self.patch)
        value = value.reshape(value.shape[0], *inner, *counts)
        if self.patch_first:
            value = value.movedim(1 + n, 1)
        order = [0, 1]
        for d in range(n):
            order += [2 + n + d, 2 + d]
        return value.permute(order).reshape(value.shape[0], channels, *sides)


def _patched(z: Tensor, patch: tuple[int, ...], patch_first: bool, tokens: bool) -> Tensor:
    """z [batch, channels, *sides] with every patch as one place of more channels; ``tokens``: places in a row."""
    n = z.ndim - 2
    split = [z.shape[0], z.shape[1]]
    for side, p in zip(z.shape[2:], patch, strict=True):
        split += [side // p, p]
    value = z.reshape(split)
    places, inner = [2 + 2 * d for d in range(n)], [3 + 2 * d for d in range(n)]
    order = [0, *inner, 1, *places] if patch_first else [0, 1, *inner, *places]
    value = value.permute(order)
    value = value.reshape(z.shape[0], -1, *value.shape[2 + n :])
    return value.flatten(2).transpose(1, 2) if tokens else value


def _along(value: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.ndim
    shape[axis] = -1
    return value.to(like.device, torch.promote_types(like.dtype, torch.float32)).reshape(shape)


def find_codec(latents: Tensor | None, z: Tensor | None) -> tuple[Codec | None, str]:
    """(the codec between the last sample and what was decoded, "") or (None, why it was not read)."""
    if z is None or latents is None:
        return None, ""
    if z.shape[0] != latents.shape[0]:
        return None, f"its autoencoder is given {list(z.shape)} for latents {list(latents.shape)}"
    for layout in _layouts(latents, z):
        found = _fitted(layout, latents, z)
        if found is not None:
            return found, ""
    return None, f"its latents {list(latents.shape)} become {list(z.shape)} in a way that is not read"


def _layouts(latents: Tensor, z: Tensor) -> Iterator[Codec]:
    """Every layout that fits by size, the plainest first."""
    none = torch.zeros(0)
    shape = tuple(z.shape[1:])
    if latents.shape == z.shape:
        yield Codec(shape, none, none)
        return
    flat = z
    frame = z.ndim == latents.ndim + 1 and z.ndim == 5 and z.shape[2] == 1
    if frame and latents.shape == z.squeeze(2).shape:
        yield Codec(shape, none, none, frame=True)
        return
    sides = z.shape[2:]
    for tokens in (True, False):
        if tokens and latents.ndim != 3 or not tokens and latents.ndim != z.ndim:
            continue
        width = latents.shape[-1] if tokens else latents.shape[1]
        for patch in _patches(width // flat.shape[1] if width % flat.shape[1] == 0 else 0, len(sides)):
            if any(side % p for side, p in zip(sides, patch, strict=True)):
                continue
            for patch_first in (False, True):
                one = Codec(shape, none, none, patch, patch_first, tokens)
                if one.pack(z).shape == latents.shape:
                    yield one


def _patches(size: int, sides: int) -> Iterator[tuple[int, ...]]:
    """Patches of so many places: square in height and width, any number of frames before them."""
    for p in range(1, size + 1):
        if size and size % (p * p) == 0:
            frames = size // (p * p)
            if sides == 2 and frames == 1:
                yield (p, p)
            elif sides == 3:
                yield (frames, p, p)


def _fitted(layout: Codec, latents: Tensor, z: Tensor) -> Codec | None:
    """The layout with the scale and shift that make it exact; None where none does."""
    axis = -1 if layout.tokens else 1
    x = latents.double().movedim(axis, 0).flatten(1)
    y = layout.pack(z).double().movedim(axis, 0).flatten(1)
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    spread = ((x - mean_x) ** 2).sum(1)
    if not bool((spread > 0).all()):
        return None
    scale = ((x - mean_x) * (y - mean_y)).sum(1) / spread
    shift = (mean_y - scale[:, None] * mean_x)[:, 0]
    near = 2e-2 if z.dtype in (torch.float16, torch.bfloat16) else EXACT
    error = (scale[:, None] * x + shift[:, None] - y).abs().max()
    if not bool((scale != 0).all()) or error > near * max(float(y.abs().max()), 1e-6):
        return None
    alike = (scale - scale.mean()).abs().max() <= 1e-5 * scale.abs().max()
    if alike:
        scale = scale.mean().expand_as(scale).clone()
    shift = torch.where(shift.abs() < 1e-6 * y.abs().max(), torch.zeros_like(shift), shift)
    return Codec(layout.shape, scale, shift, layout.patch, layout.patch_first, layout.tokens, layout.frame)


@torch.no_grad()
def through(vae: Any, codec: Codec, data: Tensor) -> Tensor:
    """Data as latents, by the autoencoder's most likely code."""
    z_rank = len(codec.shape) + 1
    entry = data.unsqueeze(2) if data.ndim == 4 and z_rank == 5 else data
    held = vae.encode(entry.to(vae.dtype))
    if hasattr(held, "latent_dist"):
        code = held.latent_dist.mode()
    else:
        code = getattr(held, "latents", None)
        code = getattr(held, "latent", None) if code is None else code
    if not isinstance(code, Tensor):
        raise Refused(f"{type(vae).__name__}.encode answers {type(held).__name__}, which holds no latents")
    return codec.encode(code.to(torch.promote_types(code.dtype, torch.float32))).to(data.dtype)


@torch.no_grad()
def back(vae: Any, codec: Codec, latents: Tensor) -> Tensor:
    """Latents as data. A single frame that pictures have not is dropped."""
    z = codec.decode(latents.to(torch.promote_types(latents.dtype, torch.float32)))
    found = vae.decode(z.to(vae.dtype), return_dict=False)[0]
    if found.ndim == 5 and codec.shape[1] == 1 and len(codec.shape) == 4 and _still(latents, codec):
        found = found[:, :, 0]
    result: Tensor = found.to(latents.dtype)
    return result


def _still(latents: Tensor, codec: Codec) -> bool:
    """Whether latents without a dimension of frames stand for pictures."""
    return codec.frame or codec.tokens or latents.ndim == 4
