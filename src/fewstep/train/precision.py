"""What ``[precision]`` does to a method's networks while they train, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..denoiser import Wrapped
from ..errors import Refused
from ..method import Method
from .recipe import PrecisionSection


class Prepared:
    """A method's networks as the recipe wants them to be held and run.

    ``rest`` is called after every update; ``finish`` gives the networks back as they were, in float32.
    """

    def __init__(self, method: Method, precision: PrecisionSection, device: torch.device | str) -> None:
        self._undo: list[Callable[[], None]] = []
        self._offload: Offload | None = None
        playing = [net for name in method.players for net in networks(getattr(method, name))]
        if precision.weights == "bfloat16":
            shared = _ids(method.teacher) & {i for net in playing for i in _ids(net)}
            if shared:
                raise Refused(
                    "precision.weights = 'bfloat16': the student shares weights with its teacher; leave it out"
                )
            self._undo += [_in_bfloat16(net) for net in _once(playing)]
        if precision.channels_last:
            self._undo += [_channels_last(net) for net in networks(method)]
        if precision.checkpointing:
            self._undo += [_checkpointing(net) for net in networks(method)]
        if precision.compile:
            self._undo += [_compiled(net) for net in networks(method)]
        if precision.offload_teacher:
            self._offload = Offload(method, device)
            self._undo.append(self._offload.finish)

    def rest(self) -> None:
        if self._offload is not None:
            self._offload.leave()

    def finish(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._offload = None


def networks(module: nn.Module | None) -> list[nn.Module]:
    """The networks inside a module's denoisers, each once, out of every wrapper."""
    found = []
    for part in [] if module is None else module.modules():
        if isinstance(part, Wrapped):
            net = part.net
            inner = getattr(net, "net", None)  # a recorded pipeline's
            found.append(inner if isinstance(inner, nn.Module) else net)
    return _once(found)


def _once(modules: list[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(p) for p in module.parameters()}


# -- weights and their layout -----------------------------------------------------------------------


def _in_bfloat16(net: nn.Module) -> Callable[[], None]:
    return lowered(net, torch.bfloat16)


def lowered(net: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Hold a network's weights in a narrow type; it goes on taking and giving float32. Returns the way back.

    Only the first argument, the noisy sample, is cast: a time of 999 has no place in eight bits.
    """
    net.to(dtype)

    def enter(_: nn.Module, args: Any) -> Any:
        return (args[0].to(dtype), *args[1:]) if args and isinstance(args[0], Tensor) else args

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        return output.float() if isinstance(output, Tensor) else output

    handles = [net.register_forward_pre_hook(enter), net.register_forward_hook(leave)]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        net.float()

    return undo


def _channels_last(net: nn.Module) -> Callable[[], None]:
    def lay(layout: torch.memory_format) -> None:
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    lay(torch.channels_last)
    return lambda: lay(torch.contiguous_format)


def _compiled(net: nn.Module) -> Callable[[], None]:
    net.compile()

    def undo() -> None:
        net._compiled_call_impl = None

    return undo


# -- recomputing instead of keeping -----------------------------------------------------------------


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """What is recomputed as one: members of module lists that have parts but no such members below them."""
    lists = [m for m in net.modules() if isinstance(m, nn.ModuleList)]
    members = [m for one in lists for m in one if any(True for _ in m.children())]
    ids = {id(m) for m in members}
    outer = {id(m) for m in members if any(id(below) in ids for below in m.modules() if below is not m)}
    yield from (m for m in _once(members) if id(m) not in outer)


def _checkpointing(net: nn.Module) -> Callable[[], None]:
    """Keep only what enters each block, and run it again on the way back."""
    if getattr(net, "_supports_gradient_checkpointing", False):  # diffusers: it knows its own blocks
        able: Any = net
        able.enable_gradient_checkpointing()
        disable: Callable[[], None] = able.disable_gradient_checkpointing
        return disable
    found = list(blocks(net)) or [m for m in net.children() if any(True for _ in m.children())] or [net]
    for block in found:
        _recomputed(block)

    def undo() -> None:
        for block in found:
            del block.forward  # the class's own is below

    return undo


def _recomputed(block: nn.Module) -> None:
    plain: Callable[..., Any] = block.forward
    draws = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in block.modules())

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)

    block.forward = forward  # type: ignore[method-assign]


# -- a teacher that waits elsewhere -----------------------------------------------------------------


class Offload:
    """A teacher whose weights wait in the host's memory and are on the device only while it is asked.

    The weights never change, so that going back costs nothing: the device's copies are dropped. Asked with
    gradients, the teacher stays until ``leave``, because the way back reads its weights again.
    """

    def __init__(self, method: Method, device: torch.device | str) -> None:
        self.device, self.moves, self.here = torch.device(device), 0, False
        teacher = method.teacher
        if teacher is None:
            raise Refused("precision.offload_teacher: this recipe has no teacher; leave it out")
        players = {i for name in method.players for i in _ids(getattr(method, name))}
        if _ids(teacher) & players:
            raise Refused("precision.offload_teacher: the student shares weights with its teacher; leave it out")
        self.weights = list(teacher.parameters())
        pinned = self.device.type == "cuda"
        self.home = [p.data.cpu().pin_memory() if pinned else p.data.cpu() for p in self.weights]
        self.handles = [
            teacher.register_forward_pre_hook(lambda *_: self.enter()),
            teacher.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self.leave()),
        ]
        self.here = True
        self.leave()

    def enter(self) -> None:
        if not self.here:
            self.moves += 1
            self._place([data.to(self.device, non_blocking=True) for data in self.home])
            self.here = True

    def leave(self) -> None:
        if self.here:
            self._place(self.home)
            self.here = False

    def _place(self, data: list[Tensor]) -> None:
        for parameter, value in zip(self.weights, data, strict=True):
            parameter.data = value

    def finish(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.enter()
