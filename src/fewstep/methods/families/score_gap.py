"""The engine of distribution matching: move samples along the gap between two denoisers.

With r = p_teacher / p_student at a noise level, an f-divergence of the noised laws has the gradient
``E[h(r) (score_student - score_teacher) dx_t/dtheta]``, ``h(r) = r^2 f''(r)``. Along the diffusion the divergence is
the integral of ``g^2 / 2 E[h(r) ||score_student - score_teacher||^2]``: the distance that ``fisher`` descends. Papers
are choices of h, of the order, of the weight over levels, of guidance, of the roll-out, and of what is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ...cond import Cond, join
from ...denoiser import Denoiser, Features, choose_taps, inner_of
from ...losses import batch_mean, discriminator_loss, r1_by_difference, r1_penalty
from ...nets.heads import FeatureHead
from ...part import Part
from ...path import Coefs, NoiseSampler, Path, column, normal
from ...rng import Rng, Source
from ...student import Student

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_rkl", "jeffreys", "hellinger", "chi2", "neyman"
]

# h(r) = r^2 f''(r) of D_f = E_student[f(r)], r = p_teacher / p_student
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (r + 1),
    "softened_rkl": lambda r: 1 / (r + 1),
    "jeffreys": lambda r: 1 + r,
    "hellinger": lambda r: torch.sqrt(r) / 2,
    "chi2": lambda r: 2 * r**2,
    "neyman": lambda r: 1 / r,
}

# h'(r)
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.zeros_like,
    "forward_kl": torch.ones_like,
    "jensen_shannon": lambda r: 1 / (r + 1) ** 2,
    "softened_rkl": lambda r: -1 / (r + 1) ** 2,
    "jeffreys": torch.ones_like,
    "hellinger": lambda r: 1 / (4 * torch.sqrt(r)),
    "chi2": lambda r: 4 * r,
    "neyman": lambda r: -1 / r**2,
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
    "neyman": lambda r: (1 / r - 1) / 2,
}


def ratio_of(logit: Tensor, low: float = 0.1, high: float = 20.0) -> Tensor:
    """The density ratio of each row, from an adversary's logit log r [batch, ...], held to [low, high]: [batch].

    Means over places are taken of the logit (f-distill's code: clamped to +-10 before).
    """
    return torch.exp(logit.float().flatten(1).mean(1).clamp(-10, 10)).clamp(low, high)


def ratio_weight(divergence: str, ratio: Tensor) -> Tensor:
    """``h(r)`` of each row over its batch mean; no gradient."""
    weight = DIVERGENCES[divergence](ratio.detach())
    return weight / batch_mean(weight).clamp(min=1e-8)


class RatioBins(nn.Module):
    """Divides each row's density ratio by the running mean of its bin of noise levels (f-distill).

    The mean of p_teacher / p_student over the student's samples is 1 at every level; an adversary's is not, and the
    weights of one level must not drown those of another. Bins are even in ``Path.straight``. This batch counts for
    ``1 - decay``; ``settle`` keeps what the last call found, so that a loss stays a function of its batch.
    """

    def __init__(self, count: int, decay: float) -> None:
        super().__init__()
        self.decay, self.found = decay, None
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(count))  # 0: nothing was seen there yet

    found: Tensor | None

    def forward(self, ratio: Tensor, level: Tensor) -> Tensor:
        """The divided ratio; ratio, level in [0, 1]: [batch]."""
        count = len(self.mean)
        place = (level * count).long().clamp(0, count - 1)
        inside = torch.nn.functional.one_hot(place, count).to(ratio)
        share, total = batch_mean(torch.stack([inside, inside * ratio.detach()[:, None]], 1), each=True)
        now, old = total / share.clamp(min=1e-12), self.mean.to(ratio)
        mixed = torch.where(old > 0, self.decay * old + (1 - self.decay) * now, now)
        self.found = torch.where(share > 0, mixed, old)
        return ratio / self.found[place]

    @torch.no_grad()
    def settle(self) -> None:
        if self.found is not None:
            self.mean.copy_(self.found)


def gap(x: Tensor, fake: Tensor, real: Tensor, normalise: bool = True) -> Tensor:
    """The direction that raises the divergence: ``fake - real``, guesses of x0 by critic and teacher.

    Equal to ``(sigma^2 / alpha) (score_student - score_teacher)``. ``normalise`` divides each row by the
    mean size of the teacher's error, ``mean |x - real|`` (DMD, eq. 8), so that every level counts alike.
    """
    direction = fake - real
    if normalise:
        direction = direction / column(error_size(x, real), x)
    return torch.nan_to_num(direction)


def error_size(x: Tensor, real: Tensor) -> Tensor:
    """The mean size of the teacher's error in each row: [batch]."""
    return (x - real).abs().flatten(1).mean(1).clamp(min=1e-6)


def fisher(clean: Tensor, fake: Tensor, real: Tensor, c: float = 0.0, a: float = 1.0) -> Tensor:
    """A loss a row whose gradient lowers the distance of the two scores, with no derivative of the critic's weights.

    ``(1 - a) ||y||^2 - <y, fake - clean>`` with ``y = fake - real``, guesses of x0 by critic and teacher at a noised
    x, and ``clean`` what the critic would have been shown there (``Anchor.noised``). Times ``2 alpha^2 / sigma^4`` it
    has the gradient of ``E ||score_student - score_teacher||^2``: all of it at a = 1/2, with the density of the samples
    held still at a = 1, which is score implicit matching (Luo et al. 2024, Theorem 3.1); SiD takes a = 1.2 (Zhou et al.
    2024). The gradient goes through the sample, through the noised sample and so through the *inputs* of both networks:
    nothing is stopped. ``c > 0``, for a = 1 alone, is the pseudo-Huber distance: ``y / sqrt(||y||^2 + c^2)`` for y.
    """
    y = (fake - real).flatten(1)
    along, size = (y * (fake - clean).flatten(1)).sum(1), y.square().sum(1)
    if c > 0:
        if a != 1:
            raise ValueError(f"the robust distance holds the density still: it needs a = 1, got {a:g}")
        return -along / torch.sqrt(size + c**2)
    return -along if a == 1 else (1 - a) * size - along


RatioGradient = Literal["weight", "exact", "stop", "paper"]
"""``weight``: h multiplies the loss of reverse KL; the others: see ``weighted_fisher``."""


def weighted_fisher(
    x_t: Tensor,
    clean: Tensor,
    fake: Tensor,
    real: Tensor,
    ratio: Tensor,
    divergence: str,
    gradient: RatioGradient = "exact",
) -> Tensor:
    """``fisher`` of another divergence, ``E h(r) ||score_student - score_teacher||^2``; a loss a row.

    ``(h - r h') / 2 ||y||^2 - h <y, fake - clean>``, the ratio [batch] a differentiable function of x_t: exact, because
    ``dr/dx_t = -r (score_student - score_teacher)``, and the same as ``fisher`` at a = 1/2 where h = 1 (Uni-Instruct,
    Wang et al. 2025). ``stop`` holds the ratio still, which is not exact: it moves means rightly and spreads wrongly.
    ``paper`` adds to ``stop`` the correction that the published code is read to have, ``r^2 h'' ||y|| y`` at x_t, one
    power of ``||y||`` short of the exact one and nothing for forward KL. Rows are over the batch
    mean of h.
    """
    r = ratio if gradient == "exact" else ratio.detach()
    y = (fake - real).flatten(1)
    along, size = (y * (fake - clean).flatten(1)).sum(1), y.square().sum(1)
    h, slope = DIVERGENCES[divergence](r), SLOPES[divergence](r)
    loss = (h - r * slope) / 2 * size - h * along
    if gradient == "paper":
        curve = torch.func.vmap(torch.func.grad(SLOPES[divergence]))(r)
        push = (r**2 * curve * size.sqrt() / 2).detach()
        loss = loss + push * (y.detach() * x_t.flatten(1)).sum(1)
    return loss / batch_mean(h.detach()).clamp(min=1e-8)


class Anchor(NamedTuple):
    """Where a roll-out stops: the sample [batch, *shape] at time ``s``, and the student's guess of the clean one."""

    x: Tensor
    s: float
    guess: Tensor

    def noised(self, path: Path, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, clean): the sample taken on to the noisier t [batch], and the target of a critic there.

        ``clean`` is the unbiased target of a denoiser of the law of x_t that never saw a clean sample,
        ``x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_ts) eps`` with ``sigma_ts`` the noise added between s
        and t: its conditional mean is ``(x_t + sigma_t^2 score) / alpha_t``. At s = 0 it is the sample itself.
        """
        if self.s <= path.t_min:
            return path.corrupt(self.x, t, eps), self.x
        keep, added, here, there = self._between(path, t)
        noise = there.alpha * here.sigma**2 / (here.alpha**2 * added)
        x_t = column(keep.to(eps), eps) * self.x + column(added.to(eps), eps) * eps
        return x_t, self.x / float(here.alpha) - column(noise.to(eps), eps) * eps

    def share(self, path: Path, t: Tensor) -> Tensor | float:
        """``sigma_ts^2 / sigma_t^2``: the factor that keeps the critic's loss bounded as t comes down to s."""
        if self.s <= path.t_min:
            return 1.0
        _, added, _, there = self._between(path, t)
        return ((added / there.sigma) ** 2).to(t)

    def keep(self, path: Path, t: Tensor) -> Tensor:
        """``dx_t / dx_s = alpha_t / alpha_s`` of each row: [batch]."""
        return (path.coefs(t).alpha / path.coefs(self.s).alpha).to(t)

    def above(self, path: Path, t: Tensor) -> Tensor:
        """Drawn times brought into (s, t_max], in proportion."""
        if self.s <= path.t_min:
            return t
        low = self.s + 1e-3 * (path.t_max - self.s)
        return low + (t - path.t_min) * (path.t_max - low) / (path.t_max - path.t_min)

    def _between(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor, Coefs, Coefs]:
        here, there = path.coefs(self.s), path.coefs(t)
        keep = there.alpha / here.alpha
        return keep, torch.sqrt((there.sigma**2 - keep**2 * here.sigma**2).clamp(min=1e-12)), here, there


