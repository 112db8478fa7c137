"""Small networks that train on a CPU, and heads on the features of any network."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from .base import Net, NetConfig
from .dit import DiT, DiTConfig
from .experts import Experts, ExpertsConfig
from .heads import FeatureHead
from .mlp import MLP, MLPConfig
from .unet import UNet, UNetConfig

__all__ = [
    "MLP",
    "DiT",
    "DiTConfig",
    "Experts",
    "ExpertsConfig",
    "FeatureHead",
    "MLPConfig",
    "Net",
    "NetConfig",
    "UNet",
    "UNetConfig",
    "build",
    "config_of",
]

MOST = 2**30
"""Parameters of one network of this package."""

AnyConfig = Annotated[UNetConfig | MLPConfig | DiTConfig | ExpertsConfig, Field(discriminator="kind")]


def config_of(description: dict[str, Any] | NetConfig) -> NetConfig:
    """A network's description, checked. ValueError names what is wrong in it."""
    if isinstance(description, NetConfig):
        return description
    config: NetConfig = TypeAdapter(AnyConfig).validate_python(description)
    return config


def build(description: dict[str, Any] | NetConfig) -> Net:
    """The network that a description stands for, with fresh weights.

    >>> build({"kind": "mlp", "shape": (2,), "width": 8, "depth": 1}).config.kind
    'mlp'
    """
    config = config_of(description)
    with torch.device("meta"):  # shapes alone: a description may come from anywhere, and memory is not asked first
        count = sum(value.numel() for value in _build(config).parameters())
    if count > MOST:
        raise ValueError(f"a network of {count} parameters is too large: at most {MOST}")
    return _build(config)


def _build(config: NetConfig) -> Net:
    if isinstance(config, UNetConfig):
        return UNet(config)
    if isinstance(config, DiTConfig):
        return DiT(config)
    if isinstance(config, MLPConfig):
        return MLP(config)
    if isinstance(config, ExpertsConfig):
        return Experts(config, [_build(config.net) for _ in range(len(config.edges) + 1)])
    raise ValueError(f"unknown network kind {config.kind!r}")
