"""What is done with a model that is there: sample, measure, compare, report, check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import torch

from ..errors import Refused
from ..grid import grid
from ..rng import mix
from ..solvers import SolverPlan, solver_named, start_noise
from ..solvers import sample as run_solver
from ..tasks import task_named
from ..tasks.base import Task
from ..train.processes import after_first, alone, gather, world
from ..train.store import write_text
from ..train.trainer import Nobody, Watch
from .setting import size_text

CHUNK = 64
"""Samples that are drawn at a time."""


def _model(folder: File) -> File:
    """The model folder of a run, or the folder itself."""
    for name in ("student", "teacher"):
        if (folder / name / "fewstep.json").is_file():
            return folder / name
    return folder


def sample(
    model: File, count: int, *, steps: int | None = None, seed: int = 0, labels: Sequence[int] | None = None,
    out: File = File("samples"), device: str = "cpu", plan: File | None = None,
) -> list[File]:  # fmt: skip
    """Write ``count`` samples of a student, or of a teacher under a plan or its best common sampler, to ``out``.

    Image k is drawn from seed + k, so that one image of many can be repeated alone. All are drawn in chunks of
    one size, the last one filled up; several processes take turns with the chunks, and the files are the same.
    """
    from ..interop import Contract, load_student, load_teacher, write_image

    planned = None if plan is None else SolverPlan.load(plan)
    if planned is not None and steps not in (None, planned.nfe):
        raise Refused(f"{plan} makes {planned.nfe} calls, --steps asks for {steps}: leave out one of them")
    if count < 1:
        raise Refused(f"count must be at least 1, got {count}")
    if not 0 <= seed < 2**62:
        raise Refused(f"seed must lie between 0 and {2**62 - 1}, got {seed}")
    folder = _model(File(model))
    known = (folder / "fewstep.json").is_file()
    role = Contract.load(folder).role if known else "teacher"
    parts = Contract.load(folder).parts if known else {}
    if parts:
        raise Refused(
            f"{model} wants {', '.join(sorted(parts))} as its condition, which this command has not: call "
            "student.generate(noise, cond) in Python"
        )
    draw: Any
    if role == "student":
        if planned is not None:
            raise Refused(f"{model} is a student, and a plan is for teachers: leave out --plan")
        loaded: Any = load_student(folder)
        shape, classes, value_range, decode = loaded.student.shape, loaded.classes, loaded.value_range, loaded.decode
        calls = min(loaded.student.steps) if steps is None else steps
        loaded.student.times(calls)
        loaded.student.to(device)

        def draw(noise: torch.Tensor, cond: Any, rng: torch.Generator) -> torch.Tensor:
            done: torch.Tensor = loaded.student.generate(noise, cond, rng, calls)
            return done
    else:
        loaded = load_teacher(str(model) if not known and not folder.is_dir() else folder)
        shape, classes, value_range, decode = loaded.shape, loaded.classes, loaded.value_range, loaded.decode
        calls = 8 if steps is None else steps
        loaded.denoiser.to(device)
        path = loaded.denoiser.path
        if planned is None:
            times, solver = tuple(grid(path, calls).tolist()), solver_named("dpm2m")
        else:
            calls, solver = planned.nfe, planned.solver()
            try:
                times = planned.times(path)
            except ValueError as error:
                raise Refused(f"{plan} does not fit {model}: {error}") from None

        def draw(noise: torch.Tensor, cond: Any, rng: torch.Generator) -> torch.Tensor:
            return run_solver(loaded.denoiser, start_noise(path, times[0], noise), times, solver, cond=cond, rng=rng)

    joint = loaded.contract.joint if loaded.contract is not None else None
    if joint is not None and joint.places:
        raise Refused(f"{model} makes pictures for masks, and --labels are none: its README.md shows how from Python")
    wanted = list(labels) if labels else None
    if wanted is not None and classes is None:
        raise Refused(f"{model} takes no labels: leave out --labels")
    bad = [k for k in wanted or () if not 0 <= k < (classes or 0)]
    if bad:
        raise Refused(f"label {bad[0]} is not one of 0..{(classes or 0) - 1}")
    out.mkdir(parents=True, exist_ok=True)
    here, size = world(device), min(CHUNK, count)
    low, high = value_range or (-1.0, 1.0)
    image = False
    for begin in here.mine(range(0, count, size)):
        index = range(begin, begin + size)
        noise = torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed + k)) for k in index])
        chosen = None if classes is None else torch.tensor([_label(k, wanted, classes) for k in index])
        with torch.inference_mode():
            rng = torch.Generator(device).manual_seed(mix(seed, "steps", begin))
            if joint is not None:
                noise = joint.begin(noise, chosen)
            x = draw(noise.to(device), None if chosen is None else chosen.to(device), rng).float().cpu()
            x = x if joint is None else joint.seen(x)
            x = decode(x).clamp(low, high)
        image = x.ndim == 4 and x.shape[1] in (1, 3)
        for row, k in zip(x, index, strict=True):
            if k >= count:
                break
            if image:
                pixels = ((row - low) / (high - low) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                write_image(pixels, out / f"{k:05d}.png", model=str(folder), seed=seed + k, steps=calls)
            else:
                from safetensors.torch import save_file

                save_file({"sample": row.contiguous()}, out / f"{k:05d}.safetensors")
    ending = "png" if gather(image)[0] else "safetensors"
    files = [out / f"{k:05d}.{ending}" for k in range(count)]
    if here.first:
        manifest = [
            {"file": file.name, "seed": seed + k, "label": _label(k, wanted, classes), "steps": calls}
            for k, file in enumerate(files)
        ]
        write_text(out / "manifest.json", json.dumps({"model": str(folder), "samples": manifest}, indent=1))
    return files


def _label(k: int, wanted: Sequence[int] | None, classes: int | None) -> int | None:
    """The label of image k: those asked for in turn, else all in turn."""
    if classes is None:
        return None
    return wanted[k % len(wanted)] if wanted else k % classes


def reference_task(reference: str | File, shape: tuple[int, ...]) -> Task:
    """A task's name, or a folder or .npz of images, as the data to measure against."""
    from ..registry import TASKS

    if str(reference) in [entry.name for entry in TASKS] and str(reference) != "images":
        return task_named(str(reference))
    options: dict[str, Any] = {"path": str(reference)}
    if len(shape) == 3 and shape[0] in (1, 3):
        options.update(size=shape[-1], channels=shape[0])
    return task_named("images", options)


