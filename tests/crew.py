"""Crews of processes, forked from one that has imported everything: seconds, not a minute, for many checks.

``run_crew`` starts this file as ``python crew.py SCENARIO... FOLDER``: a fresh interpreter, because a process that has
been through a backward pass cannot be forked. What a scenario found is FOLDER/SCENARIO.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from fewstep import jobs
from fewstep.errors import Failed, Interrupted
from fewstep.jobs.training import _begin, _learn
from fewstep.train.build import make_student
from fewstep.train.pairs import Pairs
from fewstep.train.processes import alone, joined
from fewstep.train.recipe import recipe_from
from fewstep.train.store import ASIDE, load_state, open_state
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
    "steps": 6,
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
    "reflow": {"name": "reflow", "options": {"pairs": {"count": 40, "nfe": 2}, "anneal": 0.5, "look": 2}},
    "progressive": {"name": "progressive", "options": {"steps": 2, "finest": 8}},
    "oftsr": {"name": "oftsr"},
    "trajectory": {
        "name": "trajectory",
        "options": {"pairs": {"count": 40, "solver": "euler", "nfe": 2}, "steps": [1, 2]},
    },
    "dmd2": {"name": "dmd2", "options": {"critic_turns": 2, "gan": GAN}},
    "dmd2_weighted": {
        "name": "dmd2",
        "options": {"critic_turns": 1, "gan": GAN, "divergence": "jensen_shannon", "steps": 2},
    },
    "phased": {"name": "phased_dmd", "options": {"critic_turns": 2, "steps": 2, "phase": 2}},
    "sim": {"name": "sim"},
    "swiftbrush": {"name": "swiftbrush", "options": {"guidance": 1.0}},
    "uni_instruct": {"name": "uni_instruct", "options": {"gan": {"width": 8}}},
    "f_distill": {"name": "f_distill", "options": {"critic_turns": 1, "gan": {"width": 8}}},
    "tdm": {"name": "tdm", "options": {"steps": 2}},
    "disback": {
        "name": "disback",
        "options": {"critic_turns": 1, "backtrack": {"states": 2, "every": 1, "interval": 2}},
    },
    "consistency": {"name": "consistency", "options": {"target_decay": 0.5}},
    "consistency_trajectory": {"name": "consistency_trajectory", "options": {"first": 4, "last": 4}},
    "meanflow": {"name": "meanflow", "options": {"derivative": "difference", "jumps": 0.3}},
    "self_e": {"name": "self_e", "options": {"steps": [1, 2]}},
    "symmflow": {"name": "symmflow"},
    "scale": {"name": "scale"},
}
OWN = {
    "symmflow": {
        "task": {
            "name": "labelled",
            "options": {"of": "mixture", "options": {**BASE["task"]["options"], "classes": 2}, "width": 0.2},
        },
        "teacher": None,
        "student": {"net": NET["net"], "path": {"kind": "straight"}, "prediction": "velocity", "clock": "1000t"},
    }
}


def recipe_of(method, **changes):
    return recipe_from({**BASE, **OWN.get(method, {}), "method": METHODS[method], **changes})


def run_crew(folder, *scenarios):
    """What scenarios found, each by its name."""
    source = Path(__file__).parents[1] / "src"
    path = f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, __file__, *scenarios, str(folder)], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in scenarios}


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
    states = method.reads_states
    pairs = Pairs(setting.raw, setting.task, wanted, run, teacher_hash="law", states=states) if wanted else None
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
    """One process against two, replicated and sharded, and against one that was stopped, for every method."""

    def one():
        return {name: fit(recipe_of(name), folder / f"one_{name}") for name in METHODS}

    def stopped():
        for name in METHODS:
            fit(recipe_of(name), folder / f"stopped_{name}", stop=3)

    def again():
        return {name: fit(recipe_of(name), folder / f"stopped_{name}", resume=True) for name in METHODS}

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
    Crew(1, stopped, folder / "crew4").results()
    (resumed,) = Crew(1, again, folder / "crew5").results()
    report = {
        f"resumed_{name}": {
            "same": all(torch.equal(v, alone[name][k]) for k, v in weights.items()),
            "steps": sorted(losses(folder / f"stopped_{name}")),
        }
        for name, weights in resumed.items()
    }
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


def resumed(folder):
    """A checkpoint of two processes goes on in one and one of one in two, replicated and sharded."""
    found = {}
    for name, parallel in (("replicated", {}), ("sharded", {"shard": True})):
        recipe = recipe_of("dmd2", parallel=parallel)
        place = folder / name
        work(2, recipe, place / "whole")
        for label, before, after in (("down", 2, 1), ("up", 1, 2), ("same", 2, 2)):
            run = place / label
            work(before, recipe, run, stop=4)
            stored = newest_state(run)
            work(after, recipe, run, resume=True)
            gap = largest_gap(losses(place / "whole"), losses(run))
            found[f"{name}_{label}"] = {"loss": gap, "step": stored["step"], "files": len(stored["files"])}
    return found


def work(size, recipe, run, resume=False, stop=None):
    Crew(size, lambda: fit(recipe, run, resume=resume, stop=stop), run.parent / "crew").results()


def newest_state(run):
    return open_state(sorted((run / "checkpoints").glob("stage_*"))[-1]).facts


# Killing


WRITING = {"whole_folder", "save_state", "write_text", "_write", "_sync", "file_hash"}


class Clock:
    """Counts what Python and C functions are entered; at one of them it sends its own process a signal."""

    def __init__(self, at=None, number=signal.SIGKILL):
        self.at, self.number, self.events, self.writing, self.depth = at, number, 0, [], 0

    def __call__(self, frame, event, argument):
        if event in ("call", "c_call"):
            self.events += 1
            if self.at is not None and self.events == self.at:
                os.kill(os.getpid(), self.number)
        if self.at is None and event in ("call", "return") and frame.f_code.co_name in WRITING:
            self.depth += 1 if event == "call" else -1
        if self.at is None and self.depth > 0 and event in ("call", "c_call"):
            self.writing.append(self.events)


def life(recipe, run, clock=None):
    """All of a run but the evaluation and the packing of its student: opened, taught, kept."""
    sys.setprofile(clock)
    try:
        watch, setting, open_run = _begin(recipe, run, True, "cpu", None, False)
        _learn(recipe, run, setting, True, "cpu", watch, "train", open_run)
    finally:
        sys.setprofile(None)
    return clock and (clock.events, clock.writing)


def instants(events, writing, count, seed):
    """Half of them while something is written, the others anywhere in a run's life."""
    rng = random.Random(seed)
    return rng.sample(writing, min(len(writing), count // 2)) + [
        rng.randrange(1, events) for _ in range(count - count // 2)
    ]


def outcome(run):
    """The weights' hash, the log's steps, and what should not be there."""
    tensors, _ = load_state(run / "stages" / "00")
    digest = hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in sorted(tensors.items()))).hexdigest()
    left = [str(f.relative_to(run)) for f in run.rglob("*") if ASIDE.match(f.name)]
    return {
        "weights": digest,
        "steps": sorted(losses(run)),
        "left": left,
        "checkpoints": (run / "checkpoints").exists(),
    }


