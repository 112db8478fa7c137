"""The evaluation itself: students beside their teacher's full run, its best few-step samplers, and real data."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from typing import Protocol as Shape

import torch
from torch import Tensor

from ..cond import Cond
from ..cond import rows as rows_of
from ..denoiser import Denoiser
from ..errors import Failed, Refused
from ..metrics import Metric, Sample, Score, metric_named
from ..metrics.features import Features, features_for, fingerprint, weights_hash
from ..metrics.frechet import Moments, frechet_distance, moments
from ..metrics.sliced import sliced_squares
from ..rng import Rng
from ..student import Student
from .pictures import sheets
from .protocol import FEW, Protocol
from .rows import Report, Row, Scores, Scout, put, with_excess
from .sampling import Candidate, chunks_of, draws, full_teacher, of_student, of_teacher

if TYPE_CHECKING:
    from ..tasks import Split, Task

MEMORY = 2**28
"""Bytes of samples that are held at once."""
DETAILS = ("precision", "recall", "density", "coverage", "kernel", "diversity", "copied", "accuracy")


SETTINGS = (
    *("prediction", "clock", "scale_input", "data_std", "boundary", "scale", "interval", "low", "high"),
    *("start", "start_scale", "steps", "policy", "shape"),
)
"""Attributes that change what a network's answer means, and so belong to the hash of a model."""


class Watch(Shape):
    """Who hears of the progress."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, label: str, done: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...
    def finish(self, label: str) -> None: ...


class Quiet:
    """Nobody."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, label: str, done: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...
    def finish(self, label: str) -> None: ...


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
    training = [(module, module.training) for module in (*students.values(), teacher) if module is not None]
    for module, _ in training:
        module.eval()
    try:
        with torch.inference_mode():
            stage = Stage(task, protocol, features or features_for(task), train, seed, watch or Quiet())
            return stage.report(students, teacher, cache, began)
    finally:
        for module, mode in training:
            module.train(mode)


