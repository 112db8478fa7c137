"""The whole search for a plan: evolution from every fixed sampler, a fit by gradient, a verdict on unseen starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ..denoiser import Denoiser
from ..rng import mix
from ..solvers import SolverPlan
from .continuous import tune
from .evolve import Evolution, Scored, evolve
from .gradient import Fitting, Pairs, differentiable, fit, squares
from .journal import Journal
from .objective import Distance, Judge, Objective
from .plans import PlanSpace, fixed_samplers, variants

How = Literal["auto", "evolution", "gradient", "cma", "tpe"]
HOWS: tuple[str, ...] = get_args(How)
Tell = Callable[[str, int, int, float], None]
"""(stage, done, total, best score so far)"""


@dataclass(frozen=True)
class Contest:
    """Three disjoint sets of starts: candidates are made on ``train``, chosen on ``valid``, reported on ``held``.

    ``how``: ``auto`` is evolution, then, where samples are compared one by one and the network lets it through, a fit
    by gradient; the others are one of the searchers alone (``cma`` and ``tpe`` move the best plan that evolution
    could begin with).
    """

    model: Denoiser
    train: Pairs
    valid: Pairs
    held: Pairs
    objective: Objective
    how: How = "auto"
    evolution: Evolution = field(default_factory=Evolution)
    fitting: Fitting = field(default_factory=Fitting)
    batch: int = 64


@dataclass(frozen=True)
class Verdict:
    """The plan, its score on the held-out starts, and that of every fixed sampler there, best first.

    ``how``: evolution, gradient, cma, tpe, or fixed where no candidate was better than a fixed sampler on starts that
    nothing was chosen on.
    """

    plan: SolverPlan
    score: float
    how: str
    fixed: dict[str, float]

    @property
    def best_fixed(self) -> str:
        return next(iter(self.fixed))

    @property
    def gain(self) -> float:
        """The best fixed sampler's score over the plan's: above 1 the search has paid."""
        return self.fixed[self.best_fixed] / self.score if self.score else math.inf


def contest(nfe: int, options: Contest, *, journal: Journal | None = None, tell: Tell | None = None) -> Verdict:
    """Search a plan of ``nfe`` calls; a fixed sampler takes its place where that is better on the held-out starts.

    Of an objective of laws (Fréchet distance) it has to be better on the validation starts as well: there the least of
    many noisy figures is no proof.

    Deterministic for the seeds in its options; with a ``journal`` it goes on where it was stopped. Raises ValueError
    for fewer than one call, or for starts that leave one of the sets empty.
    """
    if nfe < 1:
        raise ValueError(f"a plan needs at least 1 call, got {nfe}")
    if not (len(options.train) and len(options.valid) and len(options.held)):
        raise ValueError("training, validation and held-out starts are each at least one")
    journal = journal or Journal()
    say: Tell = tell or (lambda stage, done, total, best: None)
    model, path = options.model, options.model.path
    rivals = fixed_samplers(path, nfe)
    train, valid, held = (
        _Remembered(Judge(model, pairs, options.objective, options.batch), journal, name)
        for name, pairs in (("train", options.train), ("valid", options.valid), ("held", options.held))
    )
    candidates = _candidates(nfe, options, rivals, train, valid, journal, say)
    chosen = min(candidates, key=lambda one: valid(one[1]))
    scores = dict[str, float]()
    for k, (name, plan) in enumerate(rivals.items()):
        scores[name] = held(plan)
        say("unseen starts", k + 1, len(rivals), min(scores.values()))
    fixed = dict(sorted(scores.items(), key=lambda item: item[1]))
    best = next(iter(fixed))
    how, plan = chosen
    score = held(plan)
    if not options.objective.law:
        better = [] if score < fixed[best] else [best]
    else:  # a distance of laws is noisy, and the best of many rivals is often chance: it has to be better twice
        better = [name for name in fixed if fixed[name] < score and valid(rivals[name]) < valid(plan)]
    if better:
        how, plan, score = "fixed", rivals[better[0]], fixed[better[0]]
    return Verdict(plan, score, how, fixed)


def _candidates(
    nfe: int,
    options: Contest,
    rivals: dict[str, SolverPlan],
    train: _Remembered,
    valid: _Remembered,
    journal: Journal,
    say: Tell,
) -> list[tuple[str, SolverPlan]]:
    """What each searcher found."""
    model, path, evolution = options.model, options.model.path, options.evolution
    made: list[tuple[str, SolverPlan]] = []
    only_seeds = options.how in ("gradient", "cma", "tpe")
    seeds = list(rivals.values())
    if options.objective.law:  # no fit comes after: evolution has to find the weights by itself
        seeds = [*variants(path, nfe), *seeds]
    budget = min(len(seeds), evolution.budget) if only_seeds else evolution.budget
    count = len(options.train)
    evolution = replace(evolution, budget=budget, starts=count, first=min(evolution.first, count))
    found = evolve(
        PlanSpace(path, nfe, seeds), train, evolution, journal=journal,
        tell=lambda done, best: say("fixed samplers" if only_seeds else "evolution", done, budget, best),
    )  # fmt: skip
    made += [("fixed" if only_seeds else "evolution", one.genome) for one in found[:5]]
    if options.how in ("cma", "tpe"):
        total = options.evolution.budget
        moved: list[Scored[SolverPlan]] = tune(
            path, found[0].genome, train, total, by=options.how, seed=evolution.seed, journal=journal,
            tell=lambda done, best: say(options.how, done, total, best),
        )  # fmt: skip
        made += [(options.how, one.genome) for one in moved[:5]]
    fitting, objective = options.fitting, options.objective
    able = options.how == "auto" and not objective.law and differentiable(model, path, options.train)[0]
    if options.how == "gradient" or able:
        loss = objective.squares if isinstance(objective, Distance) else squares
        start = min((plan for _, plan in made), key=valid)
        fitted, _ = fit(
            model, start, options.train, options.valid, fitting, loss=loss, journal=journal,
            tell=lambda done, least: say("gradient", done, fitting.steps, math.sqrt(least)),
        )  # fmt: skip
        made.append(("gradient", fitted))
    return made


class _Remembered:
    """A judge whose answers are kept."""

    def __init__(self, judge: Judge, journal: Journal, name: str) -> None:
        self.judge, self.journal, self.name = judge, journal, name

    def __call__(self, plan: SolverPlan, count: int | None = None) -> float:
        if self.name == "train":  # evolution keeps its own
            return self.judge(plan, count)
        question = f"{self.name} {mix(plan.model_dump_json())}"
        found = self.journal.answer(question, lambda: _plain(self.judge(plan)))
        return math.inf if found is None else float(found)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