KILLS = os.environ.get("FEWSTEP_KILLS")  # instants in every scenario, for a longer look; None: few


def killed(folder, number=signal.SIGKILL, size=1, count=12, seed=7):
    """Runs ended once at an instant of their lives and taken up again, against one that was left alone."""
    count = int(KILLS or count)
    recipe = recipe_of("dmd2", steps=6, **({"parallel": {"shard": True}} if size > 1 else {}))
    (events, writing), *_ = Crew(size, lambda: life(recipe, folder / "whole", Clock()), folder / "crew").results()
    began = time.monotonic()
    Crew(size, lambda: life(recipe, folder / "again"), folder / "crew").results()
    seconds = time.monotonic() - began
    whole, rows = outcome(folder / "whole"), []
    rng = random.Random(seed)
    timed = 3 if count >= 10 else 1
    plan = [("event", at) for at in instants(events, writing, count - timed, seed)]
    plan += [("second", rng.uniform(0, seconds)) for _ in range(timed)]
    for i, (kind, at) in enumerate(plan):
        run, victim = folder / f"run_{i}", rng.randrange(size)

        def work(run=run, kind=kind, at=at, victim=victim):
            mine = kind == "event" and os.environ.get("RANK", "0") == str(victim)
            life(recipe, run, Clock(at, number) if mine else None)

        crew = Crew(size, work, folder / "crew")
        if kind == "second":
            time.sleep(at)
            os.kill(crew.members[victim], number)
        codes = crew.wait()
        Crew(size, lambda run=run: life(recipe, run), folder / "crew").results()
        rows.append({"kind": kind, "at": at, "codes": codes, "same": outcome(run) == whole, **outcome(run)})
    return {"whole": whole, "rows": rows, "events": events, "writing": len(writing), "seconds": seconds}