def evaluate(
    student: File, against: str | File, reference: str | File, out: File, *, seed: int = 0, device: str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a student beside its teacher by the protocol; writes ``out`` as a run folder with a report.

    The teacher is guided as the student's contract says that it was when it taught.
    """
    from ..evaluate import Protocol
    from ..evaluate import evaluate as measure
    from ..interop import load_student, load_teacher
    from ..metrics.features import features_for

    loaded = load_student(_model(File(student)))
    teacher = load_teacher(against)
    task = reference_task(reference, loaded.student.shape)
    _fits(task, loaded.student.shape, str(student))
    out.mkdir(parents=True, exist_ok=True)
    features = after_first(lambda: features_for(task, out / "cache"))
    loaded.student.to(device)
    report = measure(
        loaded.student, _as_it_taught(loaded, teacher, device), task, Protocol(), features, watch=watch or Nobody(),
        seed=seed, train=task.train, cache=out / "cache",
    )  # fmt: skip
    alone(lambda: _written(report, out))
    content: dict[str, Any] = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def _written(report: Any, out: File) -> None:
    from ..evaluate import write_report

    report.save(out)
    write_report(out)


def _fits(task: Task, shape: tuple[int, ...], name: str) -> None:
    if task.shape != tuple(shape):
        raise Refused(f"{name} makes {size_text(shape)}, the reference is {size_text(task.shape)}")


def compare(
    models: Sequence[File], reference: str | File, out: File, *, seed: int = 0, device: str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure several students under one protocol, from the same noise; one table, one report."""
    from ..evaluate import Protocol
    from ..evaluate import compare as measure
    from ..interop import load_student
    from ..metrics.features import features_for

    loaded = {str(model): load_student(_model(File(model))).student.to(device) for model in models}
    shape = next(iter(loaded.values())).shape
    task = reference_task(reference, shape)
    for name, student in loaded.items():
        _fits(task, student.shape, name)
    out.mkdir(parents=True, exist_ok=True)
    features = after_first(lambda: features_for(task, out / "cache"))
    report = measure(loaded, None, task, Protocol(), features, watch=watch or Nobody(), seed=seed)
    alone(lambda: _written(report, out))
    content: dict[str, Any] = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def evaluate_prompts(
    student: File, against: str | File, prompts: File, out: File, *, scorer: File | None = None,
    features: File | None = None, seed: int = 0, device: str = "cpu", watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a student beside its teacher on prompts alone; writes ``out`` as a run folder with a report.

    The teacher is guided as the student's contract says that it was when it taught.
    """
    from ..evaluate import evaluate_without_reference, write_report
    from ..interop import load_student, load_teacher
    from ..metrics.folders import ClipScorer, FolderFeatures

    loaded = load_student(_model(File(student)))
    teacher = load_teacher(against)
    if loaded.student.shape != teacher.shape:
        raise Refused(f"{student} makes {size_text(loaded.student.shape)}, {against} makes {size_text(teacher.shape)}")
    task = _prompts(prompts, teacher)
    scores = None if scorer is None else ClipScorer(scorer, device)
    looks = None if features is None else FolderFeatures(features, teacher.value_range or (-1.0, 1.0), device)
    out.mkdir(parents=True, exist_ok=True)
    loaded.student.to(device)
    report = evaluate_without_reference(
        loaded.student, _as_it_taught(loaded, teacher, device), task, watch=watch or Nobody(), seed=seed,
        scorer=scores, features=looks,
        cache=out / "cache",
    )  # fmt: skip
    report.save(out)
    write_report(out)
    content: dict[str, Any] = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def _as_it_taught(loaded: Any, teacher: Any, device: str) -> Any:
    """The teacher under the guidance that a student's contract says it was taught under."""
    from ..denoiser import Guided

    denoiser, scale = teacher.denoiser.to(device), loaded.contract.guidance.baked
    return denoiser if scale == 1 else Guided(denoiser, scale, teacher.null)


def _prompts(file: File, teacher: Any) -> Task:
    """The prompts of a file as a task of conditions without data."""
    import importlib

    try:
        module = importlib.import_module("fewstep.tasks.prompts")
    except ModuleNotFoundError:
        raise Refused(f"prompts {file}: this version has no task for prompts; give --reference data") from None
    task: Task = module.Prompts(module.PromptsOptions(path=str(file))).asked(
        teacher.embed, teacher.shape, teacher.decode
    )
    return task


def report(run: File, votes: Sequence[File] = ()) -> File:
    """Write a run's report again, from its folder alone; ``votes`` on its blind comparison are taken in first."""
    from ..evaluate import read_scores, write_report
    from ..evaluate.blind import ballot, keep_votes

    run = File(run)
    if not (run / "scores.json").is_file():
        raise Refused(f"{run} holds no scores.json: it was not evaluated, or is no run")
    if votes:
        keep_votes(run, list(votes), ballot(run, read_scores(run / "scores.json")))
    return write_report(run)


def check(student: File) -> dict[str, Any]:
    """The contract and the golden sample of a model folder."""
    from ..interop import Contract, check_student

    folder = _model(File(student))
    contract = Contract.load(folder)
    if (folder / "program.json").is_file():
        raise Refused(f"{folder} holds exported programs, which can hold code: check the student they were made of")
    found = check_student(folder)
    return {
        "model": str(folder),
        "holds": found.ok,
        "method": contract.method,
        "steps": [step.count for step in contract.steps],
        "max_error": found.max_error,
        "messages": list(found.messages),
    }
