"""Our samplers as a diffusers scheduler: the pipeline's loop and our own give one answer; stock settings are kept."""

import functools
import inspect
import json
import math

import pytest
import torch

from fewstep.errors import Refused
from fewstep.grid import grid
from fewstep.interop.configs import SOLVERS, read_config
from fewstep.path import Exploding, Straight
from fewstep.registry import SOLVERS as SAMPLERS
from fewstep.registry import UnknownName
from fewstep.rng import normal
from fewstep.solvers import Heun, SolverPlan, StepPlan, recommended, sample, solver_named

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers

from fewstep.interop.scheduler import FewstepScheduler

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
TABLE = {"_class_name": "DDIMScheduler", "clip_sample": False}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0, "sigma_data": 0.5}


# -- pipelines --------------------------------------------------------------------------------------

# the network's part, its sample and time arguments, what divides the time, guidance, which half is the prompt's
PARTS = {
    "ddpm": ("unet", "sample", "timestep", 1, None, 0),
    "dit": ("transformer", "hidden_states", "timestep", 1, 4.0, 0),
    "sd15": ("unet", "sample", "timestep", 1, 7.5, 1),
    "sd_img2img": ("unet", "sample", "timestep", 1, 7.5, 1),
    "sd3": ("transformer", "hidden_states", "timestep", 1, 5.0, 1),
    "flux": ("transformer", "hidden_states", "timestep", 1000, None, 0),
    "wan": ("transformer", "hidden_states", "timestep", 1, None, 0),
}


class Heard:
    """A run of a pipeline: the network's first arguments and number of calls, the samples at both ends."""

    def __init__(self, pipe, kind, calls, **more):
        import zoo

        self.part = PARTS[kind][0]
        network = getattr(pipe, self.part)
        signature = inspect.signature(type(network).forward)
        self.arguments, self.calls, self.first = None, 0, None
        plain = pipe.scheduler.step

        def listen(module, args, kwargs):
            self.calls += 1
            if self.arguments is None:
                self.arguments = {
                    k: v for k, v in signature.bind(module, *args, **kwargs).arguments.items() if k != "self"
                }

        @functools.wraps(plain)
        def step(output, time, state, *args, **kwargs):
            rows = state[:2]  # DiT carries its guidance pair through the scheduler
            self.first = rows.clone() if self.first is None else self.first
            answer = plain(output, time, state, *args, **kwargs)
            self.last = answer[0] if isinstance(answer, tuple) else answer.prev_sample
            return answer

        call = {"num_inference_steps": calls, "generator": torch.Generator().manual_seed(0), **more}
        if kind == "ddpm":
            call |= {"batch_size": 2, "output_type": "pt"}
        elif kind == "dit":
            call |= {"class_labels": [1, 2], "guidance_scale": PARTS[kind][4], "output_type": "pt"}
        else:
            call |= {**zoo.CALLS[kind], "prompt": ["a photo", "one dog"], "output_type": "latent"}
            call["guidance_scale"] = PARTS[kind][4] or 1.0
        if kind == "sd_img2img":
            picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
            call = {"image": picture, "strength": 0.6} | call
        handle = network.register_forward_pre_hook(listen, with_kwargs=True)
        pipe.scheduler.step = step
        try:
            with torch.no_grad():
                pipe(**call)
        finally:
            del pipe.scheduler.step
            handle.remove()


class Again(torch.nn.Module):
    """The pipeline's network with the conditions of a run, guided as the pipeline guides it."""

    def __init__(self, pipe, kind, heard):
        super().__init__()
        self.net, self.arguments = getattr(pipe, heard.part), heard.arguments
        _, self.state, self.clock, self.divisor, self.guidance, self.prompt = PARTS[kind]

    def forward(self, x, time, cond=None):
        twice = self.guidance is not None
        given = torch.cat([x, x]) if twice else x
        clock = (torch.cat([time, time]) if twice else time) / self.divisor
        answer = self.net(**{**self.arguments, self.state: given, self.clock: clock})
        answer = (answer[0] if isinstance(answer, tuple) else answer.sample)[:, : x.shape[1]]
        if not twice:
            return answer
        halves = answer.chunk(2)
        own, other = halves[self.prompt], halves[1 - self.prompt]
        return other + self.guidance * (own - other)


