"""Train, distil: from a recipe to a model folder and its report."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any

import torch

from .. import __version__
from ..adapters import own
from ..denoiser import Denoiser, Guided, inner_of
from ..errors import Refused
from ..nets import Experts, UNet
from ..rng import Rng, mix
from ..student import Student
from ..tasks.base import Task
from ..tasks.encoded import Encoded
from ..tasks.labelled import Labelled
from ..tasks.shards import cache_folder
from ..train.build import make_student, method_class, method_options
from ..train.pairs import Pairs
from ..train.processes import after_first, again, alone, world
from ..train.recipe import Recipe, load_recipe, write_recipe
from ..train.store import load_state, open_state, save_state, sweep, write_text
from ..train.trainer import Nobody, Trainer, Watch, newest
from .bits import bits_of_run
from .consent import consent
from .setting import Setting, game, prepare, taught_by


def _open_run(
    recipe: Recipe, run: File, resume: bool, device: str, accepted: list[str], chosen: str | None = None
) -> None:
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
        "accepted_licences": accepted,
    }
    if chosen is None and resume:  # what was said when it began
        with contextlib.suppress(OSError, ValueError):
            chosen = json.loads((run / "environment.json").read_text(encoding="utf-8")).get("chosen")
    if chosen is not None:
        facts["chosen"] = chosen
    write_text(run / "environment.json", json.dumps(facts, indent=1))


def _learn(
    recipe: Recipe,
    run: File,
    setting: Setting,
    resume: bool,
    device: str,
    watch: Watch,
    verb: str,
    open_run: Callable[[], None] | None = None,
) -> tuple[Student, dict[str, Any]]:
    """All stages of a recipe; stages that a stopped run had finished are read back.

    ``open_run`` begins the run folder, once it is known that the recipe fits.
    """
    resume_line = again(f"{verb} {shlex.quote(str(run))} --resume")
    made_of = {} if setting.raw is None else {"teacher": _teacher_hash(setting)}
    facts: dict[str, Any] = {"steps": [], "seconds": 0.0, "pairs_seconds": 0.0, "warnings": []}
    student: Student | None = None
    parts = [recipe.stage(index) for index in range(len(recipe.stages) + 1)]
    for part in parts:  # nothing is written for a recipe that does not fit
        method_options(part.method, part, setting.task)
    if resume and open_run is not None:
        open_run()
    for index, part in enumerate(parts):
        torch.manual_seed(mix(recipe.seed, "weights", index))
        fresh = make_student(part, setting.task, setting.raw, setting.shape)
        if student is not None:
            _inherit(fresh, student)
        elif recipe.student.init is not None and recipe.student.lora is not None:
            _inherit_adapters(fresh, recipe.student.init)
        elif recipe.student.init is not None:
            _inherit(fresh, _initial(recipe.student.init))
        place = run / "stages" / f"{index:02d}"
        there = resume and alone(lambda place=place: open_state(place) is not None)  # type: ignore[misc]
        done = load_state(place) if there else None
        if done is not None:
            if done[1].get("teacher", made_of.get("teacher")) != made_of.get("teacher"):
                raise Refused(
                    f"the teacher changed since {place}: resume with the teacher of the run, or another --out"
                )
            with torch.no_grad():
                for name, value in own(fresh).items():
                    value.copy_(done[0][name])
            spent = done[1]
        else:
            within, teaches = setting, _teacher_of_pairs(recipe, made_of.get("teacher", ""))
            if student is not None and recipe.stages[index - 1].teacher == "previous":
                within = taught_by(student, setting)
                teaches = _teacher_hash(within)
            method = game(part, within, fresh)
            if index == len(parts) - 1 and setting.teacher is not None:
                from ..interop import refuse_homeless

                refuse_homeless(fresh, setting.teacher)
            if index == 0 and not resume and open_run is not None:
                open_run()
            wanted = method.pairs()
            pairs = None
            if wanted is not None and within.denoiser is not None:
                watch.start("pairs", wanted.count)
                pairs = Pairs(
                    within.denoiser.to(device), setting.task, wanted, run if verb == "plan" else cache_folder(),
                    teacher_hash=teaches, seed=recipe.seed, device=device, states=method.reads_states,
                    watch=lambda count: watch.advance("pairs", count),
                )  # fmt: skip
                watch.finish("pairs")
            made = 0.0 if pairs is None else pairs.seconds / world().size  # pairs that were found count as well
            trainer = Trainer(
                recipe, run, stage=index, device=device, watch=watch, resume_line=resume_line, made_of=made_of
            )
            fresh = trainer.fit(method, setting.task, pairs, resume=resume)
            spent = {
                "steps": part.steps, "seconds": trainer.seconds, "pairs_seconds": made, "warnings": trainer.warnings
            }  # fmt: skip
            if world().first:
                save_state(place, {k: v.detach() for k, v in own(fresh).items()}, {**spent, **made_of})
        student = fresh.eval()
        facts["steps"].append(spent["steps"])
        for key in ("seconds", "pairs_seconds"):
            facts[key] += spent[key]
        facts["warnings"] += spent["warnings"]
    if world().first:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert student is not None
    return student.requires_grad_(False), facts


def _teacher_of_pairs(recipe: Recipe, weights: str) -> str:
    """All of a teacher that its pairs depend on beside its denoiser: weights, and how its pipeline is called."""
    section = recipe.teacher
    return weights if section is None else f"{weights} {section.model_dump_json(exclude={'source'})}"


def _inherit(fresh: Student, old: Student) -> None:
    """Take over the weights that fit by name and shape; ValueError where none does."""
    mine, theirs = inner_of(fresh.denoiser), inner_of(old.denoiser)
    before = theirs.net
    if isinstance(before, UNet) and before.reads_s and not getattr(mine.net, "reads_s", False):
        before = before.fold(0.0)  # one that reads no jump goes on from the plain guess
    places, state = own(mine.net), before.state_dict()
    if isinstance(mine.net, Experts) and not isinstance(theirs.net, Experts):  # one network becomes all of them
        state = {f"experts.{k}.{name}": v for k in range(len(mine.net.experts)) for name, v in state.items()}
    fitting = {k: v for k, v in state.items() if k in places and places[k].shape == v.shape}
    if not fitting:
        raise Refused("the student to go on from has another network: none of its weights fits")
    mine.net.load_state_dict(fitting, strict=False)


def _inherit_adapters(fresh: Student, source: str) -> None:
    """A LoRA student goes on from what another one's LoRA file holds."""
    from ..interop.lora import restore
    from ..interop.plain import inner_network

    folder = File(source)
    restore(
        inner_network(inner_of(fresh.denoiser).net), folder / "student" if (folder / "student").is_dir() else folder
    )


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


