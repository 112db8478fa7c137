"""Whole jobs at toy size: what a user runs, end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fewstep import jobs, registry
from fewstep.errors import Failed, Interrupted, Refused
from fewstep.evaluate import Protocol
from fewstep.jobs.setting import prepare
from fewstep.jobs.training import measured_teacher, taught_under
from fewstep.methods.families.matching import Matching
from fewstep.methods.trajectory import Trajectory
from fewstep.train.build import make_student
from fewstep.train.pairs import Pairs
from fewstep.train.recipe import MethodSection, recipe_from
from fewstep.train.store import load_state
from fewstep.train.trainer import Nobody, Trainer

SMALL = {"noise_seeds": 2, "scout_seeds": 1, "detail_seeds": 1, "nfes": [1, 4], "full_nfe": 9, "timing_rounds": 1}
MIXTURE = {
    "name": "toy",
    "steps": 30,
    "batch": 64,
    "task": {"name": "mixture", "options": {"modes": 4, "std": 0.25, "train_count": 500, "test_count": 200}},
    "teacher": {"source": "law"},
    "student": {
        "net": {"kind": "mlp", "width": 16, "depth": 1},
        "path": {"kind": "exploding", "sigma_min": 0.02, "sigma_max": 20.0},
        "prediction": "cm",
        "clock": "250 log_sigma",
        "scale_input": True,
    },
    "method": {"name": "regression", "options": {"pairs": {"count": 256, "nfe": 4}}},
    "evaluate": {"protocol": SMALL},
    "log": {"every": 5},
}


def changed(**changes):
    return recipe_from({**MIXTURE, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("jobs") / "run"
    return run, jobs.distill(changed(), run)


def test_a_run_leaves_recipe_log_student_scores_and_report(finished):
    run, report = finished
    for name in (
        "recipe.toml",
        "environment.json",
        "log.jsonl",
        "scores.json",
        "report/index.html",
        "report/report.json",
    ):
        assert (run / name).is_file(), name
    models = [row["model"] for row in report["rows"]]
    assert models.count("teacher") == models.count("student") == models.count("real") == 1
    assert jobs.check(run)["holds"]


def test_a_finished_run_is_sampled_image_by_image_the_same(finished, tmp_path):
    run, _ = finished
    from safetensors.torch import load_file

    jobs.sample(run, 4, seed=3, out=tmp_path / "four")
    jobs.sample(run, 1, seed=5, out=tmp_path / "one")
    four, one = load_file(tmp_path / "four" / "00002.safetensors"), load_file(tmp_path / "one" / "00000.safetensors")
    torch.testing.assert_close(four["sample"], one["sample"], atol=1e-6, rtol=0)


def test_a_step_count_that_was_not_trained_is_refused_with_those_that_were(finished, tmp_path):
    with pytest.raises(ValueError, match="trained for 1 step"):
        jobs.sample(finished[0], 1, steps=3, out=tmp_path)


def test_a_student_is_held_to_its_teacher_under_the_guidance_that_it_was_taught_under(tmp_path):
    def of(method, options, teacher=1.0, stages=()):
        recipe = changed(
            task={"name": "digits"},
            teacher={"source": "digits", "guidance": teacher},
            student={},
            method={"name": method, "options": options},
            stages=stages,
        )
        setting = prepare(recipe, tmp_path, "cpu", Nobody())
        return setting, taught_under(recipe, setting.task), measured_teacher(recipe, setting)

    setting, scale, denoiser = of("dmd2", {"guidance": 2.5})  # guides its teacher itself
    assert scale == denoiser.scale == 2.5 and denoiser.inner is setting.raw
    setting, scale, denoiser = of("regression", {}, teacher=3.0)  # learns from pairs of a guided one
    assert scale == denoiser.scale == 3.0 and denoiser is setting.denoiser
    assert of("swiftbrush", {})[1] == 4.5  # a method's own default
    last = {"steps": 1, "method": {"name": "sim"}}
    setting, scale, denoiser = of("regression", {}, teacher=3.0, stages=[last])  # last taught without guidance,
    assert scale == 1 and denoiser is setting.denoiser  # and held to the teacher that the recipe names


def test_the_teacher_beside_a_guided_student_is_guided_when_it_is_distilled_and_when_it_is_evaluated(
    tmp_path, monkeypatch
):
    small = {**SMALL, "nfes": [1], "full_nfe": 3, "count": 64}
    recipe = changed(
        steps=1,
        batch=8,
        task={"name": "digits"},
        teacher={"source": "digits"},
        student={},
        method={"name": "dmd2", "options": {"guidance": 2.0, "critic_turns": 1, "start": 2.5}},
        evaluate={"protocol": small},
    )
    first = jobs.distill(recipe, tmp_path / "run")
    monkeypatch.setattr("fewstep.evaluate.Protocol", lambda: Protocol(**small))
    second = jobs.evaluate(tmp_path / "run", "digits", "digits", tmp_path / "again")
    for report in (first, second):
        rows = {row["model"]: row for row in report["rows"]}
        assert rows["teacher"]["calls"] == 2 * rows["teacher"]["nfe"] == 6  # guidance asks twice
        assert rows["student"]["calls"] == 1


def test_every_stage_starts_from_the_student_before_it(tmp_path):
    stage = {"steps": 1, "method": {"name": "regression", "options": {"pairs": {"count": 64, "nfe": 4}}}}
    frozen = {**stage, "optim": {"lr": 1e-12}, "ema": {"decay": 0.0}}
    recipe = changed(stages=[frozen], evaluate={"enabled": False}, ema={"decay": 0.0})
    jobs.train(recipe, tmp_path / "run")
    first, second = (load_state(tmp_path / "run" / "stages" / f"{k:02d}") for k in (0, 1))
    assert first is not None and second is not None
    for name, value in first[0].items():
        torch.testing.assert_close(value, second[0][name], atol=1e-6, rtol=0)


class Stopper(Nobody):
    """Asks the trainer to stop at a step, as a signal would."""

    def __init__(self, at):
        self.at = at

    def advance(self, label, done, note=""):
        if label == "train" and done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


MATCHING = {
    "disback": {"critic_turns": 1, "backtrack": {"states": 2, "every": 2, "interval": 2}},  # stopped on its way
    "dmd2": {"critic_turns": 2},
    "f_distill": {"critic_turns": 1},
    "ikl": {},
    "phased_dmd": {"critic_turns": 1, "steps": 2, "phases": 2},
    "sid": {},
    "sim": {},
    "swiftbrush": {"guidance": 1.0},
    "tdm": {"steps": 2},
    "uni_instruct": {},
}


def test_the_contract_is_asked_of_every_row_of_distribution_matching():
    rows = {entry.name for entry in registry.METHODS if issubclass(entry.thing, Matching)}
    assert rows == set(MATCHING)


@pytest.mark.parametrize(
    "method",
    ["regression", "reflow", "progressive", "consistency", "consistency_trajectory", "meanflow", "self_e", *MATCHING],
)
def test_a_stopped_run_that_goes_on_ends_bit_equal_to_one_that_was_not(method, tmp_path):
    section = {"name": method, "options": MATCHING.get(method, {})}
    if method in ("regression", "reflow"):
        section = {**MIXTURE["method"], "name": method}
    recipe = changed(method=section, steps=10)

    def fit(run, resume=False, watch=None):
        setting = jobs.prepare(recipe, run, "cpu", Nobody())
        torch.manual_seed(1)
        method = jobs.game(recipe, setting, make_student(recipe, setting.task, setting.raw, setting.shape))
        wanted = method.pairs()
        states = method.reads_states
        pairs = Pairs(setting.raw, setting.task, wanted, run, teacher_hash="law", states=states) if wanted else None
        return Trainer(recipe, run, watch=watch).fit(method, setting.task, pairs, resume=resume).state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", watch=Stopper(5))
    parts = fit(tmp_path / "parts", resume=True)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10]


def test_a_method_of_trajectories_is_given_them_by_its_job(tmp_path, monkeypatch):
    seen, plain = [], Trajectory.loss

    def watched(self, player, batch, rng):
        seen.append(batch)
        return plain(self, player, batch, rng)

    monkeypatch.setattr(Trajectory, "loss", watched)
    section = {"name": "trajectory", "options": {"pairs": {"count": 40, "nfe": 4}, "steps": [1, 2]}}
    student = {"net": MIXTURE["student"]["net"], "path": {"kind": "straight"}, "prediction": "velocity", "clock": "t"}
    recipe = changed(method=section, steps=2, student=student, evaluate={"enabled": False})
    jobs.distill(recipe, tmp_path / "run")
    assert {tuple(batch.states.shape[1:]) for batch in seen} == {(5, 2)}
    assert all(torch.equal(batch.states[:, -1], batch.target) for batch in seen)


def test_an_interrupted_run_names_the_line_that_goes_on_and_leaves_no_student(tmp_path):
    with pytest.raises(Interrupted, match="--resume"):
        jobs.train(changed(), tmp_path / "run", watch=Stopper(5))
    assert not (tmp_path / "run" / "student").exists()


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(tmp_path):
    recipe = tmp_path / "toy.toml"
    from fewstep.train.recipe import write_recipe

    write_recipe(changed(steps=100_000, checkpoint={"every": 20}, evaluate={"enabled": False}), recipe)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fewstep", "train", str(recipe), "--out", str(run), "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not list((run / "checkpoints").glob("stage_0_step_*")) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    found = sorted((run / "checkpoints").glob("stage_0_step_*"))
    assert found and load_state(found[-1]) is not None
    whole = int(found[-1].name.rsplit("_", 1)[1])
    (found[-1] / "state.safetensors").write_bytes(b"cut short")  # as a full disk would leave it
    steps: list[int] = []

    class Reader(Nobody):
        def advance(self, label, done, note=""):
            if label == "train":
                steps.append(done)
                os.kill(os.getpid(), signal.SIGTERM)

    from fewstep.train.recipe import load_recipe

    with pytest.raises(Interrupted):
        jobs.train(load_recipe(run / "recipe.toml"), run, resume=True, watch=Reader())
    assert (len(found) > 1 and whole - 20 < steps[0] <= whole) or steps[0] == MIXTURE["log"]["every"]


def test_resuming_with_another_recipe_is_refused(finished):
    run, _ = finished
    with pytest.raises(Refused, match="not the one"):
        jobs.train(changed(seed=9), run, resume=True)


def test_gradients_that_are_not_finite_stop_the_run_with_a_clear_line(tmp_path):
    recipe = changed(
        optim={"lr": 1e30, "clip": None}, steps=60, evaluate={"enabled": False}, log={"every": 5, "probe": 60}
    )
    with pytest.raises(Failed, match="not finite"):
        jobs.train(recipe, tmp_path / "run")


def test_a_skipped_update_leaves_the_weights_alone():
    from fewstep.train.player import Player
    from fewstep.train.recipe import Optim

    layer = torch.nn.Linear(2, 1)
    player = Player(layer, Optim(lr=0.1))
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    layer.bias.grad = torch.ones_like(layer.bias)
    before = [p.detach().clone() for p in layer.parameters()]
    _, bad = player.update(1.0)
    assert float(bad) == 1 and all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    layer.weight.grad, layer.bias.grad = torch.ones_like(layer.weight), torch.ones_like(layer.bias)
    player.update(1.0)
    assert not torch.equal(before[0], layer.weight)


def test_an_update_of_four_parts_sees_four_batches(tmp_path):
    recipe = changed(parallel={"accumulate": 4}, steps=3, batch=16, ema={"decay": 0.5}, evaluate={"enabled": False})
    trainer = Trainer(recipe, tmp_path)
    setting = jobs.prepare(recipe, tmp_path, "cpu", Nobody())
    student = make_student(recipe, setting.task, setting.raw, setting.shape)
    method = jobs.game(changed(method={"name": "denoising"}, teacher=None), setting, student)
    seen: list[int] = []
    inner = method.loss

    def counted(player, batch, rng):
        seen.append(len(batch))
        return inner(player, batch, rng)

    method.loss = counted
    trainer.fit(method, setting.task)
    assert seen == [16] * 12


def test_the_average_is_the_weighted_mean_of_the_weights_seen():
    from fewstep.train.average import Average

    layer = torch.nn.Linear(1, 1, bias=False).double()
    average = Average(layer, decay=0.5, warmup=1.0)
    with torch.no_grad():
        layer.weight.fill_(0.0)
        average.values[0].fill_(0.0)
        for value in (1.0, 2.0):
            layer.weight.fill_(value)
            average.update()
    assert average.values[0].item() == pytest.approx(0.5 * 0.5 * 1 + 0.5 * 2)


def test_a_pipeline_folder_and_a_folder_of_images_become_a_student_that_stock_diffusers_runs(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
    from PIL import Image

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet=net, scheduler=DDIMScheduler(num_train_timesteps=50)).save_pretrained(tmp_path / "pipe")
    images = tmp_path / "images"
    images.mkdir()
    for k in range(40):
        Image.fromarray(torch.randint(256, (8, 8), dtype=torch.uint8).numpy()).save(images / f"{k}.png")
    recipe = recipe_from(
        {
            "steps": 2, "batch": 8, "task": {"name": "images", "options": {"path": str(images), "test_count": 12}},
            "teacher": {"source": str(tmp_path / "pipe")}, "method": {"name": "dmd2", "options": {"critic_turns": 1}},
            "optim": {"lr": 1e-4}, "evaluate": {"protocol": {**SMALL, "nfes": [1], "full_nfe": 3}},
        }
    )  # fmt: skip
    several = recipe.model_copy(update={"method": MethodSection(name="tdm", options={"steps": 4})})
    with pytest.raises(
        Refused, match="cannot run this student"
    ):  # this pipeline cannot step to its times, and says so in time
        jobs.distill(several, tmp_path / "several")
    assert not (tmp_path / "several").exists()
    report = jobs.distill(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "student" / "model_index.json").read_text())["_class_name"].endswith(
        "Pipeline"
    )
    assert [row["calls"] for row in report["rows"] if row["model"] == "student"] == [1]
