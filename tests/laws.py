"""Laws whose answers are known, in float64, and paths to look at them from."""

import math

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.grid import grid
from fewstep.method import Batch
from fewstep.path import Exploding, Straight, Tabulated, Trigonometric, VariancePreserving, normal
from fewstep.solvers import sample
from fewstep.student import Student
from fewstep.teachers import FiniteSet, Gaussian, Mixture

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
TABLE = tuple((1 - BETAS).cumprod(0).tolist())
"""Stable Diffusion's alphas_cumprod."""

PATHS = {
    "straight": Straight(),
    "trigonometric": Trigonometric(),
    "exploding": Exploding(sigma_min=0.02, sigma_max=20.0),
    "linear": VariancePreserving(),
    "scaled_linear": VariancePreserving(schedule="scaled_linear"),
    "cosine": VariancePreserving(schedule="cosine"),
    "linear_zero_snr": VariancePreserving(zero_snr=True),
    "scaled_linear_zero_snr": VariancePreserving(schedule="scaled_linear", zero_snr=True),
    "tabulated": Tabulated(alphas_cumprod=TABLE),
}


def inner_times(path, count=7):
    """Times strictly inside a path, away from the table's entries."""
    part = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return path.t_low + (0.97 * path.t_max - path.t_low) * part.square()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(mean=(2.0, -1.0), std=(0.5, 1.5), path=None):
    return Gaussian(list(mean), list(std), path=path)


def full_gaussian(path=None):
    return Gaussian([1.0, -0.5, 0.3], covariance=spd(3, 1), path=path)


def mixture(path=None, classes=False):
    """Four modes at radius 2, std 0.25, uneven weights; with classes two modes each."""
    angle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture([0.4, 0.3, 0.2, 0.1], centres, 0.25, labels=[0, 1, 0, 1] if classes else None, path=path)


def full_mixture(path=None):
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]], dtype=torch.float64)
    return Mixture([1.0, 2.0, 3.0], means, covariances=torch.stack([spd(2, k) for k in range(3)]), path=path)


def finite_set(path=None, points=5, dimension=2):
    return FiniteSet(torch.randn(points, dimension, generator=seeded(3), dtype=torch.float64), path=path)


LAWS = {
    "gaussian": gaussian,
    "full_gaussian": full_gaussian,
    "mixture": mixture,
    "full_mixture": full_mixture,
    "finite_set": finite_set,
}


def spd(size, seed):
    """A covariance [size, size] that is not diagonal."""
    root = torch.randn(size, size, generator=seeded(10 + seed), dtype=torch.float64)
    return root @ root.T / size + 0.2 * torch.eye(size, dtype=torch.float64)


def draw(law, count, t, seed=0):
    """Samples of a law noised to time t."""
    rng = seeded(seed)
    x0 = law.sample(count, rng)
    return law.path.corrupt(x0, t, normal(x0, rng))


def noise_batch(count, dimension, seed=0):
    noise = torch.randn(count, dimension, generator=seeded(seed), dtype=torch.float64)
    return Batch(noise, None, noise)


class ExactMap(Denoiser):
    """The flow map of a law with one component, as a denoiser that reads s: no step is ever wrong."""

    def __init__(self, law):
        super().__init__()
        self.law, self.path = law, law.path

    def forward(self, x, t, cond=None, want="x0", s=None):
        s = self.path.t_min if s is None else s
        there = self.law.flow_map(x, t, s, cond)
        (scale_t, tau_t), (scale_s, tau_s) = (self._frame(v, x) for v in (t, s))
        slope = (there / scale_s - x / scale_t) / (tau_s - tau_t)
        return self.path.convert(slope, x, t, self.path.slope, want)

    def _frame(self, t, x):
        frame = self.path.frame(t)
        return tuple(v.reshape(-1, 1) for v in frame) if isinstance(t, Tensor) else frame


def exact_student(law, **options):
    return Student(ExactMap(law), law.shape, **options)


def flow_error(law, solver, steps, high, low, kind="uniform"):
    """How far a solver ends from the exact flow map between two times inside the path (root mean square)."""
    x = draw(law, 64, high)
    if kind == "logsnr":
        lam = law.path.lam(torch.tensor([high, low], dtype=torch.float64))
        part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = law.path.time(lam[0] + part * (lam[1] - lam[0]))
    else:
        times = torch.linspace(high, low, steps + 1, dtype=torch.float64)
    times = times.tolist()
    ends = law.flow_map(x, times[0], times[-1])
    return (sample(law, x, times, solver) - ends).square().mean().sqrt().item()


def clean_error(law, solver, steps, kind="karras"):
    """How far a solver ends from the exact flow map, from noise to clean data on a grid."""
    times = grid(law.path, steps, kind)
    x = draw(law, 64, times[0].item())
    ends = law.flow_map(x, times[0].item(), law.path.t_min)
    return (sample(law, x, times, solver) - ends).square().mean().sqrt().item()


def hermite(count):
    """Nodes and weights such that ``(weights * f(nodes)).sum()`` is E f(z), z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def largest_gradient(module):
    return max((p.grad.abs().max().item() for p in module.parameters() if p.grad is not None), default=0.0)
