"""What a method is: players that take turns, each with a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from .cond import Cond, move, rows
from .grid import GridKind
from .part import Part
from .path import Straight
from .rng import Source, normal
from .student import Student


@dataclass(frozen=True)
class Batch:
    """Clean data, its condition, and noise ~ N(0, I); ``target`` is where a teacher took that noise.

    ``data`` is [batch, *shape]. With pairs, ``cond`` belongs to ``noise`` and ``target``. With trajectories, ``states``
    are the teacher's samples on the way, [batch, points, *shape] from its first time to clean, at ``times`` [points].
    """

    data: Tensor
    cond: Cond
    noise: Tensor
    target: Tensor | None = None
    states: Tensor | None = None
    times: Tensor | None = None

    def __len__(self) -> int:
        return self.noise.shape[0]

    def rows(self, index: Tensor | slice) -> Batch:
        target, states = (None if v is None else v[index] for v in (self.target, self.states))
        return Batch(self.data[index], rows(self.cond, index), self.noise[index], target, states, self.times)

    def samples(self, rng: Source, joined: Student | None = None) -> Batch:
        """Pairs as clean samples under noise; a batch without pairs is itself.

        A pair's noise is where its sample came from: x0 noised with it lies on the line between them, not in the law
        of ``x_t`` under the teacher's flow. The noise is a fresh draw, then; or, for the student ``joined``, such that
        x0 noised with it is where the student starts from the pair's own noise: these lines make up a straighter flow
        between the same two laws (a reflow's: Liu et al. 2022).
        """
        if self.target is None:
            return self
        noise = normal(self.noise, rng) if joined is None else joined.noise_to(self.target, self.noise)
        return replace(self, data=self.target, noise=noise, target=None, states=None, times=None)

    def to(self, device: torch.device | str) -> Batch:
        target, states = (None if v is None else v.to(device) for v in (self.target, self.states))
        data, noise = self.data.to(device), self.noise.to(device)
        times = None if self.times is None else self.times.to(device)
        return Batch(data, move(self.cond, device), noise, target, states, times)


@dataclass(frozen=True)
class Loss:
    """A total to descend and its named parts, means over rows; parts are detached, for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def mean(cls, parts: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Loss:
        """The weighted sum of the means of per-row losses; a part without a weight counts once.

        >>> Loss.mean({"a": torch.ones(2), "b": torch.ones(2)}, {"b": 3.0}).total.item()
        4.0
        """
        means = {name: value.mean() for name, value in parts.items()}
        weighted = [(weights or {}).get(name, 1.0) * value for name, value in means.items()]
        return cls(torch.stack([w for w in weighted]).sum(), {n: v.detach() for n, v in means.items()})


class PairOptions(Part):
    """Noise-image pairs: where the teacher's sampler takes each noise. Cached to disk by the trainer."""

    count: int = Field(12_000, ge=1, description="pairs that are made")
    solver: str = Field("dpm2m", description="the sampler that takes each noise to its image")
    nfe: int = Field(8, ge=1, description="the teacher's calls for one of them")
    grid: GridKind = Field("karras", description="of the sampler's times")


class SamplesOptions(Part):
    """Whose samples are learned from, by methods that need no pairs."""

    pairs: PairOptions | None = Field(
        None, description="samples of the teacher are learned from in place of the data; None: the data"
    )
    joined: bool = Field(
        False,
        description="a pair's sample lies under the noise that it came from, not under a fresh draw: a reflow's lines, "
        "learned from with their own velocity",
    )


class Method(nn.Module, ABC):
    """A way to train a student. One file per paper; engines that several papers configure in families/.

    ``players`` are attribute names of the modules that learn, one optimiser each. Inside a loss enter
    networks by calling them, never through their parts: sharding works by hooks on the call.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Part]]
    players: ClassVar[tuple[str, ...]] = ("student",)
    needs_teacher: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    reads_states: ClassVar[bool] = False  # wants the teacher's samples on the way of its pairs, beside their ends
    makes: ClassVar[Literal["student", "teacher", "start"]] = "student"  # a start gives no samples to look at
    straight: ClassVar[bool] = False  # wants the straight path; others are seen through Reframed
    flow_map: ClassVar[bool] = False  # wants a network that reads the length of the jump
    joint: ClassVar[bool] = False  # learns pictures with their labels in further channels
    guides: ClassVar[bool] = False  # guides the teacher itself; the others get a guided one

    student: Student
    step: int = 0  # the trainer says which step it is, before each turn

    def __init__(self, teacher: Any, student: Student, options: Part | None = None) -> None:
        super().__init__()
        if self.straight and not isinstance(student.path, Straight):
            kind = type(student.path).__name__
            raise ValueError(f"{self.name} needs the straight path, got {kind}: wrap it in Reframed")
        self.options: Any = options if options is not None else self.Options()
        self.student = student
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.teacher = teacher

    def train(self, mode: bool = True) -> Self:
        """Training mode for the players; a teacher never leaves evaluation mode."""
        super().train(mode)
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        return self

    @abstractmethod
    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        """The loss that this player descends on this batch; a mean over elements."""

    def turns(self, step: int) -> tuple[str, ...]:
        """Who moves in this step, in order; the student exactly once."""
        return self.players

    def settle(self, step: int) -> tuple[nn.Parameter, ...]:
        """After a step: averages, curricula. Returns parameters it re-initialised; the trainer forgets
        their optimiser and average state."""
        return ()

    def diagnose(self, batch: Batch, rng: Source) -> dict[str, Any] | None:
        """What the method can say of how its game stands, as plain numbers; asked rarely, for the report."""
        return None

    def pairs(self) -> PairOptions | None:
        """The pairs that this method learns from, if any: its option of that name."""
        return getattr(self.options, "pairs", None)

    @classmethod
    def reads_data(cls, options: Any) -> bool:
        """Whether a batch's data reaches a loss under these options; prompts alone do without."""
        return cls.needs_data

    @classmethod
    def handovers(cls, options: Any, path: Any) -> tuple[float, ...]:
        """Times, falling, at which the student's next network takes over; none where one network does all."""
        return ()

    @classmethod
    def student_options(cls, options: Any, path: Any) -> dict[str, Any]:
        """Where this method's student starts and which step counts it serves: arguments of Student."""
        return {}
