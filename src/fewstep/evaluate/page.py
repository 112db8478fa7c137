"""The report: one page for people, one file for programs, one table for the terminal; made from a run folder alone."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import need
from .blind import ballot, preferences, write_ballot
from .diagnosis import charts, read_diagnosis
from .pictures import thumbnail
from .plots import curve, training
from .rows import Document, Measured, Reading, Report, Row, Sheet, document, put, read_scores

MAX_PICTURE = 8 * 2**20
MAX_TEXT = 32 * 2**20
PNG = b"\x89PNG\r\n\x1a\n"

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("nfe", "calls", "network calls for one sample"),
    ("frechet", "Fréchet", "distance to unseen real data, mean over noise seeds ± their spread; lower is better"),
    ("excess", "excess", "distance above the floor, the teacher's best at few calls being 1x; lower is better"),
    ("precision", "precision", "share of samples among real ones; higher is better"),
    ("recall", "recall", "share of real data among the samples; higher is better"),
    ("coverage", "coverage", "share of real samples with a generated one near; higher is better"),
    ("copied", "copied", "share nearer to a training sample than the nearest 5% of unseen real ones; .05 is honest"),
    ("accuracy", "accuracy", "share in which a classifier sees the label that was asked for"),
    ("samples_per_s", "samples/s", "timed in turns on the same machine"),
)
MORE: tuple[tuple[str, str, str], ...] = (
    ("calls", "counted calls", "calls that happened, for one sample; guidance counts twice"),
    ("kernel", "kernel distance", "unbiased polynomial kernel distance; 0 between equals"),
    ("density", "density", "real neighbourhoods that hold a sample; about 1 between equals"),
    ("diversity", "diversity", "distance between samples of one label, over the same of real data"),
    ("parameters", "parameters", "of the network"),
    ("count", "samples", "in one draw"),
)
IMITATION: tuple[tuple[str, str, str], ...] = (
    ("nfe", "calls", "network calls for one sample"),
    ("frechet", "Fréchet", "of sets: distance to the full-length teacher's under other noise; lower is better"),
    ("excess", "excess", "distance above the floor, the teacher's best at few calls being 1x; lower is better"),
    ("feature_distance", "pair distance", "to the full-length teacher's sample from the same noise; 1 is unrelated"),
    ("ssim", "SSIM", "likeness to the full-length teacher's picture from the same noise; 1 is equal"),
    ("diversity", "variety", "distance between samples of one prompt, over the full-length teacher's; 1 is as varied"),
    ("adherence", "prompt score", "how well pictures obey their prompts, by the scorer named below; higher is better"),
    ("saturation", "saturation", "over the full-length teacher's; 1 is the same"),
    ("high_frequency", "fine detail", "energy of the finest detail, over the full-length teacher's; 1 is the same"),
    ("samples_per_s", "samples/s", "timed in turns on the same machine"),
)
"""Columns where a teacher stands for the data."""
IMITATION_MORE: tuple[tuple[str, str, str], ...] = (
    ("calls", "counted calls", "calls that happened, for one sample; guidance counts twice"),
    ("rmse", "RMSE", "to the full-length teacher's sample from the same noise, of the full range"),
    ("psnr", "PSNR", "the same in decibels; 100 is equal"),
    ("kernel", "kernel distance", "unbiased polynomial kernel distance; 0 between equals"),
    ("precision", "precision", "share of samples among the teacher's"),
    ("recall", "recall", "share of the teacher's samples among these"),
    ("density", "density", "neighbourhoods of the teacher's that hold a sample; about 1 between equals"),
    ("coverage", "coverage", "share of the teacher's samples with one of these near"),
    ("parameters", "parameters", "of the network"),
    ("count", "samples", "in one draw"),
)
LINES = 8
"""Prompts that the page shows; the others are in the blind comparison."""
THUMB = 384


def write_report(run: Path) -> Path:
    """Write ``report/index.html`` and ``report/report.json`` from a run folder; the path of the first.

    Needs ``scores.json``; ``samples/*.png``, ``student/fewstep.json``, ``*.jsonl``, ``recipe.toml``,
    ``training.json`` and ``environment.json`` are used where they are there. The page is one file: pictures
    inside, no network, no script. Where prompts were answered in pictures, ``report/ab.html`` asks people which they
    prefer, blindly, and what ``votes/*.json`` say is counted.

    Raises Refused, in one line, where the scores are missing or damaged; MissingExtra without jinja2.
    """
    run = Path(run)
    scores = read_scores(run / "scores.json")
    need("jinja2", "evaluate")
    recipe = _text(run / "recipe.toml")
    origin = {
        "student": _json(run / "student" / "fewstep.json"),
        "environment": _json(run / "environment.json"),
        "training": _json(run / "training.json"),
    }
    asked = ballot(run, scores)
    said = () if asked is None else preferences(run, scores, asked)
    found = document(scores, {key: value for key, value in origin.items() if value}, said, read_diagnosis(run))
    name = "page.html" if found.reference == "data" else "imitation.html"
    page = template(name).render(**view(found, run, recipe), ballot=asked)
    if asked is not None:
        write_ballot(run, scores, asked)
    put(run / "report" / "report.json", (json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n").encode())
    return put(run / "report" / "index.html", page.encode("utf-8", errors="replace"))


def template(name: str) -> Any:
    """One of our templates; whatever it is given is escaped."""
    jinja2 = need("jinja2", "evaluate")
    loader = jinja2.FunctionLoader(lambda file: (files(__package__) / file).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(cell=cell, share=_share, name=row_name)
    return environment.get_template(name)


def view(found: Document, run: Path, recipe: str | None) -> dict[str, Any]:
    """All that the page shows."""
    rows = found.rows
    columns = columns_of(found.reference, rows)
    more = [c for c in _all(found.reference)[1] if any(getattr(row, c[0]) is not None for row in rows)]
    exact = list(dict.fromkeys(name for row in rows for name in row.exact))
    student = min(found.students, key=lambda row: row.nfe, default=None)
    pictures = [(sheet, data) for sheet in found.sheets if (data := _picture(run, sheet.file)) is not None]
    progress = sorted((run / "samples").glob("step_*.png"))
    every = max(1, -(-len(progress) // 4))
    return {
        "doc": found,
        "verdict": found.verdict,
        "student": student,
        "best": found.best,
        "full": found.full,
        "floor": found.floor,
        "columns": columns,
        "more": more,
        "exact": exact,
        "tiles": _tiles(found, student),
        "pictures": [(s, d, _figures(s, rows)) for s, d in pictures if s.kind not in ("nearest", "reading")],
        "reading": next(((s, d) for s, d in pictures if s.kind == "reading"), None),
        "grid": _grid(found, run),
        "nearest": next(((s, d) for s, d in pictures if s.kind == "nearest"), None),
        "progress": [
            (p.stem.rpartition("_")[2].lstrip("0") or "0", data)
            for p in progress[::-1][::every][::-1]
            if (data := _picture(run, f"samples/{p.name}")) is not None
        ],
        "curve": curve(found),
        "losses": training(_log(run / "log.jsonl")),
        "game": [] if found.diagnosis is None else charts(found.diagnosis),
        "recipe": recipe,
        "method": _method(found, recipe),
        "warned": _warned(found),
    }


def _all(reference: str) -> tuple[tuple[tuple[str, str, str], ...], tuple[tuple[str, str, str], ...]]:
    return (IMITATION, IMITATION_MORE) if reference == "teacher" else (COLUMNS, MORE)


def columns_of(reference: str, rows: tuple[Row, ...]) -> list[tuple[str, str, str]]:
    """The columns of the table that have a figure: (key, title, meaning)."""
    return [c for c in _all(reference)[0] if any(getattr(row, c[0]) is not None for row in rows)]


def _grid(found: Measured, run: Path) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Lines of pictures from equal noise: (prompt, [(kind of column, picture as a data address)])."""
    if found.tiles is None:
        return []
    lines: list[tuple[str, list[tuple[str, str | None]]]] = []
    for prompt, names in list(zip(found.tiles.prompts, found.tiles.files, strict=True))[:LINES]:
        data = [picture_bytes(run, name) for name in names]
        shown = [None if one is None else thumbnail(one, THUMB) for one in data]
        if any(shown):
            lines.append((prompt, [(str(kind), one) for kind, one in zip(found.tiles.kinds, shown, strict=True)]))
    return lines


def _tiles(found: Measured, student: Row | None) -> list[tuple[str, str, str]]:
    """The four figures at the top: (figure, name, what it is held against)."""
    if student is None:
        return []
    if found.reference == "teacher":
        return _imitation_tiles(found, student)
    best, full, floor = found.best, found.full, found.floor
    tiles = []
    if student.excess is not None and best is not None:
        tiles.append((f"{student.excess:.2f}x", "excess", f"1x = teacher's best at up to {found.few} calls"))
    if student.frechet is not None:
        spread = "" if student.frechet_spread is None else f" ± {number(student.frechet_spread)}"
        against = (
            ""
            if floor is None or floor.frechet is None
            else f"{spread.strip()}; real against real: {number(floor.frechet)}"
        )
        tiles.append((number(student.frechet), "Fréchet distance", against))
    if student.samples_per_s and full is not None and full.samples_per_s:
        tiles.append(
            (
                f"{student.samples_per_s / full.samples_per_s:.0f}x",
                "faster",
                f"than the teacher's full {full.nfe} calls",
            )
        )
    if student.recall is not None:
        theirs = "" if full is None or full.recall is None else f"the teacher's: {full.recall:.2f}"
        tiles.append((f"{student.recall:.2f}", "recall (variety)", theirs))
    elif student.accuracy is not None:
        tiles.append((f"{student.accuracy:.1%}", "right class", ""))
    return tiles[:4]


def _imitation_tiles(found: Measured, student: Row) -> list[tuple[str, str, str]]:
    tiles = []
    if student.excess is not None:
        tiles.append((f"{student.excess:.2f}x", "excess", f"1x = teacher's best at up to {found.few} calls"))
    if student.feature_distance is not None:
        tiles.append((f"{student.feature_distance:.2f}", "pair distance", "0 = the teacher's picture, 1 = unrelated"))
    if student.diversity is not None:
        tiles.append((f"{student.diversity:.2f}", "variety", "1 = as varied as the teacher, 0 = all alike"))
    full = found.full
    if student.adherence is not None:
        theirs = "" if full is None or full.adherence is None else f"the teacher's: {number(full.adherence)}"
        tiles.append((number(student.adherence), "prompt score", theirs))
    if student.samples_per_s and full is not None and full.samples_per_s:
        factor = student.samples_per_s / full.samples_per_s
        tiles.append((f"{factor:.0f}x", "faster", f"than the teacher's full {full.nfe} calls"))
    return tiles[:5]


def _figures(sheet: Sheet, rows: tuple[Row, ...]) -> str:
    row = next((r for r in rows if r.title == sheet.title), None)
    return "" if row is None or row.frechet is None else f"Fréchet distance {number(row.frechet)}"


def _method(found: Document, recipe: str | None) -> str:
    contract = found.origin.get("student")
    name = contract.get("method") if isinstance(contract, dict) else None
    if name is None and recipe is not None:
        try:
            section = tomllib.loads(recipe).get("method")
            name = section.get("name") if isinstance(section, dict) else None
        except (ValueError, RecursionError):
            name = None
    return str(name)[:80] if name else ""


def _warned(found: Document) -> list[str]:
    """What was said while it trained."""
    lines = found.origin.get("training")
    said = lines.get("warnings") if isinstance(lines, dict) else None
    return [str(line)[:300] for line in said[:10]] if isinstance(said, list) else []


# -- reading a folder that may hold anything ----------------------------------------------------


def _text(file: Path) -> str | None:
    try:
        if file.stat().st_size > MAX_TEXT:
            return None
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or it cannot be written down again as JSON."""
    text = _text(file)
    if text is None:
        return None
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _log(file: Path) -> list[dict[str, object]]:
    lines = []
    for text in (_text(file) or "").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the last line of a run that was stopped
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _picture(run: Path, name: str) -> str | None:
    """A PNG below ``samples`` as base64; None for any other file."""
    data = picture_bytes(run, name)
    return None if data is None else base64.b64encode(data).decode()


def picture_bytes(run: Path, name: str) -> bytes | None:
    """A PNG below ``samples``; None for any other file."""
    folder = (run / "samples").resolve()
    try:
        file = (run / name).resolve()
        if not file.is_relative_to(folder) or file.stat().st_size > MAX_PICTURE:
            return None
        data = file.read_bytes()
    except (OSError, ValueError):
        return None
    return data if data.startswith(PNG) else None


# -- words for numbers --------------------------------------------------------------------------


def number(value: float) -> str:
    """Three figures that mean something, without an exponent where that reads better.

    >>> number(0.24612), number(11.23), number(6912.3), number(0.000042)
    ('0.246', '11.2', '6,912', '4.2e-05')
    """
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 0.01 or size == 0:
        return f"{value:.3f}"
    return f"{value:.2g}"


def _share(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if 0 <= value < 0.9995 else f"{value:.2f}"


def cell(row: Row, name: str) -> str:
    """One cell of the table, in words; a dash where nothing was measured."""
    value = getattr(row, name)
    if value is None:
        return "–"
    match name:
        case "nfe" | "count" | "parameters":
            return "–" if name == "nfe" and row.floor else f"{int(value):,}"
        case "calls":
            return "–" if row.floor else f"{value:g}"
        case "frechet":
            return number(value) if row.frechet_spread is None else f"{number(value)} ± {number(row.frechet_spread)}"
        case "excess":
            return "0" if row.floor else f"{value:.2f}x"
        case "precision" | "recall" | "coverage" | "copied" | "accuracy":
            return _share(value)
        case "ssim" | "rmse":
            return f"{value:.3f}"
        case "psnr":
            return f"{value:.1f}"
        case "feature_distance" | "diversity" | "saturation" | "high_frequency":
            return f"{value:.2f}" if value < 100 else number(value)
        case "samples_per_s":
            return number(value) if value < 100 else f"{float(f'{value:.3g}'):,.0f}"
    return number(value)


def row_name(row: Row) -> str:
    """A row's title without its calls, which have a column."""
    head, comma, tail = row.title.rpartition(", ")
    return head if comma and tail.endswith(("call", "calls")) else row.title or row.model


def table(report: Report | Measured | Mapping[str, Any]) -> str:
    """The rows as plain text, for a terminal; takes a report, scores, or the content of ``report.json``."""
    if isinstance(report, Mapping):
        rows, reference = tuple(Row.model_validate(row) for row in report["rows"]), report.get("reference", "data")
        read = tuple(Reading.model_validate(one) for one in report.get("readings", ()))
    else:
        scores = report.scores if isinstance(report, Report) else report
        rows, reference, read = scores.rows, scores.reference, scores.readings
    columns = columns_of(reference, rows)
    lines = [["model", *(title for _, title, _ in columns)]]
    lines += [[row_name(row), *(cell(row, name) for name, _, _ in columns)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def text(line: list[str]) -> str:
        first, *rest = line
        return "  ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        ).rstrip()

    ruled = [text(lines[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(text, lines[1:])]
    return "\n".join([*ruled, *(one.line for one in read)])
