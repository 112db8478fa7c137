"""What the commands do: whole jobs, from a recipe or a folder to files. Plain functions, no terminal."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch

from . import __version__
from .denoiser import Denoiser, Guided, Reframed
from .errors import Failed, Refused
from .method import Method
from .rng import Rng, mix
from .student import Student
from .tasks import task_named
from .tasks.base import Task
from .tasks.encoded import Encoded
from .train.build import inner_of, make_student, method_class, method_options, straightened
from .train.pairs import Pairs
from .train.recipe import Recipe, load_recipe, shipped, write_recipe
from .train.store import load_state, save_state, write_text
from .train.trainer import Nobody, Trainer, Watch

# -- setting up ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A recipe's task and teacher, in memory."""

    task: Task
    teacher: Any  # interop.Teacher, or None
    denoiser: Denoiser | None  # the teacher's, guided where the recipe says so
    raw: Denoiser | None
    shape: tuple[int, ...]


def prepare(recipe: Recipe, run: File, device: str, watch: Watch, resume: bool = False) -> Setting:
    """Load what a recipe names; Refused, in one line, where something does not fit."""
    cls = method_class(recipe.method.name)
    section, teacher = recipe.teacher, None
    if section is None and cls.needs_teacher:
        raise Refused(f"method {recipe.method.name!r} needs a teacher: give [teacher] source = ...")
    options = dict(recipe.task.options)
    if section is not None and section.source != "law":
        teacher = _teacher(section.source, recipe, run, device, watch, resume)
        if recipe.task.name == "images":
            side = _picture_side(teacher)
            options.setdefault("size", side[1])
            if side[0] in (1, 3):
                options.setdefault("channels", side[0])
    task = task_named(recipe.task.name, options)
    raw: Denoiser | None = None
    if section is not None and section.source == "law":
        if task.law is None:
            raise Refused(f"task {recipe.task.name!r} has no law in closed form: name a teacher")
        raw = task.law
        if recipe.student.path is not None and recipe.student.path != task.law.path:
            raw = Reframed(task.law, recipe.student.path)
    elif teacher is not None:
        raw = teacher.denoiser
        if teacher.shape != task.shape:
            if getattr(teacher.pipeline, "vae", None) is None:
                raise Refused(
                    f"teacher {teacher.name} makes {_size(teacher.shape)}, the data is {_size(task.shape)}: "
                    "set task.options size and channels to match"
                )
            task = Encoded(task, teacher.shape, teacher.encode, teacher.decode)
    denoiser = raw
    if raw is not None and section is not None and section.guidance != 1:
        denoiser = Guided(raw, section.guidance, teacher.null if teacher is not None else None)
    if raw is not None:
        raw.to(device)
    return Setting(task, teacher, denoiser, raw, task.shape)


def _teacher(source: str, recipe: Recipe, run: File, device: str, watch: Watch, resume: bool) -> Any:
    from .interop import load_teacher

    if source.startswith("recipe:"):
        nested = load_recipe(source.removeprefix("recipe:"), [f"seed={recipe.seed}"])
        if nested.task.name == recipe.task.name:
            nested = nested.model_copy(update={"task": recipe.task})
        place = run / "teacher_run"
        if not (place / "teacher").is_dir():
            watch.say(f"teaching first: {nested.name}")
            train(nested, place, resume=resume and place.exists(), device=device, watch=watch)
        return load_teacher(place / "teacher")
    folder = File(source)
    return load_teacher(folder / "teacher" if (folder / "teacher" / "fewstep.json").is_file() else source)


def _picture_side(teacher: Any) -> tuple[int, int]:
    """Channels and side of a teacher's pictures, after its autoencoder."""
    vae = getattr(teacher.pipeline, "vae", None)
    if vae is None:
        return teacher.shape[0], teacher.shape[-1]
    return vae.config.out_channels, teacher.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def game(recipe: Recipe, setting: Setting, student: Student) -> Method:
    """The method of a recipe, with its players."""
    cls = method_class(recipe.method.name)
    options = method_options(recipe.method, recipe, setting.task)
    teacher = setting.raw if cls.guides else setting.denoiser
    if teacher is not None and cls.straight:
        teacher = straightened(teacher)
    try:
        return cls(teacher, student, options)
    except ValueError as error:
        raise Refused(f"method {recipe.method.name!r}: {error}") from None


