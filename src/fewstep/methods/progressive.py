"""Progressive distillation: a student takes two of its teacher's steps in one, round after round."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..denoiser import seen_on
from ..grid import GridKind, grid
from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import Path
from ..registry import Paper, method
from ..rng import Source, integers
from ..student import Student

Weight = Literal["truncated_snr", "snr_plus_one", "snr", "none"]


class ProgressiveOptions(Part):
    steps: int = Field(1, ge=1, description="of the student in this round; its teacher takes twice as many")
    finest: int = Field(
        32,
        ge=2,
        description="steps of the first round's teacher, whose grid all rounds stand on: steps times a power of 2",
    )
    grid: GridKind = Field("karras", description="of those finest steps")
    weight: Weight = Field("truncated_snr", description="of the squared error in the clean sample: max(snr, 1), ...")

    @model_validator(mode="after")
    def _fits(self) -> ProgressiveOptions:
        ratio = self.finest // self.steps
        if self.finest % self.steps or ratio < 2 or ratio & (ratio - 1):
            raise ValueError(f"finest = {self.finest} is not steps = {self.steps} times 2, 4, 8, ...")
        return self


@method(
    "progressive",
    Paper("2202.00512", "Progressive Distillation for Fast Sampling of Diffusion Models", "PD"),
    level="exact",
)
class Progressive(Method):
    """``E w ||student(x_t, t) - x~||^2``, x~ the guess whose one step from t to s is two of the teacher's (DDIM).

    One round; the next is a stage with half the ``steps`` and ``teacher = "previous"`` (Salimans & Ho 2022, Alg. 2). On
    the straight frame of a path (``x / scale`` against tau) the guess's slope is the mean of the teacher's two, weighed
    by the lengths of their steps.
    """

    Options = ProgressiveOptions

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(seen_on(teacher, student.path), student, options)
        times = grid(student.path, self.options.finest, self.options.grid)
        stride = self.options.finest // self.options.steps
        self.ends = torch.stack([times[:-1:stride], times[stride // 2 :: stride], times[stride::stride]])  # t, m, s

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path = self.student.path
        pick = integers(batch.data, self.options.steps, rng)
        t, middle, s = self.ends.to(batch.data)[:, pick]
        x_t = path.corrupt(batch.data, t, batch.noise)
        with torch.no_grad():
            x_m = path.move(x_t, self.teacher(x_t, t, batch.cond, path.slope), t, middle)
            x_s = path.move(x_m, self.teacher(x_m, middle, batch.cond, path.slope), middle, s)
            target = jump_guess(path, x_t, x_s, t, s)
        guess = self.student(x_t, t, s, batch.cond, "x0")
        weight = round_weight(self.options.weight, path, t)
        return Loss.mean({"progressive": weight * squared_error(guess, target)})

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        times = grid(path, options.finest, options.grid)[: -1 : options.finest // options.steps]
        return {"steps": {options.steps: tuple(times.tolist())}}


def jump_guess(path: Path, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The guess of x0 at x_t whose one straight step from t to s ends at x_s (Salimans & Ho 2022, Alg. 2).

    With ``ratio = sigma_s / sigma_t`` it is ``(x_s - ratio x_t) / (alpha_s - ratio alpha_t)``.
    """
    still, unit = (
        path.move(x_t, torch.zeros_like(x_t), t, s),
        path.move(torch.zeros_like(x_t), torch.ones_like(x_t), t, s),
    )
    return path.convert((x_s - still) / unit, x_t, t, path.slope, "x0")


def round_weight(name: Weight, path: Path, t: Tensor) -> Tensor:
    """The weight of a squared error in x0: [batch]; ``snr_plus_one`` makes it one in v where variance is kept."""
    snr = path.snr(t).to(t)
    match name:
        case "truncated_snr":
            return snr.clamp(min=1)
        case "snr_plus_one":
            return snr + 1
        case "snr":
            return snr
    return torch.ones_like(t)
