"""Pairs are made once: by whom, for whom and after what end of a run does not matter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crew import run_crew
from games import mlp

import fewstep.train.pairs
from fewstep.denoiser import Counted, Guided, Reframed
from fewstep.method import PairOptions
from fewstep.path import Exploding
from fewstep.solvers import sample, solver_named
from fewstep.tasks import task_named
from fewstep.train.pairs import Pairs

PLAN = PairOptions(count=80, solver="heun", nfe=3, grid="uniform")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(fewstep.train.pairs, "SHARD", 32)


def ring(classes=2, train_count=50, **options):
    return task_named("mixture", {"modes": 2, "classes": classes, "train_count": train_count, **options})


def pairs_of(task, folder, teacher=None, plan=PLAN, teacher_hash="law", **options):
    return Pairs(task.law if teacher is None else teacher, task, plan, folder, teacher_hash=teacher_hash, **options)


def same(a, b):
    one, other = (pairs.rows(torch.arange(len(pairs))) if isinstance(pairs, Pairs) else pairs for pairs in (a, b))
    return all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("noise", "target", "cond"))


def test_a_pair_is_a_noise_the_place_the_sampler_took_it_to_and_the_condition_under_which(tmp_path):
    task = ring()
    whole = pairs_of(task, tmp_path).rows(torch.arange(80))
    times = torch.tensor([1.0, 0.5, 0.0])
    wanted = sample(task.law, whole.noise, times, solver_named("heun"), cond=whole.cond)
    assert torch.equal(whole.target, wanted) and torch.equal(whole.data, wanted)
    modes = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    near = torch.cdist(whole.target, modes).argmin(1)
    assert torch.equal(near, whole.cond), "each class has one mode"
    assert not torch.equal(near, whole.cond.roll(1)), "the broken twin: another pair's condition"
    assert set(near.tolist()) == {0, 1}


def test_a_trajectory_has_the_samplers_samples_at_its_times_between_the_noise_and_the_pairs_end(tmp_path):
    task, plan = ring(), PLAN.model_copy(update={"nfe": 7})
    found = pairs_of(task, tmp_path, plan=plan, states=True).rows(torch.arange(80))
    x, seen = found.noise, []
    sample(task.law, x, found.times, solver_named("heun"), cond=found.cond, watch=lambda i, x: seen.append(x))
    assert found.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(found.states, torch.stack([x, *seen], 1))
    assert torch.equal(found.states[:, -1], found.target)
    few = found.rows(torch.tensor([3, 1]))
    assert torch.equal(few.states, found.states[[3, 1]]) and few.times is found.times
    assert torch.equal(few.to("cpu").states, few.states)


def test_the_start_of_a_trajectory_is_as_loud_as_its_path(tmp_path):
    task = ring()
    teacher = Reframed(task.law, Exploding(sigma_min=0.1, sigma_max=5.0))
    found = pairs_of(task, tmp_path, teacher, states=True).rows(torch.arange(80))
    assert torch.allclose(found.states[:, 0], 5.0 * found.noise)


def test_pairs_are_read_from_trajectories_and_only_from_whole_ones_of_the_same_teacher(tmp_path):
    task, counted = ring(), Counted(ring().law)
    way = pairs_of(task, tmp_path, counted, states=True)
    calls = counted.images
    assert calls == 80 * 3
    pairs = pairs_of(task, tmp_path, counted)
    assert counted.images == calls and same(pairs, way)
    assert pairs.rows(torch.arange(4)).states is None
    pairs_of(task, tmp_path, counted, states=True)
    assert counted.images == calls, "made once"
    alone = pairs_of(task, tmp_path / "other", counted)
    assert counted.images == 2 * calls and same(alone, way), "equal pairs, with and without the way"
    pairs_of(task, tmp_path, counted, teacher_hash="another")
    assert counted.images == 3 * calls
    pairs_of(task, tmp_path, counted, plan=PLAN.model_copy(update={"count": 90}))
    assert counted.images == 3 * calls + 3 * 90, "not whole: pairs have a folder of their own"
    way.shards.folder.joinpath("00000000-00000032.safetensors").write_bytes(b"damaged")
    assert same(pairs_of(task, tmp_path, counted), alone)


def test_nothing_is_made_twice_by_whatever_run_or_method_asks(tmp_path):
    task, counted = ring(), Counted(ring().law)
    first = pairs_of(task, tmp_path, counted)
    assert counted.images == 3 * 80
    again = pairs_of(task, tmp_path, counted)
    assert counted.images == 3 * 80 and same(first, again)
    assert first.seconds > 0 and again.seconds == pytest.approx(first.seconds, abs=0.01)
    more = pairs_of(task, tmp_path, counted, PLAN.model_copy(update={"count": 128}))
    assert counted.images == 3 * (80 + 128 - 64), "more pairs go on from the whole shards of fewer"
    index = torch.arange(64)
    assert torch.equal(more.rows(index).target, first.rows(index).target)
    assert same(pairs_of(task, None, counted), first), "pairs are the same with and without a folder"


def test_what_changes_a_pair_changes_the_name_and_nothing_else_does(tmp_path):
    task, net = ring(), mlp(classes=2)
    few = PLAN.model_copy(update={"count": 2})
    plain = {"task": task, "teacher": net, "plan": few}

    def folder(**changes):
        return pairs_of(folder=tmp_path, **{**plain, **changes}).shards.folder.name

    other = ring(train_count=51)
    wider = Reframed(task.law, Exploding(sigma_min=0.02, sigma_max=20.0))
    changed = {
        "weights": folder(teacher_hash="another"),
        "guidance": folder(teacher=Guided(net, 2.0)),
        "more guidance": folder(teacher=Guided(net, 3.0)),
        "against": folder(teacher=Guided(net, 2.0, lambda cond: torch.zeros_like(cond))),
        "rescaled": folder(teacher=Guided(net, 2.0, rescale=0.5)),
        "prediction": folder(teacher=mlp(classes=2, prediction="velocity")),
        "path": folder(teacher=wider),
        "noisier path": folder(teacher=Reframed(task.law, Exploding(sigma_min=0.02, sigma_max=30.0))),
        "solver": folder(plan=few.model_copy(update={"solver": "euler"})),
        "calls": folder(plan=few.model_copy(update={"nfe": 5})),
        "grid": folder(plan=few.model_copy(update={"grid": "karras"})),
        "seed": folder(seed=1),
        "conditions": folder(task=other),
    }
    names = [*changed.values(), folder()]
    assert len(set(names)) == len(names)
    assert folder() == folder(teacher=Counted(net)) == folder(plan=few.model_copy(update={"count": 3}))


def test_a_changed_teacher_never_reads_stale_pairs(tmp_path):
    """Through a run: the guidance in the recipe changes, then the exact law; each has pairs of its own."""
    from fewstep import jobs
    from fewstep.jobs.training import _learn
    from fewstep.train.recipe import recipe_from
    from fewstep.train.trainer import Nobody

    base = {
        "name": "toy", "steps": 1, "batch": 8, "ema": {"decay": 0.0}, "evaluate": {"enabled": False},
        "task": {"name": "mixture", "options": {"modes": 2, "classes": 2, "train_count": 64}},
        "teacher": {"source": "law"}, "student": {"net": {"kind": "mlp", "width": 8, "depth": 1}},
        "method": {"name": "regression", "options": {"pairs": {"count": 32, "nfe": 2}}},
    }  # fmt: skip
    cache = Path(os.environ["FEWSTEP_CACHE"])

    def made(**changes):
        before = set(cache.glob("pairs-*/*.safetensors"))
        run = tmp_path / str(time.monotonic_ns())
        recipe = recipe_from({**base, **changes})
        setting = jobs.prepare(recipe, run, "cpu", Nobody())
        _learn(recipe, run, setting, False, "cpu", Nobody(), "train")
        return len(set(cache.glob("pairs-*/*.safetensors")) - before)

    assert made() == 1
    assert made() == 0
    assert made(steps=2, batch=4) == 0, "another run, another recipe, the same pairs"
    assert made(teacher={"source": "law", "guidance": 2.0}) == 1
    law = {"modes": 2, "classes": 2, "train_count": 64, "std": 0.3}
    assert made(task={"name": "mixture", "options": law}) == 1
    stages = [{"steps": 1, "teacher": "previous", "method": base["method"]}]
    assert made(stages=stages) == 1, "a stage taught by the student so far has pairs of its own"
    assert made(stages=stages) == 0
    assert made(stages=stages, seed=0, optim={"lr": 1e-2}) == 1, "another student, other pairs"


def test_a_damaged_shard_is_made_again_and_no_other(tmp_path):
    task, counted = ring(), Counted(ring().law)
    first = pairs_of(task, tmp_path, counted)
    whole, file = first.rows(torch.arange(80)), sorted(first.shards.folder.glob("*.safetensors"))[1]
    bytes_ = bytearray(file.read_bytes())
    bytes_[-1] ^= 1
    file.write_bytes(bytes_)
    counted.images = 0
    assert same(pairs_of(task, tmp_path, counted), whole)
    assert counted.images == 3 * 32


KILLED = """
import sys, time
from pathlib import Path
import fewstep.train.pairs as pairs
from fewstep.denoiser import Denoiser
from fewstep.method import PairOptions
from fewstep.tasks import task_named

