"""Evaluation without reference data: the teacher's own full-length run, under other noise, stands where data would."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cond import Cond
from ..cond import count as count_of
from ..cond import rows as rows_of
from ..denoiser import Denoiser
from ..errors import Refused
from ..metrics import Metric, Sample, metric_named
from ..metrics.base import mean_score
from ..metrics.features import Coordinates, Features, RandomConv, fingerprint
from ..metrics.folders import Scorer
from ..metrics.paired import looks, paired
from ..path import Straight
from ..rng import Rng
from ..student import Student
from .pictures import tile_files
from .protocol import FEW, Protocol
from .rows import Report, Row, Scores, Scout, Tiles, best_teacher, put, with_excess
from .sampling import Candidate, full_teacher, of_student
from .stage import (
    Quiet,
    Ruler,
    Stage,
    Watch,
    chosen_of,
    combined,
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
    from ..tasks import Task

LIGHT: dict[str, Any] = {"noise_seeds": 4, "scout_seeds": 1, "batch": 8, "timing_rounds": 3, "timing_batch": 8}
"""What a protocol leaves open is set by this: a teacher of prompts is slow, and its full length is run twice."""
SHOWN = 32
"""Rows of the first draw that are kept as pictures, for the page and for the blind comparison."""
KEPT = 2**30
"""Bytes of a teacher's pictures up to which the cache keeps them."""
WORDS = 1000
"""Letters of a prompt that a report keeps."""
AGAINST = ("precision", "recall", "density", "coverage", "kernel")


def evaluate_without_reference(
    student: Student | None,
    teacher: Denoiser,
    task: Task,
    protocol: Protocol | None = None,
    *,
    watch: Watch | None = None,
    seed: int = 0,
    decode: Callable[[Tensor], Tensor] | None = None,
    scorer: Scorer | None = None,
    cache: Path | None = None,
    features: Features | None = None,
    prompts: Sequence[str] | None = None,
) -> Report:
    """Measure a student against its teacher alone, where a task has conditions but no data.

    Rows: ``teacher`` (its own sampler at full length), ``teacher:SOLVER`` (at each few number of calls the best
    sampler), ``student`` (once for each step count that it serves), ``itself`` (the teacher against itself under
    other noise: the floor). All see the same noise and the same conditions.

    Fréchet and kernel distances, precision, recall and coverage are taken against a run of the full-length teacher
    under other noise, so that a student equal to it lands exactly on the floor: excess 0. ``rmse``, ``psnr``, ``ssim``
    and ``feature_distance`` compare each sample with the full-length teacher's from the same noise: 0 apart for an
    equal student. ``feature_distance`` has as its unit the distance between two outputs of the teacher for one
    condition and different noise. ``diversity``, ``saturation`` and ``high_frequency`` are ratios to the teacher's.

    What ``protocol`` leaves at its default is taken from ``LIGHT``, and its grid from the teacher's path; ``count`` is
    the samples of one draw, spread evenly over the conditions, at least two each. ``decode`` turns latents into
    pictures (None: ``task.finish``). ``scorer`` needs ``prompts``, one a condition (None: ``task.prompts``).
    ``features`` may read no labels (None: random convolutions). ``cache`` keeps what the teacher gave.

    Raises Failed where samples are not finite; Refused for a request that cannot be met.
    """
    began = time.perf_counter()
    with measuring(student, teacher):
        found = Imitation(
            teacher, task, protocol or Protocol(), watch or Quiet(), seed, decode, scorer, features, prompts
        )
        return found.report(student, cache, began)


@dataclass(frozen=True)
class Asked:
    """The conditions of one draw: row k is made for condition ``labels[k]``, which people call ``words[k]``."""

    cond: Cond
    labels: Tensor
    words: tuple[str, ...]
    spoken: bool
    total: int


