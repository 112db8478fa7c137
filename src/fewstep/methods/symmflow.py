"""SymmFlow: one network turns noise into pictures while it turns labels into noise, and back."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..joint import label_map
from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import NoiseSampler
from ..registry import Paper, method
from ..rng import Source, normal
from ..student import Student
from .denoising import straight_rate


class SymmFlowOptions(Part):
    levels: NoiseSampler = Field(NoiseSampler(kind="uniform"), description="times; both ends belong to it")
    picture: int = Field(1, ge=1, description="leading channels that are the picture; the others are the label")
    picture_weight: float = Field(1.0, ge=0, description="of the picture's velocity")
    label_weight: float = Field(1.0, ge=0, description="of the label's velocity")


@method(
    "symmflow",
    Paper(
        "2506.10634",
        "Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based "
        "Generative Models",
        "SymmFlow",
    ),
    level="exact",
)
class SymmFlow(Method):
    """Flow matching of pairs on one clock: data is (picture, label noise), noise is (picture noise, label).

    ``x_t = (1 - t) x0 + t eps`` and ``y_t = (1 - t) xi + t y`` in the channels of one tensor; the network predicts both
    velocities, ``eps - x0`` and ``y - xi``. Down in time it generates, up in time it reads. ``joined`` makes the batch.
    """

    Options = SymmFlowOptions
    needs_teacher = False
    makes = "teacher"
    straight = True
    joint = True

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options = self.student.path, self.options
        t = options.levels.on(path)(batch.data, rng)
        z = path.corrupt(batch.data, t, batch.noise)
        guess = self.student(z, t, path.t_min, None, "velocity")
        wanted, split = straight_rate(path, batch.data, batch.noise, t), options.picture
        parts = {"picture": squared_error(guess[:, :split], wanted[:, :split])}
        if guess.shape[1] > split:
            parts["label"] = squared_error(guess[:, split:], wanted[:, split:])
        return Loss.mean(parts, {"picture": options.picture_weight, "label": options.label_weight})


@torch.no_grad()
def generate(
    student: Student,
    eps: Tensor,
    labels: Tensor,
    book: Tensor,
    steps: int = 1,
    rng: Source | None = None,
    width: float = 0.0,
) -> Tensor:
    """Pictures for labels, from noise like a picture, in ``steps`` Euler steps down in time.

    ``width`` is that of the labels' uniform noise in training, drawn from ``rng``: without it every label ends in the
    middle of its Gaussian noise, where no training sample was.
    """
    path = student.path
    z = torch.cat([eps, label_map(labels, book, eps, rng, width)], 1)
    times = torch.linspace(path.t_max, path.t_min, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:], strict=False):
        z = path.move(z, student(z, t, path.t_min, None, "flow"), t, s)
    return z[:, : eps.shape[1]]


@torch.no_grad()
def read(student: Student, x0: Tensor, channels: int, rng: Source, steps: int = 1, draws: int = 1) -> Tensor:
    """The label's channels of pictures, in ``steps`` Euler steps up in time: [batch, channels, ...].

    The mean over ``draws`` starts of the label's noise.
    """
    path, ends = student.path, []
    times = torch.linspace(path.t_min, path.t_max, steps + 1, dtype=torch.float64).tolist()
    for _ in range(draws):
        z = torch.cat([x0, normal(x0.new_empty(len(x0), channels, *x0.shape[2:]), rng)], 1)
        for t, s in zip(times, times[1:], strict=False):
            z = path.move(z, student(z, t, path.t_min, None, "flow"), t, s)
        ends.append(z[:, x0.shape[1] :])
    return torch.stack(ends).mean(0)
