"""A diffusers scheduler that samples by our engine: ``pipe.scheduler = FewstepScheduler(solver="unipc3")``.

The pipeline calls the network; a solver's step is cut at those calls. Noise levels are float64 and carried by index.
This module imports diffusers; nothing else of the package imports it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..denoiser import Denoiser, clock_of
from ..errors import Refused, need
from ..grid import GRIDS, grid, shifted
from ..path import Path, Time
from ..registry import nearest
from ..rng import Rng
from ..solvers import Solver, SolverPlan, State, recommended, sample, solver_named, steps_of
from ..solvers.engine import Course, Engine
from ..solvers.plan import Planned
from .configs import OWN, SOLVERS, Reading, read_config
from .schedules import Schedule

need("diffusers", "diffusers")
# diffusers loads a saved pipeline only if SchedulerMixin can be found in this module
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.schedulers.scheduling_utils import SchedulerOutput  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

RECOMMENDED = "recommended"
LEAST_ALPHA = 2**-12  # diffusers' own, where a table ends without signal
UNKNOWN = (
    "this FewstepScheduler does not know the pipeline's noise levels: make it by "
    "FewstepScheduler.from_config(pipe.scheduler.config, ...), or put it in the place of the pipeline's own"
)


class FewstepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Our samplers in any diffusers pipeline, on the noise levels that the pipeline's network was trained for.

    Parameters
    ----------
    solver: a sampler's name (``fewstep list samplers``), or ``recommended``: the plan that depends on the path and the
        number of calls alone. None is ``recommended`` too, but ``consistency`` where the replaced scheduler is one of
        distilled networks (LCM, consistency models).
    grid: a time grid's name (``fewstep.grid.GRIDS``), moved once by the pipeline's shift; None keeps the replaced
        scheduler's own levels for a named solver, and the recommended ones without.
    plan: a ``SolverPlan`` as a dictionary, in place of both; see ``from_plan``.
    replaces: the class of the scheduler whose configuration it keeps, beside the settings of that one; written by
        ``from_config``, and where it takes another scheduler's place in a pipeline.

    ``num_inference_steps`` is the number of network calls, exactly: a solver of two calls a step takes half as many
    steps. Samples are in the network's own frame: variance-preserving on a table, straight for a flow, sigma on
    exploding paths. A guess is held to a range only where the replaced scheduler did so (``clip_sample``,
    ``thresholding``). Unknown names and settings that cannot be honoured are Refused in one line.
    """

    _compatibles = list(SOLVERS)
    order = 1  # every entry of ``timesteps`` is one call of the network

    @register_to_config
    def __init__(
        self,
        solver: str | None = None,
        grid: str | None = None,
        plan: dict[str, Any] | None = None,
        replaces: str | None = None,
    ) -> None:
        if plan is not None and (solver is not None or grid is not None):
            raise Refused("a plan brings its own solver and grid: pass the plan alone")
        if grid is not None and grid not in GRIDS:
            raise Refused(f"unknown grid {grid!r}: {nearest(grid, list(GRIDS))}")
        self._solver = None if solver in (None, RECOMMENDED) else solver_named(solver)
        self._plan = None if plan is None else _plan_of(plan)
        self._reading: Reading | None = None
        self._read: Any = None  # the configuration that the reading is of
        self.num_inference_steps: int | None = None
        self.timesteps = self.sigmas = torch.empty(0)
        self._route: _Route | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._walk: _Walk | None = None

    # -- making ---------------------------------------------------------------------------------------

    @classmethod
    def from_plan(cls, plan: str | File | SolverPlan, config: Mapping[str, Any] | None = None) -> FewstepScheduler:
        """The scheduler of a plan file that ``fewstep search`` wrote; ``config``: that of the pipeline's scheduler."""
        held = plan if isinstance(plan, SolverPlan) else SolverPlan.load(plan)
        given = held.model_dump(mode="json")
        return cls(plan=given) if config is None else cls.from_config(config, plan=given)

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """Keep a pipeline's betas, prediction type, shift, levels and limits; ``options`` are ours, or change settings.

        ``FewstepScheduler.from_config(pipe.scheduler.config, solver="dpm3m", shift=5.0)``
        """
        if not isinstance(config, Mapping):
            raise Refused(f"from_config takes a scheduler's configuration, got {type(config).__name__}")
        ours = config.get("_class_name") == cls.__name__ or "replaces" in config
        given = {k: v for k, v in config.items() if not k.startswith("_")} | options
        made = cls(**{k: given.pop(k) for k in OWN if k in given})
        name = given.pop("replaces", None) if ours else config.get("_class_name")
        if given or name:
            made._keep(name, given)
        return (made, {}) if return_unused_kwargs else made

    def _keep(self, name: str | None, settings: Mapping[str, Any]) -> None:
        """Take over the settings of a scheduler of class ``name``."""
        named = {} if name is None else {"_class_name": name}
        self._reading = read_config({**settings, **named})
        self.register_to_config(**settings, replaces=self._reading.schedule.name)
        self._read = self._internal_dict

    def _known(self) -> Reading:
        if self._reading is None:
            raise Refused(UNKNOWN)
        if self._read is not self._internal_dict:  # a pipeline changed a setting: Stable Diffusion's own checks do
            self._reading, self._read = read_config(self.config), self._internal_dict
        return self._reading

    # -- levels ---------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the levels of a run of ``num_inference_steps`` network calls.

        ``sigmas`` or ``timesteps`` list them instead (see ``Reading.times``); the even list of sigmas that flow
        pipelines send when the user gave none only says how many. ``mu``: the dynamic shift. Refused where a solver
        or a plan does not take that many calls.
        """
        reading = self._known()
        if sigmas is not None and timesteps is not None:
            raise Refused(
                "sigmas and timesteps were given together, for a network that reads other times than its noise levels: "
                "that is not read; pass one of them"
            )
        listed = next((len(v) for v in (sigmas, timesteps) if v is not None), None)
        count = listed if num_inference_steps is None else int(num_inference_steps)
        if count is None or count < 1:
            raise Refused(f"num_inference_steps is a number of calls, at least 1, got {num_inference_steps}")
        if listed is not None and listed != count and not (sigmas is not None and sigmas[-1] == 0):
            raise Refused(f"{listed} levels were listed for {count} steps")
        even = sigmas is not None and _is_even(sigmas)
        times, solver = self._course(reading, count, None if even else sigmas, timesteps, mu, even)
        self._route = route = _Route.of(solver, reading.schedule.path, times)
        self._step_index = self._begin_index = self._walk = None
        self.num_inference_steps = len(route.asked)
        assert listed is not None or self.num_inference_steps == count, "a solver asks as often as it says"
        levels = torch.tensor([*route.asked, times[-1]], dtype=torch.float64)
        path = reading.schedule.path
        self.timesteps = clock_of(reading.schedule.clock, path, levels[:-1]).to(device, torch.float32)
        coefs = path.coefs(levels)
        listing = coefs.sigma / coefs.alpha.clamp(min=LEAST_ALPHA) if reading.ratios else coefs.sigma
        self.sigmas = listing.to(torch.float32)  # stays on the CPU: pipelines read single entries of it

    def _course(
        self,
        reading: Reading,
        count: int,
        sigmas: Sequence[float] | None,
        timesteps: Sequence[float] | None,
        mu: float | None,
        even: bool,
    ) -> tuple[tuple[float, ...], Solver]:
        """Times and solver of a run."""
        path, shift = reading.schedule.path, reading.shift(mu)
        listed = sigmas is not None or timesteps is not None
        if self._plan is not None:
            if listed:
                raise Refused("a plan brings its own levels: pass no sigmas and no timesteps")
            if self._plan.nfe != count:
                raise Refused(
                    f"the plan is for {self._plan.nfe} calls, num_inference_steps is {count}: "
                    f"pass num_inference_steps={self._plan.nfe}"
                )
            return self._on(path, self._plan), self._plan.solver()
        jumps = reading.distilled and self.config.solver != RECOMMENDED
        solver = self._solver or (solver_named("consistency") if jumps else None)
        if listed:
            times = reading.times(sigmas=sigmas, timesteps=timesteps, mu=mu)
            return times, solver or recommended(path, len(times) - 1).solver()
        steps = count if solver is None else steps_of(solver, count)
        if self.config.grid is not None:
            times = tuple(grid(path, steps, self.config.grid, shift=shift).tolist())
            return times, solver or recommended(path, steps).solver()
        if solver is None:
            plan = recommended(path, steps)
            held = torch.tensor(self._on(path, plan), dtype=torch.float64)
            return tuple((held if shift == 1 else shifted(path, held, shift)).tolist()), plan.solver()
        if even and reading.takes_sigmas:  # the pipeline's own list, which its scheduler would shift
            return reading.times(steps, sigmas=[1 - k / steps for k in range(steps)], mu=mu), solver
        return reading.times(steps, mu=mu), solver

    @staticmethod
    def _on(path: Path, plan: SolverPlan) -> tuple[float, ...]:
        try:
            return plan.times(path)
        except ValueError as error:
            raise Refused(f"the plan does not fit this pipeline: {error}") from None

    # -- what pipelines ask ---------------------------------------------------------------------------

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply their first noise by: the start's sigma; 1 where the variance is preserved."""
        path = self._known().schedule.path
        start = path.t_max if self._route is None else self._route.times[0]
        coefs = path.coefs(start)
        alpha, sigma = float(coefs.alpha), float(coefs.sigma)
        return 1.0 if abs(alpha**2 + sigma**2 - 1) < 1e-6 else sigma

    @property
    def step_index(self) -> int | None:
        """How many calls were made, those before ``begin_index`` included; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The call at which the run begins: more than 0 for image to image."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of ``timesteps``."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as the network reads it: over ``sqrt(sigma^2 + sigma_data^2)`` on EDM's paths, else itself."""
        schedule = self._known().schedule
        if not schedule.scale_input:
            return sample
        coefs = schedule.path.coefs(self._level(timestep))
        size = float((coefs.alpha**2 * schedule.data_std**2 + coefs.sigma**2).sqrt())
        return (sample / size).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x0 + sigma noise``: at the run's place, or, outside a run, at any timesteps, one a row."""
        path = self._known().schedule.path
        if self._route is not None and (self._step_index is not None or self._begin_index is not None):
            return path.corrupt(original_samples, self._level(None), noise)
        t = self._known().time_of(torch.as_tensor(timesteps).reshape(-1))
        return path.corrupt(original_samples, t.expand(len(original_samples)), noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def _level(self, timestep: float | Tensor | None) -> float:
        """The time of the call to come: by index, wherever the pipeline says where it stands."""
        if self._route is None:
            raise Refused("call set_timesteps before a run")
        levels = (*self._route.asked, self._route.times[-1])
        return levels[min(self._index(timestep), len(levels) - 1)]

    def _index(self, timestep: float | Tensor | None) -> int:
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        if timestep is None:
            return 0
        value = torch.as_tensor(timestep).reshape(-1)[0].to(self.timesteps)  # a pipeline that does not say where it is
        return int((self.timesteps - value).abs().argmin())

    # -- steps ----------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the network's answer at one entry of ``timesteps`` to the sample that it is asked about at the next.

        ``sample`` keeps its type; sums are in float32 or better, and a half-precision sample that comes back unchanged
        is not rounded between steps. ``generator``: of stochastic solvers, one or one a row; None is torch's own.
        """
        if self._route is None:
            raise Refused("call set_timesteps before a run")
        if self._step_index is None or self._walk is None:
            index = self._index(timestep)
            self._walk = _Walk(self._known(), self._route, index, _exact(sample))
            self._step_index = index
        if self._step_index >= len(self._route.asked):
            raise Refused(f"all {len(self._route.asked)} calls of this run were made: call set_timesteps again")
        moved = self._walk.answer(_answer(model_output, sample, self.config), sample, generator)
        self._step_index += 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))


def _plan_of(plan: Mapping[str, Any]) -> SolverPlan:
    try:
        made = SolverPlan.model_validate(dict(plan))
    except (ValidationError, TypeError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise Refused(f"not a plan: {'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}") from None
    if any(step.skip for step in made.steps):
        raise Refused(
            "this plan leaves blocks of the network out, which a scheduler cannot: sample with fewstep sample --plan"
        )
    return made


def _is_even(sigmas: Sequence[float]) -> bool:
    """Whether sigmas fall evenly from 1, as pipelines list them where their user does not."""
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    wanted = 1 - torch.arange(len(values), dtype=torch.float64) / max(1, len(values))
    return bool((values - wanted).abs().max() < 2e-3)


def _exact(sample: Tensor) -> Tensor:
    return sample if sample.dtype.itemsize > 2 else sample.float()


def _answer(output: Tensor, sample: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The network's answer without the variances that it may have learned."""
    if output.shape != sample.shape:
        learned = str(config.get("variance_type", "")).startswith("learned")
        if learned and output.shape[1:2] == (2 * sample.shape[1],):
            return output.chunk(2, 1)[0]
        raise Refused(f"the network answers {list(output.shape)} to a sample {list(sample.shape)}")
    return output


# -- a solver's step, cut at its calls --------------------------------------------------------------


class _Ask(Exception):
    """Raised inside a solver's step where it calls the network, which only the pipeline can."""

    def __init__(self, x: Tensor, t: float) -> None:
        super().__init__()
        self.x, self.t = x, t


class _Given(nn.Module):
    """A network that answers what it was given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        return self.value


@functools.lru_cache(maxsize=4096)
def _pair(schedule: Schedule, t: float, want: str) -> tuple[float, float]:
    """(a, b) such that ``want = a x + b answer`` at a level: what the wrapped network makes of (1, 0) and of (0, 1)."""
    x, answer = torch.eye(2, dtype=torch.float64)[:, :, None]
    a, b = schedule.wrap(_Given(answer))(x, t, None, want).flatten().tolist()
    return a, b


class _Answered(Denoiser):
    """The schedule's denoiser around a network that was asked already."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.path = schedule, schedule.path
        self.value = torch.empty(0)

    def forward(self, x: Tensor, t: Time, cond: Any = None, want: str = "x0", s: Time | None = None) -> Tensor:
        a, b = _pair(self.schedule, float(t), want)
        return self.value if (a, b) == (0.0, 1.0) else torch.add(b * self.value, x, alpha=a)


class _Draws(Rng):
    """The pipeline's generators, each draw kept until its step is done: a step is run again at each of its calls."""

    def __init__(self) -> None:
        self.source: torch.Generator | list[torch.Generator] | None = None
        self.made: list[Tensor] = []
        self.used = 0
        self.device = torch.device("cpu")

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if self.used == len(self.made):
            self.made.append(randn_tensor(shape, generator=self.source, device=self.device, dtype=dtype))
        self.used += 1
        return self.made[self.used - 1]


class _Still(_Draws):
    """No noise: where only the places of the calls are asked for."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Route:
    """A solver on its times, and the times at which it asks the network; ``steps``: the step of each call."""

    solver: Solver
    times: tuple[float, ...]
    asked: tuple[float, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, solver: Solver, path: Path, times: tuple[float, ...]) -> _Route:
        """Found by running the solver on one number without a network."""
        asked: list[float] = []
        steps: list[int] = []
        done = 0

        class Listening:
            def __init__(self) -> None:
                self.path = path

            def __call__(self, x: Tensor, t: float, cond: Any = None, want: str = "x0") -> Tensor:
                asked.append(t)
                steps.append(done)
                return torch.zeros_like(x)

        def count(i: int, x: Tensor) -> None:
            nonlocal done
            done = i + 1

        sample(Listening(), torch.zeros(1, 1, dtype=torch.float64), times, solver, rng=_Still(), watch=count)
        return cls(solver, times, tuple(asked), tuple(steps))

    def start(self, path: Path, call: int) -> tuple[Solver, State, int]:
        """Solver, state and step of a run that begins at a call."""
        step = self.steps[call]
        if call and self.steps[call - 1] == step:
            raise Refused(
                f"{self.solver.name} cannot begin at call {call}, inside one of its steps: choose another strength, "
                "or a solver of one call a step, such as unipc3"
            )
        if self.asked[call] != self.times[step]:
            raise Refused(
                f"{self.solver.name} noises the sample before its first call, which a pipeline makes itself: "
                "take another stochastic solver, such as ancestral"
            )
        if not step or not isinstance(self.solver, Engine):
            return self.solver, self.solver.init(path, self.times), step
        solver = Planned(_tail(self.solver.plan, step)) if isinstance(self.solver, Planned) else self.solver
        return solver, solver.init(path, self.times[step:]), 0


def _tail(plan: SolverPlan, step: int) -> SolverPlan:
    """A plan from one of its steps on: what its first steps would read of earlier ones is left out."""
    steps = []
    for i, one in enumerate(plan.steps[step:]):
        change: dict[str, Any] = {"start": min(one.start, i)}
        if one.weights is not None and len(one.weights) > i + 1:
            change |= {"weights": None, "order": min(len(one.weights), 3)}
        steps.append(one.model_copy(update=change))
    return SolverPlan(levels=(None, *plan.levels[step + 1 :]), end=plan.end, steps=tuple(steps))


class _Walk:
    """One run: the solver's step is taken anew at each of its calls, with the answers so far, up to the next call."""

    def __init__(self, reading: Reading, route: _Route, call: int, x: Tensor) -> None:
        self.path = reading.schedule.path
        self.given = _Answered(reading.schedule)
        self.denoiser = reading.limited(self.given)
        self.solver, self.state, self.i = route.start(self.path, call)
        self.draws = _Draws()
        self.draws.device = x.device
        self.answers: list[Tensor] = []
        self.used = 0
        self.x = self.query = x  # at the start of the step; where the network is asked
        self.sent: Tensor | None = None
        self.version = 0

    def __call__(self, x: Tensor, t: float, cond: Any = None, want: str = "x0") -> Tensor:
        """The denoiser that the solver sees."""
        if self.used == len(self.answers):
            raise _Ask(x, t)
        self.given.value = self.answers[self.used]
        self.used += 1
        guess: Tensor = self.denoiser(x, t, None, want)
        return guess

    def answer(self, value: Tensor, sample: Tensor, source: Any) -> Tensor:
        """The sample that the network is asked about next, or the finished one."""
        if self.sent is not None and not self._as_sent(sample):
            self._changed(sample)
        self.draws.source = source
        self.answers.append(value.to(self.x.dtype))
        self.query = self._go()
        self.sent = self.query.to(sample.dtype, copy=True)  # the pipeline may write to it
        self.version = 0 if self.sent.is_inference() else self.sent._version
        return self.sent

    def _go(self) -> Tensor:
        """Run until the network is asked: within the step, or at the start of the next one."""
        while True:
            state = _copied(self.state)
            self.used = self.draws.used = 0
            try:
                x, self.state = self.solver.step(self, self.x, self.i, state, None, self.draws)
            except _Ask as ask:
                return ask.x
            self.x, self.i, self.answers, self.draws.made = x, self.i + 1, [], []
            if self.i > self.state.last:
                return x

    def _as_sent(self, sample: Tensor) -> bool:
        if sample is self.sent and not sample.is_inference() and sample._version == self.version:
            return True  # without a look at its values, for which a GPU would have to wait
        return sample.shape == self.query.shape and torch.equal(sample, self.query.to(sample.dtype))

    def _changed(self, sample: Tensor) -> None:
        """Go on from the pipeline's own sample (inpainting, callbacks).

        What was changed is added behind the correction of the step before, which would undo it: where nothing was
        changed, the run is what it would have been.
        """
        if self.answers or self.query is not self.x:
            raise Refused(
                f"{self.solver.name} calls the network inside its steps, and this pipeline changes the sample between "
                "calls: take a solver of one call a step, such as unipc3"
            )
        change = _exact(sample) - self.query.to(sample.dtype)
        self.x = self.query = self.query + change
        if not isinstance(self.state, Course):
            return
        later = [b for rule in self.state.rules[self.i + 1 :] for b in (rule.correct, rule.advance) if b is not None]
        if any(blend.base < self.i for blend in (self.state.rules[self.i].advance, *later)):
            raise Refused(
                "a step of this plan starts before the sample that the pipeline changed between calls: take a plan "
                "whose steps have start = 0, or a solver such as unipc3"
            )
        correct = self.state.rules[self.i].correct
        if correct is not None:
            self.state.bases[correct.base] = self.state.bases[correct.base] + change / correct.keep


def _copied(state: State) -> State:
    """A state whose memory can be written to; its tensors are shared."""
    held = copy.copy(state)
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, list | dict):
            setattr(held, field.name, copy.copy(value))
    return held


# -- taking another scheduler's place ---------------------------------------------------------------


def _adopting(plain: Any) -> Any:
    """``pipe.scheduler = FewstepScheduler(...)`` keeps the settings of the scheduler that stood there."""

    @functools.wraps(plain)
    def put(pipe: Any, name: str, value: Any) -> None:
        if isinstance(value, FewstepScheduler) and value._reading is None:
            before = pipe.__dict__.get(name)
            if isinstance(before, FewstepScheduler):
                if before._reading is not None:
                    kept = {k: v for k, v in before.config.items() if k not in (*OWN, "replaces") and k[0] != "_"}
                    value._keep(before._reading.schedule.name, kept)
            elif isinstance(before, SchedulerMixin):
                kept = {k: v for k, v in before.config.items() if not k.startswith("_")}
                value._keep(type(before).__name__, kept)
        plain(pipe, name, value)

    put.adopts = True  # type: ignore[attr-defined]
    return put


if not hasattr(DiffusionPipeline.__setattr__, "adopts"):
    DiffusionPipeline.__setattr__ = _adopting(DiffusionPipeline.__setattr__)
