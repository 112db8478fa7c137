"""Paths between data and noise, predictions along them, and the noise levels that methods draw.

A path mixes a clean sample with Gaussian noise, ``x_t = alpha x0 + sigma eps``. Whatever a network
predicts is a pair (a, b) standing for ``a x0 + b eps``; one solve converts any pair into any other.
All broadcasting of time lives in this file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from .part import Part
from .rng import Source, uniform
from .rng import normal as normal

Time = float | Tensor
Prediction = Literal["x0", "eps", "v", "velocity", "flow", "score"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


class Coefs(NamedTuple):
    """``x_t = alpha x0 + sigma eps`` and the rates d/dt of both coefficients."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def column(value: Tensor, like: Tensor) -> Tensor:
    """Shape a scalar or a [batch] tensor so that it multiplies ``like`` row by row.

    >>> column(torch.ones(2), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    if value.ndim == 0:
        return value
    if value.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"time has {value.shape[0]} rows, the sample has {like.shape[0]}")
    return value.reshape(value.shape[0], *[1] * (like.ndim - 1))


def as_tensor(t: Time) -> Tensor:
    """Time in double precision. A float becomes a zero-dimensional CPU tensor: it multiplies any
    device's tensor without a copy, a sync or a change of type."""
    if isinstance(t, Tensor):
        return t if t.device.type == "mps" else t.double()
    return torch.tensor(t, dtype=torch.float64)


