"""Samplers against exact teachers: error at the end of the flow by calls of the network, ours beside others'.

    python benchmarks/solvers.py --json solvers.json --plot solvers.png     # all; --quick is a smoke run
    python benchmarks/solvers.py --problems ring --paths vp --nfe 5 10      # a part of it
    python benchmarks/solvers.py --matrix                                   # is every solver finite everywhere?
    python benchmarks/solvers.py --overhead                                 # cost of a step beside bare Euler

Teachers are mixtures known in closed form: ``ring`` (8 modes at radius 1, std 0.08, in the plane), ``digits``
(20 full covariances fitted to scikit-learn's digits, scaled as x / 8 - 1), ``three`` (16-D, 3 components), and
``held``, drawn like ``three`` after the default was frozen: on it nothing was chosen. Starts are exact forward samples.
The error is the distance to the end of the exact flow from the same start, root mean square over starts and
coordinates, and the median over starts, both over the data's spread. Peers are diffusers' schedulers and, where
installed, k-diffusion's samplers, each fed the exact guess; rules of diff-sampler and k-diffusion are also re-stated in
our engine on those libraries' grids ("as ds", "as k").
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Counted, Denoiser, Guided, Reframed
from fewstep.errors import Refused
from fewstep.grid import GRIDS, grid
from fewstep.path import Coefs, Exploding, Straight, Tabulated
from fewstep.path import Path as NoisePath
from fewstep.registry import SOLVERS
from fewstep.solvers import recommended, sample, solver_named, steps_of
from fewstep.solvers.engine import Decision, Engine
from fewstep.solvers.multistep import Ipndm

OURS = "fewstep recommended"
NFES = (3, 5, 8, 10, 15, 20, 50)
PATHS = ("vp", "edm", "flow", "cosine")
PROBLEMS = ("ring", "digits", "three", "held")
BARS = {  # lowest error of any deterministic peer of diffusers, k-diffusion and diff-sampler, measured on other starts
    ("ring", "vp"): (0.146, 0.0586, 0.0226, 0.0134, 0.0073, 0.0043, 0.0010),
    ("ring", "edm"): (0.120, 0.0470, 0.0571, 0.0210, 0.0123, 0.0084, 0.0009),
    ("ring", "flow"): (0.279, 0.105, 0.0600, 0.0500, 0.0308, 0.0079, 0.0018),
    ("ring", "cosine"): (0.234, 0.126, 0.0779, 0.0633, 0.0436, 0.0152, 0.0025),
    ("digits", "vp"): (0.321, 0.172, 0.0437, 0.0345, 0.0171, 0.0114, 0.0010),
    ("digits", "edm"): (0.475, 0.248, 0.131, 0.0576, 0.0218, 0.0119, 0.0016),
    ("digits", "flow"): (0.397, 0.183, 0.0596, 0.0337, 0.0210, 0.0122, 0.0018),
}


class Teacher(Denoiser):
    """A mixture of full Gaussians; two products of matrices a call. ``label`` restricts it to one class."""

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, path: NoisePath, labels: Tensor) -> None:
        super().__init__()
        self.path, self.weights, self.means, self.labels = path, weights / weights.sum(), means, labels
        self.spread, vectors = torch.linalg.eigh(covariances)
        self.axes = vectors.permute(1, 0, 2).reshape(means.shape[1], -1)
        self.turned = torch.einsum("kd,kde->ke", means, vectors)
        self.roots = vectors * self.spread.clamp(min=0).sqrt().unsqueeze(1)
        total = (self.weights[:, None] * (covariances.diagonal(dim1=1, dim2=2) + means**2)).sum(0)
        self.std = float((total - (self.weights[:, None] * means).sum(0) ** 2).mean().sqrt())

    def forward(self, x: Tensor, t: Any, cond: Any = None, want: str = "x0", s: Any = None) -> Tensor:
        count, size = self.means.shape
        work = x.double() if x.dtype == torch.float64 else x.float()
        alpha, sigma, _, _ = self.path.coefs(t)  # tensors without a dimension, so that a search has the rate in t
        offset = (work @ self.axes.to(work)).view(-1, count, size) - (alpha * self.turned).to(work)
        variance = alpha**2 * self.spread + sigma**2
        joint = (self.weights.log() - variance.log().sum(1) / 2).to(work) - (offset**2 / variance.to(work)).sum(2) / 2
        if cond is not None:
            joint = joint.masked_fill((cond[:, None] != self.labels) & (cond[:, None] >= 0), -math.inf)
        share = torch.softmax(joint, 1).unsqueeze(2)

        def back(value: Tensor) -> Tensor:
            return (share * value).reshape(len(work), -1) @ self.axes.to(work).T

        keep, away = (alpha * self.spread / variance).to(work), (sigma / variance).to(work)
        guess = None if want == "eps" else back(keep * offset + self.turned.to(work))
        noise = None if want == "x0" else back(away * offset)
        if noise is None:
            return guess.to(x.dtype)
        if guess is None:
            return noise.to(x.dtype)
        return self.path.convert((noise - guess).to(x.dtype), x, t, "flow", want)

    def null(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, -1)

    def starts(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Exact forward samples at the noisiest time, and the component of each."""
        rng = torch.Generator().manual_seed(seed)
        pick = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        clean, noise = (torch.randn(count, self.means.shape[1], generator=rng, dtype=torch.float64) for _ in range(2))
        data = self.means[pick] + torch.einsum("bij,bj->bi", self.roots[pick], clean)
        coefs = self.path.coefs(self.path.t_max)
        return float(coefs.alpha) * data + float(coefs.sigma) * noise, self.labels[pick]


