import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import jobs
from fewstep.denoiser import Centred, Guided, Reframed, Wrapped
from fewstep.errors import Failed, Refused
from fewstep.interop import (
    check_student,
    load_student,
    load_teacher,
    refuse_homeless,
    save_student,
    save_teacher,
    weights_sha256,
)
from fewstep.interop.plain import karras_grid
from fewstep.methods.families.matching import Matching
from fewstep.methods.score_gap import TDM
from fewstep.nets import MLP, DiT, DiTConfig, MLPConfig, UNet, UNetConfig
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.registry import METHODS
from fewstep.student import Student
from fewstep.train.build import make_student
from fewstep.train.recipe import recipe_from

UNET = UNetConfig(shape=(1, 8, 8), widths=(8, 16), groups=4, classes=3)
LABELLED = "ConsistencyModelPipeline"
PLAIN = UNET.model_copy(update={"classes": None})


def edm(net):
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    return Wrapped(net, path, "cm", "250 log_sigma", scale_input=True, data_std=0.75, boundary=0.002)


def unet(config=UNET, seed=0):
    torch.manual_seed(seed)
    net = UNet(config).eval()
    with torch.no_grad():
        for value in net.parameters():  # nothing stays zero, so that an error shows
            value.add_(0.05 * torch.randn_like(value))
    return net


def students_of(teacher):
    """A student of a pipeline's teacher, its weights moved a little."""
    start = {"cm": 3.0}.get(teacher.name, 1.0)
    if teacher.name == "cm":
        steps, policy = {1: (3.0,), 2: (3.0, 0.7)}, "renoise"
    else:
        steps, policy = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}, "ode"
    student = Student.like(teacher.denoiser, teacher.shape, start=start, steps=steps, policy=policy)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=rng))
    return student


@pytest.mark.parametrize("straight", [False, True], ids=["its own path", "seen on the straight one"])
def test_a_one_step_flow_map_is_saved_with_the_jump_it_makes(here, tmp_path, straight):
    """A jump is told in straight time: on the exploding path from sigma 20 it is 20/21 long, not 20."""
    denoiser = edm(unet(UNET.model_copy(update={"reads_s": True})))
    if straight:
        denoiser = Reframed(denoiser, Straight(end=20 / 21))
    student = Student(denoiser, (1, 8, 8), classes=3).eval()
    assert save_student(student, tmp_path / "s", method="meanflow").ok
    noise, cond = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
    loaded = load_student(tmp_path / "s").student
    assert torch.allclose(loaded.generate(noise, cond), student.generate(noise, cond), atol=1e-4)
    with torch.no_grad():  # that the length matters to this network
        wrong = student.unframed().denoiser.net.fold(20.0)
        student.unframed().denoiser.net = wrong
    assert not torch.allclose(loaded.generate(noise, cond), student.generate(noise, cond), atol=1e-2)


@pytest.mark.parametrize("clock", ["t", "log_sigma/4"])
def test_a_network_that_is_steep_in_a_slow_clock_answers_the_same_in_the_schedulers_units(here, tmp_path, clock):
    """250 ln sigma in float32 is off by 1e-5: in units of t, a step that such a network sees."""
    net = unet()
    with torch.no_grad():
        net.time_embedding.linear_1.weight.mul_(300.0)
    student = Student(Wrapped(net, Straight(end=0.95), "velocity", clock), (1, 8, 8), classes=3).eval()
    noise, cond = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
    plain = student.generate(noise, cond)
    t = torch.full((4,), 0.95 * (1 + 3e-5))
    assert not torch.allclose(student(student.start_scale * noise, t, 0.0, cond), plain, atol=1e-4)
    assert save_student(student, tmp_path / "s", method="meanflow").max_error < 1e-5
    assert torch.allclose(load_student(tmp_path / "s").student.generate(noise, cond), plain, atol=1e-5)