def bad_days(folder):
    """A full disk, a changed recipe, a changed teacher, different networks, a failure of one: what each ends with."""
    import resource

    recipe = recipe_of("dmd2", steps=6)
    found = {}

    def full(run):
        size = max(f.stat().st_size for f in (run / "checkpoints").rglob("*.safetensors"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, resource.RLIM_INFINITY))
        try:
            life(recipe, run)
        except Failed as error:
            return str(error)

    def told(work):
        try:
            work()
        except Exception as error:
            return type(error).__name__, str(error)

    run = folder / "full"
    Crew(1, lambda: fit(recipe, run, stop=2), folder / "crew").wait()
    (found["full"],) = Crew(1, lambda: full(run), folder / "crew").results()
    found["full_left"] = [f.name for f in (run / "checkpoints").iterdir()]
    found["full_whole"] = newest_state(run)["step"]
    torn = folder / "torn"
    Crew(1, lambda: fit(recipe, torn, stop=4), folder / "crew").wait()
    state = sorted((torn / "checkpoints").glob("stage_*"))[-1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    Crew(1, lambda: fit(recipe, torn, resume=True), folder / "crew").results()
    found["torn_steps"] = sorted(losses(torn))
    Crew(1, lambda: life(recipe, folder / "teacher", Clock(None)), folder / "crew").results()

    def other(run):
        changed = recipe_of(
            "dmd2", steps=6, task={"name": "mixture", "options": {**BASE["task"]["options"], "std": 0.5}}
        )
        watch, setting, open_run = _begin(recipe, run, True, "cpu", None, False)
        setting = jobs.prepare(changed, run, "cpu", Nobody())
        return told(lambda: _learn(recipe, run, setting, True, "cpu", watch, "train", open_run))

    (found["teacher"],) = Crew(1, lambda: other(folder / "teacher"), folder / "crew").results()

    def differing():
        mine = recipe_of("denoising", student={**NET, "net": {**NET["net"], "width": 8 + 2 * int(os.environ["RANK"])}})
        return told(lambda: fit(mine, folder / "differing"))

    found["differing"] = Crew(2, differing, folder / "crew").results()
    found["narrow"] = Crew(
        2, lambda: told(lambda: fit(recipe_of("denoising", batch=1), folder / "narrow")), folder / "crew"
    ).results()

    def one_fails():
        if os.environ["RANK"] == "1":
            raise Failed("the disk of process 1 is gone")
        fit(recipe_of("denoising"), folder / "one_fails")

    def first_fails():
        def work():
            raise Failed("the first process cannot write")

        alone(work)

    crew = Crew(2, first_fails, folder / "first")
    found["first_fails"] = crew.wait()
    crew = Crew(2, one_fails, folder / "fails")
    found["one_fails"] = crew.wait()
    found["one_fails_lines"] = [
        f.read_text().strip().splitlines()[-1] for f in sorted((folder / "fails").glob("*.error"))
    ]
    return found


# Sampling


def sampled(folder):
    """The same files from 1, 2 and 3 processes."""
    from fewstep.denoiser import Wrapped
    from fewstep.interop import save_student
    from fewstep.nets import build
    from fewstep.path import Straight
    from fewstep.student import Student

    torch.manual_seed(0)
    net = build({"kind": "mlp", "shape": (1, 8, 8), "width": 8, "depth": 1, "classes": 3})
    student = Student(
        Wrapped(net, Straight(), "x0", "t"), (1, 8, 8), steps={1: (1.0,), 2: (1.0, 0.5)}, policy="renoise", classes=3
    )
    Crew(1, lambda: save_student(
        student, folder / "student", method="test", teacher=None, name="test", task="test", classes=3,
        value_range=(-1.0, 1.0), licence="mit",
    ) and None, folder / "crew").results()  # fmt: skip
    hashes = {}
    for size in (1, 2, 3):
        out = folder / f"by_{size}"
        Crew(
            size, lambda out=out: len(jobs.sample(folder / "student", 1000, steps=2, out=out)), folder / "crew"
        ).results()
        hashes[size] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}
    Crew(1, lambda: len(jobs.sample(folder / "student", 130, steps=2, out=folder / "fewer")), folder / "crew").results()
    fewer = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((folder / "fewer").glob("*.png"))}
    return {
        "count": {size: len([n for n in found if n.endswith(".png")]) for size, found in hashes.items()},
        "same": hashes[1] == hashes[2] == hashes[3],
        "kinds": len({v for k, v in hashes[1].items() if k.endswith(".png")}),
        "fewer": all(hashes[1][name] == value for name, value in fewer.items()) and len(fewer),
    }