def table(path: str) -> list[float]:
    """diffusers' betas."""
    if path == "vp":
        return (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).tolist()
    bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    return [min(1 - bar[i + 1] / bar[i], 0.999) for i in range(1000)]


def path_named(name: str) -> NoisePath:
    if name in ("vp", "cosine"):
        kept = torch.tensor(table(name), dtype=torch.float64)
        return Tabulated(alphas_cumprod=tuple((1 - kept).cumprod(0).tolist()))
    return Exploding() if name == "edm" else Straight()


def teacher_named(problem: str, path: NoisePath) -> Teacher:
    if problem == "ring":
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        means = torch.stack([angle.cos(), angle.sin()], 1)
        spread = 0.08**2 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2)
        return Teacher(torch.ones(8, dtype=torch.float64), means, spread, path, torch.arange(8) % 2)
    if problem == "digits":
        from sklearn.datasets import load_digits
        from sklearn.mixture import GaussianMixture

        data = load_digits()
        law = GaussianMixture(20, covariance_type="full", reg_covar=1e-3, random_state=0).fit(data.data / 8 - 1)
        parts = (torch.tensor(v) for v in (law.weights_, law.means_, law.covariances_))
        return Teacher(*parts, path, torch.arange(20) % 2)
    rng = torch.Generator().manual_seed({"three": 2024, "held": 2025}[problem])
    means = 0.8 * torch.randn(3, 16, generator=rng, dtype=torch.float64)
    roots = torch.randn(3, 16, 16, generator=rng, dtype=torch.float64) / 16
    spread = roots @ roots.mT + 0.01 * torch.eye(16, dtype=torch.float64)
    return Teacher(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, spread, path, torch.arange(3) % 2)


def exact(model: Denoiser, x: Tensor, cond: Tensor | None, steps: int) -> Tensor:
    """The end of the flow by UniPC-3 on ``steps`` levels even in log-SNR down to sigma / alpha = 0.001."""
    path = model.path
    top = max(float(path.lam(path.t_max)), -7.0)
    times = path.time(torch.linspace(top, math.log(1e3), steps, dtype=torch.float64))
    times[0] = path.t_max
    return sample(model, x, torch.cat([times, times.new_zeros(1)]), solver_named("unipc3"), cond=cond)


# -- the peers ------------------------------------------------------------------------------------

Run = Callable[[Any, Tensor, int, Any, float], Tensor]
"""(model, starts, calls, cond, shift) -> ends."""