Stop = Literal["clean", "next"]


def rollout(
    student: Student,
    noise: Tensor,
    cond: Cond,
    rng: Source,
    grad: bool,
    steps: int,
    stop: Stop = "clean",
    phase: range | None = None,
) -> Anchor:
    """A sample of the student, as it will be asked for one.

    With several steps one of them is drawn; the student's own earlier steps make its input without a
    gradient (backward simulation, DMD2 Sec. 4.5), so that training and use meet the same inputs. It stops at the
    ``clean`` guess of that step, or at the ``next`` time of a student that follows the flow (TDM, Sec. 4.1).
    ``phase``: nothing is drawn; it stops where these steps of such a student end, and all of them carry a gradient
    (Phased DMD).
    """
    times, path, x = student.times(steps), student.path, student.start_scale * noise
    if phase is not None:
        first, last, stop = phase.start, phase.stop - 1, "next"
    else:
        first = last = 0
        if len(times) > 1:
            shared = rng.shared if isinstance(rng, Rng) else rng
            first = last = int(torch.randint(len(times), (1,), generator=shared, device=shared.device))
    for i in range(last):
        with torch.set_grad_enabled(grad and i >= first):
            if student.policy == "renoise":
                x = path.corrupt(student(x, times[i], path.t_min, cond), times[i + 1], normal(x, rng))
            else:
                x = student(x, times[i], times[i + 1], cond)
    with torch.set_grad_enabled(grad):
        if stop == "clean" or last == len(times) - 1:
            sample: Tensor = student(x, times[last], path.t_min, cond, "x0")
            return Anchor(sample, path.t_min, sample)
        t, s = times[last], times[last + 1]
        slope = student(x, t, s, cond, path.slope)
        return Anchor(path.move(x, slope, t, s), s, path.convert(slope, x, t, path.slope, "x0"))


def phase_of(steps: int, phases: int, phase: int) -> range:
    """The steps of one of a number of phases, counted from 1: as even as can be.

    >>> [list(phase_of(5, 2, k)) for k in (1, 2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(steps * (phase - 1) // phases, steps * phase // phases)


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
        inner = inner_of(denoiser)
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