@pytest.fixture(scope="module")
def built(pipes):
    import zoo

    def pipe(kind):
        return getattr(pipes, kind)() if kind in ("ddpm", "dit") else zoo.build(kind)

    return functools.cache(pipe)


def shift_of(kind, heard):
    """The factor on sigma / alpha that each pipeline's flow is shifted by, from its papers' formulas."""
    if kind in ("sd3", "wan"):
        return 3.0
    if kind != "flux":
        return 1.0
    tokens = heard.first.shape[1]  # mu is a line through (256, 0.5) and (4096, 1.15), the shift e^mu
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def moved(path, times, factor):
    """Times with sigma / alpha multiplied, their ends held."""
    lam = path.lam(torch.tensor(times[1:-1], dtype=torch.float64)) - math.log(factor)
    return (times[0], *path.time(lam).tolist(), times[-1])


@pytest.mark.parametrize("solver", [None, "unipc3", "heun"])
@pytest.mark.parametrize("kind", PARTS)
def test_a_pipeline_gives_what_our_own_loop_gives_in_exactly_as_many_calls(built, kind, solver):
    pipe, calls = built(kind), 5
    stock = pipe.scheduler
    pipe.scheduler = FewstepScheduler.from_config(
        {**stock.config, "_class_name": type(stock).__name__}, solver=solver, grid=solver and "uniform"
    )
    try:
        heard = Heard(pipe, kind, calls)
        reading = read_config(pipe.scheduler.config)
        path, factor = reading.schedule.path, shift_of(kind, heard)
        begin = 2 if kind == "sd_img2img" else 0  # 0.6 of five calls are three
        assert heard.calls == calls - begin
        plan = recommended(path, calls)
        if solver is None:
            times = moved(path, plan.times(path), factor)[begin:]
            sampler = SolverPlan(levels=(None, *plan.levels[begin + 1 :]), steps=plan.steps[begin:]).solver()
        else:
            sampler = solver_named(solver)
            steps = sampler.steps_for(calls)
            skipped = begin // 2 if solver == "heun" else begin  # Heun's first two calls are one step
            times = moved(path, tuple(grid(path, steps, "uniform").tolist()), factor)[skipped:]
        with torch.no_grad():
            wanted = sample(reading.schedule.wrap(Again(pipe, kind, heard)), heard.first, times, sampler)
        size = max(1.0, float(wanted.abs().max()))
        assert float((heard.last[: len(wanted)] - wanted).abs().max()) <= 1e-5 * size
    finally:
        pipe.scheduler = stock


def test_image_to_image_starts_at_the_noise_of_its_first_call(built):
    pipe = built("sd_img2img")
    stock = pipe.scheduler
    pipe.scheduler = FewstepScheduler(solver="dpm3m")
    seen = []
    plain = pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda *given: seen.append((*given[:2], plain(*given))) or seen[-1][2]
    try:
        heard = Heard(pipe, "sd_img2img", 5)
        data, noise, start = seen[0]
        kept = math.sqrt(float(stock.alphas_cumprod[401]))  # five steps of its spacing: 801, 601, 401, 201, 1
        torch.testing.assert_close(start, kept * data + math.sqrt(1 - kept**2) * noise)
        torch.testing.assert_close(heard.first, start)
        pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="heun")
        with pytest.raises(Refused, match="heun cannot begin at call 1, inside one of its steps"):
            Heard(pipe, "sd_img2img", 5, strength=0.8)
    finally:
        pipe.scheduler = stock


def test_put_in_a_pipelines_place_for_a_scheduler_it_keeps_that_ones_settings(built, tmp_path):
    SolverPlan(levels=(None, 0.0), steps=(StepPlan(), StepPlan(order=2))).save(tmp_path / "plan.json")
    for kind, key, value in (("sd15", "beta_schedule", "scaled_linear"), ("wan", "flow_shift", 3.0)):
        pipe = built(kind)
        stock = pipe.scheduler
        try:
            pipe.scheduler = FewstepScheduler.from_plan(tmp_path / "plan.json")
            assert pipe.scheduler.config[key] == value
            assert pipe.scheduler.config.replaces == type(stock).__name__
            assert Heard(pipe, kind, 2).calls == 2
            pipe.scheduler = FewstepScheduler(solver="unipc3", grid="logsnr")
            assert pipe.scheduler.config[key] == value
            assert Heard(pipe, kind, 3).calls == 3
        finally:
            pipe.scheduler = stock


