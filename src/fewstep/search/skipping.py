"""Which residual blocks each call of a plan can do without, within a budget of FLOPs.

AutoDiffusion's second stage (Li et al. 2023, https://arxiv.org/abs/2309.10438): the times are there, now the layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cond import Cond, rows
from ..errors import Refused
from ..nets.skipping import flops, skippable
from ..rng import mix
from ..solvers import SolverPlan, sample, start_noise
from .evolve import Evolution, Space, evolve
from .journal import Journal

Slot = tuple[int, str]
"""A step of the plan, and a block that its call leaves out."""
Mask = frozenset[Slot]
Judge = Callable[[Tensor, Tensor], float]
"""(samples, those of the whole network from the same starts) -> what is lost, lower is better."""


def apart(samples: Tensor, whole: Tensor) -> float:
    """The root mean square distance."""
    return float((samples - whole).square().mean().sqrt())


def masked(plan: SolverPlan, mask: Mask) -> SolverPlan:
    """The plan with these blocks left out at these steps, in place of any that it left out before."""
    steps = tuple(
        step.model_copy(update={"skip": tuple(sorted(name for at, name in mask if at == i))})
        for i, step in enumerate(plan.steps)
    )
    return plan.model_copy(update={"steps": steps})


class MaskSpace(Space[Mask]):
    """Masks of at most a share ``keep`` of the FLOPs; ``harm`` is what leaving out a slot alone costs."""

    def __init__(
        self,
        plan: SolverPlan,
        whole: int,
        blocks: Mapping[str, int],
        keep: float,
        harm: Mapping[Slot, float],
        seed: int,
    ) -> None:
        self.slots = [(i, name) for i in range(plan.nfe) for name in blocks]
        self.cost = {slot: blocks[slot[1]] / (whole * plan.nfe) for slot in self.slots}
        self.keep, self.harm, self.seed = keep, dict(harm), seed
        least = 1 - sum(self.cost.values())
        if least > keep:
            raise Refused(f"keep = {keep:g} of the FLOPs, but {least:.3f} are outside the blocks that can be left out")

    def share(self, mask: Mask) -> float:
        """FLOPs over those of the whole network."""
        return 1 - sum(self.cost[slot] for slot in mask)

    def sound(self, genome: Mask) -> bool:
        return self.share(genome) <= self.keep + 1e-9

    def write(self, genome: Mask) -> str:
        return json.dumps(sorted(genome))

    def features(self, genome: Mask) -> list[float]:
        return [float(slot in genome) for slot in self.slots]

    def seeds(self) -> list[Mask]:
        """The slots of least harm for their FLOPs; the same with the harm blurred; and chance."""
        rng = random.Random(mix(self.seed, "masks"))
        blurred = [self._greedy(lambda s: self._price(s) * rng.lognormvariate(0, 0.7)) for _ in range(10)]
        return [self._greedy(self._price), self._greedy(lambda s: self.harm[s]), *blurred, *self.chance(8, rng)]

    def chance(self, count: int, rng: random.Random) -> list[Mask]:
        """Masks of the budget whose slots are drawn evenly."""
        return [self._greedy(lambda s: rng.random()) for _ in range(count)]

    def mutate(self, genome: Mask, rng: random.Random) -> Mask:
        mask = set(genome)
        for _ in range(rng.choice((1, 1, 2, 3))):
            slot = rng.choice(self.slots)
            mask.symmetric_difference_update({slot})
            if rng.random() < 0.5 and mask:
                mask.discard(rng.choice(sorted(mask)))
        return self._within(mask, rng)

    def cross(self, one: Mask, other: Mask, rng: random.Random) -> Mask:
        """Every step as in one mask or in the other."""
        first = {i for i in {slot[0] for slot in self.slots} if rng.random() < 0.5}
        return self._within({s for s in one if s[0] in first} | {s for s in other if s[0] not in first}, rng)

    def _within(self, mask: set[Slot], rng: random.Random) -> Mask:
        """Brought under the budget by slots of little harm, and no further over it than needed."""
        free = [slot for slot in self.slots if slot not in mask]
        while not self.sound(frozenset(mask)):
            pick = min(rng.sample(free, min(3, len(free))), key=self._price)
            free.remove(pick)
            mask.add(pick)
        for slot in sorted(mask, key=self._price, reverse=True):
            if self.sound(frozenset(mask - {slot})) and rng.random() < 0.7:
                mask.remove(slot)
        return frozenset(mask)

    def _price(self, slot: Slot) -> float:
        return self.harm[slot] / self.cost[slot]

    def _greedy(self, value: Callable[[Slot], float]) -> Mask:
        mask: set[Slot] = set()
        for slot in sorted(self.slots, key=value):
            if self.sound(frozenset(mask)):
                break
            mask.add(slot)
        return frozenset(mask)


@dataclass(frozen=True)
class Pruned:
    """A plan that leaves blocks out, and what that costs on starts that did not choose it.

    ``flops``: over the whole network's. ``loss`` on the starts of the search; on fresh ones ``held_out``, and
    ``chance``: the losses of masks of the same budget drawn at random.
    """

    plan: SolverPlan
    flops: float
    loss: float
    held_out: float
    chance: tuple[float, ...]


@torch.no_grad()
def prune(
    model: Any,
    plan: SolverPlan,
    noise: Tensor,
    cond: Cond = None,
    *,
    keep: float = 0.9,
    judge: Judge = apart,
    options: Evolution | None = None,
    journal: Journal | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> Pruned:
    """The blocks to leave out at each call of a plan so that at most ``keep`` of the FLOPs are left.

    ``noise`` [n, *shape] is standard normal; the first ``options.starts`` rows choose, the rest, at least as many,
    report. ``judge`` says what is lost against the whole network's samples, by default the distance to them; a
    Fréchet distance to data stands there as well, if it reads another network than the one that measures. Raises
    Refused where the network has no blocks to leave out, or not enough of them.
    """
    options = options or Evolution(budget=300, starts=256, first=64)
    if not 0 < keep < 1:
        raise Refused(f"keep is a share of the FLOPs between 0 and 1, got {keep:g}")
    if len(noise) < 2 * options.starts:
        raise Refused(f"{len(noise)} starts: {options.starts} choose and as many report, give {2 * options.starts}")
    time = plan.times(model.path)[0]
    start = start_noise(model.path, time, noise)

    def drawn(mask: Mask, part: slice) -> Tensor:
        return sample(model, start[part], masked(plan, mask), cond=rows(cond, part))

    def once() -> Any:
        return model(start[:1], time, rows(cond, slice(0, 1)))

    blocks = skippable(model, once)
    if not blocks:
        raise Refused("the network has no residual blocks of equal shapes that could be left out")
    fresh = slice(options.starts, None)
    whole = drawn(frozenset(), slice(None))

    def score(mask: Mask, count: int) -> float:
        return judge(drawn(mask, slice(0, count)), whole[:count])

    book = journal or Journal()
    few = options.first
    slots = [(i, name) for i in range(plan.nfe) for name in blocks]
    calm = judge(whole[:few], whole[:few])
    harm = {s: max(book.answer(f"harm {s}", lambda s=s: score(frozenset([s]), few)) - calm, 0.0) for s in slots}  # type: ignore[misc]
    space = MaskSpace(plan, flops(once), blocks, keep, harm, options.seed)
    best = evolve(space, score, options, journal=book, tell=tell)[0]
    lots = space.chance(16, random.Random(mix(options.seed, "chance")))
    return Pruned(
        plan=masked(plan, best.genome),
        flops=space.share(best.genome),
        loss=best.score,
        held_out=judge(drawn(best.genome, fresh), whole[fresh]),
        chance=tuple(judge(drawn(mask, fresh), whole[fresh]) for mask in lots),
    )
