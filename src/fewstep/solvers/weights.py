"""The one quadrature behind every diffusion solver: integrate a polynomial exactly along a path.

A form is a prediction with the scale and the clock in which the flow is ``d(x / scale) = value d clock``:

    data    value x0        scale sigma           clock alpha / sigma
    noise   value eps       scale alpha           clock sigma / alpha
    flow    value eps - x0  scale alpha + sigma   clock sigma / (alpha + sigma)

A step holds the value to be a polynomial in a variable ``u`` (lam, rho, tau or time) through guesses already made, and
integrates that exactly: ``x_s = keep x_t + sum_k w_k value_k``. DDIM, DEIS, DPM-Solver(++), UniPC and Adams-Bashforth
are choices of form, variable and nodes. Everything here is float64 and happens once for a grid.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch

from ..path import Path

Form = Literal["data", "noise", "flow"]
Variable = Literal["lam", "rho", "tau", "time"]
FORMS: tuple[str, ...] = get_args(Form)
VARIABLES: tuple[str, ...] = get_args(Variable)
PREDICTION = {"data": "x0", "noise": "eps", "flow": "flow"}
PAIRS = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "flow": (-1.0, 1.0)}
FAR = 40.0
"""Beyond this many units of lam an exponential weighs nothing in float64."""


def silent(alpha: float, sigma: float) -> bool:
    """Whether a level has too little signal to divide by it: float32 would lose three digits in the noise form."""
    return alpha < 1e-3 * sigma


class Level(NamedTuple):
    """A noise level as plain floats; ``lam`` is infinite at clean data and at pure noise."""

    t: float
    alpha: float
    sigma: float
    lam: float


class Weights(NamedTuple):
    """``x_s = keep x_t + sum_k values[k] value_k + noise z``; the newest value first."""

    keep: float
    values: tuple[float, ...]
    noise: float = 0.0


def integrate(
    path: Path,
    form: Form,
    variable: Variable,
    start: Level,
    end: Level,
    nodes: tuple[Level, ...],
    *,
    relax: float = 1.0,
    churn: float = 0.0,
) -> Weights:
    """Weights of the step from ``start`` to ``end`` with the value a polynomial in ``variable`` through ``nodes``.

    ``relax`` multiplies the first-derivative term (of the polynomial about the first node). ``churn`` is the
    strength of the noise in the stochastic flow with the same laws (data form alone, SA-Solver's tau):
    ``x_s = (sigma_s / sigma_t) e^(-churn^2 h) x_t + alpha_s (1 + churn^2) int e^(-(1 + churn^2) v) x0 dv + noise``.
    Where the variable is infinite, at pure noise or at clean data, the polynomial is one in ``tau``, finite everywhere.

    >>> from fewstep.path import Exploding
    >>> a, b = (Level(v, 1.0, v, -math.log(v)) for v in (2.0, 1.0))
    >>> integrate(Exploding(), "noise", "rho", a, b, (a,))
    Weights(keep=1.0, values=(-1.0,), noise=0.0)
    """
    if churn and form != "data":
        raise ValueError(f"a stochastic step is taken in the data form, got {form!r}")
    keep, first = constant(form, start, end, churn)
    noise = end.sigma * math.sqrt(-math.expm1(-2 * churn**2 * (end.lam - start.lam))) if churn else 0.0
    if len(nodes) == 1:
        return Weights(keep, (first,), noise)
    if not all(math.isfinite(value_of(path, variable, level)) for level in (*nodes, end)):
        variable = "tau"
    places = [value_of(path, variable, node) for node in nodes]
    if len(set(places)) < len(places):
        raise ValueError(f"two guesses of a step stand at one level: {', '.join(f'{node.t:.6g}' for node in nodes)}")
    centre, unit = places[0], max(abs(place - places[0]) for place in places)
    moments = _moments(path, form, variable, start, end, centre, unit, len(nodes), churn)
    moments[0], moments[1] = first, relax * moments[1]
    return Weights(keep, tuple(_solve([(place - centre) / unit for place in places], moments)), noise)


def value_of(path: Path, variable: Variable, level: Level) -> float:
    """The polynomial's variable at a level."""
    match variable:
        case "lam":
            return level.lam
        case "rho":
            return level.sigma / level.alpha if level.alpha else math.inf
        case "tau":
            return level.sigma / (level.alpha + level.sigma)
        case "time":
            return level.t
    raise ValueError(f"unknown variable {variable!r}: one of {', '.join(VARIABLES)}")


def convert(level: Level, given: str, want: str) -> tuple[float, float]:
    """(a, b) such that ``want = a x_t + b given`` at a level."""
    if given == want:
        return 0.0, 1.0
    (a, b), (c, d) = PAIRS[given], PAIRS[want]
    det = level.alpha * b - level.sigma * a
    if det == 0:
        raise ValueError(f"{given!r} says nothing about {want!r} at t = {level.t:.6g}")
    return (c * b - d * a) / det, (d * level.alpha - c * level.sigma) / det


def constant(form: Form, start: Level, end: Level, churn: float = 0.0) -> tuple[float, float]:
    """keep, and the weight of a value that does not change: exact, in terms that are finite at both ends."""
    match form:
        case "data":
            if churn:
                h = end.lam - start.lam
                return end.sigma / start.sigma * math.exp(-(churn**2) * h), -end.alpha * math.expm1(-(1 + churn**2) * h)
            keep = end.sigma / start.sigma
            return keep, end.alpha - start.alpha * keep
        case "noise":
            if not start.alpha:
                raise ValueError("the noise form cannot leave pure noise: there is no signal to keep")
            keep = end.alpha / start.alpha
            return keep, end.sigma - start.sigma * keep
        case "flow":
            here, there = start.alpha + start.sigma, end.alpha + end.sigma
            return there / here, there * (end.sigma / there - start.sigma / here)
    raise ValueError(f"unknown form {form!r}: one of {', '.join(FORMS)}")


def _moments(
    path: Path,
    form: Form,
    variable: Variable,
    start: Level,
    end: Level,
    centre: float,
    unit: float,
    count: int,
    churn: float,
) -> list[float]:
    """``scale_s int ((u - centre) / unit)^j d clock`` for j < count, by Gauss-Legendre panels in lam."""
    low, high = start.lam, end.lam
    if math.isinf(high) and form == "data":  # all weight at the end itself
        z = (value_of(path, variable, end) - centre) / unit
        return [end.alpha * z**j for j in range(count)]
    if math.isinf(low):
        low = (high if math.isfinite(high) else 0.0) - FAR
    if math.isinf(high):
        high = max(low, 0.0) + FAR
    if form == "data":
        low = max(low, high - FAR)  # e^(lam - lam_s) is nothing before
    panels = max(1, math.ceil(high - low))
    half = (high - low) / panels / 2
    points = [(low + half * (2 * k + 1 + x), half * w) for k in range(panels) for x, w in gauss(12)]
    places = [_place(variable, lam) for lam, _ in points]
    if variable == "time":
        places = path.time(torch.tensor([lam for lam, _ in points], dtype=torch.float64)).tolist()
    moments = [0.0] * count
    for (lam, weight), u in zip(points, places, strict=True):
        match form:
            case "data":
                weight *= end.alpha * (1 + churn**2) * math.exp(-(1 + churn**2) * (high - lam))
            case "noise":
                weight *= -end.alpha * math.exp(-lam)
            case "flow":
                part = 1 / (1 + math.exp(lam))
                weight *= -(end.alpha + end.sigma) * part * (1 - part)
        z, power = (u - centre) / unit, 1.0
        for j in range(count):
            moments[j] += weight * power
            power *= z
    return moments


def _place(variable: Variable, lam: float) -> float:
    match variable:
        case "rho":
            return math.exp(-lam)
        case "tau":
            return 1 / (1 + math.exp(lam))
    return lam


def _solve(places: list[float], moments: list[float]) -> list[float]:
    """Weights w with ``sum_k w_k places_k^j = moments_j``: a rule exact for every power (Bjorck & Pereyra 1970)."""
    z, w = places, list(moments)
    n = len(z)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] -= z[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] /= z[i] - z[i - k - 1]
        for i in range(k, n - 1):
            w[i] -= w[i + 1]
    return w


@lru_cache(maxsize=4)
def gauss(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights of Gauss and Legendre on [-1, 1], from their tridiagonal matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    side = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return tuple(zip(nodes.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))
