"""Regression on trajectories: repeat the way of a teacher's sampler in one jump, or in a few."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..grid import grid
from ..losses import distance
from ..method import Batch, Loss, Method, PairOptions
from ..part import Part
from ..path import Path, column
from ..registry import Paper, method
from ..rng import Source, uniform
from ..solvers import solver_named, steps_of
from ..student import Student
from .denoising import level_weight


class TrajectoryOptions(Part):
    pairs: PairOptions = Field(PairOptions(), description="the ways that are regressed on, from noise to sample")
    distance: Literal["huber", "l2", "l1"] = Field(
        "huber", description="huber is of the whole sample, the others means"
    )
    huber_c: float = Field(0.24, ge=0, description="below this length of the whole image's error, quadratic")
    data_std: float = Field(1.0, gt=0, description="of the data, in the weight of the levels; the task's")
    steps: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1, description="step counts that the student serves")

    @model_validator(mode="after")
    def _fits(self) -> TrajectoryOptions:
        points = steps_of(solver_named(self.pairs.solver), self.pairs.nfe)
        if odd := [count for count in self.steps if count < 1 or points % count]:
            whole = f"the {points} of the pairs: pass divisors of {points}, or other pairs"
            raise ValueError(f"{odd[0]} steps are no even part of {whole}")
        return self


@method(
    "trajectory",
    Paper("2101.02388", "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", "KD"),
    Paper(
        "2406.07507", "Flow map matching with stochastic interpolants: A mathematical framework for consistency models"
    ),
    level="exact",
)
class Trajectory(Method):
    """``E w(t) d(F(x_t, t, s), x_s)`` for two points t > s of a way that the teacher's sampler went.

    What ``regression`` does with a way's ends, for its halves and quarters as well: a number of steps is drawn, then
    one of its jumps. One student then serves them all, and the teacher is asked for nothing while it learns. Errors
    are measured in the clean sample that the jump's line points to, ``tau_t / (tau_t - tau_s) (F - x_s)`` in the
    path's straight frame, and weighed as the denoising loss weighs them (1/sd^2 + snr), so that short jumps at quiet
    levels count as much as the long one.

    The student is on its teacher's path and steps to the times of the teacher's sampler.
    """

    Options = TrajectoryOptions
    flow_map = True
    needs_data = False
    reads_states = True

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        if teacher is not None and teacher.path != student.path:
            raise ValueError(
                f"trajectories of a teacher teach a student on its own path, {teacher.path!r}, alone; this one is on "
                f"{student.path!r}: leave out student.path"
            )

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        options, student, path = self.options, self.student, self.student.path
        states, times = self._way(batch)
        last = len(times) - 1
        served = torch.tensor([k for k in options.steps if last % k == 0] or [1], device=states.device)
        count = served[(uniform(batch.noise, rng) * len(served)).long().clamp(max=len(served) - 1)]
        jump = torch.minimum((uniform(batch.noise, rng) * count).long(), count - 1)
        first, end = jump * (last // count), (jump + 1) * (last // count)
        row = torch.arange(len(first), device=first.device)
        dtype = torch.promote_types(states.dtype, torch.float32)
        t, s = times[first].to(dtype), times[end].to(dtype)
        guess = student(states[row, first], t, s, batch.cond)
        (_, tau_t), (scale_s, tau_s) = path.frame(t), path.frame(s)
        share = (tau_t / (tau_t - tau_s) / scale_s).to(dtype)
        factor = column(share * level_weight("edm", path, t, options.data_std).sqrt() * options.data_std, guess)
        error = distance(options.distance, factor * guess, factor * states[row, end], options.huber_c)
        return Loss.mean({"trajectory": error})

    def _way(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States [batch, points, *shape] and their times [points]; of pairs alone, their two ends."""
        if batch.states is not None and batch.times is not None:
            return batch.states, batch.times
        if batch.target is None:
            raise ValueError("trajectory needs the ways of pairs: a batch with states")
        start = self.student.start_scale * batch.noise
        ends = torch.tensor([self.student.start, self.student.path.t_min], dtype=torch.float64, device=start.device)
        return torch.stack([start, batch.target], 1), ends

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        pairs = options.pairs
        times = grid(path, steps_of(solver_named(pairs.solver), pairs.nfe), pairs.grid).tolist()[:-1]
        return {"start": times[0], "steps": {k: tuple(times[:: len(times) // k]) for k in options.steps}}
