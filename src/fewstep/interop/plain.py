"""How stock diffusers runs a student: which pipeline, which scheduler, which arguments.

Each step count of a student must be taken by a stock pair of pipeline and scheduler. Times that a scheduler
holds on its own grid are moved to the nearest of its own (by at most one part in ten thousand, or one index of
a table), and the student that ships is the moved one, so that what is measured is what is shipped.

| student | pipeline and scheduler |
|---|---|
| consistency function on the exploding path | ConsistencyModelPipeline, CMStochasticIterativeScheduler |
| noise, v or clean image on a table | the teacher's, DDIMScheduler (LCMScheduler where steps renoise) |
| velocity of a straight path, no labels | DDPMPipeline or the teacher's, FlowMatchEulerDiscreteScheduler |
| any other one-step U-Net | scales folded into its first and last convolution, then as the first row |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..denoiser import PRECONDITIONED, Centred, Wrapped, clock_of
from ..errors import Refused
from ..nets import UNet
from ..path import Exploding, Path, Straight, Tabulated, VariancePreserving
from ..student import Student

TOLERANCE = 1e-4  # how far a level may move, as a share of itself, to stand on a scheduler's grid
BOUNDARY = 0.002
SLOW = ("t", "log_sigma/4")  # clocks that do not survive 250 ln sigma in float32
UNIT = 5e-3  # how far a table's own start may stand from unit noise: Stable Diffusion's is 0.9977


@dataclass(frozen=True)
class Plain:
    """A student as stock diffusers sees it.

    ``student`` has the times that the scheduler can hold; ``calls`` are the pipeline's arguments for each
    step count, None where it cannot take them; ``notes`` say what was changed on the way.
    """

    pipeline: str
    scheduler: str
    config: dict[str, Any]
    student: Student
    calls: dict[int, dict[str, Any] | None]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What the plan depends on besides the student: the teacher's pipeline, and whether there are labels.

    ``scheduler``: the teacher's configuration, where it describes the student's path. ``accepts``: the arguments that
    the pipeline takes; ``always``: those of every call, such as guidance that is off and the size of a sample.
    """

    labels: bool
    pipeline: str | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    accepts: frozenset[str] = frozenset()
    always: dict[str, Any] = field(default_factory=dict)


def wrapped(student: Student) -> Wrapped:
    """The student's wrapped network; Refused where something else than ``Centred`` stands around it."""
    around: Any = student.denoiser
    one = around.inner if isinstance(around, Centred) else around
    if not isinstance(one, Wrapped):
        raise Refused(f"only a wrapped network can be saved, this student holds {type(one).__name__}")
    return one


def stock_noise(student: Student) -> None:
    """Refused for a student whose noise lies around a part of its condition."""
    if isinstance(student.denoiser, Centred):
        raise Refused(
            f"its noise lies around the condition's {student.denoiser.key!r}, which no stock sampler knows of: "
            "load it with fewstep, or run its model.pt2"
        )


def plan(student: Student, setting: Setting) -> Plain:
    """The stock pair that runs this student; Refused, with every reason, where there is none."""
    stock_noise(student)
    reasons = []
    for way in (_consistency, _table, _flow, _edm, _folded):
        try:
            return way(student, setting)
        except Refused as error:
            reasons.append(str(error))
    raise Refused("plain diffusers cannot run this student: " + "; ".join(reasons))


# -- consistency functions --------------------------------------------------------------------------


