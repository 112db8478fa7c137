"""A small U-Net, in names and arithmetic a diffusers ``UNet2DModel``, so that what it learns ships as one."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..cond import Cond
from .base import Beside, Net, NetConfig, TimeEmbedding, labels_of, sinusoids, with_beside


class UNetConfig(NetConfig):
    """Widths and depths. ``patch`` > 1 folds patches of pixels into channels first."""

    kind: Literal["unet"] = "unet"
    shape: tuple[int, int, int] = Field(description="channels, height, width of a sample")
    widths: tuple[int, ...] = Field(
        (16, 32), max_length=16, description="channels of each level; each level halves the picture"
    )
    depth: int = Field(1, ge=1, le=1000, description="residual blocks a level on the way down (one more on the way up)")
    attention: tuple[bool, ...] = Field((False, True), description="self-attention at each level")
    mid_attention: bool = True
    head_width: int = Field(8, ge=1)
    groups: int = Field(8, ge=1, description="groups of every normalisation")
    classes: int | None = Field(None, description="labels; one more row is kept for no condition")
    scale_shift: bool = Field(False, description="the embedding scales and shifts, instead of being added")
    dropout: float = Field(0.0, ge=0, lt=1)
    patch: int = Field(1, ge=1)
    reads_s: bool = Field(False, description="also reads the length of the jump: a flow map")
    beside: Beside = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> UNetConfig:
        if len(self.attention) != len(self.widths):
            raise ValueError(f"attention has {len(self.attention)} entries for {len(self.widths)} widths")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"width {width} is not a multiple of groups = {self.groups}")
        for level, wanted in enumerate(self.attention):
            if wanted and self.widths[level] % self.head_width:
                raise ValueError(f"width {self.widths[level]} is not a multiple of head_width = {self.head_width}")
        least = self.patch * 2 ** (len(self.widths) - 1)
        if any(side % least for side in self.shape[1:]):
            raise ValueError(
                f"a picture of {self.shape[1]}x{self.shape[2]} cannot be halved to {len(self.widths)} levels"
            )
        return self

    def widest(self) -> tuple[int, int]:
        return max(self.widths), math.gcd(self.groups, 2)

    def scaled(self, width: int, depth: int) -> UNetConfig:
        """Widths in proportion, rounded to the step of ``widest``, and as many groups as divide them.

        Heads stay as wide as they are, or become wider, where the widths allow it: narrow ones cost most of the time.
        """
        top, step = self.widest()
        widths = tuple(max(step, round(w * width / top / step) * step) for w in self.widths)
        attended = [w for w, yes in zip(widths, self.attention, strict=True) if yes]
        common = math.gcd(*attended, *([widths[-1]] if self.mid_attention else []))
        wide = (w for w in range(min(self.head_width, common), common + 1) if w and common % w == 0)
        return self.model_copy(
            update={
                "widths": widths,
                "depth": depth,
                "groups": math.gcd(self.groups, *widths),
                "head_width": next(wide) if common else self.head_width,
            }
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The same network as arguments of ``UNet2DModel``; ValueError where it has no such form."""
        if self.patch != 1 or self.reads_s:
            raise ValueError("only a U-Net with patch = 1 that reads no span is a UNet2DModel")
        if self.beside:
            raise ValueError(
                f"no stock pipeline of pixels gives its U-Net a picture beside them ({', '.join(self.beside)})"
            )
        return {
            "sample_size": self.shape[1] if self.shape[1] == self.shape[2] else list(self.shape[1:]),
            "in_channels": self.shape[0],
            "out_channels": self.shape[0],
            "block_out_channels": list(self.widths),
            "layers_per_block": self.depth,
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in self.attention],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention)],
            "add_attention": self.mid_attention,
            "attention_head_dim": self.head_width,
            "norm_num_groups": self.groups,
            "attn_norm_num_groups": self.groups,
            "num_class_embeds": None if self.classes is None else self.classes + 1,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "dropout": self.dropout,
        }


class _Residual(nn.Module):
    def __init__(self, entry: int, width: int, embedding: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, entry, eps=1e-5)
        self.conv1 = nn.Conv2d(entry, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, 2 * width if config.scale_shift else width)
        self.norm2 = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(entry, width, 1) if entry != width else None
        self.scale_shift = config.scale_shift

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        shift = self.time_emb_proj(active)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, 1)
            hidden = torch.addcmul(shift, self.norm2(hidden), 1 + scale)
        else:
            hidden = self.norm2(hidden + shift)
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = width // config.head_width
        self.group_norm = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(tokens).view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, width)
        return x + self.to_out[0](mixed).transpose(1, 2).reshape(batch, width, height, wide)


