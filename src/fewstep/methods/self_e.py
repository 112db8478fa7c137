"""Self-E: from data alone, a student of any number of steps that judges its own jumps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..cond import Cond, join, rows
from ..grid import even_steps
from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import NoiseSampler, Path, column, normal
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student
from .denoising import drop_condition


class SelfEOptions(Part):
    levels: NoiseSampler = Field(NoiseSampler(kind="logit_normal", mean=0.0, std=1.0), description="of t and s")
    jumps: float = Field(0.5, ge=0, le=1, description="share of rows with s < t; the others learn from the data alone")
    drop: float = Field(0.1, ge=0, le=1, description="share of rows that lose their condition: judging needs both")
    most: float = Field(10.0, ge=0, description="largest weight of the judged guess beside the clean sample's one")
    weight: Literal["flow", "none"] = Field("flow", description="of the squared error in x0: 1 / time^2, or 1")
    floor: float = Field(0.05, gt=0, le=1, description="least time on the straight path in that weight")
    begin: float = Field(0.0, ge=0, le=1, description="share of the horizon before the student judges itself")
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
    """

    Options = SelfEOptions
    needs_teacher = False
    flow_map = True

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options, x0 = self.student.path, self.options, batch.data
        draw = options.levels.on(path)
        first, second = (draw(x0, rng).clamp(path.t_low, self.student.start) for _ in range(2))
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        jump = uniform(x0, rng) < options.jumps
        s = torch.where(jump, s, t)
        cond = drop_condition(self.student.denoiser, batch.cond, x0, options.drop, rng)
        x_t = path.corrupt(x0, t, batch.noise)
        guess = self.student(x_t, t, s, cond, "x0")
        fresh = normal(x0, rng)
        aim = x0
        if options.jumps > 0 and self.step >= options.begin * options.horizon:
            index = jump.nonzero().squeeze(1)  # one sync a step: elsewhere lam = 0 and nothing needs judging
            if not len(index):  # one row all the same: all processes make the same calls
                index = index.new_zeros(1)
            judged = self.judged(guess.detach()[index], s[index], rows(cond, index), fresh[index])
            lam = (self._ratio(t[index]) - self._ratio(s[index])).clamp(max=options.most).to(t)
            aim = x0.clone()
            aim[index] = renormed(x0[index] + column(lam, judged) * judged, x0[index])
        error = squared_error(guess, aim)
        if options.weight == "flow":
            error = error / path.straight(t).clamp(min=options.floor).square().to(error)
        return Loss.mean({"self_e": error})

    @torch.no_grad()
    def judged(self, guess: Tensor, s: Tensor, cond: Cond, noise: Tensor) -> Tensor:
        """The guess, moved by what the student says of its condition at level s."""
        if cond is None:
            return guess
        x_s = self.student.path.corrupt(guess, s, noise)
        both = join(cond, self.student.denoiser.null(cond))
        with at_rest(self.student):
            given, free = self.student(
                x_s.repeat(2, *[1] * (x_s.ndim - 1)), s.repeat(2), s.repeat(2), both, "x0"
            ).chunk(2)
        return guess - (free - given)

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
def at_rest(student: Student) -> Iterator[None]:
    """Inside, the student drops nothing out."""
    before = student.training
    student.eval()
    try:
        yield
    finally:
        student.train(before)