def test_a_saved_pipeline_comes_back_with_it(built, tmp_path):
    pipe = built("ddpm")
    stock = pipe.scheduler
    plan = SolverPlan(levels=(None, -1.0, 1.0), steps=tuple(StepPlan(order=k, variable="tau") for k in (1, 2, 3)))
    try:
        pipe.scheduler = FewstepScheduler.from_plan(plan)
        wanted = Heard(pipe, "ddpm", 3).last
        pipe.save_pretrained(str(tmp_path / "pipe"))
        index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
        assert index["scheduler"] == ["fewstep.interop.scheduler", "FewstepScheduler"]
        again = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "pipe"), local_files_only=True)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(Heard(again, "ddpm", 3).last, wanted)
        assert SolverPlan.model_validate(again.scheduler.config.plan) == plan
        back = diffusers.DDPMScheduler.from_config(again.scheduler.config)
        assert torch.equal(back.alphas_cumprod, stock.alphas_cumprod)
        assert back.config.clip_sample is False
    finally:
        pipe.scheduler = stock


# -- the pipeline's loop, by hand -------------------------------------------------------------------


def driven(scheduler, net, x, calls, generator=None, change=None):
    """A pipeline's loop around a network that reads the timestep; ``change(i, x)`` acts between steps."""
    scheduler.set_timesteps(calls)
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(given, t), t, x, **({"generator": generator} if generator else {}), return_dict=False)[0]
        x = x if change is None else change(i, x)
    return x


class Bent(torch.nn.Module):
    """A network that is no straight line in its input or, unless ``timeless``, its time."""

    def __init__(self, timeless=False):
        super().__init__()
        self.rate = 0.0 if timeless else 1 / 700

    def forward(self, x, time, cond=None):
        time = torch.as_tensor(time, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
        return (torch.tanh(x.double() + self.rate * time) * 0.9).to(x.dtype)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("config", [TABLE, FLOW, EDM], ids=["table", "flow", "edm"])
@pytest.mark.parametrize("name", sorted(entry.name for entry in SAMPLERS))
def test_every_sampler_answers_as_in_our_own_loop(name, config):
    scheduler = FewstepScheduler.from_config(config, solver=name, grid="karras" if config is EDM else "uniform")
    calls = next(n for n in (7, 6) if scheduler._solver.steps_for(n))
    reading = read_config(config)
    path = reading.schedule.path
    x = noise(3, 4) * scheduler.init_noise_sigma
    got = driven(scheduler, Bent(), x, calls, torch.Generator().manual_seed(5))
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == calls == scheduler.step_index
    times = grid(path, scheduler._solver.steps_for(calls), scheduler.config.grid, shift=reading.schedule.shift)
    wanted = sample(reading.schedule.wrap(Bent()), x, times, solver_named(name), rng=torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


STOCK = {
    "ddim linear": (diffusers.DDIMScheduler, {"clip_sample": False}, "euler"),
    "ddim v, zero snr": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "timestep_spacing": "trailing", "beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
        "euler",
    ),
    "ddim sample, cosine": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        "euler",
    ),
    "ddim own betas": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "trained_betas": [1e-4 + 2e-5 * i for i in range(1000)]},
        "euler",
    ),
    "flow, shift": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, "euler"),
    "flow, karras": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_karras_sigmas": True}, "euler"),
    "edm": (diffusers.EDMEulerScheduler, {"sigma_max": 80.0, "sigma_data": 0.5}, "euler"),
    "edm, v": (
        diffusers.EDMEulerScheduler,
        {"sigma_max": 80.0, "sigma_data": 1.0, "prediction_type": "v_prediction"},
        "euler",
    ),
    "stable video": (
        diffusers.EulerDiscreteScheduler,
        {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 80.0,
         "use_karras_sigmas": True, "beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
        "euler",
    ),
    "2m": (diffusers.DPMSolverMultistepScheduler, {}, "dpm2m"),
    "2m, karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "dpm2m"),
    "2m to sigma_min": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "solver_order": 1},
                        "euler"),
    "2m of a flow": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "dpm2m",
    ),
    "2m of a flow that predicts noise": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "epsilon", "use_flow_sigmas": True, "flow_shift": 2.0},
        "dpm2m",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STOCK)
