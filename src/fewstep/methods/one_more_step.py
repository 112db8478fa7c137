"""One More Step: what to start from where a path ends with some signal left."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import normal
from ..registry import Paper, method
from ..rng import Source
from ..solvers.start import SILENT
from ..student import Student
from .denoising import drop_condition


class OneMoreStepOptions(Part):
    drop: float = Field(0.0, ge=0, lt=1, description="share of conditions dropped, for guidance later")


@method(
    "one_more_step",
    Paper(
        "2311.15744",
        "One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws and Enhancing "
        "Low-Frequency Controls",
        "OMS",
    ),
    level="exact",
)
class OneMoreStepTraining(Method):
    """Train the module of One More Step: the mean of the data for a condition, asked at pure noise.

    ``E ||v(eps, cond) + x0||^2`` with eps independent of x0, where ``v = alpha eps - sigma x0`` is read at alpha = 0,
    sigma = 1: the guess of x0 is -v, and its optimum ``E[x0 | cond]``. The network sees one time only, so that it
    needs no embedding of time, and the noise tells it nothing.
    """

    Options = OneMoreStepOptions
    needs_teacher = False
    makes = "start"

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        path = student.path
        alpha = float(path.coefs(path.t_max).alpha)
        if alpha > SILENT:
            raise ValueError(
                f"one_more_step is asked at pure noise, and the student's path keeps alpha = {alpha:.3g} of the signal "
                "there: take student.path = { kind = 'straight' }, whatever the path of the model that it will serve"
            )

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path = self.student.path
        eps = normal(batch.data, rng)
        cond = drop_condition(self.student.denoiser, batch.cond, eps, self.options.drop, rng)
        guess = self.student(eps, path.t_max, path.t_min, cond, "x0")
        return Loss.mean({"mean": squared_error(guess, batch.data)})
