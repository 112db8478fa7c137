"""MeanFlow: learn the average velocity over a jump from its own total derivative."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..cond import Cond, rows
from ..derivative import Derivative, along_flow
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import NoiseSampler, Path, Straight, column
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student


class MeanFlowOptions(Part):
    velocity: Literal["teacher", "data"] = Field(
        "teacher", description="whose velocity: the teacher's, where there is one, or each pair's own eps - x0"
    )
    levels: NoiseSampler = Field(NoiseSampler(kind="logit_normal", mean=-0.4, std=1.0), description="of t and s")
    jumps: float = Field(0.5, ge=0, le=1, description="share of rows with s < t; the others learn the velocity")
    power: float = Field(0.75, ge=0, description="adaptive weight 1 / (||error||^2 + c)^power; 0: plain squares")
    c: float = Field(0.01, gt=0, description="added to the squared error in the adaptive weight")
    derivative: Derivative = Field(
        "exact", description="forward-mode derivative, or a central difference where attention has none"
    )
    step: float = Field(5e-3, gt=0, description="of the central difference, in time")
    start: float | None = Field(None, gt=0, le=1, description="time of the single step; None: the path's end")


@method(
    "meanflow",
    Paper("2505.13447", "Mean Flows for One-step Generative Modeling", "MeanFlow"),
    level="exact",
)
class MeanFlow(Method):
    """``||u(x_t, t, s) - stopped(v - (t - s) du/dt)||^2`` with ``du/dt`` along the flow: (v, 1, 0).

    u is the average velocity over [s, t]; the identity is (t - s) u = integral of v, differentiated in t
    (Geng et al. 2025, eqs. 4-6; their r is s here). v is ``eps - x0`` of the pair, or the teacher's velocity
    (option ``velocity``). Needs a straight path (wrap other denoisers in Reframed) and a network that
    reads the jump (``reads_s``). The derivative is taken on the rows with s < t alone, and goes through the
    network's clock: one that runs fast (``1000t``, ``250 log_sigma``) makes it as large as its rate, and a student
    that starts from nothing hardly learns; give it ``t``.
    """

    Options = MeanFlowOptions
    needs_teacher = False
    straight = True
    flow_map = True

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        if not isinstance(student.path, Straight):
            raise ValueError(
                f"meanflow needs the straight path, got {type(student.path).__name__}: wrap it in Reframed"
            )

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options, x0 = self.student.path, self.options, batch.data
        draw = options.levels.on(path)
        first, second = draw(x0, rng), draw(x0, rng)
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        jump = uniform(x0, rng) < options.jumps
        s = torch.where(jump, s, t)
        x_t = path.corrupt(x0, t, batch.noise)
        with torch.no_grad():
            own = self.teacher is None or options.velocity == "data"
            v = batch.noise - x0 if own else self.teacher(x_t, t, batch.cond, "flow")
        guess = self.student(x_t, t, s, batch.cond, "average_velocity")
        target = v.clone()
        index = jump.nonzero().squeeze(1)  # one sync a step: the derivative is paid for these rows alone
        if options.jumps > 0:
            if not len(index):  # one row, whose jump is 0: all processes make the same calls
                index = index.new_zeros(1)
            rate = self.derivative(x_t[index], t[index], s[index], v[index], rows(batch.cond, index))
            target[index] -= column((t - s)[index], rate) * rate
        error = (guess - target).square().flatten(1).sum(1)
        weight = (error.detach() + options.c) ** -options.power
        return Loss.mean({"meanflow": weight * error})

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """``du/dt`` along the flow: tangents v for x, 1 for t, 0 for s."""

        def u(x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
            guess: Tensor = self.student(x, t, s, cond, "average_velocity")
            return guess

        return along_flow(
            u, x, t, s, v, cond,
            kind=self.options.derivative, step=self.options.step, low=s, high=self.student.path.t_max,
        )  # fmt: skip

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return {"start": options.start}