def _begin(
    recipe: Recipe,
    run: File,
    resume: bool,
    device: str,
    watch: Watch | None,
    accept_licence: bool,
    chosen: str | None = None,
) -> tuple[Watch, Setting, Callable[[], None]]:
    """Ask for consent, clear away what a killed run left, load what the recipe names; what opens the run folder."""
    here = world()
    eyes = watch if watch is not None and here.first else Nobody()
    accepted = alone(lambda: consent(recipe, run, accept_licence, resume))
    alone(lambda: sweep(run))
    place = "cpu" if recipe.parallel.shard and here.size > 1 else device  # sharded, it may fit no device whole
    setting = prepare(recipe, run, place, eyes, resume)
    return eyes, setting, lambda: alone(lambda: _open_run(recipe, run, resume, device, accepted, chosen))


def unfinished(run: File) -> File:
    """The model folder of a run that was stopped, made from its newest whole checkpoint with the averaged weights.

    A finished run has one already. Refused where there is nothing to take. Going on with the run replaces it.
    """
    for name in ("student", "teacher"):
        if (run / name / "fewstep.json").is_file():
            return run / name
    recipe, setting, student, spent = _checkpointed(run)
    return _save(recipe, run, setting, student, spent, None, Nobody())


def _checkpointed(run: File) -> tuple[Recipe, Setting, Student, dict[str, Any]]:
    """A stopped run's recipe and setting, its student with the averaged weights, and what it cost so far."""
    place = newest(run / "checkpoints")
    found = None if place is None else load_state(place)
    if found is None or not (run / "recipe.toml").is_file():
        raise Refused(f"{run} holds neither a model nor a whole checkpoint with its recipe.toml")
    tensors, facts = found
    recipe = load_recipe(run / "recipe.toml")
    setting = prepare(recipe, run, "cpu", Nobody(), True)
    student = make_student(recipe.stage(facts["stage"]), setting.task, setting.raw, setting.shape)
    with torch.no_grad():
        for name, value in student.state_dict(keep_vars=True).items():
            kept = tensors.get(f"ema/{name}", tensors.get(f"method/student.{name}"))
            if kept is not None:  # what a student shares with its teacher is in no checkpoint
                value.copy_(kept)
    spent = {"steps": [facts["step"]], "seconds": facts["seconds"], "warnings": []}
    return recipe, setting, student.eval().requires_grad_(False), spent


def train(
    recipe: Recipe,
    run: File,
    *,
    resume: bool = False,
    device: str = "cpu",
    watch: Watch | None = None,
    accept_licence: bool = False,
) -> dict[str, Any]:
    """Train by a recipe and save the model into ``run``: ``teacher/`` or ``student/``. No evaluation.

    Refused where a teacher's licence forbids something and it was not accepted.
    """
    eyes, setting, open_run = _begin(recipe, run, resume, device, watch, accept_licence)
    student, facts = _learn(recipe, run, setting, resume, device, eyes, "train", open_run)
    folder = alone(lambda: _save(recipe, run, setting, student, facts, None, eyes))
    return {"model": str(folder), **{k: v for k, v in facts.items() if k != "warnings"}, "warnings": facts["warnings"]}


