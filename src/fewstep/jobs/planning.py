"""What a recipe would cost, before it is run, and what would make it fit."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path as File
from typing import Any

import torch
from torch import nn

from .. import machine
from ..errors import Failed
from ..method import Method
from ..train.build import make_student, method_class
from ..train.footprint import Footprint, Meter, footprint, kept, shapes_alone, size, without_weights
from ..train.recipe import Recipe, load_recipe
from ..train.trainer import Nobody
from . import training
from .consent import inherited
from .rehearsal import (
    PAIRS,
    Clock,
    Phase,
    calls_of_evaluation,
    evaluation_phase,
    pairs_phase,
    small,
    training_phase,
)
from .setting import Setting, game, prepare

ROOM = 0.8  # of the free memory that a rehearsal may be expected to take
PATIENCE = 4.0  # seconds of a rehearsed step
SHARE = 0.4  # of a card's matrix rate that training reaches, where it could not be tried
SHIPPED = 2**28  # bytes of a student that a rehearsal writes
MB = 2**20


def plan(
    recipe: Recipe, *, device: str = "cpu", memory: float | None = None, chosen: str | None = None
) -> dict[str, Any]:
    """What a recipe would cost on a device: parameters, peak memory and time of each phase, and licences.

    Where the run fits this machine it is rehearsed: a few steps, pairs and samples of it, thrown away, and scaled.
    Where it does not, one step is counted from the shapes of its tensors, and ``options`` says which changes
    would make it fit. ``memory`` in GiB plans for a device that has so much; ``chosen`` is auto's line.
    """
    licences = [{"source": source, **asdict(licence)} for source, licence in inherited(recipe).items()]
    limit = machine.memory(device) if memory is None else round(memory * 2**30)
    with tempfile.TemporaryDirectory() as scratch:
        run, meter = File(scratch), Meter(device)
        began, spent = time.perf_counter(), time.process_time()
        setting = rehearsed_setting(recipe, run, device)
        loading = Phase("loading", time.perf_counter() - began, time.process_time() - spent, meter.peak())
        first = recipe.stage(0)
        here = machine.memory(device)
        if least(first, setting) < ROOM * here:
            parts = [weighed(recipe.stage(k), setting, device) for k in range(len(recipe.stages) + 1)]
            needed = max(meter.now() + part["guess"] for part in parts)
            tried = needed < ROOM * (here + meter.now())
        else:
            parts, tried = [], False
        if tried:
            phases = [loading, *_rehearsed(recipe, setting, parts, run, device, meter)]
        else:
            parts, phases = _counted(recipe, setting, device, loading)
        peak = max(phase.memory for phase in phases)
        fits = peak <= limit
        try:
            options = [] if fits else _options(first, setting, device, peak, limit)
        except RuntimeError as error:  # a network whose values decide what it computes
            reason = (str(error).splitlines() or [""])[0][:100]
            raise Failed(
                f"{peak / MB:.0f} MiB do not fit {limit / MB:.0f}, and no step can be counted: {reason}"
            ) from error
    licence = setting.teacher.licence if setting.teacher is not None else "unknown"
    seconds = sum(phase.seconds for phase in phases)
    return {
        "recipe": recipe.name,
        "method": " then ".join(part["method"] for part in parts),
        "task": recipe.task.name,
        "parameters": max(part["parameters"] for part in parts),
        "teacher_parameters": sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0,
        "memory_mb": round(peak / MB, 1),
        "minutes": round(seconds / 60, 2),
        "steps": [part["steps"] for part in parts],
        "licence": recipe.licence or licence,
        "device": device,
        "device_memory_mb": round(limit / MB),
        "fits": fits,
        "how": "rehearsed" if tried else "counted from shapes: time is a guess",
        "networks": parts[0]["networks"],
        "states_mb": {name: round(value / MB, 2) for name, value in parts[0]["states"].items()},
        "phases": [
            {"phase": p.name, "seconds": round(p.seconds, 2), "processor_seconds": round(p.processor, 2),
             "memory_mb": round(p.memory / MB, 1)}
            for p in phases
        ],
        "options": options,
        "licences": licences,
        **({} if chosen is None else {"chosen": chosen}),
    }  # fmt: skip


def rehearsed_setting(recipe: Recipe, run: File, device: str) -> Setting:
    """The task and the teacher; one that the run would train first is trained for a step."""
    if recipe.teacher is not None and recipe.teacher.source.startswith("recipe:"):
        nested = load_recipe(recipe.teacher.source.removeprefix("recipe:"), [f"seed={recipe.seed}"])
        task = recipe.task if nested.task.name == recipe.task.name else nested.task
        training.train(nested.model_copy(update={"steps": 1, "task": task}), run / "teacher_run", device=device)
    return prepare(recipe, run, device, Nobody())


def least(part: Recipe, setting: Setting) -> int:
    """Bytes that the learners take at the very least, where the student is a copy of the teacher."""
    if part.student.net is not None or setting.raw is None:
        return 0
    own = size(setting.raw)
    return own + (0 if getattr(part.student, "lora", None) else 4 * own * len(method_class(part.method.name).players))


# -- what there is ----------------------------------------------------------------------------------


def _built(part: Recipe, setting: Setting) -> Method:
    return game(part, setting, make_student(part, setting.task, setting.raw, setting.shape))


def _facts(part: Recipe, method: Method) -> dict[str, Any]:
    """Parameters of every network, and the bytes of everything that a run keeps."""
    every = {"teacher": method.teacher, **{name: getattr(method, name) for name in method.players}}
    networks = {}
    for name, module in every.items():
        if isinstance(module, nn.Module):
            count = sum(p.numel() for p in module.parameters())
            learned = 0 if name == "teacher" else sum(p.numel() for p in module.parameters() if p.requires_grad)
            networks[name] = {"parameters": count, "learned": learned, "frozen": count - learned}
    learned = sum(networks[name]["learned"] for name in method.players)
    width = 2 if part.precision.weights == "bfloat16" else 4
    states = {
        "weights": size(method) - learned * (4 - width),
        "gradients": learned * width,
        "moments": learned * 8,
        "average": networks["student"]["parameters"] * 4 if part.ema.decay > 0 else 0,
    }
    return {
        "method": part.method.name, "steps": part.steps, "parameters": learned, "networks": networks, "states": states
    }  # fmt: skip


def weighed(part: Recipe, setting: Setting, device: str) -> dict[str, Any]:
    """A stage's facts with first guesses: its bytes, the seconds of a step, the rows that can be tried."""
    method = _built(part, setting).to(device)
    facts = _facts(part, method)
    few = min(part.batch, 4)
    one = kept(method, setting.task, part, few)
    now = time.process_time if device == "cpu" else time.perf_counter  # a busy machine is no slower network
    began = now()
    two = kept(method, setting.task, part, 2 * few)
    turns = len(method.turns(0)) / len(dict.fromkeys(method.turns(0))) * part.parallel.accumulate
    each = 3 * (now() - began) / torch.get_num_threads() * turns * max(part.batch / (2 * few), 0.5)
    slope = max(two - one, 0) / few
    facts["slope"], facts["each"] = slope, each
    facts["guess"] = sum(facts["states"].values()) + round(one + slope * (part.batch - few))
    facts["rows"] = max(1, min(part.batch, round(part.batch * PATIENCE / each))) if each > PATIENCE else part.batch
    facts["pairs"] = method.pairs()
    return facts


