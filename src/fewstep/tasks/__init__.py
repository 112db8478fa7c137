"""Tasks: data, condition and rendering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import Refused
from ..registry import TASKS, nearest
from .base import Split, Task, epoch_rows

__all__ = ["Split", "Task", "epoch_rows", "task_named"]


def task_named(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task with this name, made with these options.

    >>> task_named("mixture", {"modes": 4}).shape
    (2,)

    Raises UnknownName with the nearest name for another task; Refused, in one line, for an option that
    the task does not have or a value that it cannot take.
    """
    kind = TASKS.get(name).thing
    try:
        chosen = kind.Options(**(options or {}))
    except ValidationError as error:
        raise Refused(f"task {name!r}: {_first(error, sorted(kind.Options.model_fields))}") from None
    made: Task = kind(chosen)
    return made


def _first(error: ValidationError, known: list[str]) -> str:
    """The first complaint of a validation, in one line."""
    found = error.errors()[0]
    where = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        return f"unknown option {where!r}: {nearest(where, known) if known else 'it has none'}"
    if found["type"] == "missing":
        return f"option {where!r} is required"
    return f"option {where!r}: {found['msg'].lower()}, got {found['input']!r}" if where else found["msg"]
