"""A run that gets worse ends with the student of its best probe, and stopping it on the way changes nothing."""

from __future__ import annotations

import math
import os
import re
import signal

import pytest
import torch
from crew import BASE

from fewstep import jobs
from fewstep.errors import Interrupted
from fewstep.losses import squared_error
from fewstep.method import Loss, Method
from fewstep.part import Part
from fewstep.train.best import WORSE, Best
from fewstep.train.build import make_student
from fewstep.train.probe import Probe
from fewstep.train.recipe import recipe_from
from fewstep.train.trainer import Nobody, Trainer

GOOD = Probe(0.9, 1.0, 0.0, 1.0)


class Falling(Method):
    """Learns samples of the data's size for thirty steps, then to give the same one always."""

    Options = Part

    def loss(self, player, batch, rng):
        wanted = batch.noise * (1.4 if self.step < 30 else 0.0)
        return Loss.mean({"fall": squared_error(self.student.generate(batch.noise, batch.cond), wanted)})


class Stopper(Nobody):
    def advance(self, label, done, note=""):
        if done == 45:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(run, best, watch=None, resume=False):
    recipe = recipe_from({
        **BASE, "steps": 70, "batch": 64, "method": {"name": "denoising"}, "optim": {"lr": 1e-2},
        "log": {"every": 1, "probe": 10}, "checkpoint": {"every": 7, "best": best}, "ema": {"decay": 0.5},
    })  # fmt: skip
    setting = jobs.prepare(recipe, run, "cpu", Nobody())
    torch.manual_seed(1)
    method = Falling(setting.raw, make_student(recipe, setting.task, setting.raw, setting.shape))
    trainer = Trainer(recipe, run, watch=watch)
    return trainer.fit(method, setting.task, resume=resume), trainer.warnings


def spread(student):
    return student.generate(torch.randn(256, 2, generator=torch.Generator().manual_seed(0))).std().item()


def test_a_run_that_collapses_ends_with_its_best_probe_and_says_so(tmp_path):
    lost, said = fit(tmp_path / "lost", False)
    assert spread(lost) < 0.5 and any("collapsing" in line for line in said)
    kept, said = fit(tmp_path / "kept", True)
    assert spread(kept) > 0.9
    assert re.fullmatch("the run got worse: it ends with the student of step [23]0, the best by its probes", said[-1])
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", True, Stopper())
    parts, again = fit(tmp_path / "parts", True, resume=True)
    assert again[-1] == said[-1]
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in kept.state_dict().items())


@pytest.mark.parametrize(
    ("last", "worse"),
    [
        (GOOD, False),
        (Probe(0.9 * math.exp(-0.8 * WORSE), 1.0, 0.0, 1.0), False),
        (Probe(0.9 * math.exp(-1.2 * WORSE), 1.0, 0.0, 1.0), True),
        (Probe(0.9, 1.0, 1.2 * WORSE, 1.0), True),
        (Probe(math.nan, 1.0, 0.0, 1.0), True),
        (Probe(0.9, 1.0, 0.0, 50.0), True),
    ],
)
def test_only_a_clearly_worse_end_is_left_for_the_best(tmp_path, last, worse):
    best, student = Best(tmp_path / "best"), torch.nn.Linear(2, 2)
    best.see(GOOD, student, 10)
    kept = student.weight.detach().clone()
    torch.nn.init.zeros_(student.weight)
    best.see(last, student, 20)
    assert (best.back(student) is not None) == worse
    assert torch.equal(student.weight, kept) == worse


def test_a_student_that_never_was_healthy_is_not_kept(tmp_path):
    best, student = Best(tmp_path / "best"), torch.nn.Linear(2, 2)
    best.see(Probe(0.1, 1.0, 0.0, 1.0), student, 10)
    assert best.kept() == 0 and best.back(student) is None
