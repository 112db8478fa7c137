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
    "inherited",
    "parameters_of",
    "resized",
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
    count = parameters_of(config)
    if count > MOST:
        raise ValueError(f"a network of {count} parameters is too large: at most {MOST}")
    return _build(config)


def parameters_of(config: NetConfig) -> int:
    """How many parameters a network has; no memory is taken: a description may come from anywhere."""
    with torch.device("meta"):
        return sum(value.numel() for value in _build(config).parameters())


def resized(config: NetConfig, size: float) -> NetConfig:
    """The same kind of network with ``size`` times the parameters, or a little fewer; ``size`` in (0, 1].

    Parameters grow like width^2 depth: the depth is multiplied by ``size^(1/3)``, rounded, and the width is the
    largest that fits. ValueError where even the narrowest network is too large.

    >>> whole = config_of({"kind": "mlp", "shape": (2,), "width": 64, "depth": 4})
    >>> small = resized(whole, 0.25)
    >>> small.depth, parameters_of(small) <= 0.25 * parameters_of(whole)
    (3, True)
    """
    if not 0 < size <= 1:
        raise ValueError(f"a size is a share of the parameters in (0, 1], got {size:g}")
    if size == 1:
        return config
    most, (top, step) = size * parameters_of(config), config.widest()
    for depth in range(max(1, round(config.depth * size ** (1 / 3))), 0, -1):
        for width in range(top - top % step, 0, -step):
            found = config.scaled(width, depth)
            if parameters_of(found) <= most:
                return config_of(found.model_dump())
    raise ValueError(f"no network of kind {config.kind!r} has {size:g} of the parameters: take a larger size")


def inherited(net: Net, larger: Net) -> int:
    """Give a network the weights of a larger one of its kind, in place; how many tensors were taken.

    A tensor of the same name whose sides are no smaller is thinned out: of each side the rows that stand at even
    distances (Xu et al. 2023, "Initializing Models with Larger Ones", https://arxiv.org/abs/2311.18823). Equal sides
    thus choose equal channels in every layer. A tensor of equal shape is taken whole.
    """
    theirs, taken = larger.state_dict(), 0
    with torch.no_grad():
        for name, own in net.state_dict(keep_vars=True).items():
            value = theirs.get(name)
            if (
                value is None
                or value.ndim != own.ndim
                or any(a < b for a, b in zip(value.shape, own.shape, strict=True))
            ):
                continue
            for side, length in enumerate(own.shape):
                value = value.index_select(
                    side, torch.arange(length, device=value.device) * value.shape[side] // length
                )
            own.copy_(value)
            taken += 1
    return taken


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
