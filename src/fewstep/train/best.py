"""The student of the best probe, kept on disk, for a run that gets worse."""

from __future__ import annotations

import math
from pathlib import Path as File

import torch

from ..adapters import own
from ..errors import Failed
from ..student import Student
from .probe import Probe
from .processes import alone, world
from .store import load_state, open_state, save_state

WORSE = 0.25
"""How much farther than the best the last probe must be (``Probe.distance``) to be left for it."""


class Best:
    """Keeps a student's own tensors where a probe is nearer to the data than all before it.

    The first of several processes looks, keeps and decides. What a stopped run had kept is taken up by ``resume``.
    """

    def __init__(self, place: File, resume: bool = False) -> None:
        self.place, self.step, self.distance = place, 0, math.inf
        self.last: Probe | None = None
        state = open_state(place) if resume and world().first else None
        if state is not None:
            self.step, self.distance = int(state.facts["step"]), float(state.facts["distance"])

    def see(self, probe: Probe, student: Student, step: int) -> None:
        """Look at a probe of the student as it is now; keep it where it is healthy and the best yet."""
        self.last = probe
        if not world().first or not probe.healthy or probe.distance >= self.distance:
            return
        self.step, self.distance = step, probe.distance
        tensors = {name: value.detach() for name, value in own(student).items()}
        save_state(self.place, tensors, {"step": step, "distance": probe.distance})

    def kept(self) -> int:
        """The step of the student that is kept; 0 where none is. All processes ask at once."""
        return alone(lambda: self.step)

    def worse(self) -> bool:
        """Whether the last look was clearly worse than the best, or there was none since the run was lost."""
        last = self.last
        return last is None or not last.healthy or last.distance > self.distance + WORSE

    @torch.no_grad()
    def back(self, student: Student) -> str | None:
        """Give a student that got worse the best one's tensors, in place; the line that says so, or None."""
        step = alone(lambda: self.step if self.worse() else 0)
        if not step:
            return None
        found = load_state(self.place)
        if found is None:
            raise Failed(f"the student of step {step}, the best by its probes, cannot be read at {self.place}")
        for name, value in own(student).items():
            value.copy_(found[0][name])
        return f"the run got worse: it ends with the student of step {step}, the best by its probes"
