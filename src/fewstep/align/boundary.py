"""One start for a whole task: the noise that serves reference pairs best, used for every input.

Ma et al. 2023, Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image Super-Resolution,
https://arxiv.org/abs/2305.15357.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..cond import Cond, rows
from ..cond import count as count_of
from ..errors import Refused
from ..part import Part
from ..rng import Source, normal
from ..student import Student
from .noise import Generator, on_shell

Distance = Callable[[Tensor, Tensor], Tensor]


class StartOptions(Part):
    """How the start is looked for."""

    candidates: int = Field(1000, ge=2, description="noises that are tried")
    rounds: int = Field(0, ge=0, description="of local moves around the best, after that")
    parents: int = Field(4, ge=1, description="of a round")
    moves: int = Field(8, ge=1, description="around each parent in a round")
    reach: float = Field(0.5, gt=0, allow_inf_nan=False, description="length of a move, in lengths; halved every round")
    hold_out: float = Field(0.2, gt=0, lt=1, description="share of the pairs kept to report on, where none are given")
    compared: int = Field(200, ge=2, description="candidates that are measured on the held-out pairs beside the chosen")
    batch: int = Field(1024, ge=1, description="rows at a time")


@dataclass(frozen=True)
class Start:
    """The chosen noise [1, *shape], with ``||z|| = sqrt(d)``, and how it did where it was not chosen.

    ``losses`` [candidates] on the reference pairs; ``loss`` of the chosen there. On the held-out pairs: ``held_out``
    of the chosen, ``others`` [compared] of the first candidates, in the order of ``losses``.
    """

    noise: Tensor
    losses: Tensor
    loss: float
    held_out: float
    others: Tensor

    @property
    def gain(self) -> float:
        """The share by which the chosen noise is below the average noise on the held-out pairs."""
        return 1 - self.held_out / float(self.others.mean())

    @property
    def rank(self) -> float:
        """The share of the other candidates that do better on the held-out pairs: 0 is the best of all."""
        return float((self.others < self.held_out).double().mean())

    @property
    def correlation(self) -> float:
        """Spearman's, between the candidates' losses on both sets: near 0 there is nothing to choose by."""
        pair = torch.stack([self.losses[: len(self.others)], self.others]).argsort(1).argsort(1).double()
        return float(torch.corrcoef(pair)[0, 1])

    def repeat(self, count: int) -> Tensor:
        """The same start for ``count`` inputs: [count, *shape]."""
        return self.noise.expand(count, *self.noise.shape[1:])


def choose_start(
    generator: Student | Generator,
    cond: Cond,
    reference: Tensor,
    distance: Distance,
    options: StartOptions | None = None,
    *,
    rng: Source,
    steps: int = 1,
    shape: tuple[int, ...] | None = None,
    held_out: tuple[Cond, Tensor] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Start:
    """The start that a deterministic generator does best with, over reference pairs.

        z* = argmin_k  mean_i distance(G(z_k, cond_i), reference_i)        z_k ~ N(0, I), ||z_k|| = sqrt(d)

    What is good for one input is good for others where the answer is nearly determined: restoration, super-resolution.
    It takes away all variety, so a distance to a reference is asked for and there is no other way. All candidates are
    of one length, because under a squared error the shortest noise would win whatever its direction.

    Parameters
    ----------
    generator: a ``Student``, asked for ``steps`` steps, or a function ``(noise, cond) -> x``; deterministic.
    cond, reference: the pairs; ``distance(x, reference) -> [batch]``, lower is better, best a perceptual one.
    shape: of one noise; None: the reference's.
    held_out: other pairs to report on; None: a share of these is kept aside for it.
    watch: hears (rows done, rows in all).

    Raises Refused for a generator that draws noise of its own, and for too few pairs.
    """
    o = options or StartOptions()
    generate = _asked(generator, steps)
    if count_of(cond) not in (None, len(reference)):
        raise Refused(f"{count_of(cond)} conditions for {len(reference)} references: they come in pairs")
    if held_out is None:
        kept = max(1, round(o.hold_out * len(reference)))
        if len(reference) - kept < 1:
            raise Refused(f"{len(reference)} reference pair(s): give at least 2, one of them to report on")
        held_out = rows(cond, slice(-kept, None)), reference[-kept:]
        cond, reference = rows(cond, slice(0, -kept)), reference[:-kept]
    like = reference.new_empty(o.candidates, *(shape or reference.shape[1:]))
    candidates = on_shell(normal(like, rng))
    moves, compared = o.rounds * o.parents * o.moves, min(o.compared, o.candidates)
    total = (o.candidates + moves) * len(reference) + (compared + 1) * len(held_out[1])
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if watch is not None:
            watch(done, total)

    with torch.no_grad():
        one = candidates[:1].expand(min(4, len(reference)), *candidates.shape[1:])
        few = rows(cond, slice(0, len(one)))
        if not torch.equal(generate(one, few), generate(one, few)):
            raise Refused(
                "the generator gives another sample each time: one start can be chosen for an ODE sampler alone"
            )
        losses = _losses(generate, candidates, cond, reference, distance, o.batch, tell)
        pool, scores, reach = candidates, losses, o.reach
        for _ in range(o.rounds):
            best = scores.argsort()[: o.parents]
            pool, scores = pool[best], scores[best]
            near = pool.repeat_interleave(o.moves, 0)
            near = on_shell(near + reach * normal(near, rng))
            pool = torch.cat([pool, near])
            scores = torch.cat([scores, _losses(generate, near, cond, reference, distance, o.batch, tell)])
            reach /= 2
        chosen = pool[scores.argmin()][None]
        apart = _losses(generate, torch.cat([chosen, candidates[:compared]]), *held_out, distance, o.batch, tell)
    return Start(chosen, losses, float(scores.min()), float(apart[0]), apart[1:])


def _asked(generator: Student | Generator, steps: int) -> Generator:
    if not isinstance(generator, Student):
        return generator
    student = generator
    student.times(steps)
    if student.policy == "renoise" and steps > 1:
        raise Refused(f"this student renoises between its {steps} steps, so its start decides little: take steps = 1")
    return lambda noise, cond: student.generate(noise, cond, steps=steps)


def _losses(
    generate: Generator,
    noises: Tensor,
    cond: Cond,
    reference: Tensor,
    distance: Distance,
    batch: int,
    tell: Callable[[int], None],
) -> Tensor:
    """The mean distance of every noise over all pairs: [noises], float64."""
    pairs = len(reference)
    sums = torch.zeros(len(noises), dtype=torch.float64)
    for part in torch.arange(len(noises) * pairs).split(batch):
        which, pair = part // pairs, (part % pairs).to(reference.device)
        x = generate(noises[which.to(noises.device)], rows(cond, pair))
        value = distance(x, reference[pair])
        if value.shape != x.shape[:1]:
            raise Refused(f"the distance must give one number a row, [{len(x)}], got {list(value.shape)}")
        sums.index_add_(0, which, value.double().cpu())
        tell(len(part))
    if not bool(sums.isfinite().all()):
        raise Refused("the distance is not finite for every candidate: look at its inputs' range")
    return sums / pairs
