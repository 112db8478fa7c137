"""The engine of distribution matching: move samples along the gap between two denoisers.

With r = p_teacher / p_student at a noise level, an f-divergence of the noised laws has the gradient
``E[h(r) (score_student - score_teacher) dx_t/dtheta]``, ``h(r) = r^2 f''(r)``. Papers are choices of h, of
the weight over levels, of guidance, of the roll-out, and of what is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...cond import Cond, join
from ...denoiser import Denoiser, Features, choose_taps
from ...losses import batch_mean, discriminator_loss, r1_by_difference, r1_penalty
from ...nets.heads import FeatureHead
from ...part import Part
from ...path import NoiseSampler, Path, column, normal
from ...rng import Rng, Source
from ...student import Student

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "softened_rkl", "jeffreys", "hellinger", "chi2"]

# h(r) = r^2 f''(r) of D_f = E_student[f(r)], r = p_teacher / p_student
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (r + 1),
    "softened_rkl": lambda r: 1 / (r + 1),
    "jeffreys": lambda r: 1 + r,
    "hellinger": lambda r: torch.sqrt(r) / 2,
    "chi2": lambda r: 2 * r**2,
}

# the f behind each h; tests differentiate them twice
F_OF_RATIO: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -torch.log(r),
    "forward_kl": lambda r: r * torch.log(r),
    "jensen_shannon": lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
    "softened_rkl": lambda r: (r + 1) * torch.log(0.5 + 0.5 / r),
    "jeffreys": lambda r: (r - 1) * torch.log(r),
    "hellinger": lambda r: 2 * (1 - torch.sqrt(r)),
    "chi2": lambda r: (r - 1) ** 2,
}


def ratio_weight(divergence: str, logit: Tensor, bound: float = 4.0) -> Tensor:
    """``h(r)`` of each row over its batch mean, from a discriminator's logit log r [batch, ...], held to ±bound."""
    ratio = torch.exp(logit.detach().float().flatten(1).mean(1).clamp(-bound, bound))
    weight = DIVERGENCES[divergence](ratio)
    return weight / batch_mean(weight).clamp(min=1e-8)