class Slow(Denoiser):
    def __init__(self, law, log):
        super().__init__()
        self.law, self.path, self.log = law, law.path, [log]
    def forward(self, x, t, cond=None, want="x0", s=None):
        with open(self.log[0], "a") as file:
            file.write("x" * len(x))
        time.sleep(0.1)
        return self.law(x, t, cond, want)

pairs.SHARD = 32
task = task_named("mixture", {"modes": 2, "classes": 2, "train_count": 50})
folder = Path(sys.argv[1])
made = pairs.Pairs(Slow(task.law, sys.argv[2]), task, PairOptions(count=320, solver="euler", nfe=2), folder,
                   teacher_hash="law")
print(len(made))
"""


def test_a_kill_in_the_middle_loses_one_shard_at_most(tmp_path):
    script = tmp_path / "make.py"
    script.write_text(KILLED)
    source = str(Path(__file__).parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}

    def start(log):
        return subprocess.Popen(
            [sys.executable, script, tmp_path / "cache", log], env=env, stdout=subprocess.PIPE, text=True
        )

    def shards():
        return sorted((tmp_path / "cache").glob("pairs-*/[0-9]*.safetensors"))

    process, end = start(tmp_path / "first"), time.monotonic() + 120
    while len(shards()) < 4 and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = shards()
    spent = len((tmp_path / "first").read_text()) // 2
    assert process.returncode == -signal.SIGKILL and 4 <= len(kept) < 10
    assert spent - 32 * len(kept) <= 32, "more than one shard was lost"
    stamps = [file.stat().st_mtime_ns for file in kept]
    second = start(tmp_path / "second")
    assert second.communicate(timeout=120)[0].strip() == "320"
    assert len((tmp_path / "second").read_text()) // 2 == 320 - 32 * len(kept), "only what was missing is made"
    assert [file.stat().st_mtime_ns for file in kept] == stamps
    whole = pairs_of(ring(), tmp_path / "other", plan=PairOptions(count=320, solver="euler", nfe=2))
    index = torch.arange(320)
    from safetensors.torch import load_file

    found = torch.cat([load_file(file)["target"] for file in shards()])
    assert torch.equal(found, whole.rows(index).target), "the same pairs as without a kill"


@pytest.mark.slow
def test_several_processes_share_the_work_and_read_the_same_pairs(tmp_path):
    found = run_crew(tmp_path, "paired")["paired"]
    assert found["made"] == [96, 64] and found["same"] and found["again"] == [0, 0]