def _consistency(student: Student, setting: Setting) -> Plain:
    one = wrapped(student)
    if one.prediction != "cm" or one.clock != "250 log_sigma" or not one.scale_input:
        raise Refused(f"prediction {one.prediction!r} on clock {one.clock!r} is no consistency function")
    if setting.pipeline not in (None, "ConsistencyModelPipeline"):
        raise Refused(f"{setting.pipeline} does not run consistency functions")
    if abs(student.start_scale / student.start - 1) > 1e-6:
        raise Refused(f"the scheduler begins at sigma * noise, this student at {student.start_scale:g} * noise")
    if not student.start > one.boundary:
        raise Refused(f"the start {student.start:g} lies below the boundary {one.boundary:g}")
    several = {n: times for n, times in student.steps.items() if n > 1 and student.policy == "renoise"}
    notes = []
    if student.policy == "ode" and any(n > 1 for n in student.steps):
        notes.append("the stock scheduler renoises between steps, so only one step runs there")
    inner = sorted({t for times in several.values() for t in times[1:]}, reverse=True)
    count, rho = karras_grid(student.start, one.boundary, inner)
    steps = dict(student.steps)
    calls: dict[int, dict[str, Any] | None] = dict.fromkeys(steps)
    if 1 in steps:
        calls[1] = {"num_inference_steps": 1}
    for n, times in several.items():
        index = [_karras_index(t, student.start, one.boundary, count, rho) for t in times]
        if len(set(index)) < n:
            notes.append(f"{n} steps stand too close together for the scheduler's grid")
            continue
        steps[n] = tuple(_karras_sigma(i, student.start, one.boundary, count, rho) for i in index)
        if index == [i * (count // n) for i in range(n)]:
            calls[n] = {"num_inference_steps": n}
        else:
            calls[n] = {"num_inference_steps": None, "timesteps": index[::-1]}
    config = {
        "num_train_timesteps": count,
        "sigma_min": one.boundary,
        "sigma_max": student.start,
        "sigma_data": one.data_std,
        "s_noise": 1.0,
        "rho": rho,
        "clip_denoised": False,
    }
    moved = _with(student, steps)
    return Plain("ConsistencyModelPipeline", "CMStochasticIterativeScheduler", config, moved, calls, tuple(notes))


def karras_grid(top: float, bottom: float, inner: Sequence[float]) -> tuple[int, float]:
    """(points, rho) of a power grid from ``top`` to ``bottom`` on which the inner levels stand.

    One inner level: three points and the rho that puts the middle one there, so that two steps need no
    list of indices. More: rho = 7 and the least number of points that holds each to TOLERANCE.
    """
    if not inner:
        return 40, 7.0
    if len(inner) == 1:
        low, high = 0.2, 1e4  # the middle falls from 0.87 top to the geometric mean as rho grows
        if _middle(top, bottom, high) < inner[0] < _middle(top, bottom, low):
            for _ in range(200):
                rho = math.sqrt(low * high)
                low, high = (rho, high) if _middle(top, bottom, rho) > inner[0] else (low, rho)
            return 3, math.sqrt(low * high)
    rho = 7.0
    ends = top ** (1 / rho), bottom ** (1 / rho)
    ramp = np.array([(ends[0] - s ** (1 / rho)) / (ends[0] - ends[1]) for s in inner])
    points = np.arange(len(inner) + 2, 20_002)
    held = np.round(ramp[None] * (points[:, None] - 1)) / (points[:, None] - 1)
    sigma = (ends[0] + held * (ends[1] - ends[0])) ** rho
    worst = np.abs(sigma / np.array(inner)[None] - 1).max(1)
    good = np.flatnonzero(worst < TOLERANCE)
    return int(points[good[0] if len(good) else int(worst.argmin())]), rho


def _middle(top: float, bottom: float, rho: float) -> float:
    return float(((top ** (1 / rho) + bottom ** (1 / rho)) / 2) ** rho)


def _karras_index(sigma: float, top: float, bottom: float, count: int, rho: float) -> int:
    ends = top ** (1 / rho), bottom ** (1 / rho)
    return round((ends[0] - sigma ** (1 / rho)) / (ends[0] - ends[1]) * (count - 1))


def _karras_sigma(index: int, top: float, bottom: float, count: int, rho: float) -> float:
    if index == 0:
        return top
    ends = top ** (1 / rho), bottom ** (1 / rho)
    return float((ends[0] + index / (count - 1) * (ends[1] - ends[0])) ** rho)


# -- tables of alphas -------------------------------------------------------------------------------

LABELLED = "ConsistencyModelPipeline"  # the one pixel pipeline that takes labels
KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def _table(student: Student, setting: Setting) -> Plain:
    one = wrapped(student)
    if one.prediction not in KINDS or not isinstance(one.path, (Tabulated, VariancePreserving)) or one.scale_input:
        raise Refused(f"prediction {one.prediction!r} on the {_kind(one.path)} path stands on no table")
    if one.clock not in ("index", "999t", "1000t"):
        raise Refused(f"clock {one.clock!r} counts no table")
    top = float(clock_of(one.clock, one.path, torch.tensor(student.start, dtype=torch.float64)))
    count = round(top) + 1
    if count < 2 or abs(top - (count - 1)) > 1e-3:
        raise Refused(f"the start stands at {top:g} of the table, between its entries")
    if abs(student.start_scale - 1) > UNIT:
        raise Refused(f"stock pipelines begin with unit noise, this student with {student.start_scale:g} * noise")
    notes = []
    if abs(student.start_scale - 1) > 1e-9:
        notes.append(f"starts at unit noise, as stock pipelines do (trained at {student.start_scale:.6g})")
    renoise = student.policy == "renoise" and any(n > 1 for n in student.steps)
    steps: dict[int, tuple[float, ...]] = {}
    calls: dict[int, dict[str, Any] | None] = {}
    listed = False
    for n, times in student.steps.items():
        index = [float(clock_of(one.clock, one.path, torch.tensor(t, dtype=torch.float64))) for t in times]
        if renoise:
            grid = [count - 1 - math.floor(i) for i in np.linspace(0, count, num=n, endpoint=False)]
        else:
            grid = [round(i) - 1 for i in np.arange(count, 0, -count / n)]
        fits = (renoise or count % n == 0) and len(grid) == n
        near = [round(i) for i in index]
        if fits and all(abs(a - b) <= 1 for a, b in zip(index, grid, strict=True)):
            steps[n] = (student.start, *(_time_at(one, i) for i in grid[1:]))
            calls[n] = {"num_inference_steps": n}
        elif "timesteps" in setting.accepts and len(set(near)) == n:
            steps[n] = (student.start, *(_time_at(one, i) for i in near[1:]))
            calls[n], listed = {"timesteps": near}, True
        else:
            steps[n], calls[n] = times, None
            notes.append(f"{n} steps at table entries {[round(i, 2) for i in index]} are not the scheduler's {grid}")
    if listed and not renoise:  # DDIM takes no list of entries, its like in the other frame does
        for n in calls:
            entries = [round(float(clock_of(one.clock, one.path, torch.tensor(t)))) for t in steps[n]]
            calls[n] = {"timesteps": entries} if calls[n] is not None else None
    calls = {n: None if call is None else call | setting.always for n, call in calls.items()}
    config = dict(setting.scheduler)
    betas = _betas(one, count)
    if not (config and len(betas) == config.get("num_train_timesteps") and isinstance(one.path, Tabulated)):
        config = {"num_train_timesteps": count, "trained_betas": betas}
    config |= {
        "prediction_type": KINDS[one.prediction],
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "steps_offset": config.get("steps_offset", 0),  # not read with this spacing; pipelines warn of another
        "timestep_spacing": "trailing",
    }
    name = "DDIMScheduler"
    if listed and not renoise:
        name = "EulerDiscreteScheduler"
        config |= {"timestep_spacing": "leading", "final_sigmas_type": "zero"}  # leading: unit noise at the start
        config |= {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    if renoise:  # boundary scalings off: c_skip -> 0, c_out -> 1
        name = "LCMScheduler"
        config |= {"original_inference_steps": count, "timestep_scaling": 1e6}
    pipeline = setting.pipeline or ("ConsistencyModelPipeline" if setting.labels else "DDIMPipeline")
    if renoise and pipeline == "DDIMPipeline":
        pipeline = "DDPMPipeline"  # DDIMPipeline turns any scheduler into DDIM
    moved = _with(student, steps, start_scale=1.0)
    return Plain(pipeline, name, config, moved, calls, tuple(notes))


def _time_at(one: Wrapped, index: float) -> float:
    """The time that the clock shows as an entry of the table."""
    table = getattr(one.path, "alphas_cumprod", None)
    match one.clock:
        case "index":
            return (index + 1) / (len(table) if table is not None else 1000)
        case "999t":
            return index / 999
    return index / 1000


def _betas(one: Wrapped, count: int) -> list[float]:
    times = torch.tensor([_time_at(one, i) for i in range(count)], dtype=torch.float64)
    product = one.path.coefs(times).alpha ** 2
    if isinstance(one.path, Tabulated) and one.clock == "index":
        product = torch.tensor(one.path.alphas_cumprod[:count], dtype=torch.float64)
    before = torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])
    return (1 - product / before).clamp(0, 1).tolist()


# -- flows ------------------------------------------------------------------------------------------


def _flow(student: Student, setting: Setting) -> Plain:
    one = wrapped(student)
    if one.prediction not in ("velocity", "flow") or not isinstance(one.path, Straight) or one.clock != "1000t":
        raise Refused(f"prediction {one.prediction!r}, {_kind(one.path)} path, clock {one.clock!r}: no stock flow")
    if one.scale_input or abs(student.start - 1) > 1e-9 or abs(student.start_scale - 1) > 1e-9:
        raise Refused("a stock flow begins with unit noise at time 1")
    pixels = setting.pipeline in (None, "DDPMPipeline")
    if (pixels and setting.labels and setting.pipeline is None) or setting.pipeline in ("DDIMPipeline", LABELLED):
        raise Refused(f"{setting.pipeline or LABELLED} does not run the flow-matching scheduler")
    pipeline, several = setting.pipeline or "DDPMPipeline", {n: t for n, t in student.steps.items() if n > 1}
    renoise = student.policy == "renoise" and bool(several)
    name, steps, notes = "FlowMatchEulerDiscreteScheduler", dict(student.steps), []
    config: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}
    if renoise:
        config["stochastic_sampling"] = True
    calls: dict[int, dict[str, Any] | None] = dict.fromkeys(steps)
    if "sigmas" in setting.accepts:
        for n, times in steps.items():
            calls[n] = {"num_inference_steps": n, "sigmas": [float(t) for t in times]}
    else:
        calls = {n: {"num_inference_steps": n} if n == 1 else None for n in steps}
        if set(several) <= {2}:
            if several and (pixels and student.policy == "ode" or not pixels):
                config["shift"], calls[2] = _two_steps(steps[2][1]), {"num_inference_steps": 2}
        elif not renoise and not pixels:
            name, config = "FlowMapEulerDiscreteScheduler", {"num_train_timesteps": 1000}
            config["shift"], held = _one_shift(several)
            for n, times in held.items():
                steps[n], calls[n] = (student.start, *times[1:]), {"num_inference_steps": n}
    for n in steps:
        if calls[n] is None:
            notes.append(f"{n} steps of this student are not on the stock scheduler's grid")
    calls = {n: None if call is None else call | setting.always for n, call in calls.items()}
    return Plain(pipeline, name, config, _with(student, steps), calls, tuple(notes))


