"""MeanFlow: learn the average velocity over a jump from its own total derivative."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond, rows
from ..denoiser import choose_taps, inner_of, tapped
from ..derivative import Derivative, along_flow, still_fast_waves
from ..grid import even_steps
from ..losses import dispersive
from ..method import Batch, Loss, Method, SamplesOptions
from ..part import Part
from ..path import NoiseSampler, Path, column
from ..registry import Paper, method
from ..rng import Source, uniform
from ..student import Student


class DispersiveOptions(Part):
    """Features of the student that are pushed apart within a batch."""

    weight: float = Field(0.5, gt=0, description="of the term beside the loss")
    kind: Literal["infonce", "cosine", "hinge", "covariance", "dm1"] = Field(
        "infonce", description="what is small when features lie apart; dm1: as that paper's code has it"
    )
    temperature: float = Field(0.5, gt=0, description="of the exponential")
    taps: int = Field(1, ge=1, description="how many layers are read")


class MeanFlowOptions(SamplesOptions):
    velocity: Literal["teacher", "data"] = Field(
        "teacher", description="whose velocity: the teacher's, where there is one, or each pair's own eps - x0"
    )
    levels: NoiseSampler = Field(NoiseSampler(kind="logit_normal", mean=-0.4, std=1.0), description="of t and s")
    ends: NoiseSampler | None = Field(None, description="of s, where it has levels of its own; None: as t")
    jumps: float = Field(0.5, ge=0, le=1, description="share of rows with s < t; the others learn the velocity")
    power: float = Field(0.75, ge=0, description="adaptive weight 1 / (||error||^2 + c)^power; 0: plain squares")
    c: float = Field(0.01, gt=0, description="added to the squared error in the adaptive weight")
    derivative: Derivative = Field(
        "exact", description="forward-mode derivative, or a central difference where attention has none"
    )
    step: float = Field(5e-3, gt=0, description="of the central difference, in time")
    still: int = Field(
        0,
        ge=0,
        description="silence this many of the fastest waves of the student's time embedding, for its derivative",
    )
    dispersive: DispersiveOptions | None = Field(None, description="push features apart within a batch; None: do not")
    steps: tuple[int, ...] = Field((1,), description="step counts that the student serves")
    start: float | None = Field(None, gt=0, le=1, description="time of the first step; None: the path's end")


@method(
    "meanflow",
    Paper("2505.13447", "Mean Flows for One-step Generative Modeling", "MeanFlow"),
    Paper("2506.09027", "Diffuse and Disperse: Image Generation with Representation Regularization"),
    Paper("2510.07865", "DM1: MeanFlow with Dispersive Regularization for 1-Step Robotic Manipulation", "DM1"),
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
        if self.options.joined and (self.options.pairs is None or self.options.velocity != "data"):
            raise ValueError("joined learns from the lines of pairs: give pairs, and velocity = 'data'")
        if self.options.still:
            still_fast_waves(student, self.options.still)
        self.taps: tuple[str, ...] = ()
        if self.options.dispersive is not None:
            net, x = inner_of(student.denoiser).net, next(student.parameters()).new_zeros(2, *student.shape)
            t, s = x.new_full((2,), 0.5), x.new_full((2,), 0.2)
            self.taps = choose_taps(net, lambda: student(x, t, s), self.options.dispersive.taps)

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        batch = batch.samples(rng, self.student if self.options.joined else None)
        path, options, x0 = self.student.path, self.options, batch.data
        first, second = options.levels.on(path)(x0, rng), (options.ends or options.levels).on(path)(x0, rng)
        t, s = torch.maximum(first, second), torch.minimum(first, second)  # of two families too: the paper's code
        jump = uniform(x0, rng) < options.jumps
        s = torch.where(jump, s, t)
        x_t = path.corrupt(x0, t, batch.noise)
        with torch.no_grad():
            own = self.teacher is None or options.velocity == "data"
            v = batch.noise - x0 if own else self.teacher(x_t, t, batch.cond, "flow")
        guess, spread = self._guess(x_t, t, s, batch.cond)
        target = v.clone()
        index = jump.nonzero().squeeze(1)  # one sync a step: the derivative is paid for these rows alone
        if options.jumps > 0:
            if not len(index):  # one row, whose jump is 0: all processes make the same calls
                index = index.new_zeros(1)
            rate = self.derivative(x_t[index], t[index], s[index], v[index], rows(batch.cond, index))
            target[index] -= column((t - s)[index], rate) * rate
        error = (guess - target).square().flatten(1).sum(1)
        weight = (error.detach() + options.c) ** -options.power
        parts = {"meanflow": weight * error}
        if spread is None:
            return Loss.mean(parts)
        return Loss.mean({**parts, "dispersive": spread}, {"dispersive": options.dispersive.weight})

    def _guess(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The average velocity, and the dispersive term of the features on its way."""
        if not self.taps:
            return self.student(x, t, s, cond, "average_velocity"), None
        given = self.options.dispersive
        with tapped(inner_of(self.student.denoiser).net, self.taps) as features:
            guess = self.student(x, t, s, cond, "average_velocity")
        terms = [dispersive(f.to(torch.promote_types(f.dtype, torch.float32)), given.kind, given.temperature)
                 for f in features]  # fmt: skip
        return guess, torch.stack(terms).mean()

    @torch.no_grad()
    def settle(self, step: int) -> tuple[nn.Parameter, ...]:
        if self.options.still:
            still_fast_waves(self.student, self.options.still)
        return ()

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
        return even_steps(path, options.start, options.steps)