# -- a rehearsal ------------------------------------------------------------------------------------


def _rehearsed(
    recipe: Recipe, setting: Setting, parts: list[dict[str, Any]], run: File, device: str, meter: Meter
) -> list[Phase]:
    """All phases of the run, each at a small scale, and scaled."""
    tiny = small(recipe, [p["pairs"] for p in parts], [p["each"] for p in parts], [p["rows"] for p in parts])
    clock = Clock(meter)
    meter.reset()
    student, facts = training._learn(tiny, run, setting, False, device, clock, "plan")
    phases = []
    for index, facts_of in enumerate(parts):
        part, many = recipe.stage(index), len(parts) > 1
        suffix = f" {index + 1}" if many else ""
        if facts_of["pairs"] is not None:
            made = pairs_phase(clock, recipe, setting, facts_of["pairs"].count, f"pairs{suffix}")
            phases += [made] if made is not None else []
        label = f"stage {index + 1}/{len(parts)}" if many else "train"
        phase, _ = training_phase(clock, label, part, f"training{suffix}")
        share = part.batch / facts_of["rows"]
        more = facts_of["slope"] * (part.batch - facts_of["rows"])
        held = 0
        if facts_of["pairs"] is not None and meter.cuda is None:
            held = max(0, facts_of["pairs"].count - PAIRS) * 8 * int(torch.Size(setting.shape).numel())
        phases.append(
            Phase(phase.name, phase.seconds * share, phase.processor * share, round(phase.memory + more) + held)
        )
    report = None
    makes = method_class(recipe.method.name).makes
    if recipe.evaluate.enabled and makes != "start":
        total = calls_of_evaluation(recipe, run, setting, student, meter)
        begin = clock.now()
        report = training._evaluated(_short(tiny, setting), run, setting, student, facts, clock)
        phases.append(evaluation_phase(clock, begin, clock.now(), recipe, setting, total))
    if size(student) <= SHIPPED:
        begin = clock.now()
        training._save(tiny, run, setting, student, facts, report, clock)
        if report is not None and makes == "student":
            from ..evaluate import write_report

            write_report(run)
        end = clock.now()
        phases.append(Phase("saving", end.wall - begin.wall, end.processor - begin.processor, end.peak))
    return phases