def _two_steps(inner: float) -> float:
    """The shift that puts the second of two stock steps at a time.

    Two stock steps stand at 1 and at the least sigma 1/1000, shifted twice. Shift s maps x to
    s x / (1 + (s - 1) x), so it multiplies the odds by s each time.
    """
    return math.sqrt(inner / (1 - inner) * 999)


def _one_shift(several: dict[int, tuple[float, ...]]) -> tuple[float, dict[int, tuple[float, ...]]]:
    """The shift of an even grid that most step counts stand on, and those with their times there."""
    best: tuple[float, dict[int, tuple[float, ...]]] = (1.0, {})
    for n, times in several.items():
        even = 1 - 1 / n
        shift = times[1] / (1 - times[1]) / (even / (1 - even))
        held = {}
        for m, wanted in several.items():
            grid = [1 - i / m for i in range(m)]
            grid = [shift * x / (1 + (shift - 1) * x) for x in grid]
            if all(abs(a - b) <= TOLERANCE * b for a, b in zip(grid, wanted, strict=True)):
                held[m] = tuple(grid)
        if len(held) > len(best[1]):
            best = (shift, held)
    return best


# -- the EDM's own preconditioning ------------------------------------------------------------------


def _edm(student: Student, setting: Setting) -> Plain:
    """A teacher's pipeline with the Euler scheduler of EDM: it begins at sqrt(sigma_max^2 + 1) noise, and so does
    the student that ships."""
    one = wrapped(student)
    if one.prediction != "edm" or one.clock != "log_sigma/4" or not one.scale_input:
        raise Refused(f"prediction {one.prediction!r} on clock {one.clock!r} is not EDM's")
    if setting.pipeline is None or "num_inference_steps" not in setting.accepts or not setting.scheduler:
        raise Refused("no pipeline of the teacher's runs EDM's scheduler")
    several = {n: times for n, times in student.steps.items() if n > 1}
    renoise = student.policy == "renoise" and bool(several)
    low = next(iter(several.values()))[-1] if several else min(one.path.t_low, student.start / 2)
    calls: dict[int, dict[str, Any] | None] = {}
    notes = []
    steps = dict(student.steps)
    for n, times in student.steps.items():
        ends = student.start ** (1 / 7), low ** (1 / 7)
        grid = [(ends[0] + i / max(n - 1, 1) * (ends[1] - ends[0])) ** 7 for i in range(n)]
        fits = not (renoise and n > 1) and all(abs(a - b) <= TOLERANCE * b for a, b in zip(grid, times, strict=True))
        calls[n] = {"num_inference_steps": n} | setting.always if fits else None
        if fits:
            steps[n] = (student.start, *grid[1:])
        else:
            notes.append(f"{n} steps of this student are not on the stock scheduler's grid")
    config = {
        "sigma_min": low,
        "sigma_max": student.start,
        "sigma_data": one.data_std,
        "sigma_schedule": "karras",
        "rho": 7.0,
        "prediction_type": "epsilon",
        "num_train_timesteps": 1000,
        "final_sigmas_type": "zero",
    }
    moved = _with(student, steps, start_scale=math.sqrt(student.start**2 + 1))
    return Plain(setting.pipeline, "EDMEulerScheduler", config, moved, calls, tuple(notes))