def test_with_the_same_sampler_and_its_own_levels_it_is_the_stock_scheduler(case):
    kind, options, solver = STOCK[case]
    stock = kind(**options)
    assert read_config({**options, "_class_name": kind.__name__}).solver == solver
    ours = FewstepScheduler.from_config({**options, "_class_name": kind.__name__}, solver=solver)
    x = noise(3, 4, dtype=torch.float32) * (80.0 if case in ("edm", "edm, v", "stable video") else 1.0)
    # DPM-Solver rounds the times that its network reads, not its noise levels; trailing DDIM wants a divisor of 1000
    rounded = "2m" in case
    got, wanted = (driven(scheduler, Bent(timeless=rounded), x, 5) for scheduler in (ours, stock))
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(ours.timesteps, stock.timesteps.float(), rtol=2e-4, atol=1.0 if rounded else 2e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_scheduler_that_is_read_gives_its_own_levels_and_one_of_our_samplers(name):
    stock = getattr(diffusers, name)()
    reading = read_config({**stock.config, "_class_name": name})
    times = reading.times(7)
    assert len(times) == 8
    assert times[-1] == reading.schedule.path.t_min
    assert solver_named(reading.solver).name == reading.solver
    assert read_config(stock.config).schedule.path == reading.schedule.path  # a config that does not name its class
    coefs = reading.schedule.path.coefs(torch.tensor(times[:-1], dtype=torch.float64))
    if name not in ("PNDMScheduler",) and stock.order == 1:
        stock.set_timesteps(7)
        if getattr(stock, "sigmas", None) is not None:
            ratio = (
                coefs.sigma if isinstance(reading.schedule.path, (Exploding, Straight)) else coefs.sigma / coefs.alpha
            )
            wanted = torch.as_tensor(stock.sigmas, dtype=torch.float64)[:-1].unique_consecutive()
            torch.testing.assert_close(ratio, wanted, rtol=1e-5, atol=1e-6)
        else:
            wanted = torch.as_tensor(stock.timesteps, dtype=torch.float64)
            torch.testing.assert_close(torch.tensor(times[:-1], dtype=torch.float64), (wanted + 1) / 1000)


def test_a_dynamic_shift_is_taken_once_and_a_list_of_sigmas_is_the_users():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    even = [1.0, 0.75, 0.5, 0.25]
    for grid_name, solver in ((None, "euler"), ("uniform", "dpm2m")):
        scheduler = FewstepScheduler.from_config(config, solver=solver, grid=grid_name)
        scheduler.set_timesteps(sigmas=even, mu=math.log(3.0))
        wanted = [3 * s / (1 + 2 * s) for s in even]
        assert scheduler.sigmas.tolist() == pytest.approx([*wanted, 0.0], abs=1e-6)
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.2], mu=math.log(3.0))
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 2.7 / 2.8, 0.6 / 1.4, 0.0], abs=1e-6)
    plain = FewstepScheduler.from_config(config)
    plain.set_timesteps(4, sigmas=even, mu=math.log(3.0))
    path = Straight()
    assert plain._route.times == pytest.approx(moved(path, recommended(path, 4).times(path), 3.0))
    linear = FewstepScheduler.from_config({**config, "time_shift_type": "linear"}, grid="uniform", solver="euler")
    linear.set_timesteps(4, mu=3.0)
    assert linear.sigmas.tolist() == pytest.approx([*wanted, 0.0], abs=1e-6)
    listed = FewstepScheduler.from_config(TABLE, solver="euler")
    listed.set_timesteps(timesteps=[999, 500, 20])
    assert listed.timesteps.tolist() == pytest.approx([999, 500, 20], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [None, "euler", "dpm3m", "heun"])
def test_half_precision_samples_keep_their_type_and_are_rounded_once(solver, dtype):
    scheduler = FewstepScheduler.from_config({**FLOW, "shift": 1.0}, solver=solver, grid=solver and "uniform")
    x = noise(64, 8, dtype=torch.float32).to(dtype)
    speed = noise(64, 8, seed=1, dtype=torch.float32).to(dtype)  # the same velocity everywhere: x_0 = x_1 - speed
    got = driven(scheduler, lambda given, t: speed, x, 49)
    assert got.dtype == dtype
    assert torch.equal(got, (x.float() - speed.float()).to(dtype)) or (
        (got.float() - x.float() + speed.float()).abs().max() <= torch.finfo(dtype).eps * (x.abs() + speed.abs()).max()
    )


