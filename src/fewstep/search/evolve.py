"""Evolution of anything that can be written down, mutated and scored.

Candidates are scored on common random numbers, on few starts first and on all only where that is promising; a small
network that learns to rank what was scored chooses among the children; the best of the end are scored once more on
starts that no choice has seen.
"""

from __future__ import annotations

import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..rng import mix
from .journal import Journal

G = TypeVar("G")
Score = Callable[[G, int], float]
"""(candidate, count) -> its score, lower is better, on the first ``count`` starts: always the same ones."""


class Space(ABC, Generic[G]):
    """The candidates of a search: where it begins, and how one leads to another."""

    @abstractmethod
    def seeds(self) -> Sequence[G]:
        """The first population; all of it is scored."""

    @abstractmethod
    def mutate(self, genome: G, rng: random.Random) -> G: ...

    @abstractmethod
    def cross(self, one: G, other: G, rng: random.Random) -> G: ...

    @abstractmethod
    def write(self, genome: G) -> str:
        """The candidate as text. Candidates of one text are one candidate."""

    def sound(self, genome: G) -> bool:
        """Whether a child may be scored at all; one that may not costs nothing."""
        return True

    def features(self, genome: G) -> Sequence[float] | None:
        """Numbers from which a score may be guessed, of one length; None: children are taken as they come."""
        return None


@dataclass(frozen=True)
class Scored(Generic[G]):
    """A candidate and its score on all starts."""

    genome: G
    score: float


@dataclass(frozen=True)
class Evolution:
    """How a search by evolution is run.

    ``budget`` candidates are scored, the seeds among them: all on the ``first`` starts, and on all ``starts`` those
    that did better there than the worst of the ``parents``, the best so far. A round makes ``brood`` children, the
    best by the ranking among ``fan`` times as many; a child has two parents with probability ``crossing``.
    """

    budget: int = 400
    starts: int = 256
    first: int = 64
    parents: int = 15
    brood: int = 20
    fan: int = 8
    crossing: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.budget, self.starts, self.first, self.parents, self.brood, self.fan) < 1:
            raise ValueError("budget, starts, first, parents, brood and fan are at least 1")
        if self.first > self.starts:
            raise ValueError(f"the first {self.first} starts are more than all {self.starts}")


