"""The command line. Every command is a thin caller of ``jobs``; here are its words, its progress and its exit codes.

0 done; 1 failed while running; 2 bad request; 3 a missing extra; 130 interrupted. An error is one line on
stderr; a traceback comes with -vv alone. With --json stdout has nothing but JSON. Torch is imported inside
the commands, so that ``fewstep --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json as jsonlib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import Failed, Interrupted, MissingExtra, Refused
from .machine import EXTRAS, examine, pick_device, set_threads

if TYPE_CHECKING:
    from .train.recipe import Recipe

Usage: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, wherever this typer keeps it
Command = TypeVar("Command", bound=Callable[..., None])

# what a person may set on any command
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and the result only.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Warnings (-v), tracebacks (-vv).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random draw [default: the recipe's].")]
Threads = Annotated[
    int | None, typer.Option(envvar="FEWSTEP_THREADS", min=1, help="CPU threads [default: one per physical core].")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Changes to the recipe, e.g. optim.lr=1e-3.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.")]


class Screen:
    """What a person sees while a job runs, on stderr: a bar on a terminal, plain lines elsewhere (a ``Watch``)."""

    def __init__(self, quiet: bool, verbose: int, json: bool) -> None:
        self.quiet, self.json = quiet, json
        self.live = sys.stderr.isatty() and not quiet
        self.totals: dict[str, int] = {}
        self.since: dict[str, tuple[float, float]] = {}
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
        self.totals[label], self.since[label] = total, (time.monotonic(), time.monotonic())
        if self.progress is not None:
            self.bars[label] = self.progress.add_task(label, total=total, rate="", note="")

    def advance(self, label: str, done: int, note: str = "") -> None:
        now, (start, said) = time.monotonic(), self.since[label]
        rate = done / max(now - start, 1e-9)
        if self.progress is not None:
            fields = {"rate": f"{rate:.3g}/s", **({"note": note} if note else {})}
            self.progress.update(self.bars[label], completed=done, **fields)
        elif now - said > 10:
            self.since[label] = (start, now)
            left = (self.totals[label] - done) / max(rate, 1e-9)
            self.say(f"{label} {done}/{self.totals[label]}, {rate:.3g}/s, {left:.0f} s left{note and ', ' + note}")

    def finish(self, label: str) -> None:
        taken = time.monotonic() - self.since.pop(label)[0]
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


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
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
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _lines(facts: dict[str, Any], indent: str = "") -> str:
    """Facts as indented lines, nested ones below their name."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", _lines(value, indent + "  ")] if value else []
        else:
            lines.append(f"{indent}{key:<{max(2, 24 - len(indent))}} {_cell(value)}")
    return "\n".join(lines)


# Recipes and run folders


def _packaged() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def _source(what: str) -> Path:
    """Where a recipe is: a file, a run folder that holds one, or the name of one that ships."""
    path = Path(what)
    if path.is_dir() and (path / "recipe.toml").exists():
        return path / "recipe.toml"
    if path.is_file():
        return path
    known = _packaged()
    if what in known:
        return known[what]
    from .registry import nearest

    if path.is_dir():
        raise Refused(f"{what} is a folder without recipe.toml or model_index.json: neither a run nor a teacher")
    if path.suffix == ".toml" or len(path.parts) > 1:
        close = nearest(path.stem, list(known))
        raise Refused(f"there is no file {what}; among the recipes that ship, {close}")
    raise Refused(f"unknown teacher or recipe {what!r}: {nearest(what, list(known))}")


def _recipe(what: str, overrides: Sequence[str] | None, seed: int | None = None) -> Recipe:
    from .train.recipe import load_recipe

    changes = list(overrides or ()) + ([f"seed={seed}"] if seed is not None else [])
    for change in changes:
        if "=" not in change.lstrip("="):
            raise Refused(f"a change to the recipe is KEY.SUB=VALUE, got {change!r}")
    return load_recipe(_source(what), changes)


