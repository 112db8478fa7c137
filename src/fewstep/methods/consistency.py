"""Consistency: the guesses at two points of one trajectory must agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond, part_of
from ..derivative import Derivative, along_flow, still_fast_waves
from ..grid import grid
from ..losses import ict_c, pseudo_huber, squared_error
from ..method import Batch, Loss, Method, SamplesOptions
from ..part import Part, variant
from ..path import Path, column, normal
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student, frozen, trainable_copy
from .denoising import level_weight


class ConsistencyOptions(SamplesOptions):
    mode: Literal["distillation", "training"] = Field(
        "distillation", description="the earlier point from a teacher's step, or from the same noise (no teacher)"
    )
    form: Literal["discrete", "continuous"] = Field(
        "discrete", description="neighbouring levels of a grid, or their limit: the derivative along the flow (sCM)"
    )
    first: int = Field(10, ge=2, description="levels at the start")
    last: int = Field(1280, ge=2, description="levels at the end; they double in between")
    horizon: int = Field(1000, ge=1, description="student updates over which the levels double; the recipe's steps")
    picks: Literal["log_normal", "uniform"] = Field(
        "log_normal", description="how pairs of levels are drawn: by a log-normal of sigma, or all alike"
    )
    mean: float = Field(-1.1, description="of log sigma, where pairs of levels are drawn")
    std: float = Field(2.0, gt=0, description="of log sigma there")
    distance: Literal["huber", "l2"] = Field("huber", description="of the whole sample, or the mean square")
    huber_c: float | None = Field(None, ge=0, description="None: 0.00054 sqrt(D)")
    weight: Literal["inverse_gap", "inverse_ratio", "edm", "none"] = Field(
        "inverse_gap",
        description="1 / (sigma_next - sigma); that times sigma, alike at every scale; 1/sigma^2 + 1/data_std^2; or 1",
    )
    anchor: bool = Field(
        True, description="the data is the first level, its own guess; else what the network says at the lowest level"
    )
    target_decay: float = Field(0.0, ge=0, lt=1, description="average of the target network; 0: the student itself")
    solver: Literal["euler", "heun"] = Field("heun", description="the teacher's step, in distillation")
    data_std: float = Field(1.0, gt=0, description="of the data, in the continuous form and the edm weight; the task's")
    tangent_c: float = Field(0.1, ge=0, description="continuous: the derivative g becomes g / (||g|| + c); 0: stays g")
    tangent_warmup: float = Field(
        0.1, ge=0, le=1, description="continuous: share of the horizon in which the network's own derivative comes in"
    )
    derivative: Derivative = Field("exact", description="continuous: forward mode, or a central difference")
    step: float = Field(5e-3, gt=0, description="of the central difference, in atan(sigma / (alpha data_std))")
    still: int = Field(0, ge=0, description="silence this many of the fastest waves of the student's time embedding")
    mask: str | None = Field(None, description="key of the condition that says which elements count; None: all")


ConsistencyTrajectoryOptions = variant(ConsistencyOptions, "ConsistencyTrajectoryOptions", first=18, last=18)


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
    Paper("2410.11081", "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", "sCM"),
    Paper("2305.06908", "CoMoSpeech: One-Step Speech and Singing Voice Synthesis via Consistency Model", "CoMoSpeech"),
    level="exact",
)
class Consistency(Method):
    """``w(t) d(f(x_t, t), stopped f(x_s, s))`` for neighbouring levels s < t of a doubling grid.

    ``training`` takes x_s from the same clean sample and noise, ``distillation`` from a step of the
    teacher's flow. f is the student's guess; with the boundary condition f(x, lowest) = x it becomes the
    flow's end. Both passes share dropout. ``form = "continuous"`` is the limit of many levels.
    """

    Options = ConsistencyOptions
    needs_teacher = False
    trajectories: ClassVar[bool] = False  # jumps to every later level, not to the data alone

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__(teacher, student, options)
        if self.options.mode == "distillation" and teacher is None:
            raise ValueError("consistency distillation needs a teacher; mode = 'training' does without")
        if self.options.joined and (self.options.pairs is None or self.options.mode != "training"):
            raise ValueError("joined learns from the lines of pairs: give pairs, and mode = 'training'")
        if self.options.form == "continuous" and (self.trajectories or self.options.target_decay > 0):
            raise ValueError("the continuous form takes its target from the student itself, at the data's end")
        if self.options.still:
            still_fast_waves(student, self.options.still)
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
        """Ascending times and the probability of each neighbouring pair.

        The paper's levels begin at the lowest one, where its networks give back what they got. Others do not, and
        nothing teaches them to: what they say there drifts, and the whole chain with it. So the data stands below
        (``anchor``), a level whose guess is known for every network.
        """
        times = grid(path, self.count, "karras", high=self.student.start).flip(0)
        times = times if self.options.anchor else times[1:]
        if self.options.picks == "uniform":
            return times, torch.full_like(times[1:], 1 / (len(times) - 1))
        edge = (torch.log(path.coefs(times).sigma / path.coefs(times).alpha) - self.options.mean) / (
            math.sqrt(2) * self.options.std
        )
        mass = torch.erf(edge[1:]) - torch.erf(edge[:-1])
        return times, mass / mass.sum()

    def _table(self, path: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The levels, the cumulated probability of their pairs, the weight of each pair: until they double."""
        key = (self.count, device)
        if self._made is None or self._made[0] != key:
            times, mass = self.levels(path)
            ratio = self._ratio(path, times)
            match self.options.weight:
                case "inverse_gap":
                    weight = 1 / ratio.diff()
                case "inverse_ratio":
                    weight = ratio[1:] / ratio.diff()
                case "edm":
                    weight = level_weight("edm", path, times[1:], self.options.data_std)
                case _:
                    weight = torch.ones_like(ratio[1:])
            self._made = (key, (times.to(device), mass.cumsum(0).to(device), weight.to(device)))
        return self._made[1]

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        batch = batch.samples(rng, self.student if self.options.joined else None)
        if self.options.form == "continuous":
            return self._continuous(batch, rng)
        path, options, x0 = self.student.path, self.options, batch.data
        times, share, weights = self._table(path, x0.device)
        pick = torch.searchsorted(share, uniform(x0, rng).double()).clamp(max=len(weights) - 1)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        s, t = times[pick].to(dtype), times[pick + 1].to(dtype)
        x_t = path.corrupt(x0, t, batch.noise)
        with torch.no_grad():
            x_s = path.corrupt(x0, s, batch.noise) if options.mode == "training" else self._follow(x_t, t, s, batch)
        end: Tensor | None = None
        if self.trajectories:  # the data, or any level up to s
            ladder = times if options.anchor else torch.cat([times.new_tensor([path.t_min]), times])
            below = pick + len(ladder) - len(times)
            end = ladder[(uniform(x0, rng) * (below + 1).to(dtype)).long().clamp(max=below)].to(dtype)
        with same_dropout(self.student) as again:
            guess = self._end_of(self.student, x_t, t, end, batch.cond)
            with torch.no_grad():
                again()
                aim = self._end_of(self.target or self.student, x_s, s, end, batch.cond)
        c = ict_c(x0[0].numel()) if options.huber_c is None else options.huber_c
        guess, aim, part = self._masked(guess, aim, batch.cond)
        error = pseudo_huber(guess, aim, c) if options.distance == "huber" else squared_error(guess, aim) / part
        return Loss.mean({"consistency": error * weights[pick].to(error)})

    def _end_of(self, student: Student, x: Tensor, t: Tensor, end: Tensor | None, cond: Cond) -> Tensor:
        """Where the student takes x from t: straight to the data, or by way of ``end``. Data is its own end.

        The way over ``end`` is two jumps: trajectories are compared at the data (Kim et al. 2023, eq. 9).
        """
        path = student.path
        late = t.clamp(min=path.t_low)  # where there is nothing to ask
        if end is None:
            guess: Tensor = student(x, late, path.t_min, cond)
        else:
            there = torch.where(column(end >= t, x), x, student(x, late, end, cond))
            onward = student(there, end.clamp(min=path.t_low), path.t_min, cond)
            guess = torch.where(column(end <= path.t_min, x), there, onward)
        return torch.where(column(t <= path.t_min, x), x, guess)

    def _masked(self, guess: Tensor, aim: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor | float]:
        """Both with the elements that do not count at zero, and the share that does, a row."""
        if self.options.mask is None:
            return guess, aim, 1.0
        mask = part_of(cond, self.options.mask).to(guess).expand_as(guess)
        return guess * mask, aim * mask, mask.flatten(1).mean(1).clamp(min=1e-6)

    def _continuous(self, batch: Batch, rng: Source) -> Loss:
        """The limit of many levels: the student's guess must not change along the flow.

        With ``tan(a) = sigma / (alpha data_std)`` and c_out = sigma data_std / sqrt(sigma^2 + alpha^2 data_std^2),
        the gradient is that of ``<f / c_out, stopped g>``, ``g = cos(a) df/da``: on the trigonometric path
        ``g`` is sCM's ``cos(t) df/dt`` (Lu & Song 2024, eq. 6 with their weight). ``g`` is normalised row by row.
        """
        path, options, x0 = self.student.path, self.options, batch.data
        like = x0.new_empty(len(x0), dtype=torch.promote_types(x0.dtype, torch.float32))
        level = options.mean + options.std * normal(like, rng)
        t = path.time(-level).clamp(path.t_low, self.student.start).to(like)
        x_t = path.corrupt(x0, t, batch.noise)
        alpha, sigma, d_alpha, d_sigma = path.at(t, x0)
        if options.mode == "training":
            velocity, end = (d_alpha * x0 + d_sigma * batch.noise).to(x0.dtype), x0
        else:
            with torch.no_grad():
                end = self.teacher(x_t, t, batch.cond)
                velocity = path.convert(end, x_t, t, "x0", "velocity")

        def f(x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
            guess: Tensor = self.student(x, t, path.t_min, cond)
            return guess

        scale = options.data_std
        size = sigma**2 + (alpha * scale) ** 2
        turn = scale * (d_sigma * alpha - sigma * d_alpha) / size  # da/dt
        with same_dropout(self.student) as again:
            guess = f(x_t, t, t, batch.cond)
            again()
            rate = along_flow(
                f, x_t, t, t, velocity, batch.cond, kind=options.derivative,
                step=(options.step / turn).flatten(), low=path.t_low / 2, high=path.t_max,
            )  # fmt: skip
        with torch.no_grad():
            cos, out = alpha * scale / size.sqrt(), sigma * scale / size.sqrt()
            now = (guess - end) * (scale * alpha / sigma)  # the part that is there where f bends nowhere
            ramp = min(1.0, (self.step + 1) / max(options.tangent_warmup * options.horizon, 1))
            g = cos * (now + ramp * (rate / turn - now))
            if options.mask is not None:
                g = self._masked(g, g, batch.cond)[0]
            if options.tangent_c > 0:
                g = g / (column(g.flatten(1).norm(dim=1), g) + options.tangent_c)
            aim = guess / out - g
        return Loss.mean({"consistency": (guess / out - aim).square().flatten(1).sum(1)})

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
        second = self.teacher(ahead, s.clamp(min=path.t_low), batch.cond, path.slope)
        better = path.move(x, (slope + second) / 2, t, s)
        return torch.where(column(s <= path.t_min, x), ahead, better)  # clean samples have no slope

    @torch.no_grad()
    def settle(self, step: int) -> tuple[nn.Parameter, ...]:
        if self.options.still:
            still_fast_waves(self.student, self.options.still)
        if self.target is not None:
            pairs = list(zip(self.target.parameters(), self.student.parameters(), strict=True))
            torch._foreach_lerp_([a for a, _ in pairs], [b.detach() for _, b in pairs], 1 - self.options.target_decay)
        return ()


@method(
    "consistency_trajectory",
    Paper("2310.02279", "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion", "CTM"),
    Paper("2405.20289", "DITTO-2: Distilled Diffusion Inference-Time T-Optimization for Music Generation", "DITTO-2"),
    level="exact",
)
class ConsistencyTrajectory(Consistency):
    """Consistency of jumps: from t to any later level and on to the data is where a teacher's step and the same give.

    ``||F(F(x_t, t, s), s, 0) - stopped F(F(x_u, u, s), s, 0)||`` with x_u one step of the teacher from x_t and
    ``t > u >= s``. F reads the length of the jump, so that one student serves every number of steps.
    """

    Options = ConsistencyTrajectoryOptions
    flow_map = True
    trajectories = True


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
