"""Laws known exactly: their score, posterior mean and density in closed form at every noise level.

These are denoisers, so that they stand wherever a teacher can; what is learned from one can be
compared with the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cond import Cond
from ..denoiser import Denoiser
from ..path import Path, Straight, Time, column
from ..rng import Rng, Source

Numbers = Tensor | Sequence[Any]


class Law(Denoiser):
    """A mixture of Gaussians, of which the others are special cases.

    Component k has weight w_k, mean m_k, covariance ``Q_k diag(l_k) Q_k^T`` and, optionally, a class.
    A condition (labels [batch], the number of classes standing for "any") restricts a row to the
    components of its class.

    Noised, component k is Gaussian with mean ``alpha m_k`` and variances ``alpha^2 l_k + sigma^2`` in the
    same basis; the posterior over components, the posterior mean and the score follow.

    Parameters
    ----------
    weights: [K]. means: [K, *shape]. variances: [K, d] along ``basis``. basis: [K, d, d] or None (the axes).
    labels: [K] class of each component.
    """

    def __init__(
        self,
        weights: Numbers,
        means: Numbers,
        variances: Numbers,
        basis: Tensor | None = None,
        *,
        labels: Sequence[int] | Tensor | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self.path = path if path is not None else Straight()
        mean = torch.as_tensor(means, dtype=torch.float64)
        self.shape = tuple(mean.shape[1:])
        mean = mean.flatten(1)
        weight = torch.as_tensor(weights, dtype=torch.float64)
        variance = torch.as_tensor(variances, dtype=torch.float64).flatten(1).expand_as(mean).clone()
        if weight.shape != mean.shape[:1]:
            raise ValueError(f"{len(weight)} weights for {len(mean)} means")
        if (weight <= 0).any() or (variance < 0).any():
            raise ValueError("weights must be positive and variances not negative")
        self.mean: Tensor
        self.variance: Tensor
        self.weight: Tensor
        self.basis: Tensor | None
        self.labels: Tensor | None
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.register_buffer("weight", weight / weight.sum())
        self.register_buffer("basis", None if basis is None else torch.as_tensor(basis, dtype=torch.float64))
        self.register_buffer("labels", None if labels is None else torch.as_tensor(labels))
        self.classes = None if labels is None else int(torch.as_tensor(labels).max()) + 1

    # -- the noised mixture -------------------------------------------------------------------

    def _log_weights(self, cond: Cond, like: Tensor) -> Tensor:
        """log w_k of each row, renormalised inside its class: [batch or 1, K]."""
        log_weight = self.weight.to(like).log().unsqueeze(0)
        if cond is None or self.labels is None:
            return log_weight
        if not isinstance(cond, Tensor):
            raise ValueError("the condition of a law is a tensor of labels")
        given = cond.unsqueeze(1)
        allowed = (self.labels.to(cond.device) == given) | (given == (self.classes or 0))
        if not bool(allowed.any(1).all()):
            raise ValueError(f"labels run from 0 to {self.classes} (any), got {cond.min().item()}..{cond.max().item()}")
        return torch.log_softmax(torch.where(allowed, log_weight, -math.inf), 1)

    def _parts(self, x: Tensor, t: Time, cond: Cond) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma as columns; rotated offsets [B, K, d]; variances [B or 1, K, d]; log joint [B, K]."""
        flat = x.flatten(1)
        alpha, sigma = (c.to(x.dtype) for c in self.path.at(t, flat)[:2])
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        offset = flat.unsqueeze(1) - alpha * self.mean.to(flat)
        if self.basis is not None:
            offset = torch.einsum("kij,bki->bkj", self.basis.to(flat), offset)
        spread = alpha**2 * self.variance.to(flat) + sigma**2
        log_joint = self._log_weights(cond, flat) - 0.5 * (
            (offset**2 / spread).sum(2) + torch.log(2 * math.pi * spread).sum(2)
        )
        return alpha, sigma, offset, spread, log_joint

    def _back(self, rotated: Tensor) -> Tensor:
        return rotated if self.basis is None else torch.einsum("kij,bkj->bki", self.basis.to(rotated), rotated)

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        if want in ("features", "both"):
            raise ValueError("an exact law has no features")
        alpha, _, offset, spread, log_joint = self._parts(x, t, cond)
        share = torch.softmax(log_joint, 1).unsqueeze(2)
        if want == "score":
            return -(share * self._back(offset / spread)).sum(1).view_as(x)
        variance = self.variance.to(offset)
        guess = self.mean.to(offset) + self._back(alpha * variance / spread * offset)
        x0 = (share * guess).sum(1).view_as(x)
        return self.path.convert(x0, x, t, "x0", want)

    def null(self, cond: Cond) -> Cond:
        if self.classes is None or not isinstance(cond, Tensor):
            return super().null(cond)
        return torch.full_like(cond, self.classes)

    def log_density(self, x: Tensor, t: Time | None = None, cond: Cond = None) -> Tensor:
        """``log p_t(x | cond)`` of each row, in nats; t = None is clean data."""
        *_, log_joint = self._parts(x, self.path.t_min if t is None else t, cond)
        return torch.logsumexp(log_joint, 1)

    def sample(self, count: int, rng: Source, cond: Cond = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """Clean samples [count, *shape]; with a condition, one for each of its rows."""
        generator = rng.generator if isinstance(rng, Rng) else rng
        log_weight = self._log_weights(cond, self.mean).expand(count, -1)
        pick = torch.multinomial(log_weight.exp(), 1, generator=generator).squeeze(1)
        noise = torch.randn(count, self.mean.shape[1], generator=generator, dtype=torch.float64)
        offset = self.variance[pick].sqrt() * noise
        if self.basis is not None:
            offset = torch.einsum("bij,bj->bi", self.basis[pick], offset)
        return (self.mean[pick] + offset).to(dtype).reshape(count, *self.shape)

    def component(self, cond: Cond, count: int) -> Tensor:
        """The only component of each row; ValueError where there are several."""
        allowed = self._log_weights(cond, self.mean).expand(count, -1) > -math.inf
        if not bool((allowed.sum(1) == 1).all()):
            raise ValueError("the flow map of a mixture has no closed form: condition on classes of one component")
        return allowed.double().argmax(1)

    def flow_map(self, x: Tensor, t: Time, s: Time, cond: Cond = None) -> Tensor:
        """Where the deterministic flow takes x from t to s, exactly, for rows of one component.

        Along each axis ``(x_s - alpha_s m) / std_s = (x_t - alpha_t m) / std_t``,
        ``std_t^2 = alpha_t^2 l + sigma_t^2``. ValueError for rows with several components.
        """
        pick = self.component(cond, x.shape[0])
        flat = x.flatten(1)
        mean, variance = self.mean.to(flat)[pick], self.variance.to(flat)[pick]
        here, there = self.path.at(t, flat), self.path.at(s, flat)
        offset = flat - here.alpha * mean
        if self.basis is not None:
            offset = torch.einsum("bij,bi->bj", self.basis.to(flat)[pick], offset)
        ratio = (there.alpha**2 * variance + there.sigma**2) / (here.alpha**2 * variance + here.sigma**2)
        offset = offset * ratio.sqrt()
        if self.basis is not None:
            offset = torch.einsum("bij,bj->bi", self.basis.to(flat)[pick], offset)
        return (there.alpha * mean + offset).to(x.dtype).view_as(x)

    def noised_covariance(self, t: Time, k: int = 0) -> Tensor:
        """Covariance [d, d] of component k at time t."""
        alpha, sigma, _, _ = self.path.coefs(t)
        spread = torch.diag(alpha**2 * self.variance[k] + sigma**2)
        return spread if self.basis is None else self.basis[k] @ spread @ self.basis[k].T


class Gaussian(Law):
    """``N(mean, diag(std^2))`` or, with ``covariance`` [d, d], any Gaussian; one flow map, in closed form.

    >>> law = Gaussian(mean=[0.0], std=[1.0])
    >>> law(torch.tensor([[1.0]], dtype=torch.float64), 0.5).item()
    1.0
    """

    def __init__(
        self,
        mean: Numbers,
        std: Numbers | float | None = None,
        covariance: Numbers | None = None,
        *,
        path: Path | None = None,
    ) -> None:
        if (std is None) == (covariance is None):
            raise ValueError("a Gaussian takes either std or covariance")
        centre = torch.as_tensor(mean, dtype=torch.float64)
        if covariance is None:
            variance = torch.as_tensor(std, dtype=torch.float64).expand_as(centre).square().flatten()
            super().__init__([1.0], centre.unsqueeze(0), variance.unsqueeze(0), path=path)
        else:
            values, vectors = spectrum(torch.as_tensor(covariance, dtype=torch.float64))
            super().__init__([1.0], centre.unsqueeze(0), values.unsqueeze(0), vectors.unsqueeze(0), path=path)


class Mixture(Law):
    """Weighted Gaussians in any dimension: ``std`` a number, [K] or [K, d], or ``covariances`` [K, d, d]."""

    def __init__(
        self,
        weights: Numbers,
        means: Numbers,
        std: Numbers | float | None = None,
        covariances: Numbers | None = None,
        *,
        labels: Sequence[int] | Tensor | None = None,
        path: Path | None = None,
    ) -> None:
        if (std is None) == (covariances is None):
            raise ValueError("a mixture takes either std or covariances")
        centres = torch.as_tensor(means, dtype=torch.float64)
        if covariances is None:
            spread = torch.as_tensor(std, dtype=torch.float64)
            spread = spread.reshape(-1, 1) if spread.ndim < 2 else spread
            flat = centres.flatten(1)
            super().__init__(weights, centres, spread.square().expand_as(flat), labels=labels, path=path)
        else:
            values, vectors = spectrum(torch.as_tensor(covariances, dtype=torch.float64))
            super().__init__(weights, centres, values, vectors, labels=labels, path=path)


def spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; ValueError where a matrix is not a covariance."""
    if not torch.allclose(covariance, covariance.mT, atol=1e-10):
        raise ValueError("a covariance is symmetric")
    values, vectors = torch.linalg.eigh(covariance)
    if values.min() < -1e-10:
        raise ValueError(f"a covariance has no negative variance, got {values.min().item():.3g}")
    return values.clamp(min=0), vectors


class FiniteSet(Law):
    """The empirical law of a data set: atoms with equal weights, or given ones.

    Its denoiser is the softmax-weighted mean of the atoms: what a perfectly memorising teacher computes.
    One product of matrices, so thousands of images are fine. Times must be above zero noise.
    """

    def __init__(
        self,
        points: Numbers,
        weights: Numbers | None = None,
        *,
        labels: Sequence[int] | Tensor | None = None,
        path: Path | None = None,
    ) -> None:
        atoms = torch.as_tensor(points, dtype=torch.float64)
        even = torch.ones(len(atoms)) if weights is None else weights
        super().__init__(even, atoms, torch.zeros(len(atoms), 1), labels=labels, path=path)

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        if want in ("features", "both"):
            raise ValueError("an exact law has no features")
        flat = x.flatten(1)
        share = torch.softmax(self._log_joint(flat, t, cond), 1)
        x0 = (share @ self.mean.to(flat)).view_as(x)
        return self.path.convert(x0, x, t, "x0", want)

    def _log_joint(self, flat: Tensor, t: Time, cond: Cond) -> Tensor:
        """Up to a constant of the row, ``log w_k - ||x - alpha m_k||^2 / 2 sigma^2``."""
        alpha, sigma = (c.to(flat.dtype) for c in self.path.at(t, flat)[:2])
        atoms = self.mean.to(flat)
        near = alpha * (flat @ atoms.T) - alpha**2 * atoms.square().sum(1) / 2
        return self._log_weights(cond, flat) + near / sigma**2

    def log_density(self, x: Tensor, t: Time | None = None, cond: Cond = None) -> Tensor:
        """``log p_t(x | cond)``; a finite set has no density without noise, so t is required."""
        if t is None:
            raise ValueError("a finite set has a density only at a noise level: pass t")
        flat = x.flatten(1)
        sigma = column(self.path.coefs(t).sigma, flat).to(flat.dtype).reshape(-1)
        constant = flat.square().sum(1) / (2 * sigma**2) + flat.shape[1] * torch.log(2 * math.pi * sigma**2) / 2
        return torch.logsumexp(self._log_joint(flat, t, cond), 1) - constant