def test_noise_comes_from_the_pipelines_generators():
    scheduler = FewstepScheduler.from_config(TABLE, solver="ancestral")
    x = noise(3, 4)

    def run(source):
        return driven(scheduler, Bent(), x, 4, source)

    first = run(torch.Generator().manual_seed(1))
    assert torch.equal(first, run(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, run(torch.Generator().manual_seed(2)))
    rows = run([torch.Generator().manual_seed(k) for k in (1, 2, 3)])
    alone = driven(scheduler, Bent(), x[1:2], 4, [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(rows[1:2], alone)
    torch.manual_seed(0)
    assert not torch.equal(run(None), run(None))


def blended(solver, change, guess, dtype=torch.float64):
    """States of a run of six calls in which ``change`` acts on the third."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "sample"}
    scheduler = FewstepScheduler.from_config(config, solver=solver)
    seen = []

    def act(i, x):
        x = change(x) if i == 2 else x
        seen.append(x.clone())
        return x

    driven(scheduler, guess, noise(2, 4).to(dtype), 6, change=act)
    return scheduler, seen


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("solver", ["unipc3", "adams_moulton", "dpm2m", "euler"])
def test_a_correction_does_not_undo_what_a_pipeline_changed_between_steps(solver, inplace):
    # a network that always guesses c: whatever the order, x_s = (sigma_s / sigma_t) x + (alpha_s - ...) c
    data, c = noise(2, 4, seed=3), noise(2, 4, seed=4)
    scheduler, seen = blended(solver, lambda x: x.copy_(data) if inplace else data.clone(), lambda x, t: c)
    path, times = scheduler._reading.schedule.path, scheduler._route.times
    coefs = path.coefs(torch.tensor(times[3:], dtype=torch.float64))
    for later in (1, 2, 3):
        keep = float(coefs.sigma[later] / coefs.sigma[0])
        wanted = keep * data + (float(coefs.alpha[later]) - float(coefs.alpha[0]) * keep) * c
        torch.testing.assert_close(seen[2 + later], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("solver", [None, "unipc3", "adams_moulton", "deis"])
def test_where_a_pipeline_changes_nothing_the_run_is_what_it_would_have_been(solver, dtype):
    half = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=dtype)
    _, plain = blended(solver, lambda x: x, Bent(), dtype)
    _, seen = blended(solver, lambda x: x * half, Bent(), dtype)
    assert torch.equal(plain[-1][:, :2], seen[-1][:, :2])
    assert not torch.equal(plain[-1][:, 2:], seen[-1][:, 2:])


def test_a_plan_that_starts_before_a_changed_sample_is_refused():
    plan = SolverPlan(levels=(None, -1.0, 0.0, 1.0), steps=(*[StepPlan()] * 3, StepPlan(order=2, start=1)))
    scheduler = FewstepScheduler.from_plan(plan, TABLE)
    with pytest.raises(Refused, match="starts before the sample that the pipeline changed"):
        driven(scheduler, Bent(), noise(2, 4), 4, change=lambda i, x: x + 0.1 * (i == 2))
    driven(scheduler, Bent(), noise(2, 4), 4, change=lambda i, x: x + 0.1 * (i == 0))


def test_a_plan_begun_in_its_middle_reads_nothing_of_the_steps_before():
    steps = (
        StepPlan(order=2, corrector="exact"),
        StepPlan(order=2),
        StepPlan(order=3, variable="tau", start=1),
        StepPlan(weights=(1.5, -0.5)),
        StepPlan(order=3, start=2),
    )
    levels = (None, -1.0, 0.0, 1.0, 2.0)
    scheduler = FewstepScheduler.from_plan(SolverPlan(levels=levels, steps=steps), TABLE)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    start = x = noise(2, 4)
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(Bent()(x, t), t, x).prev_sample
    rest = (steps[2].model_copy(update={"start": 0}), *steps[3:])
    plan = SolverPlan(levels=levels[2:], steps=rest)
    torch.testing.assert_close(x, sample(read_config(TABLE).schedule.wrap(Bent()), start, plan), rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)  # the weights are for two guesses, and one is known
    x = start
    for t in scheduler.timesteps[3:]:
        x = scheduler.step(Bent()(x, t), t, x).prev_sample
    plan = SolverPlan(levels=levels[3:], steps=(StepPlan(order=2), StepPlan(order=3, start=1)))
    torch.testing.assert_close(x, sample(read_config(TABLE).schedule.wrap(Bent()), start, plan), rtol=1e-6, atol=1e-6)


def test_a_solver_may_write_its_memory_between_two_calls_of_a_step():
    class Diary(Heun):
        """Heun's rule, that counts its calls in its memory, and adds the count to its answer."""

        name = "diary"

        def step(self, model, x, i, state, cond, rng):
            def ask(*given):
                answer = model(*given)
                state.history.append(x)
                return answer

            x, state = super().step(ask, x, i, state, cond, rng)
            return x + len(state.history), state

    scheduler = FewstepScheduler.from_config(TABLE, solver="heun", grid="uniform")
    scheduler._solver = Diary()
    x = noise(2, 4)
    reading = read_config(TABLE)
    wanted = sample(reading.schedule.wrap(Bent()), x, grid(reading.schedule.path, 3, "uniform"), Diary())
    torch.testing.assert_close(driven(scheduler, Bent(), x, 5), wanted, rtol=1e-5, atol=1e-5)


def test_a_solver_that_asks_inside_its_steps_refuses_a_sample_that_changed_there():
    scheduler = FewstepScheduler.from_config(TABLE, solver="heun")
    with pytest.raises(Refused, match="heun calls the network inside its steps"):
        driven(scheduler, Bent(), noise(2, 4), 5, change=lambda i, x: x + 0.1 * (i == 0))
    driven(scheduler, Bent(), noise(2, 4), 5, change=lambda i, x: x + 0.1 * (i == 1))  # between steps: fine


def test_noise_is_added_at_the_runs_place_or_at_any_timesteps_outside_one():
    scheduler = FewstepScheduler.from_config(FLOW, solver="dpm2m", grid="logsnr")
    data, eps = noise(3, 4), noise(3, 4, seed=1)
    at = scheduler.scale_noise(data, torch.tensor([250.0, 500.0, 1000.0]), eps)
    part = torch.tensor([[0.25], [0.5], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(at, (1 - part) * data + part * eps)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    t = scheduler._route.times[2]
    wrong = torch.tensor([17.0])  # the index says it, not the value
    assert torch.equal(scheduler.scale_noise(data, wrong, eps), (1 - t) * data + t * eps)
    for _ in range(3):
        t = scheduler._route.times[(scheduler.step_index or 2)]
        scheduler.step(Bent()(data, 0.0), wrong, data)
    assert torch.equal(scheduler.add_noise(data, eps, wrong), data)  # after the last: clean


def test_the_start_is_as_noisy_as_its_level():
    for config, sigma in ((TABLE, 1.0), (FLOW, 1.0), (EDM, 80.0)):
        scheduler = FewstepScheduler.from_config(config, solver="euler")
        assert scheduler.init_noise_sigma == pytest.approx(sigma)
        scheduler.set_timesteps(4)
        assert scheduler.init_noise_sigma == pytest.approx(sigma)
    one = FewstepScheduler.from_config(FLOW)
    one.set_timesteps(1)
    assert one.sigmas.tolist() == [1.0, 0.0]
    scheduler.set_timesteps(sigmas=[20.0, 1.0])
    assert scheduler.init_noise_sigma == pytest.approx(20.0)
    assert scheduler.sigmas.tolist() == pytest.approx([20.0, 1.0, 0.0])


def test_limits_are_kept_where_the_pipelines_scheduler_had_them_and_nowhere_else():
    big = torch.full((2, 4), 3.0)
    big[0, 0] = -5.0

    def last(**config):
        config = {"_class_name": "DDPMScheduler", "prediction_type": "sample", **config}
        return driven(FewstepScheduler.from_config(config, solver="euler"), lambda x, t: big, noise(2, 4).float(), 3)

    torch.testing.assert_close(last(clip_sample=False), big)
    torch.testing.assert_close(last(), big.clamp(-1, 1))  # clip_sample is the stock default of DDPM
    torch.testing.assert_close(last(clip_sample_range=2.0), big.clamp(-2, 2))
    held = last(clip_sample=False, thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=4.0)
    torch.testing.assert_close(held, torch.stack([big[0].clamp(-4, 4) / 4, big[1] / 3]))
    # a setting that an earlier scheduler left behind limits nothing: DPM-Solver does not clip
    hidden = {"_class_name": "DPMSolverMultistepScheduler", "clip_sample": True}
    torch.testing.assert_close(last(**hidden), big)


def test_learned_variances_are_left_out():
    scheduler = FewstepScheduler.from_config({"_class_name": "DDPMScheduler", "variance_type": "learned_range"})
    x = noise(2, 3, 4, 4)
    both = torch.cat([torch.tanh(x), noise(2, 3, 4, 4, seed=1)], 1)
    scheduler.set_timesteps(2)
    assert scheduler.step(both, scheduler.timesteps[0], x).prev_sample.shape == x.shape
    other = FewstepScheduler.from_config(TABLE)
    other.set_timesteps(2)
    with pytest.raises(Refused, match=r"the network answers \[2, 6, 4, 4\] to a sample \[2, 3, 4, 4\]"):
        other.step(both, other.timesteps[0], x)


def test_a_network_that_jumps_to_clean_data_is_not_integrated():
    scheduler = FewstepScheduler.from_config({"_class_name": "LCMScheduler", "clip_sample": False})
    scheduler.set_timesteps(4)
    assert scheduler._route.solver.name == "consistency"
    told = FewstepScheduler.from_config(scheduler.config, solver="recommended")  # the network is a teacher after all
    told.set_timesteps(4)
    assert told._route.times == recommended(told._reading.schedule.path, 4).times(told._reading.schedule.path)
    stock = diffusers.LCMScheduler()
    stock.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(stock.timesteps.tolist(), abs=1e-3)


def test_settings_survive_a_file(tmp_path):
    made = FewstepScheduler.from_config({**FLOW, "shift": 2.5}, solver="unipc3", grid="logsnr")
    made.save_pretrained(str(tmp_path))
    again = FewstepScheduler.from_pretrained(str(tmp_path))
    for key in ("solver", "grid", "plan", "replaces", "shift"):
        assert again.config[key] == made.config[key], key
    again.set_timesteps(5)
    made.set_timesteps(5)
    assert again._route.times == made._route.times
    again.register_to_config(shift=1.0)  # as pipelines do
    again.set_timesteps(5)
    assert again._route.times == pytest.approx(grid(Straight(), 5, "logsnr").tolist())
    changed = FewstepScheduler.from_config(again.config, solver=None, grid=None, shift=1.0)
    assert (changed.config.solver, changed.config.shift) == (None, 1.0)


PLAN = SolverPlan(levels=(None, 0.0), steps=(StepPlan(), StepPlan(order=2)))
REFUSALS = {
    "solver": (lambda: FewstepScheduler(solver="unipc33"), UnknownName, "sampler 'unipc33': did you mean 'unipc3'"),
    "grid": (lambda: FewstepScheduler(solver="euler", grid="logsmr"), Refused, "grid 'logsmr': did you mean 'logsnr'"),
    "plan and solver": (lambda: FewstepScheduler(solver="euler", plan=PLAN.model_dump()), Refused, "brings its own"),
    "not a plan": (lambda: FewstepScheduler(plan={"levels": [1.0, 0.0], "steps": [{}, {}]}), Refused, "must rise"),
    "unbound": (lambda: FewstepScheduler().set_timesteps(4), Refused, "from_config"),
    "plan length": (
        lambda: FewstepScheduler.from_plan(PLAN, TABLE).set_timesteps(8),
        Refused,
        "the plan is for 2 calls, num_inference_steps is 8: pass num_inference_steps=2",
    ),
    "plan level": (
        lambda: FewstepScheduler.from_plan(
            SolverPlan(levels=(-9.0, 0.0), steps=PLAN.steps), TABLE
        ).set_timesteps(2),
        Refused,
        "does not reach the plan's level",
    ),
    "plan and sigmas": (
        lambda: FewstepScheduler.from_plan(PLAN, FLOW).set_timesteps(sigmas=[1.0, 0.2]), Refused, "its own levels",
    ),
    "calls": (
        lambda: FewstepScheduler.from_config(TABLE, solver="heun").set_timesteps(6),
        Refused,
        "heun cannot make 6 calls of the network: take 5 or 7",
    ),
    "no steps": (lambda: FewstepScheduler.from_config(TABLE).set_timesteps(0), Refused, "at least 1, got 0"),
    "mu": (lambda: FewstepScheduler.from_config(TABLE).set_timesteps(4, mu=1.0), Refused, "mu, the shift of a flow"),
    "no mu": (
        lambda: FewstepScheduler.from_config({**FLOW, "use_dynamic_shifting": True}).set_timesteps(4),
        Refused,
        "needs mu",
    ),
    "both lists": (
        lambda: FewstepScheduler.from_config(FLOW).set_timesteps(sigmas=[1.0, 0.4], timesteps=[1000, 400]),
        Refused,
        "reads other times",
    ),
    "rising": (
        lambda: FewstepScheduler.from_config(TABLE, solver="euler").set_timesteps(timesteps=[10, 500]),
        Refused,
        "descend",
    ),
    "setting": (lambda: FewstepScheduler.from_config({**FLOW, "shfit": 3}), Refused, "'shfit': did you mean 'shift'"),
    "option": (lambda: FewstepScheduler.from_config(FLOW, sovler="euler"), Refused, "has no setting 'sovler'"),
    "class": (lambda: FewstepScheduler.from_config({"_class_name": "DIMScheduler"}), Refused, "mean 'DDIMScheduler'"),
    "churn": (
        lambda: driven(
            FewstepScheduler.from_config({**TABLE, "beta_schedule": "scaled_linear"}, solver="churn"),
            Bent(),
            noise(2, 4),
            5,
        ),
        Refused,
        "churn noises the sample before its first call",
    ),
    "nameless": (lambda: FewstepScheduler.from_config({"beta_start": 1e-4}), Refused, "add its '_class_name'"),
    "inverted": (lambda: FewstepScheduler.from_config({**FLOW, "invert_sigmas": True}), Refused, "invert_sigmas"),
    "continuous": (
        lambda: FewstepScheduler.from_config(
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"}
        ),
        Refused,
        "sigma_min and sigma_max: name both",
    ),
    "prediction": (
        lambda: FewstepScheduler.from_config({**TABLE, "prediction_type": "noise"}), Refused, "prediction type 'noise'",
    ),
    "a path": (lambda: FewstepScheduler.from_config("folder"), Refused, "got str"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_line(case):
    make, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message) as found:
        make()
    assert "\n" not in str(found.value)


def test_a_plan_that_leaves_blocks_out_is_refused():
    plan = {"levels": [None, 0.0], "steps": [{}, {"skip": ["blocks.1"]}]}
    with pytest.raises(Refused, match="leaves blocks of the network out"):
        FewstepScheduler(plan=plan)


def test_a_run_is_begun_once_and_ends():
    scheduler = FewstepScheduler.from_config(TABLE, solver="dpm3m")
    x = noise(2, 4)
    with pytest.raises(Refused, match="call set_timesteps"):
        scheduler.step(x, 999, x)
    first, second = (driven(scheduler, Bent(), x, 4) for _ in range(2))
    assert torch.equal(first, second)  # nothing is left of the run before
    with pytest.raises(Refused, match="all 4 calls of this run were made"):
        scheduler.step(x, 0, x)


def test_the_package_offers_it_without_importing_diffusers_before_it_is_asked_for():
    import fewstep

    assert fewstep.FewstepScheduler is FewstepScheduler
    with pytest.raises(AttributeError, match="has no attribute 'FewstepSheduler'"):
        fewstep.FewstepSheduler


def test_stochastic_noise_is_the_same_as_in_our_loop_in_float32():
    scheduler = FewstepScheduler.from_config(FLOW, solver="restart", grid="uniform")
    x = noise(2, 4, dtype=torch.float32)
    source = torch.Generator().manual_seed(3)
    driven(scheduler, Bent(), x, 7, source)
    other = torch.Generator().manual_seed(3)
    normal(x, other)
    assert torch.equal(source.get_state(), other.get_state())  # one draw, however often its step was taken anew
