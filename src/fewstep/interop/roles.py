"""What the arguments of a watched network are: which is the sample, which the time, which the conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Refused
from .recorded import LENGTH, Clock, Form, LayoutKind, Layouts, first_value, stacked

EXACT = 1e-4  # of the largest value: what rounding leaves of an identity in float32
CLOSE = 1e-3  # the same after a network or a division


@dataclass(frozen=True)
class Call:
    """One call of a network: its arguments by name (dictionaries flattened with dots), its answer, the step."""

    arguments: dict[str, Any]
    output: Any
    step: int


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: what it was given, and the sample that it gave."""

    output: Tensor
    time: Any
    sample: Tensor
    result: Tensor | None = None

    @property
    def clock(self) -> float:
        return float(torch.as_tensor(self.time, dtype=torch.float64).flatten()[0])


@dataclass(frozen=True)
class State:
    """The argument that is the noisy sample: its name, its form, its rows, and its factor in every step."""

    name: str
    form: Form
    rows: int
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Mix:
    """How answers become what the scheduler is given: ``sign (other + scale (one - other))``.

    ``first``: the conditioned half (or call) stands first. ``scale``: None without a guidance pair.
    ``rescaled``: the mix is held to the conditioned answer's length, token by token.
    """

    sign: float = 1.0
    first: bool = True
    scale: float | None = None
    rescaled: bool = False


def rounds_of(calls: Sequence[Call], steps: int) -> list[list[Call]] | None:
    """The calls of each step, where every step has as many: one, or the two of a guidance pair."""
    rounds = [[c for c in calls if c.step == k] for k in range(steps)]
    counts = {len(r) for r in rounds}
    return rounds if len(counts) == 1 and counts <= {1, 2} else None


def find_state(rounds: Sequence[Sequence[Call]], steps: Sequence[Step]) -> State | None:
    """The argument that is, in every call, the step's sample up to one factor, or that sample twice."""
    for name, value in rounds[0][0].arguments.items():
        form = _form(value, steps[0].sample)
        if form is None:
            continue
        factors = []
        for calls, step in zip(rounds, steps, strict=True):
            found = {_factor(call.arguments.get(name), step.sample, form) for call in calls}
            if len(found) != 1 or None in found:
                break
            factors.append(float(next(iter(found)) or 0.0))
        else:
            return State(name, form, len(value), tuple(factors))
    return None


def _form(value: Any, sample: Tensor) -> Form | None:
    """The form in which an argument could hold a sample of this shape."""
    whole = stacked(value)
    if whole is None or not whole.is_floating_point() or whole.ndim < 2:
        return None
    axes: list[int] = []
    shape = list(whole.shape)
    while len(shape) > sample.ndim:
        spare = [d for d in range(1, len(shape)) if shape[d] == 1]
        fitting = [d for d in spare if _larger([*shape[:d], *shape[d + 1 :]], sample) is not None] or spare
        if not fitting:
            return None
        axes.insert(0, fitting[-1])
        del shape[fitting[-1]]
    more = _larger(shape, sample)
    if more is None or shape[0] not in (sample.shape[0], 2 * sample.shape[0]):
        return None
    return Form(tuple(axes), not isinstance(value, Tensor), more[0] if more else None)


def _larger(shape: Sequence[int], sample: Tensor) -> list[int] | None:
    """The dimensions in which a shape is larger than the sample's: none or one; None where it does not fit."""
    if len(shape) != sample.ndim:
        return None if len(shape) < sample.ndim else []
    pairs = list(zip(shape[1:], sample.shape[1:], strict=True))
    more = [d + 1 for d, (have, want) in enumerate(pairs) if have > want]
    return more if len(more) <= 1 and all(have >= want for have, want in pairs) else None


def _factor(value: Any, sample: Tensor, form: Form) -> float | None:
    """The factor between a sample and an argument; None where it is not that sample."""
    if value is None or stacked(value) is None:
        return None
    held = form.take(value)
    if held.shape[0] == 2 * sample.shape[0]:
        sample = torch.cat([sample, sample])
    if held.ndim != sample.ndim or held.shape[0] != sample.shape[0]:
        return None
    held, sample = cut(held, sample).double(), sample.double()
    size = (sample * sample).sum()
    if held.shape != sample.shape or not size > 0:
        return None
    factor = (held * sample).sum() / size
    # a network in half precision holds a rounded sample
    near = 1e-2 if stacked(value).dtype in (torch.float16, torch.bfloat16) else CLOSE  # type: ignore[union-attr]
    good = factor > 0 and (held - factor * sample).abs().max() <= near * held.abs().max()
    return float(factor) if good else None


def cut(value: Tensor, like: Tensor) -> Tensor:
    """The front of a tensor, as large as another one in every dimension but the batch."""
    return value[(slice(None), *[slice(0, n) for n in like.shape[1:]])]


def rest_of(value: Any, state: State, sample: Tensor) -> Tensor:
    """What stands behind the sample in its argument."""
    axis = state.form.rest
    assert axis is not None
    held = state.form.take(value)
    return held.narrow(axis, sample.shape[axis], held.shape[axis] - sample.shape[axis])


