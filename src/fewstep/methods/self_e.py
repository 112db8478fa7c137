"""Self-E: from data alone, a student of any number of steps that judges its own jumps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond
from ..grid import even_steps
from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import NoiseSampler, Path, column, normal
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student, trainable_copy
from .denoising import drop_condition


class SelfEOptions(Part):
    levels: NoiseSampler = Field(NoiseSampler(kind="logit_normal", mean=0.0, std=1.0), description="of t and s")
    jumps: float = Field(0.5, ge=0, le=1, description="share of rows with s < t; the others learn from the data alone")
    drop: float = Field(0.1, ge=0, le=1, description="share of rows that lose their condition: judging needs both")
    most: float = Field(10.0, ge=0, description="largest weight of the judged guess beside the clean sample's one")
    weight: Literal["flow", "none"] = Field("flow", description="of the squared error in x0: 1 / time^2, or 1")
    floor: float = Field(0.05, gt=0, le=1, description="least time on the straight path in that weight")
    begin: float = Field(0.0, ge=0, le=1, description="share of the horizon before the student judges itself")
    fake: float = Field(0.0, ge=0, description="weight of the student's own score in the late stage; 0: no such stage")
    fake_begin: float = Field(0.75, ge=0, le=1, description="share of the horizon before the late stage")
    critic_turns: int = Field(1, ge=1, description="critic updates before each of the student's, in the late stage")
    horizon: int = Field(1000, ge=1, description="student updates in all; the recipe's steps")
    steps: tuple[int, ...] = Field((1, 2, 4, 8), description="step counts that the student serves")
    start: float | None = Field(None, gt=0, description="time of the first step; None: the path's end")


@method(
    "self_e",
    Paper("2512.22374", "Self-Evaluation Unlocks Any-Step Text-to-Image Generation", "Self-E"),
    level="exact",
)
class SelfE(Method):
    """``w ||G(x_t, t, s) - renormed(x0 + lam x_self)||^2``, lam = sigma_t/alpha_t - sigma_s/alpha_s.

    G guesses the clean sample, knowing that it will jump to s. x_self is that guess moved by what the student itself,
    where it lands (noised to s, s = t there), says of the condition: ``x_self = G - (D(x_s, null) - D(x_s, cond))``, a
    step of size ``sigma_s^2/alpha_s`` up ``grad log p(cond | x_s)``. The target keeps the clean sample's norm. At
    s = t, lam = 0 and it is denoising. Nothing flows back through the judgement.

    In a late stage, ``fake > 0``, a critic learns the student's own guesses: ``x_self -= fake (C(x_s, cond) - D(x_s,
    null))``. At fake = 1 the whole step is ``D(x_s, cond) - C(x_s, cond)``, down the KL from the student's law to the
    data's at x_s, and is no step at all where the two agree.
    """

    Options = SelfEOptions
    needs_teacher = False
    flow_map = True

    def __init__(self, teacher: Any, student: Student, options: SelfEOptions | None = None) -> None:
        super().__init__(teacher, student, options)
        if self.options.fake > 0:
            self.critic = trainable_copy(student.denoiser)
            self.players = ("student", "critic")  # type: ignore[misc]

    def turns(self, step: int) -> tuple[str, ...]:
        late = self.options.fake > 0 and step >= self._late
        return ("critic",) * self.options.critic_turns + ("student",) if late else ("student",)

    @property
    def _late(self) -> int:
        """The first step of the late stage."""
        return math.ceil(self.options.fake_begin * self.options.horizon)

    @torch.no_grad()
    def settle(self, step: int) -> tuple[nn.Parameter, ...]:
        """The critic begins as what the student is by then."""
        if self.options.fake == 0 or step + 1 != self._late:
            return ()
        theirs = (*self.student.denoiser.parameters(), *self.student.denoiser.buffers())
        for mine, value in zip((*self.critic.parameters(), *self.critic.buffers()), theirs, strict=True):
            mine.copy_(value)
        return tuple(p for p in self.critic.parameters() if p.requires_grad)

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options, x0 = self.student.path, self.options, batch.data
        draw = options.levels.on(path)
        first, second = (draw(x0, rng).clamp(path.t_low, self.student.start) for _ in range(2))
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        s = torch.where(uniform(x0, rng) < options.jumps, s, t)
        cond = drop_condition(self.student.denoiser, batch.cond, x0, options.drop, rng)
        x_t = path.corrupt(x0, t, batch.noise)
        if player == "critic":
            return self._critic_loss(x_t, t, s, cond, rng)
        guess = self.student(x_t, t, s, cond, "x0")
        fresh = normal(x0, rng)
        aim = x0
        if options.jumps > 0 and self.step >= options.begin * options.horizon:
            judged = self.judged(guess.detach(), s, cond, fresh)
            lam = (self._ratio(t) - self._ratio(s)).clamp(max=options.most).to(t)
            aim = renormed(x0 + column(lam, x0) * judged, x0)
        return Loss.mean({"self_e": self._weighted(squared_error(guess, aim), t)})

    def _critic_loss(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, rng: Source) -> Loss:
        """The critic denoises the student's guesses where they land."""
        with torch.no_grad(), at_rest(self.student):
            guess = self.student(x_t, t, s, cond, "x0")
        x_s = self.student.path.corrupt(guess, s, normal(guess, rng))
        return Loss.mean({"critic": self._weighted(squared_error(self.critic(x_s, s, cond, "x0", s), guess), s)})

    def _weighted(self, error: Tensor, t: Tensor) -> Tensor:
        if self.options.weight == "none":
            return error
        return error / self.student.path.straight(t).clamp(min=self.options.floor).square().to(error)

    @torch.no_grad()
    def judged(self, guess: Tensor, s: Tensor, cond: Cond, noise: Tensor) -> Tensor:
        """The guess, moved by what the student says of its condition at level s, and late by its own score."""
        late = self.options.fake > 0 and self.step >= self._late
        if cond is None and not late:
            return guess
        x_s = self.student.path.corrupt(guess, s, noise)
        with at_rest(self.student):
            given = self.student(x_s, s, s, cond, "x0")
            free = given if cond is None else self.student(x_s, s, s, self.student.denoiser.null(cond), "x0")
        judged = guess - (free - given)
        if late:
            with at_rest(self.critic):
                judged = judged - self.options.fake * (self.critic(x_s, s, cond, "x0", s) - free)
        return judged

    def _ratio(self, t: Tensor) -> Tensor:
        coefs = self.student.path.coefs(t)
        return coefs.sigma / coefs.alpha.clamp(min=1e-6)

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        return even_steps(path, options.start, options.steps)


def renormed(x: Tensor, like: Tensor) -> Tensor:
    """x, each row with the norm of ``like``'s."""
    ratio = like.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-12)
    return x * column(ratio, x)


@contextmanager
def at_rest(player: nn.Module) -> Iterator[None]:
    """Inside, the player drops nothing out."""
    before = player.training
    player.eval()
    try:
        yield
    finally:
        player.train(before)
