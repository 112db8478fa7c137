"""The evaluation itself: students beside their teacher's full run, its best few-step samplers, and real data."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import Refused
from ..metrics import Metric, Sample, metric_named
from ..metrics.features import Features, features_for, fingerprint
from ..metrics.sliced import sliced_squares
from ..rng import Rng
from ..student import Student
from .pictures import sheets
from .protocol import FEW, Protocol
from .reading import readings
from .rows import Reading, Report, Row, Scores, Scout, put, with_excess
from .sampling import Candidate, full_teacher, of_student
from .stage import (
    Quiet,
    Ruler,
    Stage,
    Watch,
    chosen_of,
    kept_under,
    machine,
    measuring,
    model_hash,
    read_table,
    spread_of,
    table_text,
    trials,
    with_speeds,
)

if TYPE_CHECKING:
    from ..tasks import Split, Task

DETAILS = ("precision", "recall", "density", "coverage", "kernel", "diversity", "copied", "accuracy")


def evaluate(
    student: Student | None,
    teacher: Denoiser | None,
    task: Task,
    protocol: Protocol | None = None,
    features: Features | None = None,
    *,
    watch: Watch | None = None,
    seed: int = 0,
    train: Split | None = None,
    cache: Path | None = None,
) -> Report:
    """Measure a student, its teacher, or both, against a task's test split.

    Rows: ``teacher`` (its own sampler at full length), ``teacher:SOLVER`` (at each few number of calls the
    best sampler), ``student`` (once for each step count that it serves), ``real`` (training against test data:
    the floor). All see the same noise and the same conditions, those of the test split; calls are counted where
    they happen; speeds are taken in turns. ``train`` stands for the training data (None: the task's own).
    ``cache`` is a folder that keeps a teacher's figures under the hashes of all that they depend on; speeds are
    always taken afresh.

    Raises Failed where a student gives samples that are not finite; Refused for a request that cannot be met.
    """
    students = {} if student is None else {"": student}
    return _evaluate(students, teacher, task, protocol, features, watch, seed, train, cache)


def compare(
    students: Mapping[str, Student],
    teacher: Denoiser | None,
    task: Task,
    protocol: Protocol | None = None,
    features: Features | None = None,
    *,
    watch: Watch | None = None,
    seed: int = 0,
    train: Split | None = None,
    cache: Path | None = None,
) -> Report:
    """Several students in one table, under one protocol; their rows are ``student:NAME``."""
    if not students:
        raise Refused("nothing to compare: pass at least one student")
    return _evaluate(students, teacher, task, protocol, features, watch, seed, train, cache)


def _evaluate(
    students: Mapping[str, Student],
    teacher: Denoiser | None,
    task: Task,
    protocol: Protocol | None,
    features: Features | None,
    watch: Watch | None,
    seed: int,
    train: Split | None,
    cache: Path | None,
) -> Report:
    if not students and teacher is None:
        raise Refused("nothing to evaluate: pass a student, a teacher, or both")
    began = time.perf_counter()
    protocol = protocol or Protocol()
    with measuring(*students.values(), teacher):
        found = Evaluation(task, protocol, features or features_for(task), train, seed, watch or Quiet())
        return found.report(students, teacher, cache, began)


class Evaluation:
    """One test split, what is measured against it, and the floor that training data makes."""

    def __init__(
        self, task: Task, protocol: Protocol, features: Features, train: Split | None, seed: int, watch: Watch
    ) -> None:
        self.task, self.protocol, self.features, self.seed = task, protocol, features, seed
        self.train = task.train if train is None else train
        test = task.test
        if protocol.count is not None and protocol.count < len(test):
            labels = test.cond if isinstance(test.cond, Tensor) and test.cond.ndim == 1 else None
            test = test.rows(spread_rows(labels, len(test), protocol.count, Rng(seed, "test rows")))
        elif protocol.count is not None and protocol.count > len(test):
            raise Refused(f"count = {protocol.count} but the test split has {len(test)} samples: pass at most that")
        if len(test) <= protocol.neighbours:
            raise Refused(f"{len(test)} test samples are too few for {protocol.neighbours} neighbours")
        self.test, self.count = test, len(test)
        self.labels = test.cond if isinstance(test.cond, Tensor) and test.cond.ndim == 1 else None
        found, seen = features.both(test.data)
        flat_train = self.train.data.flatten(1) if len(self.train) else None
        self.real = Sample(found, flat=test.data, labels=self.labels, predicted=seen, train=flat_train)
        self.ruler = Ruler(self.real, self._metrics(), seed)
        self.stage = Stage(
            task, protocol, features, test.cond, self.count,
            finish=task.finish, size=math.prod(test.data.shape[1:]), seed=seed, watch=watch,
        )  # fmt: skip
        vectors = len(task.shape) == 1
        self.shown = (
            torch.arange(min(self.count, 4000)) if vectors else shown_rows(self.labels, task.classes, self.count)
        )
        self.pictures: dict[str, Tensor] = {}

    def _metrics(self) -> dict[str, Metric]:
        wanted = [name for name in DETAILS if name != "copied" or self.real.train is not None]
        if self.labels is None or self.real.predicted is None:
            wanted.remove("accuracy")
        found = {name: metric_named(name) for name in wanted}
        for name in ("precision", "recall", "density", "coverage"):
            found[name].k = self.protocol.neighbours  # type: ignore[attr-defined]
        return found

    # -- scoring ------------------------------------------------------------------------------

    def row(self, candidate: Candidate) -> Row:
        """All figures of one candidate, speed left out."""
        self.stage.watch.say(f"measuring: {candidate.title}")
        wanted = min(self.protocol.detail_seeds, self.protocol.noise_seeds)
        flats: list[list[Tensor]] = [[] for _ in range(wanted)]

        def look(number: int, rows: slice, samples: Tensor) -> None:
            if number < wanted:
                flats[number].append(samples)

        drawn = self.stage.many(candidate, "noise", self.protocol.noise_seeds, strict=True, look=look)
        assert drawn is not None
        features, seen, calls = drawn
        samples = [
            Sample(f, flat=torch.cat(x), labels=self.labels, predicted=None if seen is None else seen[i])
            for i, (x, f) in enumerate(zip(flats, features, strict=False))
        ]
        first = samples[0].flat
        assert first is not None
        self.pictures[candidate.title] = first[self.shown].reshape(-1, *flats[0][0].shape[1:])
        distances = self.ruler.frechets(features)
        values, spreads = self.ruler.details(samples)
        return Row(
            model=candidate.model,
            title=candidate.title,
            nfe=candidate.nfe,
            frechet=statistics.fmean(distances),
            frechet_spread=spread_of(distances),
            calls=round(calls, 6),
            count=self.count,
            seeds=self.protocol.noise_seeds,
            detail_seeds=len(samples),
            parameters=candidate.parameters,
            spreads=spreads,
            exact=self.exact(samples),
            **values,
        )

    def exact(self, samples: list[Sample]) -> dict[str, float]:
        """Against a law in closed form: transport distance, weights of the modes, density."""
        law = self.task.law
        if law is None or not bool((law.variance > 0).all()):
            return {}
        found = [exact_scores(law, s, self.labels, Rng(self.seed, "exact", i)) for i, s in enumerate(samples)]
        return {name: statistics.fmean(f[name] for f in found) for name in found[0]}

    # -- the floor ----------------------------------------------------------------------------

    def floor(self) -> Row:
        """Real against real, at equal counts: what a perfect model would get.

        Fresh draws where the law is known; else training data, or where there is more of it random parts with
        the test split's labels. ``copied`` and ``accuracy`` are those of the test samples themselves.
        """
        samples = self._real_draws()
        distances = self.ruler.frechets(torch.stack([s.features for s in samples]))
        some = samples[: self.protocol.detail_seeds]
        values, spreads = self.ruler.details(some)
        for name in ("copied", "accuracy"):
            if name in self.ruler.metrics:
                score = self.ruler.metrics[name](self.real, self.real, Rng(self.seed, "bootstrap", name, "real"))
                values[name], spreads[name] = score.value, score.spread or 0.0
        self.pictures["Real, unseen"] = self.test.data[self.shown]
        return Row(
            model="real",
            title="Real data against real data",
            nfe=0,
            frechet=statistics.fmean(distances),
            frechet_spread=spread_of(distances),
            calls=0,
            count=len(samples[0]),
            seeds=len(samples),
            detail_seeds=len(some),
            spreads=spreads,
            exact=self.exact(some),
            **values,
        )

    def _real_draws(self) -> list[Sample]:
        draws_count = self.protocol.noise_seeds
        law = self.task.law
        if law is not None and bool((law.variance > 0).all()):
            whole = [
                law.sample(self.count, Rng(self.seed, "floor", k), self.test.cond, torch.float32)
                for k in range(draws_count)
            ]
            found, seen = self.features.both(torch.cat(whole))
            parts = [slice(k * self.count, (k + 1) * self.count) for k in range(draws_count)]
            return [
                Sample(found[p], flat=x, labels=self.labels, predicted=None if seen is None else seen[p])
                for p, x in zip(parts, whole, strict=True)
            ]
        if not len(self.train):
            raise Refused("the floor needs training data: pass train")
        mine = self.train.cond if self.labels is not None and isinstance(self.train.cond, Tensor) else None
        if len(self.train) <= self.count:
            picks = [torch.arange(len(self.train))]
        else:
            wanted = None if mine is None else self.labels
            picks = [
                matched_rows(mine, wanted, len(self.train), self.count, Rng(self.seed, "floor", k))
                for k in range(draws_count)
            ]
        used, place = torch.cat(picks).unique(return_inverse=True)
        found, seen = self.features.both(self.train.data[used])
        samples = []
        for pick, where in zip(picks, place.split([len(p) for p in picks]), strict=True):
            samples.append(
                Sample(
                    found[where],
                    flat=self.train.data[pick],
                    labels=None if mine is None else mine[pick],
                    predicted=None if seen is None else seen[where],
                )
            )
        return samples

    # -- the table ----------------------------------------------------------------------------

    def report(
        self, students: Mapping[str, Student], teacher: Denoiser | None, cache: Path | None, began: float
    ) -> Report:
        p, stage = self.protocol, self.stage
        asked = [of_student(s, steps, name or None) for name, s in students.items() for steps in sorted(s.steps)]
        tried = [] if teacher is None else trials(teacher, p)
        full = None if teacher is None else full_teacher(teacher, p)
        hashes = {
            "protocol": p.hash,
            "features": self.features.hash,
            "data": fingerprint(self.train.data, self.train.cond, self.test.data, self.test.cond),
            **({} if teacher is None else {"teacher": model_hash(teacher)}),
            **{f"student:{name}" if name else "student": model_hash(s) for name, s in students.items()},
        }
        keys = [hashes[name] for name in ("teacher", "protocol", "features", "data") if name in hashes]
        kept = kept_under(cache, "json", *keys, self.seed) if teacher is not None else None
        known = _recall(kept)
        self.recalled = known is not None
        stage.watch.start("evaluate", stage.work([full] if full and not known else [], asked, [] if known else tried))
        rows = []
        scout: tuple[Scout, ...] = ()
        timed: list[Candidate] = []
        if teacher is not None and full is not None:
            scout = stage.scout(tried, self.ruler.frechets) if known is None else known[1]
            timed = [full, *chosen_of(tried, scout)]
            rows = [self.row(c) for c in timed] if known is None else list(known[0])
            if known is None and kept is not None:
                put(kept, table_text(rows, scout).encode())
        for candidate in asked:
            timed.append(candidate)
            rows.append(self.row(candidate))
        stage.watch.finish("evaluate")
        measured = time.perf_counter() - began
        rows = [*with_speeds(rows, stage.speeds(timed)), self.floor()]
        finished = with_excess(rows)
        for candidate in timed:  # rows whose figures came from the cache have no pictures yet
            if candidate.title not in self.pictures:
                self.pictures[candidate.title] = stage.few(candidate, self.shown)
        read: tuple[Reading, ...] = ()
        told: Tensor | None = None
        if teacher is not None and self.task.joint is not None and isinstance(self.test.cond, Tensor):
            stage.watch.say("measuring: reading of labels")
            read, told = readings(teacher, self.task, self.test.data, self.test.cond, self.seed)
        pictures, listed = sheets(self, timed, finished, hashes, told)
        scores = Scores(
            schema="fewstep.scores/1",
            task=self.task.name,
            shape=self.task.shape,
            seed=self.seed,
            rows=finished,
            scout=scout,
            protocol={**p.model_dump(mode="json"), "hash": p.hash},
            hashes=hashes,
            features={"name": self.features.name, **self.features.notes},
            few=FEW,
            sheets=listed,
            readings=read,
            notes=self._notes(),
            machine=machine(timed),
            seconds={"measuring": round(measured, 2), "all": round(time.perf_counter() - began, 2)},
        )
        return Report(scores, pictures)

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if len(self.train) and len(self.train) < 0.9 * self.count and self.task.law is None:
            notes.append(
                f"The floor compares {len(self.train)} training samples with {self.count} test samples: fewer than the "
                "students give, so that it is somewhat high."
            )
        if self.recalled:
            notes.append(
                "The teacher's figures, all but its speeds, were measured earlier under this very protocol, on this "
                "very data and for these very weights (by their hashes); a recipe measures them again with "
                "evaluate.fresh=true."
            )
        return tuple(notes)


def exact_scores(law: Any, sample: Sample, labels: Tensor | None, rng: Rng) -> dict[str, float]:
    """``sliced_w2`` to as many fresh draws; ``mode_kl``: KL(found weights, true weights) over the nearest modes;
    ``modes``: the share of modes that have any; ``on_mode``: samples within 4 standard deviations of their mode;
    ``log_density``: the mean, in nats."""
    x = sample.features.reshape(len(sample), *law.shape)
    truth = law.sample(len(sample), rng, labels).flatten(1)
    *_, offset, spread, log_joint = law._parts(x, law.path.t_min, None)
    mode = log_joint.argmax(1)
    inside = (offset.square() / spread).expand(len(x), -1, -1)[torch.arange(len(x)), mode].sum(1)
    dimensions = offset.shape[2]
    found = torch.bincount(mode, minlength=len(law.weight)).double() / len(x)
    some = found > 0
    return {
        "sliced_w2": math.sqrt(float(sliced_squares(sample.features, truth, rng).mean())),
        "mode_kl": max(0.0, float((found[some] * (found[some] / law.weight[some]).log()).sum())),
        "modes": float(some.double().mean()),
        "on_mode": float((inside <= 16 * max(1, dimensions / 2)).double().mean()),
        "log_density": float(law.log_density(x).mean()),
    }


def spread_rows(labels: Tensor | None, total: int, count: int, rng: Rng) -> Tensor:
    """``count`` row numbers, the same share of every label."""
    order = torch.randperm(total, generator=rng.generator)
    if labels is None:
        return order[:count].sort().values
    by_label = order[labels[order].argsort(stable=True)]
    place = ((torch.arange(count, dtype=torch.float64) + 0.5) * total / count).long()
    return by_label[place].sort().values


def matched_rows(labels: Tensor | None, wanted: Tensor | None, total: int, count: int, rng: Rng) -> Tensor:
    """``count`` random row numbers, with as many of each label as ``wanted`` has, where there are so many."""
    order = torch.randperm(total, generator=rng.generator)
    if labels is None or wanted is None:
        return order[:count]
    picks = [order[labels[order] == label][: int(number)] for label, number in enumerate(torch.bincount(wanted))]
    return torch.cat(picks)


def shown_rows(labels: Tensor | None, classes: int | None, count: int) -> Tensor:
    """Rows for the pictures: ten in a line; with up to ten classes each column is one."""
    if labels is None or classes is None or classes > 10 or classes < 2:
        return torch.arange(min(count, 60))
    groups = [(labels == label).nonzero().flatten() for label in range(classes)]
    depth = min(6, min(len(g) for g in groups))
    if depth == 0:
        return torch.arange(min(count, 60))
    return torch.stack([g[:depth] for g in groups], 1).flatten()


def _recall(kept: Path | None) -> tuple[list[Row], tuple[Scout, ...]] | None:
    """A teacher's figures from the cache; None where there are none, or the file is damaged."""
    if kept is None or not kept.is_file():
        return None
    try:
        return read_table(kept.read_text())
    except (ValueError, KeyError, TypeError):
        return None
