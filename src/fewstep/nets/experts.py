"""Several networks that share the noise levels: one is asked at a time, by the time it is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond, rows
from .base import Net, NetConfig
from .dit import DiTConfig
from .mlp import MLPConfig
from .unet import UNetConfig


class ExpertsConfig(NetConfig):
    """One description for all of them, and where one hands over to the next."""

    kind: Literal["experts"] = "experts"
    net: Annotated[UNetConfig | MLPConfig | DiTConfig, Field(discriminator="kind")]
    edges: tuple[float, ...] = Field(
        min_length=1, max_length=63, description="in what the networks read for a time, falling: below it the next acts"
    )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.net.shape

    @property
    def classes(self) -> int | None:
        return self.net.classes

    @property
    def beside(self) -> dict[str, int]:
        return self.net.beside

    def to_diffusers(self) -> dict[str, Any]:
        raise ValueError(f"a stock pipeline holds one network, this model {len(self.edges) + 1}")


class Experts(Net):
    """The first network acts at the noisiest times, above ``edges[0]``; each edge hands over to the next.

    A call whose rows stand at times of several networks is one batched call of each. The networks share a
    description, not weights; adapters of theirs may stand on the same weights.
    """

    def __init__(self, config: ExpertsConfig, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(nets) != len(config.edges) + 1 or sorted(set(config.edges), reverse=True) != list(config.edges):
            raise ValueError(f"{len(nets)} networks need {len(nets) - 1} falling edges, got {config.edges}")
        self.config: ExpertsConfig = config  # type: ignore[assignment]
        self.reads_s = config.net.reads_s
        self.experts = nn.ModuleList(nets)

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        whose = self._whose(time)
        asked = whose.unique().tolist()
        if len(asked) == 1:
            answer: Tensor = self.experts[asked[0]](x, time, cond, span)
            return answer
        places = [(whose == k).nonzero().squeeze(1) for k in asked]
        parts = [
            self.experts[k](x[at], time[at], rows(cond, at), None if span is None else span[at])
            for k, at in zip(asked, places, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()]

    def asked(self, time: Tensor) -> nn.Module:
        """The network that answers at one time [1]."""
        return self.experts[int(self._whose(time))]

    def _whose(self, time: Tensor) -> Tensor:
        whose = torch.zeros_like(time, dtype=torch.long)
        for edge in self.config.edges:
            whose += time <= edge
        return whose
