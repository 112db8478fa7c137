"""Model folders: written whole, checked by plain diffusers in a fresh process, loaded back."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..adapters import adapters, fold
from ..cond import Cond
from ..denoiser import Denoiser, Wrapped
from ..errors import Failed, MissingExtra, Refused
from ..part import Part
from ..student import Student
from .card import card
from .contract import Contract, Guidance, Origin, Preconditioning, Steps
from .files import check_finite, components, read_tensors, scan, sha256, weight_files, written_whole
from .image import MARKER, png, tile
from .lora import FILES, FOLDER, Lora, lora_of, write_lora
from .plain import Plain, Setting, inner_network, plan, wrapped
from .recorder import Recorded
from .teacher import PART_WEIGHTS, Teacher, autoencoder, described, load_pipeline, offline, own_network

GOLDEN = "golden.safetensors"
PROGRAM = "model.pt2"
TOLERANCE = 1e-4  # of the largest value, or of 1: between two implementations in float32
DRIFT = 1e-3  # a loaded golden sample further off than this earns a warning
COUNT = 4
# what UNet2DModel assumes where it is told nothing: written out, so that a later release assumes the same
UNET_DEFAULTS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "class_embed_type": None,
}
PIXELS = ("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline")
SCRIPT = File(__file__).with_name("golden.py")


@dataclass(frozen=True)
class Check:
    """The outcome of a golden run: the largest error over the step counts that were run."""

    ok: bool
    max_error: float
    steps: tuple[int, ...]
    messages: tuple[str, ...] = ()


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
    known = getattr(getattr(net, "config", None), "classes", None) if _ours(net) else None
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
    if not _ours(net):
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
        own.net = network.fold(student.start - student.path.t_min).eval().requires_grad_(False)
    return twin


def _config(net: nn.Module) -> Any:
    return net.config


def _need_diffusers() -> None:
    """Say what is missing before any work, without the seconds that an import takes."""
    if importlib.util.find_spec("diffusers") is None:
        raise MissingExtra("diffusers", "diffusers")


def _ours(net: nn.Module) -> bool:
    config = getattr(net, "config", None)
    return isinstance(config, Part) and hasattr(config, "kind")


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
        _need_diffusers()
        student = plain.student
    one = wrapped(student)
    net = inner_network(one.net)
    labels = _labels(facts["classes"])
    with written_whole(folder, overwrite) as partial:
        exported: str | None = None
        if plain is not None:
            _write_pipeline(partial, net, plain, teacher)
        else:
            _write_own(partial, net)
            exported = _export(partial, student, labels) if program and 1 in student.steps else "not exported"
        calls: dict[int, dict[str, Any] | None] = {} if plain is None else plain.calls
        golden = _golden(student, labels, seed)
        runs = dict(calls) if plain is not None else ({1: None} if exported == PROGRAM else {})
        _write_golden(partial, golden, labels, seed, runs, plain.pipeline if plain else None)
        contract = Contract(
            fewstep=__version__,
            role=role,
            prediction=one.prediction,
            path=one.path,
            clock=one.clock,
            preconditioning=Preconditioning(scale_input=one.scale_input, data_std=one.data_std, boundary=one.boundary),
            steps=tuple(_step(student, n, calls.get(n)) for n in sorted(student.steps)) if role == "student" else (),
            start=student.start,
            start_scale=student.start_scale,
            shape=student.shape,
            pipeline=plain.pipeline if plain else None,
            network=_config(net).model_dump(mode="json") if _ours(net) else None,
            program=exported,
            **facts,
        )
        contract = Contract.parse(json.loads(json.dumps(contract.model_dump(mode="json"))))
        contract.save(partial)
        _stamp(partial, contract)
        for names, file in FILES.items() if lora else ():
            write_lora(lora or {}, partial / FOLDER / file, names, contract)
        notes = list(plain.notes) if plain else [f"plain diffusers cannot run it: {reason}"]
        text = card(contract, table=table, notes=notes, pictures=pictures is not None)
        (partial / "README.md").write_text(text, encoding="utf-8")
        if pictures is not None:
            label = {"model": contract.name or contract.method, "seed": str(seed), "DigitalSourceType": MARKER}
            (partial / "samples.png").write_bytes(png(tile(pictures), {"Software": "fewstep", **label}))
        check = _checked(partial, run_program=True)
        if not check.ok:
            raise Failed("the written folder does not give the same samples: " + "; ".join(check.messages))
    return Check(check.ok, check.max_error, check.steps, (*check.messages, *notes))


def _planned(student: Student, classes: int | None, teacher: Teacher | None, fold: bool) -> tuple[Plain | None, str]:
    """(plan for plain diffusers, "") or, for a network of ours that has none, (None, why)."""
    one = wrapped(student)
    net = inner_network(one.net)
    recorded = isinstance(one.net, Recorded)
    if not recorded:
        if not _ours(net):
            raise Refused(f"{type(net).__name__} is neither a network of fewstep.nets nor recorded from a pipeline")
        config = _config(net)
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
            guided="guidance_scale" in inspect.signature(type(teacher.pipeline).__call__).parameters,
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


def _labels(classes: int | None) -> Tensor | None:
    return None if classes is None else torch.arange(COUNT) % classes


def _step(student: Student, count: int, call: dict[str, Any] | None) -> Steps:
    times = student.times(count)
    sigmas = tuple(float(s) for s in student.path.coefs(torch.tensor(times, dtype=torch.float64)).sigma)
    return Steps(count=count, times=times, sigmas=sigmas, policy=student.policy if count > 1 else "ode", call=call)


# -- the golden sample ------------------------------------------------------------------------------


@torch.no_grad()
def _golden(student: Student, labels: Tensor | None, seed: int) -> dict[str, Tensor]:
    """The same draws as a stock pipeline makes from a CPU generator with this seed."""
    outputs: dict[str, Tensor] = {}
    for count in sorted(student.steps):
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randn((COUNT, *student.shape), generator=rng)
        outputs["noise"] = noise
        outputs[f"output_{count}"] = student.generate(noise, labels, rng, count).contiguous()
    for name, value in outputs.items():
        if not torch.isfinite(value).all():
            raise Refused(f"this student's golden sample ({name}) holds a NaN or an infinity")
    return outputs


def _write_golden(
    folder: File,
    golden: dict[str, Tensor],
    labels: Tensor | None,
    seed: int,
    calls: Mapping[int, dict[str, Any] | None],
    pipeline: str | None,
) -> None:
    from safetensors.torch import save_file

    facts = {"seed": seed, "calls": {str(n): c for n, c in sorted(calls.items())}, "pipeline": pipeline}
    tensors = golden if labels is None else {**golden, "labels": labels}
    save_file(tensors, str(folder / GOLDEN), metadata={"golden": json.dumps(facts)})


def read_golden(folder: File) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The golden tensors and facts of a folder; Refused where they are malformed."""
    tensors, metadata = read_tensors(folder / GOLDEN)
    try:
        facts = json.loads(metadata["golden"])
        calls = {int(n): c for n, c in facts["calls"].items()}
        if not isinstance(facts["seed"], int) or not all(c is None or isinstance(c, dict) for c in calls.values()):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise Refused(f"{folder / GOLDEN} has no valid golden facts in its header") from None
    if "noise" not in tensors or any(f"output_{n}" not in tensors for n in calls):
        raise Refused(f"{folder / GOLDEN} lacks the noise or an output")
    return tensors, {**facts, "calls": calls}


