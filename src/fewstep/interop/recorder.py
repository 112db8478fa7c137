"""One adapter for every pipeline: run it once, watch its denoising network, and learn how to call it.

The recorder hooks the parts of a pipeline and its scheduler, lets the user's own ``pipe(...)`` take a few
steps, and reads from the calls what the state is, which argument is the time, which are conditions, which
rows or calls are the guidance pair, and what the autoencoder is given at the end. ``Recorded`` replays that
call with our signature; ``embed`` runs the pipeline's own encoders for other prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cond import Cond, join
from ..errors import Refused
from .latents import Codec, find_codec
from .recorded import REST, Clock, Form, Layouts, Recorded, map_cond, pack
from .roles import (
    CLOSE,
    Call,
    Mix,
    State,
    Step,
    cut,
    find_clock,
    find_layouts,
    find_mix,
    find_state,
    rest_of,
    rounds_of,
)
from .schedules import Schedule, read_schedule
from .watching import Enough, Watch, line_of, watched

ROWS = 3  # of the recorded batch: a number that sizes of grids and texts seldom are
STEPS = 3  # the least that tells a straight line from a curve
PROMPTS = ("a photo", "two red boats on a quiet lake", "one dog")  # of different lengths: masks differ
NO_PROMPT = " "
# arguments that belong to one call, not to the pipeline's use: inputs, steps, guidance
PER_CALL = (
    "prompt", "negative_prompt", "class_labels", "batch_size", "generator", "latents", "output_type", "return_dict",
    "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "true_cfg_scale", "image", "mask_image",
)  # fmt: skip
BATCH = 32  # prompts that are encoded at once


@dataclass(frozen=True)
class Recording:
    """What one run of a pipeline taught.

    Attributes
    ----------
    kind: the pipeline's class. ``part``: the name of the network in it.
    state, clock: names of the arguments that carry the noisy sample and the time; ``form`` and ``reads``: how.
    conditions: names of the arguments with one row a sample. ``fixed``: all other arguments.
    cond, negative: the condition of the recorded rows, and its "no condition" where guidance was on.
    guidance: the scale that the pipeline itself applied; None without a guidance pair.
    channels: of the sample; a network with twice as many answers has learned sigmas, which are cut off.
    shape: of one sample. ``labels``: the one condition is a class label.
    call: the arguments of ``pipe(...)``. ``codec``: between latents and what the part ``decoder`` reads.
    answer: what the network gave in its first call, as it gave it.
    notes: what a user should know about it.
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
    layouts: Layouts = field(default_factory=Layouts, repr=False)
    form: Form = field(default_factory=Form)
    reads: Clock = field(default_factory=Clock)
    mix: Mix = field(default_factory=Mix)
    passes: int = 1
    call: dict[str, Any] = field(default_factory=dict, repr=False)
    codec: Codec | None = field(default=None, repr=False)
    decoder: str | None = None
    answer: Any = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> bool:
        return isinstance(self.cond, Tensor) and self.cond.ndim == 1 and not self.cond.is_floating_point()

    def replay(self) -> Recorded:
        """The network with our signature."""
        null = None if self.negative is None else map_cond(self.negative, lambda v: v[:1].clone())
        return Recorded(
            self.network,
            self.state,
            self.clock,
            self.layouts,
            self.fixed,
            null,
            form=self.form,
            reads=self.reads,
            sign=self.mix.sign,
        )

    def always(self, pipe: Any) -> dict[str, Any]:
        """Arguments of every call of a student's pipeline: the size of a sample, and guidance that is off.

        An embedded guidance scale is an input of the network, so it stays at the recorded value.
        """
        wanted = inspect.signature(type(pipe).__call__).parameters
        said = {k: v for k, v in self.call.items() if k not in PER_CALL and _plain(v)}
        if "guidance_scale" in wanted:
            scale = self.call.get("guidance_scale", _default(wanted, "guidance_scale"))
            numbers = [v for v in self.layouts.repeated.values() if isinstance(v, Tensor) and v.ndim == 1]
            embedded = isinstance(scale, (int, float)) and any(abs(float(v[0]) - scale) < CLOSE for v in numbers)
            if embedded:
                said["guidance_scale"] = float(scale)
            elif isinstance(scale, (int, float)):
                # most pipelines mean "other + g (one - other)"; where g counts from the conditioned answer, 0 is off
                counts_from_one = self.guidance is not None and abs(self.guidance - scale - 1) < CLOSE * (
                    1 + abs(scale)
                )
                said["guidance_scale"] = 0.0 if counts_from_one else 1.0
        if "true_cfg_scale" in wanted:
            said["true_cfg_scale"] = 1.0
        return said

    def conditions_of(self, calls: Sequence[Call], pair: bool) -> list[dict[str, Tensor]]:
        """The conditions in the calls of one step: [conditioned, negative], or the one there is."""
        found: list[dict[str, Tensor]] = []
        for call in calls:
            value = call.arguments[self.state]
            named = self.layouts.read(call.arguments, len(value))
            if self.form.rest is not None:
                held = State(self.state, self.form, len(value), ())
                named[self.state + REST] = rest_of(value, held, self.steps[0].sample)
            if pair and self.passes == 1:
                found += [{n: v.chunk(2)[k] for n, v in named.items()} for k in (0, 1)]
            else:
                found.append(named)
        return found if self.mix.first or len(found) < 2 else found[::-1]


