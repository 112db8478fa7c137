"""Fit levels and history weights of a plan by gradient, through the sampler and a frozen network.

A deterministic plan in the data form is ``x_next = (sigma_next / sigma) x + whole sum_k share_k x0_k``: a start and
all guesses so far, ``whole`` being the weight of a guess that never changes. Levels and shares are the parameters;
the loss is the squared distance to the end of the exact flow from the same start, or another one of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cond import Cond, rows
from ..nets.skipping import leaving_out
from ..path import Path
from ..rng import mix
from ..solvers import SolverPlan, StepPlan, sample
from .journal import Journal

NUDGE = 0.01
"""Half the distance in lam over which a network's rate in time is taken, where autograd does not give it."""
GAP = 1e-3
"""Levels nearer than this in lam are one level asked twice."""


@dataclass(frozen=True)
class Pairs:
    """Starts at the path's noisiest level [n, *shape], their condition, and where the exact flow takes them.

    ``marks``: what an objective has worked out about the ends, once, rows first.
    """

    x: Tensor
    cond: Cond
    ends: Tensor
    marks: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.x[index], rows(self.cond, index), self.ends[index], tuple(m[index] for m in self.marks))


@dataclass(frozen=True)
class Fitting:
    """How weights are fitted: ``steps`` of Adam on ``batch`` starts, the rate falling like a cosine from ``rate``.

    ``at_once`` of them go through the sampler together, for memory's sake; it changes rounding alone.

    Every ``every`` steps the fit is scored on the validation starts; the best one is returned. Where ``patience``
    scores in turn were no better it goes back to the best and on at a quarter of the rate.
    """

    steps: int = 400
    batch: int = 128
    at_once: int = 128
    rate: float = 0.01
    every: int = 20
    patience: int = 4
    seed: int = 0


Squares = Callable[[Tensor, Pairs], Tensor]
"""(samples, pairs) -> [n], the loss of each sample; differentiable in the samples."""


def squares(samples: Tensor, pairs: Pairs) -> Tensor:
    """The mean squared distance to the end of the exact flow, sample by sample."""
    return (samples - pairs.ends).square().flatten(1).mean(1)


class Free:
    """A plan's levels and shares as parameters: the logs of the gaps in lam, and a triangle of shares."""

    def __init__(self, path: Path, plan: SolverPlan) -> None:
        plan = SolverPlan.of(path, plan.solver(), plan.times(path))
        self.path, self.count, self.end = path, plan.nfe, plan.end
        self.skips = [step.skip for step in plan.steps]
        self.first = plan.levels[0]
        start = path.t_max if self.first is None else float(path.time(self.first))
        self.top, self.low = float(path.lam(start)), float(path.lam(path.t_low))
        known = [lam for lam in plan.levels[1:] if lam is not None]
        self.anchored = math.isfinite(self.top)
        before = [self.top, *known] if self.anchored else known
        gaps = [math.log(max(b - a, 2 * GAP)) for a, b in zip(before[:-1], before[1:], strict=True)]
        self.levels = torch.tensor(gaps if self.anchored else [*known[:1], *gaps], dtype=torch.float64)
        self.shares = torch.tensor([w for step in plan.steps for w in step.weights or ()], dtype=torch.float64)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.levels, self.shares]

    def lams(self) -> Tensor:
        """lam of the calls after the first."""
        if not len(self.levels):
            return self.levels
        if self.anchored:
            return self.top + self.levels.exp().cumsum(0)
        return self.levels[0] + torch.cat([self.levels[:1] * 0, self.levels[1:].exp().cumsum(0)])

    @torch.no_grad()
    def hold(self) -> None:
        """Keep every level inside what the network was taught: gaps shrink where the last level leaves it."""
        over = self.low if self.end is None else min(self.low, self.end - GAP)
        lams = self.lams()
        if len(lams) and lams[-1] > over:
            base = self.top if self.anchored else min(float(lams[0]), over - GAP * self.count)
            if not self.anchored:
                self.levels[0] = base
            gaps = self.levels if self.anchored else self.levels[1:]
            if len(gaps):
                gaps += math.log((over - base) / float(gaps.exp().sum()))
        gaps = self.levels if self.anchored else self.levels[1:]
        gaps.clamp_(min=math.log(2 * GAP))

    def plan(self) -> SolverPlan:
        """The plan that gives these very samples."""
        values, steps, at = self.shares.tolist(), list[StepPlan](), 0
        for k in range(self.count):
            steps.append(StepPlan(weights=tuple(values[at : at + k + 1]), skip=self.skips[k]))
            at += k + 1
        return SolverPlan(levels=(self.first, *self.lams().tolist()), end=self.end, steps=tuple(steps))

    def run(self, model: Any, x: Tensor, cond: Cond, timed: bool) -> Tensor:
        """The sampler, differentiable in the parameters; ``timed``: the network is differentiable in time."""
        path, lams = self.path, self.lams()
        start = path.t_max if self.first is None else float(path.time(self.first))
        coefs = path.coefs(start)
        alpha, sigma, guesses, at = coefs.alpha, coefs.sigma, list[Tensor](), 0
        for k in range(self.count):
            with leaving_out(model, self.skips[k]):
                if k == 0:
                    guesses.append(model(x, start, cond, "x0"))
                else:
                    guesses.append(asked(model, path, x, lams[k - 1], cond, timed))
            if k + 1 < self.count:
                ahead = path.coefs(path.time(lams[k]))
            else:
                ahead = path.coefs(path.t_min if self.end is None else float(path.time(self.end)))
            keep = ahead.sigma / sigma
            whole = ahead.alpha - alpha * keep
            x = x * keep
            for share, guess in zip(self.shares[at : at + k + 1], reversed(guesses), strict=True):
                x = x + guess * (share * whole)
            at += k + 1
            alpha, sigma = ahead.alpha, ahead.sigma
        return x


