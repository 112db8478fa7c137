"""Train, distil: from a recipe to a model folder and its report."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch

from .. import __version__
from ..errors import Refused
from ..rng import Rng, mix
from ..student import Student
from ..tasks.base import Task
from ..tasks.encoded import Encoded
from ..train.build import inner_of, make_student, method_class
from ..train.pairs import Pairs
from ..train.recipe import Recipe, load_recipe, write_recipe
from ..train.store import load_state, save_state, write_text
from ..train.trainer import Nobody, Trainer, Watch
from .setting import Setting, game, prepare


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
    from ..interop import load_student

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
    from ..evaluate import write_report

    write_report(run)
    content: dict[str, Any] = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def _evaluated(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], watch: Watch
) -> Any:
    from ..evaluate import Protocol, evaluate
    from ..metrics.features import features_for

    task = setting.task
    if not task.has_data:
        return _without_reference(recipe, run, setting, student, facts, watch)
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


def _without_reference(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], watch: Watch
) -> Any:
    """The report of a task that has conditions and no data: the student beside its teacher alone."""
    if importlib.util.find_spec("fewstep.evaluate.noref") is None:
        watch.say("not evaluated: this version measures against data, and prompts are none")
        return None
    from ..evaluate import Protocol
    from ..evaluate.noref import evaluate_without_reference

    assert setting.denoiser is not None  # prompts are only taken with a teacher
    report = evaluate_without_reference(
        student, setting.denoiser, setting.task, Protocol(**recipe.evaluate.protocol), watch=watch, seed=recipe.seed,
        cache=run / "cache",
    )  # fmt: skip
    report.save(run)
    write_text(run / "training.json", json.dumps(facts, indent=1))
    return report


def _take_figures(source: str, cache: File) -> None:
    """Put the figures that a packaged teacher came with where the evaluation looks for them.

    Their names are hashes of the teacher's weights, the protocol, the measuring network, the data and the
    seed: where any of these differs they are not found, and the teacher is measured.
    """
    from ..interop import packaged

    folder = packaged().get(source)
    for file in (folder / "evaluation").glob("teacher-*.json") if folder else ():
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, cache / file.name)


def _save(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], report: Any, watch: Watch
) -> File:
    """The model folder of a run, proved in a fresh process where stock diffusers can run it."""
    from ..interop import save_student, save_teacher

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
    baked = recipe.teacher.guidance if recipe.teacher else 1.0
    if method_class(recipe.method.name).guides:
        baked = float(recipe.method.options.get("guidance", 1.0))
    check = save_student(
        student, folder, method=recipe.method.name, teacher=setting.teacher, name=name, task=recipe.task.name,
        classes=task.classes, value_range=task.value_range, training=training, table=rows, pictures=pictures,
        guidance=baked, licence=recipe.licence or None,
        recipe_sha256=recipe.sha256, seed=recipe.seed, overwrite=True,
    )  # fmt: skip
    for line in check.messages:
        watch.say(line)
    return folder


@torch.no_grad()
def _sheet(student: Student, task: Task, seed: int) -> Any:
    """Sixty-four pictures for the card, one class a column where there are classes."""
    count = 64 if task.classes is None else 8 * min(task.classes, 10)
    if not task.has_data:
        count = min(8, len(task.train))
    cond = task.train.rows(torch.zeros(1, dtype=torch.long)).cond
    if task.classes is not None:
        cond = torch.arange(count) % min(task.classes, 10)
    elif cond is not None:
        cond = task.train.rows(torch.arange(count) % len(task.train)).cond
    device = next(student.parameters()).device
    noise = Rng(seed, "sheet").normal((count, *student.shape)).to(device)
    from ..cond import move

    return task.pictures(student.generate(noise, move(cond, device)).cpu())