# -- time -------------------------------------------------------------------------------------------


def find_clock(
    kind: str, part: str, rounds: Sequence[Sequence[Call]], steps: Sequence[Step], state: State
) -> tuple[str, Clock]:
    """The argument that follows the scheduler's time T, and how: as ``(sign T + offset) / divisor``."""
    times = [s.clock for s in steps]
    found: dict[str, tuple[float, Clock]] = {}
    for name, first in rounds[0][0].arguments.items():
        values = [_constant(calls[0].arguments.get(name)) for calls in rounds]
        if name == state.name or any(v is None for v in values) or len(set(values)) < 2:
            continue
        line = _line(times, [float(v) for v in values if v is not None])
        if line is not None:
            slope, clock = line
            tail = tuple(first.shape[1:]) if isinstance(first, Tensor) else ()
            found[name] = (slope, Clock(clock.sign, clock.offset, clock.divisor, tail))
    if not found:
        raise Refused(f"{kind}: no argument of {part} follows the scheduler's time")
    name = min(found, key=lambda n: abs(found[n][0] - 1))
    return name, found[name][1]


def _line(times: Sequence[float], values: Sequence[float]) -> tuple[float, Clock] | None:
    """The line through (time, value), where all of them lie on one that rises or falls."""
    low, high = times.index(min(times)), times.index(max(times))
    if times[low] == times[high]:
        return None
    slope = (values[high] - values[low]) / (times[high] - times[low])
    offset = values[high] - slope * times[high]
    size = max(abs(v) for v in values)
    if not slope or any(abs(slope * t + offset - v) > EXACT * size for t, v in zip(times, values, strict=True)):
        return None
    divisor = 1 / abs(slope)
    if abs(divisor - round(divisor)) < CLOSE * divisor and round(divisor) >= 1:
        divisor = float(round(divisor))
    offset = offset * divisor
    offset = float(round(offset)) if abs(offset - round(offset)) < CLOSE * max(1.0, abs(times[high])) else offset
    return slope, Clock(1.0 if slope > 0 else -1.0, offset, divisor)


def _constant(value: Any) -> float | None:
    """The one number that an argument holds, however often; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and value.ndim <= 2 and value.numel() and value.dtype is not torch.bool:
        flat = value.flatten().double()
        return float(flat[0]) if bool((flat == flat[0]).all()) else None
    return None


# -- conditions -------------------------------------------------------------------------------------


def find_layouts(
    kind: str, part: str, rounds: Sequence[Sequence[Call]], state: State, clock: str
) -> tuple[Layouts, dict[str, Any]]:
    """Which arguments have one row a sample, and all others with their values."""
    kinds: dict[str, LayoutKind] = {}
    repeated: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    pair = rounds[0]
    for name, value in pair[0].arguments.items():
        if name in (state.name, clock):
            continue
        for k in range(len(pair)):
            if any(not same(pair[k].arguments.get(name), calls[k].arguments.get(name)) for calls in rounds[1:]):
                raise Refused(
                    f"{kind}: argument {name!r} of {part} changes from step to step, so it cannot be replayed"
                )
        both = [call.arguments.get(name) for call in pair]
        layout = next((found for v in both if (found := _layout(v, state.rows)) is not None), None)
        if layout == "repeat":
            if all(same(v, both[0]) for v in both):
                repeated[name] = value[:1] if isinstance(value, Tensor) else value[0]
                continue
            layout = "tensor" if isinstance(value, Tensor) else None
        if layout is not None:
            kinds[name] = layout
        elif all(same(v, both[0]) for v in both):
            fixed[name] = value
        else:
            raise Refused(f"{kind}: argument {name!r} of {part} differs between the calls of a guidance pair")
    whole = {n: v for n, v in pair[0].arguments.items() if n in kinds and isinstance(v, Tensor) and v.ndim > 1}
    for call in pair[1:]:
        whole |= {n: v for n, v in call.arguments.items() if n in kinds and n not in whole and isinstance(v, Tensor)}
    masks = {n: v.dtype for n, v in whole.items() if _is_mask(n, v, whole)}
    groups = [(n, *[o for o, v in whole.items() if v.ndim > 2 and v.shape[1] == whole[n].shape[1]]) for n in masks]
    groups += [(n,) for n, k in kinds.items() if k == "ragged"]
    return Layouts(kinds, repeated, tuple(groups), masks), fixed


def _layout(value: Any, rows: int) -> Any:
    """How an argument holds one row a sample; None where it does not."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != rows:
            return None
        # an embedded guidance scale, positions of tokens: a number or a grid, which no input changes
        grid = value.ndim == 1 if value.is_floating_point() else value.ndim > 2
        return "repeat" if grid and bool((value == value[:1]).all()) else "tensor"
    if not isinstance(value, (list, tuple)) or len(value) != rows:
        return None
    if all(isinstance(v, Tensor) for v in value):
        if len({v.shape for v in value}) == 1 and value[0].ndim != 2:
            return "list"
        return "ragged" if len({v.shape[1:] for v in value}) == 1 else None
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return "numbers"
    return "repeat" if all(same(v, value[0]) for v in value) else None