# -- anything else in one step ----------------------------------------------------------------------


def _folded(student: Student, setting: Setting) -> Plain:
    """A one-step U-Net as a consistency function: exact, by scaling its first and last convolution.

    Whatever the path, one step is ``x0 = A noise + B net(C noise, clock)``. The scheduler's is
    ``x0 = c_skip s noise + c_out net(c_in s noise, 250 ln s)``: s follows from the clock, sigma_data from A,
    and the two scales that are left go into weights.
    """
    one = wrapped(student)
    net = inner_network(one.net)
    if set(student.steps) != {1}:
        raise Refused("more than one step is only run on the student's own path")
    if setting.pipeline not in (None, "ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline"):
        raise Refused(f"{setting.pipeline} is not rebuilt around folded weights")
    entry, last = getattr(net, "conv_in", None), getattr(net, "conv_out", None)
    if not isinstance(entry, nn.Conv2d) or not isinstance(last, nn.Conv2d):
        raise Refused("the network has no first and last convolution to fold scales into")
    if getattr(getattr(net, "config", None), "center_input_sample", False):
        raise Refused("the network shifts its input")
    start = torch.tensor(student.start, dtype=torch.float64)
    coefs = one.path.coefs(start)
    alpha, sigma = float(coefs.alpha), float(coefs.sigma)
    scale_in = 1 / math.sqrt(alpha**2 * one.data_std**2 + sigma**2) if one.scale_input else 1.0
    if one.prediction in PRECONDITIONED:
        low = one.boundary if one.prediction == "cm" else 0.0
        keep = one.data_std**2 / ((sigma - low) ** 2 + one.data_std**2)
        take = (sigma - low) * one.data_std / math.sqrt(sigma**2 + one.data_std**2)
        take = -take if one.prediction == "edm_v" else take
    else:
        a, b = (float(v) for v in one.path.pair(one.prediction, coefs))
        det = alpha * b - sigma * a
        if abs(det) < 1e-14:
            raise Refused(f"{one.prediction!r} says nothing about the clean sample at the start")
        keep, take = b / det, -sigma / det
    clock = float(clock_of(one.clock, one.path, start))
    level, skip = math.exp(clock / 250), keep * student.start_scale
    if not 2 * BOUNDARY < level < 1e6:
        raise Refused(f"the clock shows {clock:g}, which no level of the scheduler does")
    if not -1e-12 <= skip < level:
        raise Refused(f"the noise stands in the answer {skip:.4g} times, more than the scheduler's {level:.4g}")
    # c_skip s = skip fixes sigma_data; where nothing is skipped a tiny one leaves a share of 1e-12 s
    data_std = max(math.sqrt(max(skip, 0.0) / (level - max(skip, 0.0))), 1e-6) * (level - BOUNDARY)
    out = (level - BOUNDARY) * data_std / math.sqrt(level**2 + data_std**2)
    grow = scale_in * student.start_scale * math.sqrt(level**2 + data_std**2) / level
    twin = copy.deepcopy(student)
    folded = wrapped(twin)
    ends: Any = inner_network(folded.net)
    with torch.no_grad():
        ends.conv_in.weight.mul_(grow)
        ends.conv_out.weight.mul_(take / out)
        ends.conv_out.bias.mul_(take / out)
        if one.clock in SLOW and isinstance(ends, UNet):
            ends.hold(clock)
    path = Exploding(sigma_min=BOUNDARY, sigma_max=level)
    shipped = Student(
        Wrapped(folded.net, path, "cm", "250 log_sigma", scale_input=True, data_std=data_std, boundary=BOUNDARY),
        student.shape,
        start=level,
        policy=student.policy,
    )
    plain = _consistency(shipped, Setting(setting.labels))
    note = f"one step from the {_kind(one.path)} path, written as a consistency function: scales stand in its ends"
    return Plain(plain.pipeline, plain.scheduler, plain.config, plain.student, plain.calls, (*plain.notes, note))


def inner_network(net: nn.Module) -> nn.Module:
    """The network itself, without the recorder's call around it."""
    from .recorded import Recorded

    return net.net if isinstance(net, Recorded) else net


def _with(student: Student, steps: dict[int, tuple[float, ...]], start_scale: float | None = None) -> Student:
    scale = student.start_scale if start_scale is None else start_scale
    return Student(
        student.denoiser, student.shape, start=student.start, start_scale=scale, steps=steps, policy=student.policy
    )


def _kind(path: Path) -> str:
    return str(getattr(path, "kind", type(path).__name__))
