"""A conditional residual MLP, for vectors and for very small pictures."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond
from .base import Beside, Net, NetConfig, TimeEmbedding, labels_of, with_beside


class MLPConfig(NetConfig):
    """Width and depth of the residual stream."""

    kind: Literal["mlp"] = "mlp"
    shape: tuple[int, ...] = Field(description="of one sample")
    width: int = Field(128, ge=2, le=2**16)
    depth: int = Field(3, ge=1, le=1000)
    classes: int | None = None
    reads_s: bool = False
    beside: Beside = Field(default_factory=dict)

    def widest(self) -> tuple[int, int]:
        return self.width, 2

    def scaled(self, width: int, depth: int) -> MLPConfig:
        return self.model_copy(update={"width": width, "depth": depth})


class _Block(nn.Module):
    """``x + W2 silu(W1 norm(x) + e)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.entry, self.embed, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return x + self.out(self.act(self.entry(self.norm(x)) + self.embed(embedded)))


class MLP(Net):
    """Residual blocks over the flattened sample; time, label and span embeddings enter every block."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config: MLPConfig = config  # type: ignore[assignment]
        self.reads_s = config.reads_s
        size, width = math.prod(config.shape), config.width
        more = sum(config.beside.values()) * math.prod(config.shape[1:])
        self.stem = nn.Linear(size + more, width)
        self.time_embedding = TimeEmbedding(min(64, 2 * (width // 2)), width)
        if config.classes is not None:
            self.class_embedding = nn.Embedding(config.classes + 1, width)
        if config.reads_s:
            self.span_embedding = TimeEmbedding(min(64, 2 * (width // 2)), width, silent=True)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, size)

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        embedded = self.time_embedding(time)
        if self.config.classes is not None:
            embedded = embedded + self.class_embedding(labels_of(cond, self.config.classes, x.shape[0], x.device))
        if self.reads_s and span is not None:
            embedded = embedded + self.span_embedding(span)
        embedded = torch.nn.functional.silu(embedded)
        hidden = self.stem(with_beside(x, cond, self.config.beside).flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedded)
        return self.out(self.norm(hidden)).view_as(x)