def asked(model: Any, path: Path, x: Tensor, lam: Tensor, cond: Cond, timed: bool) -> Tensor:
    """The guess of x0 at a level, with its rate in the level: by autograd, or by a central difference."""
    if timed or not torch.is_grad_enabled():
        guess: Tensor = model(x, path.time(lam) if timed else float(path.time(lam)), cond, "x0")
        return guess
    level = float(lam.detach())
    guess = model(x, float(path.time(level)), cond, "x0")
    return guess + rate(model, path, x, level, cond) * (lam - level)


@torch.no_grad()
def rate(model: Any, path: Path, x: Tensor, lam: float, cond: Cond) -> Tensor:
    """d x0 / d lam of the network's guess, by a central difference inside the path."""
    high, low = (min(lam + NUDGE, float(path.lam(path.t_low))), lam - NUDGE)
    times = [float(path.time(v)) for v in (high, low)]
    near, far = (model(x.detach(), t, cond, "x0") for t in times)
    found: Tensor = (near - far) / float(path.lam(times[0]) - path.lam(times[1]))
    return found


def differentiable(model: Any, path: Path, pairs: Pairs) -> tuple[bool, bool]:
    """Whether gradients flow through the network to its sample, and whether autograd knows its rate in time."""
    few = pairs.rows(slice(0, 4))
    x = few.x.clone().requires_grad_()
    level = (max(float(path.lam(path.t_max)), -2.0) + min(float(path.lam(path.t_low)), 2.0)) / 2
    lam = torch.tensor(level, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        try:
            guess = model(x, path.time(lam), few.cond, "x0")
            probe = torch.linspace(-1, 1, guess.numel()).view_as(guess).to(guess)
            by_x, by_lam = torch.autograd.grad((guess * probe).sum(), (x, lam), allow_unused=True)
        except (RuntimeError, NotImplementedError):
            by_x, by_lam = None, None
        if by_x is None:  # perhaps it takes no tensor for a time
            try:
                guess = model(x, float(path.time(level)), few.cond, "x0")
                (by_x,) = torch.autograd.grad(guess.sum(), (x,), allow_unused=True)
            except (RuntimeError, NotImplementedError):
                return False, False
            return by_x is not None and bool(by_x.isfinite().all()), False
    if by_lam is None:
        return True, False
    measured = float((rate(model, path, few.x, level, few.cond) * probe).sum())
    return True, abs(float(by_lam) - measured) <= 0.05 * abs(measured) + 1e-6


def fit(
    model: Any,
    plan: SolverPlan,
    train: Pairs,
    valid: Pairs,
    options: Fitting | None = None,
    *,
    loss: Squares = squares,
    journal: Journal | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> tuple[SolverPlan, float]:
    """A plan fitted from a first one, and its mean loss on the validation starts.

    Never worse there than the plan it begins with. ``tell(step, best)`` hears of every step. The parameters are
    float64, samples keep their own type. Raises ValueError where no gradient flows through the network.
    """
    options, journal = options or Fitting(), journal or Journal()
    path = model.path
    able, timed = differentiable(model, path, train)
    if not able:
        raise ValueError("no gradient flows through this network: its plans can be searched, not fitted")
    free = Free(path, plan)
    best, least, stale = free.plan(), error(model, plan, valid, loss, options.at_once), 0
    moments = [torch.zeros_like(p) for p in (*free.parameters, *free.parameters)]
    kept, slow, since = [p.tolist() for p in (*free.parameters, *moments)], 1.0, 0
    frozen = [p for p in getattr(model, "parameters", list)() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        for step in range(options.steps):
            state = journal.answer(
                f"{mix(plan.model_dump_json())} fit {step}",
                lambda step=step, since=since, slow=slow: _step(  # type: ignore[misc]
                    model, free, moments, train, timed, loss, options, step, since, slow
                ),
            )
            _restore(free, moments, state)
            last = step + 1 == options.steps
            if (step + 1) % options.every == 0 or last:
                now = free.plan()
                found = journal.answer(
                    f"{mix(now.model_dump_json())} valid",
                    lambda now=now: _finite(error(model, now, valid, loss, options.at_once)),  # type: ignore[misc]
                )
                stale += 1
                if found is not None and found < least:
                    best, least, stale = now, found, 0
                    kept = [*(p.tolist() for p in free.parameters), *(torch.zeros_like(m).tolist() for m in moments)]
            if tell is not None:
                tell(step + 1, least)
            if stale >= options.patience:
                _restore(free, moments, kept)
                stale, since, slow = 0, step + 1, slow / 4
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return best, least


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def error(model: Any, plan: SolverPlan, pairs: Pairs, loss: Squares = squares, batch: int = 512) -> float:
    """The mean loss of a plan's samples: by default their mean squared distance to the ends."""
    total = 0.0
    for at in range(0, len(pairs), batch):
        part = pairs.rows(slice(at, at + batch))
        total += float(loss(sample(model, part.x, plan, cond=part.cond), part).double().sum())
    return total / len(pairs)


def _step(
    model: Any, free: Free, moments: list[Tensor], train: Pairs, timed: bool, loss: Squares, options: Fitting,
    step: int, since: int, slow: float,
) -> list[list[float]]:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015), on rows that are a function of the seed and the step.

    Its moments began at step ``since``; ``slow`` is the part of the rate that is taken.
    """
    rng = torch.Generator().manual_seed(mix(options.seed, "fit", step))
    batch = min(options.batch, len(train))
    pick = torch.randperm(len(train), generator=rng)[:batch]
    pick = pick.to(train.x.device)
    parameters = [p.detach().clone().requires_grad_() for p in free.parameters]
    held, (free.levels, free.shares) = free.parameters, parameters
    gradients: list[Tensor | None] = [None for _ in parameters]
    for some in pick.split(options.at_once):
        part = train.rows(some)
        with torch.enable_grad():
            mean = loss(free.run(model, part.x, part.cond, timed), part).sum() / batch
            found = torch.autograd.grad(mean, parameters, allow_unused=True)
        gradients = [a if b is None else b if a is None else a + b for a, b in zip(gradients, found, strict=True)]
    free.levels, free.shares = held
    rate_now, age = slow * options.rate * (1 + math.cos(math.pi * step / options.steps)) / 2, step + 1 - since
    count = len(parameters)
    for k, (value, gradient) in enumerate(zip(free.parameters, gradients, strict=True)):
        if gradient is None or not gradient.isfinite().all():
            continue
        first, second = moments[k], moments[count + k]
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        unbiased = first / (1 - 0.9**age)
        value -= rate_now * unbiased / ((second / (1 - 0.99**age)).sqrt() + 1e-12)
    free.hold()
    return [v.tolist() for v in (*free.parameters, *moments)]


def _restore(free: Free, moments: list[Tensor], state: list[list[float]]) -> None:
    for value, known in zip((*free.parameters, *moments), state, strict=True):
        value.copy_(torch.tensor(known, dtype=torch.float64))


__all__ = ["Fitting", "Free", "Pairs", "error", "fit"]