def _short(recipe: Recipe, setting: Setting) -> Recipe:
    from .rehearsal import ROWS, SHORT

    count = min(recipe.evaluate.protocol.get("count") or ROWS, len(setting.task.test), ROWS)
    protocol = {**recipe.evaluate.protocol, **SHORT, "count": count}
    return recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"protocol": protocol, "fresh": True})}
    )


# -- a count, where it does not fit -----------------------------------------------------------------


def _count(part: Recipe, setting: Setting, fake: Any) -> tuple[dict[str, Any], Footprint]:
    """A stage's facts and the footprint of a step, from shapes alone, which cost the same at any batch."""
    if setting.raw is not None:
        without_weights(setting.raw, fake)
    method = _built(part, setting)
    facts = _facts(part, method)
    facts["turns"] = {name: method.turns(0).count(name) for name in method.players}
    return facts, footprint(method, setting.task, part, part.batch, fake=fake)


def _counted(recipe: Recipe, setting: Setting, device: str, loading: Phase) -> tuple[list[dict[str, Any]], list[Phase]]:
    fake, parts, phases = shapes_alone(), [], [loading]
    there = max(0, loading.memory - size(setting.raw)) if device == "cpu" else 0  # libraries and data
    rate = machine.matrix_rate(device, recipe.precision.dtype) * SHARE
    for index in range(len(recipe.stages) + 1):
        part = recipe.stage(index)
        facts, step = _count(part, setting, fake)
        operations = sum(facts["turns"][name] * count for name, count in step.flops.items())
        seconds = operations * part.parallel.accumulate * part.steps / rate
        peak = there + facts["states"]["weights"] + step.peak
        parts.append(facts)
        phases.append(Phase("training" + (f" {index + 1}" if recipe.stages else ""), seconds, seconds, peak))
    return parts, phases