class View:
    """How samples become what is measured: decoded and held to their range; as pictures, 8 bit."""

    def __init__(self, task: Task, decode: Callable[[Tensor], Tensor] | None) -> None:
        self.task, self.decode = task, decode
        self.range = task.value_range or ((-1.0, 1.0) if decode is not None else None)
        one = self.finish(torch.zeros(1, *task.shape))
        self.shape = tuple(one.shape[1:])
        self.drawn = self.pictures(one) is not None

    def finish(self, x: Tensor) -> Tensor:
        """Finished samples; of a video its middle frame."""
        if self.decode is None:
            x = self.task.finish(x)
        else:
            assert self.range is not None
            x = self.decode(x).float().cpu().clamp(*self.range)
        return x[:, :, x.shape[2] // 2] if x.ndim == 5 else x

    def pictures(self, finished: Tensor) -> Tensor | None:
        """uint8 [n, 1 or 3, h, w]; None where a sample is no picture."""
        if finished.ndim == 4 and finished.shape[1] in (1, 3) and self.range is not None:
            low, high = self.range
            scaled = ((finished.float().clamp(low, high) - low) / (high - low) * 255).nan_to_num()
            return scaled.round().to(torch.uint8).cpu()
        shown = self.task.pictures(finished) if self.decode is None else None
        return None if shown is None else shown.permute(0, 3, 1, 2)


class Seen:
    """What one candidate gave on the draws that are looked at: values of each figure by draw, and rows to show."""

    def __init__(self, draws: int) -> None:
        self.values: dict[str, list[list[Tensor]]] = {}
        self.kept: list[list[Tensor]] = [[] for _ in range(draws)]
        self.tiles: list[Tensor] = []
        self.draws = draws

    def add(self, name: str, draw: int, values: Tensor) -> None:
        self.values.setdefault(name, [[] for _ in range(self.draws)])[draw].append(values.double().cpu())

    def by_draw(self, name: str) -> list[Tensor]:
        return [torch.cat(parts) for parts in self.values.get(name, []) if parts]


@dataclass(frozen=True)
class Own:
    """The teacher at full length: its outputs [draw][n, ...] and features [draw, n, d], and a run under other noise."""

    outputs: list[Tensor]
    features: Tensor
    other: Tensor

    @property
    def unit(self) -> float:
        """Mean distance of features between its outputs for one condition and different noise."""
        return float((self.features - self.other).norm(dim=2).mean())

    @cached_property
    def looks(self) -> dict[str, list[float]]:
        """Means over each draw of what its pictures look like."""
        found = [looks(output) for output in self.outputs if output.dtype == torch.uint8]
        return {name: [float(one[name].mean()) for one in found] for name in (found[0] if found else ())}


class Imitation:
    """One teacher, its conditions, and what is measured against its full length."""

    def __init__(
        self,
        teacher: Denoiser,
        task: Task,
        protocol: Protocol,
        watch: Watch,
        seed: int,
        decode: Callable[[Tensor], Tensor] | None,
        scorer: Scorer | None,
        features: Features | None,
        prompts: Sequence[str] | None,
    ) -> None:
        self.teacher, self.task, self.seed, self.scorer = teacher, task, seed, scorer
        self.protocol = p = lightened(protocol, teacher)
        self.view = View(task, decode)
        self.asked = asked_of(task, p, prompts)
        self.count = len(self.asked.labels)
        if self.count <= p.neighbours:
            raise Refused(f"{self.count} samples a draw are too few for {p.neighbours} neighbours: raise count")
        if scorer is not None and not (self.asked.spoken and self.view.drawn):
            raise Refused(f"{scorer.name} needs pictures and prompts in words: this task has not both")
        self.features = features or (
            RandomConv(self.view.shape, patch=getattr(getattr(task, "options", None), "patch", 1))
            if self.view.drawn
            else Coordinates()
        )
        self.stage = Stage(
            task, p, self.features, self.asked.cond, self.count,
            finish=self.view.finish, size=math.prod(self.view.shape), seed=seed, watch=watch,
        )  # fmt: skip
        self.looked = min(p.detail_seeds, p.noise_seeds)
        self.shown = shown_first(self.asked.labels, SHOWN)
        self.tiles: dict[str, Tensor] = {}

    # -- drawing ------------------------------------------------------------------------------

    def draw(self, candidate: Candidate, use: str, count: int, own: list[Tensor] | None) -> tuple[Tensor, Seen, float]:
        """Features [count, n, d] of a candidate's draws, what was seen in them, and the calls of a sample.

        ``own`` are the full-length teacher's outputs, to compare with; None where these are they.
        """
        self.stage.watch.say(f"measuring: {candidate.title}")
        seen = Seen(min(self.looked, count))

        def look(number: int, rows: slice, finished: Tensor) -> None:
            if number >= seen.draws:
                return
            shown = self.view.pictures(finished)
            kept = finished.float() if shown is None else shown
            if own is None:
                seen.kept[number].append(kept)
            else:
                for name, values in paired(kept, own[number][rows]).items():
                    seen.add(name, number, values)
            if shown is None:
                return
            for name, values in looks(shown).items():
                seen.add(name, number, values)
            if self.scorer is not None:
                words = self.asked.words[rows]
                scores = self.scorer(shown, words)
                if scores.shape != (len(words),) or not bool(torch.isfinite(scores).all()):
                    raise Refused(
                        f"{self.scorer.name} should give {len(words)} finite scores, gave {list(scores.shape)}"
                    )
                seen.add("adherence", number, scores)
            if number == 0:
                rising = self.shown.sort().values
                seen.tiles.append(shown[rising[(rising >= rows.start) & (rising < rows.stop)] - rows.start])

        drawn = self.stage.many(candidate, use, count, strict=True, look=look)
        assert drawn is not None
        if seen.tiles and use == "noise":
            self.tiles[candidate.title] = torch.cat(seen.tiles)[self.shown.argsort().argsort()]
        return drawn[0], seen, drawn[2]

    # -- scoring ------------------------------------------------------------------------------

    def row(self, candidate: Candidate, drawn: tuple[Tensor, Seen, float], own: Own, ruler: Ruler) -> Row:
        """All figures of one candidate, speed left out."""
        features, seen, calls = drawn
        samples = [Sample(f, labels=self.asked.labels) for f in features[: self.looked]]
        distances = ruler.frechets(features)
        values, spreads = ruler.details(samples)
        figures = {name: seen.by_draw(name) for name in ("rmse", "psnr", "ssim", "adherence")}
        for name in ("saturation", "high_frequency"):
            figures[name] = [value / own_mean for value, own_mean in self.ratios(seen, own, name)]
        if own.unit > 0:
            apart = (features[: self.looked] - own.features).norm(dim=2) / own.unit
            figures["feature_distance"] = list(apart)
        for name, parts in figures.items():
            if parts:
                self.put(values, spreads, name, parts)
        self.vary(values, spreads, samples, own)
        return Row(
            model=candidate.model,
            title=candidate.title,
            nfe=candidate.nfe,
            frechet=statistics.fmean(distances),
            frechet_spread=spread_of(distances),
            calls=round(calls, 6),
            count=self.count,
            seeds=self.protocol.noise_seeds,
            detail_seeds=self.looked,
            parameters=candidate.parameters,
            spreads=spreads,
            **values,
        )

    def put(self, values: dict[str, float], spreads: dict[str, float], name: str, parts: Sequence[Tensor]) -> None:
        """The mean over draws of one number a sample, with its bootstrap spread."""
        scores = [mean_score(part, Rng(self.seed, "bootstrap", name, i)) for i, part in enumerate(parts)]
        values[name], spread = combined(scores)
        spreads[name] = spread or 0.0

    def ratios(self, seen: Seen, own: Own, name: str) -> list[tuple[Tensor, float]]:
        """A figure of every draw, and the mean of the teacher's own there; nothing where that is 0."""
        means = own.looks.get(name, [])
        return list(zip(seen.by_draw(name), means, strict=True)) if all(means) else []

    def vary(self, values: dict[str, float], spreads: dict[str, float], samples: list[Sample], own: Own) -> None:
        """How far apart samples of one condition lie, over the same of the teacher from the same noise."""
        theirs = [Sample(f, labels=self.asked.labels) for f in own.features]
        metric, scores = metric_named("diversity"), []
        for i, (mine, other) in enumerate(zip(samples, theirs, strict=True)):
            if not bool((other.features != other.features[0]).any()):
                return  # a teacher that always says the same has no variety to keep
            scores.append(metric(mine, other, Rng(self.seed, "bootstrap", "diversity", i)))
        if all(math.isfinite(score.value) for score in scores):
            values["diversity"], spread = combined(scores)
            spreads["diversity"] = spread or 0.0

    def itself(self, seen: Seen, own: Own, full: Row) -> Row:
        """The teacher against itself under other noise: the floor of sets, and what unrelated pairs measure."""
        values: dict[str, float] = {} if own.unit == 0 else {"feature_distance": 1.0}
        spreads: dict[str, float] = {}
        for name in ("rmse", "psnr", "ssim"):
            if parts := seen.by_draw(name):
                self.put(values, spreads, name, parts)
        return Row(
            model="itself",
            title="Teacher against itself, other noise",
            nfe=0,
            frechet=full.frechet,
            frechet_spread=full.frechet_spread,
            calls=0,
            count=self.count,
            seeds=full.seeds,
            detail_seeds=1,
            spreads=spreads,
            **values,
        )

    # -- the table ----------------------------------------------------------------------------

    def report(self, student: Student | None, cache: Path | None, began: float) -> Report:
        p, stage = self.protocol, self.stage
        students = [] if student is None else [of_student(student, steps) for steps in sorted(student.steps)]
        tried, full = trials(self.teacher, p), full_teacher(self.teacher, p)
        hashes = {
            "protocol": p.hash,
            "features": self.features.hash,
            "data": fingerprint(self.asked.cond, self.asked.labels, "\0".join(self.asked.words)),
            "teacher": model_hash(self.teacher),
            **({} if self.scorer is None else {"scorer": self.scorer.hash}),
            **({} if student is None else {"student": model_hash(student)}),
        }
        keys = [value for name, value in hashes.items() if name != "student"]
        kept = kept_under(cache, "safetensors", "noref/1", *keys, self.seed)
        known = self.recall(kept)
        new = known is None
        ahead = stage.work([full] if new else [], students, tried if new else [])
        stage.watch.start("evaluate", ahead + (self.count * full.nfe if new else 0))
        if known is None:
            rows, scout, own = self.teach(full, tried)
            self.keep(kept, rows, scout, own)
        else:
            rows, scout, own = known
        ruler = self.ruler(own)
        floor, mine = rows[-1], rows[:-1]
        timed = [full, *chosen_of(tried, scout)]
        for candidate in students:
            timed.append(candidate)
            drawn = self.draw(candidate, "noise", p.noise_seeds, own.outputs)
            mine.append(self.row(candidate, drawn, own, ruler))
        stage.watch.finish("evaluate")
        measured = time.perf_counter() - began
        finished = with_excess([*with_speeds(mine, stage.speeds(timed)), floor])
        pictures, tiles = self.pictured(timed, finished, own, hashes)
        scores = Scores(
            schema="fewstep.scores/1",
            reference="teacher",
            task=self.task.name,
            shape=self.task.shape,
            seed=self.seed,
            rows=finished,
            scout=scout,
            protocol={**p.model_dump(mode="json"), "hash": p.hash},
            hashes=hashes,
            features={
                "name": self.features.name,
                **self.features.notes,
                **({} if self.scorer is None else {"scorer": self.scorer.name}),
            },
            few=FEW,
            tiles=tiles,
            notes=self.notes(known is not None),
            machine=machine(timed),
            seconds={"measuring": round(measured, 2), "all": round(time.perf_counter() - began, 2)},
        )
        return Report(scores, pictures)

    def ruler(self, own: Own) -> Ruler:
        metrics: dict[str, Metric] = {name: metric_named(name) for name in AGAINST}
        for name in ("precision", "recall", "density", "coverage"):
            metrics[name].k = self.protocol.neighbours  # type: ignore[attr-defined]
        return Ruler(Sample(own.other, labels=self.asked.labels), metrics, self.seed)

    def teach(self, full: Candidate, tried: list[Candidate]) -> tuple[list[Row], tuple[Scout, ...], Own]:
        """The teacher's rows, the floor last; the samplers that were tried; what it gave at full length."""
        drawn = self.draw(full, "noise", self.protocol.noise_seeds, None)
        seen, outputs = drawn[1], [torch.cat(parts) for parts in drawn[1].kept]
        other, unrelated, _ = self.draw(full, "other noise", 1, outputs)
        own = Own(outputs, drawn[0][: self.looked], other[0])
        ruler = self.ruler(own)
        for number, output in enumerate(outputs):
            for name, values in paired(output, output).items():
                seen.add(name, number, values)
        rows = [self.row(full, drawn, own, ruler)]
        floor = self.itself(unrelated, own, rows[0])
        scout = self.stage.scout(tried, ruler.frechets)
        for candidate in chosen_of(tried, scout):
            rows.append(
                self.row(candidate, self.draw(candidate, "noise", self.protocol.noise_seeds, outputs), own, ruler)
            )
        return [*rows, floor], scout, own

    def pictured(
        self, timed: list[Candidate], rows: tuple[Row, ...], own: Own, hashes: dict[str, str]
    ) -> tuple[dict[str, bytes], Tiles | None]:
        """Tiles of the teacher at full length, at its best few steps, and of the student with fewest calls."""
        if not self.view.drawn:
            return {}, None
        best = best_teacher(rows)
        chosen: list[tuple[str, Candidate]] = [("full", timed[0])]
        chosen += [
            ("best", c) for c in timed[1:] if best is not None and c.title == best.title and c.nfe < timed[0].nfe
        ]
        chosen += [("student", c) for c in timed if c.model == "student"][:1]
        self.tiles.setdefault(timed[0].title, own.outputs[0][self.shown])
        for _, candidate in chosen:
            if candidate.title not in self.tiles:
                found = self.view.pictures(self.stage.few(candidate, self.shown))
                assert found is not None
                self.tiles[candidate.title] = found
        words = [self.asked.words[i] for i in self.shown.tolist()]
        return tile_files(chosen, self.tiles, words, hashes, self.seed)

    def notes(self, recalled: bool) -> tuple[str, ...]:
        notes = []
        used = int(self.asked.labels.max()) + 1
        if used < self.asked.total:
            notes.append(f"{used} of {self.asked.total} conditions were used, evenly spread: raise count to use more.")
        if recalled:
            notes.append(
                "The teacher's figures, all but its speeds, were measured earlier under this very protocol and for "
                "these very weights and conditions (by their hashes)."
            )
        return tuple(notes)

    # -- the cache ----------------------------------------------------------------------------

    def keep(self, file: Path | None, rows: list[Row], scout: tuple[Scout, ...], own: Own) -> None:
        """Write down what the teacher gave, where it is not too much."""
        if file is None or sum(t.numel() * t.element_size() for t in own.outputs) > KEPT:
            return
        from safetensors.torch import save

        tensors = {"outputs": torch.stack(own.outputs), "features": own.features, "other": own.other}
        put(file, save({k: v.contiguous() for k, v in tensors.items()}, metadata={"table": table_text(rows, scout)}))

    def recall(self, file: Path | None) -> tuple[list[Row], tuple[Scout, ...], Own] | None:
        """The opposite; None where nothing was kept, or the file is damaged."""
        if file is None or not file.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as archive:
                found = {name: archive.get_tensor(name) for name in ("outputs", "features", "other")}
                rows, scout = read_table((archive.metadata() or {})["table"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, json.JSONDecodeError):
            return None
        outputs, features, other = found["outputs"], found["features"], found["other"]
        draws = (self.looked, self.count)
        fits = outputs.shape[:2] == draws and features.shape[:2] == draws and other.shape == features.shape[1:]
        if not fits or len(rows) < 2 or rows[-1].model != "itself" or rows[0].model != "teacher":
            return None
        return rows, scout, Own(list(outputs), features, other)


def lightened(protocol: Protocol, teacher: Denoiser) -> Protocol:
    """A protocol whose open fields suit a teacher without data: ``LIGHT``, and even times on a straight path."""
    grid = "uniform" if isinstance(teacher.path, Straight) else "karras"
    given = {name: getattr(protocol, name) for name in protocol.model_fields_set}
    return Protocol(**{**LIGHT, "grid": grid, **given})


def asked_of(task: Task, protocol: Protocol, prompts: Sequence[str] | None) -> Asked:
    """The conditions of one draw: all of them where there is room for two samples each, else evenly spread ones."""
    cond = task.test.cond if count_of(task.test.cond) else task.train.cond
    total = count_of(cond) or 1
    words = prompts if prompts is not None else getattr(task, "prompts", None)
    spoken = words is not None
    if words is None:
        labels = isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()
        if cond is None:
            words = ["no condition"]
        else:
            words = [f"label {int(cond[i])}" if labels else f"condition {i + 1}" for i in range(total)]  # type: ignore[index]
    if len(words) != total:
        raise Refused(f"{len(words)} prompts but {total} conditions: a prompt each")
    size = protocol.count or min(max(2 * total, 64), 256)
    used = max(1, min(total, size // 2))
    pick = ((torch.arange(used, dtype=torch.float64) + 0.5) * total / used).long()
    more = torch.full((used,), size // used) + (torch.arange(used) < size % used).long()
    labels_of = torch.arange(used).repeat_interleave(more)
    chosen = pick[labels_of]
    spread = tuple(str(words[i])[:WORDS] for i in chosen.tolist())
    return Asked(rows_of(cond, chosen), labels_of, spread, spoken, total)


def shown_first(labels: Tensor, most: int) -> Tensor:
    """Rows to show: the first of every condition, then the second of each, at most so many."""
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        here = labels == label
        turn[here] = torch.arange(int(here.sum()))
    return turn.argsort(stable=True)[:most]
