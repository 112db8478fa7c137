"""From a recipe to the objects that train: a method's class and options, a student, a game."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path as File
from types import ModuleType
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import nn

from ..adapters import adopt, attach, learn, share, shared, twin
from ..denoiser import Denoiser, Reframed, Wrapped, clock_of, inner_of
from ..errors import Refused
from ..method import Method
from ..nets import Experts, ExpertsConfig, Net, build, inherited, resized
from ..path import Path, Straight
from ..registry import METHODS
from ..student import Student
from ..tasks.base import Task
from .recipe import MethodSection, Recipe, complaint


def method_class(name: str) -> type[Method]:
    """A registered method, or ``FILE.py:CLASS`` of one's own.

    A file is code and is run: name only files that you trust. Raises UnknownName, with the nearest name,
    or Refused.
    """
    if ":" not in name:
        found: type[Method] = METHODS.get(name).thing
        return found
    place, _, wanted = name.rpartition(":")
    file = File(place)
    if file.suffix != ".py" or not file.is_file():
        raise Refused(f"no method at {name!r}: give FILE.py:CLASS, or one of {', '.join(e.name for e in METHODS)}")
    module = own_module(file)
    thing = getattr(module, wanted, None)
    if not (inspect.isclass(thing) and issubclass(thing, Method) and not inspect.isabstract(thing)):
        raise Refused(f"{file} has no method class {wanted!r}: a subclass of fewstep.method.Method with a loss")
    return thing


def own_module(file: File) -> ModuleType:
    """A file of one's own as a module. It is code and is run; Refused where it does not import."""
    spec = importlib.util.spec_from_file_location(f"fewstep_plugin_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise Refused(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Refused(f"{file} does not import: {type(error).__name__}: {error}") from error
    return module


def method_options(section: MethodSection, recipe: Recipe, task: Task) -> Any:
    """A method's options; what the task or the recipe already says need not be said again."""
    kind = method_class(section.name).Options
    known: dict[str, Any] = {"data_std": task.data_std, "horizon": recipe.steps}
    if task.joint is not None:
        known["picture"] = task.joint.picture
    given = {k: v for k, v in known.items() if k in kind.model_fields} | dict(section.options)
    if recipe.parallel.shard:
        _by_difference(given, kind)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Refused(f"method {section.name!r}: {complaint(error, kind)}") from None


def _by_difference(given: dict[str, Any], kind: Any) -> None:
    """Take differences for derivatives: a sharded network has neither forward-mode nor second ones."""
    gan = given.get("gan")
    for options, name, place in ((given, "derivative", "derivative"), (gan, "r1_kind", "gan.r1_kind")):
        if not isinstance(options, dict) or (options is given and name not in kind.model_fields):
            continue
        if options.get(name) == "exact":
            raise Refused(f"method.options.{place} = 'exact' does not go with parallel.shard: take 'difference'")
        if options is given:
            given[name] = "difference"
        else:
            given["gan"] = {**options, name: "difference"}


def make_student(recipe: Recipe, task: Task, teacher: Denoiser | None, shape: tuple[int, ...]) -> Student:
    """The student that a recipe describes: a network of its own, a copy of the teacher, or adapters on its weights."""
    section, cls = recipe.student, method_class(recipe.method.name)
    denoiser: Denoiser
    options = method_options(recipe.method, recipe, task)
    if section.lora is not None and section.net is not None:
        raise Refused("student.lora is trained on the teacher's network: leave out student.net, or student.lora")
    if section.size != 1 and (section.net is not None or section.lora is not None):
        raise Refused("student.size is of a copy of the teacher: leave it out, or student.net and student.lora")
    if section.net is not None:
        denoiser = _own(recipe, task, teacher, cls)
    elif isinstance(inner_of(teacher), Wrapped):
        original = cast(Denoiser, teacher)
        denoiser = copy.deepcopy(original) if section.lora is None else share(original)
        if section.size != 1:
            _shrink(denoiser, section.size)
    else:
        raise Refused(f"method {cls.name!r} needs a network to train: give [student] net = {{ kind = ... }}")
    if cls.flow_map:
        denoiser = _reading_spans(denoiser)
    if cls.straight:
        denoiser = straightened(denoiser)
    edges = cls.handovers(options, denoiser.path)
    if edges:
        denoiser = divided(denoiser, edges)
    if section.lora is not None:
        try:
            attach(denoiser, section.lora)
        except ValueError as error:
            raise Refused(f"student.lora: {error}") from None
    fields: dict[str, Any] = dict(cls.student_options(options, denoiser.path))
    if section.start is not None:
        fields["start"] = section.start
    if section.policy is not None:
        fields["policy"] = section.policy
    if section.steps is not None:
        start = fields.get("start") or denoiser.path.t_max
        fields["start"], fields["steps"] = start, {n: even_times(denoiser.path, n, start) for n in section.steps}
    learn(denoiser).train()
    return Student(denoiser, shape, classes=task.classes, **fields)


def even_times(path: Path, count: int, start: float) -> tuple[float, ...]:
    """``count`` times from ``start`` down, even on the rho = 7 grid."""
    from ..path import karras_time

    parts = torch.linspace(1, 0, count + 1, dtype=torch.float64)[:-1]
    return (start, *karras_time(path, parts, high=start)[1:].tolist())


def _own(recipe: Recipe, task: Task, teacher: Denoiser | None, cls: type[Method]) -> Denoiser:
    section = recipe.student
    classes = task.classes if task.joint is None else None  # a label in the sample is not told besides
    description = {"shape": task.shape, "classes": classes, **(section.net or {})}
    if cls.flow_map:
        description["reads_s"] = True
    try:
        net = build(description)
    except ValidationError as error:
        kind = next((k for k in Net.__subclasses__() if k.__name__.lower() == str(description.get("kind"))), None)
        model = inspect.get_annotations(kind.__init__, eval_str=True)["config"] if kind else type(recipe.student)
        raise Refused(f"student.net: {complaint(error, model)}") from None
    except (ValueError, RuntimeError, OverflowError) as error:  # too large for anything
        raise Refused(f"student.net: {str(error).splitlines()[0][:200]}") from None
    path = section.path or (teacher.path if teacher is not None else Straight())
    try:
        return Wrapped(
            net,
            path,
            section.prediction or "x0",
            section.clock or "999t",
            scale_input=bool(section.scale_input),
            data_std=section.data_std or task.data_std,
            boundary=0.002 if section.boundary is None else section.boundary,
        )
    except ValueError as error:
        raise Refused(f"student: {error}") from None


def _shrink(denoiser: Denoiser, size: float) -> None:
    """Put a smaller network of the same kind in the place of a denoiser's, in place."""
    wrapped = inner_of(denoiser)
    whole = wrapped.net
    if not isinstance(whole, Net):
        raise Refused(
            f"student.size chooses widths and depths of this package's networks, and {type(whole).__name__} is none: "
            "give [student] net = { kind = ... }"
        )
    try:
        small = build(resized(whole.config, size))
    except ValueError as error:
        raise Refused(f"student.size: {error}") from None
    inherited(small, whole)
    wrapped.net = small.to(next(whole.parameters()).device)


def straightened(denoiser: Denoiser) -> Denoiser:
    """The denoiser on the straight path, cut where its own path's noise ends."""
    if isinstance(denoiser.path, Straight):
        return denoiser
    return Reframed(denoiser, Straight(end=float(denoiser.path.straight(denoiser.path.t_max))))


def divided(denoiser: Denoiser, edges: Sequence[float]) -> Denoiser:
    """The same denoiser with a network of its own between each two of the falling times ``edges``; all start alike."""
    wrapped = inner_of(denoiser)
    net = wrapped.net
    if not isinstance(net, Net):
        raise Refused(
            f"this method trains {len(edges) + 1} networks, and a pipeline holds one {type(net).__name__}: "
            "take a teacher whose network is one of fewstep.nets, or tdm, which trains one for all steps"
        )
    at = clock_of(wrapped.clock, wrapped.path, torch.tensor(edges, dtype=torch.float64))
    config = ExpertsConfig(net=net.config, edges=tuple(at.tolist()))  # type: ignore[arg-type]
    wrapped.net = Experts(config, [net, *(twin(net) for _ in edges)])
    return denoiser


def _reading_spans(denoiser: Denoiser) -> Denoiser:
    """The same denoiser with a network that also reads the jump, and at first does not use it."""
    wrapped = inner_of(denoiser)
    net: nn.Module = wrapped.net
    if getattr(net, "reads_s", False):
        return denoiser
    if not isinstance(net, Net) or "reads_s" not in type(net.config).model_fields:
        raise Refused(
            f"this method needs a network that reads the jump, and {type(net).__name__} has no place for it: "
            "give [student] net = { kind = ... }"
        )
    wider = build(net.config.model_copy(update={"reads_s": True}))
    wider.load_state_dict(net.state_dict(), strict=False)
    if shared(net):
        adopt(wider, net)
    wrapped.net = wider
    return denoiser
