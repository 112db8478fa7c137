"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import Refused
from ..registry import Paper, metric
from ..rng import Source
from .base import Metric, Sample, Score


class Moments(NamedTuple):
    """A mean [..., d] and a root R [..., r, d] of the covariance, ``R^T R = C``, in float64."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [..., n, d], with n - 1 in the denominator; the root is the R of a QR decomposition."""
        count = features.shape[-2]
        if count < 2:
            raise Refused(f"a covariance needs at least 2 samples, got {count}")
        features = features.double()
        mean = features.mean(-2, keepdim=True)
        root = torch.linalg.qr((features - mean) / math.sqrt(count - 1), mode="r").R
        return cls(mean.squeeze(-2), root)

    @classmethod
    def known(cls, mean: Tensor, covariance: Tensor) -> Moments:
        """Of a mean [d] and a covariance [d, d]."""
        values, vectors = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT)


def frechet_distance(a: Moments, b: Moments) -> Tensor:
    """``|m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)``, shape [...].

    With roots ``C = R^T R`` the last trace is the sum of the singular values of ``R_a R_b^T``: no root of a
    matrix is taken, nothing is squared, and ranks below d (fewer samples than features) are exact as well.
    This is the squared 2-Wasserstein distance of the Gaussians; "FID" is its name on Inception features.

    >>> one = Moments.known(torch.zeros(2), torch.eye(2))
    >>> four = Moments.known(torch.ones(2), 4 * torch.eye(2))
    >>> round(frechet_distance(one, four).item(), 9)
    4.0
    """
    cross = torch.linalg.svdvals(a.root @ b.root.mT).sum(-1)
    spread = a.root.square().sum((-2, -1)) + b.root.square().sum((-2, -1))
    return ((a.mean - b.mean).square().sum(-1) + spread - 2 * cross).clamp(min=0)


def moments(sample: Sample) -> Moments:
    """Of a sample's features, kept with it."""
    if "moments" not in sample.memo:
        sample.memo["moments"] = Moments.of(sample.features)
    found: Moments = sample.memo["moments"]
    return found


@metric(
    "frechet",
    Paper("1706.08500", "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", "FID"),
)
class Frechet(Metric):
    """Fréchet distance of features: fidelity and variety in one figure, lower is better.

    It falls with the number of samples, so only figures at equal counts compare. One sample has no spread of
    it: repeat it over noise seeds.
    """

    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def __call__(self, fake: Sample, real: Sample, rng: Source) -> Score:
        return Score(float(frechet_distance(moments(fake), moments(real))), None, len(fake))