def _options(part: Recipe, setting: Setting, device: str, peak: int, limit: int) -> list[dict[str, Any]]:
    """Changes that save memory, with the peak that each would leave; last, the first few together that fit."""
    fake = shapes_alone()

    def at(one: Recipe) -> tuple[int, dict[str, Any], int]:
        facts, step = _count(one, setting, fake)
        weights = facts["states"]["weights"]
        return weights + step.peak, facts, max(0, weights + step.peak - sum(facts["states"].values()))

    base, facts, passing = at(part)
    rest = max(0, peak - base)  # libraries, data, what the count does not see
    states = sum(facts["states"].values())
    found: list[dict[str, Any]] = []

    def add(option: str, change: str, bytes_: float) -> None:
        found.append({"option": option, "change": change, "memory_mb": round(bytes_ / MB, 1), "fits": bytes_ <= limit})

    def with_precision(one: Recipe, **changes: Any) -> Recipe:
        return one.model_copy(update={"precision": one.precision.model_copy(update=changes)})

    together = part
    changes: list[str] = []
    trials: list[tuple[str, str, dict[str, Any]]] = [
        ("gradient checkpointing", "precision.checkpointing=true", {"checkpointing": True}),
        ("passes in bfloat16", "precision.dtype=bfloat16", {"dtype": "bfloat16"}),
        (
            "weights in bfloat16", "precision.dtype=bfloat16 precision.weights=bfloat16",
            {"dtype": "bfloat16", "weights": "bfloat16"},
        ),
    ]  # fmt: skip
    for option, change, update in trials:
        if all(getattr(part.precision, key) == value for key, value in update.items()):
            continue
        figure = at(with_precision(part, **update))[0] + rest
        add(option, change, figure)
        if figure < peak and option != "weights in bfloat16":
            together, changes = with_precision(together, **update), [*changes, change]
    batch = part.batch
    while batch > 1 and base - passing + passing * batch / part.batch + rest > limit:
        batch //= 2
    if batch < part.batch:
        accumulate = part.parallel.accumulate * -(-part.batch // batch)
        change = f"batch={batch} parallel.accumulate={accumulate}"
        add("smaller batch, accumulated", change, at(part.model_copy(update={"batch": batch}))[0] + rest)
    teacher = facts["networks"].get("teacher", {}).get("parameters", 0) * 4
    learned = facts["states"]["gradients"]
    if teacher and device != "cpu" and not part.precision.offload_teacher:
        add("teacher in the host's memory", "precision.offload_teacher=true", peak - min(teacher, learned))
    adapters = _adapters(setting.raw, 32) if setting.raw is not None else 0
    players = len(facts["networks"]) - (1 if "teacher" in facts["networks"] else 0)
    lora = 0.0
    if adapters and part.student.net is None and not getattr(part.student, "lora", None):
        lora = teacher + 4 * adapters * (players * 4 + 1)
        add("LoRA of rank 32", "--lora 32", lora + passing + rest)
    shards = next((n for n in (2, 4, 8, 16, 32, 64) if states / n + passing + rest <= limit), 64)
    add(f"sharding over {shards}", f"torchrun --nproc-per-node {shards}", states / shards + passing + rest)
    if not any(one["fits"] for one in found) and changes:
        figure, facts, passing = at(together)
        batch = part.batch
        held = lora or sum(facts["states"].values())
        while batch > 1 and held + passing * batch / part.batch + rest > limit:
            batch //= 2
        if batch < part.batch:
            changes.append(f"batch={batch} parallel.accumulate={-(-part.batch // batch)}")
        if lora:
            changes.append("--lora 32")
        add("together", " ".join(changes), held + passing * batch / part.batch + rest)
    return found


def _adapters(network: nn.Module, rank: int) -> int:
    """Parameters of adapters on every linear layer and convolution."""
    count = 0
    for module in network.modules():
        if isinstance(module, nn.Linear):
            count += rank * (module.in_features + module.out_features)
        elif isinstance(module, nn.Conv2d):
            count += rank * (module.weight[0].numel() + module.out_channels)
    return count
