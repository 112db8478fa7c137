"""Recipes: a training run as one strict, frozen description, in TOML."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path as File
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..adapters import LoraOptions
from ..errors import Refused
from ..part import Part
from ..path import AnyPath
from ..registry import nearest
from ..student import Policy
from .store import write_text

LIMIT = 2**20


class TaskSection(Part):
    """What is generated."""

    name: str = Field(description="a task (fewstep list tasks)")
    options: dict[str, Any] = Field(default_factory=dict, description="the task's own options")


class TeacherSection(Part):
    """Who is imitated."""

    source: str = Field(
        description="a packaged name, a diffusers folder, 'law' for a task's exact law, or a student folder"
    )
    guidance: float = Field(1.0, ge=0, allow_inf_nan=False, description="guidance baked into pairs and trajectories")
    lora: str | None = Field(None, description="a LoRA file (.safetensors) that is folded into the teacher")
    lora_strength: float = Field(1.0, allow_inf_nan=False, description="how much of that LoRA; 1: as its file says")
    call: dict[str, Any] = Field(
        default_factory=dict, description="arguments of a pipeline: height, width, num_frames, negative_prompt, ..."
    )


class StudentSection(Part):
    """What learns. Left out, the student is a copy of the teacher."""

    net: dict[str, Any] | None = Field(None, description="a network of its own (kind = unet, mlp or dit)")
    size: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the teacher's parameters: fewer, narrower layers that begin as a part of its",
    )
    path: AnyPath | None = Field(None, description="its path; None: the teacher's")
    prediction: str | None = Field(None, description="what the network predicts; None: as the teacher's")
    clock: str | None = None
    scale_input: bool | None = None
    data_std: float | None = Field(None, gt=0)
    boundary: float | None = Field(None, ge=0)
    init: str | None = Field(None, description="a student folder, or a run, to go on from")
    lora: LoraOptions | None = Field(
        None, description="low-rank adapters on the teacher's own weights; None: a full copy"
    )
    start: float | None = Field(None, gt=0, description="time of the first step; None: the method's, or the path's end")
    steps: tuple[int, ...] | None = Field(None, description="step counts to serve; None: the method's")
    policy: Policy | None = None


class MethodSection(Part):
    """How it learns."""

    name: str = Field(description="a method (fewstep list methods), or FILE.py:CLASS")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")


class Optim(Part):
    """One player's optimiser."""

    kind: Literal["adam", "adamw", "radam"] = "adamw"
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; None: no limit")


class Schedule(Part):
    """How one player's learning rate runs."""

    warmup: float = Field(0.0, ge=0, le=1, description="share of the steps that rise from 0")
    flat: float = Field(0.5, ge=0, le=1, description="share of the steps, counted from the start, before the fall")
    kind: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how it falls to 0; constant: it does not"
    )


class OptimSection(Optim):
    """Every player's optimiser, and what some players have otherwise."""

    players: dict[str, Optim] = Field(default_factory=dict, description="by player, in full")


class ScheduleSection(Schedule):
    """Every player's schedule, and what some players have otherwise."""

    players: dict[str, Schedule] = Field(default_factory=dict, description="by player, in full")


class EmaSection(Part):
    """The running average of the student's weights, which is what ships."""

    decay: float = Field(0.999, ge=0, lt=1, description="0: no average")
    warmup: float = Field(10.0, ge=1, description="decay at update n is at most (1 + n) / (warmup + n)")


class PrecisionSection(Part):
    """Numbers and memory."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the passes")
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of what learns; bfloat16: updates in float32, rounded at random; needs dtype = bfloat16",
    )
    compile: bool = Field(False, description="torch.compile the networks; pays on a GPU")
    channels_last: bool = Field(False, description="lay pictures out channel by channel; helps convolutions on a GPU")
    checkpointing: bool = Field(
        False, description="keep what enters each block and compute the rest again on the way back: less memory"
    )
    offload_teacher: bool = Field(
        False, description="the teacher waits in the host's memory and is on the device while it is asked"
    )

    @model_validator(mode="after")
    def _fits(self) -> PrecisionSection:
        if self.weights == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError('weights = "bfloat16" needs dtype = "bfloat16"')
        return self


class ParallelSection(Part):
    """How a batch is spread."""

    accumulate: int = Field(1, ge=1, description="backward passes an update")
    shard: bool = Field(
        False, description="several processes: each holds a part of every network; for those that fit no single device"
    )


class CheckpointSection(Part):
    """What is kept for a restart."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: every tenth of the run")
    keep: int = Field(2, ge=1)
    best: bool = Field(
        False, description="keep the student of the best probe, and end with it where the last one is clearly worse"
    )


class EvaluateSection(Part):
    """The evaluation at the end."""

    enabled: bool = True
    fresh: bool = Field(
        False, description="measure a packaged teacher again, instead of taking the figures that came with it"
    )
    protocol: dict[str, Any] = Field(
        default_factory=dict, description="changes to the protocol; then scores do not compare"
    )


class LogSection(Part):
    """What is written while it runs."""

    every: int = Field(20, ge=1, description="steps between lines of log.jsonl")
    probe: int = Field(0, ge=0, description="steps between sample probes; 0: ten in a run")


class Bar(Part):
    """An expected score: the median over ``seeds`` must lie between ``min`` and ``max``."""

    min: float | None = None
    max: float | None = None
    spread: float | None = Field(None, ge=0, description="what was seen between seeds")
    seeds: int = Field(3, ge=1)


class Stage(Part):
    """A later part of a run: what differs from the first, starting from the student so far."""

    steps: int = Field(ge=1, le=10**9)
    batch: int | None = Field(None, ge=1, le=2**20)
    teacher: Literal["same", "previous"] = Field(
        "same", description="who teaches, and makes the pairs: the recipe's teacher, or the student of the part before"
    )
    method: MethodSection
    optim: OptimSection | None = None
    schedule: ScheduleSection | None = None
    ema: EmaSection | None = None


