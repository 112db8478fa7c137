"""Samplers: one loop, one file per family."""

from .base import Solver, State, sample, start_noise
from .dpm import DPM2M
from .euler import Euler, Heun

__all__ = ["DPM2M", "Euler", "Heun", "Solver", "State", "sample", "solver_named", "start_noise"]


def solver_named(name: str) -> Solver:
    """The sampler with this name; ValueError with the nearest name otherwise."""
    from ..registry import SOLVERS

    made: Solver = SOLVERS.get(name).thing()
    return made
