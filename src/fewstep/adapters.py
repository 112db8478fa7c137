"""Low-rank adapters on shared weights: teacher, student and critic are one network with different small parts.

``W' = W + (alpha / rank) up down`` (Hu et al. 2021, Sec. 4.1). ``share`` copies the modules of a network around the
very same tensors, and ``attach`` gives some of the copy's layers adapters of their own. So which adapters act is
said by which network is called: there is no switch. Calls of several players may be mixed in any order, and a
checkpointed pass that is computed again in the middle of a backward, in whatever thread, meets the layers of the
player that it belongs to.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from .part import Part

Module = TypeVar("Module", bound=nn.Module)

# a module with one of these is an attention ...
QUERIES = ("to_q", "to_qkv", "q", "q_proj", "qkv", "query", "wq", "linear_q")
# ... and its layers of these names are adapted
ATTENTION = (
    *QUERIES, "to_k", "to_v", "to_kv", "to_out", "to_out.0", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj",
    "k", "v", "o", "k_proj", "v_proj", "o_proj", "out_proj", "proj", "key", "value", "proj_attn", "wk", "wv", "wo",
    "linear_k", "linear_v", "linear_out",
)  # fmt: skip
CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class LoraOptions(Part):
    """Adapters of a student or a critic."""

    rank: int = Field(32, ge=1, description="of each adapter; a layer with fewer inputs or outputs takes fewer")
    alpha: float | None = Field(None, gt=0, description="strength is alpha / rank; None: alpha = rank")
    targets: str | tuple[str, ...] = Field(
        "attention", description='layers: "attention", "all" (linear and convolution), or patterns such as "*.to_q"'
    )

    @field_validator("targets")
    @classmethod
    def _names_something(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets or not all(targets):
            raise ValueError('targets must name layers: "attention", "all" or patterns')
        return targets

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LowRank(nn.Module):
    """Mixed into a layer's own class: ``layer(x) + scale up(down(x))``.

    The layer keeps its class, its names and its attributes, so that whoever reads ``layer.weight`` or asks
    ``isinstance(layer, nn.Linear)`` finds what was there. ``lora_down`` is [rank, in, *kernel] and random,
    ``lora_up`` [out, rank] and zero: at first nothing changes.
    """

    plain: ClassVar[type[nn.Module]]
    options: LoraOptions
    weight: nn.Parameter
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, x: Tensor, *rest: Any) -> Any:
        answer = super().forward(x, *rest)
        entry, up = x.to(self.lora_down.dtype), self.lora_up
        if isinstance(self, nn.modules.conv._ConvNd):
            layer: Any = self
            inside = layer._conv_forward(entry, self.lora_down, None)
            added = _convolution(layer)(inside, up.view(*up.shape, *(1 for _ in layer.kernel_size)))
        else:
            added = F.linear(F.linear(entry, self.lora_down), up)
        return torch.add(answer, added.to(answer.dtype), alpha=self.options.scale)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight."""
        return (self.options.scale * (self.lora_up @ self.lora_down.flatten(1))).view(self.weight.shape)


def _convolution(layer: nn.Module) -> Any:
    return next(run for kind, run in CONVOLUTIONS.items() if isinstance(layer, kind))


@functools.cache
def _with_adapter(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"LowRank{kind.__name__}", (LowRank, kind), {"plain": kind, "__module__": kind.__module__})


# -- one set of weights, several networks -----------------------------------------------------------


def share(module: Module) -> Module:
    """A copy of the modules around the same parameters and buffers, which never learn in the copy.

    Running statistics are the one exception: a copy in training mode would write them into the original.

    >>> twin = share(layer := nn.Linear(2, 2))
    >>> twin is layer, twin.weight is layer.weight
    (False, True)
    """
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    for part in module.modules():
        if not getattr(part, "track_running_stats", False):
            memo.update((id(b), b) for b in part.buffers(recurse=False))
    twin = copy.deepcopy(module, memo)
    adopt(twin, module)
    return twin


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Put the parameters and buffers of ``source`` in the place of those of the same name and shape."""
    theirs: dict[str, Tensor] = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for path, part in module.named_modules():
        taken = set()
        for table in (part._parameters, part._buffers):
            for name, own in table.items():
                other = theirs.get(f"{path}.{name}" if path else name)
                keeps = table is part._buffers and getattr(part, "track_running_stats", False)
                if own is not None and other is not None and other.shape == own.shape and not keeps:
                    table[name] = other  # type: ignore[assignment]
                    taken.add(name)
        part.shared_names = frozenset(taken)  # type: ignore[assignment]


def shared(module: nn.Module) -> list[Tensor]:
    """The tensors of a module that belong to what it was shared from."""
    found: list[Tensor] = []
    for part in module.modules():
        for name in getattr(part, "shared_names", ()):
            tensor = {**part._buffers, **part._parameters}.get(name)
            if tensor is not None:
                found.append(tensor)
    return found


def own(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state that are its own: everything, where nothing is shared."""
    theirs = {id(t) for t in shared(module)}
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if id(t) not in theirs}


