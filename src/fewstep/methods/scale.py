"""YONOS-SR's scale distillation: who sees a better picture teaches who sees a worse one, at the same noisy sample."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from ..cond import Cond, part_of
from ..denoiser import seen_on
from ..grid import even_steps
from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import NoiseSampler, Path
from ..registry import Paper, method
from ..rng import Source
from ..student import Student
from .denoising import Weight, level_weight


class ScaleOptions(Part):
    reads: str = Field("low", description="part of the condition that the student learns from")
    better: str | None = Field(
        None, description="part that the teacher is shown in its place; None: the clean sample teaches"
    )
    place: str = Field("low", description="the name under which both networks read what they are shown")
    levels: NoiseSampler = Field(NoiseSampler(kind="uniform", low=0.001), description="noise levels")
    weight: Weight = Field("none", description="of the squared error in the clean sample")
    data_std: float = Field(1.0, gt=0, description="spread of the data, for the weight")
    steps: tuple[int, ...] = Field((1,), description="step counts that the student serves")
    start: float | None = Field(None, gt=0, description="time of the first step; None: the path's end")


@method(
    "scale",
    Paper(
        "2401.17258",
        "You Only Need One Step: Fast Super-Resolution with Stable Diffusion via Scale Distillation",
        "YONOS-SR",
    ),
    level="exact",
)
class Scale(Method):
    """``E w(t) ||D(x_t, t, y_worse) - D_teacher(x_t, t, y_better)||^2``, both of one picture at one noisy sample.

    Where y_worse is made from y_better and from nothing else of the picture, the teacher's guess is an unbiased target
    of the student's and spreads less than the clean sample does: at rest the student is the denoiser of the worse
    condition. The first teacher is the clean sample; every later one the student of the scale before.
    """

    Options = ScaleOptions
    needs_teacher = False

    def __init__(self, teacher: Any, student: Student, options: ScaleOptions | None = None) -> None:
        super().__init__(seen_on(teacher, student.path), student, options)
        if self.options.better is not None and teacher is None:
            raise ValueError(
                f"better = {self.options.better!r} is shown to a teacher, and there is none: name one, take it from "
                'the stage before (teacher = "previous"), or leave out better'
            )

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options, x0 = self.student.path, self.options, batch.data
        t = options.levels.on(path)(x0, rng)
        x_t = path.corrupt(x0, t, batch.noise)
        target = x0
        if options.better is not None:
            with torch.no_grad():
                target = self.teacher(x_t, t, self._shown(batch.cond, options.better), "x0")
        guess = self.student(x_t, t, path.t_min, self._shown(batch.cond, options.reads), "x0")
        weight = level_weight(options.weight, path, t, options.data_std)
        return Loss.mean({"scale": weight * squared_error(guess, target)})

    def _shown(self, cond: Cond, name: str) -> Cond:
        """The condition with one of its parts in the place that networks read."""
        if isinstance(cond, dict):
            return {**cond, self.options.place: part_of(cond, name)}
        if name != self.options.place:
            part_of(cond, name)  # Refused: it has no parts
        return cond

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return even_steps(path, options.start, options.steps)