def evolve(
    space: Space[G],
    score: Score[G],
    options: Evolution | None = None,
    *,
    journal: Journal | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> list[Scored[G]]:
    """Candidates that were scored on all starts, best first.

    Scores that are no numbers count as infinite. ``tell(done, best)`` hears of every candidate. The same seed gives
    the same candidates; with a ``journal`` a run that was stopped goes on from its last whole score. Raises ValueError
    where no seed is sound.
    """
    search = _Search(space, score, options or Evolution(), journal or Journal(), tell)
    search.begin()
    while search.left > 0 and search.round():
        pass
    return search.ranking()


def rescored(found: Sequence[Scored[G]], score: Callable[[G], float], keep: int) -> list[Scored[G]]:
    """The first ``keep`` candidates, ranked by another score: on starts that chose none of them."""
    fresh = [Scored(one.genome, _number(score(one.genome))) for one in found[:keep]]
    return sorted(fresh, key=lambda one: one.score)


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.inf


class _Search(Generic[G]):
    """The state of one evolution."""

    def __init__(
        self,
        space: Space[G],
        score: Score[G],
        options: Evolution,
        journal: Journal,
        tell: Callable[[int, float], None] | None,
    ) -> None:
        self.space, self.score, self.options, self.journal, self.tell = space, score, options, journal, tell
        self.rng = random.Random(mix(options.seed, "evolution"))
        self.seen: dict[str, tuple[G, float]] = {}  # with the score on the first starts
        self.whole: dict[str, float] = {}
        self.rounds = 0

    @property
    def left(self) -> int:
        return self.options.budget - len(self.seen)

    def begin(self) -> None:
        for genome in self.space.seeds():
            text = self.space.write(genome)
            if self.left > 0 and text not in self.seen and self.space.sound(genome):
                self.take(genome, text)
        if not self.seen:
            raise ValueError("a search needs at least one sound candidate to begin with")

    def take(self, genome: G, text: str) -> None:
        """Score a candidate, on all starts where the first ones let it through."""
        few = self.asked(genome, text, self.options.first)
        bar = self.bar()
        self.seen[text] = genome, few
        if few < bar:
            self.whole[text] = self.asked(genome, text, self.options.starts)
        if self.tell is not None:
            self.tell(len(self.seen), min(self.whole.values(), default=math.inf))

    def asked(self, genome: G, text: str, count: int) -> float:
        question = json.dumps([text, count])
        found = self.journal.answer(question, lambda: _plain(self.score(genome, count)))
        return math.inf if found is None else float(found)

    def bar(self) -> float:
        """What the first starts must do better than: the worst parent there."""
        if self.options.first == self.options.starts or len(self.whole) < self.options.parents:
            return math.inf
        return max(self.seen[text][1] for text in self.best(self.options.parents))

    def best(self, count: int) -> list[str]:
        return sorted(self.whole, key=lambda text: self.whole[text])[:count]

    def round(self) -> bool:
        """One brood; False where no new candidate was found any more."""
        self.rounds += 1
        options = self.options
        parents = [self.seen[text][0] for text in self.best(options.parents) if math.isfinite(self.whole[text])]
        if not parents:
            return False
        fresh: dict[str, G] = {}
        for _ in range(10 * options.brood * options.fan):
            child = self.rng.choice(parents)
            if len(parents) > 1 and self.rng.random() < options.crossing:
                child = self.space.cross(child, self.rng.choice(parents), self.rng)
            child = self.space.mutate(child, self.rng)
            text = self.space.write(child)
            if text not in self.seen and text not in fresh and self.space.sound(child):
                fresh[text] = child
            if len(fresh) == options.brood * options.fan:
                break
        for text in self.chosen(fresh):
            self.take(fresh[text], text)
        return bool(fresh)

    def chosen(self, fresh: dict[str, G]) -> list[str]:
        """The children to score: a quarter by chance, so that the ranking is never all that decides."""
        count = min(self.options.brood, self.left, len(fresh))
        texts = list(fresh)
        order = self.guessed(fresh)
        if order is None:
            return texts[:count]
        by_rank = [texts[i] for i in order[: count - count // 4]]
        others = [text for text in texts if text not in set(by_rank)]
        return by_rank + self.rng.sample(others, count - len(by_rank))

    def guessed(self, fresh: dict[str, G]) -> list[int] | None:
        """The children in the order of the scores that they are expected to have."""
        known = [(self.space.features(genome), few) for genome, few in self.seen.values() if math.isfinite(few)]
        asked = [self.space.features(genome) for genome in fresh.values()]
        if len(known) < 10 or any(row is None for row in (*asked, *(row for row, _ in known))):
            return None
        rows, scores = torch.tensor([row for row, _ in known]), torch.tensor([few for _, few in known])
        ranker = Ranker(rows, scores, mix(self.options.seed, "ranker", self.rounds))
        return sorted(range(len(asked)), key=ranker(torch.tensor(asked)).tolist().__getitem__)

    def ranking(self) -> list[Scored[G]]:
        return [Scored(self.seen[text][0], self.whole[text]) for text in self.best(len(self.whole))]


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class Ranker:
    """A small network that learns the order of scores from features, by pairs.

    Minimises ``log(1 + exp(f(better) - f(worse)))`` over random pairs: how far apart two scores are does not
    count. Called with features [n, width] it gives [n] numbers whose order is the guess.
    """

    def __init__(self, rows: Tensor, scores: Tensor, seed: int, *, width: int = 32, steps: int = 120) -> None:
        rng = torch.Generator().manual_seed(seed)
        rows = rows.float()
        self.mean, self.std = rows.mean(0), rows.std(0, correction=0).clamp(min=1e-6)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(rows.shape[1], width), nn.Tanh(), nn.Linear(width, 1))
            optimiser = torch.optim.AdamW(self.net.parameters(), lr=2e-2, weight_decay=1e-2)
            seen = (rows - self.mean) / self.std
            for _ in range(steps):
                one, other = torch.randint(len(seen), (2, 256), generator=rng)
                value = self.net(seen).squeeze(1)
                sign = torch.sign(scores[one] - scores[other])
                loss = (nn.functional.softplus(-sign * (value[one] - value[other])) * sign.abs()).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        found: Tensor = self.net((rows.float() - self.mean) / self.std).squeeze(1)
        return found


__all__ = ["Evolution", "Journal", "Ranker", "Score", "Scored", "Space", "evolve", "rescored"]
