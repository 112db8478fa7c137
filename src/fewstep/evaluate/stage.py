"""What every evaluation shares: equal noise and conditions, counted calls, speeds in turns, one reference."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from typing import Protocol as Shape

import torch
from torch import Tensor

from ..cond import Cond
from ..cond import rows as rows_of
from ..denoiser import Denoiser
from ..errors import Failed
from ..metrics import Metric, Sample, Score
from ..metrics.features import Features, weights_hash
from ..metrics.frechet import Moments, frechet_distance, moments
from ..rng import Rng
from .protocol import FEW, Protocol
from .rows import Row, Scout
from .sampling import Candidate, chunks_of, draws, of_teacher

if TYPE_CHECKING:
    from ..tasks import Task

MEMORY = 2**28
"""Bytes of samples that are held at once."""


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


class Stage:
    """Draws of many samples for fixed conditions: every candidate gets the same noise, and its calls are counted.

    ``cond`` has one row a sample of a draw; ``finish`` turns what a network gives into what is measured (an
    autoencoder's pictures), ``size`` values a sample.
    """

    def __init__(
        self,
        task: Task,
        protocol: Protocol,
        features: Features,
        cond: Cond,
        count: int,
        *,
        finish: Callable[[Tensor], Tensor],
        size: int,
        seed: int,
        watch: Watch,
    ) -> None:
        self.task, self.protocol, self.features, self.seed, self.watch = task, protocol, features, seed, watch
        self.cond, self.count, self.finish = cond, count, finish
        self.size = max(size, math.prod(task.shape))
        self.done = 0

    def noise(self, use: str, draw: int) -> Tensor:
        """The noise of one draw: the same for every row."""
        noise = Rng(self.seed, "evaluate", use, draw).normal((self.count, *self.task.shape))
        return self.task.begin(noise, self.cond)

    def many(
        self,
        candidate: Candidate,
        use: str,
        count: int,
        strict: bool,
        look: Callable[[int, slice, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Features [count, n, d] of many draws, the labels seen in them, and the calls of one sample.

        ``look(draw, rows, samples)`` sees the finished samples go by; nobody else keeps them. None, or with
        ``strict`` Failed, where samples are not finite.
        """
        features: list[Tensor] = []
        labels: list[Tensor] = []
        calls = 0.0
        group = max(1, MEMORY // (4 * self.count * self.size))
        for start in range(0, count, group):
            numbers = range(start, min(count, start + group))
            chunks, places = [], []
            for number in numbers:
                noise, keys = self.noise(use, number), (self.seed, "evaluate steps", use, number)
                cut = chunks_of(noise, self.cond, self.protocol.batch, *keys)
                chunks += cut
                places += [(number, int(chunk.keys[-1])) for chunk in cut]
            broken = 0
            for (number, first), part in zip(places, draws(candidate, chunks, self._read, self._told), strict=True):
                calls += part.calls * len(part.samples)
                broken += int((~torch.isfinite(part.samples.flatten(1)).all(1)).sum())
                if part.features is not None:
                    features.append(part.features)
                if part.seen is not None:
                    labels.append(part.seen)
                if look is not None and not broken:
                    look(number, slice(first, first + len(part.samples)), part.samples)
            if broken and strict:
                raise Failed(f"{candidate.title}: {broken} of {len(numbers) * self.count} samples are not finite")
            if broken:
                return None
        found = torch.cat(features).reshape(count, self.count, -1)
        seen = torch.cat(labels).reshape(count, self.count) if labels else None
        return found, seen, calls / (count * self.count)

    def _read(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Finished samples, their features, and the labels seen in them."""
        broken = ~torch.isfinite(samples).flatten(1).all(1)  # which a value range would hide
        finished = self.finish(samples)
        finished[broken] = math.nan
        return finished, *self.features.both(finished)

    def _told(self, calls: int) -> None:
        self.done += calls
        self.watch.advance("evaluate", self.done)

    def few(self, candidate: Candidate, rows: Tensor) -> Tensor:
        """Finished samples of some rows of the first draw, for pictures."""
        chunk = chunks_of(self.noise("noise", 0)[rows], rows_of(self.cond, rows), len(rows), self.seed, "pictures")
        return self.finish(next(iter(draws(candidate, chunk))).samples)

    def scout(self, tried: list[Candidate], frechets: Callable[[Tensor], list[float]]) -> tuple[Scout, ...]:
        """Every sampler on draws of its own; at each number of calls the best is chosen, the first among equals."""
        found: list[tuple[Candidate, float | None]] = []
        for candidate in tried:
            drawn = self.many(candidate, "scout", self.protocol.scout_seeds, strict=False)
            found.append((candidate, None if drawn is None else statistics.fmean(frechets(drawn[0]))))
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
        cond = rows_of(self.cond, pick)
        noise = self.task.begin(Rng(self.seed, "timing").normal((size, *self.task.shape)), cond)
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

    def work(self, teacher: list[Candidate], students: list[Candidate], tried: list[Candidate]) -> int:
        """Calls ahead: of rows that are scored, and of the samplers that are scouted and scored once a call count."""
        p = self.protocol
        scored = sum(c.nfe for c in (*teacher, *students)) + sum({c.nfe for c in tried})
        return self.count * (p.noise_seeds * scored + p.scout_seeds * sum(c.nfe for c in tried))


class Ruler:
    """A reference that samples are scored against: Fréchet distances of draws, and means of other metrics."""

    def __init__(self, real: Sample, metrics: dict[str, Metric], seed: int) -> None:
        self.real, self.metrics, self.seed = real, metrics, seed

    def frechets(self, features: Tensor) -> list[float]:
        """Of every draw's features [draws, n, d] to the reference."""
        return frechet_distance(Moments.of(features), moments(self.real)).reshape(-1).tolist()

    def details(self, samples: list[Sample]) -> tuple[dict[str, float], dict[str, float]]:
        """Means over draws of every other figure, and their mean bootstrap spreads."""
        values: dict[str, float] = {}
        spreads: dict[str, float] = {}
        for name, metric in self.metrics.items():
            rngs = [Rng(self.seed, "bootstrap", name, i) for i in range(len(samples))]
            scores = [metric(sample, self.real, rng) for sample, rng in zip(samples, rngs, strict=True)]
            values[name], spread = combined(scores)
            if spread is not None:
                spreads[name] = spread
        return values, spreads


@contextmanager
def measuring(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Networks in evaluation mode and without gradients, each put back as it was."""
    modes = [(module, module.training) for module in modules if module is not None]
    for module, _ in modes:
        module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.train(mode)


def spread_of(values: list[float]) -> float | None:
    """Standard deviation over draws; one draw has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def with_speeds(rows: list[Row], speeds: list[float | None]) -> list[Row]:
    return [row.model_copy(update={"samples_per_s": speed}) for row, speed in zip(rows, speeds, strict=True)]


def chosen_of(tried: list[Candidate], scout: tuple[Scout, ...]) -> list[Candidate]:
    """The samplers that the scouting chose."""
    return [c for c in tried if any(s.chosen and (s.solver, s.nfe) == (c.solver, c.nfe) for s in scout)]


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


def table_text(rows: list[Row], scout: tuple[Scout, ...]) -> str:
    """A teacher's rows and what was scouted, for the cache."""
    text = {"rows": [r.model_dump(mode="json") for r in rows], "scout": [s.model_dump(mode="json") for s in scout]}
    return json.dumps(text)


def read_table(text: str) -> tuple[list[Row], tuple[Scout, ...]]:
    """The opposite; ValueError, KeyError or TypeError where the text is damaged."""
    raw = json.loads(text)
    return [Row.model_validate(r) for r in raw["rows"]], tuple(Scout.model_validate(s) for s in raw["scout"])


def kept_under(cache: Path | None, ending: str, *keys: str | int) -> Path | None:
    """The file of the cache that belongs to these keys; None without a cache."""
    if cache is None:
        return None
    name = hashlib.sha256("/".join(map(str, keys)).encode()).hexdigest()[:24]
    return Path(cache) / f"teacher-{name}.{ending}"
