"""How well a network that moves pictures and labels reads the labels of unseen pictures."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..joint import Joint, nearest
from ..metrics.base import mean_score
from ..rng import Rng
from ..student import Student
from .rows import Reading

if TYPE_CHECKING:
    from ..tasks import Split, Task

WAYS: tuple[tuple[int, int], ...] = ((1, 1), (1, 4), (8, 4))
"""(Euler steps up in time, label noises averaged) that a reading is reported for."""
BATCH = 256


def readings(
    denoiser: Denoiser, task: Task, pictures: Tensor, truth: Tensor, seed: int
) -> tuple[tuple[Reading, ...], Tensor]:
    """Every way of ``WAYS``, and what the one of one step and most noises read: labels [n], or masks [n, ...].

    ``pictures`` are those of ``truth``, labels or masks; neither was learned from.
    """
    joint = task.joint
    if joint is None:
        raise ValueError(f"task {task.name!r} holds no labels in its samples: nothing can be read")
    student = Student(denoiser, task.shape)
    found: list[Reading] = []
    shown = truth
    for steps, draws in WAYS:
        told = told_by(student, joint, pictures, steps, draws, seed)
        found.append(reading_of(told, truth, joint, steps, draws, seed))
        if steps == 1:
            shown = told
    return tuple(found), shown


def told_by(student: Student, joint: Joint, pictures: Tensor, steps: int, draws: int, seed: int) -> Tensor:
    """The labels that are read, each picture under label noises of its own."""
    from ..methods.symmflow import read

    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    parts = []
    for k, part in enumerate(pictures.split(BATCH)):
        rng = Rng(seed, "read", k, device=device)
        chart = read(student, part.to(device), joint.channels, rng, steps, draws)
        parts.append(nearest(chart.float().cpu(), joint.book, joint.places))
    return torch.cat(parts)


def reading_of(told: Tensor, truth: Tensor, joint: Joint, steps: int, draws: int, seed: int) -> Reading:
    """The figures of what was read against what is true, with their bootstrap errors over pictures."""
    right = (told == truth).flatten(1).double().mean(1) if joint.places else (told == truth)
    score = mean_score(right, Rng(seed, "bootstrap", "read"))
    overlap, error = iou(told, truth, joint.classes, seed) if joint.places else (None, None)
    return Reading(
        what="masks" if joint.places else "labels", steps=steps, draws=draws, calls=steps * draws,
        accuracy=score.value, accuracy_spread=score.spread, iou=overlap, iou_spread=error, count=len(truth),
    )  # fmt: skip


def iou(told: Tensor, truth: Tensor, classes: int, seed: int = 0) -> tuple[float, float]:
    """Intersection over union of masks [n, ...], over all places of all pictures; its bootstrap error over pictures.

    The mean over classes that are in the truth; label 0 is the ground and does not count.

    >>> iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), 2)[0]
    0.6666666666666666
    """
    told, truth = told.flatten(1), truth.flatten(1)
    here = [c for c in range(1, classes) if bool((truth == c).any())]
    both = torch.stack([((told == c) & (truth == c)).sum(1) for c in here], 1).double()
    some = torch.stack([((told == c) | (truth == c)).sum(1) for c in here], 1).double()
    pick = torch.randint(len(truth), (200, len(truth)), generator=Rng(seed, "bootstrap", "iou").generator)
    again = [float((both[p].sum(0) / some[p].sum(0).clamp(min=1)).mean()) for p in pick]
    return float((both.sum(0) / some.sum(0)).mean()), statistics.pstdev(again)


def shown_reading(task: Task, split: Split, told: Tensor) -> tuple[Tensor, str, int] | None:
    """What was read, as a sheet uint8 [n, h, w, 1 or 3]: (pictures, what they are, columns); None without pictures.

    Labels: pictures under the label that was read, a column for each of up to ten. Masks: pictures, what was read, and
    what is true, a line each.
    """
    joint, pictures, truth = task.joint, split.data, split.cond
    first = task.pictures(pictures[:1])
    if joint is None or first is None or not isinstance(truth, Tensor):
        return None
    if joint.places:
        count = min(12, len(pictures))
        lines = [task.pictures(pictures[:count])]
        for mask in (told[:count], truth[:count]):
            grey = (mask.float() / (joint.classes - 1) * 255).round().to(torch.uint8)
            lines.append(grey[..., None].expand(-1, -1, -1, first.shape[3]))
        return torch.cat([line for line in lines if line is not None]), "Pictures, masks read, true masks", count
    columns = min(joint.classes, 10)
    depth = 6
    sheet = torch.full((depth, columns, *first.shape[1:]), 255, dtype=torch.uint8)
    for label in range(columns):
        rows = (told == label).nonzero().flatten()[:depth]
        if len(rows):
            drawn = task.pictures(pictures[rows])
            assert drawn is not None
            sheet[: len(rows), label] = drawn
    return sheet.flatten(0, 1), "Unseen pictures, a column for each label that was read", columns
