"""A commented recipe to start from: every option of a method with its default and what it does."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from .registry import METHODS
from .train.recipe import Recipe, shipped

START: dict[str, Any] = {"steps": 4000, "batch": 128, "task": {"name": "digits"}, "teacher": {"source": "digits"}}
NO_TEACHER: dict[str, Any] = {
    "steps": 2000,
    "batch": 128,
    "task": {"name": "mixture"},
    "student": {"net": {"kind": "mlp"}},
}


def recipe_text(method: str) -> str:
    """The recipe that ships for a method, or a plain one, written out with every option and its description.

    Raises UnknownName, with the nearest name, for another method.
    """
    entry = METHODS.get(method)
    tables = [tomllib.loads(file.read_text(encoding="utf-8")) for file in shipped().values()]
    near = next((table for table in tables if table.get("method", {}).get("name") == method), None)
    base = near or (START if entry.thing.needs_teacher else NO_TEACHER)
    given = {key: value for key, value in base.items() if key not in ("papers", "expect", "name", "method")}
    chosen = base.get("method", {}).get("options", {})
    lines = [f"# {entry.summary}", *(f"# {paper.title}, arXiv:{paper.arxiv}" for paper in entry.papers)]
    lines += [f"# fewstep distill {method}.toml optim.lr=1e-3", ""]
    later = []
    for name, field in Recipe.model_fields.items():
        if name in ("name", "papers", "expect"):
            continue
        kind = _part(field.annotation)
        if name == "method":
            later += [
                "",
                "[method]",
                f'name = "{method}"',
                "",
                "[method.options]",
                *_fields(entry.thing.Options, chosen),
            ]
        elif name == "stages":
            later += _stages(given.get(name, ()))
        elif kind is None:
            lines += _line(name, given.get(name, field.default), field.description)
        elif name in given or field.default is not None:
            later += ["", f"[{name}]  # {(kind.__doc__ or '').split(chr(10))[0]}", *_fields(kind, given.get(name, {}))]
    return "\n".join([*lines, *later]) + "\n"


def _part(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _fields(kind: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        lines += _line(name, given.get(name, default), field.description)
    return lines


def _line(name: str, value: Any, about: str | None) -> list[str]:
    """``name = value  # about``; a value that TOML cannot say stays a comment."""
    note = f"  # {about}" if about else ""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if value is None or value is PydanticUndefined:
        return [f"# {name} ={note}"]
    return [f"{name} = {_toml(value)}{note}"]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return tomlkit.item(value).as_string()


def _stages(stages: Any) -> list[str]:
    lines = []
    for stage in stages:
        lines += ["", "[[stages]]", *(f"{key} = {_toml(value)}" for key, value in stage.items())]
    return lines


def recipe_for_folder(folder: Path, data: Path | None, method: str, prompts: Path | None = None) -> dict[str, Any]:
    """The recipe, as plain data, that distils a diffusers folder on a folder of images, or on prompts alone.

    The student is a copy of the teacher, so it learns slowly: a tenth of the rate of a new network.
    """
    task = {"name": "images", "options": {"path": str(data)}}
    if prompts is not None:
        task = {"name": "prompts", "options": {"path": str(prompts)}}
    return {
        "name": folder.resolve().name,
        "steps": 4000,
        "batch": 64 if prompts is None else 8,
        "task": task,
        "teacher": {"source": str(folder)},
        "method": {"name": method},
        "optim": {"lr": 1e-4 if prompts is None else 1e-5},
    }
