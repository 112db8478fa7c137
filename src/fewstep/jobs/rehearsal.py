"""A run at a small scale, thrown away: what each phase of it cost, and what the whole run will."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from ..errors import Failed
from ..train.footprint import Meter, size_of_rows
from ..train.recipe import Recipe
from . import training
from .setting import Setting

# of a rehearsed stage: a checkpoint after the 3rd and the 6th, a probe in the 4th, 8th and 9th. What happens for
# the first time loads libraries, so that its second time is what it costs from then on.
INTERVALS, SAVE_EVERY, PROBE_EVERY = 9, 3, 4
CLEAN = (1, 2, 4, 5)
SHORT = {
    "noise_seeds": 1, "scout_seeds": 1, "detail_seeds": 1, "nfes": [2], "solvers": ["euler"], "full_solver": "euler",
    "full_nfe": 4, "timing_rounds": 1, "timing_batch": 64,
}  # fmt: skip
ROWS = 1000  # of the test split, at most
PAIRS = 512  # a batch of the sampler that makes them


@dataclass(frozen=True)
class Phase:
    """What a part of a run costs: wall clock and processor seconds, bytes at the peak."""

    name: str
    seconds: float
    processor: float
    memory: int


@dataclass(frozen=True)
class Mark:
    """Something that a job said, and when."""

    kind: str
    label: str
    done: int
    wall: float
    processor: float
    peak: int


class Clock:
    """A ``Watch`` that notes when everything happened; ``end`` stops the job at the first word of a label."""

    def __init__(self, meter: Meter, end: str = "") -> None:
        self.meter, self.end, self.marks = meter, end, list[Mark]()

    def _mark(self, kind: str, label: str, done: int) -> None:
        peak = self.meter.peak()
        self.marks.append(Mark(kind, label, done, time.perf_counter(), time.process_time(), peak))

    def start(self, label: str, total: int) -> None:
        self._mark("start", label, total)
        if self.end and label == self.end:
            raise Ended
        self.meter.reset()

    def advance(self, label: str, done: int, note: str = "") -> None:
        self._mark("advance", label, done)

    def say(self, line: str) -> None:
        self._mark("say", line, 0)

    def finish(self, label: str) -> None:
        self._mark("finish", label, 0)

    def now(self) -> Mark:
        """A mark of one's own; peaks begin anew."""
        self._mark("now", "", 0)
        self.meter.reset()
        return self.marks[-1]

    def of(self, label: str) -> list[Mark]:
        return [m for m in self.marks if m.label == label]


class Ended(Exception):
    """A job was stopped because all that was wanted of it is known."""