def _run_folder(what: str, out: Path | None, resume: bool) -> Path:
    """The run to write: a new folder, or with ``resume`` the one that is there."""
    source = Path(what)
    if out is None and resume and (source / "recipe.toml").exists():
        return source
    name = source.resolve().name if source.is_dir() else source.stem
    runs = [Path("runs") / (name if k == 1 else f"{name}-{k}") for k in range(1, 1000)]
    if resume:
        there = out or next((run for run in reversed(runs) if run.exists()), None)
        if there is None or not there.exists():
            raise Refused(f"nothing to resume: there is no run {there or runs[0]}; leave out --resume to start one")
        return there
    if out is None:
        return next(run for run in runs if not run.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is already there: add --resume to go on with it, or take another --out")
    return out


@contextlib.contextmanager
def _resumable(command: str, run: Path) -> Iterator[None]:
    """Ctrl-C and a polite kill end the run with the line that goes on."""
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if not (run / "recipe.toml").exists():
            raise
        raise Interrupted(f"fewstep {command} {shlex.quote(str(run))} --resume") from None


# Exit codes


class _Left(Exception):
    """A command left early: the exit code and its one line; the cause is for -vv."""

    def __init__(self, code: int, line: str) -> None:
        super().__init__(line)
        self.code = code


def _verdict(error: BaseException) -> _Left:
    """Which exit code an error means, and the one line that a person reads."""
    line = " ".join(str(error).split()) or type(error).__name__
    match error:
        case MissingExtra():
            return _Left(3, line)
        case ModuleNotFoundError() if error.name:
            top = error.name.split(".")[0]
            extra = next((name for name, modules in EXTRAS.items() if top in modules), None)
            if extra:
                return _Left(3, str(MissingExtra(top, extra)))
        case KeyboardInterrupt():
            return _Left(130, line if isinstance(error, Interrupted) else "interrupted; nothing was kept")
        case Failed():
            return _Left(1, line)
        case BrokenPipeError():
            return _Left(0, "")
        case FileNotFoundError() if error.filename:
            return _Left(2, f"there is no {error.filename}")
        case OSError() if error.filename and error.strerror:
            return _Left(2, f"{error.filename}: {error.strerror.lower()}")
        case ValueError() if hasattr(error, "errors"):  # pydantic's
            return _Left(2, _first_fault(error))
        case ValueError():
            return _Left(2, line)
    if type(error).__name__ == "OutOfMemoryError":
        return _Left(1, f"out of memory: take a smaller batch ({line})")
    return _Left(1, f"{type(error).__name__}: {line} (-vv shows where)")


def _first_fault(error: Any) -> str:
    """The first complaint of pydantic: where, what, what was given."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place!r}"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | list) else f", got {fault['input']!r}"
    return f"{place}: {message}{given}" if place else message


class _Commands(TyperGroup):
    """A group that names the nearest command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            from .registry import nearest

            raise Refused(f"unknown command {args[0]!r}: {nearest(args[0], list(self.commands))}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order of the work, not of the alphabet


app = typer.Typer(cls=_Commands, add_completion=False, rich_markup_mode=None)


def command(function: Command) -> Command:
    """Add a command; what it raises becomes an exit code (typer itself would swallow interrupts and closed pipes)."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, Usage):
            raise
        except BaseException as error:
            raise _verdict(error) from error

    app.command(function.__name__.strip("_"))(guarded)
    return function


def _usage_line(error: Any) -> str:
    """Typer's complaint about an option or an argument, as one line with the nearest name."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and context is not None and hasattr(error, "possibilities"):
        from .registry import nearest

        options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        return f"unknown option {error.option_name!r}: {nearest(error.option_name, options)}"
    line = " ".join(error.format_message().split())
    line = line[:1].lower() + line[1:].rstrip(".")
    return f"{line}; see {context.command_path} --help" if context is not None else line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code.

    >>> main(["list", "recipies"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    loud = sum(a.count("v") if a.strip("-v") == "" and a[:2] != "--" else a == "--verbose" for a in arguments) > 1
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")  # nothing that we stand on reports home
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = int(app(args=arguments, prog_name="fewstep", standalone_mode=False) or 0)
        sys.stdout.flush()
    except Usage as error:
        left: _Left | None = _Left(2, _usage_line(error))
    except _Left as error:
        left = error
    except (Exception, KeyboardInterrupt) as error:
        left = _verdict(error)
        left.__cause__ = error
    else:
        return code
    if left.__cause__ is not None and loud:
        traceback.print_exception(left.__cause__)
    if left.code == 0:  # the reader of stdout has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif str(left):
        print(f"fewstep: {left}", file=sys.stderr)
    return left.code


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Turn a slow multi-step generator into one that answers in one step, and show what that cost.

    \b
    Start here:
      fewstep distill digits             a teacher, a one-step student, a table, a report
      fewstep list methods               what there is
      fewstep distill ./my-pipeline --data ./images --method dmd2
    """
    if version:
        print(f"fewstep {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
