"""Evolution on a problem whose best candidate is known: whole numbers near a target."""

import json
import math
import random

import pytest
import torch

from fewstep.errors import Refused
from fewstep.search import Evolution, Journal, Scored, Space, evolve, rescored
from fewstep.search.evolve import Ranker

TARGET = (3, -7, 11, 0, 5)
SMALL = Evolution(budget=160, starts=40, first=10, parents=8, brood=16, fan=4)


class Numbers(Space[tuple[int, ...]]):
    """Tuples of five whole numbers."""

    def seeds(self):
        return [(0,) * 5, (9,) * 5, (0,) * 5, (99,) * 5]

    def mutate(self, genome, rng):
        return tuple(v + rng.choice((-3, -1, 1, 3)) if rng.random() < 0.3 else v for v in genome)

    def cross(self, one, other, rng):
        return tuple(rng.choice(pair) for pair in zip(one, other, strict=True))

    def write(self, genome):
        return json.dumps(genome)

    def sound(self, genome):
        return max(map(abs, genome)) < 50


class Ranked(Numbers):
    def features(self, genome):
        return [abs(v - w) for v, w in zip(genome, TARGET, strict=True)]


class Distance:
    """Squared distance to the target, seen through noise that is the same for every candidate."""

    def __init__(self, noise=0.0):
        rng = random.Random(5)
        self.noise, self.calls, self.starts = [noise * rng.gauss(0, 1) for _ in range(1000)], [], 0

    def __call__(self, genome, count):
        self.calls.append((genome, count))
        self.starts += count
        away = sum((v - w) ** 2 for v, w in zip(genome, TARGET, strict=True))
        return away + sum(self.noise[:count]) / count


def test_evolution_ends_nearer_to_the_target_than_it_began_and_says_so():
    heard = []
    found = evolve(Numbers(), Distance(), SMALL, tell=lambda done, best: heard.append((done, best)))
    assert found[0].score <= 10 < Distance()((0,) * 5, 1)
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert [done for done, _ in heard] == list(range(1, 161))
    assert heard[-1][1] == found[0].score


def test_no_candidate_is_scored_twice_and_none_that_is_not_sound():
    score = Distance()
    evolve(Numbers(), score, SMALL)
    assert len(score.calls) == len(set(score.calls))
    assert len({genome for genome, _ in score.calls}) == 160  # the seed that came twice counts once
    assert all(Numbers().sound(genome) for genome, _ in score.calls)


def test_all_starts_are_spent_only_on_what_beats_the_worst_parent_on_the_first():
    score = Distance()
    found = evolve(Numbers(), score, SMALL)
    whole = [genome for genome, count in score.calls if count == 40]
    assert len(whole) == len(found) < 160
    assert score.starts == 160 * 10 + 40 * len(whole) < 160 * 40
    everything = evolve(Numbers(), Distance(), Evolution(budget=160, starts=40, first=40, parents=8, brood=16, fan=4))
    assert found[0].score <= max(10.0, 2 * everything[0].score)


def test_the_same_seed_gives_the_same_search_and_another_seed_another():
    one, same = (evolve(Numbers(), Distance(), SMALL) for _ in range(2))
    other = evolve(Numbers(), Distance(), Evolution(**{**SMALL.__dict__, "seed": 1}))
    assert one == same != other


def test_a_search_killed_at_any_score_goes_on_to_the_same_end(tmp_path):
    whole = evolve(Numbers(), Distance(), SMALL)
    file, total = tmp_path / "state.jsonl", 0

    class Killed(Distance):
        def __call__(self, genome, count):
            if len(self.calls) == 31:
                raise KeyboardInterrupt
            return super().__call__(genome, count)

    for _ in range(100):
        score = Killed()
        try:
            found = evolve(Numbers(), score, SMALL, journal=Journal(file, {"nfe": 5}))
            break
        except KeyboardInterrupt:
            total += len(score.calls)
            with file.open("ab") as cut:
                cut.write(b'{"question": "half a li')
    asked = Distance()
    evolve(Numbers(), asked, SMALL)
    assert found == whole
    assert total + len(score.calls) == len(asked.calls)  # nothing was paid for twice


def test_the_state_of_another_search_is_refused(tmp_path):
    file = tmp_path / "state.jsonl"
    Journal(file, {"nfe": 5, "seed": 0}).answer("a", lambda: 1)
    assert Journal(file, {"nfe": 5, "seed": 0}).answer("a", lambda: 2) == 1
    with pytest.raises(Refused, match="nfe was 5, now 4"):
        Journal(file, {"nfe": 4, "seed": 0})
    file.write_text("[[[[\n")
    with pytest.raises(Refused, match="not the state of a search"):
        Journal(file, {"nfe": 5, "seed": 0})


def test_scores_that_are_no_numbers_lose():
    def score(genome, count):
        return math.nan if genome[0] > 0 else Distance()(genome, count)

    found = evolve(Numbers(), score, SMALL)
    assert found[0].genome[0] <= 0
    assert math.isfinite(found[0].score)


def test_nothing_sound_to_begin_with_is_an_error():
    class Nothing(Numbers):
        def sound(self, genome):
            return False

    with pytest.raises(ValueError, match="at least one sound candidate"):
        evolve(Nothing(), Distance(), SMALL)


def test_another_ranking_on_fresh_starts_decides_among_the_best():
    found = [Scored("lucky", 1.0), Scored("good", 2.0), Scored("never asked", 3.0)]
    fresh = rescored(found, {"lucky": 9.0, "good": 2.5}.__getitem__, keep=2)
    assert fresh == [Scored("good", 2.5), Scored("lucky", 9.0)]


def test_a_ranking_that_knows_the_problem_finds_more_in_the_same_budget():
    blind, ranked = (evolve(space, Distance(), SMALL)[0].score for space in (Numbers(), Ranked()))
    assert ranked <= blind


def test_the_ranker_learns_an_order_from_pairs_whatever_the_scale_of_the_scores():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=rng)
    value = rows[:, 0] - 2 * rows[:, 1] + rows[:, 2] * rows[:, 3]
    ranker = Ranker(rows[:150], value[:150].exp(), seed=0)
    guess, true = ranker(rows[150:]).argsort().argsort().double(), value[150:].argsort().argsort().double()
    assert torch.corrcoef(torch.stack([guess, true]))[0, 1] > 0.8
