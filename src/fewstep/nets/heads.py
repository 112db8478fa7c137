"""Discriminator heads on the features of any network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from ..denoiser import Features


class FeatureHead(nn.Module):
    """One logit a sample from features of any rank: vectors [B, C], tokens [B, N, C], pictures [B, C, ...].

    Every feature is pooled to its mean and root mean square over positions and normalised, so neither a
    layer's name nor a resolution nor a block count matters; the pooled features and, with ``classes``, a
    projection on the label (Miyato & Koyama 2018) give the logit.

    Parameters
    ----------
    features: an example of what the head will see. width: of the hidden layer.
    """

    def __init__(self, features: Features, width: int = 64, classes: int | None = None) -> None:
        super().__init__()
        sizes = [self._pool(feature).shape[1] for feature in features]
        self.stems = nn.ModuleList(nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for size in sizes)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        self.project = nn.Embedding(classes + 1, width) if classes is not None else None
        if self.project is not None:
            nn.init.zeros_(self.project.weight)

    @staticmethod
    def _pool(feature: Tensor) -> Tensor:
        if feature.ndim == 2:
            return feature
        flat = feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)
        return torch.cat([flat.mean(1), torch.sqrt(flat.square().mean(1) + 1e-8)], 1)

    def forward(self, features: Features, cond: Cond = None) -> Tensor:
        """Logits [batch, 1]."""
        if len(features) != len(self.stems):
            raise ValueError(f"this head was built for {len(self.stems)} features, got {len(features)}")
        summed = torch.stack([stem(self._pool(f)) for stem, f in zip(self.stems, features, strict=True)]).sum(0)
        hidden = F.silu(self.hidden(F.silu(summed / math.sqrt(len(features)))))
        logit = self.out(hidden)
        if self.project is not None and isinstance(cond, Tensor):
            logit = logit + (self.project(cond) * hidden).sum(1, keepdim=True) / math.sqrt(hidden.shape[1])
        return logit
