"""What a diffusers scheduler's configuration says beyond its path: levels, shift, limits and the nearest sampler."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Clipped, Denoiser, Thresholded
from ..errors import Refused, need
from ..grid import descending
from ..path import Exploding, Straight
from ..registry import nearest
from .schedules import Schedule, read_schedule
from .watching import line_of

SOLVERS: dict[str, str] = {
    "DDIMScheduler": "euler",
    "DDIMParallelScheduler": "euler",
    "CogVideoXDDIMScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "EDMEulerScheduler": "euler",
    "DDPMScheduler": "ancestral",
    "DDPMParallelScheduler": "ancestral",
    "EulerAncestralDiscreteScheduler": "ancestral",
    "KDPM2AncestralDiscreteScheduler": "ancestral",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "midpoint",
    "DPMSolverSinglestepScheduler": "dpm2s",
    "DPMSolverMultistepScheduler": "dpm2m",
    "EDMDPMSolverMultistepScheduler": "dpm2m",
    "CogVideoXDPMScheduler": "dpm2m_sde",
    "UniPCMultistepScheduler": "unipc2",
    "DEISMultistepScheduler": "deis_log",
    "LMSDiscreteScheduler": "deis_rho",
    "PNDMScheduler": "ipndm",
    "SASolverScheduler": "sa",
    "LCMScheduler": "consistency",
    "TCDScheduler": "consistency",
    "FlowMatchLCMScheduler": "consistency",
    "CMStochasticIterativeScheduler": "consistency",
}
"""The schedulers that are read, and the sampler of ours that does what each does."""
# these spend calls between their levels or twice on one; the levels themselves are those of a sibling
LEVELS_OF = {
    "PNDMScheduler": "DDIMScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerDiscreteScheduler",
}


@dataclass(frozen=True)
class Reading:
    """A scheduler's configuration as ours.

    ``schedule``: path, prediction, clock. ``solver``: the name of the nearest sampler. ``stock``: the scheduler itself,
    which spaces its levels; nothing else of it runs.
    """

    schedule: Schedule
    solver: str
    stock: Any = field(repr=False)

    @property
    def distilled(self) -> bool:
        """Whether it is for networks that jump to clean data (consistency models and their kin), not for denoisers."""
        return self.solver == "consistency"

    @property
    def ratios(self) -> bool:
        """Whether the scheduler's sigmas are sigma / alpha (on a table), not the path's own sigma."""
        return not isinstance(self.schedule.path, (Exploding, Straight))

    @property
    def takes_sigmas(self) -> bool:
        """Whether the scheduler shifts a list of sigmas as it does its own."""
        return self._flow and "sigmas" in _arguments(self.stock)

    def times(
        self,
        steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> tuple[float, ...]:
        """The scheduler's own levels as descending times on the path, to clean data.

        ``steps`` of its own spacing, shift included, once; or a list of ``sigmas`` (shifted where the scheduler shifts
        lists), or of ``timesteps``, taken as they are. ``mu`` is the dynamic shift of a flow. Only a configuration
        with ``final_sigmas_type = "sigma_min"`` ends above clean data. Refused where the levels do not fall.
        """
        end = self.schedule.path.t_min
        if timesteps is not None:
            levels = self.time_of(torch.as_tensor(timesteps, dtype=torch.float64))
        elif sigmas is not None and not self.takes_sigmas:
            levels = self._from_sigmas(torch.as_tensor(sigmas, dtype=torch.float64))
        else:
            levels, end = self._own(steps, sigmas, mu)
        values = torch.unique_consecutive(levels[levels > end]).tolist()
        if steps is not None and len(values) != steps:
            raise Refused(
                f"{self.schedule.name} has {len(values)} levels for {steps} steps: pass fewer, or name a grid"
            )
        try:
            return tuple(descending([*values, end]).tolist())
        except ValueError as error:
            raise Refused(f"{self.schedule.name}: {error}") from None

    def shift(self, mu: float | None = None) -> float:
        """The factor by which a flow's levels are moved to more noise: 1 where none is; see ``grid.shifted``."""
        if not self._dynamic(mu):
            return self.schedule.shift if self._flow else 1.0
        assert mu is not None
        return mu if self.stock.config.get("time_shift_type") == "linear" else math.exp(mu)

    def time_of(self, clock: Tensor) -> Tensor:
        """The time at which the network reads ``clock``: the inverse of ``clock_of``, in float64."""
        path, value = self.schedule.path, clock.to("cpu", torch.float64)
        match self.schedule.clock:
            case "index":
                t = (value + 1) / len(path.alphas_cumprod)  # type: ignore[attr-defined]
            case "1000t":
                t = value / 1000
            case "log_sigma/4":
                t = path.time(-4 * value)
            case _:
                t = path.time(-value / 250)
        return t.clamp(path.t_min, path.t_max)

    def limited(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser with the limits that the scheduler holds its guesses to: thresholding, clipping, or none."""
        config = self.stock.config
        if config.get("thresholding"):
            quantile, most = (float(config[k]) for k in ("dynamic_thresholding_ratio", "sample_max_value"))
            return Thresholded(denoiser, quantile, most=max(1.0, most))
        return denoiser if self.schedule.clip is None else Clipped(denoiser, *self.schedule.clip)

    @property
    def _flow(self) -> bool:
        return isinstance(self.schedule.path, Straight)

    def _dynamic(self, mu: float | None) -> bool:
        """Whether the shift is by ``mu``; Refused where it is missing, or means nothing."""
        if mu is not None and not self._flow:
            raise Refused(
                f"the pipeline gives mu, the shift of a flow, and {self.schedule.name} describes none: "
                "FewstepScheduler.from_config(pipe.scheduler.config) keeps the pipeline's own"
            )
        dynamic = bool(self.stock.config.get("use_dynamic_shifting"))
        if dynamic and mu is None:
            raise Refused(
                "use_dynamic_shifting needs mu, and none was given: pass mu, or "
                "FewstepScheduler.from_config(config, use_dynamic_shifting=False, shift=3.0)"
            )
        return dynamic

    def _own(self, steps: int | None, sigmas: Sequence[float] | None, mu: float | None) -> tuple[Tensor, float]:
        """The levels of the scheduler's own spacing, and where it ends."""
        stock, end = self._set(steps, sigmas, mu), self.schedule.path.t_min
        if getattr(stock, "sigmas", None) is None:
            return self.time_of(torch.as_tensor(stock.timesteps, dtype=torch.float64)), end
        ends = self._from_sigmas(torch.as_tensor(stock.sigmas, dtype=torch.float64))
        if stock.config.get("final_sigmas_type") != "sigma_min":
            return ends[:-1], end
        if steps is not None and ends[-2] <= ends[-1] * (1 + 1e-6):  # its last call would move nothing
            stock = self._set(steps + 1, None, mu)
            ends = self._from_sigmas(torch.as_tensor(stock.sigmas, dtype=torch.float64))[:-1]
        return ends[:-1], float(ends[-1])

    def _set(self, steps: int | None, sigmas: Sequence[float] | None, mu: float | None) -> Any:
        """A copy of the stock scheduler (or of the sibling with its levels) that has set its levels."""
        kind = LEVELS_OF.get(self.schedule.name)
        stock = copy.deepcopy(self.stock) if kind is None else _built(kind, dict(self.stock.config))
        given: dict[str, Any] = {} if sigmas is None else {"sigmas": [float(s) for s in sigmas]}
        if self._dynamic(mu) and "mu" in _arguments(stock):
            given["mu"] = mu
        try:
            stock.set_timesteps(num_inference_steps=steps if steps is not None else len(sigmas or ()), **given)
        except (ValueError, TypeError, AssertionError, IndexError, RuntimeError) as error:
            raise Refused(f"{self.schedule.name} does not space {steps} steps: {line_of(error)}") from None
        return stock

    def _from_sigmas(self, sigmas: Tensor) -> Tensor:
        """Times of a scheduler's sigmas: sigma / alpha on a table, sigma itself on the exploding and straight paths."""
        path = self.schedule.path
        if not self.ratios:
            return sigmas.clamp(path.t_min, path.t_max)
        return torch.where(sigmas > 0, path.time(-torch.log(sigmas.clamp(min=1e-30))), path.t_min)


def read_config(config: Mapping[str, Any]) -> Reading:
    """Read the configuration of a diffusers scheduler: its path, prediction, clock, levels, shift, limits and sampler.

    ``config`` is ``pipe.scheduler.config`` or a saved ``scheduler_config.json``; one that a ``FewstepScheduler`` keeps
    is read as the one that it replaced. The path has the configuration's betas, rescaling included.
    Refused, by name: a scheduler or a setting that is not known, and what cannot be honoured.

    >>> reading = read_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    >>> reading.solver, reading.shift(), [round(t, 3) for t in reading.times(sigmas=[1.0, 0.5])]
    ('euler', 3.0, [1.0, 0.75, 0.0])
    """
    name = config.get("replaces") or config.get("_class_name") or _class_of(config)
    if name not in SOLVERS:
        raise Refused(f"the scheduler {name} is not read: {nearest(str(name), list(SOLVERS))}")
    _hold_known(name, config)
    stock = _built(name, config)
    return Reading(read_schedule(stock), _solver_of(name, stock.config), stock)


def _built(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler from those settings that it knows itself."""
    kind = getattr(need("diffusers", "diffusers"), name)
    wanted = inspect.signature(kind.__init__).parameters
    try:
        return kind(**{k: v for k, v in config.items() if k in wanted})
    except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError) as error:
        raise Refused(f"{name} does not take its configuration: {line_of(error)}") from None


def _arguments(stock: Any) -> set[str]:
    return set(inspect.signature(stock.set_timesteps).parameters)


def _settings(name: str) -> set[str]:
    kind = getattr(need("diffusers", "diffusers"), name)
    return set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}


def _hold_known(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a setting that no scheduler has; one of another scheduler is what an earlier one left behind."""
    own = _settings(name)
    strange = [k for k in config if not k.startswith("_") and k not in own and k not in ("replaces", *OWN)]
    if not strange:
        return
    others = set().union(*(_settings(other) for other in SOLVERS))
    for key in strange:
        if key not in others:
            raise Refused(f"{name} has no setting {key!r}: {nearest(key, sorted(own))}")


def _class_of(config: Mapping[str, Any]) -> str:
    """The scheduler of a configuration that does not name it: the one with exactly its settings."""
    keys = {k for k in config if not k.startswith("_") and k not in ("replaces", *OWN)}
    for name in SOLVERS:
        if _settings(name) == keys:
            return name
    raise Refused(
        "this configuration does not say of which scheduler it is: add its '_class_name', such as "
        "'DDIMScheduler' or 'FlowMatchEulerDiscreteScheduler'"
    )


OWN = ("solver", "grid", "plan")
"""The settings of ``FewstepScheduler`` itself."""


def _solver_of(name: str, config: Mapping[str, Any]) -> str:
    solver, order = SOLVERS[name], int(config.get("solver_order") or 2)
    kind = str(config.get("algorithm_type", ""))
    if config.get("stochastic_sampling"):
        return "consistency"
    if solver == "dpm2m":
        third = "3m" if order == 3 else "2m"
        if kind.startswith("sde"):
            return "ancestral" if order == 1 else f"dpm{third}_sde"
        if kind == "dpmsolver":
            return "euler" if order == 1 else "deis_log"
        return "euler" if order == 1 else f"dpm{third}"
    if solver == "unipc2":
        return f"unipc{min(3, max(2, order))}" + ("_bh1" if config.get("solver_type") == "bh1" else "")
    return solver


__all__ = ["SOLVERS", "Reading", "read_config"]
