"""One adapter for every pipeline: run it once, watch its denoising network, and learn how to call it.

The recorder hooks the parts of a pipeline and its scheduler, lets the user's own ``pipe(...)`` take a few
steps, and reads from the calls what the state is, which argument is the time, which are conditions, which
rows are the guidance pair. ``Recorded`` replays that call with our signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..cond import Cond
from ..errors import Refused
from .schedules import Schedule, read_schedule

ROWS = 2  # rows of the recorded batch: the least that tells a row of conditions from a constant
FIRST_IS_CONDITIONED = {"DiTPipeline"}  # where guidance stands first, should the answers not tell


@dataclass(frozen=True)
class Call:
    """One call of a network: its arguments by name (dictionaries flattened with dots), and its answer."""

    arguments: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: what it was given."""

    output: Tensor
    time: Any
    sample: Tensor


@dataclass(frozen=True)
class Recording:
    """What one run of a pipeline taught.

    Attributes
    ----------
    kind: the pipeline's class. ``part``: the name of the network in it.
    state, clock: names of the arguments that carry the noisy sample and the time.
    conditions: names of the arguments with one row a sample. ``fixed``: all other arguments.
    cond, negative: the condition of the recorded rows, and its "no condition" where guidance was on.
    guidance: the scale that the pipeline itself applied; None without a guidance pair.
    channels: of the sample; a network with twice as many answers has learned sigmas, which are cut off.
    shape: of one sample. ``labels``: the one condition is a class label.
    """

    kind: str
    part: str
    network: nn.Module
    schedule: Schedule
    state: str
    clock: str
    conditions: tuple[str, ...]
    fixed: dict[str, Any]
    cond: Cond
    negative: Cond
    guidance: float | None
    channels: int
    shape: tuple[int, ...]
    calls: tuple[Call, ...] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def labels(self) -> bool:
        return isinstance(self.cond, Tensor) and self.cond.ndim == 1 and not self.cond.is_floating_point()

    def replay(self) -> Recorded:
        """The network with our signature."""
        null = None if self.negative is None else _map(self.negative, lambda v: v[:1].clone())
        return Recorded(self.network, self.state, self.clock, self.conditions, self.fixed, self.channels, null)


