"""DMD2: distribution matching with a critic that keeps up, an adversary, and several steps."""

from __future__ import annotations

from ..registry import Paper, method
from .families.matching import Matching, MatchingOptions


class DMD2Options(MatchingOptions):
    pass


@method(
    "dmd2",
    Paper("2311.18828", "One-step Diffusion with Distribution Matching Distillation", "DMD"),
    Paper("2405.14867", "Improved Distribution Matching Distillation for Fast Image Synthesis", "DMD2"),
    tier="stable",
    level="small",
)
class DMD2(Matching):
    """Distribution matching by the reverse KL, several critic turns a step, an adversary and several steps at wish."""

    Options = DMD2Options