def small(recipe: Recipe, wanted: list[Any], each: list[float], rows: list[int]) -> Recipe:
    """The recipe of the rehearsal: a few steps of ``rows`` rows a stage, few pairs, a short evaluation.

    ``each`` are rough guesses of the seconds of a step, which decide how many make an interval.
    """
    stages: list[dict[str, Any]] = []
    for index in range(len(recipe.stages) + 1):
        part = recipe.stage(index)
        options = {**part.method.options}
        if wanted[index] is not None:
            options["pairs"] = {**wanted[index].model_dump(), "count": min(wanted[index].count, PAIRS)}
        method = part.method.model_copy(update={"options": options})
        interval = max(1, min(20, round(0.25 / max(each[index], 1e-4))))
        stages.append({"steps": INTERVALS * interval, "method": method, "batch": rows[index]})
    first, *later = stages
    every: int = min(stage["steps"] // INTERVALS for stage in stages)
    return recipe.model_copy(
        update={
            **first,
            "stages": tuple(old.model_copy(update=new) for old, new in zip(recipe.stages, later, strict=True)),
            "log": recipe.log.model_copy(update={"every": every, "probe": every * PROBE_EVERY}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": every * SAVE_EVERY}),
        }
    )


def pairs_phase(clock: Clock, recipe: Recipe, setting: Setting, count: int, name: str) -> Phase | None:
    """Making the pairs: time by their number, memory by what is held of them (twice, when parts are joined)."""
    marks = clock.of("pairs")
    if not marks:
        return None
    done = [m for m in marks if m.kind == "advance"][-1]
    share = count / max(done.done, 1)
    cond = setting.task.train.rows(slice(0, 1)).cond
    more = max(count - done.done, 0) * 2 * (2 * size_of_rows(setting.shape, None) + size_of_rows((0,), cond))
    peak = done.peak + (more if clock.meter.cuda is None else 0)
    return Phase(name, (done.wall - marks[0].wall) * share, (done.processor - marks[0].processor) * share, peak)


def training_phase(clock: Clock, label: str, part: Recipe, name: str) -> tuple[Phase, float]:
    """A stage's steps, probes and checkpoints from the rehearsed ones; and the seconds of one step."""
    marks = clock.of(label)
    ends = [m for m in marks if m.kind in ("start", "advance")]
    finish = marks[-1]
    steps = ends[2].done - ends[1].done
    probes = -(-part.steps // (part.log.probe or max(part.steps // 10, 1)))
    saves = (part.steps - 1) // (part.checkpoint.every or max(part.steps // 10, 1))
    spent: dict[str, float] = {}
    each = 0.0
    for clockwork in ("wall", "processor"):
        times = [getattr(m, clockwork) for m in ends]
        gaps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
        if len(gaps) != INTERVALS:
            raise Failed(f"the rehearsal of {label} took {len(gaps)} intervals instead of {INTERVALS}")
        clean = statistics.median(gaps[i] for i in CLEAN)
        save, probe = max(0.0, gaps[6] - clean), max(0.0, min(gaps[7:]) - clean)
        warm = max(0.0, gaps[0] + gaps[3] - 2 * clean - save - probe)
        spent[clockwork] = clean / steps * part.steps + warm + saves * save + probes * probe
        each = clean / steps if clockwork == "wall" else each
    return Phase(name, spent["wall"], spent["processor"], max(m.peak for m in [*ends[1:], finish])), each


def evaluation_phase(clock: Clock, begin: Mark, end: Mark, recipe: Recipe, setting: Setting, total: int) -> Phase:
    """The evaluation, from a short one: calls by their number, features by samples, figures by rows.

    ``total`` is the number of calls of the whole evaluation, as it said itself before it began: it leaves out what
    is known already. Where the short evaluation is of another kind, its time grows with the calls.
    """
    from ..evaluate import Protocol
    from ..evaluate.measure import trials

    whole, count = Protocol(**recipe.evaluate.protocol), len(setting.task.test)
    rows = min(whole.count or count, count)
    seen = min(rows, ROWS)
    marks = [m for m in clock.marks if begin.wall <= m.wall <= end.wall]
    starts = [m for m in marks if m.kind == "start" and m.label == "evaluate"]
    drawn = [m for m in marks if m.kind == "advance" and m.label == "evaluate"]
    said = [m for m in marks if m.kind == "say" and m.label.startswith("measuring")]
    peak = max(m.peak for m in [*marks, end])
    held = max(0, whole.noise_seeds - 1) * rows * (4 * sum(setting.shape[:1]) + 8 * 64)
    spent: dict[str, float] = {}
    for clockwork in ("wall", "processor"):

        def at(mark: Mark, clockwork: str = clockwork) -> float:
            return float(getattr(mark, clockwork))

        took = at(end) - at(begin)
        finished = [m for m in marks if m.kind == "finish" and m.label == "evaluate"]
        if not (starts and said and finished):
            spent[clockwork] = took * (total / max(starts[0].done, 1) if starts else 1.0)
            continue
        borders = [*said, finished[0]]
        draws, figures, calls = [], [], []
        for one, other in zip(borders[:-1], borders[1:], strict=True):
            inside = [m for m in drawn if one.wall <= m.wall <= other.wall]
            last = inside[-1] if inside else one
            before = [m.done for m in drawn if m.wall < one.wall]
            draws.append(at(last) - at(one))
            figures.append(at(other) - at(last))
            calls.append(last.done - (before[-1] if before else 0))
        spread = max(calls) - min(calls)
        per_call = max(0.0, (max(draws) - min(draws)) / spread) if spread else draws[0] / max(calls[0], 1)
        per_sample = max(0.0, statistics.fmean(d - per_call * c for d, c in zip(draws, calls, strict=True)) / seen)
        figure = statistics.median(figures) * (rows / seen) ** 2
        tried = [] if setting.denoiser is None else trials(setting.denoiser, whole)
        mine = whole.noise_seeds * rows * len(said[2:] if tried else said)
        known = total <= mine * max(1, max((c.nfe for c in tried), default=1) // 8)
        measured = len(said[2:] if tried else said) + (0 if known else 1 + len({c.nfe for c in tried}))
        samples = measured * whole.noise_seeds * rows + (0 if known else len(tried) * whole.scout_seeds * rows)
        nfes = [c for c in {c.nfe for c in tried}] + ([whole.full_nfe] if tried else []) + [1]
        timing = whole.timing_batch * per_call * (
            whole.timing_rounds * sum(nfes) + sum(n for n in nfes if n <= 8)
        ) if whole.timing_rounds else 0.0  # fmt: skip
        rest = at(end) - at(finished[0]) + at(starts[0]) - at(begin)
        spent[clockwork] = (
            rest + total * per_call + samples * per_sample + measured * whole.detail_seeds * figure
            + timing + (whole.detail_seeds - 1) * figure
        )  # fmt: skip
    return Phase("evaluation", spent["wall"], spent["processor"], peak + held)


def calls_of_evaluation(recipe: Recipe, run: File, setting: Setting, student: Any, meter: Meter) -> int:
    """How many calls the whole evaluation will make: it says so, and is stopped."""
    clock = Clock(meter, end="evaluate")
    try:
        training._evaluated(recipe, run, setting, student, {"steps": [1], "seconds": 0.0}, clock)
    except Ended:
        pass
    return clock.marks[-1].done if clock.marks else 0