def gap(x: Tensor, fake: Tensor, real: Tensor, normalise: bool = True) -> Tensor:
    """The direction that raises the divergence: ``fake - real``, guesses of x0 by critic and teacher.

    Equal to ``(sigma^2 / alpha) (score_student - score_teacher)``. ``normalise`` divides each row by the
    mean size of the teacher's error, ``mean |x - real|`` (DMD, eq. 8), so that every level counts alike.
    """
    direction = fake - real
    if normalise:
        size = (x - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        direction = direction / column(size, x)
    return torch.nan_to_num(direction)


def fisher(x: Tensor, fake: Tensor, real: Tensor, c: float) -> Tensor:
    """A loss a row whose gradient lowers the distance of the two scores, with no derivative of the critic's weights.

    ``-<y / sqrt(||y||^2 + c^2), fake - x>`` with ``y = fake - real``, guesses of x0 by critic and teacher at a
    noised x: score implicit matching with the pseudo-Huber distance (Luo et al. 2024, Theorem 3.1). The
    gradient goes through x, through the noised sample and so through the *inputs* of both networks: nothing is
    stopped. c = 0 takes ``y`` itself: the squared distance.
    """
    y = (fake - real).flatten(1)
    along = (y * (fake - x).flatten(1)).sum(1)
    return -along / torch.sqrt(y.square().sum(1) + c**2) if c > 0 else -along


def rollout(student: Student, noise: Tensor, cond: Cond, rng: Source, grad: bool, steps: int) -> Tensor:
    """A sample of the student, as it will be asked for one.

    With several steps one of them is drawn; the student's own earlier steps make its input without a
    gradient (backward simulation, DMD2 Sec. 4.5), so that training and use meet the same inputs.
    """
    times = student.times(steps)
    last = 0
    if len(times) > 1:
        shared = rng.shared if isinstance(rng, Rng) else rng
        last = int(torch.randint(len(times), (1,), generator=shared, device=shared.device))
    path, x = student.path, student.start_scale * noise
    with torch.no_grad():
        for i in range(last):
            if student.policy == "renoise":
                x = path.corrupt(student(x, times[i], path.t_min, cond), times[i + 1], normal(x, rng))
            else:
                x = student(x, times[i], times[i + 1], cond)
    with torch.set_grad_enabled(grad):
        sample: Tensor = student(x, times[last], path.t_min, cond, "x0")
    return sample


class GanOptions(Part):
    """An adversary on intermediate features. Weights are per element: losses are means."""

    student: float = Field(0.03, ge=0, description="weight in the student's loss")
    critic: float = Field(0.1, ge=0, description="weight in the critic's loss")
    on: Literal["critic", "teacher"] = Field("critic", description="whose features the head reads")
    taps: int = Field(1, ge=1, description="how many layers are read")
    width: int = Field(64, ge=1)
    conditional: bool = Field(False, description="project the logit on the label")
    levels: NoiseSampler | None = Field(None, description="noise of the samples it sees; None: the match's own")
    r1: float = Field(0.0, ge=0, description="weight of the gradient penalty at real samples")
    r1_kind: Literal["exact", "difference"] = "exact"
    r1_step: float = Field(0.1, gt=0, description="of the difference, in units of the sample")
    r1_every: int = Field(1, ge=1, description="one critic turn in so many pays it, at so many times its weight")


class Adversary(nn.Module):
    """A head on the features of a denoiser, told real from fake at a noise level."""

    def __init__(self, denoiser: Denoiser, shape: tuple[int, ...], options: GanOptions, classes: int | None) -> None:
        super().__init__()
        self.options = options
        example = self.choose(denoiser, shape, options.taps)
        self.head = FeatureHead(example, options.width, classes if options.conditional else None)
        self.head.to(example[0].device, torch.promote_types(example[0].dtype, torch.float32))

    @staticmethod
    @torch.no_grad()
    def choose(denoiser: Any, shape: tuple[int, ...], count: int) -> Features:
        """Set the taps of the network inside a denoiser, and show what they give."""
        inner = denoiser
        while hasattr(inner, "inner"):
            inner = inner.inner
        if not hasattr(inner, "taps"):
            raise ValueError(f"{type(inner).__name__} has no features for an adversary to read: leave gan off")
        like = next(inner.parameters())
        x = torch.zeros(2, *shape, device=like.device, dtype=like.dtype)
        t = float(inner.path.time(torch.tensor(0.0)))
        if not inner.taps:
            inner.taps = choose_taps(inner.net, lambda: inner(x, t), count)
        features: Features = inner(x, t, None, "features")
        return features

    def forward(self, features: Features, cond: Cond = None) -> Tensor:
        """Logits [batch, 1], large for real."""
        logits: Tensor = self.head([f.to(torch.promote_types(f.dtype, torch.float32)) for f in features], cond)
        return logits

    def critic_loss(self, features: Features, cond: Cond) -> Tensor:
        """From the features of real, then fake samples in one batch; one value for each pair."""
        real, fake = self(features, cond).chunk(2)
        return discriminator_loss(real, fake)

    def penalty(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, rng: Source) -> Tensor:
        """R1 of each row, through the features to the noised real sample: ``r1 / 2 ||dD/dx_t||^2``."""

        def logits(x: Tensor) -> Tensor:
            return self(denoiser(x, t, cond, "features"), cond)

        if self.options.r1_kind == "exact":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # fused has no second derivative
                size = r1_penalty(logits, x_t)
        else:
            step = self.options.r1_step
            moved = x_t + step * normal(x_t, rng)
            both = self(
                denoiser(torch.cat([x_t, moved]), torch.cat([t, t]), join(cond, cond), "features"), join(cond, cond)
            )
            here, there = both.chunk(2)
            size = r1_by_difference(here, there, step)
        return self.options.r1 / 2 * self.options.r1_every * size


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Inside, calls of a module carry gradients to what it is given and none to its parameters.

    Another player's turn neither pays for them nor leaves any behind.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def one_in(count: int, rng: Source) -> bool:
    """True once in ``count`` turns on average; all processes agree."""
    shared = rng.shared if isinstance(rng, Rng) else rng
    return count == 1 or int(torch.randint(count, (1,), generator=shared, device=shared.device)) == 0


def same_path(path: Path, student: Student) -> None:
    """ValueError where student and teacher do not share a path."""
    if student.path != path:
        raise ValueError(f"student and teacher need one path, got {student.path!r} and {path!r}")
