"""What a recipe names, in memory: its task, its teacher, its method with the players."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any

from ..adapters import twin
from ..denoiser import Denoiser, Guided, Reframed
from ..errors import Refused
from ..method import Method
from ..student import Student, frozen
from ..tasks import task_named
from ..tasks.base import Picked, Task
from ..tasks.encoded import Encoded
from ..tasks.images import Images
from ..tasks.prompts import Prompts
from ..tasks.shards import Shards, cache_folder, encoder_hash
from ..train.build import method_class, method_options, straightened
from ..train.processes import alone
from ..train.recipe import Recipe, TeacherSection, load_recipe
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
    if section is not None and section.source == "law" and section.lora is not None:
        raise Refused("teacher.lora changes the weights of a network, and an exact law has none")
    if section is not None and section.source != "law":
        teacher = _teacher(section, recipe, run, device, watch, resume)
        if recipe.task.name == "images":
            side = _picture_side(teacher)
            options.setdefault("size", side[1])
            if side[0] in (1, 3):
                options.setdefault("channels", side[0])
    task = task_named(recipe.task.name, options)
    _paired(recipe, task)
    if isinstance(task, Images) and task.train.captions is not None and _readers(teacher):
        _read_captions(task, teacher, watch)
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
            encoder = encoder_hash(teacher.kind, teacher.pipeline.vae)
            task = Encoded(
                task, teacher.shape, teacher.encode, teacher.decode, encoder=encoder, cache=cache_folder()
            )  # fmt: skip
            _fill("latents", task.latents, watch)
    denoiser = raw
    if raw is not None and section is not None and section.guidance != 1:
        denoiser = Guided(raw, section.guidance, teacher.null if teacher is not None else None)
    if raw is not None:
        raw.to(device)
    found = task.summary()
    if found is not None:
        watch.say(found)
    return Setting(task, teacher, denoiser, raw, task.shape)


def _paired(recipe: Recipe, task: Task) -> None:
    """Refuse a method that learns labelled pairs without them, and pairs to a method that would spoil their labels."""
    for index in range(len(recipe.stages) + 1):
        name = recipe.stage(index).method.name
        if method_class(name).joint and task.joint is None:
            raise Refused(
                f"method {name!r} learns samples with their labels: take task 'labelled' of {recipe.task.name!r}"
            )
        if task.joint is not None and not method_class(name).joint:
            raise Refused(
                f"task {recipe.task.name!r} holds labels in its samples, which method {name!r} would take for noise: "
                "use symmflow, or the task that it is of"
            )


def _readers(teacher: Any) -> list[Any]:
    """What a pipeline reads text with; nothing for a teacher that takes none."""
    parts = {} if teacher is None or teacher.pipeline is None else teacher.pipeline.components
    text = ("text_encoder", "tokenizer")
    return [part for name, part in sorted(parts.items()) if name.startswith(text) and part is not None]


def _read_captions(task: Images, teacher: Any, watch: Watch) -> None:
    """Captions, through the teacher's text encoders, are the condition; each is read once."""
    task.use_captions(teacher.embed, encoder_hash(teacher.kind, *_readers(teacher)), cache_folder())
    for split in (task.train, task.test):
        if isinstance(split.held_cond, Picked) and isinstance(split.held_cond.source, Shards):
            _fill("captions", split.held_cond.source, watch)


def _fill(label: str, shards: Shards, watch: Watch) -> None:
    watch.start(label, len(shards))
    shards.fill(lambda done: watch.advance(label, done))
    watch.finish(label)


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


def _teacher(section: TeacherSection, recipe: Recipe, run: File, device: str, watch: Watch, resume: bool) -> Any:
    from ..interop import load_teacher

    source, lora, strength = section.source, section.lora, section.lora_strength
    if source.startswith("recipe:"):
        from .training import train

        _ends(source)
        nested = load_recipe(source.removeprefix("recipe:"), [f"seed={recipe.seed}"])
        if nested.task.name == recipe.task.name:
            nested = nested.model_copy(update={"task": recipe.task})
        place = run / "teacher_run"
        if not alone((place / "teacher").is_dir):
            watch.say(f"teaching first: {nested.name}")
            train(nested, place, resume=resume and place.exists(), device=device, watch=watch)
        return load_teacher(place / "teacher", lora=lora, strength=strength)
    folder = File(source)
    inside = folder / "teacher" if (folder / "teacher" / "fewstep.json").is_file() else source
    return load_teacher(inside, call=section.call or None, lora=lora, strength=strength)


def _ends(source: str) -> None:
    """Refuse recipes that teach each other in a circle."""
    seen: list[str] = []
    while source.startswith("recipe:"):
        if source in seen:
            raise Refused(f"{source.removeprefix('recipe:')} teaches itself: name a teacher that is there already")
        seen.append(source)
        section = load_recipe(source.removeprefix("recipe:")).teacher
        source = section.source if section is not None else ""


def _picture_side(teacher: Any) -> tuple[int, int]:
    """Channels and side of a teacher's pictures, after its autoencoder."""
    vae = getattr(teacher.pipeline, "vae", None)
    if vae is None:
        return teacher.shape[0], teacher.shape[-1]
    return vae.config.out_channels, teacher.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)


def size_text(shape: Sequence[int]) -> str:
    """A shape as people write it: 1x8x8."""
    return "x".join(map(str, shape))


def taught_by(student: Student, setting: Setting) -> Setting:
    """The setting of a stage whose teacher is the student so far: what its own teacher was guided by is in it."""
    denoiser = frozen(twin(student.denoiser))
    return replace(setting, teacher=None, denoiser=denoiser, raw=denoiser)


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