def learn(module: Module) -> Module:
    """Every parameter of a module learns, but those that it shares."""
    theirs = {id(t) for t in shared(module)}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) not in theirs)
    return module


def twin(module: Module) -> Module:
    """A deep copy; what the module shares, the copy shares as well."""
    return copy.deepcopy(module, {id(t): t for t in shared(module)})


# -- adapters ---------------------------------------------------------------------------------------


def adapted(module: Module, options: LoraOptions) -> Module:
    """A network, or a denoiser, on the same weights with adapters of its own, ready to learn."""
    return learn(attach(share(module), options))


def attach(module: Module, options: LoraOptions) -> Module:
    """Give the chosen layers of a module adapters, in place; ValueError where no layer is chosen."""
    chosen = targets(module, options.targets)
    if not chosen:
        kinds = ", ".join(list(_layers(module))[-3:]) or "none"
        raise ValueError(
            f"adapters found no layer for targets {options.targets!r}: "
            f'give "all" or patterns of its linear and convolution layers (such as {kinds})'
        )
    for layer in chosen.values():
        _attach(layer, options)
    return module


def _attach(layer: Any, options: LoraOptions) -> None:
    out, entry = layer.weight.shape[0], layer.weight.shape[1:]
    rank = min(options.rank, out, math.prod(entry))
    dtype = torch.promote_types(layer.weight.dtype, torch.float32) if layer.weight.is_floating_point() else None
    where: dict[str, Any] = {"device": layer.weight.device, "dtype": dtype or torch.float32}
    kind: Any = type(layer)
    layer.__class__ = _with_adapter(kind)
    layer.options = options
    layer.lora_down = nn.Parameter(torch.empty(rank, *entry, **where))
    layer.lora_up = nn.Parameter(torch.zeros(out, rank, **where))
    nn.init.kaiming_uniform_(layer.lora_down, a=math.sqrt(5))


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """What can be adapted: linear layers and convolutions without groups that are entered by a call."""
    never = nn.modules.linear.NonDynamicallyQuantizableLinear  # nn.MultiheadAttention reads its weight instead
    found: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        if isinstance(part, (LowRank, never)):
            continue
        if isinstance(part, nn.Linear) or isinstance(part, nn.modules.conv._ConvNd) and _fits(part):
            found[path] = part
    return found


def _fits(layer: nn.modules.conv._ConvNd) -> bool:
    return layer.groups == 1 and isinstance(layer, tuple(CONVOLUTIONS))


def targets(module: nn.Module, wanted: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers that a choice means, by their dotted names.

    A pattern stands for a whole name or its end; a ``*`` in it for anything.

    >>> from fewstep.nets import build
    >>> net = build({"kind": "dit", "shape": (1, 4, 4), "width": 8, "depth": 1, "heads": 2})
    >>> list(targets(net, "attention")), list(targets(net, ("mlp.*",)))
    (['blocks.0.qkv', 'blocks.0.proj'], ['blocks.0.mlp.0', 'blocks.0.mlp.2'])
    """
    layers = _layers(module)
    if wanted == "all":
        return layers
    if wanted == "attention":
        homes = {path.rpartition(".")[0] for path in layers if path.rpartition(".")[2] in QUERIES}
        names = {f"{home}.{name}" if home else name for home in homes for name in ATTENTION}
        return {path: layer for path, layer in layers.items() if path in names}
    patterns = (wanted,) if isinstance(wanted, str) else wanted
    return {
        path: layer
        for path, layer in layers.items()
        if any(fnmatchcase(path, p) or fnmatchcase(path, f"*.{p}") for p in patterns)
    }


def adapters(module: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """The layers of a module that have adapters, by their dotted names."""
    for path, part in module.named_modules():
        if isinstance(part, LowRank):
            yield path, part


def options_of(module: nn.Module) -> LoraOptions | None:
    """The options that a module's adapters were made with; None for a module without."""
    return next((layer.options for _, layer in adapters(module)), None)


@torch.no_grad()
def fold(module: Module) -> Module:
    """Fold a module's adapters into weights of its own, in place; what it shared with others is not touched."""
    layer: Any
    for _, layer in list(adapters(module)):
        weight = layer.weight + layer.delta().to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        del layer.lora_down, layer.lora_up, layer.options
        layer.shared_names = frozenset(getattr(layer, "shared_names", ())) - {"weight"}
        layer.__class__ = type(layer).plain
    return module