# -- training -----------------------------------------------------------------------------------


def _open_run(recipe: Recipe, run: File, resume: bool, device: str) -> None:
    file = run / "recipe.toml"
    if resume and file.exists():
        if load_recipe(file).sha256 != recipe.sha256:
            raise Refused(f"the recipe is not the one that {run} was started with: leave out --resume, or take {file}")
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, file)
    facts = {
        "fewstep": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "recipe_sha256": recipe.sha256,
    }
    write_text(run / "environment.json", json.dumps(facts, indent=1))


def _learn(
    recipe: Recipe, run: File, setting: Setting, resume: bool, device: str, watch: Watch, verb: str
) -> tuple[Student, dict[str, Any]]:
    """All stages of a recipe; stages that a stopped run had finished are read back."""
    resume_line = f"fewstep {verb} {run} --resume"
    facts: dict[str, Any] = {"steps": [], "seconds": 0.0, "pairs_seconds": 0.0, "warnings": []}
    student: Student | None = None
    for index in range(len(recipe.stages) + 1):
        part = recipe.stage(index)
        torch.manual_seed(mix(recipe.seed, "weights", index))
        fresh = make_student(part, setting.task, setting.raw, setting.shape)
        if student is not None:
            _inherit(fresh, student)
        elif recipe.student.init is not None:
            _inherit(fresh, _initial(recipe.student.init))
        place = run / "stages" / f"{index:02d}"
        done = load_state(place) if resume else None
        if done is not None:
            with torch.no_grad():
                for name, value in fresh.state_dict(keep_vars=True).items():
                    value.copy_(done[0][name])
            spent = done[1]
        else:
            method = game(part, setting, fresh)
            began = time.perf_counter()
            wanted = method.pairs()
            pairs = None
            if wanted is not None and setting.denoiser is not None:
                watch.start("pairs", wanted.count)
                pairs = Pairs(
                    setting.denoiser.to(device), setting.task, wanted, run / "pairs",
                    teacher_hash=_teacher_hash(setting), seed=recipe.seed, device=device,
                    watch=lambda count: watch.advance("pairs", count),
                )  # fmt: skip
                watch.finish("pairs")
            made = time.perf_counter() - began
            trainer = Trainer(recipe, run, stage=index, device=device, watch=watch, resume_line=resume_line)
            fresh = trainer.fit(method, setting.task, pairs, resume=resume)
            spent = {
                "steps": part.steps, "seconds": trainer.seconds, "pairs_seconds": made, "warnings": trainer.warnings
            }  # fmt: skip
            save_state(place, dict(fresh.state_dict()), spent)
        student = fresh.eval()
        facts["steps"].append(spent["steps"])
        for key in ("seconds", "pairs_seconds"):
            facts[key] += spent[key]
        facts["warnings"] += spent["warnings"]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert student is not None
    return student.requires_grad_(False), facts