# -- the fresh process ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dit", "cm"])
def test_a_student_of_every_pipeline_runs_in_plain_diffusers(teachers, tmp_path, request, kind):
    if kind in ("ddpm", "ddim"):
        request.getfixturevalue("here")  # the others pay for a fresh process
    teacher = teachers[kind]
    check = save_student(students_of(teacher), tmp_path / "s", teacher=teacher, method="test")
    assert check.ok
    assert check.steps == ((1, 2) if kind == "cm" else (1, 2, 4))
    assert check.max_error <= 1e-4
    assert json.loads((tmp_path / "s" / "model_index.json").read_text())["_class_name"] == teacher.kind
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_student(tmp_path / "s")
    assert loaded.contract.teacher.sha256 == teacher.sha256
    assert loaded.classes == teacher.classes


@pytest.mark.parametrize("entry", [e for e in METHODS if issubclass(e.thing, Matching)], ids=lambda e: e.name)
def test_a_student_of_every_row_of_distribution_matching_runs_in_plain_diffusers(teachers, tmp_path, here, entry):
    """As its method makes it: one step below the noisiest level, or a few at the times of the stock scheduler."""
    options = entry.thing.Options()
    several = options.steps > 1
    teacher = teachers["ddim" if several else "cm"]
    options = options.model_copy(update={"start": 1.0, "times": (1.0, 0.75, 0.5, 0.25)} if several else {"start": 2.5})
    made = entry.thing.student_options(options, teacher.denoiser.path)
    student = Student.like(teacher.denoiser, teacher.shape, **made)
    check = save_student(student, tmp_path / "s", teacher=teacher, method=entry.name)
    assert check.ok and check.max_error <= 1e-4
    assert check.steps == (options.steps,)
    loaded = load_student(tmp_path / "s")
    assert loaded.contract.method == entry.name
    assert loaded.contract.teacher.sha256 == teacher.sha256


ONE_STEP = {
    "consistency": {}, "consistency_trajectory": {}, "meanflow": {}, "oftsr": {}, "progressive": {}, "reflow": {},
    "regression": {}, "scale": {}, "self_e": {"steps": [1]}, "trajectory": {"steps": [1]},
}  # fmt: skip
SEVERAL = {  # with what a recipe says of the student
    "consistency": ({}, {"steps": [1, 2], "policy": "renoise"}), "consistency_trajectory": ({}, {"steps": [1, 2]}),
    "meanflow": ({"steps": [1, 2]}, {}), "progressive": ({"steps": 2, "finest": 4}, {}),
    "reflow": ({"steps": [1, 2]}, {}), "scale": ({"steps": [1, 2]}, {}), "self_e": ({"steps": [1, 2]}, {}),
    "trajectory": ({"steps": [1, 2]}, {}),
}  # fmt: skip


def student_made_by(method, options, student=None):
    """As a run makes it, from a teacher of ours: a copy that reads the jump, or stands on another path, if need be."""
    recipe = recipe_from(
        {
            "steps": 4,
            "task": {"name": "digits"},
            "method": {"name": method, "options": options},
            "student": student or {},
        }
    )
    task = SimpleNamespace(shape=(1, 8, 8), classes=3, data_std=0.75, joint=None)
    student = make_student(recipe, task, edm(unet()), task.shape).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=rng))
    return student