class Stage:
    """What all rows share: the reference, its neighbourhoods, the noises and the conditions."""

    def __init__(
        self, task: Task, protocol: Protocol, features: Features, train: Split | None, seed: int, watch: Watch
    ) -> None:
        self.task, self.protocol, self.features, self.seed, self.watch = task, protocol, features, seed, watch
        self.train = task.train if train is None else train
        test = task.test
        if protocol.count is not None and protocol.count < len(test):
            labels = test.cond if isinstance(test.cond, Tensor) else None
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
        self.metrics = self._metrics()
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

    # -- drawing and scoring ------------------------------------------------------------------

    def noise(self, use: str, draw: int) -> Tensor:
        """The noise of one draw: the same for every row."""
        return Rng(self.seed, "evaluate", use, draw).normal((self.count, *self.task.shape))

    def many(
        self, candidate: Candidate, use: str, count: int, strict: bool
    ) -> tuple[Tensor, list[Sample], float] | None:
        """Features [count, n, d] of many draws, the first of them as samples, and the calls of one sample.

        None, or with ``strict`` Failed, where samples are not finite.
        """
        features: list[Tensor] = []
        details: list[Sample] = []
        calls = 0.0
        group = max(1, MEMORY // (4 * self.count * math.prod(self.task.shape)))
        for start in range(0, count, group):
            numbers = range(start, min(count, start + group))
            chunks = [
                chunk
                for number in numbers
                for chunk in chunks_of(
                    self.noise(use, number),
                    self.test.cond,
                    self.protocol.batch,
                    self.seed,
                    "evaluate steps",
                    use,
                    number,
                )
            ]
            parts = list(draws(candidate, chunks, self._read, self._told))
            samples = torch.cat([part.samples for part in parts])
            calls += sum(part.calls * len(part.samples) for part in parts)
            broken = int((~torch.isfinite(samples.flatten(1)).all(1)).sum())
            if broken and strict:
                raise Failed(f"{candidate.title}: {broken} of {len(samples)} samples are not finite")
            if broken:
                return None
            found = torch.cat([part.features for part in parts if part.features is not None])
            labels = [part.seen for part in parts if part.seen is not None]
            seen = torch.cat(labels) if labels else None
            for i, number in enumerate(numbers):
                part = slice(i * self.count, (i + 1) * self.count)
                features.append(found[part])
                if use == "noise" and number < self.protocol.detail_seeds:
                    details.append(
                        Sample(
                            found[part],
                            flat=samples[part],
                            labels=self.labels,
                            predicted=None if seen is None else seen[part],
                        )
                    )
        return torch.stack(features), details, calls / (count * self.count)

    def _read(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Finished samples, their features, and the labels seen in them."""
        broken = ~torch.isfinite(samples)  # which a value range would hide
        samples = self.task.finish(samples).masked_fill(broken, math.nan)
        return samples, *self.features.both(samples)

    def _told(self, calls: int) -> None:
        self.done += calls
        self.watch.advance("evaluate", self.done)

    def frechets(self, features: Tensor) -> list[float]:
        """Of every draw's features [draws, n, d] to the test samples."""
        return frechet_distance(Moments.of(features), moments(self.real)).reshape(-1).tolist()

    def details(self, samples: list[Sample]) -> tuple[dict[str, float], dict[str, float]]:
        """Means over draws of every other figure, and their mean bootstrap spreads."""
        values: dict[str, float] = {}
        spreads: dict[str, float] = {}
        for name, metric in self.metrics.items():
            scores = [
                metric(sample, self.real, Rng(self.seed, "bootstrap", name, i)) for i, sample in enumerate(samples)
            ]
            values[name], spread = combined(scores)
            if spread is not None:
                spreads[name] = spread
        return values, spreads

    def row(self, candidate: Candidate) -> Row:
        """All figures of one candidate, speed left out."""
        self.watch.say(f"measuring: {candidate.title}")
        drawn = self.many(candidate, "noise", self.protocol.noise_seeds, strict=True)
        assert drawn is not None
        features, samples, calls = drawn
        first = samples[0].flat
        if first is not None:
            self.pictures[candidate.title] = first[self.shown].reshape(-1, *self.task.shape)
        distances = self.frechets(features)
        values, spreads = self.details(samples)
        return Row(
            model=candidate.model,
            title=candidate.title,
            nfe=candidate.nfe,
            frechet=statistics.fmean(distances),
            frechet_spread=statistics.stdev(distances) if len(distances) > 1 else None,
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
        distances = self.frechets(torch.stack([s.features for s in samples]))
        some = samples[: self.protocol.detail_seeds]
        values, spreads = self.details(some)
        for name in ("copied", "accuracy"):
            if name in self.metrics:
                score = self.metrics[name](self.real, self.real, Rng(self.seed, "bootstrap", name, "real"))
                values[name], spreads[name] = score.value, score.spread or 0.0
        self.pictures["Real, unseen"] = self.test.data[self.shown]
        return Row(
            model="real",
            title="Real data against real data",
            nfe=0,
            frechet=statistics.fmean(distances),
            frechet_spread=statistics.stdev(distances) if len(distances) > 1 else None,
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
        p = self.protocol
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
        kept = _kept(cache, hashes, self.seed) if teacher is not None else None
        known = _recall(kept)
        self.recalled = known is not None
        per = self.count
        work = per * p.noise_seeds * sum(c.nfe for c in asked)
        if full is not None and known is None:
            work += per * p.noise_seeds * (full.nfe + sum({c.nfe for c in tried})) + per * p.scout_seeds * sum(
                c.nfe for c in tried
            )
        self.done = 0
        self.watch.start("evaluate", work)
        rows = []
        scout: tuple[Scout, ...] = ()
        timed: list[Candidate] = []
        if teacher is not None and full is not None:
            scout = self.scout(tried) if known is None else known[1]
            chosen = [c for c in tried if any(s.chosen and (s.solver, s.nfe) == (c.solver, c.nfe) for s in scout)]
            timed = [full, *chosen]
            rows = [self.row(c) for c in timed] if known is None else list(known[0])
            if known is None and kept is not None:
                text = {
                    "rows": [r.model_dump(mode="json") for r in rows],
                    "scout": [s.model_dump(mode="json") for s in scout],
                }
                put(kept, json.dumps(text).encode())
        for candidate in asked:
            timed.append(candidate)
            rows.append(self.row(candidate))
        self.watch.finish("evaluate")
        measured = time.perf_counter() - began
        speeds = self.speeds(timed)
        rows = [row.model_copy(update={"samples_per_s": speed}) for row, speed in zip(rows, speeds, strict=True)]
        rows.append(self.floor())
        finished = with_excess(rows)
        self._draw_missing(timed, finished)
        pictures, listed = sheets(self, timed, finished, hashes)
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
            notes=self._notes(),
            machine=machine(timed),
            seconds={"measuring": round(measured, 2), "all": round(time.perf_counter() - began, 2)},
        )
        return Report(scores, pictures)

    def scout(self, tried: list[Candidate]) -> tuple[Scout, ...]:
        """Every sampler on draws of its own; at each number of calls the best is chosen, the first among equals."""
        found: list[tuple[Candidate, float | None]] = []
        for candidate in tried:
            drawn = self.many(candidate, "scout", self.protocol.scout_seeds, strict=False)
            found.append((candidate, None if drawn is None else statistics.fmean(self.frechets(drawn[0]))))
        best: dict[int, tuple[Candidate, float]] = {}
        for candidate, value in found:
            nfe = candidate.nfe
            if value is not None and (nfe not in best or value < best[nfe][1] * (1 - 1e-6)):
                best[nfe] = candidate, value
        return tuple(
            Scout(
                solver=candidate.solver or "",
                nfe=candidate.nfe,
                frechet=value,
                chosen=candidate.nfe in best and best[candidate.nfe][0] is candidate,
            )
            for candidate, value in found
        )

    def speeds(self, timed: list[Candidate]) -> list[float | None]:
        """Samples a second of every candidate: the median of rounds in which each has its turn."""
        rounds = self.protocol.timing_rounds
        if not rounds or not timed:
            return [None] * len(timed)
        size = self.protocol.timing_batch
        pick = torch.arange(size) % self.count
        noise = Rng(self.seed, "timing").normal((size, *self.task.shape))
        cond = rows_of(self.test.cond, pick)
        total = (rounds + 1) * len(timed)
        self.watch.start("timing", total)
        seconds: list[list[float]] = [[] for _ in timed]
        few = [i for i, c in enumerate(timed) if c.nfe <= FEW]
        for turn in range(rounds + 1):  # the first is a warm-up, and for the short ones only
            for i, candidate in enumerate(timed):
                if turn or i in few:
                    took = one_run(candidate, noise, cond, turn)
                    if turn:
                        seconds[i].append(took)
                self.watch.advance("timing", turn * len(timed) + i + 1)
        self.watch.finish("timing")
        return [size / statistics.median(taken) for taken in seconds]

    def _draw_missing(self, timed: list[Candidate], rows: tuple[Row, ...]) -> None:
        """Pictures of the rows whose figures came from the cache."""
        for candidate in timed:
            if candidate.title not in self.pictures:
                noise, cond = self.noise("noise", 0)[self.shown], rows_of(self.test.cond, self.shown)
                chunk = chunks_of(noise, cond, len(noise), self.seed, "pictures")
                drawn = next(iter(draws(candidate, chunk)))
                self.pictures[candidate.title] = self.task.finish(drawn.samples)

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


def trials(teacher: Denoiser, protocol: Protocol) -> list[Candidate]:
    """Every sampler of the frozen set at every number of calls that it can make."""
    made = (of_teacher(teacher, solver, nfe, protocol) for nfe in protocol.nfes for solver in protocol.solvers)
    return [candidate for candidate in made if candidate is not None]


def one_run(candidate: Candidate, noise: Tensor, cond: Cond, turn: int) -> float:
    """Seconds of one batch, drawn as everything here is drawn: spread over the threads, samples back on the CPU."""
    workers = torch.get_num_threads() if candidate.device.type == "cpu" else 1
    chunks = chunks_of(noise, cond, -(-len(noise) // workers), "timing", turn)
    began = time.perf_counter()
    for _ in draws(candidate, chunks, shared=False):
        pass
    return time.perf_counter() - began


def combined(scores: list[Score]) -> tuple[float, float | None]:
    """The mean of a figure over draws, and its spread: the bootstrap's of one draw, averaged."""
    spreads = [score.spread for score in scores if score.spread is not None]
    return statistics.fmean(score.value for score in scores), statistics.fmean(spreads) if spreads else None


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


def model_hash(model: torch.nn.Module) -> str:
    """Of weights and of what turns them into a denoiser or a student: prediction, clock, path, scales, times."""
    about: list[str] = []
    inner: Any = model
    while inner is not None:
        about.append(type(inner).__name__)
        for name in SETTINGS:
            value = getattr(inner, name, None)
            if isinstance(value, str | int | float | tuple | dict | bool):
                about.append(f"{name}={value!r}")
        path = getattr(inner, "path", None)
        if path is not None:
            about.append(f"{type(path).__name__}{path.model_dump_json()}")
        inner = getattr(inner, "denoiser", None) or getattr(inner, "inner", None)
    return weights_hash(dict(model.state_dict()), "|".join(about))


def machine(timed: list[Candidate]) -> dict[str, Any]:
    """What the speeds were taken on."""
    devices = sorted({str(c.device) for c in timed})
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": ", ".join(devices),
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def _kept(cache: Path | None, hashes: dict[str, str], seed: int) -> Path | None:
    if cache is None:
        return None
    key = "/".join([*(hashes[name] for name in ("teacher", "protocol", "features", "data")), str(seed)])
    return Path(cache) / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _recall(kept: Path | None) -> tuple[list[Row], tuple[Scout, ...]] | None:
    """A teacher's figures from the cache; None where there are none, or the file is damaged."""
    if kept is None or not kept.is_file():
        return None
    try:
        raw = json.loads(kept.read_text())
        return [Row.model_validate(r) for r in raw["rows"]], tuple(Scout.model_validate(s) for s in raw["scout"])
    except (ValueError, KeyError, TypeError):
        return None
