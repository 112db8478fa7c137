"""What the commands do: whole jobs, from a recipe or a folder to files. Plain functions, no terminal."""

from .bits import bits
from .choosing import choose
from .exporting import export
from .planning import plan
from .searching import search
from .setting import Setting, game, prepare
from .training import distill, train, unfinished
from .using import check, compare, evaluate, evaluate_prompts, report, sample
from .verifying import scores_of, verify

__all__ = [
    "Setting",
    "bits",
    "check",
    "choose",
    "compare",
    "distill",
    "evaluate",
    "evaluate_prompts",
    "export",
    "game",
    "plan",
    "prepare",
    "report",
    "sample",
    "scores_of",
    "search",
    "train",
    "unfinished",
    "verify",
]