class _Conv(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Level(nn.Module):
    """Residual blocks, each with its attention, and a change of size at the end."""

    def __init__(
        self, entries: list[int], width: int, embedding: int, config: UNetConfig, attention: bool, resize: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(entry, width, embedding, config) for entry in entries)
        if attention:
            self.attentions = nn.ModuleList(_Attention(width, config) for _ in entries)
        self.attends = attention
        if resize == "down":
            self.downsamplers = nn.ModuleList([_Conv(width, 2)])
        if resize == "up":
            self.upsamplers = nn.ModuleList([_Conv(width, 1)])
        self.resize = resize

    def block(self, i: int, x: Tensor, active: Tensor) -> Tensor:
        x = self.resnets[i](x, active)
        return self.attentions[i](x) if self.attends else x

    def forward(self, x: Tensor, active: Tensor, skips: list[Tensor]) -> Tensor:
        """Down: pushes every block's output on ``skips``. Up: pops one for each block."""
        if self.resize == "up" or self._rising:
            for i in range(len(self.resnets)):
                x = self.block(i, torch.cat([x, skips.pop()], 1), active)
            if self.resize == "up":
                x = self.upsamplers[0](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return x
        for i in range(len(self.resnets)):
            x = self.block(i, x, active)
            skips.append(x)
        if self.resize == "down":
            x = self.downsamplers[0](x)
            skips.append(x)
        return x

    _rising = False


class _Rise(_Level):
    _rising = True


class _Middle(nn.Module):
    def __init__(self, width: int, embedding: int, config: UNetConfig) -> None:
        super().__init__()
        self.attends = config.mid_attention
        if self.attends:
            self.attentions = nn.ModuleList([_Attention(width, config)])
        self.resnets = nn.ModuleList(_Residual(width, width, embedding, config) for _ in range(2))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        x = self.resnets[0](x, active)
        if self.attends:
            x = self.attentions[0](x)
        return self.resnets[1](x, active)


class UNet(Net):
    """Residual U-Net with class and time embeddings.

    Where ``config.patch`` is 1 its state dict loads into ``UNet2DModel(**config.to_diffusers())``, and the
    two give the same output.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config: UNetConfig = config  # type: ignore[assignment]
        self.reads_s = config.reads_s
        widths, embedding = config.widths, 4 * config.widths[0]
        channels = config.shape[0] * config.patch**2
        self.conv_in = nn.Conv2d(channels + sum(config.beside.values()) * config.patch**2, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], embedding)
        if config.classes is not None:
            self.class_embedding = nn.Embedding(config.classes + 1, embedding)
        if config.reads_s:
            self.span_embedding = TimeEmbedding(widths[0], embedding, silent=True)

        self.down_blocks = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, wide in enumerate(widths):
            entries = [width] + [wide] * (config.depth - 1)
            last = level == len(widths) - 1
            self.down_blocks.append(
                _Level(entries, wide, embedding, config, config.attention[level], None if last else "down")
            )
            skips += [wide] * (config.depth if last else config.depth + 1)
            width = wide
        self.mid_block = _Middle(width, embedding, config)
        self.up_blocks = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            entries = []
            for i in range(config.depth + 1):
                entries.append((width if i == 0 else wide) + skips.pop())
            self.up_blocks.append(
                _Rise(entries, wide, embedding, config, config.attention[level], None if level == 0 else "up")
            )
            width = wide
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        embedded = self.time_embedding(time)
        if self.config.classes is not None:
            embedded = embedded + self.class_embedding(labels_of(cond, self.config.classes, x.shape[0], x.device))
        if self.reads_s and span is not None:
            embedded = embedded + self.span_embedding(span)
        active = F.silu(embedded)
        patch = self.config.patch
        x = with_beside(x, cond, self.config.beside)
        x = self.conv_in(F.pixel_unshuffle(x, patch) if patch > 1 else x)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, active, skips)
        x = self.mid_block(x, active)
        for level in self.up_blocks:
            x = level(x, active, skips)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return F.pixel_shuffle(x, patch) if patch > 1 else x

    def fold(self, span: float) -> UNet:
        """The network of one jump length, with no span to read: its embedding goes into a bias."""
        if not self.reads_s:
            return self
        plain = UNet(self.config.model_copy(update={"reads_s": False}))
        state = {k: v for k, v in copy.deepcopy(self.state_dict()).items() if not k.startswith("span_embedding")}
        with torch.no_grad():
            length = torch.full((1,), span, device=self.conv_in.weight.device)
            state["time_embedding.linear_2.bias"] += self.span_embedding(length)[0]
        plain.load_state_dict(state)
        return plain.to(self.conv_in.weight.device)

    @torch.no_grad()
    def hold(self, time: float) -> None:
        """From now on this is the network of one time, whatever it is told: its time features go into a bias.

        A slow clock (``t`` itself) makes a network steep in what it reads: told that time in other units, rounded, it
        would answer otherwise.
        """
        first = self.time_embedding.linear_1
        told = sinusoids(torch.full((1,), time, dtype=torch.float64), self.time_embedding.width)
        first.bias.add_((first.weight.double() @ told[0].to(first.weight.device)).to(first.bias))
        first.weight.zero_()
