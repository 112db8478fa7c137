"""What all commands share: the group they are in, several processes, interruptions, exit codes."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from ..errors import Failed, Interrupted, MissingExtra, Refused
from ..machine import EXTRAS

Usage: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, wherever this typer keeps it
Command = TypeVar("Command", bound=Callable[..., None])


# Several processes

TOGETHER = ("train", "distill", "sample", "evaluate", "compare")


@contextlib.contextmanager
def _several(command: str) -> Iterator[bool]:
    """Under a launcher of several processes join them; a command that is for one is left to the first."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield True
    elif command in TOGETHER:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that ends is said once, and by us
        from ..train.processes import joined

        with joined():
            yield True
    else:
        yield os.environ.get("RANK", "0") == "0"


def decided(work: Callable[[], Path]) -> Path:
    """What the first of several processes decides for all: which folder is free, say."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return work()
    from ..train.processes import alone

    return alone(work)


# Interruptions


@contextlib.contextmanager
def stoppable(kept: Path, line: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and a polite kill end a long work with the line that goes on with it, where ``kept`` is there."""
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if not kept.exists():
            raise
        raise Interrupted(line()) from None


def resumable(command: str, run: Path) -> contextlib.AbstractContextManager[None]:
    """``stoppable`` for a run of ``train`` or ``distill``."""

    def line() -> str:
        from ..train.processes import again

        return again(f"{command} {shlex.quote(str(run))} --resume")

    return stoppable(run / "recipe.toml", line)


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
            from ..registry import nearest

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
            with _several(function.__name__.strip("_")) as takes_part:
                if takes_part:
                    function(*args, **kwargs)
        except (typer.Exit, typer.Abort, Usage):
            raise
        except (Exception, KeyboardInterrupt) as error:
            left = _verdict(error)
            told = getattr(error, "told", False)  # another process has said why
            raise (_Left(left.code, "") if told else left) from error

    app.command(function.__name__.strip("_"))(guarded)
    return function


def _usage_line(error: Any) -> str:
    """Typer's complaint about an option or an argument, as one line with the nearest name."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and context is not None and hasattr(error, "possibilities"):
        from ..registry import nearest

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
    left: _Left
    try:
        code = int(app(args=arguments, prog_name="fewstep", standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except Usage as error:
        left = _Left(2, _usage_line(error))
    except _Left as error:
        left = error
    except (Exception, KeyboardInterrupt) as error:
        left = _verdict(error)
        left.__cause__ = error
    if left.__cause__ is not None and loud:
        traceback.print_exception(left.__cause__)
    if left.code == 0:  # the reader of stdout has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif str(left):
        print(f"fewstep: {left}", file=sys.stderr)
    return left.code
