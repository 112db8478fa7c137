"""Regression on noise-image pairs: repeat in one step where a sampler took the same noise."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..losses import distance
from ..method import Batch, Loss, Method, PairOptions
from ..part import Part
from ..path import Path
from ..registry import Paper, method
from ..rng import Source


class RegressionOptions(Part):
    pairs: PairOptions = Field(PairOptions(), description="what is regressed on")
    distance: Literal["huber", "l2", "l1"] = Field(
        "huber", description="huber is of the whole sample, the others means"
    )
    huber_c: float = Field(0.24, ge=0, description="below this length of the whole image's error, quadratic")
    start: float | None = Field(None, gt=0, description="time of the single step; None: the path's end")


@method(
    "regression",
    Paper("2101.02388", "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", "KD"),
    tier="stable",
    level="small",
)
class Regression(Method):
    """``E d(student(noise), sampler(noise))`` over stored pairs.

    Noise and image are joined by the teacher's deterministic flow, so the map to learn is a function and
    the student keeps the teacher's diversity; what it cannot fit it blurs.
    """

    Options = RegressionOptions
    needs_data = False

    def pairs(self) -> PairOptions:
        options: PairOptions = self.options.pairs
        return options

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        if batch.target is None:
            raise ValueError("regression needs pairs: a batch with target")
        student = self.student
        x = student(student.start_scale * batch.noise, student.start, student.path.t_min, batch.cond)
        return Loss.mean({"pairs": distance(self.options.distance, x, batch.target, self.options.huber_c)})

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return {"start": options.start}