def _inherit(fresh: Student, old: Student) -> None:
    """Take over the weights that fit by name and shape; ValueError where none does."""
    mine, theirs = inner_of(fresh.denoiser), inner_of(old.denoiser)
    own = mine.net.state_dict()
    fitting = {k: v for k, v in theirs.net.state_dict().items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise Refused("the student to go on from has another network: none of its weights fits")
    mine.net.load_state_dict(fitting, strict=False)


def _initial(source: str) -> Student:
    from .interop import load_student

    folder = File(source)
    return load_student(folder / "student" if (folder / "student").is_dir() else folder).student


def _teacher_hash(setting: Setting) -> str:
    if setting.teacher is not None and setting.teacher.sha256:
        return str(setting.teacher.sha256)
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted((setting.raw.state_dict() if setting.raw is not None else {}).items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(
    recipe: Recipe, run: File, *, resume: bool = False, device: str = "cpu", watch: Watch | None = None
) -> dict[str, Any]:
    """Train by a recipe and save the model into ``run``: ``teacher/`` or ``student/``. No evaluation."""
    eyes = watch or Nobody()
    setting = prepare(recipe, run, device, eyes, resume)
    _open_run(recipe, run, resume, device)
    student, facts = _learn(recipe, run, setting, resume, device, eyes, "train")
    folder = _save(recipe, run, setting, student, facts, None, eyes)
    return {"model": str(folder), **{k: v for k, v in facts.items() if k != "warnings"}, "warnings": facts["warnings"]}


def distill(
    recipe: Recipe, run: File, *, resume: bool = False, device: str = "cpu", watch: Watch | None = None
) -> dict[str, Any]:
    """The main job: train, evaluate beside the teacher, save, report. Returns ``report.json``'s content."""
    eyes = watch or Nobody()
    setting = prepare(recipe, run, device, eyes, resume)
    _open_run(recipe, run, resume, device)
    student, facts = _learn(recipe, run, setting, resume, device, eyes, "distill")
    report = None
    if recipe.evaluate.enabled:
        report = _evaluated(recipe, run, setting, student, facts, eyes)
    _save(recipe, run, setting, student, facts, report, eyes)
    if report is None:
        return {"model": str(run / "student"), **facts}
    from .evaluate import write_report

    write_report(run)
    content: dict[str, Any] = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def _evaluated(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], watch: Watch
) -> Any:
    from .evaluate import Protocol, evaluate
    from .metrics.features import features_for

    task = setting.task
    pixels = task.pixels if isinstance(task, Encoded) else task
    features = features_for(pixels, run / "cache")
    if not recipe.evaluate.fresh and recipe.teacher is not None:
        _take_figures(recipe.teacher.source, run / "cache")
    makes = method_class(recipe.method.name).makes
    teacher = student.denoiser if makes == "teacher" else setting.denoiser
    report = evaluate(
        None if makes == "teacher" else student, teacher, task, Protocol(**recipe.evaluate.protocol), features,
        watch=watch, seed=recipe.seed, train=pixels.train, cache=run / "cache",
    )  # fmt: skip
    report.save(run)
    write_text(run / "training.json", json.dumps(facts, indent=1))
    return report


def _take_figures(source: str, cache: File) -> None:
    """Put the figures that a packaged teacher came with where the evaluation looks for them.

    Their names are hashes of the teacher's weights, the protocol, the measuring network, the data and the
    seed: where any of these differs they are not found, and the teacher is measured.
    """
    from .interop import packaged

    folder = packaged().get(source)
    for file in (folder / "evaluation").glob("teacher-*.json") if folder else ():
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, cache / file.name)


def _save(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], report: Any, watch: Watch
) -> File:
    """The model folder of a run, proved in a fresh process where stock diffusers can run it."""
    from .interop import save_student, save_teacher

    task, name = setting.task, recipe.name or recipe.method.name
    training = {"steps": list(facts["steps"]), "seconds": round(facts["seconds"], 1), "seed": recipe.seed}
    rows = [row.model_dump(mode="json") for row in report.rows] if report is not None else []
    pictures = _sheet(student, task, recipe.seed)
    if method_class(recipe.method.name).makes == "teacher":
        folder = run / "teacher"
        save_teacher(
            student.denoiser, folder, shape=setting.shape, name=name, method=recipe.method.name, task=recipe.task.name,
            classes=task.classes, value_range=task.value_range, training=training, table=rows,
            licence=recipe.licence or "unknown", recipe_sha256=recipe.sha256, seed=recipe.seed, overwrite=True,
        )  # fmt: skip
        return folder
    folder = run / "student"
    check = save_student(
        student, folder, method=recipe.method.name, teacher=setting.teacher, name=name, task=recipe.task.name,
        classes=task.classes, value_range=task.value_range, training=training, table=rows, pictures=pictures,
        guidance=recipe.teacher.guidance if recipe.teacher else 1.0, licence=recipe.licence or None,
        recipe_sha256=recipe.sha256, seed=recipe.seed, overwrite=True,
    )  # fmt: skip
    for line in check.messages:
        watch.say(line)
    return folder


@torch.no_grad()
def _sheet(student: Student, task: Task, seed: int) -> Any:
    """Sixty-four pictures for the card, one class a column where there are classes."""
    count = 64 if task.classes is None else 8 * min(task.classes, 10)
    cond = task.train.rows(torch.zeros(1, dtype=torch.long)).cond
    if task.classes is not None:
        cond = torch.arange(count) % min(task.classes, 10)
    elif cond is not None:
        cond = task.train.rows(torch.arange(min(count, len(task.train)))).cond
    device = next(student.parameters()).device
    noise = Rng(seed, "sheet").normal((count, *student.shape)).to(device)
    from .cond import move

    return task.pictures(student.generate(noise, move(cond, device)).cpu())


