"""What a person sees: progress on stderr while a job runs, results as tables or JSON on stdout.

Rich is imported when something is drawn, so that the command line starts at once.
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Screen:
    """What a person sees while a job runs, on stderr: a bar on a terminal, plain lines elsewhere (a ``Watch``)."""

    def __init__(self, quiet: bool, verbose: int, json: bool) -> None:
        self.quiet, self.json = quiet, json
        self.live = sys.stderr.isatty() and not quiet
        self.totals: dict[str, int] = {}
        self.began: dict[str, float] = {}
        self.said: dict[str, float] = {}
        self.first: dict[str, tuple[float, int]] = {}
        self.bars: dict[str, Any] = {}
        self.progress: Any = None
        if verbose == 0:
            import warnings

            warnings.filterwarnings("ignore")
        else:
            import logging

            logging.basicConfig(level=logging.DEBUG if verbose > 1 else logging.INFO)

    def __enter__(self) -> Screen:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=Console(stderr=True),
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def say(self, line: str) -> None:
        if self.progress is not None:
            self.progress.console.print(line, markup=False, highlight=False)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def start(self, label: str, total: int) -> None:
        now = time.monotonic()
        self.totals[label], self.began[label], self.said[label] = total, now, now
        self.first.pop(label, None)
        if self.progress is not None:
            self.bars[label] = self.progress.add_task(label, total=total, rate="", note="")

    def advance(self, label: str, done: int, note: str = "") -> None:
        now = time.monotonic()
        since, before = self.first.setdefault(label, (now, done))  # a resumed job begins in the middle
        rate = (done - before) / (now - since) if now > since else 0.0
        if self.progress is not None:
            fields = {"rate": f"{rate:.3g}/s", **({"note": note} if note else {})}
            self.progress.update(self.bars[label], completed=done, **fields)
        elif now - self.said[label] >= 10:
            self.said[label] = now
            left = f", {rate:.3g}/s, {(self.totals[label] - done) / rate:.0f} s left" if rate else ""
            self.say(f"{label} {done}/{self.totals[label]}{left}{note and ', ' + note}")

    def finish(self, label: str) -> None:
        taken = time.monotonic() - self.began[label]
        if self.progress is not None:
            self.progress.update(self.bars[label], completed=self.totals[label], note=f"{taken:.0f} s")
        else:
            self.say(f"{label} done in {taken:.1f} s")

    def result(self, value: Any, text: str) -> None:
        """The answer of a command, on stdout: JSON for programs, text for people."""
        print(jsonlib.dumps(_plain(value), indent=2) if self.json else text, flush=True)


def _plain(value: Any) -> Any:
    """A value as JSON has it: paths are text, and what is no number is null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as text, coloured where stdout is a terminal; never cut where it is not."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(item)) for item in row))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().strip("\n").splitlines())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def lines_of(facts: dict[str, Any], indent: str = "") -> str:
    """Facts as indented lines, nested ones below their name."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", lines_of(value, indent + "  ")] if value else []
        else:
            lines.append(f"{indent}{key:<{max(2, 24 - len(indent))}} {_cell(value)}")
    return "\n".join(lines)


REPORT = {
    "model": "model",
    "nfe": "calls",
    "frechet": "Fréchet",
    "frechet_spread": "±",
    "excess": "excess",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "copied": "copied",
    "accuracy": "accuracy",
    "feature_distance": "pair distance",
    "ssim": "SSIM",
    "adherence": "prompt score",
    "samples_per_s": "samples/s",
}


def report_text(report: dict[str, Any], where: Path | None = None) -> str:
    rows = report.get("rows", [])
    used = [key for key in REPORT if any(row.get(key) is not None for row in rows)]
    lines = [table([REPORT[key] for key in used], [[row.get(key) for key in used] for row in rows])] if rows else []
    verdict = report.get("verdict") or {}
    said = [verdict.get("headline", ""), *verdict.get("points", ())]
    if said[0]:
        lines.append("\n" + "\n".join(said))
    return "\n".join([*lines, *([f"report: {where}"] if where else [])])


def plan_text(plan: dict[str, Any]) -> str:
    """A plan for people: what it is, what each phase costs, whether it fits, what would make it fit, licences."""
    head = ("recipe", "method", "task", "device", "parameters", "teacher_parameters", "how")
    lines = [plan["chosen"], ""] if "chosen" in plan else []
    lines.append(lines_of({key: plan[key] for key in head if key in plan}))
    phases = [[p["phase"], _duration(p["seconds"]), _size(p["memory_mb"])] for p in plan["phases"]]
    phases.append(["all", _duration(60 * plan["minutes"]), _size(plan["memory_mb"])])
    lines += ["", table(["phase", "time", "peak memory"], phases), ""]
    if plan["fits"]:
        lines.append(f"fits: {_size(plan['memory_mb'])} of {_size(plan['device_memory_mb'])}")
    else:
        lines.append(f"does not fit: {_size(plan['memory_mb'])} of {_size(plan['device_memory_mb'])}")
        rows = [
            [o["option"], o["change"], _size(o["memory_mb"]), "yes" if o["fits"] else "no"] for o in plan["options"]
        ]
        lines += [table(["what would help", "how", "peak memory", "fits"], rows)] if rows else []
    for one in plan["licences"]:
        lines.append(f"licence of {one['source']}: {one['name']} ({one['kind']}): {one['about']}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(megabytes: float) -> str:
    return f"{megabytes:.0f} MiB" if megabytes < 10_000 else f"{megabytes / 1024:.1f} GiB"
