"""Leaving residual blocks of a network out, without touching its weights.

AutoDiffusion (Li et al. 2023, https://arxiv.org/abs/2309.10438) leaves out, at each step of a sampler, the blocks that
the step can do without. A block ``x + f(x)`` that is left out is the identity and costs nothing.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Key = int | str
Route = Key | tuple[Key | None, ...]
"""Which arguments a block gives back when it is left out: one, or one for each of the outputs."""

_lock = threading.Lock()
_out: ContextVar[frozenset[int]] = ContextVar("blocks left out", default=frozenset())
_SUMS = ("Add", "Sub", "Addcmul", "Div")  # Div: a sum over a constant, in diffusers
_MOVES = (
    "Clone", "ToCopy", "Alias", "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze",
    "Unsqueeze", "Cat", "Slice", "Split", "SplitWithSizes", "Narrow",
)  # fmt: skip


def network_of(model: Any) -> nn.Module:
    """The network inside a student, guidance, counters and other wrappers; a bare network is its own."""
    while True:
        parts = getattr(model, "_modules", {})
        inner = next((parts[name] for name in ("denoiser", "inner", "net") if name in parts), None)
        if inner is None:
            if not isinstance(model, nn.Module):
                raise ValueError(f"{type(model).__name__} holds no network whose blocks could be left out")
            return model
        model = inner


def skippable(model: Any, run: Callable[[], Any]) -> dict[str, int]:
    """The blocks that can be left out, and what each costs: names in ``network_of(model)``, and FLOPs of ``run``.

    ``run`` asks the model once. A block is a submodule that is called once, costs something, and gives each of its
    outputs as an argument of the same shape plus something: that sum is seen in the graph of the run, so any network
    has them found, whatever its classes. Of blocks inside blocks the innermost count.
    """
    net = network_of(model)
    names = {id(module): name for name, module in net.named_modules() if name}
    calls: dict[str, int] = {}
    routed: set[str] = set()
    handles = []
    pending: list[tuple[int, dict[Any, Key], dict[Key, Any]]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entries, nodes, args, kwargs = _marked(args, kwargs)
        pending.append((id(module), nodes, entries))
        return args, kwargs

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        _, nodes, entries = pending.pop()
        name = names[id(module)]
        calls[name] = calls.get(name, 0) + 1
        if _route(output, nodes, entries) is not None:
            routed.add(name)

    for _, module in ((n, m) for n, m in net.named_modules() if n):
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name in routed if calls[name] == 1]
    once = [name for name in once if not any(other.startswith(f"{name}.") for other in once)]
    whole, found = flops(run), {}
    for name in (n for n in names.values() if n in set(once)):
        with leaving_out(model, (name,)):
            with torch.no_grad():
                run()  # the first time a block learns what it gives back, which costs
            cost = whole - flops(run)
        if cost > 0:
            found[name] = cost
    return found


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in ``run``."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        run()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Two products for each head: queries with keys, weights with values."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))


_ATTENTION: dict[Any, Any] = {
    getattr(torch.ops.aten, name): _attention
    for name in ("_scaled_dot_product_flash_attention_for_cpu",)
    if hasattr(torch.ops.aten, name)
}


@contextmanager
def leaving_out(model: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, these blocks of the model's network are the identity. It holds for this thread alone.

    ValueError for a name that is no submodule; while running, for one that is no residual block.
    """
    wanted = set(names)
    if not wanted:
        yield
        return
    net = network_of(model)
    blocks = {name: module for name, module in net.named_modules() if name in wanted}
    for name in sorted(wanted):
        if name not in blocks:
            raise ValueError(
                f"{type(net).__name__} has no block {name!r} to leave out: was the plan made for another network?"
            )
    with _lock:
        for name, module in blocks.items():
            _watch(module, name)
    token = _out.set(_out.get() | {id(module) for module in blocks.values()})
    try:
        yield
    finally:
        _out.reset(token)


def _watch(module: nn.Module, name: str) -> None:
    """Let a block look whether it is left out, whenever it is called; its copies look for themselves."""
    if "_whole" in module.__dict__:
        return
    module.__dict__["_whole"] = module.__dict__.get("forward")
    module.__dict__["_block_name"] = name
    module.__dict__["_route"] = None
    module.__dict__["forward"] = types.MethodType(_forward, module)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    whole = self.__dict__["_whole"] or types.MethodType(type(self).forward, self)
    if id(self) not in _out.get():
        return whole(*args, **kwargs)
    route = self.__dict__["_route"]
    if route is None:
        with torch.inference_mode(False), torch.enable_grad():
            entries, nodes, marked, named = _marked(*tree_map(_plain, (args, kwargs)))
            route = _route(whole(*marked, **named), nodes, entries)
        if route is None:
            raise ValueError(f"{self.__dict__['_block_name']!r} is no residual block: it cannot be left out")
        self.__dict__["_route"] = route
    given = _named(args, kwargs)
    return tuple(None if k is None else given[k] for k in route) if isinstance(route, tuple) else given[route]


def _plain(value: Any) -> Any:
    """A tensor that a graph may hold."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Key, Any]:
    named: dict[Key, Any] = dict(enumerate(args))
    named.update(kwargs)
    return named


def _marked(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[Key, Any], dict[Any, Key], tuple[Any, ...], dict[str, Any]]:
    """The arguments, each float tensor with a node of its own in the graph; and those nodes' keys."""
    entries = _named(args, kwargs)
    nodes: dict[Any, Key] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            fresh = value if value.requires_grad else value.detach().requires_grad_(True)
            entries[key] = fresh.clone()
            nodes[entries[key].grad_fn] = key
    return entries, nodes, tuple(entries[i] for i in range(len(args))), {k: entries[k] for k in kwargs}


def _route(output: Any, nodes: dict[Any, Key], entries: dict[Key, Any]) -> Route | None:
    """The argument that each output is a sum with; None where there is not exactly one for each."""
    if isinstance(output, Tensor):
        found = _summands(output, nodes, entries)
        return found[0] if found else None
    if type(output) is not tuple or not any(isinstance(value, Tensor) for value in output):
        return None
    keys: list[Key | None] = []
    for value in output:
        if value is None:
            keys.append(None)
            continue
        found = _summands(value, nodes, entries) if isinstance(value, Tensor) else []
        if len(found) != 1 or found[0] in keys:
            return None
        keys.append(found[0])
    return tuple(keys)


def _summands(output: Tensor, nodes: dict[Any, Key], entries: dict[Key, Any]) -> list[Key]:
    """The arguments of the output's shape that reach it by sums and moves alone, in the order of the arguments."""
    stack, seen, found = [output.grad_fn], set(), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            value = entries[nodes[node]]
            if value.shape == output.shape and value.dtype == output.dtype and len(seen) > 1:
                found.add(nodes[node])
            continue
        kind = node.name().split("Backward")[0]
        if kind in _SUMS or kind in _MOVES:
            following = [n for n, _ in node.next_functions]
            stack += following[:1] if kind in ("Sub", "Addcmul", "Div") else following
    return [key for key in entries if key in found]
