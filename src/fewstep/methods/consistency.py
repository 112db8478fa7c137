"""Consistency: the guesses at two points of one trajectory must agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..grid import grid
from ..losses import ict_c, pseudo_huber, squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import Path
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student, frozen, trainable_copy


class ConsistencyOptions(Part):
    mode: Literal["distillation", "training"] = Field(
        "distillation", description="the earlier point from a teacher's step, or from the same noise (no teacher)"
    )
    first: int = Field(10, ge=2, description="levels at the start")
    last: int = Field(1280, ge=2, description="levels at the end; they double in between")
    horizon: int = Field(1000, ge=1, description="student updates over which the levels double; the recipe's steps")
    mean: float = Field(-1.1, description="of log sigma, where pairs of levels are drawn")
    std: float = Field(2.0, gt=0, description="of log sigma there")
    distance: Literal["huber", "l2"] = Field("huber", description="of the whole sample, or the mean square")
    huber_c: float | None = Field(None, ge=0, description="None: 0.00054 sqrt(D)")
    weight: Literal["inverse_gap", "none"] = Field("inverse_gap", description="1 / (sigma_next - sigma)")
    target_decay: float = Field(0.0, ge=0, lt=1, description="average of the target network; 0: the student itself")
    solver: Literal["euler", "heun"] = Field("heun", description="the teacher's step, in distillation")


def level_count(step: int, horizon: int, first: int, last: int) -> int:
    """How many levels at a step: ``min(first 2^floor(step / K'), last) + 1`` (Song & Dhariwal 2023, Sec. 3.4).

    ``K' = floor(horizon / (log2(floor(last / first)) + 1))``: eleven levels at first, doubling.

    >>> [level_count(k, 800, 10, 1280) for k in (0, 99, 100, 750)]
    [11, 11, 21, 1281]
    """
    stage = max(1, math.floor(horizon / (math.log2(max(last // first, 1)) + 1)))
    return min(first * 2 ** min(step // stage, 40), last) + 1


@method(
    "consistency",
    Paper("2303.01469", "Consistency Models", "CM"),
    Paper("2310.14189", "Improved Techniques for Training Consistency Models", "iCT"),
    level="exact",
)
class Consistency(Method):
    """``w(t) d(f(x_t, t), stopped f(x_s, s))`` for neighbouring levels s < t of a doubling grid.

    ``training`` takes x_s from the same clean sample and noise, ``distillation`` from a step of the
    teacher's flow. f is the student's guess; with the boundary condition f(x, lowest) = x it becomes the
    flow's end. Both passes share dropout.
    """

    Options = ConsistencyOptions
    needs_teacher = False

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        if self.options.mode == "distillation" and teacher is None:
            raise ValueError("consistency distillation needs a teacher; mode = 'training' does without")
        self.target = frozen(trainable_copy(student)) if self.options.target_decay > 0 else None
        self._made: tuple[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] | None = None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    @property
    def count(self) -> int:
        options = self.options
        return level_count(self.step, options.horizon, options.first, options.last)

    def levels(self, path: Path) -> tuple[Tensor, Tensor]:
        """Ascending times and the probability of each neighbouring pair, from a log-normal of sigma."""
        times = grid(path, self.count, "karras")[:-1].flip(0)
        edge = (torch.log(path.coefs(times).sigma / path.coefs(times).alpha) - self.options.mean) / (
            math.sqrt(2) * self.options.std
        )
        mass = torch.erf(edge[1:]) - torch.erf(edge[:-1])
        return times, mass / mass.sum()

    def _table(self, path: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The levels, the cumulated probability of their pairs, the gap of each pair in sigma: until they double."""
        key = (self.count, device)
        if self._made is None or self._made[0] != key:
            times, mass = self.levels(path)
            gaps = self._ratio(path, times).diff()
            self._made = (key, (times.to(device), mass.cumsum(0).to(device), gaps.to(device)))
        return self._made[1]

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options, x0 = self.student.path, self.options, batch.data
        times, share, gaps = self._table(path, x0.device)
        pick = torch.searchsorted(share, uniform(x0, rng).double()).clamp(max=len(gaps) - 1)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        s, t = times[pick].to(dtype), times[pick + 1].to(dtype)
        x_t = path.corrupt(x0, t, batch.noise)
        with torch.no_grad():
            x_s = path.corrupt(x0, s, batch.noise) if options.mode == "training" else self._follow(x_t, t, s, batch)
        with same_dropout(self.student) as again:
            guess = self.student(x_t, t, path.t_min, batch.cond)
            with torch.no_grad():
                again()
                aim = (self.target or self.student)(x_s, s, path.t_min, batch.cond)
        c = ict_c(x0[0].numel()) if options.huber_c is None else options.huber_c
        error = pseudo_huber(guess, aim, c) if options.distance == "huber" else squared_error(guess, aim)
        if options.weight == "inverse_gap":
            error = error / gaps[pick].to(error)
        return Loss.mean({"consistency": error})

    @staticmethod
    def _ratio(path: Path, t: Tensor) -> Tensor:
        coefs = path.coefs(t)
        return coefs.sigma / coefs.alpha.clamp(min=1e-3)

    def _follow(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        path = self.student.path
        slope = self.teacher(x, t, batch.cond, path.slope)
        ahead = path.move(x, slope, t, s)
        if self.options.solver == "euler":
            return ahead
        return path.move(x, (slope + self.teacher(ahead, s, batch.cond, path.slope)) / 2, t, s)

    @torch.no_grad()
    def settle(self, step: int) -> tuple[nn.Parameter, ...]:
        if self.target is not None:
            pairs = list(zip(self.target.parameters(), self.student.parameters(), strict=True))
            torch._foreach_lerp_([a for a, _ in pairs], [b.detach() for _, b in pairs], 1 - self.options.target_decay)
        return ()


@contextmanager
def same_dropout(module: nn.Module) -> Iterator[Any]:
    """Inside, calling the yielded function makes the next pass draw the dropout of the first."""
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()) and module.training
    state = torch.get_rng_state() if drops else None
    device = next((p.device for p in module.parameters() if p.is_cuda), None) if drops else None
    cuda = torch.cuda.get_rng_state(device) if device is not None else None

    def again() -> None:
        if state is not None:
            torch.set_rng_state(state)
        if cuda is not None and device is not None:
            torch.cuda.set_rng_state(cuda, device)

    yield again
