"""Which residual blocks each call of a plan can do without, within a budget of FLOPs.

AutoDiffusion's second stage (Li et al. 2023, https://arxiv.org/abs/2309.10438): the times are there, now the layers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import Refused
from ..nets.skipping import flops, skippable
from ..rng import mix
from ..solvers import SolverPlan
from .contest import Contest, Tell
from .evolve import Space, evolve
from .gradient import differentiable, fit
from .journal import Journal
from .objective import Distance, Judge

Slot = tuple[int, str]
"""A step of the plan, and a block that its call leaves out."""
Mask = frozenset[Slot]


def masked(plan: SolverPlan, mask: Mask) -> SolverPlan:
    """The plan with these blocks left out at these steps, in place of any that it left out before."""
    return plan.skipping([sorted(name for at, name in mask if at == i) for i in range(plan.nfe)])


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
    """A plan that leaves blocks out, and its score on starts that nothing was chosen on.

    ``flops``: over those of the whole network. ``score`` of the plan, ``whole`` of the plan that it began with, and
    ``chance`` of masks of the same budget drawn at random, in place of the found one.
    """

    plan: SolverPlan
    flops: float
    score: float
    whole: float
    chance: tuple[float, ...]


def prune(
    plan: SolverPlan,
    contest: Contest,
    *,
    keep: float = 0.9,
    journal: Journal | None = None,
    tell: Tell | None = None,
) -> Pruned:
    """Leave blocks out at each call of a plan, so that at most ``keep`` of the FLOPs are left and the score is least.

    First every slot is left out alone; evolution begins with the least harmful for their cost. Then levels and weights
    are fitted once more to what is left of the network, where a gradient flows and the fit is better on the validation
    starts. Objective and starts are the contest's, as in the search for the plan. Raises Refused where the network has
    no blocks to leave out, or not enough of them.
    """
    if not 0 < keep < 1:
        raise Refused(f"keep is a share of the FLOPs between 0 and 1, got {keep:g}")
    model, journal = contest.model, journal or Journal()
    say: Tell = tell or (lambda stage, done, total, best: None)
    train, valid, held = (
        Judge(model, pairs, contest.objective, contest.batch) for pairs in (contest.train, contest.valid, contest.held)
    )
    time, one = plan.times(model.path)[0], contest.train.rows(slice(0, 1))

    def once() -> Any:
        return model(one.x, time, one.cond)

    with torch.no_grad():
        blocks, whole = skippable(model, once), flops(once)
    if not blocks:
        raise Refused("the network has no residual blocks of equal shapes that could be left out")
    count = len(contest.train)
    evolution = replace(contest.evolution, starts=count, first=min(contest.evolution.first, count))

    def score(mask: Mask, starts: int | None = None) -> float:
        return train(masked(plan, mask), starts)

    slots = [(i, name) for i in range(plan.nfe) for name in blocks]
    calm, harm = score(frozenset(), evolution.first), dict[Slot, float]()
    for k, slot in enumerate(slots):
        alone = journal.answer(f"alone {slot}", lambda slot=slot: score(frozenset([slot]), evolution.first))  # type: ignore[misc]
        harm[slot] = max(alone - calm, 1e-6)
        say("blocks alone", k + 1, len(slots), calm)
    space = MaskSpace(plan, whole, blocks, keep, harm, evolution.seed)
    found = evolve(
        space, score, evolution, journal=journal,
        tell=lambda done, best: say("masks", done, evolution.budget, best),
    )  # fmt: skip
    mask = min((one.genome for one in found[:5]), key=lambda mask: valid(masked(plan, mask)))
    best = masked(plan, mask)
    objective = contest.objective
    if isinstance(objective, Distance) and differentiable(model, model.path, contest.train)[0]:
        fitted, _ = fit(
            model, best, contest.train, contest.valid, contest.fitting, loss=objective.squares, journal=journal,
            tell=lambda done, least: say("gradient", done, contest.fitting.steps, math.sqrt(least)),
        )  # fmt: skip
        best = min(best, fitted, key=valid)
    lots = space.chance(16, random.Random(mix(evolution.seed, "chance")))
    chance = tuple(held(masked(plan, other)) for other in lots)
    return Pruned(best, space.share(mask), held(best), held(masked(plan, frozenset())), chance)