class Recorded(nn.Module):
    """A recorded network called as ``net(x, time[batch], cond, span) -> like x``.

    ``cond`` is a tensor where the network has one condition, else a dictionary by argument name. Without one,
    the recorded "no condition" stands in; ValueError (Refused) where there is none. ``span`` is not read.
    """

    reads_s = False

    def __init__(
        self,
        net: nn.Module,
        state: str,
        clock: str,
        conditions: tuple[str, ...],
        fixed: Mapping[str, Any],
        channels: int,
        null: Cond = None,
    ) -> None:
        super().__init__()
        self.net, self.state, self.clock = net, state, clock
        self.conditions, self.channels, self.negative = tuple(conditions), channels, null
        self.fixed = dict(fixed)
        self.net.eval()

    def train(self, mode: bool = True) -> Recorded:
        """Learning or not, the network itself stays in evaluation mode: a DiT in training mode would swap labels
        for "no condition" at random, behind the method's back."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x.dtype)
        named: dict[str, Any] = {k: _to(v, x.device) for k, v in self.fixed.items()}
        named[self.state] = x.to(dtype)
        named[self.clock] = time
        for name, value in self._conditions(cond, x).items():
            named[name] = value.to(dtype) if value.is_floating_point() else value
        answer = first_tensor(self.net(**_nested(named)))
        if answer.shape[1] != self.channels:
            answer = answer[:, : self.channels]
        return answer.to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The recorded "no condition" for every row of a condition; Refused where none was recorded."""
        if self.negative is None:
            raise Refused("the pipeline was recorded without a negative condition: guidance needs one")
        some = next(iter(cond.values())) if isinstance(cond, dict) else cond
        if some is None:
            return None
        return self._negatives(some.shape[0], some.device)

    def _negatives(self, count: int, device: torch.device) -> Cond:
        return _map(self.negative, lambda v: v.to(device)[:1].expand(count, *v.shape[1:]))

    def _conditions(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        if not self.conditions:
            return {}
        if cond is None:
            if self.negative is None:
                raise Refused(f"the network needs a condition ({', '.join(self.conditions)}): pass cond")
            cond = self._negatives(x.shape[0], x.device)
        if isinstance(cond, Tensor):
            if len(self.conditions) != 1:
                raise Refused(f"the network has conditions {', '.join(self.conditions)}: pass a dictionary of them")
            return {self.conditions[0]: cond}
        assert cond is not None
        if set(cond) != set(self.conditions):
            raise Refused(f"the network has conditions {', '.join(self.conditions)}, got {', '.join(sorted(cond))}")
        return dict(cond)


def record(pipe: Any, call: Mapping[str, Any] | None = None) -> Recording:
    """Run a pipeline once and learn how it calls its network.

    ``call`` are arguments of ``pipe(...)``; None chooses two rows and two steps. The pipeline is left as it was.
    Refused, with the reason, where the calls cannot be read.
    """
    kind = type(pipe).__name__
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not callable(getattr(scheduler, "step", None)):
        raise Refused(f"{kind} has no scheduler whose steps could be watched")
    schedule = read_schedule(scheduler)
    arguments = dict(default_call(pipe) if call is None else call)
    with _watched(pipe) as (calls, steps):
        try:
            with torch.no_grad():
                pipe(**arguments)
        except Exception as error:  # whatever a stranger's pipeline raises
            reason = (str(error).splitlines() or [""])[0][:200]
            raise Refused(f"{kind} could not be run for a recording: {type(error).__name__}: {reason}") from None
    if len(steps) < 2:
        raise Refused(f"{kind} took {len(steps)} scheduler step(s) in the recording; at least 2 tell the time apart")
    return _read(kind, pipe, schedule, calls, steps)


def default_call(pipe: Any, rows: int = ROWS, steps: int = 2) -> dict[str, Any]:
    """Arguments for one small run: a few rows, a few steps, a fixed seed, tensors out."""
    wanted = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {"num_inference_steps": steps}
    labels = _label_count(pipe)
    if "prompt" in wanted:
        call["prompt"] = ["a photo"] * rows
    elif "class_labels" in wanted and (labels or wanted["class_labels"].default is inspect.Parameter.empty):
        call["class_labels"] = [i % (labels or 1) for i in range(rows)]
    if "batch_size" in wanted:
        call["batch_size"] = rows
    if "generator" in wanted:
        call["generator"] = torch.Generator().manual_seed(0)
    if "output_type" in wanted:
        call["output_type"] = "pt"
    return {name: value for name, value in call.items() if name in wanted}


def _label_count(pipe: Any) -> int | None:
    for part in pipe.components.values():
        config: Any = getattr(part, "config", None)
        for key in ("num_class_embeds", "num_embeds_ada_norm"):
            value = config.get(key) if isinstance(config, Mapping) else None
            if isinstance(value, int):
                return value
    return None


@contextmanager
def _watched(pipe: Any) -> Iterator[tuple[dict[str, list[Call]], list[Step]]]:
    calls: dict[str, list[Call]] = {}
    steps: list[Step] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        signature = inspect.signature(type(module).forward)
        pending: list[dict[str, Any]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            bound = signature.bind(module, *args, **kwargs).arguments
            named: dict[str, Any] = {}
            for key, value in list(bound.items())[1:]:
                if signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
                    named.update(_flat(value))
                else:
                    named.update(_flat({key: value}))
            pending.append({k: _kept(v) for k, v in named.items()})

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                answer = _kept(first_tensor(output))
            except Refused:
                pending.pop()
                return
            calls.setdefault(name, []).append(Call(pending.pop(), answer))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    learning = []
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            watch(name, part)
            learning += [module for module in part.modules() if module.training]
            part.eval()
    scheduler = pipe.scheduler
    plain = scheduler.step
    signature = inspect.signature(plain)

    def step(*args: Any, **kwargs: Any) -> Any:
        given = list(signature.bind(*args, **kwargs).arguments.values())
        steps.append(Step(_kept(given[0]), _kept(given[1]), _kept(given[2])))
        return plain(*args, **kwargs)

    scheduler.step = step
    try:
        yield calls, steps
    finally:
        for module in learning:
            module.training = True
        del scheduler.step
        for handle in handles:
            handle.remove()


def _read(kind: str, pipe: Any, schedule: Schedule, calls: dict[str, list[Call]], steps: list[Step]) -> Recording:
    repeated = {name: seen for name, seen in calls.items() if len(seen) == len(steps)}
    if not repeated:
        counts = ", ".join(f"{name} {len(seen)} times" for name, seen in calls.items()) or "none"
        raise Refused(f"{kind} took {len(steps)} steps but no network was called once a step (called: {counts})")
    found = [(name, state) for name, seen in repeated.items() if (state := _find_state(seen, steps)) is not None]
    if len(found) != 1:
        names = ", ".join(repeated)
        many = "more than one" if found else "no"
        raise Refused(f"{kind}: {many} network reads the noisy sample whole (of {names})")
    part, state = found[0]
    seen = repeated[part]
    clock = _find_clock(kind, seen, steps, state)
    rows = seen[0].arguments[state].shape[0]
    sample = steps[0].sample
    channels = sample.shape[1]
    width = seen[0].output.shape[1] if seen[0].output.ndim > 1 else 0
    if seen[0].output.shape[2:] != sample.shape[2:] or width not in (channels, 2 * channels):
        raise Refused(f"{kind}: {part} answers {list(seen[0].output.shape)} to a sample {list(sample.shape)}")

    conditions, fixed = [], {}
    for name, value in seen[0].arguments.items():
        if name in (state, clock):
            continue
        if any(not _same(value, other.arguments.get(name)) for other in seen[1:]):
            raise Refused(f"{kind}: argument {name!r} of {part} changes from step to step, so it cannot be replayed")
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows:
            conditions.append(name)
        else:
            fixed[name] = value

    first, guidance = _find_pair(kind, seen, steps, state, channels)
    arguments = seen[0].arguments
    halves = [_pack({name: arguments[name].chunk(2)[i] for name in conditions}) for i in (0, 1)]
    if guidance is None:
        cond, negative = _pack({name: arguments[name] for name in conditions}), None
    else:
        cond, negative = halves[0 if first else 1], halves[1 if first else 0]
    recording = Recording(
        kind,
        part,
        getattr(pipe, part),
        schedule,
        state,
        clock,
        tuple(conditions),
        fixed,
        cond,
        negative,
        guidance,
        channels,
        tuple(sample.shape[1:]),
        tuple(seen),
        tuple(steps),
    )
    _prove(recording)
    return recording


def _find_state(calls: list[Call], steps: list[Step]) -> str | None:
    """The argument that is the noisy sample up to one factor a call, or that sample twice."""
    for name, value in calls[0].arguments.items():
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == steps[0].sample.ndim
        if fits and all(_scaled(c.arguments.get(name), s.sample) for c, s in zip(calls, steps, strict=True)):
            return name
    return None


def _scaled(value: Any, sample: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape[1:] != sample.shape[1:]:
        return False
    if value.shape[0] == 2 * sample.shape[0]:
        sample = torch.cat([sample, sample])
    if value.shape != sample.shape:
        return False
    value, sample = value.double(), sample.double()
    size = (sample * sample).sum()
    factor = (value * sample).sum() / size
    return bool(size > 0 and factor > 0 and ((value - factor * sample).abs().max() <= 1e-3 * value.abs().max()))


def _find_clock(kind: str, calls: list[Call], steps: list[Step], state: str) -> str:
    """The argument that is the scheduler's time in every call, or failing that a fixed multiple of it."""
    times = [float(torch.as_tensor(s.time, dtype=torch.float64).flatten()[0]) for s in steps]
    factors: dict[str, float] = {}
    for name in calls[0].arguments:
        values = [_constant(c.arguments.get(name)) for c in calls]
        if name == state or any(v is None for v in values):
            continue
        pairs = [(float(v), t) for v, t in zip(values, times, strict=True) if v is not None]
        factor = next((v / t for v, t in pairs if t), None)
        if factor and all(abs(v - factor * t) <= 1e-4 * max(1.0, abs(v)) for v, t in pairs):
            factors[name] = factor
    if not factors:
        raise Refused(f"{kind}: no argument of its network follows the scheduler's time")
    name = min(factors, key=lambda n: abs(factors[n] - 1))
    if abs(factors[name] - 1) > 1e-3:
        raise Refused(f"{kind}: its network reads {factors[name]:g} times the scheduler's time, which is not supported")
    return name


def _constant(value: Any) -> float | None:
    """The one number that an argument holds, once or a row; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and value.ndim <= 1 and value.numel() and value.dtype is not torch.bool:
        flat = value.flatten().double()
        return float(flat[0]) if bool((flat == flat[0]).all()) else None
    return None


def _find_pair(kind: str, calls: list[Call], steps: list[Step], state: str, channels: int) -> tuple[bool, float | None]:
    """Whether the conditioned half stands first, and the guidance scale; (_, None) without a pair."""
    value = calls[0].arguments[state]
    half = value.shape[0] // 2
    if value.shape[0] % 2 or not torch.equal(value[:half], value[half:]):
        given, mixed = calls[0].output[:, :channels], steps[0].output
        if mixed.shape[1] == 2 * channels:
            mixed = mixed[:, :channels]
        if given.shape != mixed.shape or (given - mixed).abs().max() > 1e-4 * max(1.0, float(given.abs().max())):
            raise Refused(f"{kind} changes its network's answer before its scheduler sees it; that is not read")
        return True, None
    answer = calls[0].output[:, :channels].double()
    one, other = answer[:half], answer[half:]
    mixed = steps[0].output[:half, :channels].double()
    gap = one - other
    size = (gap * gap).sum()
    if float(gap.abs().max()) < 1e-6 * max(1.0, float(answer.abs().max())):  # an untrained network: halves agree
        return kind in FIRST_IS_CONDITIONED, 1.0
    scale = float(((mixed - other) * gap).sum() / size)
    if (other + scale * gap - mixed).abs().max() > 1e-3 * max(1.0, float(mixed.abs().max())):
        raise Refused(f"{kind} mixes its guidance pair in a way that is not linear")
    return (True, scale) if scale >= 0.5 else (False, 1 - scale)


def _prove(recording: Recording) -> None:
    """Replay the first recorded call; another answer means that the structure was misread."""
    call = recording.calls[0]
    state, time = call.arguments[recording.state], call.arguments[recording.clock]
    clock = torch.as_tensor(time).flatten().to(state.device).expand(state.shape[0])
    cond = _pack({name: call.arguments[name] for name in recording.conditions})
    modes = [(module, module.training) for module in recording.network.modules()]
    net = recording.replay()
    try:
        with torch.no_grad():
            again = net(state, clock, cond)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise Refused(f"{recording.kind}: a replayed call failed: {type(error).__name__}: {reason}") from None
    finally:
        for module, mode in modes:
            module.training = mode
    given = call.output[:, : recording.channels]
    if (again - given).abs().max() > 1e-3 * max(1.0, float(given.abs().max())):
        raise Refused(f"{recording.kind}: a replayed call gave another answer, so its network cannot be taken out")


# -- small helpers ----------------------------------------------------------------------------------


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a network's answer, whatever holds it."""
    if isinstance(output, Tensor):
        return output
    items = list(output.values()) if isinstance(output, dict) else output
    if isinstance(items, (tuple, list)):
        for item in items:
            if isinstance(item, Tensor):
                return item
    raise Refused(f"a network answered {type(output).__name__}, which holds no tensor")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, item in flat.items():
        *way, last = key.split(".")
        place = nested
        for name in way:
            place = place.setdefault(name, {})
        place[last] = item
    return nested


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other or one is other)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _pack(named: dict[str, Tensor]) -> Cond:
    if not named:
        return None
    return next(iter(named.values())) if len(named) == 1 else named


def _map(cond: Cond, change: Any) -> Cond:
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: change(value) for name, value in cond.items()}
    result: Tensor = change(cond)
    return result
