"""Reflow: learn the velocity of lines that join each noise to where a flow took it, and the flow becomes straight."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..cond import Cond, rows
from ..grid import even_steps
from ..losses import batch_mean
from ..method import Batch, Loss, Method, PairOptions
from ..part import Part
from ..path import NoiseSampler, Path, Straight, normal
from ..registry import Paper, method
from ..rng import Source
from ..student import Student
from .denoising import velocity_error

Anneal = Literal["linear", "cosine", "exponential"]
LOOK = 64
"""Rows, at most, whose straightness is measured at a time."""


class ReflowOptions(Part):
    pairs: PairOptions = Field(PairOptions(), description="what is joined by lines")
    levels: NoiseSampler = Field(NoiseSampler(kind="uniform", low=0.001), description="times")
    anneal: float = Field(
        0.0, ge=0, le=1, description="share of the steps over which fresh noise gives way to the pair's own; 0: at once"
    )
    anneal_kind: Anneal = Field("linear", description="how the share of fresh noise falls")
    steps: tuple[int, ...] = Field((1,), min_length=1, description="step counts that the student serves, even in time")
    look: int = Field(200, ge=0, description="updates between measurements of the straightness; 0: none")
    look_steps: int = Field(16, ge=2, description="Euler steps of a measurement")
    horizon: int = Field(10_000, ge=1, description="student updates in the whole run, for the annealing")


@method(
    "reflow",
    Paper("2209.03003", "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"),
    Paper(
        "2309.06380", "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
        "InstaFlow",
    ),
    Paper("2407.12718", "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", "SlimFlow"),
    level="small",
)  # fmt: skip
class Reflow(Method):
    """``E ||v(x_t, t) - (z - x)||^2``, ``x_t = (1 - t) x + t z``, over pairs (z, x) that a flow joined.

    At the optimum ``v = E[z - x | x_t]``: its flow joins the same two laws, at no larger cost, by straighter ways
    (Liu et al. 2022, Section 3). Each reflow more is a stage whose pairs the student before made
    (``teacher = "previous"``); ``regression`` on such pairs then makes the one-step student (InstaFlow).

    With ``anneal`` the noise end is at first mostly fresh, ``z' = sqrt(1 - beta^2) z + beta xi``, beta falling from 1
    to exactly 0: ordinary flow matching turns into reflow, for networks that cannot start from the teacher's weights
    (SlimFlow, Section 3.1). z' is standard normal for every beta.

    ``straightness`` in the log is S of the student at the last look (see the function of that name).
    """

    Options = ReflowOptions
    needs_data = False
    straight = True

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        self.defect: Tensor
        self.register_buffer("defect", torch.zeros(()))

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        if batch.target is None:
            raise ValueError("reflow needs pairs: a batch with target")
        options, path = self.options, self.student.path
        z = self.noise_end(batch.noise, rng)
        t = options.levels.on(path)(batch.target, rng)
        parts = {"reflow": velocity_error(self.student, batch.target, z, t, batch.cond)}
        if options.look > 0:
            if self.step % options.look == 0:
                few = slice(0, LOOK)
                found = straightness(self.student.denoiser, batch.noise[few], rows(batch.cond, few), options.look_steps)
                self.defect.copy_(batch_mean(found.float()))
            parts["straightness"] = self.defect.clone()
        return Loss.mean(parts, {"straightness": 0.0})

    def noise_end(self, z: Tensor, rng: Source) -> Tensor:
        """``sqrt(1 - beta^2) z + beta xi`` of the pairs' noise z: standard normal whatever beta is."""
        if self.options.anneal == 0:
            return z
        beta = self.beta(self.step)
        return math.sqrt(1 - beta**2) * z + beta * normal(z, rng)

    def beta(self, step: int) -> float:
        """The share of fresh noise at a step: 1 at first, 0 from ``anneal horizon`` on."""
        last = self.options.anneal * self.options.horizon
        if step >= last:
            return 0.0
        return annealed(self.options.anneal_kind, step / last)

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return even_steps(path, None, options.steps)


def annealed(kind: Anneal, part: float) -> float:
    """The annealing at a part of its way: 1 at 0, exactly 0 at 1.

    >>> [annealed(kind, 0.5) for kind in ("linear", "cosine")]
    [0.5, 0.5]
    """
    match kind:
        case "linear":
            return 1 - part
        case "cosine":
            return 1.0 if part == 0 else 0.0 if part == 1 else (1 + math.cos(math.pi * part)) / 2
        case "exponential":
            return (math.exp(-5 * part) - math.exp(-5)) / (1 - math.exp(-5))
    raise ValueError(f"unknown annealing {kind!r}: one of linear, cosine, exponential")


@torch.no_grad()
def straightness(model: Any, noise: Tensor, cond: Cond = None, steps: int = 64) -> Tensor:
    """The straightness defect of a flow, of each start [batch, *shape]: [batch].

    ``S = integral of ||v(x_t, t) - (z - x)||^2 dt`` along the model's own way from z to x (Liu et al. 2022,
    Section 2.2), the time scaled to [0, 1]. As ``z - x`` is the mean of v along the way, S is the variance of v along
    it, and no second pass is needed. 0: straight, so that one Euler step is exact. ``model`` is a denoiser on the
    straight path; wrap others in Reframed. ``steps`` are Euler's.

    >>> from fewstep.teachers import Gaussian
    >>> S = straightness(Gaussian([0.0], [1.0]), torch.ones(1, 1, dtype=torch.float64), steps=1000)
    >>> round(S.item(), 2), round(2 - math.pi / 2, 2)
    (0.43, 0.43)
    """
    path = model.path
    if not isinstance(path, Straight):
        raise ValueError(f"straightness needs the straight path, got {type(path).__name__}: wrap it in Reframed")
    x, times = float(path.t_max) * noise, torch.linspace(path.t_max, 0, steps + 1, dtype=torch.float64).tolist()
    mean, squares = torch.zeros_like(x), x.new_zeros(len(x))
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = model(x, t, cond, "velocity")
        mean, squares = mean + v / steps, squares + v.square().flatten(1).sum(1) / steps
        x = x + (s - t) * v
    return (squares - mean.square().flatten(1).sum(1)).clamp(min=0) * path.t_max**2
