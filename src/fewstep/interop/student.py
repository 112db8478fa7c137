"""Model folders: written whole, checked by plain diffusers in a fresh process, loaded back."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..adapters import adapters, fold
from ..cond import Cond
from ..denoiser import Centred, Denoiser, Wrapped
from ..errors import Failed, Refused
from ..student import Student
from .card import card
from .checking import (
    COUNT,
    GOLDEN,
    Check,
    check_student,
    drawn_golden,
    errors_of,
    load_golden,
    need_diffusers,
    read_golden,
    run_golden,
    write_golden,
)
from .contract import Contract, Guidance, Origin, Preconditioning, Steps, parts_of
from .files import check_finite, sha256, weight_files, written_whole
from .image import MARKER, png, tile
from .lora import FILES, FOLDER, Lora, lora_of, write_lora
from .plain import Plain, Setting, inner_network, plan, wrapped
from .recorded import Recorded
from .teacher import PART_WEIGHTS, Teacher, autoencoder, described, load_pipeline, own_network
from .writing import (
    PROGRAM,
    ours,
    stamp,
    stock_pipeline,
    write_own,
    write_program,
    write_served,
    write_stock,
    write_unet,
)

DRIFT = 1e-3  # a loaded golden sample further off than this earns a warning
PIXELS = ("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline")


@dataclass(frozen=True)
class LoadedStudent:
    """A student from a folder, with what its contract promises."""

    student: Student
    contract: Contract
    folder: File
    decode: Callable[[Tensor], Tensor]

    @property
    def teacher(self) -> Origin | None:
        return self.contract.teacher

    @property
    def classes(self) -> int | None:
        return self.contract.classes

    @property
    def value_range(self) -> tuple[float, float] | None:
        return self.contract.value_range

    def null(self, cond: Cond) -> Cond:
        return self.contract.null(cond)


def save_student(
    student: Student,
    folder: File | str,
    *,
    method: str,
    teacher: Teacher | None = None,
    name: str = "",
    task: str | None = None,
    classes: int | None = None,
    null_label: int | None = None,
    value_range: tuple[float, float] | None = None,
    guidance: float = 1.0,
    negative_prompt: bool = False,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    table: Sequence[Mapping[str, Any]] = (),
    pictures: Tensor | np.ndarray | None = None,
    licence: str | None = None,
    recipe_sha256: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    program: bool = True,
) -> Check:
    """Write a student folder that stock diffusers runs, and prove it in a fresh process.

    Weights are taken as they are: apply averages first. ``classes``, ``null_label``, ``value_range`` and
    ``licence`` are the teacher's where they are not given; ``table`` are the card's measured rows and
    ``pictures`` uint8 [count, height, width, channels]. ``guidance`` is the teacher's scale in the weights.
    A network that no stock pipeline runs is written as ``config.json`` + ``model.safetensors`` and, with
    ``program``, an exported one-step program. Refused where the student cannot be written at all, Failed
    where the fresh process got another sample; then nothing is left at the destination.
    """
    shipped = _prepared(student)
    net = wrapped(shipped).net
    if isinstance(net, Recorded) and (teacher is None or teacher.pipeline is None):
        raise Refused("this student's network came out of a pipeline: pass the teacher it was recorded from")
    known = getattr(getattr(net, "config", None), "classes", None) if ours(net) else None
    if classes is None:
        classes = teacher.classes if teacher is not None and teacher.classes is not None else known
    if null_label is None:
        null_label = teacher.null_label if teacher is not None else None
        null_label = known if null_label is None else null_label
    if value_range is None and teacher is not None:
        value_range = teacher.value_range
    origin = None if teacher is None else Origin(name=teacher.name, sha256=teacher.sha256, licence=teacher.licence)
    rank = max((layer.options.rank for _, layer in adapters(wrapped(student.unframed()).net)), default=None)
    facts = {
        "name": name,
        "method": method,
        "teacher": origin,
        "task": task,
        "classes": classes,
        "null_label": null_label,
        "value_range": value_range,
        "guidance": Guidance(baked=guidance, negative_prompt=negative_prompt),
        "training": {**(training or {}), **({} if rank is None else {"lora": rank})},
        "metrics": dict(metrics or {}),
        "recipe_sha256": recipe_sha256,
        "licence": licence or (teacher.licence if teacher is not None else "unknown"),
    }
    net = inner_network(wrapped(student.unframed()).net)
    part = teacher.recording.part if teacher is not None and teacher.recording is not None else "unet"
    lora = lora_of(net, part, teacher.lora if teacher is not None else None)
    return _write(
        shipped, File(folder), "student", facts, teacher, table, pictures, seed, overwrite, program, True, lora
    )


def refuse_homeless(student: Student, teacher: Teacher) -> None:
    """Refused, before anything is trained, where the teacher's pipeline could not run the student at its times."""
    shipped = student.unframed()
    if isinstance(wrapped(shipped).net, Recorded):
        _planned(shipped, teacher.classes, teacher, True)