# -- using --------------------------------------------------------------------------------------


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
    from .interop import Contract, load_student, load_teacher, write_image

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
        from .grid import grid
        from .solvers import sample as run_solver
        from .solvers import solver_named, start_noise

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
    from .registry import TASKS

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
    from .evaluate import Protocol, write_report
    from .evaluate import evaluate as measure
    from .interop import load_student, load_teacher
    from .metrics.features import features_for

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
        raise Refused(f"{name} makes {_size(shape)}, the reference is {_size(task.shape)}")


def compare(
    models: Sequence[File], reference: str | File, out: File, *, seed: int = 0, device: str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure several students under one protocol, from the same noise; one table, one report."""
    from .evaluate import Protocol, write_report
    from .evaluate import compare as measure
    from .interop import load_student
    from .metrics.features import features_for

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
    from .evaluate import write_report

    if not (File(run) / "scores.json").is_file():
        raise Refused(f"{run} holds no scores.json: it was not evaluated, or is no run")
    return write_report(File(run))


def check(student: File) -> dict[str, Any]:
    """The contract and the golden sample of a model folder."""
    from .interop import Contract, check_student

    folder = _model(File(student))
    contract = Contract.load(folder)
    found = check_student(folder)
    return {
        "model": str(folder),
        "holds": found.ok,
        "method": contract.method,
        "steps": [step.count for step in contract.steps],
        "max_error": found.max_error,
        "messages": list(found.messages),
    }


def plan(recipe: Recipe, *, device: str = "cpu", timed: int = 3) -> dict[str, Any]:
    """What a recipe would cost: parameters, memory and time, from a few steps that are thrown away."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        run = File(scratch)
        eyes = Nobody()
        if recipe.teacher is not None and recipe.teacher.source.startswith("recipe:"):
            nested = load_recipe(recipe.teacher.source.removeprefix("recipe:"), [f"seed={recipe.seed}"])
            small = nested.model_copy(
                update={"steps": 1, "task": recipe.task if nested.task.name == recipe.task.name else nested.task}
            )
            train(small, run / "teacher_run", device=device)
        setting = prepare(recipe, run, device, eyes)
        parts = []
        for index in range(len(recipe.stages) + 1):
            part = recipe.stage(index)
            student = make_student(part, setting.task, setting.raw, setting.shape)
            method = game(part, setting, student)
            parts.append(_cost(part, setting, method, run, index, device, timed))
    licence = setting.teacher.licence if setting.teacher is not None else "unknown"
    return {
        "recipe": recipe.name,
        "method": " then ".join(p["method"] for p in parts),
        "task": recipe.task.name,
        "parameters": max(p["parameters"] for p in parts),
        "teacher_parameters": sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0,
        "memory_mb": max(p["memory_mb"] for p in parts),
        "minutes": round(sum(p["seconds"] for p in parts) / 60, 2),
        "steps": [p["steps"] for p in parts],
        "licence": licence,
        "device": device,
    }


def _cost(
    part: Recipe, setting: Setting, method: Method, run: File, index: int, device: str, timed: int
) -> dict[str, Any]:
    """Parameters, states in memory and seconds of one stage."""
    learning = sum(p.numel() for name in method.players for p in getattr(method, name).parameters())
    frozen = sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0
    wanted = method.pairs()
    seconds = 0.0
    pairs = None
    if wanted is not None and setting.denoiser is not None:
        few = wanted.model_copy(update={"count": min(wanted.count, max(part.batch, 256))})
        began = time.perf_counter()
        pairs = Pairs(setting.denoiser, setting.task, few, run / "pairs", teacher_hash="plan", device=device)
        seconds += (time.perf_counter() - began) * wanted.count / few.count
    small = part.model_copy(update={"steps": timed})
    trainer = Trainer(small, run / f"plan_{index}", device=device)
    trainer.fit(method, setting.task, pairs)
    lines = (run / f"plan_{index}" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    each = json.loads(lines[-1])["seconds"] / timed
    seconds += each * part.steps
    # weights, gradient, two moments of every learning parameter; the average; the frozen teacher
    states = 4 * (4 * learning + sum(p.numel() for p in method.student.parameters()) + frozen)
    return {
        "method": part.method.name,
        "parameters": learning,
        "memory_mb": round(states / 2**20, 1),
        "seconds": seconds,
        "steps": part.steps,
    }


# -- verifying ----------------------------------------------------------------------------------


def scores_of(report: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The figures that a recipe's ``[expect]`` may name, from a report.

    Of the student's first row (of the teacher's full row where there is no student) its columns; besides,
    ``over_floor``: the teacher's full Fréchet distance over the floor; ``best_over_floor``: its best at
    up to 8 calls; against an exact law ``sliced_w2`` and its like; ``over_teacher``, ``over_four_calls``: the
    student over the teacher there;
    ``speedup``: of throughput against the full teacher; ``seconds``: of training, pairs included.
    """
    rows: list[Mapping[str, Any]] = list(report["rows"])
    named = {kind: [r for r in rows if r["model"] == kind] for kind in ("student", "teacher", "real")}
    few = [r for r in rows if str(r["model"]).startswith("teacher:") and r["nfe"] <= 8]
    main = (named["student"] or named["teacher"])[0]
    out = {k: float(v) for k, v in main.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    out.update({k: float(v) for k, v in (main.get("exact") or {}).items()})
    floor = float(named["real"][0]["frechet"]) if named["real"] else float("nan")
    if named["teacher"]:
        full = named["teacher"][0]
        out["over_floor"] = float(full["frechet"]) / floor
        out["over_teacher"] = float(main["frechet"]) / float(full["frechet"])
        if main.get("samples_per_s") and full.get("samples_per_s"):
            out["speedup"] = float(main["samples_per_s"]) / float(full["samples_per_s"])
    if few:
        best = min(few, key=lambda r: r["frechet"])
        out["best_over_floor"] = float(best["frechet"]) / floor
        fours = [float(r["frechet"]) for r in few if r["nfe"] == 4]
        if fours:
            out["over_four_calls"] = float(main["frechet"]) / min(fours)
    if training:
        out["seconds"] = float(training["seconds"]) + float(training["pairs_seconds"])
    return out


def verify(
    names: Sequence[str], out: File, *, seeds: int | None = None, device: str = "cpu", watch: Watch | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run recipes over their seeds and hold the medians to ``[expect]``; finished runs are not run again."""
    eyes = watch or Nobody()
    chosen = list(names) or [name for name, file in shipped().items() if load_recipe(file).expect]
    rows: list[dict[str, Any]] = []
    for name in chosen:
        recipe = load_recipe(name, overrides)
        if not recipe.expect:
            raise Refused(f"recipe {name!r} expects nothing: give it an [expect] section")
        count = seeds or max(bar.seeds for bar in recipe.expect.values())
        found: list[dict[str, float]] = []
        for k in range(count):
            one = recipe.model_copy(update={"seed": recipe.seed + k})
            place = out / (recipe.name or File(name).stem) / f"seed_{one.seed}"
            file = place / "report" / "report.json"
            same = (place / "recipe.toml").is_file() and load_recipe(place / "recipe.toml").sha256 == one.sha256
            eyes.say(f"{name}, seed {one.seed}: {place}")
            if not (same and file.is_file()):
                if place.exists() and not same:
                    shutil.rmtree(place)
                distill(one, place, resume=same, device=device, watch=watch)
            training = json.loads((place / "training.json").read_text(encoding="utf-8"))
            found.append(scores_of(json.loads(file.read_text(encoding="utf-8")), training))
        for metric, bar in recipe.expect.items():
            values = [scores[metric] for scores in found if metric in scores]
            if not values:
                raise Failed(f"recipe {name!r} expects {metric!r}, which its report does not have")
            middle = statistics.median(values)
            holds = (bar.min is None or middle >= bar.min) and (bar.max is None or middle <= bar.max)
            wanted = " ".join(
                f"{sign} {edge:g}" for sign, edge in ((">=", bar.min), ("<=", bar.max)) if edge is not None
            )
            rows.append(
                {
                    "recipe": name, "metric": metric, "expected": wanted, "median": round(middle, 4),
                    "spread": round(max(values) - min(values), 4), "seeds": len(values), "holds": holds,
                }
            )  # fmt: skip
    return {"rows": rows, "holds": all(row["holds"] for row in rows)}
