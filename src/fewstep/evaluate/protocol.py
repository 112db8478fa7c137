"""How students are measured: frozen, and hashed, so that figures compare."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from ..grid import GridKind
from ..part import Part

FEW = 8
"""Calls up to which a sampler counts as few-step: the bar that a student is held to."""


class Protocol(Part):
    """Same noise, same conditions, counted calls.

    Fréchet distances are means over ``noise_seeds`` draws; for each number of calls the teacher's best sampler
    is found on ``scout_seeds`` other draws and scored again on the reported ones, so that choosing it among
    several does not flatter it. Everything else is measured on the first ``detail_seeds`` draws.
    """

    version: Literal[1] = 1
    noise_seeds: int = Field(16, ge=1, description="draws that a Fréchet distance is the mean of")
    scout_seeds: int = Field(2, ge=1, description="other draws, on which the teacher's best sampler is found")
    detail_seeds: int = Field(4, ge=1, description="of the draws, those that the other figures are means of")
    nfes: tuple[int, ...] = Field((1, 2, 3, 4, 5, 8), description="calls at which the teacher's best sampler is shown")
    solvers: tuple[str, ...] = Field(("euler", "heun", "dpm2m"), min_length=1, description="samplers to choose from")
    grid: GridKind = Field("karras", description="of the times that the teacher is asked at")
    full_solver: str = Field("heun", description="the teacher's own sampler")
    full_nfe: int = Field(35, ge=1, description="calls of the teacher's own sampler")
    neighbours: int = Field(5, ge=1, description="k of precision, recall, density and coverage")
    count: int | None = Field(None, ge=8, description="test samples to measure against; None: all")
    batch: int = Field(512, ge=1, description="samples in one call of a network")
    timing_rounds: int = Field(5, ge=0, description="interleaved rounds that a speed is the median of; 0: no speeds")
    timing_batch: int = Field(512, ge=1, description="samples in one timed call")

    @property
    def hash(self) -> str:
        """Of everything that a figure can depend on.

        >>> Protocol().hash == Protocol(timing_rounds=9).hash != Protocol(noise_seeds=8).hash
        True
        """
        silent = {"timing_rounds", "timing_batch"}
        return hashlib.sha256(self.model_dump_json(exclude=silent).encode()).hexdigest()
