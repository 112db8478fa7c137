"""What the commands do: whole jobs, from a recipe or a folder to files. Plain functions, no terminal."""

from .exporting import export
from .planning import plan
from .setting import Setting, game, prepare
from .training import distill, train
from .using import check, compare, evaluate, report, sample
from .verifying import scores_of, verify

__all__ = [
    "Setting",
    "check",
    "compare",
    "distill",
    "evaluate",
    "export",
    "game",
    "plan",
    "prepare",
    "report",
    "sample",
    "scores_of",
    "train",
    "verify",
]