def diffusers_peers(path: str) -> dict[str, Run]:
    """Schedulers of diffusers on a path, each with the options worth having."""
    try:
        import diffusers
    except ModuleNotFoundError:
        return {}
    made: dict[str, Run] = {}
    grids = {"default": {}, "karras": {"use_karras_sigmas": True}, "logsnr": {"use_lu_lambdas": True}}
    if path in ("vp", "cosine"):
        base = {"trained_betas": table(path), "timestep_spacing": "trailing"}
        for grid_name, flags in grids.items():
            if path == "cosine" and flags.get("use_karras_sigmas"):
                continue  # crashes there
            for order in (2, 3):
                made[f"DPM++{order}M {grid_name}"] = by_table(
                    diffusers.DPMSolverMultistepScheduler, {**base, **flags, "solver_order": order}
                )
                if "use_lu_lambdas" not in flags:
                    made[f"UniPC-{order} {grid_name}"] = by_table(
                        diffusers.UniPCMultistepScheduler, {**base, **flags, "solver_order": order}
                    )
                    made[f"DEIS-{order} {grid_name}"] = by_table(
                        diffusers.DEISMultistepScheduler, {**base, **flags, "solver_order": order}
                    )
            if "use_lu_lambdas" not in flags:
                made[f"SA-solver {grid_name}"] = by_table(
                    diffusers.SASolverScheduler, {**base, **flags, "tau_func": lambda t: 0}
                )
        made["DDIM"] = by_table(diffusers.DDIMScheduler, {**base, "clip_sample": False, "set_alpha_to_one": True})
        for kind in ("EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"):
            for grid_name in ("default",) if path == "cosine" else ("default", "karras"):
                made[f"{kind[:-17]} {grid_name}"] = by_table(getattr(diffusers, kind), {**base, **grids[grid_name]})
    elif path == "edm":
        for order in (1, 2, 3):
            for kind in ("karras", "exponential"):
                made[f"EDM-DPM++{order}M {kind}"] = by_sigma(
                    diffusers.EDMDPMSolverMultistepScheduler, {"solver_order": order, "sigma_schedule": kind}
                )
        made["EDM-Euler"] = by_sigma(diffusers.EDMEulerScheduler, {})
    else:
        made["FlowMatchEuler"] = by_flow(diffusers.FlowMatchEulerDiscreteScheduler, {}, "shift")
        made["FlowMatchHeun"] = by_flow(diffusers.FlowMatchHeunDiscreteScheduler, {}, "shift")
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        for order in (2, 3):
            for kind in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
                made[f"{kind[:-18]}-{order}"] = by_flow(
                    getattr(diffusers, kind), {**flow, "solver_order": order}, "flow_shift"
                )
    return made


def in_calls(run: Callable[[int], tuple[Tensor, int]], nfe: int) -> Tensor:
    """The result with the most calls that are at most ``nfe``."""
    for steps in range(nfe, 0, -1):
        if steps * 2 - 1 > nfe and steps != nfe:
            continue
        ends, calls = run(steps)
        if calls <= nfe:
            return ends
    raise ValueError(f"no number of steps costs {nfe} calls or fewer")