class Recipe(Part):
    """A run. Unknown keys are refused with the nearest valid name."""

    version: Literal[1] = 1
    name: str = Field("", pattern=r"^[^/\\\x00-\x1f]*$", description="of the run; part of a folder's name")
    papers: tuple[str, ...] = Field((), description="rows of the paper list that this recipe shows")
    licence: str = Field("", description="of the model that is made; left out: the teacher's")
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(ge=1, le=10**9, description="student updates")
    batch: int = Field(64, ge=1, le=2**20)
    task: TaskSection
    teacher: TeacherSection | None = None
    student: StudentSection = StudentSection()
    method: MethodSection
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EmaSection = EmaSection()
    precision: PrecisionSection = PrecisionSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()
    stages: tuple[Stage, ...] = Field((), description="what follows the first part")
    expect: dict[str, Bar] = Field(default_factory=dict, description="metric = bar; the only place of expected scores")

    def optim_of(self, player: str) -> Optim:
        return self.optim.players.get(player, self.optim)

    def schedule_of(self, player: str) -> Schedule:
        return self.schedule.players.get(player, self.schedule)

    def stage(self, index: int) -> Recipe:
        """The recipe of one part of the run: 0 is the first."""
        if index == 0:
            return self.model_copy(update={"stages": ()})
        stage = self.stages[index - 1]
        fields = ("steps", "batch", "method", "optim", "schedule", "ema")
        changes = {name: getattr(stage, name) for name in fields if getattr(stage, name) is not None}
        return self.model_copy(update={"stages": (), **changes})

    @property
    def sha256(self) -> str:
        """Of everything that changes the result."""
        plain = self.model_dump(
            mode="json", exclude={"expect", "papers", "name", "licence", "log", "checkpoint", "evaluate"}
        )
        if not self.parallel.shard:  # as it was before the option was there
            del plain["parallel"]["shard"]
        if self.checkpoint.best:
            plain["checkpoint"] = {"best": True}
        if self.student.size == 1:
            del plain["student"]["size"]
        for stage in plain["stages"]:
            if stage["teacher"] == "same":
                del stage["teacher"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate at a step as a share of its height.

    >>> [round(factor(Schedule(warmup=0.1, flat=0.5), k, 100), 3) for k in (0, 9, 50, 75, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.001]
    """
    import math

    rise = round(schedule.warmup * steps)
    if step < rise:
        return (step + 1) / rise
    begin = max(schedule.flat * steps, rise)
    if schedule.kind == "constant" or step < begin:
        return 1.0
    part = (step - begin) / max(steps - begin, 1)
    return (1 + math.cos(math.pi * part)) / 2 if schedule.kind == "cosine" else 1 - part


# -- reading and writing ------------------------------------------------------------------------


def shipped() -> dict[str, File]:
    """The recipes that come with the package, by name."""
    folder = File(str(resources.files("fewstep"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_recipe(source: str | File, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by the name of a shipped one, or from a file, with ``key.sub=value`` overrides.

    Raises Refused, in one line, for an unknown name, key or value.
    """
    file = File(source)
    known = shipped()
    if str(source) in known:
        file = known[str(source)]
    elif file.suffix != ".toml":
        raise Refused(f"unknown recipe {str(source)!r}: {nearest(str(source), list(known))} (or a .toml file)")
    if not file.is_file():
        raise Refused(f"no recipe at {file}: fewstep list recipes shows the shipped ones")
    if file.stat().st_size > LIMIT:
        raise Refused(f"{file} is no recipe: it is larger than {LIMIT} bytes")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"{file} is not valid TOML: {error}") from None
    data.setdefault("name", file.stem)
    return recipe_from(data, overrides, where=str(file))


def recipe_from(data: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from plain data; Refused names the offending key and the nearest valid one."""
    plain = _copy(data)
    for text in overrides:
        override(plain, text)
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise Refused(f"{where}: {complaint(error, Recipe)}") from None


def override(data: dict[str, Any], text: str) -> None:
    """Set ``key.sub=value``; the value is read as TOML, and as plain text where it is none.

    >>> data = {"optim": {"lr": 1e-3}}
    >>> override(data, "optim.lr=2e-3"); data
    {'optim': {'lr': 0.002}}
    """
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise Refused(f"an override is key.sub=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    at = data
    *parents, last = key.strip().split(".")
    for name in parents:
        below = at.setdefault(name, {})
        if not isinstance(below, dict):
            raise Refused(f"override {text!r}: {name!r} is no section")
        at = below
    at[last] = parsed


def complaint(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of a validation in one line, with the nearest valid key for an unknown one."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return f"unknown key {where!r}: {nearest(str(found['loc'][-1]), _keys(model, found['loc'][:-1]))}"
    if found["type"] == "missing":
        return f"key {where!r} is required"
    given = repr(found["input"])
    return f"{where}: {found['msg'].lower()}, got {given if len(given) < 80 else given[:77] + '...'}"


def _keys(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the section at a place."""
    for part in place:
        fields = model.model_fields
        if part not in fields:
            continue
        for candidate in _models(fields[str(part)].annotation):
            model = candidate
            break
    return sorted(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models(part)]


def write_recipe(recipe: Recipe, file: File) -> None:
    """Write a recipe in full, as TOML; reading it back gives the same recipe."""
    import tomlkit

    write_text(file, tomlkit.dumps(_plain(recipe.model_dump(mode="json"))))


def _plain(value: Any) -> Any:
    """TOML has no null: what is None is left out."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value