# -- writing ----------------------------------------------------------------------------------------


def _write_pipeline(folder: File, net: nn.Module, plain: Plain, teacher: Teacher | None) -> None:
    if _ours(net) or teacher is None or teacher.recording is None:
        _write_unet(folder, net, plain)
        return
    offline()
    import diffusers

    kind, scheduler = getattr(diffusers, plain.pipeline), getattr(diffusers, plain.scheduler)
    wanted = inspect.signature(scheduler.__init__).parameters
    parts = dict(teacher.pipeline.components)
    parts[teacher.recording.part] = net
    parts["scheduler"] = scheduler(**{k: v for k, v in plain.config.items() if k in wanted})
    accepted = inspect.signature(kind.__init__).parameters
    pipe = kind(**{k: v for k, v in parts.items() if k in accepted})
    pipe.save_pretrained(str(folder), safe_serialization=True)
    names = getattr(teacher.pipeline, "labels", None)
    if names and "id2label" in accepted:  # the stock class forgets the names of its labels when it is saved
        by_id: dict[str, list[str]] = {}
        for word, number in names.items():
            by_id.setdefault(str(number), []).append(word)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["id2label"] = {number: ", ".join(words) for number, words in by_id.items()}
        _write_json(folder / "model_index.json", index)


def _write_unet(folder: File, net: nn.Module, plain: Plain) -> None:
    """A U-Net of ours as a stock pipeline, file by file: diffusers itself is loaded by the fresh process alone."""
    from safetensors.torch import save_file

    stamp = {"_diffusers_version": importlib.metadata.version("diffusers")}
    for name in ("unet", "scheduler"):
        (folder / name).mkdir()
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", plain.scheduler]}
    _write_json(folder / "model_index.json", {"_class_name": plain.pipeline, **stamp, **index})
    unet = {**UNET_DEFAULTS, **_config(net).to_diffusers()}
    _write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **stamp, **unet})
    _write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": plain.scheduler, **stamp, **plain.config}
    )
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(folder / "unet" / PART_WEIGHTS))


