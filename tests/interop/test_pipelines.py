"""Text pipelines of eleven kinds and three families: in through the recorder, out as the same class."""

import functools
import inspect
import json
import math

import pytest
import torch

from fewstep.denoiser import Guided
from fewstep.errors import Refused
from fewstep.interop import Contract, checking, load_student, load_teacher, record, save_student
from fewstep.interop.recorder import embed
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.student import Student
from fewstep.tasks.prompts import Prompts, PromptsOptions
from fewstep.train.recipe import recipe_from
from fewstep.train.trainer import Trainer

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

EVEN = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}
TWO = {1: (1.0,), 2: (1.0, 0.6)}
# step counts and what happens between steps: both are served by every family
STEPS = {
    "sd15": (EVEN, "ode"),
    "sd_inpaint": (EVEN, "ode"),
    "sd_img2img": (EVEN, "ode"),
    "sdxl": (TWO, "renoise"),
    "sd3": (EVEN, "ode"),
    "flux": ({1: (1.0,), 3: (1.0, 0.9, 0.35)}, "renoise"),
    "flux2": (TWO, "ode"),
    "pixart": ({1: (1.0,), 3: (1.0, 0.9, 0.35)}, "ode"),
    "sana": (TWO, "renoise"),
    "qwen": (EVEN, "ode"),
    "z_image": (TWO, "renoise"),
    # 1000, 937, 833, 625: an even grid, shifted by 5
    "wan": ({1: (1.0,), 2: (1.0, 5 / 6), 4: (1.0, 0.9375, 5 / 6, 0.625)}, "ode"),
}
KINDS = tuple(STEPS)
PROMPTS = ["a photo of a red boat", "two dogs in the snow", "one blue house"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import zoo

    root = tmp_path_factory.mktemp("pipelines")

    def folder(kind):
        if not (root / kind).exists():
            zoo.build(kind).save_pretrained(str(root / kind))
        return root / kind

    return folder


@pytest.fixture(scope="module")
def teacher_of(folders):
    """Teachers by kind, each loaded once."""
    import zoo

    loaded = {}

    def teacher(kind):
        if kind not in loaded:
            loaded[kind] = load_teacher(folders(kind), call=zoo.CALLS[kind])
        return loaded[kind]

    return teacher


def distilled(teacher, kind, place):
    """A student after five steps of distribution matching on prompts alone."""
    times, policy = STEPS[kind]
    student = Student.like(teacher.denoiser, teacher.shape, start=1.0, steps=times, policy=policy)
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    task = Prompts(PromptsOptions(path=str(place / "prompts.txt"))).asked(teacher.embed, teacher.shape)
    options = DMD2Options(critic_turns=1, steps=max(times), guidance=teacher.guidance or 1.0)
    recipe = recipe_from({
        "steps": 5, "batch": 2, "task": {"name": "prompts", "options": {"path": "-"}}, "optim": {"lr": 1e-2},
        "teacher": {"source": "-"}, "method": {"name": "dmd2"}, "ema": {"decay": 0.0}, "checkpoint": {"every": 5},
    })  # fmt: skip
    before = [p.detach().clone() for p in student.parameters()]
    fitted = Trainer(recipe, place / "run").fit(DMD2(teacher.denoiser, student, options), task)
    assert any(not torch.equal(a, b) for a, b in zip(before, fitted.parameters(), strict=True))
    return fitted.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shipped(teacher_of, tmp_path_factory):
    """Every student's folder, and what one process that never imports this package made of all of them."""
    root = tmp_path_factory.mktemp("students")
    students, broken = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        # saved folders are run below, all in one fresh process: its imports cost more than the models
        patch.setattr(checking, "_fresh_process", lambda folder, timeout: ({1: 0.0}, ""))
        for kind in KINDS:
            try:
                (root / kind).mkdir()
                students[kind] = distilled(teacher_of(kind), kind, root / kind)
                save_student(students[kind], root / kind / "student", method="dmd2", teacher=teacher_of(kind))
            except Exception as error:
                broken[kind] = error
    kinds = [kind for kind in KINDS if kind not in broken]
    found = checking.fresh_processes([root / kind / "student" for kind in kinds], 600)
    answers = dict(zip(kinds, found, strict=True))

    def look(kind):
        if kind in broken:
            raise broken[kind]
        errors, message = answers[kind]
        assert not message
        return root / kind / "student", students[kind], errors

    return look


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_distilled_student_gives_its_golden_sample_in_plain_diffusers_at_every_stated_count(
    shipped, teacher_of, kind
):
    folder, student, errors = shipped(kind)
    assert set(errors) == set(STEPS[kind][0])
    assert max(errors.values()) <= 1e-4
    contract = Contract.load(folder)
    assert contract.pipeline == teacher_of(kind).kind
    for count, times in STEPS[kind][0].items():
        assert contract.step(count).times == pytest.approx(times, abs=1.1e-3)  # an entry of a table of a thousand


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux", "wan"])
def test_a_student_of_a_text_pipeline_comes_back_as_it_was(shipped, kind, recwarn):
    folder, student, _ = shipped(kind)
    loaded = load_student(folder)
    assert not [w for w in recwarn if "golden sample" in str(w.message)]
    wanted, got = student.state_dict(), loaded.student.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.slow
def test_a_safety_checker_stays_and_a_served_kind_gets_its_block_without_a_warning(shipped, caplog):
    index = json.loads((shipped("sd15")[0] / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert "dmd2_config" not in index
    folder = shipped("wan")[0]
    block = json.loads((folder / "model_index.json").read_text())["dmd2_config"]
    assert (block["num_inference_steps"], block["solver"], block["guidance_scale"]) == (4, "ode", 1.0)
    assert block["denoising_timesteps"] == pytest.approx([1000, 937.5, 833.3, 625], abs=0.6)
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    finally:
        logging.disable_propagation()
    assert "dmd2_config" not in caplog.text


# -- what reaches the network -----------------------------------------------------------------------


def heard(network, run):
    """The arguments of every call that a run makes, by name."""
    seen = []
    signature = inspect.signature(type(network).forward)

    def listen(module, args, kwargs):
        seen.append(dict(signature.bind(module, *args, **kwargs).arguments))

    handle = network.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen


def halves(calls, rows):
    """The two sides of a guidance pair: halves of one call, or two calls; or the one side that there is."""
    if len(calls) == 2:
        return [flat(call) for call in calls]
    whole = flat(calls[0])

    def size(value):
        return len(value) if isinstance(value, list) or (torch.is_tensor(value) and value.ndim) else 0

    if not any(size(value) == 2 * rows for value in whole.values()):
        return [whole]
    return [
        {k: v[part] if size(v) == 2 * rows else v for k, v in whole.items()}
        for part in (slice(0, rows), slice(rows, None))
    ]


def flat(arguments, prefix=""):
    found = {}
    for key, value in arguments.items():
        if key == "self":
            continue
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def alike(one, other):
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one.double(), other.double())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_negative_prompts_and_guidance_reach_the_network_as_in_the_pipelines_own_call(teacher_of, kind):
    import zoo

    teacher = teacher_of(kind)
    pipe, network = teacher.pipeline, teacher.recording.network
    guided = teacher.guidance is not None
    steps = []
    plain = pipe.scheduler.step

    @functools.wraps(plain)
    def step(output, t, sample, *args, **kwargs):
        steps.append((output.clone(), float(t), sample.clone()))
        return plain(output, t, sample, *args, **kwargs)

    pictures = {k: v for k, v in teacher.recording.call.items() if k in ("image", "mask_image", "strength")}
    call = {**zoo.CALLS[kind], **pictures, "prompt": list(PROMPTS), "output_type": "latent"}
    own = "negative_prompt" not in inspect.signature(type(pipe).__call__).parameters
    if guided and not own:
        call["negative_prompt"] = ["ugly, blurry"] * len(PROMPTS)
    call["generator"] = torch.Generator().manual_seed(0)
    call["num_inference_steps"] = 3  # as in the recording: the draws behind a mask are the same
    pipe.scheduler.step = step
    try:
        calls = heard(network, lambda: pipe(**call))
    finally:
        del pipe.scheduler.step
    sides = halves(calls[: len(calls) // 3], len(PROMPTS))
    assert len(sides) == (2 if guided else 1)

    output, time, sample = steps[0]
    rows = len(PROMPTS)
    conds = [teacher.embed(PROMPTS)]
    if guided:
        conds.append(teacher.null(conds[0]) if own else teacher.embed(PROMPTS, negative="ugly, blurry"))
    net = teacher.denoiser.net
    frame = sample if teacher.schedule.clock == "1000t" else sample / (1 + sigma_at(pipe.scheduler) ** 2) ** 0.5
    for cond in conds:
        ours = flat(heard(network, lambda cond=cond: net(frame, torch.full((rows,), time), cond))[0])
        matching = [
            side for side in sides if all(matches(name, value, ours, teacher, rows) for name, value in side.items())
        ]
        assert len(matching) == 1, {n: s for n, s in ours.items() if not any(alike(s, side.get(n)) for side in sides)}

    if guided and not teacher.recording.mix.rescaled:
        wide = Guided(net_as_denoiser(teacher), teacher.guidance, lambda _: conds[1])
        t = (time + 1) / 1000 if teacher.schedule.clock == "index" else time / 1000
        with torch.no_grad():
            answer = wide(frame, t, conds[0], teacher.schedule.prediction)
        torch.testing.assert_close(answer, output[:rows, : answer.shape[1]], rtol=1e-3, atol=1e-3)


def sigma_at(scheduler):
    """Where the sample stands in a scheduler that counts sigma over alpha; 0 in one that keeps the variance."""
    return float(scheduler.sigmas[0]) if type(scheduler).__name__.startswith("Euler") else 0.0


def net_as_denoiser(teacher):
    return teacher.schedule.wrap(teacher.denoiser.net)


def matches(name, value, ours, teacher, rows):
    recording = teacher.recording
    if name == recording.state:
        a, b = recording.form.take(value), recording.form.take(ours[name])
        return torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    if name == recording.clock:
        return torch.allclose(torch.as_tensor(value).float(), ours[name].float(), rtol=1e-6)
    mine = ours[name]
    if any(name in group for group in recording.layouts.groups) and torch.is_tensor(mine):
        # a batch may be padded further than the pipeline pads this one; what is behind must be nothing
        width = mine.shape[1] if value is None else value.shape[1]
        behind, mine = mine[:, width:], mine[:, :width]
        if behind.any():
            return False
        if value is None:  # left out where every token of every row is text
            return bool((mine == mine[:1]).all())
    return alike(mine, value)


def test_a_prompt_answers_the_same_alone_and_among_longer_ones(teacher_of):
    for kind in ("qwen", "z_image"):
        teacher = teacher_of(kind)
        x = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(0))
        some = teacher.embed(["one dog", "two red boats on a quiet lake , the blue house"])
        alone = teacher.embed(["one dog"])
        with torch.no_grad():
            first = teacher.denoiser(x, 0.5, {k: v[:1] for k, v in some.items()})
            torch.testing.assert_close(first, teacher.denoiser(x, 0.5, alone), rtol=1e-4, atol=1e-4)
        wide = teacher.embed(["one dog"], width=40)
        assert {v.shape[1] for v in wide.values() if v.ndim > 1} == {40}
        with pytest.raises(Refused, match="more than the 2 asked for"):
            teacher.embed(["one dog"], width=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_autoencoder_is_used_as_the_pipeline_uses_it(teacher_of, kind):
    import zoo

    teacher = teacher_of(kind)
    pictures = {k: v for k, v in teacher.recording.call.items() if k in ("image", "mask_image", "strength")}
    call = {**zoo.CALLS[kind], **pictures, "prompt": PROMPTS[:2], "num_inference_steps": 2, "output_type": "pt"}
    last = []
    plain = teacher.pipeline.scheduler.step

    @functools.wraps(plain)
    def step(*args, **kwargs):
        last.append(plain(*args, **kwargs)[0])
        return (last[-1],)

    teacher.pipeline.scheduler.step = step
    try:
        with torch.no_grad():
            made = teacher.pipeline(**call, generator=torch.Generator().manual_seed(0))[0]
    finally:
        del teacher.pipeline.scheduler.step
    decoded = (teacher.decode(last[-1]) / 2 + 0.5).clamp(0, 1)
    if decoded.ndim == 5:
        decoded = decoded.movedim(1, 2)
    if kind != "sd15":  # its safety checker may blacken pictures
        torch.testing.assert_close(decoded, made, rtol=1e-3, atol=1e-3)
    data = torch.rand((2, 3, *decoded.shape[-2:]), generator=torch.Generator().manual_seed(1)) * 2 - 1
    if decoded.ndim == 5:
        data = data[:, :, None].expand(-1, -1, 5, -1, -1)
    latents = teacher.encode(data)
    assert latents.shape[1:] == teacher.shape
    vae, codec = teacher.pipeline.vae, teacher.recording.codec
    with torch.no_grad():
        held = vae.encode(data[:, :, None] if data.ndim == 4 and len(codec.shape) == 4 else data)
    code = held.latent_dist.mode() if hasattr(held, "latent_dist") else held.latent
    torch.testing.assert_close(codec.decode(latents), code, rtol=1e-4, atol=1e-4)


# -- networks that read sigma -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_pipeline_that_counts_sigma_is_read_and_its_student_begins_where_its_scheduler_does(tmp_path, here):
    import zoo
    from diffusers import EDMEulerScheduler

    pipe = zoo.build("sdxl")
    pipe.register_modules(scheduler=EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5))
    pipe.save_pretrained(str(tmp_path / "edm"))
    teacher = load_teacher(tmp_path / "edm")
    assert (teacher.denoiser.prediction, teacher.denoiser.clock, teacher.data_std) == ("edm", "log_sigma/4", 0.5)
    step = teacher.recording.steps[1]
    cond = teacher.recording.cond
    sigma = math.exp(4 * step.clock)
    with torch.no_grad():
        wide = Guided(teacher.denoiser, teacher.guidance)
        guess = wide(step.sample, sigma, cond)
        scheduler = teacher.pipeline.scheduler
        wanted = scheduler.precondition_outputs(step.sample, step.output, torch.tensor(sigma))
    torch.testing.assert_close(guess, wanted, rtol=1e-3, atol=1e-3)
    student = Student.like(teacher.denoiser, teacher.shape, start=80.0, steps={1: (80.0,), 2: (80.0, 1.5)})
    check = save_student(student, tmp_path / "student", teacher=teacher, method="test")
    assert check.ok
    assert check.steps == (1, 2)
    assert Contract.load(tmp_path / "student").start_scale == pytest.approx(math.sqrt(80**2 + 1))


# -- prompts alone, from the command line -----------------------------------------------------------


@pytest.mark.slow
def test_prompts_alone_distil_a_folder_from_the_command_line(folders, tmp_path, capsys):
    from fewstep.cli import main

    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    given = ["distill", str(folders("flux")), "--prompts", str(file), "--out", str(tmp_path / "run")]
    small = ["teacher.call.height=32", "teacher.call.width=32", "teacher.call.max_sequence_length=10"]
    short = ["steps=2", "batch=2", "method.options.critic_turns=1", "evaluate.enabled=false"]
    assert main([*given, *small, *short]) == 0
    contract = Contract.load(tmp_path / "run" / "student")
    assert (contract.pipeline, contract.prompts, contract.task) == ("FluxPipeline", True, "prompts")
    assert contract.step(1).call["guidance_scale"] == 3.5  # an input of the network: it stays
    assert 'pipe(prompt="a photo"' in (tmp_path / "run" / "student" / "README.md").read_text()
    capsys.readouterr()
    assert main([*given[:-1], str(tmp_path / "other"), *small, "--method", "consistency"]) == 2
    assert "learns from data" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*given[:-1], str(tmp_path / "other"), "--data", str(tmp_path)]) == 2
    assert "two sources" in capsys.readouterr().err


# -- what cannot be read ----------------------------------------------------------------------------


def test_inpainting_by_blending_is_refused(teacher_of):
    from diffusers import StableDiffusionInpaintPipeline

    parts = teacher_of("sd15").pipeline.components
    pipe = StableDiffusionInpaintPipeline(**{**parts, "safety_checker": None}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(Refused, match="changes the sample between steps"):
        record(pipe)


def test_guidance_that_is_not_linear_and_one_sample_are_refused_with_the_reason(teacher_of):
    pipe = teacher_of("sd15").pipeline
    with pytest.raises(Refused, match="in a way that is not linear"):
        record(pipe, {"guidance_rescale": 0.7})
    with pytest.raises(Refused, match="recorded with one sample"):
        record(pipe, {"prompt": ["a photo"], "guidance_scale": 1.0})
    recording = record(pipe, {"guidance_scale": 1.0})
    with pytest.raises(Refused, match="recorded without guidance"):
        embed(pipe, recording, ["a photo"], negative="ugly")
