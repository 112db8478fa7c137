"""Teachers: learn the clean sample, or the velocity, from noisy ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ..cond import Cond
from ..losses import squared_error
from ..method import Batch, Loss, Method
from ..part import Part
from ..path import NoiseSampler, Path, Time, normal
from ..registry import Paper, method
from ..rng import Source, uniform

Weight = Literal["edm", "snr", "none"]


def level_weight(name: str, path: Path, t: Tensor, data_std: float) -> Tensor:
    """The weight of a squared error in x0 at t: [batch].

    ``edm``: ``1/sd^2 + snr``, so that the network of the preconditioned denoiser has a loss of one at
    every level (Karras et al. 2022, Table 1: lambda = (sigma^2 + sd^2) / (sigma sd)^2). ``snr``: the
    squared error in eps. ``none``: 1.
    """
    match name:
        case "edm":
            return (1 / data_std**2 + path.snr(t)).to(t)
        case "snr":
            return path.snr(t).to(t)
        case "none":
            return t.new_ones(t.shape)
    raise ValueError(f"unknown weight {name!r}: one of edm, snr, none")


def drop_condition(model: Any, cond: Cond, x: Tensor, share: float, rng: Source) -> Cond:
    """Replace the condition of a share of the rows by "no condition", so that guidance can be used later."""
    if share == 0 or not isinstance(cond, Tensor):
        return cond
    dropped = uniform(x, rng) < share
    return model.null(cond).where(dropped.view(-1, *[1] * (cond.ndim - 1)), cond)


class DenoisingOptions(Part):
    levels: NoiseSampler = Field(NoiseSampler(kind="log_normal", mean=-1.2, std=1.2), description="noise levels")
    weight: Weight = Field("edm", description="of the squared error in the clean sample")
    data_std: float = Field(1.0, gt=0, description="spread of the data, for the weight")
    drop: float = Field(0.0, ge=0, lt=1, description="share of conditions dropped, for guidance later")


@method(
    "denoising",
    Paper("2206.00364", "Elucidating the Design Space of Diffusion-Based Generative Models", "EDM"),
    tier="stable",
    level="small",
)
class Denoising(Method):
    """Train a denoiser: ``E w(t) ||D(alpha x0 + sigma eps, t) - x0||^2``, at rest at the posterior mean."""

    Options = DenoisingOptions
    needs_teacher = False
    makes = "teacher"

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        path, options = self.student.path, self.options
        t = options.levels.on(path)(batch.data, rng)
        x_t = path.corrupt(batch.data, t, normal(batch.data, rng))
        cond = drop_condition(self.student.denoiser, batch.cond, x_t, options.drop, rng)
        guess = self.student(x_t, t, path.t_min, cond, "x0")
        weight = level_weight(options.weight, path, t, options.data_std)
        return Loss.mean({"denoise": weight * squared_error(guess, batch.data)})


class FlowMatchingOptions(Part):
    levels: NoiseSampler = Field(NoiseSampler(kind="uniform", low=0.001), description="times")
    drop: float = Field(0.0, ge=0, lt=1, description="share of conditions dropped, for guidance later")


@method(
    "flow_matching",
    Paper("2209.03003", "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"),
    Paper("2210.02747", "Flow Matching for Generative Modeling"),
    tier="stable",
    level="exact",
)
class FlowMatching(Method):
    """Train a velocity: ``E ||v(x_t, t) - (d_alpha x0 + d_sigma eps)||^2``; on the straight path eps - x0."""

    Options = FlowMatchingOptions
    needs_teacher = False
    makes = "teacher"

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        options = self.options
        t = options.levels.on(self.student.path)(batch.data, rng)
        cond = drop_condition(self.student.denoiser, batch.cond, batch.data, options.drop, rng)
        return Loss.mean({"flow": velocity_error(self.student, batch.data, batch.noise, t, cond)})


def velocity_error(student: Any, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """``||v(x_t, t) - dx_t / dt||^2`` on the line that joins each pair, a mean a row: [batch]."""
    path = student.path
    guess = student(path.corrupt(x0, t, eps), t, path.t_min, cond, "velocity")
    return squared_error(guess, straight_rate(path, x0, eps, t))


def straight_rate(path: Path, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
    """``dx_t / dt`` along one pair: ``d_alpha x0 + d_sigma eps``."""
    coefs = path.at(t, x0)
    return (coefs.d_alpha * x0 + coefs.d_sigma * eps).to(x0.dtype)
