"""Students: flow maps ``x_t -> x_s`` that answer in one call, or a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapters import learn, twin
from .cond import Cond
from .denoiser import Denoiser, Reframed
from .grid import descending
from .path import Path, Time
from .rng import Source, normal

Policy = Literal["ode", "renoise"]


class Student(nn.Module):
    """A denoiser used as a flow map.

    One jump from t to s keeps the guess and moves along the line it defines,
    ``x_s = alpha_s x0 + sigma_s eps``: with a network that reads s this is the average velocity's step
    (MeanFlow, consistency trajectories), with one that does not it is a consistency function at
    s = t_min and DDIM between.

    Parameters
    ----------
    denoiser: the guess, on its path.
    shape: of one sample, without the batch.
    start: the time of the first step; the sample there is ``start_scale * noise``.
    steps: for every step count that the student serves, its times from ``start`` down, t_min left out.
    policy: between steps ``ode`` goes on along the flow, ``renoise`` corrupts the guess with fresh noise.
    classes: how many labels its condition has; None where it is not a label.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        *,
        start: float | None = None,
        start_scale: float | None = None,
        steps: Mapping[int, tuple[float, ...]] | None = None,
        policy: Policy = "ode",
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.shape, self.policy, self.classes = denoiser, tuple(shape), policy, classes
        self.start = denoiser.path.t_max if start is None else float(start)
        self.start_scale = float(denoiser.path.coefs(self.start).sigma) if start_scale is None else float(start_scale)
        self.steps: dict[int, tuple[float, ...]] = {1: (self.start,)} if steps is None else dict(steps)
        for count, times in self.steps.items():
            if count != len(times) or abs(times[0] - self.start) > 1e-9:
                raise ValueError(f"{count} steps need {count} times from {self.start:g} down, got {times}")
            descending((*times, self.path.t_min))

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @classmethod
    def like(cls, teacher: Denoiser, shape: tuple[int, ...], **options: Any) -> Student:
        """A trainable copy of a teacher, to start from."""
        return cls(trainable_copy(teacher), shape, **options)

    def unframed(self) -> Student:
        """The same map on the path of the denoiser inside a ``Reframed`` one: from equal noise, equal samples."""
        outer = self.denoiser
        if not isinstance(outer, Reframed):
            return self
        inner = outer.inner
        start = float(outer.match(self.start, torch.empty(0)))
        here, there = self.path.coefs(self.start), inner.path.coefs(start)
        scale = self.start_scale * float((there.alpha + there.sigma) / (here.alpha + here.sigma))
        steps = {
            count: (start, *(float(outer.match(t, torch.empty(0))) for t in times[1:]))
            for count, times in self.steps.items()
        }
        return Student(
            inner, self.shape, start=start, start_scale=scale, steps=steps, policy=self.policy, classes=self.classes
        ).unframed()

    def forward(self, x: Tensor, t: Time, s: Time, cond: Cond = None, want: str = "sample") -> Any:
        """Jump from t to s. ``want``: sample | x0 | eps | flow | velocity | average_velocity | features.

        ``average_velocity`` is ``(x_t - x_s) / (t - s)`` on the straight path: the ``flow`` of the guess.
        """
        if want not in ("sample", "average_velocity"):
            return self.denoiser(x, t, cond, want, s)
        if want == "average_velocity":
            return self.denoiser(x, t, cond, "flow", s)
        if isinstance(s, float) and s == self.path.t_min:
            return self.denoiser(x, t, cond, "x0", s)
        return self.path.move(x, self.denoiser(x, t, cond, self.path.slope, s), t, s)

    def noise_to(self, x0: Tensor, noise: Tensor) -> Tensor:
        """eps with ``alpha x0 + sigma eps = start_scale noise`` at the start: what is left of x0 there is taken off."""
        alpha, sigma, _, _ = self.path.at(self.start, x0)
        return ((self.start_scale * noise - alpha * x0) / sigma).to(x0.dtype)

    def times(self, steps: int) -> tuple[float, ...]:
        """The times of a step count that the student was trained for; ValueError for another."""
        if steps not in self.steps:
            known = ", ".join(map(str, sorted(self.steps)))
            raise ValueError(f"this student was trained for {known} step(s), got {steps}: pass one of those")
        return self.steps[steps]

    def generate(self, noise: Tensor, cond: Cond = None, rng: Source | None = None, steps: int | None = None) -> Tensor:
        """Samples from standard normal noise [batch, *shape] in ``steps`` calls; None: in the fewest."""
        times = self.times(min(self.steps) if steps is None else steps)
        x = self.start_scale * noise
        for i, t in enumerate(times):
            last = i == len(times) - 1
            if last or self.policy == "renoise":
                x = self(x, t, self.path.t_min, cond)
                if not last:
                    if rng is None:
                        raise ValueError("a student that renoises between steps needs a generator: pass rng")
                    x = self.path.corrupt(x, times[i + 1], normal(x, rng))
            else:
                x = self(x, t, times[i + 1], cond)
        return x


def trainable_copy(module: Any) -> Any:
    """A deep copy whose parameters all learn; weights under adapters are not copied and do not."""
    return learn(twin(module)).train()


def frozen(module: Any) -> Any:
    """The same module, in evaluation mode, with no parameter that learns."""
    return module.eval().requires_grad_(False)