def rows_of(t: Time, like: Tensor) -> Tensor:
    """Time as a [batch] tensor on the device of ``like``, at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    value = t.to(dtype) if isinstance(t, Tensor) else torch.tensor(t, dtype=dtype)
    return value.to(like.device).expand(like.shape[0])


class Path(Part, ABC):
    """A path from data at ``t_min`` to noise at ``t_max``.

    Attributes
    ----------
    t_min, t_max:
        clean data and noise.
    t_low:
        the lowest level a logarithmic time grid visits before it jumps to ``t_min``.
    slope:
        the prediction that a solver integrates (see ``frame``).
    """

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    @abstractmethod
    def t_max(self) -> float: ...

    @property
    def t_low(self) -> float:
        return 1e-3 * self.t_max

    @property
    def slope(self) -> Prediction:
        return "flow"

    @abstractmethod
    def _coefs(self, t: Tensor) -> Coefs: ...

    @abstractmethod
    def _time(self, lam: Tensor) -> Tensor: ...

    def coefs(self, t: Time) -> Coefs:
        """``alpha, sigma, d_alpha, d_sigma`` at t, in double precision, shaped like t.

        Where sigma leaves zero like a square root (variance-preserving paths at t = 0) its rate is infinite.
        """
        return self._coefs(as_tensor(t))

    def at(self, t: Time, like: Tensor) -> Coefs:
        """``coefs`` shaped to multiply ``like``, in its type but at least float32."""
        if not isinstance(t, Tensor) or t.ndim == 0 and t.device.type == "cpu":
            return self.coefs(t)  # zero-dimensional: takes the type and the device of the other operand
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Coefs(*(c.to(like.device, dtype) for c in self.coefs(column(t, like))))

    def corrupt(self, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        """Noise a clean sample: ``alpha x0 + sigma eps``."""
        alpha, sigma, _, _ = self.at(t, x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def pair(self, name: str, coefs: Coefs) -> tuple[Tensor | float, Tensor | float]:
        """The pair (a, b) that a prediction's name stands for.

        ``x0``, ``eps``; ``v = alpha eps - sigma x0`` (Salimans & Ho 2022); ``velocity = dx_t/dt``;
        ``flow = eps - x0``, the velocity of the straight path with the same signal-to-noise ratio;
        ``score = -eps / sigma``.
        """
        alpha, sigma, d_alpha, d_sigma = coefs
        match name:
            case "x0":
                return 1.0, 0.0
            case "eps":
                return 0.0, 1.0
            case "v":
                return -sigma, alpha
            case "velocity":
                return d_alpha, d_sigma
            case "flow":
                return -1.0, 1.0
            case "score":
                return 0.0, -1.0 / sigma
        raise ValueError(f"unknown prediction {name!r}: one of {', '.join(PREDICTIONS)}")

    def convert(self, value: Tensor, x_t: Tensor, t: Time, given: str, want: str, coefs: Coefs | None = None) -> Tensor:
        """Read one prediction as another.

        A prediction is a pair (a, b) standing for a x0 + b eps. Together with
        x_t = alpha x0 + sigma eps it fixes x0 and eps, unless the two are parallel
        (noise read at a level without signal, say): then a float time raises ValueError. ``coefs`` is
        ``at(t, x_t)``, where the caller has it already.

        >>> path = Straight()
        >>> x_t, x0 = torch.tensor([[1.0]]), torch.tensor([[0.0]])
        >>> path.convert(x0, x_t, 0.5, given="x0", want="eps").item()
        2.0
        """
        if given == want:
            return value
        coefs = self.at(t, x_t) if coefs is None else coefs
        (a, b), (c, d) = self.pair(given, coefs), self.pair(want, coefs)
        det = coefs.alpha * b - coefs.sigma * a
        if det.ndim == 0 and det.device.type == "cpu" and (det.abs() < 1e-14 or not det.isfinite()):
            raise ValueError(f"{given!r} says nothing about {want!r} at t = {float(t):.6g} of {type(self).__name__}")
        keep, take = (c * b - d * a) / det, (d * coefs.alpha - c * coefs.sigma) / det
        return (keep * x_t + take * value).to(x_t.dtype)

    def lam(self, t: Time) -> Tensor:
        """Half the log signal-to-noise ratio, ``log(alpha / sigma)``: falls as t rises."""
        coefs = self.coefs(t)
        return torch.log(coefs.alpha) - torch.log(coefs.sigma)

    def snr(self, t: Time) -> Tensor:
        """``alpha^2 / sigma^2``."""
        coefs = self.coefs(t)
        return (coefs.alpha / coefs.sigma) ** 2

    def time(self, lam: Time) -> Tensor:
        """The inverse of ``lam``, held inside [t_min, t_max]."""
        return self._time(as_tensor(lam)).clamp(self.t_min, self.t_max)

    def straight(self, t: Time) -> Tensor:
        """``sigma / (alpha + sigma)``: the time on the straight path with the same signal-to-noise ratio, in [0, 1]."""
        alpha, sigma, _, _ = self.coefs(t)
        return sigma / (alpha + sigma)

    def at_straight(self, tau: Time) -> Tensor:
        """The inverse of ``straight``, held inside [t_min, t_max].

        >>> round(float(Straight().at_straight(0.25)), 9)
        0.25
        """
        tau = as_tensor(tau)
        return self.time(torch.log1p(-tau) - torch.log(tau))

    def frame(self, t: Time) -> tuple[Tensor, Tensor]:
        """(scale, tau) such that ``d(x / scale) / d tau = slope``: what a solver integrates.

        Here scale = alpha + sigma and tau = sigma / (alpha + sigma): every path, seen as a straight one.
        """
        alpha, sigma, _, _ = self.coefs(t)
        return alpha + sigma, sigma / (alpha + sigma)

    def move(self, x: Tensor, slope: Tensor, t: Time, s: Time) -> Tensor:
        """One straight step in the path's frame: ``x_s / scale_s = x_t / scale_t + (tau_s - tau_t) slope``.

        With a denoiser's ``slope`` this is DDIM; t and s are floats or [batch].
        """
        (scale_t, tau_t), (scale_s, tau_s) = self._columns(t, x), self._columns(s, x)
        return (scale_s * (x / scale_t + (tau_s - tau_t) * slope)).to(x.dtype)

    def _columns(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(t, Tensor) or t.ndim == 0 and t.device.type == "cpu":
            return self.frame(t)
        dtype = torch.promote_types(like.dtype, torch.float32)
        scale, tau = self.frame(column(t, like))
        return scale.to(like.device, dtype), tau.to(like.device, dtype)


class _NoiseFrame(Path):
    """Paths that keep some signal at t_max: solvers integrate eps over sigma / alpha, as EDM does."""

    @property
    def slope(self) -> Prediction:
        return "eps"

    def frame(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma, _, _ = self.coefs(t)
        return alpha, sigma / alpha


class Straight(Path):
    """Rectified flow: ``x_t = (1 - t) x0 + t eps``, t in [0, t_max]."""

    kind: Literal["straight"] = "straight"
    end: float = Field(1.0, gt=0, le=1, description="the noisiest time; below 1 some signal is left")

    @property
    def t_max(self) -> float:
        return self.end

    def _coefs(self, t: Tensor) -> Coefs:
        one = torch.ones_like(t)
        return Coefs(1 - t, t, -one, one)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)


class Trigonometric(Path):
    """``x_t = cos(t) x0 + sin(t) eps``, t in [0, pi/2]."""

    kind: Literal["trigonometric"] = "trigonometric"

    @property
    def t_max(self) -> float:
        return math.pi / 2

    def _coefs(self, t: Tensor) -> Coefs:
        alpha, sigma = torch.cos(t), torch.sin(t)
        return Coefs(alpha, sigma, -sigma, alpha)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.atan(torch.exp(-lam))


class Exploding(_NoiseFrame):
    """Variance exploding: ``x_t = x0 + t eps``, so that t is sigma itself (EDM: 0.002 to 80)."""

    kind: Literal["exploding"] = "exploding"
    sigma_min: float = Field(0.002, gt=0, description="lowest level visited before the clean sample")
    sigma_max: float = Field(80.0, gt=0, description="noise at the start")

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def t_low(self) -> float:
        return self.sigma_min

    def _coefs(self, t: Tensor) -> Coefs:
        one = torch.ones_like(t)
        return Coefs(one, t, torch.zeros_like(t), one)

    def lam(self, t: Time) -> Tensor:
        return -torch.log(as_tensor(t))  # alpha is 1

    def _time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


class _UnitVariance(_NoiseFrame):
    """``alpha^2 + sigma^2 = 1``, t in [0, 1]; subclasses say how log alpha runs."""

    zero_snr: bool = Field(False, description="shift alpha: no signal is left at t = 1 (Lin et al. 2023, Alg. 1)")

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def slope(self) -> Prediction:
        return "flow" if self._silent_end() else "eps"

    def frame(self, t: Time) -> tuple[Tensor, Tensor]:
        return Path.frame(self, t) if self._silent_end() else super().frame(t)

    def _silent_end(self) -> bool:
        return self.zero_snr

    @abstractmethod
    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and its rate, before any shift to zero signal."""

    @abstractmethod
    def _time_of(self, log_alpha: Tensor) -> Tensor: ...

    def _last(self) -> Tensor:
        return self._log_alpha(torch.ones((), dtype=torch.float64))[0].exp()

    def _coefs(self, t: Tensor) -> Coefs:
        log_alpha, rate = self._log_alpha(t)
        alpha, missing = log_alpha.exp(), -torch.expm1(log_alpha)  # missing = 1 - alpha without cancellation
        d_alpha = alpha * rate
        if self.zero_snr:
            last = self._last().to(t)
            alpha, missing, d_alpha = (alpha - last) / (1 - last), missing / (1 - last), d_alpha / (1 - last)
            alpha = alpha.clamp(min=0)
        sigma = torch.sqrt(missing * (1 + alpha))
        return Coefs(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def _time(self, lam: Tensor) -> Tensor:
        log_alpha = torch.nn.functional.logsigmoid(2 * lam) / 2
        if self.zero_snr:
            last = self._last().to(lam)
            log_alpha = torch.log(log_alpha.exp() * (1 - last) + last)
        return self._time_of(log_alpha)


class VariancePreserving(_UnitVariance):
    """Diffusion with ``alpha = exp(-1/2 integral of beta)``, or the cosine schedule; t in [0, 1].

    ``linear``: beta runs from 0.1 to 20 (Song et al. 2021). ``scaled_linear``: its root runs from
    sqrt(0.85) to sqrt(12) (Stable Diffusion's table, a thousand steps as one). ``cosine``:
    ``alpha = cos(pi/2 (t + .008) / 1.008)``, scaled to 1 at t = 0 (Nichol & Dhariwal 2021).
    """

    kind: Literal["variance_preserving"] = "variance_preserving"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_min: float | None = Field(None, gt=0, description="rate at t = 0; None: the schedule's usual one")
    beta_max: float | None = Field(None, gt=0, description="rate at t = 1; None: the schedule's usual one")

    def _silent_end(self) -> bool:
        return self.zero_snr or self.schedule == "cosine"

    def _betas(self) -> tuple[float, float]:
        low, high = (0.1, 20.0) if self.schedule == "linear" else (0.85, 12.0)
        return self.beta_min or low, self.beta_max or high

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._betas()
        if self.schedule == "linear":
            return -(low * t + (high - low) * t**2 / 2) / 2, -(low + (high - low) * t) / 2
        if self.schedule == "scaled_linear":
            base, grow = math.sqrt(low), math.sqrt(high) - math.sqrt(low)
            root = base + grow * t
            return -t * (root**2 + root * base + base**2) / 6, -(root**2) / 2
        quarter, shift = math.pi / 2 / 1.008, 0.008
        angle, first = quarter * (t + shift), quarter * shift
        # 1 - alpha by the addition theorem: no digit is lost near t = 0
        missing = 2 * torch.sin(quarter * t / 2) ** 2 + torch.sin(quarter * t) * math.tan(first)
        far = torch.log(torch.cos(angle).clamp(min=1e-300)) - math.log(math.cos(first))
        return torch.where(missing < 0.5, torch.log1p(-missing.clamp(max=0.5)), far), -quarter * torch.tan(angle)

    def _time_of(self, log_alpha: Tensor) -> Tensor:
        low, high = self._betas()
        if self.schedule == "linear":
            return (torch.sqrt(low**2 - 4 * (high - low) * log_alpha) - low) / (high - low)
        if self.schedule == "scaled_linear":
            base, grow = math.sqrt(low), math.sqrt(high) - math.sqrt(low)
            return ((base**3 - 6 * grow * log_alpha) ** (1 / 3) - base) / grow
        quarter, shift = math.pi / 2 / 1.008, 0.008
        return torch.acos((log_alpha.exp() * math.cos(quarter * shift)).clamp(-1, 1)) / quarter - shift


class Tabulated(_UnitVariance):
    """A diffusion known by its table of ``alpha^2`` (diffusers' ``alphas_cumprod``), t in [0, 1].

    Entry i stands at ``t = (i + 1) / N``; between entries alpha is linear in t, and alpha(0) = 1.
    """

    kind: Literal["tabulated"] = "tabulated"
    alphas_cumprod: tuple[float, ...] = Field(min_length=2, repr=False)

    @property
    def t_low(self) -> float:
        return 1.0 / len(self.alphas_cumprod)

    def _silent_end(self) -> bool:
        return self.zero_snr or self.alphas_cumprod[-1] < 1e-8

    def _table(self, like: Tensor) -> Tensor:
        alpha = torch.tensor(self.alphas_cumprod, dtype=torch.float64).sqrt()
        return torch.cat([torch.ones(1, dtype=torch.float64), alpha]).to(like)

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table, count = self._table(t), len(self.alphas_cumprod)
        cell = (t * count).floor().clamp(0, count - 1)
        left, right = table[cell.long()], table[cell.long() + 1]
        alpha = (left + (t * count - cell) * (right - left)).clamp(min=1e-30)
        return torch.log(alpha), (right - left) * count / alpha

    def _time_of(self, log_alpha: Tensor) -> Tensor:
        table, count = self._table(log_alpha), len(self.alphas_cumprod)
        alpha = log_alpha.exp()
        cell = (torch.searchsorted(-table, -alpha.contiguous(), right=True) - 1).clamp(0, count - 1)
        left, right = table[cell], table[cell + 1]
        return (cell + (left - alpha) / (left - right)) / count


AnyPath = Annotated[Straight | Trigonometric | Exploding | VariancePreserving | Tabulated, Field(discriminator="kind")]


def path_from(description: dict[str, object]) -> Path:
    """The path that ``path.model_dump()`` described."""
    return TypeAdapter(AnyPath).validate_python(description)


class NoiseSampler(Part):
    """How a method draws noise levels; ``on(path)`` gives ``(x, rng) -> t`` of shape [batch].

    ``uniform``: t uniform between the fractions ``low`` and ``high`` of [t_min, t_max].
    ``log_normal``: ``log(sigma / alpha) ~ N(mean, std^2)``, held in the path's range (EDM, eq. of Table 1).
    ``logit_normal``: t is the logistic of N(mean, std^2), stretched over the path.
    ``karras``: uniform in the index of a rho = 7 grid, between the fractions ``low`` and ``high`` of it.
    """

    kind: Literal["uniform", "log_normal", "logit_normal", "karras"] = "uniform"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)
    rho: float = Field(7.0, gt=0)

    def on(self, path: Path) -> Callable[[Tensor, Source], Tensor]:
        span = path.t_max - path.t_min
        low_t, high_t = path.t_low, path.t_max

        def gauss(x: Tensor, rng: Source) -> Tensor:
            like = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
            return self.mean + self.std * normal(like, rng)

        def draw(x: Tensor, rng: Source) -> Tensor:
            if self.kind == "log_normal":
                level = gauss(x, rng)
                return path.time(-level).clamp(low_t, high_t).to(level)
            if self.kind == "logit_normal":
                return path.t_min + span * torch.sigmoid(gauss(x, rng))
            part = self.low + (self.high - self.low) * uniform(x, rng)
            if self.kind == "uniform":
                return path.t_min + span * part
            return karras_time(path, part, self.rho).to(part)

        return draw


def karras_time(
    path: Path, part: Tensor, rho: float = 7.0, low: float | None = None, high: float | None = None
) -> Tensor:
    """The time at a fraction of the power grid: 0 is the lowest level, 1 the highest (Karras et al. 2022, eq. 5).

    Levels are ``sigma / alpha``; a path that ends without signal is cut at a ratio of 1000.
    """
    bottom, top = (_ratio(path, t) for t in (low or path.t_low, high or path.t_max))
    ratio = (bottom ** (1 / rho) + part.double() * (top ** (1 / rho) - bottom ** (1 / rho))) ** rho
    return path.time(-torch.log(ratio))


def _ratio(path: Path, t: float) -> float:
    alpha, sigma, _, _ = path.coefs(t)
    return float(min(sigma / max(alpha, torch.tensor(1e-12)), torch.tensor(1e3)))
