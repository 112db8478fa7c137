"""A cheap look at a student's samples while it trains: collapse does not show in losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cond import Cond, move
from ..grid import grid
from ..rng import Rng
from ..solvers import DPM2M, sample, start_noise
from ..student import Student
from ..tasks.base import Task

ROWS = 64
BURNT = 0.3
"""Share of values beyond the range from which on a warning is due."""


@dataclass(frozen=True)
class Probe:
    """What a glance at samples says, each as a ratio to real data: 1 is like the data.

    A task without data is compared with the first look.

    ``diversity``: mean distance between two samples. ``spread``: standard deviation over everything.
    ``saturation``: share of values beyond the value range, not a ratio. ``grid``: energy at the finest
    frequency, where upsampling artefacts live.
    """

    diversity: float
    spread: float
    saturation: float
    grid: float

    @property
    def healthy(self) -> bool:
        return self.warning() is None

    @property
    def distance(self) -> float:
        """How far the look is from what data would give, 0 or more; infinite where something is not finite.

        ``|log diversity| + |log spread| + saturation``: what collapses, drifts or burns is far; it does not tell
        good samples from better ones.
        """
        if not (0 < self.diversity < math.inf and 0 < self.spread < math.inf):
            return math.inf
        return abs(math.log(self.diversity)) + abs(math.log(self.spread)) + self.saturation

    def warning(self) -> str | None:
        """One plain sentence where something is wrong."""
        if not all(map(math.isfinite, (self.diversity, self.spread, self.saturation, self.grid))):
            return "samples are not finite: the student is lost"
        if self.diversity <= 0.4:
            return f"samples look alike (diversity {self.diversity:.2f} of the data's): the student is collapsing"
        if not 0.3 < self.spread < 3:
            return f"samples have {self.spread:.2f} times the data's spread: the student is drifting away"
        if self.grid >= 10:
            return f"samples have {self.grid:.0f} times the data's finest pattern: grid artefacts"
        if self.saturation > BURNT:
            return f"{self.saturation:.0%} of the values are beyond the data's range: samples are burnt"
        return None


class Prober:
    """Looks at the same few noises each time; a teacher in the making is sampled in eight calls."""

    def __init__(self, task: Task, seed: int, makes: str = "student") -> None:
        self.makes = makes
        generator = torch.Generator().manual_seed(seed)
        count = min(ROWS, len(task.train))
        real = task.train.rows(torch.randperm(len(task.train), generator=generator)[:count])
        self.cond: Cond = real.cond
        self.noise = task.begin(torch.randn(count, *task.shape, generator=generator), real.cond)
        self.task = task
        self.facts = self._facts(real.data) if task.has_data else None

    def __call__(self, student: Student) -> tuple[Probe, Tensor]:
        """The probe and the samples."""
        device = next(student.parameters()).device
        noise, cond = self.noise.to(device), move(self.cond, device)
        training = student.training
        student.eval()
        with torch.no_grad():
            if self.makes == "teacher":
                times = grid(student.path, 8)
                x = start_noise(student.path, float(times[0]), noise)
                samples = sample(student.denoiser, x, times, DPM2M(), cond=cond).float().cpu()
            else:
                samples = student.generate(noise, cond, Rng(0, "probe", device=device)).float().cpu()
        student.train(training)
        samples = self.task.seen(samples)
        here = self._facts(samples)
        if self.facts is None:
            self.facts = here
        ratios = [a / max(b, 1e-12) for a, b in zip(here, self.facts, strict=True)]
        low, high = self.task.value_range or (-float("inf"), float("inf"))
        margin = 0.05 * (high - low) if self.task.value_range else 0.0
        beyond = ((samples < low - margin) | (samples > high + margin)).float().mean()
        return Probe(ratios[0], ratios[1], float(beyond), ratios[2]), samples

    @staticmethod
    def _facts(x: Tensor) -> tuple[float, float, float]:
        flat = x.flatten(1)
        fine = (
            (x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]).square()
            if (x.ndim == 4 and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0)
            else flat.square()
        )
        return float(torch.pdist(flat).mean()), float(flat.std()), float(fine.mean())
