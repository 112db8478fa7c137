"""A small diffusion transformer with adaptive layer norm (Peebles & Xie 2023)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..cond import Cond
from .base import Beside, Net, NetConfig, TimeEmbedding, labels_of, sinusoids, with_beside


class DiTConfig(NetConfig):
    """Patches, width and depth."""

    kind: Literal["dit"] = "dit"
    shape: tuple[int, int, int] = Field(description="channels, height, width of a sample")
    patch: int = Field(2, ge=1)
    width: int = Field(96, ge=4, le=2**16)
    depth: int = Field(4, ge=1, le=1000)
    heads: int = Field(4, ge=1)
    classes: int | None = None
    reads_s: bool = False
    beside: Beside = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> DiTConfig:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of heads = {self.heads} and of 4")
        if any(side % self.patch for side in self.shape[1:]):
            raise ValueError(f"a picture of {self.shape[1]}x{self.shape[2]} has no whole patches of {self.patch}")
        return self

    def widest(self) -> tuple[int, int]:
        return self.width, 4

    def scaled(self, width: int, depth: int) -> DiTConfig:
        """Heads stay as wide as they are, or become wider: the largest number that divides the width."""
        most = max(1, self.heads * width // self.width)
        heads = next(h for h in range(most, 0, -1) if width % h == 0)
        return self.model_copy(update={"width": width, "depth": depth, "heads": heads})


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(active).unsqueeze(1).chunk(6, 2)
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1 * self.proj(mixed)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(Net):
    """Patches, transformer blocks modulated by time, label and span, and back to pixels."""

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config: DiTConfig = config  # type: ignore[assignment]
        self.reads_s = config.reads_s
        channels, height, wide = config.shape
        width, size = config.width, channels * config.patch**2
        self.rows, self.columns = height // config.patch, wide // config.patch
        self.stem = nn.Linear(size + sum(config.beside.values()) * config.patch**2, width)
        self.time_embedding = TimeEmbedding(64, width)
        if config.classes is not None:
            self.class_embedding = nn.Embedding(config.classes + 1, width)
        if config.reads_s:
            self.span_embedding = TimeEmbedding(64, width, silent=True)
        row, column = torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        parts = [sinusoids(index.flatten().float(), width // 2) for index in (row, column)]
        self.register_buffer("positions", torch.cat(parts, 1), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate, self.out = nn.Linear(width, 2 * width), nn.Linear(width, size)
        for layer in (self.modulate, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        embedded = self.time_embedding(time)
        if self.config.classes is not None:
            embedded = embedded + self.class_embedding(labels_of(cond, self.config.classes, x.shape[0], x.device))
        if self.reads_s and span is not None:
            embedded = embedded + self.span_embedding(span)
        active, patch = F.silu(embedded), self.config.patch
        entry = F.pixel_unshuffle(with_beside(x, cond, self.config.beside), patch)
        tokens = self.stem(entry.flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            tokens = block(tokens, active)
        shift, scale = self.modulate(active).unsqueeze(1).chunk(2, 2)
        pixels = self.out(self.norm(tokens) * (1 + scale) + shift).transpose(1, 2)
        return F.pixel_shuffle(pixels.reshape(x.shape[0], -1, self.rows, self.columns), patch)
