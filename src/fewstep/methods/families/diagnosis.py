"""What a game of distribution matching says of itself: how far the laws are, how far behind the critic, how told apart.

Nothing here is trained on. It is asked rarely, on one batch, in evaluation mode and without a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...cond import rows
from ...denoiser import Denoiser, Guided
from ...method import Batch
from ...path import normal
from ...rng import Source
from .score_gap import ratio_of, ratio_weight, rollout

if TYPE_CHECKING:
    from .matching import Matching

LEVELS = 6
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SUPPORT = 2048
"""Fresh samples of the student that stand for its law, where they can."""
SMALL = 4
"""Numbers in a sample, at most, for that."""
NEAR = 16.0
"""Samples that a posterior mean must rest on, else it is not said."""


@torch.no_grad()
def diagnose(
    method: Matching, batch: Batch, rng: Source, *, lams: Tensor | None = None, law: Denoiser | None = None
) -> dict[str, Any]:
    """Figures of a game on one batch, as plain numbers.

    ``levels``, from noisy to clean; at each half log-SNR ``lam``, with y = (alpha / sigma) (critic - target), which is
    the difference of the two predicted noises, and x the student's samples there:

    - ``gap``: root mean square of y; 0 where both networks agree.
    - ``behind``: ``E<critic - x, y> / E<critic - target, y>``, the share of the gap that is the critic's own error; its
      standard error is ``behind_error``. By the tower rule ``E<critic - x, y> = E<critic - optimal, y>``, whatever
      function of x_t y is, so that no optimum need be known; it sees the error along the gap alone. 0: what is
      shown is true; 1: none of it is; below 0: the true gap is larger than the one shown.
    - ``lag``: root mean square of ``(alpha / sigma) (critic - optimal)``, where the optimal critic is known: from
      ``law``, or, for samples of few numbers, from many fresh ones (the mean square error of that is taken off, and
      what does not stand out of it is None).

    ``kl``: the integral of gap^2 over lam, summed over a sample's numbers: what the critic takes the student's
    KL(student, teacher) to be at the cleanest level beyond that at the noisiest, in nats (along the diffusion
    ``d KL / d lam = E |y|^2``, de Bruijn's identity). None where the target is guided. ``ratio``: quantiles of the
    adversary's density ratio at the student's samples, the share of them that is clipped, the share of real and
    generated ones that it tells right, and the spread of the weights h(r); None without an adversary.
    """
    training = method.training
    method.eval()
    try:
        anchors = _anchors(method, batch, rng)
        lams = _lams(method, batch.noise, rng) if lams is None else lams
        points = None if law is not None else _support(method, batch, rng)
        levels = [_level(method, float(lam), anchors, rng, law, points) for lam in lams]
        known = [level for level in levels if level["gap"] is not None]
        kl = None
        if method.options.guidance == 1 and len(known) > 1:
            at, square = (torch.tensor([f(v) for v in known]) for f in (lambda v: v["lam"], lambda v: v["gap"] ** 2))
            kl = float(torch.trapezoid(square, at)) * batch.noise[0].numel()
        return {"levels": levels, "kl": kl, "ratio": _ratio(method, anchors, batch, rng)}
    finally:
        method.train(training)


def _anchors(method: Matching, batch: Batch, rng: Source) -> list[tuple[Any, Any]]:
    """Samples of the student as the game meets them: each part of the batch from a step of its own draw."""
    steps = method.options.steps
    found = []
    for part in torch.arange(len(batch)).chunk(steps):
        cond = rows(batch.cond, part)
        noise = batch.noise[part]
        found.append((rollout(method.student, noise, cond, rng, False, steps, method.options.stop), cond))
    return found


def _lams(method: Matching, like: Tensor, rng: Source) -> Tensor:
    """Even levels over the middle nine tenths of those that are matched."""
    drawn = method.options.levels.on(method.student.path)(like.new_empty(2048, 1), rng)
    lam = method.student.path.lam(drawn.double()).cpu()
    low, high = torch.quantile(lam[lam.isfinite()], torch.tensor([0.05, 0.95], dtype=lam.dtype)).tolist()
    return torch.linspace(low, high, LEVELS, dtype=torch.float64)


def _support(method: Matching, batch: Batch, rng: Source) -> Tensor | None:
    """Many samples [count, numbers] of a student without conditions, where they are small enough to be many."""
    student = method.student
    if batch.cond is not None or batch.noise[0].numel() > SMALL or method.options.steps > 1:
        return None
    return student.generate(normal(batch.noise.new_empty(SUPPORT, *student.shape), rng), None, rng).flatten(1)


def _level(
    method: Matching,
    lam: float,
    anchors: list[tuple[Any, Any]],
    rng: Source,
    law: Denoiser | None,
    points: Tensor | None,
) -> dict[str, Any]:
    path, options = method.student.path, method.options
    target = _target(method)
    size, along, miss, blur = [], [], [], []
    for anchor, cond in anchors:
        x = anchor.x
        t = path.time(torch.full((len(x),), lam, dtype=torch.float64)).to(x)
        if anchor.s > path.t_min and float(t[0]) <= anchor.s:
            continue
        x_t, clean = anchor.noised(path, t, normal(x, rng))
        own = method.critic(x_t, t, cond)
        fake = _guided(method.critic.denoiser, options.guidance)(x_t, t, cond) if options.guide_critic else own
        y = (fake - target(x_t, t, cond)).flatten(1).double()
        own, clean = own.flatten(1).double(), clean.flatten(1).double()
        size.append(y.square().sum(1))
        along.append(((own - clean) * y).sum(1))
        optimal: tuple[Tensor, Tensor] | None = None
        if law is not None:
            optimal = (law(x_t, t, cond).flatten(1).double(), torch.zeros(len(x)).to(y))
        elif points is not None:
            optimal = _posterior(points.double(), x_t.flatten(1).double(), *_coefs(path, lam))
        if optimal is not None:
            miss.append((own - optimal[0]).square().mean(1))
            blur.append(optimal[1])
    alpha, sigma = _coefs(path, lam)
    level: dict[str, Any] = dict.fromkeys(("gap", "behind", "behind_error", "lag"))
    if size:
        shown, told = torch.cat(size), torch.cat(along)
        whole, count = float(shown.mean()), len(shown)
        level["gap"] = alpha / sigma * (whole / anchors[0][0].x[0].numel()) ** 0.5
        if whole > 1e-12:
            share = float(told.mean()) / whole
            level["behind"] = share
            level["behind_error"] = float((told - share * shown).std(correction=0)) / whole / max(count - 1, 1) ** 0.5
    if miss:
        square, error = float(torch.cat(miss).mean()), float(torch.cat(blur).mean())
        level["lag"] = alpha / sigma * (square - error) ** 0.5 if square >= 2 * error else None
    return {"lam": lam, **level}


def _guided(denoiser: Any, scale: float) -> Any:
    return denoiser if scale == 1 else Guided(denoiser, scale)


def _target(method: Matching) -> Any:
    """Whom the student follows now: the guided teacher, or a network on the way back to it."""
    if method.options.backtrack is not None and method.step >= method._still_steps():
        now = method._target()
        if any(now is one for one in method.way):
            return now
    return _guided(method.teacher, method.options.guidance)


def _coefs(path: Any, lam: float) -> tuple[float, float]:
    coefs = path.coefs(path.time(torch.tensor(lam, dtype=torch.float64)))
    return float(coefs.alpha), float(coefs.sigma)


def _posterior(points: Tensor, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor] | None:
    """``E[x | x_t]`` under samples [count, numbers], with the mean square error a number that their number leaves.

    None where too few samples are near: a mean over one or two of them is the memory of a set, not a law.
    """
    share = torch.softmax((alpha * (x_t @ points.T) - alpha**2 * points.square().sum(1) / 2) / sigma**2, 1)
    near = 1 / share.square().sum(1)
    if float(near.quantile(0.1)) < NEAR:
        return None
    mean = share @ points
    spread = (share @ points.square() - mean.square()).clamp(min=0).mean(1)
    return mean, spread / near


def _ratio(method: Matching, anchors: list[tuple[Any, Any]], batch: Batch, rng: Source) -> dict[str, Any] | None:
    adversary, gan, path = method.critic.adversary, method.options.gan, method.student.path
    if adversary is None or gan is None:
        return None
    reads = method.critic if gan.on == "critic" else method.teacher

    def logits(x: Tensor, cond: Any) -> Tensor:
        u = (gan.levels or method.options.levels).on(path)(x, rng)
        seen: Tensor = adversary(reads(path.corrupt(x, u, normal(x, rng)), u, cond, "features"), cond)
        return seen.float().flatten(1).mean(1)

    fake = torch.cat([logits(anchor.x, cond) for anchor, cond in anchors])
    real = logits(batch.data, batch.cond)
    low, high = method.options.ratio_range
    free, held = ratio_of(fake[:, None], 0.0, float("inf")), ratio_of(fake[:, None], low, high)
    weight, places = ratio_weight(method.options.divergence, held), torch.tensor(QUANTILES).to(free)
    return {
        "quantiles": dict(zip(map(str, QUANTILES), torch.quantile(free, places).tolist(), strict=True)),
        "clipped": float(((free < low) | (free > high)).float().mean()),
        "told": float(((fake < 0).float().mean() + (real > 0).float().mean()) / 2),
        "weights_spread": float(weight.std(correction=0)),
    }
