"""What can go wrong, by whose doing; the command line turns each kind into its exit code."""

from __future__ import annotations

import importlib
from types import ModuleType


class Refused(ValueError):
    """A bad request (exit 2): one line that says what was given and what would work."""


class MissingExtra(ImportError):
    """A part that was not installed (exit 3); the message has the line that installs it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"this needs {module}: pip install 'fewstep[{extra}]'")
        self.extra = extra


class Failed(RuntimeError):
    """Something broke while running (exit 1); the message says what state is left."""


class Interrupted(KeyboardInterrupt):
    """Stopped on request with everything saved (exit 130); ``resume`` is the command that goes on."""

    def __init__(self, resume: str) -> None:
        super().__init__(f"interrupted; go on with: {resume}")
        self.resume = resume


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module, or raise MissingExtra with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or module, extra) from None