def record(pipe: Any, call: Mapping[str, Any] | None = None) -> Recording:
    """Run a pipeline once and learn how it calls its network.

    ``call`` are arguments of ``pipe(...)`` that replace those of a small default run: its size, its guidance, its
    negative prompt, its pictures. The pipeline is left as it was.
    Refused, with the reason, where the calls cannot be read.
    """
    kind = type(pipe).__name__
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not callable(getattr(scheduler, "step", None)):
        raise Refused(f"{kind} has no scheduler whose steps could be watched")
    schedule = read_schedule(scheduler)
    failed: Exception | None = None
    for attempt in default_calls(pipe, call or {}):
        with watched(pipe) as watch:
            try:
                with torch.no_grad():
                    pipe(**attempt)
            except Enough:
                pass
            except Exception as error:  # whatever a stranger's pipeline raises
                failed = failed or error
                continue
        if len(watch.steps) < 2:
            raise Refused(
                f"{kind} took {len(watch.steps)} scheduler step(s) in the recording; at least 2 tell the time apart"
            )
        return _read(kind, pipe, schedule, watch, attempt)
    assert failed is not None
    raise Refused(f"{kind} could not be run for a recording: {line_of(failed)}")


def default_calls(pipe: Any, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments for one small run: a few rows, a few steps, a fixed seed, tensors out; then with pictures in."""
    wanted = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {"num_inference_steps": STEPS}
    labels = _label_count(pipe)
    if "prompt" in wanted and "prompt_embeds" not in given:
        call["prompt"] = list(PROMPTS)
        scale = given.get("true_cfg_scale", _default(wanted, "true_cfg_scale"))
        if isinstance(scale, (int, float)) and scale > 1 and "negative_prompt" in wanted:
            call["negative_prompt"] = NO_PROMPT  # true guidance is off without one
    elif "class_labels" in wanted and (labels or _default(wanted, "class_labels") is inspect.Parameter.empty):
        call["class_labels"] = [i % (labels or 1) for i in range(ROWS)]
    if "batch_size" in wanted:
        call["batch_size"] = ROWS
    if "strength" in wanted:
        call["strength"] = 1.0
    if "output_type" in wanted:
        call["output_type"] = "pt"
    call = {name: value for name, value in call.items() if name in wanted} | dict(given)
    yield _renewed(pipe, call)
    if "image" in wanted and "image" not in call:
        side = _side(pipe, call)
        image = torch.rand((1, 3, *side), generator=torch.Generator().manual_seed(1))
        call["image"] = image
        if "mask_image" in wanted:
            mask = torch.zeros(1, 1, *side)
            mask[..., : side[1] // 2] = 1.0
            call["mask_image"] = mask
        yield _renewed(pipe, call)


def _renewed(pipe: Any, call: Mapping[str, Any], prompts: Sequence[str] | None = None) -> dict[str, Any]:
    """A call with a fresh generator, with other prompts, and as many negative prompts as there are prompts."""
    wanted = inspect.signature(type(pipe).__call__).parameters
    renewed = dict(call)
    if prompts is not None:
        renewed["prompt"] = list(prompts)
    if isinstance(renewed.get("prompt"), str):
        renewed["prompt"] = [renewed["prompt"]] * ROWS
    negative = renewed.get("negative_prompt")
    if negative is not None and isinstance(renewed.get("prompt"), list):
        first = negative if isinstance(negative, str) else negative[0]
        renewed["negative_prompt"] = [first] * len(renewed["prompt"])
    if "generator" in wanted and "generator" not in call:
        renewed["generator"] = torch.Generator().manual_seed(0)
    return renewed


def _default(wanted: Mapping[str, inspect.Parameter], name: str) -> Any:
    return wanted[name].default if name in wanted else None


def _side(pipe: Any, call: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the pictures that a pipeline makes."""
    size: Any = getattr(pipe, "default_sample_size", None)
    for part in pipe.components.values():
        config: Any = getattr(part, "config", None)
        if size is None and isinstance(part, nn.Module) and isinstance(config, Mapping):
            size = config.get("sample_size") if hasattr(part, "forward") and "in_channels" in config else None
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    whole = (size if isinstance(size, int) else 64) * factor
    return int(call.get("height") or whole), int(call.get("width") or whole)


def _label_count(pipe: Any) -> int | None:
    for part in pipe.components.values():
        config: Any = getattr(part, "config", None)
        for key in ("num_class_embeds", "num_embeds_ada_norm"):
            value = config.get(key) if isinstance(config, Mapping) else None
            if isinstance(value, int):
                return value
    return None


# -- prompts ----------------------------------------------------------------------------------------


def embed(
    pipe: Any, recording: Recording, prompts: Sequence[str], negative: str | None = None, width: int | None = None
) -> Cond:
    """The network's conditions for prompts, as the pipeline's own run makes them; the network itself is not run.

    With ``negative`` the conditions of that negative prompt beside them. Texts of different lengths are padded to
    the longest, or to ``width`` tokens.
    """
    if not isinstance(recording.call.get("prompt"), list):
        raise Refused(f"{recording.kind} takes no prompts")
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise Refused("prompts are a list of at least one text")
    if negative is not None and recording.negative is None:
        raise Refused(
            f"{recording.kind} was recorded without guidance, so a negative prompt does not reach its network"
        )
    if negative is not None and "negative_prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise Refused(f"{recording.kind} takes no negative prompt: its own is the recorded one")
    call = recording.call if negative is None else {**recording.call, "negative_prompt": negative}
    parts = []
    for begin in range(0, len(prompts), BATCH):
        some = list(prompts[begin : begin + BATCH])
        found = _heard(pipe, recording, _renewed(pipe, call, some), both=negative is not None)
        parts.append(pack(found[-1 if negative is not None else 0]))
    widest = [p for p in (*parts, recording.cond) if isinstance(p, dict)]
    widths = [p[group[0]].shape[1] for p in widest for group in recording.layouts.groups]
    if width is not None and widths and max(widths) > width:
        raise Refused(f"the longest prompt has {max(widths)} tokens, more than the {width} asked for")
    joined: Cond = None
    for part in parts:
        wide = part
        for other in (*parts, recording.cond):
            wide = recording.layouts.widen(wide, other)
        wide = recording.layouts.widen(wide, width=width)
        joined = wide if joined is None else join(joined, wide)
    return joined


def _heard(pipe: Any, recording: Recording, call: Mapping[str, Any], both: bool) -> list[dict[str, Tensor]]:
    """The conditions in the first calls of a run that is stopped there."""
    pair = recording.guidance is not None
    one_is_enough = recording.passes == 1 or (not both and recording.mix.first)
    network: Any = recording.network
    network.forward = lambda *args, **kwargs: recording.answer  # the pair's other call needs no answer of ours
    try:
        calls = _entered(pipe, recording, call, 1 if one_is_enough else 2, "encode these prompts")
    finally:
        del network.forward
    return recording.conditions_of(calls, pair)


def _entered(pipe: Any, recording: Recording, call: Mapping[str, Any], count: int, what: str) -> list[Call]:
    """The first calls of the network in a run that is stopped there; Refused where it could not do ``what``."""
    with watched(pipe, stop=(recording.part, count)) as watch:
        try:
            with torch.no_grad():
                pipe(**call)
        except Enough:
            pass
        except Exception as error:
            raise Refused(f"{recording.kind} could not {what}: {line_of(error)}") from None
    calls = watch.calls.get(recording.part, [])
    if not calls:
        raise Refused(f"{recording.kind} could not {what}: it never called its network")
    return calls


def first_call(pipe: Any, recording: Recording, call: Mapping[str, Any]) -> tuple[Tensor, Cond, bool]:
    """(sample, condition, whether the scheduler is given the generator) as an unguided run enters the network."""
    seen = _entered(pipe, recording, call, 1, "be run as a student")
    state = recording.form.take(seen[0].arguments[recording.state])
    prompts = call.get("prompt")
    if isinstance(prompts, list) and len(state) != len(prompts):
        raise Refused(f"{recording.kind} still guides with {call}: its guidance cannot be switched off")
    named = recording.conditions_of(seen, pair=False)[0]
    gives = callable(getattr(pipe, "prepare_extra_step_kwargs", None))
    return cut(state, recording.steps[0].sample), pack(named), gives


def _plain(value: Any) -> bool:
    """Whether an argument can be written down."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    return isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)


# -- reading ----------------------------------------------------------------------------------------


def _read(kind: str, pipe: Any, schedule: Schedule, watch: Watch, call: dict[str, Any]) -> Recording:
    calls, steps = watch.calls, _single(watch.steps)
    grouped = {name: rounds for name, seen in calls.items() if (rounds := rounds_of(seen, len(steps))) is not None}
    if not grouped:
        counts = ", ".join(f"{name} {len(seen)} times" for name, seen in calls.items()) or "none"
        raise Refused(
            f"{kind} took {len(steps)} steps but no network was called once a step, or twice (called: {counts})"
        )
    found = [(name, state) for name, rounds in grouped.items() if (state := find_state(rounds, steps)) is not None]
    if len(found) > 1:
        found = [(name, state) for name, state in found if _speaks(kind, name, grouped[name], steps, state)] or found
    if len(found) != 1:
        names = ", ".join(grouped)
        many = "more than one" if found else "no"
        raise Refused(f"{kind}: {many} network reads the noisy sample whole (of {names})")
    part, state = found[0]
    rounds = grouped[part]
    sample = steps[0].sample
    for before, after in zip(steps[:-1], steps[1:], strict=True):
        result, size = before.result, max(1.0, float(after.sample.abs().max()))
        if result is None or result.shape != after.sample.shape:
            continue
        if (result - after.sample).abs().max() > CLOSE * size:
            raise Refused(
                f"{kind} changes the sample between steps, so its steps are not its network's alone; "
                "for inpainting take a network that reads the mask"
            )
    if state.rows < 2:
        raise Refused(f"{kind} was recorded with one sample: at least two tell a row of conditions from a constant")
    clock, reads = find_clock(kind, part, rounds, steps, state)
    _hold_scale(kind, part, schedule, steps, state)
    layouts, fixed = find_layouts(kind, part, rounds, state, clock)
    pair = state.rows == 2 * sample.shape[0] or len(rounds[0]) == 2
    if state.rows == 2 * sample.shape[0] and len(rounds[0]) == 2:
        raise Refused(f"{kind} calls {part} twice a step with two samples each: only one pair is read")
    recording = Recording(
        kind,
        part,
        getattr(pipe, part),
        schedule,
        state.name,
        clock,
        layouts.names + ((state.name + REST,) if state.form.rest is not None else ()),
        fixed,
        None,
        None,
        None,
        sample.shape[1],
        tuple(sample.shape[1:]),
        tuple(calls[part]),
        tuple(steps),
        layouts,
        state.form,
        reads,
        passes=len(rounds[0]),
        call={k: v for k, v in call.items() if k != "generator"},
    )
    halves = recording.conditions_of(rounds[0], pair)
    mix = find_mix(kind, part, rounds[0], steps[0], state, [pack(half) for half in halves])
    if not mix.first:
        halves = halves[::-1]
    notes = []
    if mix.rescaled:
        notes.append(
            f"{kind} holds its guided answer to the length of the conditioned one; guidance in training does not"
        )
    if pair:
        halves = [_wide(layouts, halves[0], halves[1]), _wide(layouts, halves[1], halves[0])]
    codec, note = find_codec(steps[-1].result, watch.decoded)
    changes: dict[str, Any] = {
        "cond": pack(halves[0]),
        "negative": pack(halves[1]) if pair else None,
        "guidance": mix.scale,
        "mix": mix,
        "codec": codec,
        "decoder": watch.decoder,
        "answer": watch.answers[part],
        "notes": (*notes, *([note] if note else [])),
    }
    recording = replace(recording, **changes)
    _prove(recording, rounds[0])
    return recording


def _single(steps: list[Step]) -> list[Step]:
    """Steps with each sample once: some pipelines carry the guidance pair through the scheduler."""
    rows = steps[0].sample.shape[0]
    half = rows // 2
    if rows % 2 or not all(s.sample.shape[0] == rows and torch.equal(s.sample[:half], s.sample[half:]) for s in steps):
        return steps
    return [
        Step(s.output[:half], s.time, s.sample[:half], None if s.result is None else s.result[:half]) for s in steps
    ]


def _wide(layouts: Layouts, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = layouts.widen(one, other)
    assert isinstance(wide, dict)
    return wide


def _speaks(kind: str, part: str, rounds: Sequence[Sequence[Call]], steps: Sequence[Step], state: State) -> bool:
    """Whether a network's answers are what the scheduler was given."""
    try:
        find_mix(kind, part, rounds[0], steps[0], state, (None, None))
    except Refused:
        return False
    return True


def _hold_scale(kind: str, part: str, schedule: Schedule, steps: Sequence[Step], state: State) -> None:
    """Refuse a network whose sample is scaled otherwise than its schedule says."""
    for step, factor in zip(steps, state.factors, strict=True):
        if schedule.clock == "1000t":
            wanted = 1.0
        elif schedule.scale_input and schedule.clock == "log_sigma/4":
            sigma = float(torch.tensor(4 * step.clock, dtype=torch.float64).exp())
            wanted = (sigma**2 + schedule.data_std**2) ** -0.5
        else:
            continue  # schedulers of one table stand in several frames; their networks read one
        if abs(factor / wanted - 1) > 1e-2:
            raise Refused(f"{kind}: {part} reads {factor:.4g} times the sample, its scheduler says {wanted:.4g}")


def _prove(recording: Recording, calls: Sequence[Call]) -> None:
    """Replay the first recorded calls; another answer means that the structure was misread."""
    modes = [(module, module.training) for module in recording.network.modules()]
    net = recording.replay()
    pair = recording.guidance is not None and recording.passes == 2
    conditions = [recording.cond, recording.negative] if pair else [None]
    if pair and not recording.mix.first:
        conditions = conditions[::-1]
    try:
        for call, cond in zip(calls, conditions, strict=True):
            state = recording.form.take(call.arguments[recording.state])
            if not pair:
                named = recording.layouts.read(call.arguments, len(state))
                if recording.form.rest is not None:
                    held = State(recording.state, recording.form, len(state), ())
                    value = call.arguments[recording.state]
                    named[recording.state + REST] = rest_of(value, held, recording.steps[0].sample)
                cond = pack(named)
            state = cut(state, recording.steps[0].sample)
            time = torch.full((len(state),), recording.steps[0].clock, device=state.device)
            with torch.no_grad():
                again = net(state, time, cond)
            given = cut(recording.form.take(call.output), state).to(again) * recording.mix.sign
            if (again - given).abs().max() > 1e-3 * max(1.0, float(given.abs().max())):
                raise Refused(
                    f"{recording.kind}: a replayed call gave another answer, so its network cannot be taken out"
                )
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{recording.kind}: a replayed call failed: {line_of(error)}") from None
    finally:
        for module, mode in modes:
            module.training = mode


__all__ = ["Call", "Recorded", "Recording", "Step", "embed", "record"]