def by_table(kind: Any, config: dict[str, Any]) -> Run:
    def run(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
        def go(steps: int) -> tuple[Tensor, int]:
            scheduler = kind(**config)
            scheduler.set_timesteps(steps)
            scaled = kind.__name__.startswith(("Euler", "LMS", "Heun"))  # works on x / alpha
            alpha = float(model.path.coefs(model.path.t_max).alpha)
            y = x / alpha if scaled else x
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(y, t)
                y = scheduler.step(model(seen, (float(t) + 1) / 1000, cond, "eps"), t, y, return_dict=False)[0]
            return y, len(scheduler.timesteps)

        return in_calls(go, nfe)

    return run


def by_sigma(kind: Any, config: dict[str, Any]) -> Run:
    def run(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
        scheduler = kind(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **config)
        scheduler.set_timesteps(nfe)
        y = x
        for i, t in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[i])
            scheduler.scale_model_input(y, t)
            skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
            y = scheduler.step((model(y, sigma, cond, "x0") - skip * y) / out, t, y, return_dict=False)[0]
        return y

    return run


def by_flow(kind: Any, config: dict[str, Any], shift_name: str) -> Run:
    def run(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
        def go(steps: int) -> tuple[Tensor, int]:
            scheduler = kind(**config, **{shift_name: shift})
            scheduler.set_timesteps(steps)
            y = x
            for t in scheduler.timesteps:
                time_ = min(max(float(t) / 1000, 1e-6), 1.0)
                y = scheduler.step(model(y, time_, cond, "flow"), t, y, return_dict=False)[0]
            return y, len(scheduler.timesteps)

        return in_calls(go, nfe)

    return run


def k_diffusion_peers(path: str) -> dict[str, Run]:
    """k-diffusion's deterministic samplers, where it is installed; for the paths that keep some signal."""
    try:
        from k_diffusion import sampling
    except ModuleNotFoundError:
        return {}
    if path == "flow":
        return {}

    def run(name: str, even: bool) -> Run:
        def go(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
            top, low = (1 / math.exp(float(model.path.lam(t))) for t in (model.path.t_max, model.path.t_low))
            sigmas = (sampling.get_sigmas_exponential if even else sampling.get_sigmas_karras)(nfe, low, top)
            alpha = float(model.path.coefs(model.path.t_max).alpha)

            def denoise(y: Tensor, sigma: Tensor, **unused: Any) -> Tensor:
                t = float(model.path.time(-math.log(float(sigma[0]))))
                return model(y * float(model.path.coefs(t).alpha), t, cond, "x0")

            return getattr(sampling, f"sample_{name}")(denoise, x / alpha, sigmas.to(x), disable=True)

        return go

    return {
        f"k {name} {'logsnr' if even else 'karras'}": run(name, even)
        for name in ("euler", "lms", "dpmpp_2m")
        for even in (False, True)
    }


# Rules of libraries that may not be installed, re-stated in our engine on the grids that those libraries use. They hold
# many of the figures of BARS; "ds" is diff-sampler (its data predictions without the clamp), "k" is k-diffusion.


class Restated(Engine):
    """A rule of the engine that takes its decision for step i of n from a function."""

    name, order = "restated", 0

    def __init__(self, rule: Callable[[int, tuple[Any, ...]], Decision]) -> None:
        self.rule = rule

    def decide(self, path: NoisePath, stages: tuple[Any, ...]) -> tuple[Decision, ...]:
        return tuple(self.rule(i, stages) for i in range(len(stages)))


def adams(depth: int, variable: Any = "rho") -> Restated:
    return Restated(lambda i, stages: Decision("noise", variable, min(depth, i + 1)))


def ipndm(depth: int) -> Restated:
    def rule(i: int, stages: tuple[Any, ...]) -> Decision:
        shares = Ipndm.SHARES[min(i, depth - 1)]
        return Decision("noise", "rho", len(shares), shares=shares)

    return Restated(rule)


def unipc(depth: int, lower: bool) -> Restated:
    """With B(h) = e^h - 1; ``lower``: the last steps drop to lower orders."""

    def rule(i: int, stages: tuple[Any, ...]) -> Decision:
        order = min(depth, i + 1, len(stages) - i if lower else depth)
        return Decision("data", "lam", order, corrector="bh2")

    return Restated(rule)


def damped_3m() -> Restated:
    """DPM-Solver++ 3M as all three libraries have it: with half of the second difference."""

    def rule(i: int, stages: tuple[Any, ...]) -> Decision:
        lams = [stages[k].lam_t for k in range(i, max(-1, i - 3), -1)]
        h = stages[i].lam_s - stages[i].lam_t
        if len(lams) < 2 or not all(map(math.isfinite, (h, *lams))):
            return Decision("data", "lam", 1)
        r0 = (lams[0] - lams[1]) / h
        if len(lams) < 3:
            return Decision("data", "lam", 2, shares=(1 + 1 / (2 * r0), -1 / (2 * r0)))
        r1 = (lams[1] - lams[2]) / h
        size, one, two = -math.expm1(-h), math.expm1(-h) / h + 1, (math.expm1(-h) + h) / h**2 - 0.5
        a, b, part = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1), r0 / (r0 + r1)
        slope = [p + part * (p - q) for p, q in zip(a, b, strict=True)]
        bend = [(p - q) / (r0 + r1) for p, q in zip(a, b, strict=True)]
        shares = [(one * p - two * q) / size for p, q in zip(slope, bend, strict=True)]
        return Decision("data", "lam", 3, shares=(1 + shares[0], shares[1], shares[2]))

    return Restated(rule)


def dpm_fast(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
    """k-diffusion's dpm_fast: single steps of DPM-Solver-3 even in log-SNR, one of lower order to make the number."""
    path = model.path
    top, low = (float(path.lam(t)) for t in (path.t_max, path.t_low))
    thirds = nfe // 3
    orders = [*[3] * (thirds - 1), 2, 1] if nfe % 3 == 0 else [*[3] * thirds, nfe % 3]

    def eps(y: Tensor, lam: float) -> Tensor:
        t = float(path.time(lam))
        return model(y * float(path.coefs(t).alpha), t, cond, "eps")

    y, step = x / float(path.coefs(path.t_max).alpha), (low - top) / len(orders)
    for k, order in enumerate(orders):
        lam = top + k * step

        def ahead(part: float, lam: float = lam) -> tuple[float, float, float]:  # (place, sigma there, e^(part h) - 1)
            return lam + part * step, math.exp(-lam - part * step), math.expm1(part * step)

        first = eps(y, lam)
        there, sigma, grow = ahead(1.0)
        moved = y - sigma * grow * first
        if order == 2:
            place, near, part = ahead(1 / 2)
            moved = moved - sigma * grow * (eps(y - near * part * first, place) - first)
        elif order == 3:
            place, near, part = ahead(1 / 3)
            second = eps(y - near * part * first, place) - first
            place, near, part = ahead(2 / 3)
            bend = 2 * near * (part / (2 / 3 * step) - 1)
            third = eps(y - near * part * first - bend * second, place) - first
            moved = moved - sigma * 1.5 * (grow / step - 1) * third
        y = moved
    return y * float(path.coefs(path.t_low).alpha)


def restated_peers(path: str) -> dict[str, Run]:
    def run(solver: Any, kind: Any, *, to_zero: bool) -> Run:
        def go(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
            steps = next(s for n in range(nfe, 0, -1) if (s := solver.steps_for(n)) is not None)
            times = grid(model.path, steps, kind, shift=shift) if to_zero else grid(model.path, steps + 1, kind)[:-1]
            return sample(model, x, times, solver, cond=cond)

        return go

    names = ("euler", "midpoint", "heun")
    made = {f"bare {name} uniform": run(solver_named(name), "uniform", to_zero=True) for name in names}
    if path == "flow":
        return made
    for kind in ("karras", "logsnr"):
        rules: dict[str, Any] = {f"iPNDM-{depth}": ipndm(depth) for depth in (2, 3, 4)}
        rules |= {f"iPNDM_v-{depth}": adams(depth) for depth in (2, 3, 4)}
        rules |= {f"UniPC-{depth}{' lower' if low else ''}": unipc(depth, low) for depth in (2, 3) for low in (0, 1)}
        rules |= {"DPM++2M": solver_named("dpm2m"), "DPM++3M": damped_3m()}
        made |= {f"as ds {name} {kind}": run(rule, kind, to_zero=False) for name, rule in rules.items()}
        for depth in (3, 4):
            made[f"as ds DEIS tab-{depth} {kind}"] = in_variance(run(adams(depth, "time"), kind, to_zero=False))
        rules = {"LMS": adams(4), "2M": solver_named("dpm2m"), "3M eta 0": damped_3m(), "Heun": solver_named("heun")}
        made |= {f"as k {name} {kind}": run(rule, kind, to_zero=True) for name, rule in rules.items()}
    made["as k dpm_fast"] = dpm_fast
    return made


def in_variance(run: Run) -> Run:
    """diff-sampler's DEIS counts time as a linear variance-preserving path with the same ends does, on any path."""

    def go(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
        path = model.path
        low, top = (math.exp(-float(path.lam(t))) for t in (path.t_low, path.t_max))
        small, large, first = math.log1p(low**2), math.log1p(top**2), 1e-3
        rise = 2 * (small / first - large) / (first - 1)
        start = large - rise / 2
        twin = Clocked(sigma_min=low, sigma_max=top, start=start, rise=rise)
        alpha = float(path.coefs(path.t_max).alpha)
        return run(Reframed(model, twin), x / alpha, nfe, cond, shift) * float(path.coefs(path.t_low).alpha)

    return go


class Clocked(Exploding):
    """An exploding path with the clock of a variance-preserving one: ``log(1 + sigma^2) = rise t^2 / 2 + start t``."""

    start: float
    rise: float

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_low(self) -> float:
        return 1e-3

    def _coefs(self, t: Tensor) -> Coefs:
        grown = torch.expm1(self.rise * t**2 / 2 + self.start * t)
        rate = (grown + 1) * (self.rise * t + self.start) / (2 * grown.sqrt())
        return Coefs(torch.ones_like(t), grown.sqrt(), torch.zeros_like(t), rate)

    def lam(self, t: Any) -> Tensor:
        return -torch.log(self.coefs(t).sigma)

    def _time(self, lam: Tensor) -> Tensor:
        seen = torch.log1p(torch.exp(-2 * lam))
        return 2 * seen / (torch.sqrt(self.start**2 + 2 * self.rise * seen) + self.start)


def our_solvers() -> dict[str, Run]:
    """Every deterministic solver of ours on the plain grids: what search and the default are compared with."""

    def run(name: str, kind: Any) -> Run:
        def go(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
            solver = solver_named(name)
            steps = next(s for n in range(nfe, 0, -1) if (s := solver.steps_for(n)) is not None)
            return sample(model, x, grid(model.path, steps, kind, shift=shift), solver, cond=cond)

        return go

    names = [entry.name for entry in SOLVERS if not entry.thing.stochastic]
    return {f"{name} {kind}": run(name, kind) for name in names for kind in ("karras", "logsnr", "uniform")}


def our_default(model: Any, x: Tensor, nfe: int, cond: Any, shift: float) -> Tensor:
    return sample(model, x, recommended(model.path, nfe), cond=cond)


# -- tables ---------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a problem, path, guidance, shift, calls and solver."""
    rows: list[dict[str, Any]] = []
    known = json.loads(options.peers.read_text(encoding="utf-8")) if options.peers else []
    for problem in options.problems:
        for path in options.paths:
            teacher = teacher_named(problem, path_named(path))
            x, labels = teacher.starts(options.starts, options.seed)
            for scale, shift in itertools.product(options.guidance, options.shift if path == "flow" else [1.0]):
                key = {"problem": problem, "path": path, "guidance": scale, "shift": shift}
                model: Any = teacher if scale == 1 else Guided(teacher, scale)
                cond = None if scale == 1 else labels
                ends = exact(model, x, cond, options.fine)
                runs: dict[str, Run] = {OURS: our_default}
                if not known:
                    runs |= {f"diffusers {k}": v for k, v in diffusers_peers(path).items()} | k_diffusion_peers(path)
                    runs |= restated_peers(path)
                if options.all:
                    runs |= {f"fewstep {k}": v for k, v in our_solvers().items()}
                for nfe in options.nfe:
                    here = key | {"nfe": nfe}
                    rows += [r for r in known if r["solver"] != OURS and all(r[k] == v for k, v in here.items())]
                    for name, run in runs.items():
                        found = outcome(run, model, x.to(options.precision), nfe, cond, shift, ends, teacher.std)
                        rows.append(here | {"solver": name} | found)
                    show(rows, here)
                if options.json:  # what there is, should the run be cut off
                    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def outcome(
    run: Run, model: Any, x: Tensor, nfe: int, cond: Any, shift: float, ends: Tensor, std: float
) -> dict[str, Any]:
    counted = Counted(model)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            away = (run(counted, x, nfe, cond, shift).double() - ends).square().mean(1)
    except Exception as error:  # a peer that breaks is a result
        return {"error": f"{type(error).__name__}: {error}"[:120]}
    rms, median = float(away.mean().sqrt()) / std, float(away.sqrt().median()) / std
    return {"rms": rms, "median": median, "calls": counted.calls} if math.isfinite(rms) else {"error": "not finite"}


KEY = ("problem", "path", "guidance", "shift", "nfe")


def cells(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The finite rows of each cell, best first."""
    made: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        made.setdefault(tuple(row[k] for k in KEY), []).append(row)
    return {k: sorted((r for r in found if "rms" in r), key=lambda r: r["rms"]) for k, found in made.items()}


def bar_of(key: tuple[Any, ...]) -> float | None:
    problem, path, scale, shift, nfe = key
    held = (problem, path) in BARS and scale == shift == 1 and nfe in NFES
    return BARS[problem, path][NFES.index(nfe)] if held else None


def show(rows: list[dict[str, Any]], here: dict[str, Any]) -> None:
    key = tuple(here[k] for k in KEY)
    found, bar = cells([r for r in rows if all(r[k] == v for k, v in here.items())])[key], bar_of(key)
    problem, path, scale, shift, nfe = key
    text = f"{problem:7}{path:7} guidance {scale:g} shift {shift:g} calls {nfe:3}"
    for label, row in (
        ("ours", next((r for r in found if r["solver"] == OURS), None)),
        ("best peer", next((r for r in found if not r["solver"].startswith("fewstep")), None)),
    ):
        if row:
            text += f"  {label} {row['rms']:.4f} (median {row['median']:.4f})" + (
                f" {row['solver']}" if row["solver"] != OURS else ""
            )
    print(text + (f"  bar {bar:.4f}" if bar else ""), flush=True)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The recommended default beside the best peer of each cell, each peer alone, and itself with fewer calls."""
    ratios: dict[str, list[float]] = {}
    single: dict[str, list[float]] = {}
    falls: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for key, found in cells(rows).items():
        ours = next((r["rms"] for r in found if r["solver"] == OURS), None)
        if ours is None:
            continue
        falls.setdefault(key[:4], []).append((key[4], ours))
        peers = [r for r in found if not r["solver"].startswith("fewstep")]
        kind = "plain" if key[2] == key[3] == 1 else "guided or shifted"
        if peers:
            for name in ("best peer of the cell", f"best peer of the cell, {kind}"):
                ratios.setdefault(name, []).append(ours / peers[0]["rms"])
            median = next(r["median"] for r in found if r["solver"] == OURS)
            ratios.setdefault("least median of a peer, our median", []).append(median / min(r["median"] for r in peers))
        theirs = [r for r in peers if r["solver"].startswith("diffusers")]
        if theirs:
            ratios.setdefault("best of diffusers", []).append(ours / theirs[0]["rms"])
        if (bar := bar_of(key)) is not None:
            ratios.setdefault("bar", []).append(ours / bar)
        for r in peers:
            single.setdefault(r["solver"], []).append(r["rms"] / ours)
    made = {}
    for name, found in ratios.items():
        made[f"ours / {name}, geometric mean of {len(found)} cells"] = statistics.geometric_mean(found)
        made[f"ours / {name}, worst"] = max(found)
    if single:
        means = {name: statistics.geometric_mean(v) for name, v in single.items()}
        least = min(means, key=lambda name: means[name])
        made[f"best single peer / ours, geometric mean over its cells ({least})"] = means[least]
    rises = [b[1] / a[1] for line in falls.values() for a, b in itertools.pairwise(sorted(line))]
    if rises:
        made["largest growth of our error from one number of calls to the next (below 1: it always falls)"] = max(rises)
    return made


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]] = {}
    for key, found in cells(rows).items():
        for r in found:
            lines.setdefault(key[:4], {}).setdefault(r["solver"], []).append((key[4], r["rms"]))
    wide = min(4, len(lines))
    high = math.ceil(len(lines) / wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(3.2 * wide, 2.7 * high), squeeze=False, sharex=True)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    for axis, ((problem, path, scale, shift), solvers) in zip(axes.flat, lines.items(), strict=False):
        for name, points in solvers.items():
            look: dict[str, Any] = {"color": "0.75", "lw": 0.7, "zorder": 1}
            if name == OURS:
                look = {"color": "C3", "lw": 2.2, "zorder": 3}
            axis.loglog(*zip(*sorted(points), strict=True), **look)
        notes = [f"guidance {scale:g}"] * (scale != 1) + [f"shift {shift:g}"] * (shift != 1)
        axis.set_title(", ".join([problem, path, *notes]), fontsize=9)
        ours = [v for _, v in solvers.get(OURS, [])]
        if ours:
            axis.set_ylim(min(ours) / 3, 3)
        axis.set_xticks(sorted({n for points in solvers.values() for n, _ in points}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("error / data std", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("calls", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=72)


def matrix(nfes: list[int]) -> list[str]:
    """Every solver and the default x path x grid x calls x precision: what is not finite, and what is refused."""
    bad, refused, count = [], set(), 0
    for path in PATHS:
        teacher = teacher_named("ring", path_named(path))
        x, _ = teacher.starts(4, 0)

        def run(label: str, times: Any, solver: Any, teacher: Teacher = teacher, x: Tensor = x) -> None:
            nonlocal count
            for dtype in (torch.float32, torch.bfloat16):
                ends = sample(teacher, x.to(dtype), times, solver, rng=torch.Generator().manual_seed(0))
                count += 1
                if not ends.isfinite().all() or ends.dtype != dtype:
                    bad.append(f"{label} {dtype}")

        for nfe in nfes:
            run(f"recommended {path} {nfe}", recommended(teacher.path, nfe), None)
            for entry, kind in itertools.product(SOLVERS, GRIDS):
                solver = solver_named(entry.name)
                try:
                    steps = steps_of(solver, nfe)
                except Refused as error:
                    refused.add(str(error))
                else:
                    run(f"{entry.name} {path} {kind} {nfe}", grid(teacher.path, steps, kind), solver)
    print(f"{count} combinations, {len(bad)} not finite", *bad[:20], sep="\n")
    print(f"{len(refused)} pairs of solver and calls refused:", "; ".join(sorted(refused)[:8]), "...")
    return bad


def overhead(rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds and operators of a step of each multistep solver, over bare Euler timed beside it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    path, x = Exploding(), torch.randn(16, 4, 64, 64)
    guess = torch.randn_like(x)
    times = tuple(grid(path, 20).tolist())

    class Free:
        path = Exploding()

        def __call__(self, x: Tensor, t: Any, cond: Any = None, want: str = "x0") -> Tensor:
            return guess

    def bare() -> None:  # k-diffusion's Euler, as peers were measured: slope by division, then a step
        y = x
        for t, s in zip(times[:-1], times[1:], strict=True):
            y = y + (y - guess) / t * (s - t)

    plan = recommended(path, 20)
    named = [solver_named(e.name) for e in SOLVERS if not e.thing.stochastic and e.thing.steps_for(20) == 20]
    for solver in (plan.solver(), *named):
        times = plan.times(path) if solver.name == "plan" else tuple(grid(path, 20).tolist())

        def ours(solver: Any = solver, times: tuple[float, ...] = times) -> None:
            state, y = solver.init(path, times), x
            for i in range(20):
                y, state = solver.step(Free(), y, i, state, None, None)

        ours()
        ratios = []
        for _ in range(rounds):
            taken = []
            for work in (ours, bare):
                began = time.process_time()
                work()
                taken.append(time.process_time() - began)
            ratios.append(taken[0] / taken[1])
        state, y = solver.init(path, times), x
        with Operators() as seen:
            for i in range(20):
                y, state = solver.step(Free(), y, i, state, None, None)
        row = {"solver": solver.name, "ratio": statistics.median(ratios), "operators": seen.count / 20}
        print(f"{solver.name:15} {row['ratio']:.2f} x bare Euler, {row['operators']:.1f} operators a step", flush=True)
        yield row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: the ring on one path, 16 starts")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(NFES))
    parser.add_argument("--starts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1, help="of the starts; the default was chosen on seed 0")
    parser.add_argument("--fine", type=int, default=300, help="steps of the reference")
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0], help="scales; 5 for the guided cells")
    parser.add_argument("--shift", nargs="+", type=float, default=[1.0], help="of the peers' flow grids; 3 as in SD3")
    parser.add_argument("--single", dest="precision", action="store_const", const=torch.float32, default=torch.float64)
    parser.add_argument(
        "--peers", type=Path, help="a JSON of an earlier run on the same starts: measure ours alone anew"
    )
    parser.add_argument("--all", action="store_true", help="our named solvers on plain grids too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.matrix:
        return 1 if matrix([1, 5] if options.quick else list(range(1, 51))) else 0
    if options.overhead:
        rows = list(overhead(3 if options.quick else 15))
    else:
        if options.quick:
            options.problems, options.paths, options.nfe, options.starts, options.fine = ["ring"], ["edm"], [5], 16, 60
        rows = measure(options)
        for name, value in summary(rows).items():
            print(f"{name}: {value:.3f}")
        if options.plot:
            plot(rows, options.plot)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
