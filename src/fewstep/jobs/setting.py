"""What a recipe names, in memory: its task, its teacher, its method with the players."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from ..denoiser import Denoiser, Guided, Reframed
from ..errors import Refused
from ..method import Method
from ..student import Student
from ..tasks import task_named
from ..tasks.base import Task
from ..tasks.encoded import Encoded
from ..tasks.prompts import Prompts
from ..train.build import method_class, method_options, straightened
from ..train.recipe import Recipe, load_recipe
from ..train.trainer import Watch


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
    if isinstance(task, Prompts):
        task = _asked(task, teacher, recipe, watch)
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
                    f"teacher {teacher.name} makes {size_text(teacher.shape)}, the data is {size_text(task.shape)}: "
                    "set task.options size and channels to match"
                )
            task = Encoded(task, teacher.shape, teacher.encode, teacher.decode)
    denoiser = raw
    if raw is not None and section is not None and section.guidance != 1:
        denoiser = Guided(raw, section.guidance, teacher.null if teacher is not None else None)
    if raw is not None:
        raw.to(device)
    return Setting(task, teacher, denoiser, raw, task.shape)


def _asked(task: Prompts, teacher: Any, recipe: Recipe, watch: Watch) -> Prompts:
    """Prompts with the teacher's conditions; Refused where the teacher takes none, or a method needs data."""
    if teacher is None or teacher.recording is None:
        raise Refused("prompts need a teacher that is a pipeline with a text encoder: name its folder")
    watch.start("prompts", len(task.prompts))
    task = task.asked(teacher.embed, teacher.shape, teacher.decode)
    watch.finish("prompts")
    for index in range(len(recipe.stages) + 1):
        part = recipe.stage(index)
        cls = method_class(part.method.name)
        options = method_options(part.method, part, task)
        if cls.reads_data(options):
            raise Refused(
                f"method {part.method.name!r} learns from data under these options, and prompts are none: "
                "take dmd2 without gan or regression, or give --data"
            )
        guides = options.guidance if cls.guides else recipe.teacher.guidance if recipe.teacher else 1.0
        if teacher.guidance is not None and guides == 1 and teacher.guidance != 1:
            where = "method.options.guidance" if cls.guides else "teacher.guidance"
            watch.say(
                f"{teacher.kind} guides by {teacher.guidance:.3g} when it is used, this recipe does not: "
                f"{where}={teacher.guidance:.3g} would"
            )
    for note in teacher.recording.notes:
        watch.say(note)
    return task


def _teacher(source: str, recipe: Recipe, run: File, device: str, watch: Watch, resume: bool) -> Any:
    from ..interop import load_teacher

    if source.startswith("recipe:"):
        from .training import train

        nested = load_recipe(source.removeprefix("recipe:"), [f"seed={recipe.seed}"])
        if nested.task.name == recipe.task.name:
            nested = nested.model_copy(update={"task": recipe.task})
        place = run / "teacher_run"
        if not (place / "teacher").is_dir():
            watch.say(f"teaching first: {nested.name}")
            train(nested, place, resume=resume and place.exists(), device=device, watch=watch)
        return load_teacher(place / "teacher")
    folder = File(source)
    inside = folder / "teacher" if (folder / "teacher" / "fewstep.json").is_file() else source
    return load_teacher(inside, call=recipe.teacher.call if recipe.teacher is not None else None)


def _picture_side(teacher: Any) -> tuple[int, int]:
    """Channels and side of a teacher's pictures, after its autoencoder."""
    vae = getattr(teacher.pipeline, "vae", None)
    if vae is None:
        return teacher.shape[0], teacher.shape[-1]
    return vae.config.out_channels, teacher.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)


def size_text(shape: Sequence[int]) -> str:
    """A shape as people write it: 1x8x8."""
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
