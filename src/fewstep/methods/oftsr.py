"""OFTSR: one call from the start of a flow, and a knob in it between the mean answer and a sharp one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..cond import Cond
from ..losses import distance, squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import Path, column
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student


class OFTSROptions(Part):
    further: float = Field(0.05, gt=0, lt=1, description="how much further than the student's jump the teacher goes on")
    low: float = Field(0.01, gt=0, lt=1, description="shortest jump, as a share of the way, that is taught")
    high: float = Field(0.99, gt=0, le=1, description="longest one")
    align: float = Field(
        0.01, ge=0, description="weight of the pull towards the teacher's velocity where the jump ends"
    )
    boundary: float = Field(0.1, ge=0, description="weight of the teacher's own velocity at a jump of no length")
    distance: Literal["l2", "l1"] = Field("l2", description="of the jumps' average velocities")
    start: float | None = Field(None, gt=0, le=1, description="time of the single step; None: the path's end")

    @model_validator(mode="after")
    def _fits(self) -> OFTSROptions:
        if self.low > self.high:
            raise ValueError(f"the shortest jump, low = {self.low:g}, is longer than the longest, high = {self.high:g}")
        return self


@method(
    "oftsr",
    Paper(
        "2412.09465",
        "OFTSR: One-Step Flow for Image Super-Resolution with Tunable Fidelity-Realism Trade-offs",
        "OFTSR",
    ),
    level="exact",
)
class OFTSR(Method):
    """The average velocity from a flow's start over jumps of all lengths, each taught by one that is a little shorter.

    With u the share of the way that is gone (the paper's time, 0 at the start x), and v(x, u) the average over it:

        x_u    = x + u v(x, u)                                           stopped
        target = (x_u + du v_teacher(x_u, u) - x) / (u + du)             v_teacher by a midpoint step
        loss   = ||v(x, u + du) - target||^2  +  align ||(1 - u)(v(x, u) - v_teacher(x_u, u))||^2
                 + boundary ||v(x, 0) - v_teacher(x, 0)||^2

    ``traded`` is the student's one answer ``x + v(x, u)``: at u = 0 the teacher's mean, at u = 1 where its flow ends.
    The start is the batch's noise: for restoration a task gives ``sqrt(1 - s^2) x_low + s eps`` there.
    """

    Options = OFTSROptions
    straight = True
    flow_map = True
    needs_data = False

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        options, student, start = self.options, self.student, self.student.start
        x = student.start_scale * batch.noise
        gone = options.low + (options.high - options.low) * uniform(x, rng)
        more = torch.minimum(gone + options.further, torch.ones_like(gone))
        here, there = start * (1 - gone), start * (1 - more)  # times on the path, which falls from the start
        v = student(x, start, here, batch.cond, "average_velocity")
        with torch.no_grad():
            x_u = x - column(start - here, x) * v
            slope = self.teacher(x_u, here, batch.cond, "flow")
            middle = self.teacher(x_u - column((here - there) / 2, x) * slope, (here + there) / 2, batch.cond, "flow")
            target = (x - x_u + column(here - there, x) * middle) / column(start - there, x)
        parts = {"jump": distance(options.distance, student(x, start, there, batch.cond, "average_velocity"), target)}
        if options.align > 0:
            parts["align"] = squared_error(column(1 - gone, x) * v, column(1 - gone, x) * slope)
        if options.boundary > 0:
            with torch.no_grad():
                first = self.teacher(x, start, batch.cond, "flow")
            own = student(x, start, start, batch.cond, "average_velocity")
            parts["boundary"] = distance(options.distance, own, first)
        return Loss.mean(parts, {"align": options.align, "boundary": options.boundary})

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return {"start": options.start}


def traded(student: Student, noise: Tensor, share: float, cond: Cond = None) -> Tensor:
    """One call of a student of ``oftsr``: 0 for the mean answer (least error), 1 for the flow's end (most realism).

    ``share`` in [0, 1] is how much of the way the average velocity is of; the jump is always the whole one.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the trade-off is a share in [0, 1], got {share:g}")
    x = student.start_scale * noise
    answer: Tensor = student(x, student.start, student.start * (1 - share), cond, "x0")
    return answer
