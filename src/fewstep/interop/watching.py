"""Watching a pipeline while it runs: what its parts are called with, and what its scheduler is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import Refused
from .recorded import first_value, flat
from .roles import Call, Step


class Enough(Exception):
    """Raised inside a pipeline once everything was seen."""


@dataclass
class Watch:
    """What was seen: the calls of every part in order, the steps, and what the part ``decoder`` was to decode."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    decoded: Tensor | None = None
    decoder: str | None = None


@contextmanager
def watched(pipe: Any, stop: tuple[str, int] | None = None) -> Iterator[Watch]:
    """Hook a pipeline's parts and its scheduler; ``stop`` ends the run as a part is entered for the n-th time.

    Without it the run ends where the autoencoder would decode.
    """
    seen = Watch()
    handles = []
    undo: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        signature = inspect.signature(type(module).forward)
        pending: list[dict[str, Any]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            bound = signature.bind(module, *args, **kwargs).arguments
            named: dict[str, Any] = {}
            for key, value in list(bound.items())[1:]:
                if signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
                    named.update(flat(value))
                else:
                    named.update(flat({key: value}))
            held = {k: kept(v) for k, v in named.items()}
            if stop is not None and stop[0] == name and len(seen.calls.get(name, [])) + 1 == stop[1]:
                seen.calls.setdefault(name, []).append(Call(held, None, 0))
                raise Enough
            pending.append(held)

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                answer = kept(first_value(output))
            except Refused:
                pending.pop()
                return
            seen.answers.setdefault(name, output)
            seen.calls.setdefault(name, []).append(Call(pending.pop(), answer, len(seen.steps)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    def until(name: str, part: Any) -> None:
        plain = part.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            if seen.steps and stop is None:
                seen.decoded, seen.decoder = kept(z), name
                raise Enough
            return plain(z, *args, **kwargs)

        part.decode = decode
        undo.append(part)

    learning, types = [], []
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            watch(name, part)
            learning += [module for module in part.modules() if module.training]
            types.append((part, next((p.dtype for p in part.parameters()), None)))
            part.eval()
            if callable(getattr(part, "decode", None)):
                until(name, part)
    scheduler = pipe.scheduler
    plain = scheduler.step
    signature = inspect.signature(plain)

    @functools.wraps(plain)  # pipelines look at its arguments before they pass a generator
    def step(*args: Any, **kwargs: Any) -> Any:
        given = list(signature.bind(*args, **kwargs).arguments.values())
        output, time, sample = (kept(value) for value in given[:3])
        answer = plain(*args, **kwargs)
        result = answer[0] if isinstance(answer, tuple) else getattr(answer, "prev_sample", None)
        seen.steps.append(Step(output, time, sample, kept(result)))
        return answer

    scheduler.step = step
    try:
        yield seen
    finally:
        for module in learning:
            module.training = True
        del scheduler.step
        for part in undo:
            del part.decode
        for handle in handles:
            handle.remove()
        for part, dtype in types:  # a run that was stopped half-way may have left an autoencoder in another type
            if dtype is not None and next(part.parameters()).dtype is not dtype:
                part.to(dtype)
        if callable(free := getattr(pipe, "maybe_free_model_hooks", None)):
            free()


def kept(value: Any) -> Any:
    """A value that later changes in place do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        held = [kept(v) for v in value]
        return held if isinstance(value, list) else tuple(held)
    return value


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