def measured(folder):
    """The same table from one process and from two."""
    from fewstep.denoiser import Reframed
    from fewstep.evaluate import Protocol, evaluate
    from fewstep.tasks import task_named

    recipe = recipe_from({**BASE, "method": METHODS["consistency"]})
    protocol = Protocol(
        noise_seeds=2, scout_seeds=1, detail_seeds=1, nfes=(1, 4), full_nfe=9, timing_rounds=1, batch=16
    )

    def rows():
        task = task_named("mixture", BASE["task"]["options"])
        teacher = Reframed(task.law, recipe.student.path)
        torch.manual_seed(0)
        student = make_student(recipe, task, teacher, task.shape)
        report = evaluate(student, teacher, task, protocol, seed=1)
        return [row.model_dump(mode="json", exclude={"samples_per_s"}) for row in report.rows]

    (one,) = Crew(1, rows, folder / "crew").results()
    two = Crew(2, rows, folder / "crew").results()
    return {"same": one == two[0] == two[1], "rows": len(one), "one": one, "two": two[0]}


def terminated(folder):
    return killed(folder, signal.SIGTERM, count=4)


def paired(folder):
    """Pairs made by two processes: what each made, and whether both have all of them."""
    import fewstep.train.pairs as module
    from fewstep.denoiser import Counted
    from fewstep.method import PairOptions
    from fewstep.tasks import task_named

    module.SHARD = 32
    task = task_named("mixture", {"modes": 2, "classes": 2, "train_count": 50})
    plan = PairOptions(count=160, solver="euler", nfe=1)

    def make(place):
        teacher = Counted(task.law)
        pairs = Pairs(teacher, task, plan, place, teacher_hash="law")
        return teacher.images, pairs.rows(torch.arange(160)).target

    (one,) = Crew(1, lambda: make(folder / "one"), folder / "crew").results()
    two = Crew(2, lambda: make(folder / "two"), folder / "crew").results()
    again = Crew(2, lambda: make(folder / "two")[0], folder / "crew").results()
    same = all(torch.equal(target, one[1]) for _, target in two)
    return {"made": [count for count, _ in two], "same": same, "again": again}


def pair_killed(folder):
    return killed(folder, size=2, count=3)


def pair_terminated(folder):
    return killed(folder, signal.SIGTERM, size=2, count=2)


SCENARIOS = {
    "equal": equal, "resumed": resumed, "killed": killed, "terminated": terminated, "pair_killed": pair_killed,
    "pair_terminated": pair_terminated, "bad_days": bad_days, "sampled": sampled, "measured": measured,
    "paired": paired,
}  # fmt: skip


if __name__ == "__main__":
    import torch._dynamo  # optimisers import it; once here, not in every fork

    torch.set_num_threads(1)
    *scenarios, place = sys.argv[1:]
    for scenario in scenarios:
        result = SCENARIOS[scenario](Path(place) / scenario)
        (Path(place) / f"{scenario}.json").write_text(json.dumps(result))