def save_teacher(
    denoiser: Denoiser,
    folder: File | str,
    *,
    shape: tuple[int, ...],
    name: str,
    method: str,
    task: str | None = None,
    classes: int | None = None,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    table: Sequence[Mapping[str, Any]] = (),
    pictures: Tensor | np.ndarray | None = None,
    licence: str = "unknown",
    recipe_sha256: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Check:
    """Write a network of ours as a teacher folder: a stock pipeline where one runs it, and ``fewstep.json``.

    A preconditioned (``cm``) U-Net becomes a ``ConsistencyModelPipeline``; its golden sample is the guess at
    the noisiest level, which stock diffusers must repeat.
    """
    shipped = _prepared(Student(denoiser, shape))
    net = wrapped(shipped).net
    if not ours(net):
        raise Refused("save_teacher writes networks of fewstep.nets; a pipeline is a teacher folder already")
    known = getattr(net.config, "classes", None)
    classes = known if classes is None else classes
    facts = {
        "name": name,
        "method": method,
        "task": task,
        "classes": classes,
        "null_label": known,
        "value_range": value_range,
        "training": dict(training or {}),
        "metrics": dict(metrics or {}),
        "licence": licence,
        "recipe_sha256": recipe_sha256,
    }
    return _write(
        shipped, File(folder), "teacher", facts, None, table, pictures, seed, overwrite, program=False, fold=False
    )


def _prepared(student: Student) -> Student:
    """A copy on the CPU in float32, for inference: adapters folded in, and a one-step network reads no span."""
    if 1 not in student.steps and not student.steps:
        raise Refused("this student serves no step count")
    student = student.unframed()
    one = wrapped(student)
    check_finite(one.net, "this student")
    twin = fold(copy.deepcopy(student).to("cpu", torch.float32)).eval().requires_grad_(False)
    own = wrapped(twin)
    if getattr(own.net, "reads_s", False) and set(student.steps) == {1} and hasattr(own.net, "fold"):
        network: Any = own.net
        span = student.path.straight(student.start) - student.path.straight(student.path.t_min)
        own.net = network.fold(float(span)).eval().requires_grad_(False)
    return twin


def _write(
    student: Student,
    folder: File,
    role: str,
    facts: dict[str, Any],
    teacher: Teacher | None,
    table: Sequence[Mapping[str, Any]],
    pictures: Tensor | np.ndarray | None,
    seed: int,
    overwrite: bool,
    program: bool,
    fold: bool,
    lora: Lora | None = None,
) -> Check:
    plain, reason = _planned(student, facts["classes"], teacher, fold)
    if plain is not None:
        need_diffusers()
        student = plain.student
    one = wrapped(student)
    net = inner_network(one.net)
    centred = student.denoiser.key if isinstance(student.denoiser, Centred) else None
    config: Any = net.config
    described = config.model_dump(mode="json") if ours(net) else None
    cond = _example(facts["classes"], parts_of(described, student.shape, centred), seed)
    recorded = teacher is not None and teacher.recording is not None and not ours(net)
    with written_whole(folder, overwrite) as partial:
        exported: str | None = None
        calls: dict[int, dict[str, Any] | None] = {} if plain is None else plain.calls
        runs: dict[int, dict[str, Any] | None] = dict(calls)
        if plain is not None and recorded:
            assert teacher is not None and teacher.recording is not None
            pipe = stock_pipeline(net, plain, teacher)
            write_stock(partial, pipe, teacher)
            if teacher.recording.labels or teacher.recording.cond is None:
                golden = drawn_golden(student, cond, seed)
            else:
                call = next(call for call in calls.values() if call is not None)
                golden = run_golden(student, pipe, teacher.recording, call, seed)
        else:
            if plain is not None:
                write_unet(partial, net, plain)
            else:
                write_own(partial, net)
                exported = write_program(partial, student, cond) if program and 1 in student.steps else "not exported"
                runs = {1: None} if exported == PROGRAM else {}
            golden = drawn_golden(student, cond, seed)
        write_golden(partial, golden, runs, plain.pipeline if plain else None)
        contract = Contract(
            fewstep=__version__,
            role=role,
            prediction=one.prediction,
            path=one.path,
            clock=one.clock,
            centred=centred,
            preconditioning=Preconditioning(scale_input=one.scale_input, data_std=one.data_std, boundary=one.boundary),
            steps=tuple(_step(student, n, calls.get(n)) for n in sorted(student.steps)) if role == "student" else (),
            start=student.start,
            start_scale=student.start_scale,
            shape=student.shape,
            pipeline=plain.pipeline if plain else None,
            prompts=bool(golden.prompts),
            network=described,
            program=exported,
            **facts,
        )
        contract = Contract.parse(json.loads(json.dumps(contract.model_dump(mode="json"))))
        contract.save(partial)
        stamp(partial, contract)
        for names, file in FILES.items() if lora else ():
            write_lora(lora or {}, partial / FOLDER / file, names, contract)
        if plain is not None and role == "student":
            write_served(partial, plain.pipeline, contract.steps)
        notes = list(plain.notes) if plain else [f"plain diffusers cannot run it: {reason}"]
        text = card(contract, table=table, notes=notes, pictures=pictures is not None)
        (partial / "README.md").write_text(text, encoding="utf-8")
        if pictures is not None:
            label = {"model": contract.name or contract.method, "seed": str(seed), "DigitalSourceType": MARKER}
            (partial / "samples.png").write_bytes(png(tile(pictures), {"Software": "fewstep", **label}))
        check = check_student(partial, run_program=True)
        if not check.ok:
            raise Failed("the written folder does not give the same samples: " + "; ".join(check.messages))
    return Check(check.ok, check.max_error, check.steps, (*check.messages, *notes))


def _planned(student: Student, classes: int | None, teacher: Teacher | None, fold: bool) -> tuple[Plain | None, str]:
    """(plan for plain diffusers, "") or, for a network of ours that has none, (None, why)."""
    one = wrapped(student)
    net = inner_network(one.net)
    recorded = isinstance(one.net, Recorded)
    if not recorded:
        if not ours(net):
            raise Refused(f"{type(net).__name__} is neither a network of fewstep.nets nor recorded from a pipeline")
        config: Any = net.config
        if not hasattr(config, "to_diffusers"):
            return None, f"{type(net).__name__} is no diffusers model"
        try:
            config.to_diffusers()
        except ValueError as error:
            return None, str(error)
    stock = teacher.kind if teacher is not None and teacher.kind != "own" else None
    if not recorded and stock is not None:
        if stock not in PIXELS:
            return None, f"{stock} does not hold a U-Net of ours"
        if classes is not None:
            stock = None  # of the pixel pipelines one alone takes labels
    setting = Setting(labels=classes is not None, pipeline=stock)
    if recorded and teacher is not None and teacher.recording is not None and teacher.schedule is not None:
        same = getattr(one.path, "alphas_cumprod", None) == getattr(teacher.schedule.path, "alphas_cumprod", None)
        setting = Setting(
            labels=classes is not None,
            pipeline=stock,
            scheduler=dict(teacher.pipeline.scheduler.config) if same else {},
            accepts=frozenset(inspect.signature(type(teacher.pipeline).__call__).parameters),
            always=teacher.recording.always(teacher.pipeline),
        )
    try:
        found = plan(student, setting)
        if found.calls.get(1) is None and not any(found.calls.values()):
            raise Refused("; ".join(found.notes))
        if not fold and found.student.path is not student.path and found.student.path != student.path:
            raise Refused("a teacher's path is kept as it is")
        return found, ""
    except Refused as error:
        if recorded:
            raise
        return None, str(error)


def _example(classes: int | None, parts: Mapping[str, tuple[int, ...]], seed: int) -> Cond:
    """A condition for the golden sample: labels in turn, and noise for whatever else the model reads."""
    labels = None if classes is None else torch.arange(COUNT) % classes
    if not parts:
        return labels
    rng = torch.Generator().manual_seed(seed + 1)
    found = {name: torch.randn((COUNT, *shape), generator=rng) for name, shape in sorted(parts.items())}
    if labels is not None:
        found["label"] = labels
    return {name: found[name] for name in sorted(found)}  # an exported program keeps to this order


def _step(student: Student, count: int, call: dict[str, Any] | None) -> Steps:
    times = student.times(count)
    sigmas = tuple(float(s) for s in student.path.coefs(torch.tensor(times, dtype=torch.float64)).sigma)
    return Steps(count=count, times=times, sigmas=sigmas, policy=student.policy if count > 1 else "ode", call=call)


# -- loading ----------------------------------------------------------------------------------------


def load_student(folder: File | str) -> LoadedStudent:
    """A student from its folder, ready to ``generate``.

    Networks of ours need no diffusers. Warns where the golden sample comes out differently: another release of
    a library, or edited weights. Refused, in one line, for malformed folders.
    """
    place = File(folder).expanduser()
    if not place.is_dir():
        raise Refused(f"no student folder {str(folder)!r}")
    contract = Contract.load(place)
    if contract.role != "student":
        raise Refused(f"{place} is a teacher, not a student: load it with load_teacher")
    decode: Callable[[Tensor], Tensor] = _same
    if contract.network is not None:
        net, _ = own_network(place, contract)
        student = contract.student(net)
    else:
        call = next((one.call for one in contract.steps if one.call is not None), None) or {}
        steps = ("num_inference_steps", "sigmas", "timesteps")
        pipe, recording, _ = load_pipeline(place, {k: v for k, v in call.items() if k not in steps})
        denoiser, _, _ = described(recording, contract)
        student = contract.student(denoiser.net)
        _, decode = autoencoder(pipe, recording)
    student = student.eval().requires_grad_(False)
    errors = errors_of(student, load_golden(place))
    worst = max(errors.values(), default=0.0)
    if not worst <= DRIFT:
        warnings.warn(
            f"{place}: the golden sample differs by {worst:.2e} (expected below {DRIFT:g}): "
            "the weights were changed, or a library behaves differently",
            stacklevel=2,
        )
    return LoadedStudent(student, contract, place, decode)


def _same(x: Tensor) -> Tensor:
    return x


def weights_sha256(folder: File | str) -> str:
    """The hash of a model folder's network weights, as contracts name their teachers."""
    place = File(folder)
    for part in (place, place / "unet", place / "transformer"):
        if files := weight_files(part):
            return sha256(files)
    raise Refused(f"{place} holds no safetensors weights")


__all__ = [
    "GOLDEN",
    "PART_WEIGHTS",
    "Check",
    "LoadedStudent",
    "Wrapped",
    "check_student",
    "load_student",
    "read_golden",
    "save_student",
    "save_teacher",
    "weights_sha256",
]
