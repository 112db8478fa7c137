"""A table row, the scores that are kept, and what was drawn."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..errors import Refused
from ..part import Part
from .diagnosis import Diagnosis
from .protocol import FEW

SCORES: Literal["fewstep.scores/1"] = "fewstep.scores/1"
REPORT: Literal["fewstep.report/1"] = "fewstep.report/1"
Grade = Literal["excellent", "good", "fair", "weak", "unknown"]


class Row(Part):
    """One model under one way to draw from it.

    ``model`` is student, student:NAME (where several are compared), teacher (its own sampler at full length),
    teacher:SOLVER (its best sampler at ``nfe`` calls), real (training against test data: the floor) or, where no
    data was there, itself (the teacher's full length against itself under other noise).
    ``frechet`` is the mean over noise seeds and ``frechet_spread`` their standard deviation; ``excess`` is
    ``(frechet - floor) / (best teacher at 8 calls or fewer - floor)``; ``calls`` were counted, a sample.
    From ``rmse`` on: against the teacher's full length from equal noise and an equal condition.
    """

    model: str
    title: str = ""
    nfe: int
    frechet: float | None = None
    frechet_spread: float | None = None
    excess: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    copied: float | None = None
    accuracy: float | None = None
    diversity: float | None = None
    kernel: float | None = None
    rmse: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    feature_distance: float | None = None
    saturation: float | None = None
    high_frequency: float | None = None
    adherence: float | None = None
    samples_per_s: float | None = None
    calls: float | None = None
    count: int
    seeds: int = 1
    detail_seeds: int = 1
    parameters: int | None = None
    spreads: dict[str, float] = Field(default_factory=dict, description="standard errors of the other figures")
    exact: dict[str, float] = Field(default_factory=dict, description="against a law that is known exactly")

    @field_validator(
        *("frechet", "excess", "kernel", "samples_per_s", "frechet_spread"),
        *("rmse", "psnr", "ssim", "feature_distance", "saturation", "high_frequency", "adherence"),
    )
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        return value

    @property
    def floor(self) -> bool:
        """What nothing can be expected to beat: real data against real data, or the teacher against itself."""
        return self.model in ("real", "itself")

    @property
    def student(self) -> bool:
        return self.model.split(":")[0] == "student"

    @property
    def teacher(self) -> bool:
        return self.model.split(":")[0] == "teacher"


class Scout(Part):
    """A sampler tried on the scouting draws; ``frechet`` None where it gave no finite samples."""

    solver: str
    nfe: int
    frechet: float | None
    chosen: bool


class Sheet(Part):
    """A picture file of a run folder and what it shows."""

    file: str
    title: str
    kind: Literal["student", "teacher", "real", "nearest", "reading"]
    alt: str = ""
    columns: int = 1


class Reading(Part):
    """Labels or masks read from unseen pictures, in ``steps`` steps up in time from each of ``draws`` label noises.

    ``accuracy``: the share of pictures, or of places, whose label was read. ``iou``: of masks, intersection over union
    of everything but the ground. Spreads are bootstrap errors over the ``count`` pictures.
    """

    what: Literal["labels", "masks"]
    steps: int
    draws: int
    calls: int
    accuracy: float = Field(allow_inf_nan=False)
    accuracy_spread: float | None = None
    iou: float | None = Field(None, allow_inf_nan=False)
    iou_spread: float | None = None
    count: int

    @property
    def line(self) -> str:
        """In words."""
        noises = f"the mean of {self.draws} label noises" if self.draws > 1 else "one label noise"
        how = f"in {self.steps} step{'s' if self.steps > 1 else ''} from {noises}"
        if self.iou is not None:
            return f"Masks read {how}: IoU {self.iou:.3f}, {self.accuracy:.1%} of the places right."
        return f"Labels read {how}: {self.accuracy:.1%} right."


class Tiles(Part):
    """Pictures of equal noise, one file each: a line for every prompt shown, a column for every model.

    ``kinds`` of columns: full (the teacher at full length), best (its best few steps), student.
    """

    kinds: tuple[Literal["full", "best", "student"], ...]
    titles: tuple[str, ...]
    prompts: tuple[str, ...] = Field(max_length=256)
    files: tuple[tuple[str, ...], ...] = Field(max_length=256)

    @model_validator(mode="after")
    def _square(self) -> Tiles:
        wide, high = len(self.kinds), len(self.prompts)
        if len(set(self.kinds)) != wide or len(self.titles) != wide or len(self.files) != high:
            raise ValueError("tiles have one title a column and one line of files a prompt")
        if any(len(line) != wide for line in self.files):
            raise ValueError("every line of tiles has one file a column")
        return self


class Preference(Part):
    """Outcome of a blind comparison: ``share`` of the decided votes that preferred the student, with its interval.

    ``low`` and ``high`` are Wilson's 95 % interval; None where every vote was a tie.
    """

    against: Literal["full", "best"]
    title: str
    wins: int
    losses: int
    ties: int
    share: float | None = None
    low: float | None = None
    high: float | None = None


class Measured(Part):
    """What both files hold: see ``Scores`` and ``Document``."""

    reference: Literal["data", "teacher"] = "data"
    task: str
    shape: tuple[int, ...]
    seed: int
    rows: tuple[Row, ...] = Field(min_length=1)
    scout: tuple[Scout, ...] = ()
    protocol: dict[str, Any]
    hashes: dict[str, str]
    features: dict[str, Any] = {}
    few: int = FEW
    sheets: tuple[Sheet, ...] = ()
    readings: tuple[Reading, ...] = ()
    tiles: Tiles | None = None
    notes: tuple[str, ...] = ()
    machine: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    @property
    def floor(self) -> Row | None:
        return next((row for row in self.rows if row.floor), None)

    @property
    def full(self) -> Row | None:
        return next((row for row in self.rows if row.model == "teacher"), None)

    @property
    def best(self) -> Row | None:
        """The teacher's best row at few calls: what an excess of 1 equals."""
        return best_teacher(self.rows, self.few)

    @property
    def students(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.student)


class Scores(Measured):
    """What an evaluation measured: ``scores.json`` of a run folder."""

    kind: Literal["fewstep.scores/1"] = Field(SCORES, alias="schema")

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCORES, **self.model_dump(mode="json", exclude={"kind"})}