def _write_json(file: File, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_own(folder: File, net: nn.Module) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(_config(net).model_dump_json(indent=2) + "\n", encoding="utf-8")
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(folder / "model.safetensors"))


def _stamp(folder: File, contract: Contract) -> None:
    """Mirror what other tools look for in the header of the network's weights, where they are one file."""
    from safetensors.torch import save_file

    files = weight_files(folder) or weight_files(folder / "unet") or weight_files(folder / "transformer")
    if len(files) != 1:
        return
    tensors, metadata = read_tensors(files[0])
    known = {
        "format": "pt",
        "fewstep.steps": ",".join(str(s.count) for s in contract.steps),
        "fewstep.guidance": f"{contract.guidance.baked:g}",
        "fewstep.sampler": contract.pipeline or "own",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": contract.name or contract.method,
        "modelspec.license": contract.licence,
    }
    save_file(tensors, str(files[0]), metadata={**metadata, **known})


class _OneStep(nn.Module):
    """Noise in, sample out: what the exported program is."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.student.generate(noise, labels)


def _export(folder: File, student: Student, labels: Tensor | None) -> str:
    """Write the one-step program with a free batch; the name of the file, or why there is none."""
    from torch.export import Dim, export, save

    batch = Dim("batch")
    noise = torch.zeros((3, *student.shape))
    arguments = (noise,) if labels is None else (noise, labels[:3])
    shapes = {"noise": {0: batch}, "labels": None if labels is None else {0: batch}}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = export(
                _OneStep(student), arguments, dynamic_shapes=shapes if labels is not None else ({0: batch},)
            )
            save(program, str(folder / PROGRAM))
    except Exception as error:  # what cannot be traced is still a student
        (folder / PROGRAM).unlink(missing_ok=True)
        return f"not exported: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return PROGRAM


# -- checking ---------------------------------------------------------------------------------------


def check_student(folder: File | str, *, run_program: bool = False, timeout: float = 900) -> Check:
    """Run a model folder's golden sample in a fresh process that never imports this package.

    Folders of networks that no stock pipeline runs are compared in this process, from their safetensors, and so are
    stock ones of a network that the contract describes where diffusers is not installed; an
    exported program can hold code, so it runs only with ``run_program``, for folders that you made yourself.
    Refused where the folder or its contract is malformed; a sample that differs is a Check that is not ok.
    """
    return _checked(File(folder), run_program, timeout)


def _checked(folder: File, run_program: bool = False, timeout: float = 900) -> Check:
    contract = Contract.load(folder)
    if contract.pipeline is not None:
        kind, _ = components(folder)
        if kind != contract.pipeline:
            raise Refused(f"{folder}: model_index.json says {kind}, fewstep.json says {contract.pipeline}")
        stock = importlib.util.find_spec("diffusers") is not None
        if not stock and contract.network is None:
            _need_diffusers()
    else:
        scan(folder)
        stock = False
    golden, facts = read_golden(folder)
    if facts["pipeline"] != contract.pipeline:
        raise Refused(f"{folder}: the golden sample is of {facts['pipeline']}, the contract of {contract.pipeline}")
    for one in contract.steps:
        if contract.pipeline is not None and facts["calls"].get(one.count, one.call) != one.call:
            raise Refused(f"{folder}: golden sample and contract disagree about the call for {one.count} steps")
    errors: dict[int, float] = {}
    messages: list[str] = []
    if not stock:
        net, _ = own_network(folder, contract)
        labels = golden.get("labels")
        student = contract.student(net) if contract.role == "student" else _one_step(contract, net)
        errors |= _errors(student, golden, labels, int(facts["seed"]))
        if contract.pipeline is not None:
            messages.append("diffusers is not installed: the network was run by fewstep, not by the stock pipeline")
        elif facts["calls"] and not run_program:
            messages.append("the exported program was not run: it can hold code, ask for it for folders of your own")
    if stock or (contract.pipeline is None and facts["calls"] and run_program):
        found, message = _fresh_process(folder, timeout)
        if message:
            return Check(False, float("inf"), (), (message,))
        for count, error in found.items():
            errors[count] = max(errors.get(count, 0.0), error)
    if not errors:
        return Check(False, float("inf"), (), ("no step count of this folder could be run",))
    worst = max(errors.values())
    for count, error in errors.items():
        if not error <= TOLERANCE:
            messages.insert(0, f"{count} step(s) differ from the golden sample by {error:.2e}, allowed {TOLERANCE:g}")
    return Check(all(e <= TOLERANCE for e in errors.values()), worst, tuple(sorted(errors)), tuple(messages))


def _one_step(contract: Contract, net: nn.Module) -> Student:
    return Student(contract.denoiser(net), contract.shape, start=contract.start, start_scale=contract.start_scale)


def _fresh_process(folder: File, timeout: float) -> tuple[dict[int, float], str]:
    """(errors by step count, "") or ({}, what went wrong)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), str(folder)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}, f"the fresh process took more than {timeout:g} s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        return {}, f"the fresh process failed: {lines[-1].strip()[:300]}"
    errors = json.loads(done.stdout.strip().splitlines()[-1])["errors"]
    return {int(n): float(e) for n, e in errors.items()}, ""


@torch.no_grad()
def _errors(student: Student, golden: dict[str, Tensor], labels: Tensor | None, seed: int) -> dict[int, float]:
    errors = {}
    for count in student.steps:
        wanted = golden.get(f"output_{count}")
        if wanted is None:
            continue
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randn(golden["noise"].shape, generator=rng)
        got = student.generate(noise, labels, rng, count)
        if got.shape != wanted.shape:
            raise Refused(f"the golden sample has shape {list(wanted.shape)}, the model gives {list(got.shape)}")
        errors[count] = float((got - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    return errors


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
        pipe, recording, _ = load_pipeline(place)
        denoiser, _, _ = described(recording, contract)
        student = contract.student(denoiser.net)
        _, decode = autoencoder(pipe, recording)
    student = student.eval().requires_grad_(False)
    golden, facts = read_golden(place)
    errors = _errors(student, golden, golden.get("labels"), int(facts["seed"]))
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
    "PART_WEIGHTS",
    "Check",
    "LoadedStudent",
    "Wrapped",
    "check_student",
    "load_student",
    "save_student",
    "save_teacher",
    "weights_sha256",
]
