"""What a diffusers scheduler says about a network: its path, its prediction and its clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..denoiser import Wrapped
from ..errors import Refused
from ..path import Exploding, Path, Straight, Tabulated

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
EDM = {"epsilon": "edm", "v_prediction": "edm_v"}


@dataclass(frozen=True)
class Schedule:
    """A scheduler's facts: arguments of ``Wrapped``, and what it does to its guesses.

    ``clip`` is the range that the scheduler itself holds guesses of x0 to; ``shift`` moves a flow grid.
    """

    name: str
    path: Path
    prediction: str
    clock: str
    scale_input: bool = False
    data_std: float = 1.0
    boundary: float = 0.002
    clip: tuple[float, float] | None = None
    shift: float = 1.0

    def wrap(self, net: torch.nn.Module, path: Path | None = None) -> Wrapped:
        """The network as a denoiser, on this schedule's path or another of the same kind."""
        return Wrapped(
            net,
            path or self.path,
            self.prediction,
            self.clock,
            scale_input=self.scale_input,
            data_std=self.data_std,
            boundary=self.boundary,
        )


def read_schedule(scheduler: Any) -> Schedule:
    """The facts of a scheduler object of diffusers; Refused, with the reason, where it has no path we know.

    Tables of ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, Euler, LCM, ...): the network reads the index and sees the
    variance-preserving sample, whatever frame the scheduler works in. Flow matching: straight, 1000 t.
    Consistency models, EDM and Euler with continuous time steps: exploding, with their preconditioning.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name == "CMStochasticIterativeScheduler":
        return Schedule(
            name,
            Exploding(sigma_min=config.sigma_min, sigma_max=config.sigma_max),
            "cm",
            "250 log_sigma",
            scale_input=True,
            data_std=config.sigma_data,
            boundary=config.sigma_min,
            clip=(-1.0, 1.0) if config.clip_denoised else None,
        )
    if name.startswith("EDM"):
        path: Path = Exploding(sigma_min=config.sigma_min, sigma_max=config.sigma_max)
        if config.prediction_type not in EDM:
            raise Refused(f"{name} has prediction type {config.prediction_type!r}; read are {', '.join(EDM)}")
        prediction = EDM[config.prediction_type]
        return Schedule(name, path, prediction, "log_sigma/4", scale_input=True, data_std=config.sigma_data)
    kind = config.get("prediction_type", "epsilon")
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":  # Stable Video Diffusion
        low, high = (config.get(end) for end in ("sigma_min", "sigma_max"))
        if low is None or high is None:
            raise Refused(f"{name} with timestep_type 'continuous' is read with its sigma_min and sigma_max: name both")
        path = Exploding(sigma_min=low, sigma_max=high)
        return Schedule(name, path, "edm_v", "log_sigma/4", scale_input=True)
    if name.startswith("FlowM") or kind == "flow_prediction" or config.get("use_flow_sigmas"):
        if config.get("invert_sigmas"):
            raise Refused(f"{name} with invert_sigmas is not read")
        if config.num_train_timesteps != 1000:
            raise Refused(f"{name} counts {config.num_train_timesteps} time steps; networks are read on 1000 t")
        prediction = "velocity" if name.startswith("FlowM") else {"flow_prediction": "velocity", **PREDICTIONS}[kind]
        shift = float(config.get("shift", config.get("flow_shift", 1.0)))  # the table's schedulers call it flow_shift
        return Schedule(name, Straight(), prediction, "1000t", shift=shift)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise Refused(
            f"{name} has neither a table of alphas_cumprod nor a flow: teachers use a DDPM-like, "
            "flow-matching, consistency or EDM scheduler"
        )
    if kind not in PREDICTIONS:
        raise Refused(f"{name} has prediction type {kind!r}; read are {', '.join(PREDICTIONS)}")
    values = torch.as_tensor(table, dtype=torch.float64)
    if not torch.isfinite(values).all() or (values[1:] > values[:-1]).any() or values.min() < 0 or values.max() > 1:
        raise Refused(f"{name}: alphas_cumprod must fall from 1 to 0; its betas are not valid")
    path = Tabulated(alphas_cumprod=tuple(values.tolist()))
    width = float(config.get("clip_sample_range", 1.0))
    return Schedule(name, path, PREDICTIONS[kind], "index", clip=(-width, width) if config.get("clip_sample") else None)