@pytest.mark.parametrize(("method", "options"), ONE_STEP.items(), ids=ONE_STEP)
def test_a_one_step_student_of_every_row_of_trajectories_runs_in_plain_diffusers(tmp_path, here, method, options):
    student = student_made_by(method, options)
    check = save_student(student, tmp_path / "s", method=method)
    assert check.ok and check.max_error <= 1e-4 and 1 in check.steps
    loaded = load_student(tmp_path / "s")
    assert loaded.contract.pipeline == LABELLED and loaded.contract.step(1).call is not None
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    torch.testing.assert_close(
        loaded.student.generate(noise, labels, steps=1), student.generate(noise, labels, steps=1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("method", "said"), SEVERAL.items(), ids=SEVERAL)
def test_a_few_step_student_of_every_row_of_trajectories_is_loaded_with_the_same_samples(tmp_path, here, method, said):
    student = student_made_by(method, *said)
    assert max(student.steps) > 1
    check = save_student(student, tmp_path / "s", method=method, program=False)
    assert check.ok and check.max_error <= 1e-4
    loaded = load_student(tmp_path / "s")
    assert set(loaded.student.steps) == set(student.steps)
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    for count in student.steps:
        again, was = (
            one.generate(noise, labels, torch.Generator().manual_seed(1), count) for one in (loaded.student, student)
        )
        torch.testing.assert_close(again, was, atol=1e-4, rtol=1e-4)
    if loaded.contract.pipeline is None:  # said plainly, in the card as well
        assert any("plain diffusers cannot run it" in line for line in check.messages)
        assert "plain diffusers cannot run it" in (tmp_path / "s" / "README.md").read_text()


def test_times_that_a_pipeline_cannot_step_to_are_refused_before_training(teachers):
    teacher = teachers["ddim"]

    def made(times):
        options = TDM.Options(start=1.0, times=times)
        return Student.like(teacher.denoiser, teacher.shape, **TDM.student_options(options, teacher.denoiser.path))

    with pytest.raises(Refused, match="4"):
        refuse_homeless(made(None), teacher)
    refuse_homeless(made((1.0, 0.75, 0.5, 0.25)), teacher)


def test_an_exported_program_runs_in_a_process_without_this_package(tmp_path):
    torch.manual_seed(0)
    net = MLP(MLPConfig(shape=(2,), width=16, depth=1, classes=3))
    student = Student(Wrapped(net, Straight(), "velocity", "1000t"), (2,), steps={1: (1.0,), 2: (1.0, 0.5)})
    check = save_student(student, tmp_path / "s", method="meanflow")
    assert check.ok
    assert check.steps == (1, 2)
    loaded = load_student(tmp_path / "s")
    assert (loaded.contract.program, loaded.contract.pipeline) == ("model.pt2", None)
    program = torch.export.load(str(tmp_path / "s" / "model.pt2")).module()
    for count in (1, 5, 64):  # the batch is free
        noise, labels = torch.randn(count, 2), torch.arange(count) % 3
        torch.testing.assert_close(program(noise, labels), loaded.student.generate(noise, labels))
    careful = check_student(tmp_path / "s")
    assert careful.ok
    assert "was not run" in careful.messages[0]


# -- every stock pair, in this process --------------------------------------------------------------


def test_renoising_consistency_students_stand_on_the_schedulers_grid(tmp_path, here):
    steps = {1: (2.5,), 2: (2.5, 0.8), 4: (2.5, 1.5, 0.8, 0.3)}
    student = Student(edm(unet()), (1, 8, 8), start=2.5, steps=steps, policy="renoise")
    check = save_student(student, tmp_path / "s", method="test")
    assert check.ok
    assert check.steps == (1, 2, 4)
    loaded = load_student(tmp_path / "s")
    for count, times in steps.items():
        kept = loaded.contract.step(count)
        assert kept.times == pytest.approx(times, rel=1e-4)
        assert kept.call is not None
    assert loaded.student.denoiser.path == student.path
    assert loaded.null(torch.tensor([0])).tolist() == [3]


def test_two_steps_need_no_list_of_indices(tmp_path, here):
    student = Student(edm(unet()), (1, 8, 8), start=20.0, steps={1: (20.0,), 2: (20.0, 0.8)}, policy="renoise")
    assert save_student(student, tmp_path / "s", method="test").ok
    kept = load_student(tmp_path / "s").contract.step(2)
    assert kept.call == {"num_inference_steps": 2}
    assert kept.times == pytest.approx((20.0, 0.8), rel=1e-9)


@pytest.mark.parametrize(
    ("denoiser", "pipeline", "scheduler"),
    [
        (lambda: Wrapped(unet(PLAIN), VariancePreserving(), "eps", "999t"), "DDIMPipeline", "DDIM"),
        (lambda: Wrapped(unet(PLAIN), VariancePreserving(zero_snr=True), "v", "999t"), "DDIMPipeline", "DDIM"),
        (lambda: Wrapped(unet(), VariancePreserving(schedule="cosine"), "x0", "999t"), LABELLED, "DDIM"),
        (lambda: Wrapped(unet(), VariancePreserving(), "v", "index"), LABELLED, "DDIM"),
        (lambda: Wrapped(unet(PLAIN), Straight(), "velocity", "1000t"), "DDPMPipeline", "FlowMatchEulerDiscrete"),
    ],
    ids=["eps", "zero-snr v", "labels x0", "labels v", "flow"],
)  # fmt: skip
def test_students_on_other_paths_run_in_stock_pairs(tmp_path, here, denoiser, pipeline, scheduler):
    one = denoiser()
    student = Student(one, (1, 8, 8), steps={1: (1.0,), 2: (1.0, 0.5)})
    check = save_student(student, tmp_path / "s", method="test")
    assert check.ok
    assert check.steps == (1, 2)
    index = json.loads((tmp_path / "s" / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == (pipeline, scheduler + "Scheduler")
    assert load_student(tmp_path / "s").student.path == one.path


@pytest.mark.parametrize("config", [UNET, PLAIN])
def test_students_that_renoise_on_a_table_run_with_the_lcm_scheduler(tmp_path, here, config):
    one = Wrapped(unet(config), VariancePreserving(zero_snr=True), "x0", "999t")
    student = Student(one, (1, 8, 8), steps={1: (1.0,), 3: (1.0, 2 / 3, 1 / 3)}, policy="renoise")
    check = save_student(student, tmp_path / "s", method="test")
    assert check.ok
    assert check.steps == (1, 3)


def test_a_student_that_starts_inside_the_table_starts_there_in_plain_diffusers(tmp_path, here):
    one = Wrapped(unet(PLAIN), VariancePreserving(schedule="scaled_linear"), "eps", "999t")
    student = Student(one, (1, 8, 8), start=399 / 999, start_scale=1.0)
    assert save_student(student, tmp_path / "s", method="test").ok
    scheduler = json.loads((tmp_path / "s" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["num_train_timesteps"] == 400


@pytest.mark.parametrize(
    ("denoiser", "options"),
    [
        (lambda net: Wrapped(net, Straight(), "velocity", "1000t"), {}),
        (lambda net: Wrapped(net, Straight(), "x0", "1000t"), {}),
        (lambda net: Wrapped(net, Straight(), "velocity", "t"), {"start": 0.9}),
        (lambda net: Wrapped(net, Exploding(), "edm", "log_sigma/4", scale_input=True, data_std=0.5), {}),
        (lambda net: Wrapped(net, Exploding(), "edm_v", "log_sigma/4", scale_input=True, data_std=0.5), {}),
        (lambda net: Wrapped(net, VariancePreserving(), "v", "t"), {}),
    ],
    ids=["velocity", "clean image", "short start", "edm", "edm v", "v"],
)
def test_any_one_step_unet_with_labels_folds_into_a_consistency_function(tmp_path, here, denoiser, options):
    student = Student(denoiser(unet()), (1, 8, 8), **options)
    check = save_student(student, tmp_path / "s", method="test")
    assert check.ok
    assert json.loads((tmp_path / "s" / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"
    noise, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    wanted, got = student.generate(noise, labels), load_student(tmp_path / "s").student.generate(noise, labels)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_one_step_flow_map_ships_without_its_second_time(tmp_path, here):
    net = unet(UNET.model_copy(update={"reads_s": True}))
    student = Student(Wrapped(net, Straight(), "velocity", "1000t"), (1, 8, 8))
    assert save_student(student, tmp_path / "s", method="meanflow").ok
    loaded = load_student(tmp_path / "s")
    assert not loaded.student.denoiser.net.reads_s
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        loaded.student.generate(noise, labels), student.generate(noise, labels), rtol=1e-4, atol=1e-4
    )


def test_a_flow_map_of_several_steps_is_our_own_folder(tmp_path):
    net = unet(UNET.model_copy(update={"reads_s": True}))
    student = Student(Wrapped(net, Straight(), "velocity", "1000t"), (1, 8, 8), steps={1: (1.0,), 2: (1.0, 0.5)})
    check = save_student(student, tmp_path / "s", method="meanflow", program=False)
    assert check.ok
    assert "plain diffusers cannot run it" in check.messages[-1]
    assert load_student(tmp_path / "s").student.denoiser.net.reads_s


def test_the_grid_holds_every_level_or_says_so():
    for inner in ((0.8,), (5.0, 1.0, 0.3), (19.0,), (0.01,), (2.4, 2.3)):
        count, rho = karras_grid(20.0, 0.002, inner)
        ends = 20.0 ** (1 / rho), 0.002 ** (1 / rho)
        grid = [(ends[0] + i / (count - 1) * (ends[1] - ends[0])) ** rho for i in range(count)]
        assert all(min(abs(g / sigma - 1) for g in grid) < 1e-4 for sigma in inner)


# -- what a folder holds ----------------------------------------------------------------------------


def test_a_folder_holds_card_contract_golden_and_samples(tmp_path, here):
    student = Student(edm(unet()), (1, 8, 8), start=2.5)
    save_student(
        student, tmp_path / "s", method="dmd2", name="small", licence="mit", task="digits", guidance=1.5,
        metrics={"frechet": 0.4}, training={"steps": 10}, table=[{"model": "student", "frechet": 0.4}],
        pictures=torch.zeros(4, 8, 8, 1, dtype=torch.uint8), recipe_sha256="a" * 64, value_range=(-1.0, 1.0),
    )  # fmt: skip
    assert {f.name for f in (tmp_path / "s").iterdir()} == {
        "model_index.json", "unet", "scheduler", "fewstep.json", "golden.safetensors", "README.md", "samples.png",
    }  # fmt: skip
    text = (tmp_path / "s" / "README.md").read_text()
    assert text.startswith('---\nlicense: "mit"\nlibrary_name: diffusers\n')
    for line in ("## Generated media", "| student | 0.4 |", "Guidance 1.5", "num_inference_steps=1"):
        assert line in text
    contract = load_student(tmp_path / "s").contract
    assert (contract.name, contract.method, contract.task, contract.licence) == ("small", "dmd2", "digits", "mit")
    assert contract.guidance.baked == 1.5
    assert contract.metrics == {"frechet": 0.4}
    assert weights_sha256(tmp_path / "s")
    image = pytest.importorskip("PIL.Image").open(tmp_path / "s" / "samples.png")
    assert image.text["model"] == "small"


def test_the_cards_five_lines_run(tmp_path, here, monkeypatch):
    save_student(Student(edm(unet()), (1, 8, 8), start=2.5), tmp_path / "s", method="test")
    code = (tmp_path / "s" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "s")
    space = {}
    exec(code, space)
    assert len(space["images"]) == 4
    assert len(code.strip().splitlines()) <= 5


def test_the_licence_and_the_range_are_the_teachers(tmp_path, here):
    from fewstep.interop import save_teacher

    save_teacher(edm(unet()), tmp_path / "t", shape=(1, 8, 8), name="t", method="m", licence="cc-by-4.0")
    teacher = load_teacher(tmp_path / "t")
    save_student(Student.like(teacher.denoiser, (1, 8, 8)), tmp_path / "s", teacher=teacher, method="dmd2")
    contract = load_student(tmp_path / "s").contract
    assert (contract.licence, contract.teacher.licence, contract.teacher.name) == ("cc-by-4.0", "cc-by-4.0", "t")
    assert contract.value_range == (-1.0, 1.0)
    assert contract.null_label == 3


# -- what goes wrong --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small folder of ours that no stock pipeline runs: the quickest to check."""
    torch.manual_seed(0)
    net = MLP(MLPConfig(shape=(2,), width=8, depth=1))
    folder = tmp_path_factory.mktemp("saved") / "s"
    save_student(Student(Wrapped(net, Straight(), "velocity", "t"), (2,)), folder, method="test", program=False)
    return folder


def test_nothing_is_written_when_the_check_fails(tmp_path, monkeypatch):
    from fewstep.interop import checking as module

    monkeypatch.setattr(module, "_fresh_process", lambda folder, timeout: ({1: 0.5}, ""))
    with pytest.raises(Failed, match=r"1 step\(s\) differ from the golden sample by 5\.00e-01"):
        save_student(Student(edm(unet()), (1, 8, 8)), tmp_path / "s", method="test")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_when_the_fresh_process_dies(tmp_path, monkeypatch):
    from fewstep.interop import checking as module

    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('no luck today')")
    monkeypatch.setattr(module, "SCRIPT", script)
    with pytest.raises(Failed, match="no luck today"):
        save_student(Student(edm(unet()), (1, 8, 8)), tmp_path / "out" / "s", method="test")
    assert not list((tmp_path / "out").iterdir())


def test_a_student_with_bad_weights_is_not_written(tmp_path):
    net = unet()
    net.conv_in.weight.data[0] = float("nan")
    with pytest.raises(Refused, match=r"NaN or an infinity in 'conv_in\.weight'"):
        save_student(Student(edm(net), (1, 8, 8)), tmp_path / "s", method="test")
    assert not list(tmp_path.iterdir())


def test_only_a_wrapped_network_can_be_saved(tmp_path):
    with pytest.raises(Refused, match="holds Guided"):
        save_student(Student(Guided(edm(unet()), 2.0, lambda c: c), (1, 8, 8)), tmp_path / "s", method="test")


def test_a_recorded_network_needs_its_teacher(teachers, tmp_path):
    with pytest.raises(Refused, match="pass the teacher"):
        save_student(students_of(teachers["ddpm"]), tmp_path / "s", method="test")


def test_an_old_folder_is_kept_unless_it_is_ours_and_to_be_replaced(saved, tmp_path):
    student = load_student(saved).student
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="exists"):
            save_student(student, tmp_path / "precious", method="t", program=False, overwrite=overwrite)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"
    shutil.copytree(saved, tmp_path / "s")
    save_student(student, tmp_path / "s", method="newer", program=False, overwrite=True)
    assert load_student(tmp_path / "s").contract.method == "newer"
    assert {f.name for f in tmp_path.iterdir()} == {"precious", "s"}


def edited(saved, tmp_path, **change):
    folder = tmp_path / "edited"
    shutil.copytree(saved, folder)
    contract = json.loads((folder / "fewstep.json").read_text()) | change
    (folder / "fewstep.json").write_text(json.dumps(contract))
    return folder


def test_changed_weights_are_noticed_on_loading_and_by_the_check(saved, tmp_path):
    folder = edited(saved, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["out.bias"] += 0.1
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.warns(UserWarning, match="golden sample differs by"):
        load_student(folder)
    check = check_student(folder)
    assert not check.ok
    assert "differ from the golden sample" in check.messages[0]


def test_a_teacher_is_no_student_and_a_student_no_teacher(saved, tmp_path):
    with pytest.raises(Refused, match="is a student, not a teacher"):
        load_teacher(saved)
    with pytest.raises(Refused, match="is a teacher, not a student"):
        load_student(edited(saved, tmp_path, role="teacher"))
    with pytest.raises(Refused, match="no student folder"):
        load_student(tmp_path / "nowhere")


def test_a_folder_without_a_golden_sample_is_refused(saved, tmp_path):
    folder = edited(saved, tmp_path)
    (folder / "golden.safetensors").unlink()
    for use in (load_student, check_student):
        with pytest.raises(Refused, match=r"golden\.safetensors is missing"):
            use(folder)
    save_file({"noise": torch.zeros(1, 2)}, str(folder / "golden.safetensors"), metadata={"golden": "[]"})
    with pytest.raises(Refused, match="no valid golden facts"):
        load_student(folder)


def test_a_scheduler_that_was_changed_fails_the_check(tmp_path, here):
    student = Student(edm(unet()), (1, 8, 8), start=2.5, steps={1: (2.5,), 2: (2.5, 0.8)}, policy="renoise")
    save_student(student, tmp_path / "s", method="test")
    file = tmp_path / "s" / "scheduler" / "scheduler_config.json"
    good = json.loads(file.read_text())
    for change in ({"sigma_data": 0.5}, {"sigma_max": 2.6}, {"sigma_min": 0.1}, {"clip_denoised": True}, {"rho": 7.0}):
        file.write_text(json.dumps(good | change))
        check = check_student(tmp_path / "s")
        assert not check.ok, change
        assert "differ from the golden sample" in check.messages[0]


def test_a_student_of_ours_ships_in_its_teachers_pipeline_where_that_holds_it(teachers, tmp_path, here):
    for kind, wanted in (("ddpm", "DDPMPipeline"), ("ddim", "DDIMPipeline")):
        one = Wrapped(unet(PLAIN), teachers[kind].denoiser.path, "x0", "index")
        assert save_student(Student(one, (1, 8, 8)), tmp_path / kind, teacher=teachers[kind], method="test").ok
        assert load_student(tmp_path / kind).contract.pipeline == wanted
    one = Wrapped(unet(), teachers["dit"].denoiser.path, "x0", "index")
    save_student(Student(one, (1, 8, 8)), tmp_path / "dit", teacher=teachers["dit"], method="test", program=False)
    assert load_student(tmp_path / "dit").contract.pipeline is None


def test_a_contract_that_names_another_pipeline_than_the_folder_is_refused(teachers, tmp_path, here):
    teacher = teachers["ddpm"]
    student = Student.like(teacher.denoiser, teacher.shape)
    save_student(student, tmp_path / "s", teacher=teacher, method="test")
    folder = edited(tmp_path / "s", tmp_path, pipeline="DDIMPipeline")
    with pytest.raises(Refused, match=r"model_index\.json says DDPMPipeline"):
        check_student(folder)


@pytest.mark.parametrize("net", [DiT(DiTConfig(shape=(1, 8, 8), patch=4, width=16, heads=2, depth=1, classes=3))])
def test_a_transformer_of_ours_exports_with_a_free_batch(tmp_path, here, net):
    check = save_student(Student(Wrapped(net, Straight(), "velocity", "1000t"), (1, 8, 8)), tmp_path / "s", method="t")
    assert check.ok
    assert load_student(tmp_path / "s").contract.program == "model.pt2"


# -- conditions that stand beside the sample, or in the middle of its noise -------------------------


def centred(classes=None, beside=None):
    """As consistency distillation leaves it for speech: noise around the prior's mean, which the network reads too."""
    torch.manual_seed(0)
    config = MLPConfig(shape=(3,), width=16, depth=1, classes=classes, beside={"mean": 3} if beside is None else beside)
    one = edm(MLP(config))
    with torch.no_grad():
        for value in one.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return Student(Centred(one, "mean"), (3,), steps={1: (20.0,), 2: (20.0, 1.0)}, policy="renoise")


@pytest.mark.parametrize("beside", [{"mean": 3}, {}], ids=["read as well", "noise alone"])
def test_a_student_whose_noise_lies_around_its_condition_is_loaded_with_the_same_samples(tmp_path, here, beside):
    student = centred(beside=beside)
    check = save_student(student, tmp_path / "s", method="consistency")
    assert check.ok and check.steps == (1, 2)
    loaded = load_student(tmp_path / "s")
    assert loaded.contract.centred == "mean" and loaded.contract.parts == {"mean": (3,)}
    assert isinstance(loaded.student.denoiser, Centred)
    noise, mean = torch.randn(5, 3), torch.randn(5, 3)
    for count in (1, 2):
        ours, theirs = (
            s.generate(noise, {"mean": mean}, torch.Generator().manual_seed(1), count)
            for s in (loaded.student, student)
        )
        torch.testing.assert_close(ours, theirs)
    elsewhere = loaded.student.generate(noise, {"mean": mean + 1}, steps=1)
    assert (elsewhere - loaded.student.generate(noise, {"mean": mean}, steps=1)).abs().max() > 0.1
    around = loaded.contract.model_copy(update={"centred": None}).student(loaded.student.denoiser.inner.net)
    plain = around.generate(noise, {"mean": mean}, steps=1)
    assert (plain - loaded.student.generate(noise, {"mean": mean}, steps=1)).abs().max() > 0.05, "the broken twin"
    program = torch.export.load(str(tmp_path / "s" / "model.pt2")).module()
    torch.testing.assert_close(program(noise, {"mean": mean}), loaded.student.generate(noise, {"mean": mean}))
    with pytest.raises(Refused, match="has no 'mean': it has no named parts"):
        loaded.student.generate(noise)


def test_no_stock_pipeline_is_said_to_draw_noise_around_a_condition(tmp_path, teachers, here):
    student = Student(Centred(edm(unet(PLAIN)), "mean"), (1, 8, 8))
    check = save_student(student, tmp_path / "s", method="consistency")
    assert check.ok and any("plain diffusers cannot run it: its noise lies around" in line for line in check.messages)
    loaded = load_student(tmp_path / "s")
    assert loaded.contract.pipeline is None and loaded.contract.program == "model.pt2"
    teacher = teachers["cm"]
    recorded = Student(Centred(teacher.denoiser, "mean"), teacher.shape, start=3.0)
    for refused in (
        lambda: save_student(recorded, tmp_path / "r", teacher=teacher, method="consistency"),
        lambda: refuse_homeless(recorded, teacher),
    ):
        with pytest.raises(Refused, match="noise lies around the condition's 'mean'") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()
    kept = json.loads((tmp_path / "s" / "fewstep.json").read_text()) | {"pipeline": LABELLED}
    with pytest.raises(Refused, match="draws noise around nothing, and centred says around 'mean'"):
        type(loaded.contract).parse(kept)


def test_a_teacher_whose_noise_lies_around_its_condition_is_loaded_as_it_was(tmp_path, here):
    one = centred().denoiser
    save_teacher(one, tmp_path / "t", shape=(3,), name="speech", method="denoising")
    loaded = load_teacher(tmp_path / "t")
    x, cond = torch.randn(4, 3), {"mean": torch.randn(4, 3)}
    torch.testing.assert_close(loaded.denoiser(x, 2.0, cond), one(x, 2.0, cond))


def test_a_network_that_reads_a_picture_beside_the_sample_ships_with_what_it_reads(tmp_path, here):
    config = MLPConfig(shape=(1, 4, 4), width=16, depth=1, classes=3, beside={"low": 2})
    torch.manual_seed(0)
    student = Student(Wrapped(MLP(config), Straight(), "x0", "1000t"), (1, 4, 4))
    assert save_student(student, tmp_path / "s", method="scale").ok
    loaded = load_student(tmp_path / "s")
    assert loaded.contract.parts == {"low": (2, 4, 4)} and loaded.contract.program == "model.pt2"
    text = (tmp_path / "s" / "README.md").read_text()
    assert '{"label": torch.zeros(4, dtype=torch.long), "low": torch.zeros(4, 2, 4, 4)})' in text
    program = torch.export.load(str(tmp_path / "s" / "model.pt2")).module()
    for count in (1, 6):
        noise, cond = (
            torch.randn(count, 1, 4, 4),
            {"label": torch.arange(count) % 3, "low": torch.randn(count, 2, 4, 4)},
        )
        torch.testing.assert_close(program(noise, cond), loaded.student.generate(noise, cond))
    with pytest.raises(Refused, match="wants low as its condition"):
        jobs.sample(tmp_path / "s", 2, out=tmp_path / "out")


def test_a_unet_that_reads_a_picture_says_why_plain_diffusers_cannot_run_it(tmp_path, here):
    one = Wrapped(unet(PLAIN.model_copy(update={"beside": {"low": 1}})), Straight(), "velocity", "1000t")
    check = save_student(Student(one, (1, 8, 8)), tmp_path / "s", method="scale")
    assert check.ok and any("no stock pipeline of pixels gives its U-Net a picture" in line for line in check.messages)
