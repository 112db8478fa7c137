"""fewstep: turn a slow multi-step generator into one that answers in one step, or a few."""

__version__ = "0.1.0"

from typing import Any


def __getattr__(name: str) -> Any:
    """``fewstep.FewstepScheduler``, which imports diffusers, when it is first asked for."""
    if name == "FewstepScheduler":
        from .interop.scheduler import FewstepScheduler

        return FewstepScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
