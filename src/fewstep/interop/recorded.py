"""A network out of a pipeline, called with our signature: one tensor of noisy samples, a time, a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..cond import Cond
from ..errors import Refused

LayoutKind = Literal["tensor", "list", "ragged", "numbers"]
LENGTH = "_length"  # the condition beside a ragged one: how many tokens each row has
REST = "_rest"  # the condition that a network reads beside the noisy sample, in the same tensor


@dataclass(frozen=True)
class Form:
    """How a network takes the noisy sample [batch, ...], and gives its answer back.

    ``axes``: dimensions of size one that it wants besides. ``listed``: a list of rows instead of a tensor.
    ``rest``: the dimension along which more stands behind the sample (an inpainting mask, a reference image).
    """

    axes: tuple[int, ...] = ()
    listed: bool = False
    rest: int | None = None

    def give(self, x: Tensor, rest: Tensor | None) -> Any:
        """The argument for a sample."""
        if rest is not None and self.rest is not None:
            x = torch.cat([x, rest], self.rest)
        for axis in self.axes:
            x = x.unsqueeze(axis)
        return list(x.unbind(0)) if self.listed else x

    def take(self, value: Any) -> Tensor:
        """The tensor [batch, ...] that an argument or an answer holds."""
        found = stacked(value)
        if found is None:
            raise Refused(f"a network's sample is {type(value).__name__}, which is no tensor")
        for axis in reversed(self.axes):
            found = found.squeeze(axis)
        return found


@dataclass(frozen=True)
class Clock:
    """What a network reads in place of a scheduler's time T: ``(sign T + offset) / divisor``."""

    sign: float = 1.0
    offset: float = 0.0
    divisor: float = 1.0
    tail: tuple[int, ...] = ()  # dimensions behind the batch: one time a token, say

    def __call__(self, time: Tensor) -> Tensor:
        value = time
        if self.sign != 1:
            value = self.sign * value
        if self.offset:
            value = value + self.offset
        if self.divisor != 1:
            value = value / self.divisor
        if self.tail:
            value = value.reshape(-1, *[1] * len(self.tail)).expand(-1, *self.tail)
        return value