def distill(
    recipe: Recipe,
    run: File,
    *,
    resume: bool = False,
    device: str = "cpu",
    watch: Watch | None = None,
    accept_licence: bool = False,
    chosen: str | None = None,
) -> dict[str, Any]:
    """The main job: train, evaluate beside the teacher, save, report. Returns ``report.json``'s content.

    ``chosen`` is the line by which auto chose the recipe; the run's ``environment.json`` keeps it.

    Refused where a teacher's licence forbids something and it was not accepted.
    """
    eyes, setting, open_run = _begin(recipe, run, resume, device, watch, accept_licence, chosen)
    if chosen is not None:
        eyes.say(chosen)
    student, facts = _learn(recipe, run, setting, resume, device, eyes, "distill", open_run)
    if recipe.precision.dtype == "bfloat16":
        facts["drift"] = bits_of_run(student, setting.task, device)
        eyes.say(facts["drift"]["line"])
    report = None
    if recipe.evaluate.enabled and method_class(recipe.method.name).makes != "start":
        report = _evaluated(recipe, run, setting, student, facts, eyes)
    folder = alone(lambda: _save(recipe, run, setting, student, facts, report, eyes))
    if report is None:
        return {"model": str(folder), **facts}
    from ..evaluate import write_report

    alone(lambda: write_report(run))
    content: dict[str, Any] = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    return content


def taught_under(recipe: Recipe, task: Task) -> float:
    """The scale of guidance that went into the student: the last method's own, or its teacher's."""
    last = recipe.stage(len(recipe.stages))
    if method_class(last.method.name).guides:
        return float(method_options(last.method, last, task).guidance)
    return recipe.teacher.guidance if recipe.teacher else 1.0


def measured_teacher(recipe: Recipe, setting: Setting) -> Denoiser | None:
    """The teacher that a student is held to: guided as the recipe says, else as the last method guided it."""
    scale = taught_under(recipe, setting.task)
    if setting.raw is None or recipe.teacher is None or recipe.teacher.guidance != 1 or scale == 1:
        return setting.denoiser
    return Guided(setting.raw, scale, setting.teacher.null if setting.teacher is not None else None)


def _evaluated(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], watch: Watch
) -> Any:
    from ..evaluate import Protocol, evaluate
    from ..metrics.features import features_for

    task = setting.task
    if not task.has_data:
        return _without_reference(recipe, run, setting, student, facts, watch)
    pixels = task.pixels if isinstance(task, Encoded | Labelled) else task
    features = after_first(lambda: features_for(pixels, run / "cache"))
    if not recipe.evaluate.fresh and recipe.teacher is not None:
        source = recipe.teacher.source
        alone(lambda: _take_figures(source, run / "cache"))
    makes = method_class(recipe.method.name).makes
    teacher = student.denoiser if makes == "teacher" else measured_teacher(recipe, setting)
    report = evaluate(
        None if makes == "teacher" else student, teacher, task, Protocol(**recipe.evaluate.protocol), features,
        watch=watch, seed=recipe.seed, train=pixels.train, cache=run / "cache",
    )  # fmt: skip
    if world().first:
        report.save(run)
        write_text(run / "training.json", json.dumps(facts, indent=1))
    return report


def _without_reference(
    recipe: Recipe, run: File, setting: Setting, student: Student, facts: Mapping[str, Any], watch: Watch
) -> Any:
    """The report of a task that has conditions and no data: the student beside its teacher alone."""
    teacher = measured_teacher(recipe, setting)
    if teacher is None:
        raise Refused("without data a student is measured against its teacher, and this recipe names none")
    from ..evaluate import Protocol
    from ..evaluate.noref import evaluate_without_reference

    report = evaluate_without_reference(
        student, teacher, setting.task, Protocol(**recipe.evaluate.protocol), watch=watch, seed=recipe.seed,
        cache=run / "cache",
    )  # fmt: skip
    if world().first:
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
    if method_class(recipe.method.name).makes != "student":
        folder = run / "teacher"
        save_teacher(
            student.denoiser, folder, shape=setting.shape, name=name, method=recipe.method.name, task=recipe.task.name,
            classes=task.classes, joint=task.joint, value_range=task.value_range, training=training, table=rows,
            licence=recipe.licence or "unknown", recipe_sha256=recipe.sha256, seed=recipe.seed, overwrite=True,
        )  # fmt: skip
        return folder
    folder = run / "student"
    check = save_student(
        student, folder, method=recipe.stage(len(recipe.stages)).method.name, teacher=setting.teacher, name=name,
        task=recipe.task.name, classes=task.classes, value_range=task.value_range, training=training, table=rows,
        pictures=pictures, guidance=taught_under(recipe, task), licence=recipe.licence or None,
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
    noise = task.begin(Rng(seed, "sheet").normal((count, *student.shape)), cond).to(device)
    from ..cond import move

    return task.pictures(student.generate(noise, move(cond, device), Rng(seed, "sheet steps", device=device)).cpu())
