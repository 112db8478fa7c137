"""What is done with a model that is there: sample, measure, compare, report, check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import torch

from ..errors import Refused
from ..rng import mix
from ..tasks import task_named
from ..tasks.base import Task
from ..train.store import write_text
from ..train.trainer import Nobody, Watch
from .setting import size_text


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
    """Write ``count`` samples of a student, or of a teacher under its best common sampler, to ``out``.

    Image k is drawn from seed + k, so that one image of many can be repeated alone.
    """
    from ..interop import Contract, load_student, load_teacher, write_image

    if plan is not None:
        raise Refused(f"plan {plan}: searched plans are not part of this version; leave out --plan")
    if count < 1:
        raise Refused(f"count must be at least 1, got {count}")
    folder = _model(File(model))
    known = (folder / "fewstep.json").is_file()
    role = Contract.load(folder).role if known else "teacher"
    draw: Any
    if role == "student":
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
        from ..grid import grid
        from ..solvers import sample as run_solver
        from ..solvers import solver_named, start_noise

        times, solver = grid(loaded.denoiser.path, calls), solver_named("dpm2m")

        def draw(noise: torch.Tensor, cond: Any, rng: torch.Generator) -> torch.Tensor:
            return run_solver(
                loaded.denoiser, start_noise(loaded.denoiser.path, float(times[0]), noise), times, solver, cond=cond
            )

    wanted = list(labels) if labels else None
    if wanted is not None and classes is None:
        raise Refused(f"{model} takes no labels: leave out --labels")
    bad = [k for k in wanted or () if not 0 <= k < (classes or 0)]
    if bad:
        raise Refused(f"label {bad[0]} is not one of 0..{(classes or 0) - 1}")
    out.mkdir(parents=True, exist_ok=True)
    files: list[File] = []
    manifest = []
    low, high = value_range or (-1.0, 1.0)
    for begin in range(0, count, 64):
        index = range(begin, min(begin + 64, count))
        noise = torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed + k)) for k in index])
        chosen = None
        if classes is not None:
            chosen = torch.tensor([wanted[k % len(wanted)] if wanted else k % classes for k in index])
        with torch.inference_mode():
            rng = torch.Generator(device).manual_seed(mix(seed, "steps", begin))
            x = draw(noise.to(device), None if chosen is None else chosen.to(device), rng).float().cpu()
            x = decode(x).clamp(low, high)
        for row, k in enumerate(index):
            label = None if chosen is None else int(chosen[row])
            if x.ndim == 4 and x.shape[1] in (1, 3):
                file = out / f"{k:05d}.png"
                pixels = ((x[row] - low) / (high - low) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                write_image(pixels, file, model=str(folder), seed=seed + k, steps=calls)
            else:
                from safetensors.torch import save_file

                file = out / f"{k:05d}.safetensors"
                save_file({"sample": x[row].contiguous()}, file)
            files.append(file)
            manifest.append({"file": file.name, "seed": seed + k, "label": label, "steps": calls})
    write_text(out / "manifest.json", json.dumps({"model": str(folder), "samples": manifest}, indent=1))
    return files


def _reference(reference: str | File, shape: tuple[int, ...], value_range: tuple[float, float] | None) -> Task:
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
    """Measure a student beside its teacher by the protocol; writes ``out`` as a run folder with a report."""
    from ..evaluate import Protocol, write_report
    from ..evaluate import evaluate as measure
    from ..interop import load_student, load_teacher
    from ..metrics.features import features_for

    loaded = load_student(_model(File(student)))
    teacher = load_teacher(against)
    task = _reference(reference, loaded.student.shape, loaded.value_range)
    _fits(task, loaded.student.shape, str(student))
    out.mkdir(parents=True, exist_ok=True)
    loaded.student.to(device)
    teacher.denoiser.to(device)
    report = measure(
        loaded.student, teacher.denoiser, task, Protocol(), features_for(task, out / "cache"), watch=watch or Nobody(),
        seed=seed, train=task.train, cache=out / "cache",
    )  # fmt: skip
    report.save(out)
    write_report(out)
    content: dict[str, Any] = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def _fits(task: Task, shape: tuple[int, ...], name: str) -> None:
    if task.shape != tuple(shape):
        raise Refused(f"{name} makes {size_text(shape)}, the reference is {size_text(task.shape)}")


def compare(
    models: Sequence[File], reference: str | File, out: File, *, seed: int = 0, device: str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure several students under one protocol, from the same noise; one table, one report."""
    from ..evaluate import Protocol, write_report
    from ..evaluate import compare as measure
    from ..interop import load_student
    from ..metrics.features import features_for

    loaded = {str(model): load_student(_model(File(model))).student.to(device) for model in models}
    shape = next(iter(loaded.values())).shape
    task = _reference(reference, shape, None)
    for name, student in loaded.items():
        _fits(task, student.shape, name)
    out.mkdir(parents=True, exist_ok=True)
    features = features_for(task, out / "cache")
    report = measure(loaded, None, task, Protocol(), features, watch=watch or Nobody(), seed=seed)
    report.save(out)
    write_report(out)
    content: dict[str, Any] = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def report(run: File) -> File:
    """Write a run's report again, from its folder alone."""
    from ..evaluate import write_report

    if not (File(run) / "scores.json").is_file():
        raise Refused(f"{run} holds no scores.json: it was not evaluated, or is no run")
    return write_report(File(run))


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