@dataclass(frozen=True)
class Layouts:
    """The arguments of a network that have one row a sample, and how tensors stand for them.

    ``kinds``: by argument; a ``ragged`` list of token rows is a padded tensor with its lengths beside it.
    ``repeated``: arguments that say the same in every row, as one row. ``groups``: names that are padded
    together along dimension 1, so that batches of shorter and longer texts fit each other; ``masks`` say which of
    their tokens are text, and of what type they are: a pipeline may leave one out where all are.
    """

    kinds: Mapping[str, LayoutKind] = field(default_factory=dict)
    repeated: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    masks: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The conditions: arguments, and the lengths of the ragged ones."""
        both = [(name, name + LENGTH) if kind == "ragged" else (name,) for name, kind in self.kinds.items()]
        return tuple(name for pair in both for name in pair)

    def read(self, arguments: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        """The conditions that a call's arguments are. A mask that was left out is a mask of ones."""
        found: dict[str, Tensor] = {}
        for name, kind in self.kinds.items():
            value = arguments.get(name)
            if value is None:
                continue
            if kind == "ragged":
                found[name], found[name + LENGTH] = _padded(value)
            elif kind == "numbers":
                found[name] = torch.tensor(list(value))
            else:
                tensor = stacked(value)
                if tensor is None:
                    raise Refused(f"argument {name!r} is {type(value).__name__}, where a tensor was recorded")
                found[name] = tensor
        for name in self.kinds:
            if name in found:
                continue
            beside = [n for group in self.groups if name in group for n in group if n in found]
            if not beside or name not in self.masks:
                raise Refused(f"argument {name!r} was recorded, and is missing for these inputs")
            found[name] = torch.ones(found[beside[0]].shape[:2], dtype=self.masks[name])
        wrong = [name for name, value in found.items() if value.shape[0] != rows]
        if wrong:
            raise Refused(f"argument {wrong[0]!r} has {found[wrong[0]].shape[0]} rows for {rows} samples")
        return {name: found[name] for name in self.names}

    def give(self, cond: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
        """The arguments for a batch."""
        given: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            value = cond[name]
            if kind == "ragged":
                lengths = cond[name + LENGTH].tolist()
                given[name] = [row[:n] for row, n in zip(value.unbind(0), lengths, strict=True)]
            elif kind == "numbers":
                given[name] = value.tolist()
            else:
                given[name] = list(value.unbind(0)) if kind == "list" else value
        for name, item in self.repeated.items():
            given[name] = item.expand(rows, *item.shape[1:]) if isinstance(item, Tensor) else [item] * rows
        return given

    def widen(self, cond: Cond, like: Cond = None, width: int | None = None) -> Cond:
        """A condition padded along its tokens: to the width of another one, or to ``width`` tokens."""
        if not isinstance(cond, dict):
            return cond
        wide = dict(cond)
        for group in self.groups:
            want = width
            if isinstance(like, dict):
                want = like[group[0]].shape[1]
            for name in group:
                have = wide[name].shape[1]
                if want is not None and want > have:
                    wide[name] = pad(wide[name], want)
        return wide


def pad(value: Tensor, width: int) -> Tensor:
    """Zeros behind dimension 1, up to ``width``."""
    more = value.new_zeros((value.shape[0], width - value.shape[1], *value.shape[2:]))
    return torch.cat([value, more], 1)


def stacked(value: Any) -> Tensor | None:
    """A tensor, or a list of tensors of one shape as one; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        return torch.stack(list(value)) if len({v.shape for v in value}) == 1 else None
    return None


def _padded(value: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(v) for v in value])
    width = int(lengths.max())
    return torch.cat([pad(v[None], width) for v in value]), lengths


class Recorded(nn.Module):
    """A recorded network called as ``net(x, time[batch], cond, span) -> like x``.

    ``time`` is the scheduler's. ``cond`` is a tensor where the network has one condition, else a dictionary by
    argument name. Without one, the recorded "no condition" stands in; ValueError (Refused) where there is none.
    ``span`` is not read. Answers are turned so that the scheduler would take them as they are: ``sign``.
    """

    reads_s = False

    def __init__(
        self,
        net: nn.Module,
        state: str,
        clock: str,
        layouts: Layouts,
        fixed: Mapping[str, Any],
        null: Cond = None,
        *,
        form: Form | None = None,
        reads: Clock | None = None,
        sign: float = 1.0,
    ) -> None:
        super().__init__()
        self.net, self.state, self.clock = net, state, clock
        self.layouts, self.negative, self.fixed = layouts, null, dict(fixed)
        self.form, self.reads, self.sign = form or Form(), reads or Clock(), sign
        self.net.eval()

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the network's conditions."""
        return (*self.layouts.names, *([self.state + REST] if self.form.rest is not None else []))

    def train(self, mode: bool = True) -> Recorded:
        """Learning or not, the network itself stays in evaluation mode: a DiT in training mode would swap labels
        for "no condition" at random, behind the method's back."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x.dtype)
        named: dict[str, Any] = {k: _to(v, x.device) for k, v in self.fixed.items()}
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self._conditions(cond, x).items()}
        rest = given.pop(self.state + REST, None)
        named |= {k: _to(v, x.device) for k, v in self.layouts.give(given, x.shape[0]).items()}
        named[self.state] = self.form.give(x.to(dtype), rest)
        named[self.clock] = self.reads(time)
        answer = self.form.take(first_value(self.net(**nested(named))))
        answer = answer[tuple(slice(0, n) for n in x.shape)]  # learned sigmas and reference tokens stand behind
        return (self.sign * answer if self.sign != 1 else answer).to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The recorded "no condition" for every row of a condition; Refused where none was recorded."""
        if self.negative is None:
            raise Refused("the pipeline was recorded without a negative condition: guidance needs one")
        some = next(iter(cond.values())) if isinstance(cond, dict) else cond
        if some is None:
            return None
        return self.layouts.widen(self._negatives(some.shape[0], some.device), cond)

    def _negatives(self, count: int, device: torch.device) -> Cond:
        return map_cond(self.negative, lambda v: v.to(device)[:1].expand(count, *v.shape[1:]))

    def _conditions(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        names = self.conditions
        if not names:
            return {}
        if cond is None:
            if self.negative is None:
                raise Refused(f"the network needs a condition ({', '.join(names)}): pass cond")
            cond = self._negatives(x.shape[0], x.device)
        if isinstance(cond, Tensor):
            if len(names) != 1:
                raise Refused(f"the network has conditions {', '.join(names)}: pass a dictionary of them")
            return {names[0]: cond}
        assert cond is not None
        if set(cond) != set(names):
            raise Refused(f"the network has conditions {', '.join(names)}, got {', '.join(sorted(cond))}")
        return dict(cond)


def first_value(output: Any) -> Any:
    """The first tensor, or list of tensors, of a network's answer, whatever holds it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list) and stacked(output) is not None:
        return output
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor) or (isinstance(item, (tuple, list)) and stacked(item) is not None):
                return item
    raise Refused(f"a network answered {type(output).__name__}, which holds no tensor")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted names."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            found.update(flat(item, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = item
    return found


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flat``."""
    found: dict[str, Any] = {}
    for key, item in named.items():
        *way, last = key.split(".")
        place = found
        for name in way:
            place = place.setdefault(name, {})
        place[last] = item
    return found


def pack(named: Mapping[str, Tensor]) -> Cond:
    """Named conditions as our conditions: nothing, the only tensor, or the dictionary."""
    if not named:
        return None
    return next(iter(named.values())) if len(named) == 1 else dict(named)


def map_cond(cond: Cond, change: Any) -> Cond:
    """A condition with every tensor changed."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: change(value) for name, value in cond.items()}
    result: Tensor = change(cond)
    return result


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
        return [_to(v, device) for v in value]
    return value