class Verdict(Part):
    """``headline`` is one sentence; ``points`` follow from measured rows; ``warnings`` are what to beware of."""

    grade: Grade
    headline: str
    points: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Document(Measured):
    """``report/report.json``: the scores, what they mean, and what the run folder says of their origin."""

    kind: Literal["fewstep.report/1"] = Field(REPORT, alias="schema")
    verdict: Verdict
    preference: tuple[Preference, ...] = ()
    origin: dict[str, Any] = Field(default_factory=dict, description="contract, environment and training of the run")
    diagnosis: Diagnosis | None = Field(None, description="how the run went, from its probes")

    def as_dict(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json", exclude={"kind", "diagnosis"})
        return {"schema": REPORT, **plain, "diagnosis": None if self.diagnosis is None else self.diagnosis.as_dict()}


@dataclass(frozen=True)
class Report:
    """Scores, and the pictures that go with them: file name below the run folder, PNG bytes."""

    scores: Scores
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.scores.rows

    def as_dict(self) -> dict[str, Any]:
        """What ``report.json`` holds, without what only a run folder knows."""
        return document(self.scores).as_dict()

    def save(self, run: Path) -> Path:
        """Write ``scores.json`` and the pictures into a run folder; the path of the first."""
        run = Path(run)
        for name, data in self.pictures.items():
            put(run / name, data)
        return put(run / "scores.json", (json.dumps(self.scores.as_dict(), indent=1) + "\n").encode())


def document(
    scores: Scores,
    origin: dict[str, Any] | None = None,
    preference: tuple[Preference, ...] = (),
    diagnosis: Diagnosis | None = None,
) -> Document:
    """Scores with their verdict, and what people preferred where they were asked."""
    from .verdict import judge

    values = {name: getattr(scores, name) for name in Measured.model_fields}
    return Document(
        schema=REPORT, verdict=judge(scores), preference=preference, origin=origin or {}, diagnosis=diagnosis, **values
    )


def put(file: Path, data: bytes) -> Path:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(file)
    return file


def best_teacher(rows: tuple[Row, ...] | list[Row], few: int = FEW) -> Row | None:
    known = [row for row in rows if row.teacher and row.nfe <= few and row.frechet is not None]
    return min(known, key=lambda row: (row.frechet, row.nfe), default=None)


def with_excess(rows: list[Row], few: int = FEW) -> tuple[Row, ...]:
    """Rows with ``excess = (frechet - floor) / (best few-step teacher - floor)``.

    None everywhere without a teacher, and where its best is no farther from real data than the floor is: the
    ratio means nothing then.
    """
    floor = next((row.frechet for row in rows if row.floor), None)
    best = best_teacher(rows, few)
    if floor is None or best is None or best.frechet is None or best.frechet <= floor:
        return tuple(row.model_copy(update={"excess": None}) for row in rows)
    gap = best.frechet - floor
    return tuple(
        row.model_copy(update={"excess": None if row.frechet is None else (row.frechet - floor) / gap}) for row in rows
    )


def read_scores(file: Path) -> Scores:
    """The scores of a run; Refused, in one line, where the file is missing, damaged or of another version."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refused(f"no scores.json in {file.parent}: evaluate the run first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    try:
        raw = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file} is damaged ({error}): evaluate the run again") from None
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != SCORES:
        raise Refused(f"{file} has schema {found!r}, this version reads {SCORES!r}: evaluate the run again")
    try:
        return Scores.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(f"{file} is damaged ({where}: {first['msg'].lower()}): evaluate the run again") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