def _is_mask(name: str, value: Tensor, others: Mapping[str, Tensor]) -> bool:
    """Whether an argument says which tokens of another one are text."""
    if value.ndim != 2 or not bool(((value == 0) | (value == 1)).all()):
        return False
    return any(o != name and v.ndim > 2 and v.shape[1] == value.shape[1] for o, v in others.items())


def same(one: Any, other: Any) -> bool:
    """Whether two arguments say the same, tensors inside lists included."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    try:
        return type(one) is type(other) and bool(one is other or one == other)
    except (ValueError, TypeError, RuntimeError):
        return False


# -- answers ----------------------------------------------------------------------------------------


def find_mix(kind: str, part: str, calls: Sequence[Call], step: Step, state: State, halves: Sequence[Any]) -> Mix:
    """How the answers of a step became what its scheduler was given. ``halves``: conditions of both, if a pair."""
    answers = []
    for call in calls:
        answer = state.form.take(first_value(call.output))
        if answer.ndim != step.sample.ndim or any(a < n for a, n in zip(answer.shape, step.sample.shape, strict=True)):
            raise Refused(f"{kind}: {part} answers {list(answer.shape)} to a sample {list(step.sample.shape)}")
        answers += list(cut(answer, step.sample).double().split(step.sample.shape[0]))
    mixed = cut(step.output, step.sample).double()
    if mixed.shape != step.sample.shape or any(a.shape != mixed.shape for a in answers) or len(answers) > 2:
        raise Refused(f"{kind}: {part} answers in a shape that its scheduler is not given")
    size = max(1.0, float(mixed.abs().max()))
    if len(answers) == 1:
        for sign in (1.0, -1.0):
            if (
                (sign * answers[0] - mixed).abs().max() <= EXACT * size
                or _half(calls)
                and ((sign * answers[0] - mixed).abs().max() <= 1e-2 * size)
            ):
                return Mix(sign)
        raise Refused(f"{kind} changes its network's answer before its scheduler sees it; that is not read")
    one, other = answers
    varied = [_varied(half) for half in halves]
    gap = one - other
    if float(gap.abs().max()) < 1e-6 * max(1.0, float(one.abs().max())):  # an untrained network: halves agree
        sign = -1.0 if float(((one + mixed) ** 2).sum()) < float(((one - mixed) ** 2).sum()) else 1.0
        return Mix(sign, varied[0] or not varied[1], 1.0)
    a, b, error = _shares(one, other, mixed)
    rescaled = False
    if error > CLOSE * size or abs(abs(a + b) - 1) > CLOSE * max(1.0, abs(a)):
        a, b, rescaled = *_rescaled(kind, one, other, mixed), True
    sign = 1.0 if a + b > 0 else -1.0
    a, b = sign * a, sign * b
    first = varied[0] if varied[0] != varied[1] else a >= 0.5
    return Mix(sign, first, a if first else b, rescaled)


def _half(calls: Sequence[Call]) -> bool:
    value = first_value(calls[0].output)
    tensor = value if isinstance(value, Tensor) else value[0]
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _varied(half: Any) -> bool:
    """Whether the rows of a half differ: those of prompts do, those of one negative prompt do not."""
    values = half.values() if isinstance(half, dict) else [half] if isinstance(half, Tensor) else []
    return any(bool((v != v[:1]).any()) for v in values)


def _shares(one: Tensor, other: Tensor, mixed: Tensor) -> tuple[float, float, float]:
    """(a, b, largest error) of the best ``a one + b other``."""
    table = torch.stack([one.flatten(), other.flatten()], 1)
    a, b = torch.linalg.lstsq(table, mixed.flatten()[:, None]).solution.flatten().tolist()
    return a, b, float((a * one + b * other - mixed).abs().max())


def _rescaled(kind: str, one: Tensor, other: Tensor, mixed: Tensor) -> tuple[float, float]:
    """Shares of a mix that is held to one answer's length along the last dimension, token by token."""
    for held in (one, other):
        lengths = held.norm(dim=-1)
        if (mixed.norm(dim=-1) - lengths).abs().max() > CLOSE * float(lengths.max()):
            continue
        table = torch.stack([one, other], -1).flatten(0, -3)  # [tokens, channels, 2]
        found = torch.linalg.lstsq(table, mixed.flatten(0, -2)[..., None]).solution[..., 0]
        ratio = (found[:, 0] / found.sum(1)).median()
        shares = (float(ratio), 1 - float(ratio))
        guess = shares[0] * one + shares[1] * other
        guess = guess * (lengths / guess.norm(dim=-1))[..., None]
        if (guess - mixed).abs().max() <= CLOSE * max(1.0, float(mixed.abs().max())):
            return shares
    raise Refused(f"{kind} mixes its guidance pair in a way that is not linear")


__all__ = [
    "LENGTH",
    "Call",
    "Mix",
    "State",
    "Step",
    "find_clock",
    "find_layouts",
    "find_mix",
    "find_state",
    "rest_of",
    "rounds_of",
]
