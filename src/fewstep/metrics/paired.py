"""Two pictures from equal noise and an equal prompt: how far apart they are; and how a picture looks by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Refused, need

EQUAL = 100.0
"""Decibels that stand for no difference at all."""
WINDOW = 1.5
"""Standard deviation of SSIM's window in pixels (Wang et al. 2004); narrower where a picture is too small for it."""
SCALE = 256
"""Pixels of the shorter side near which SSIM is taken; larger pictures are averaged down by a whole factor, as its
authors do."""
PART = 16
"""Pictures that are compared at once."""


def paired(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Of every sample and its partner, float64 [n]: ``rmse``, and of pictures ``psnr`` and ``ssim``.

    Pictures are uint8 [n, 1 or 3, h, w] and their ``rmse`` is a share of the full range 0..255; other samples are
    compared in their own units. ``psnr`` is ``-20 log10(rmse)`` in decibels, 100 between equals; ``ssim`` is 1
    between equals and left out below 3 pixels.

    >>> grey = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    >>> round(paired(grey, grey + 51)["rmse"].item(), 6)
    0.2
    """
    if a.shape != b.shape:
        raise Refused(f"pairs have one shape, got {list(a.shape)} and {list(b.shape)}")
    picture = a.dtype == torch.uint8
    found: dict[str, list[Tensor]] = {}
    for x, y in zip(a.split(PART), b.split(PART), strict=True):
        x, y = x.double(), y.double()
        square = (x - y).flatten(1).square().mean(1)
        found.setdefault("rmse", []).append(square.sqrt() / (255 if picture else 1))
        if picture:
            need("torchmetrics", "evaluate")
            from torchmetrics.functional.image import (
                peak_signal_noise_ratio,
                structural_similarity_index_measure,
            )

            loud = peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
            found.setdefault("psnr", []).append(loud.clamp(max=EQUAL))
            coarse = max(1, round(min(x.shape[2:]) / SCALE))
            reach = min(5, (min(x.shape[2:]) // coarse - 1) // 2)
            if reach > 0:
                sigma = WINDOW if reach == 5 else reach / 3.5
                x, y = (F.avg_pool2d(side.float(), coarse) for side in (x, y))
                alike = structural_similarity_index_measure(x, y, sigma=sigma, data_range=255.0, reduction="none")
                found.setdefault("ssim", []).append(alike.double().reshape(-1))
    return {name: torch.cat(values) for name, values in found.items()}


def looks(pictures: Tensor) -> dict[str, Tensor]:
    """Of every picture uint8 [n, 1 or 3, h, w], float64 [n]: ``saturation`` and ``high_frequency``.

    ``saturation`` is the mean of largest minus smallest channel, of grey pictures the mean distance from middle
    grey: students that lean on guidance become too colourful, averaging ones pale. ``high_frequency`` is the mean
    variance within blocks of 2x2 pixels, the finest octave: small where a student blurs, large where it makes
    grid artefacts. Neither means much alone: hold them against the teacher's.
    """
    colours, fine = [], []
    for part in pictures.split(PART):
        x = part.double() / 255
        colour = x.amax(1) - x.amin(1) if x.shape[1] == 3 else (2 * x[:, 0] - 1).abs()
        colours.append(colour.flatten(1).mean(1))
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        blocks = x[..., :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [n, c, h/2, 2, w/2, 2]
        fine.append(blocks.var((3, 5), correction=0).flatten(1).mean(1))
    return {"saturation": torch.cat(colours), "high_frequency": torch.cat(fine)}
