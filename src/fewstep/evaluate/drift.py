"""Whether fewer bits are enough: how far the law of what comes out moves, beside how much two draws of it differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cond import Cond
from ..denoiser import Denoiser
from ..errors import Refused
from ..grid import grid
from ..rng import Rng
from ..solvers import DPM2M, sample, start_noise
from ..student import Student
from ..train.precision import lowered, networks

DIRECTIONS = 64
CALLS = 8


@dataclass(frozen=True)
class Drift:
    """Wasserstein-1 distances between trajectories in a narrow type and in float32, from the same noise.

    ``distance`` is the mean over coordinates and ``sliced`` the mean over random directions, each in standard
    deviations of the state and at the worst state of the way. ``control`` and ``sliced_control`` are the 95th
    percentiles of the same between float32 trajectories of different noises, as many samples each.
    ``paired`` is the root mean square difference of the samples themselves, noise by noise.
    """

    dtype: str
    count: int
    distance: float
    control: float
    sliced: float
    sliced_control: float
    paired: float

    @property
    def enough(self) -> bool:
        return self.distance <= self.control and self.sliced <= self.sliced_control

    def line(self) -> str:
        """For people."""
        verdict = "are enough" if self.enough else "are not enough: take precision.dtype = float32"
        return (
            f"16 bits ({self.dtype}) {verdict}: the law of the samples moves by {self.distance:.3g} "
            f"(two draws of {self.count} differ by {self.control:.3g})"
        )


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The Wasserstein-1 distance of every coordinate's law, as the mean over coordinates: [n, d] and [n, d].

    In one dimension the best coupling joins the sorted samples.

    >>> wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]))
    2.0
    """
    return float((a.sort(0).values - b.sort(0).values).abs().mean())


def drift(
    model: Student | Denoiser,
    shape: tuple[int, ...],
    cond: Callable[[int], Cond] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    count: int = 256,
    controls: int = 8,
    seed: int = 0,
) -> Drift:
    """Compare a student's or a teacher's trajectories with those of its copy whose weights and passes are narrow.

    ``cond`` gives the condition of so many rows. Precision is judged by the law of the output and not sample by
    sample: a single trajectory may part from its twin where the flow branches, and the law stay what it was.
    """
    narrow = copy.deepcopy(model)
    nets = networks(narrow)
    if not nets:
        raise Refused(f"{type(model).__name__} has no network whose weights could have fewer bits")
    for net in nets:
        lowered(net, dtype)
    device = next(nets[0].parameters()).device
    rows = None if cond is None else cond(count)

    def states(one: Student | Denoiser, draw: int) -> list[Tensor]:
        noise = Rng(seed, "drift", draw).normal((count, *shape)).to(device)
        return [
            x.float().flatten(1).cpu() for x in _trajectory(one, noise, rows, Rng(seed, "renoise", draw, device=device))
        ]

    training = model.training
    model.eval(), narrow.eval()
    with torch.no_grad():
        wide = [states(model, draw) for draw in range(controls + 1)]
        low = states(narrow, 0)
    model.train(training)
    scales = [x.std().clamp(min=1e-12) for x in wide[0]]
    width = wide[0][0].shape[1]
    turn = Rng(seed, "directions").normal((width, DIRECTIONS))
    turn = turn / turn.norm(dim=0)

    def worst(one: list[Tensor], other: list[Tensor], slices: bool) -> float:
        found = [
            wasserstein(*((a @ turn, b @ turn) if slices else (a, b))) / float(scale)
            for a, b, scale in zip(one, other, scales, strict=True)
        ]
        return max(found)

    control, sliced = (
        torch.tensor([worst(wide[0], one, slices) for one in wide[1:]], dtype=torch.float64).quantile(0.95).item()
        for slices in (False, True)
    )
    paired = float((low[-1] - wide[0][-1]).square().mean().sqrt() / scales[-1])
    name = str(dtype).removeprefix("torch.")
    return Drift(
        name, count, worst(low, wide[0], False), control, worst(low, wide[0], True), sliced, paired
    )  # fmt: skip


def _trajectory(model: Student | Denoiser, noise: Tensor, cond: Cond, rng: Rng) -> list[Tensor]:
    """A teacher's states at every step of its sampler; a student's samples at every step count."""
    if isinstance(model, Student):
        return [model.generate(noise, cond, rng, steps) for steps in sorted(model.steps)]
    seen: list[Tensor] = []
    times = grid(model.path, CALLS)
    sample(
        model, start_noise(model.path, float(times[0]), noise), times, DPM2M(), cond=cond,
        watch=lambda _, x: seen.append(x),
    )  # fmt: skip
    return seen
