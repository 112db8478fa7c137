"""Regression on noise-image pairs: repeat in one step where a sampler took the same noise."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..denoiser import seen_on
from ..losses import distance
from ..method import Batch, Loss, Method, PairOptions
from ..part import Part
from ..path import Path, normal
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student


class RegressionOptions(Part):
    pairs: PairOptions = Field(PairOptions(), description="what is regressed on")
    distance: Literal["huber", "l2", "l1"] = Field(
        "huber", description="huber is of the whole sample, the others means"
    )
    huber_c: float = Field(0.24, ge=0, description="below this length of the whole image's error, quadratic")
    start: float | None = Field(None, gt=0, description="time of the single step; None: the path's end")
    guide: float = Field(
        0.0,
        ge=0,
        description="weight of the flow-guided distance: the teacher goes on from a point of the student's step",
    )
    guide_span: tuple[float, float] = Field(
        (0.2, 0.8), description="between which shares of the way, in straight time, that point lies"
    )
    guide_along: Literal["student", "teacher"] = Field("student", description="whose step leads to that point")


@method(
    "regression",
    Paper("2101.02388", "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", "KD"),
    tier="stable",
    level="small",
)
class Regression(Method):
    """``E d(student(noise), sampler(noise))`` over stored pairs.

    Noise and image are joined by the teacher's deterministic flow, so the map to learn is a function and
    the student keeps the teacher's diversity; what it cannot fit it blurs. With ``guide`` the teacher corrects the
    student's step on fresh noise as well (SlimFlow), which costs no pairs: it needs a teacher whose flow is straight.
    """

    Options = RegressionOptions
    needs_data = False

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        if self.options.guide > 0:
            low, high = self.options.guide_span
            if not 0 <= low <= high < 1:
                raise ValueError(f"guide_span wants 0 <= low <= high < 1, got {low} and {high}")
            if teacher is None:
                raise ValueError("flow guidance needs a teacher: give one, or leave out guide")
            self.teacher = seen_on(teacher, student.path)

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        if batch.target is None:
            raise ValueError("regression needs pairs: a batch with target")
        student, options = self.student, self.options
        x = student(student.start_scale * batch.noise, student.start, student.path.t_min, batch.cond)
        parts = {"pairs": distance(options.distance, x, batch.target, options.huber_c)}
        if options.guide > 0:
            parts["guide"] = self._guided(batch, rng)
        return Loss.mean(parts, {"guide": options.guide})

    def _guided(self, batch: Batch, rng: Source) -> Tensor:
        """``d(student(noise), teacher's guess at a point of the way)`` on fresh noise: [batch].

        The student's own straight step leads to that point; from there the teacher takes one step (SlimFlow,
        Section 3.2, in which images are ``z - u``). Nothing flows back through the point or the teacher.
        """
        student, options, path = self.student, self.options, self.student.path
        x_t = student.start_scale * normal(batch.noise, rng)
        guess: Tensor = student(x_t, student.start, path.t_min, batch.cond)
        with torch.no_grad():
            low, high = options.guide_span
            gone = low + (high - low) * uniform(x_t, rng).double()
            left = (1 - gone) * path.straight(student.start).to(gone)
            s = path.at_straight(left).to(x_t.dtype)
            own = options.guide_along == "student"
            end = guess.detach() if own else self.teacher(x_t, student.start, batch.cond, "x0")
            slope = path.convert(end, x_t, student.start, "x0", path.slope)
            target = self.teacher(path.move(x_t, slope, student.start, s), s, batch.cond, "x0")
        return distance(options.distance, guess, target, options.huber_c)

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return {"start": options.start}
