"""Samplers: one loop, one file per family."""

from .base import Solver, State, sample, start_noise, steps_of
from .default import recommended
from .dpm import DPM2M
from .euler import Euler, Heun
from .plan import SolverPlan, StepPlan
from .start import OneMoreStep

__all__ = [
    "DPM2M",
    "Euler",
    "Heun",
    "OneMoreStep",
    "Solver",
    "SolverPlan",
    "State",
    "StepPlan",
    "recommended",
    "sample",
    "solver_named",
    "start_noise",
    "steps_of",
]


def solver_named(name: str) -> Solver:
    """The sampler with this name; ValueError with the nearest name otherwise."""
    from ..registry import SOLVERS

    made: Solver = SOLVERS.get(name).thing()
    return made
