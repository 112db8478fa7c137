"""Crews of processes, forked from one that has imported everything: seconds, not a minute, for many checks.

Run as ``python crew.py SCENARIO FOLDER``; a fresh interpreter, because a process that has been through a backward
pass cannot be forked. What a scenario found is FOLDER/SCENARIO.json.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from fewstep import jobs
from fewstep.errors import Interrupted
from fewstep.train.build import make_student
from fewstep.train.pairs import Pairs
from fewstep.train.processes import joined, world
from fewstep.train.recipe import recipe_from
from fewstep.train.trainer import Nobody, Trainer

PATIENCE = 120.0

NET = {
    "net": {"kind": "mlp", "width": 8, "depth": 2},
    "path": {"kind": "exploding", "sigma_min": 0.02, "sigma_max": 20.0},
    "prediction": "cm",
    "clock": "250 log_sigma",
    "scale_input": True,
}
BASE = {
    "name": "toy",
    "steps": 8,
    "batch": 6,
    "task": {"name": "mixture", "options": {"modes": 4, "std": 0.25, "train_count": 60, "test_count": 40}},
    "teacher": {"source": "law"},
    "student": NET,
    "log": {"every": 1, "probe": 4},
    "checkpoint": {"every": 2},
    "evaluate": {"enabled": False},
    "ema": {"decay": 0.9},
}
GAN = {"r1": 0.1, "r1_kind": "difference", "r1_every": 2, "width": 8}
METHODS = {
    "denoising": {"name": "denoising"},
    "regression": {"name": "regression", "options": {"pairs": {"count": 40, "nfe": 2}}},
    "dmd2": {"name": "dmd2", "options": {"critic_turns": 2, "gan": GAN}},
    "dmd2_weighted": {
        "name": "dmd2",
        "options": {"critic_turns": 1, "gan": GAN, "divergence": "jensen_shannon", "steps": 2},
    },
    "consistency": {"name": "consistency", "options": {"target_decay": 0.5}},
    "meanflow": {"name": "meanflow", "options": {"derivative": "difference", "jumps": 0.3}},
}


def recipe_of(method, **changes):
    return recipe_from({**BASE, "method": METHODS[method], **changes})


# Crews


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Crew:
    """Forked processes, joined by gloo where there are several; each runs ``work`` and leaves what it returned."""

    def __init__(self, size, work, place):
        self.place = Path(place)
        self.place.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.members = []
        for rank in range(size):
            member = os.fork()
            if member == 0:
                os._exit(self._member(rank, size, port, work))
            self.members.append(member)

    def _member(self, rank, size, port, work):
        os.setpgid(0, 0)
        signal.alarm(int(PATIENCE) + 30)
        if size > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        file = self.place / f"{rank}.pickle"
        file.unlink(missing_ok=True)
        try:
            with joined():
                found = work()
            file.write_bytes(pickle.dumps(found))
            return 0
        except Interrupted:
            return 130
        except BaseException as error:
            (self.place / f"{rank}.error").write_text("".join(traceback.format_exception(error)))
            return 1

    def wait(self):
        """Exit codes (minus the signal for a killed one); whoever does not end in time is a failure."""
        codes, end = {}, time.monotonic() + PATIENCE
        while len(codes) < len(self.members):
            for member in self.members:
                if member not in codes:
                    found, status = os.waitpid(member, os.WNOHANG)
                    if found:
                        codes[member] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                for member in self.members:
                    if member not in codes:
                        os.kill(member, signal.SIGKILL)
                        os.waitpid(member, 0)
                        codes[member] = "hung"
            time.sleep(0.005)
        return [codes[member] for member in self.members]

    def results(self):
        codes = self.wait()
        if codes != [0] * len(codes):
            told = [f.read_text() for f in sorted(self.place.glob("*.error"))]
            raise RuntimeError(f"exit codes {codes}\n" + "\n".join(told))
        return [pickle.loads((self.place / f"{rank}.pickle").read_bytes()) for rank in range(len(codes))]


# What a member does


class Stopper(Nobody):
    """Asks the trainer to stop at a step, as a signal would."""

    def __init__(self, at):
        self.at = at

    def advance(self, label, done, note=""):
        if label == "train" and done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(recipe, run, resume=False, stop=None):
    """Train; the losses of every step, and the student's weights. None for the weights where it was stopped."""
    setting = jobs.prepare(recipe, run, "cpu", Nobody())
    torch.manual_seed(1)
    method = jobs.game(recipe, setting, make_student(recipe, setting.task, setting.raw, setting.shape))
    wanted = method.pairs()
    pairs = Pairs(setting.raw, setting.task, wanted, run, teacher_hash="law") if wanted else None
    trainer = Trainer(recipe, run, watch=None if stop is None else Stopper(stop))
    weights = None
    try:
        student = trainer.fit(method, setting.task, pairs, resume=resume)
        weights = {k: v.detach().clone() for k, v in student.state_dict().items()}
    except Interrupted:
        if stop is None:
            raise
    return weights


def losses(run):
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if "/" in k} for line in lines}


# Scenarios


def equal(folder):
    """One process against two, replicated and sharded, for several methods."""

    def one():
        return {name: fit(recipe_of(name), folder / f"one_{name}") for name in METHODS}

    def two():
        found = {}
        for name in METHODS:
            found[f"replicated_{name}"] = fit(recipe_of(name), folder / f"replicated_{name}")
            found[f"sharded_{name}"] = fit(recipe_of(name, parallel={"shard": True}), folder / f"sharded_{name}")
        found["uneven"] = fit(recipe_of("dmd2_weighted", batch=5), folder / "uneven")
        return found

    def uneven():
        return fit(recipe_of("dmd2_weighted", batch=5), folder / "one_uneven")

    (alone,) = Crew(1, one, folder / "crew1").results()
    (odd,) = Crew(1, uneven, folder / "crew3").results()
    first, second = Crew(2, two, folder / "crew2").results()
    report = {}
    for name, weights in first.items():
        method = name.split("_", 1)[1] if name != "uneven" else None
        mine = alone[method] if method else odd
        own = losses(folder / (f"one_{method}" if method else "one_uneven"))
        report[name] = {
            "loss": largest_gap(own, losses(folder / name)),
            "weights": max(float((weights[k] - v).abs().max()) for k, v in mine.items()),
            "between": max(float((weights[k] - v).abs().max()) for k, v in second[name].items()),
            "steps": len(own),
        }
    return report


def largest_gap(one, other):
    assert one.keys() == other.keys() and all(one[k].keys() == other[k].keys() for k in one), "not the same lines"
    return max(abs(one[k][name] - other[k][name]) / max(1, abs(one[k][name])) for k in one for name in one[k])


SCENARIOS = {"equal": equal}


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    result = SCENARIOS[scenario](folder)
    (folder / f"{scenario}.json").write_text(json.dumps(result))
