"""Whether 16 bits are enough for a model that is there, or for one that was just trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path as File
from typing import Any

import torch

from ..cond import Cond, move
from ..student import Student
from ..tasks.base import Task


def bits(model: str, *, device: str = "cpu", count: int = 256) -> dict[str, Any]:
    """The drift of a student folder, a run or a teacher in bfloat16, with the line that says what it means."""
    from ..evaluate.drift import drift
    from ..interop import load_student, load_teacher

    folder = File(model)
    folder = next((folder / part for part in ("student", "teacher") if (folder / part).is_dir()), folder)
    loaded: Any = (
        load_student(folder) if _is_student(folder) else load_teacher(str(folder) if folder.is_dir() else model)
    )
    one = loaded.student if _is_student(folder) else loaded.denoiser
    classes = one.classes if isinstance(one, Student) else loaded.classes
    shape = one.shape if isinstance(one, Student) else loaded.shape
    labels = None if not classes else (lambda rows: (torch.arange(rows) % classes).to(device))
    found = drift(one.to(device), shape, labels, count=count)
    return {**asdict(found), "enough": found.enough, "line": found.line()}


def _is_student(folder: File) -> bool:
    from ..interop import CONTRACT, Contract

    return (folder / CONTRACT).is_file() and Contract.load(folder).role == "student"


def bits_of_run(student: Student, task: Task, device: str) -> dict[str, Any]:
    """The drift of a student that was just trained, on conditions of its training data."""
    from ..evaluate.drift import drift

    def cond(rows: int) -> Cond:
        return move(task.train.rows(torch.arange(rows) % len(task.train)).cond, device)

    found = drift(student, student.shape, cond)
    return {**asdict(found), "enough": found.enough, "line": found.line()}
