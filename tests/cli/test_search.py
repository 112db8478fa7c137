"""fewstep search and fewstep sample --plan, as a person meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import one_line

from fewstep.interop.teacher import packaged
from fewstep.solvers import SolverPlan, StepPlan, recommended

QUICK = ["--starts", "4", "--budget", "4", "--how", "evolution", "--device", "cpu", "--threads", "1"]
SMALL = [*QUICK, "--objective", "features"]


@pytest.fixture(scope="module")
def path():
    from fewstep.interop import load_teacher

    return load_teacher("digits").denoiser.path


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["digits", "--nfe", "0"], "nfe must lie between 1 and 1000 calls, got 0"),
        (["digits", "--nfe", "two"], "invalid value for '--nfe'"),
        (["digits"], "missing option '--nfe'"),
        (["digits", "--nfe", "2", "--objective", "distanse"], "unknown objective 'distanse': did you mean 'distance'?"),
        (["digits", "--nfe", "2", "--objective", "none.py:score"], "there is no none.py"),
        (["digits", "--nfe", "2", "--objective", "fewstep:score"], "fewstep has no function 'score'"),
        (["digits", "--nfe", "2", "--objective", "no_such_module:score"], "no_such_module"),
        (["digits", "--nfe", "2", "--how", "random"], "unknown search 'random': one of auto, evolution"),
        (["digits", "--nfe", "2", "--budget", "0"], "budget must be at least 1 candidate, got 0"),
        (["digits", "--nfe", "2", "--starts", "1"], "starts must be at least 2, got 1"),
        (["digits", "--nfe", "2", "--seed", "-1"], "seed must lie between 0"),
        (["digits", "--nfe", "2", "--out", "none/plan.json"], "there is no folder none"),
        (["digits", "--nfe", "2", "--resume"], "nothing to resume"),
        (["digits", "--nfe", "2", "--prompts", "none.txt"], "none.txt"),
        (["digits", "--nfe", "2", "--reference", "digit"], "digit"),
        (
            ["digits", "--nfe", "2", "--reference", "digits", "--objective", "distance"],
            "a reference is read by the objective frechet, and 'distance' was asked for",
        ),
        (["digits", "--nfe", "2", "--reference", "mixture"], "the teacher makes 1x8x8, the reference is 2"),
        (["none", "--nfe", "2"], "no teacher 'none'"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line_and_exit_2(fewstep, tmp_path, arguments, says):
    answer = fewstep("search", *arguments)
    assert answer.code == 2
    assert says in one_line(answer)
    assert not list(tmp_path.iterdir()), "a refused search leaves nothing behind"


def test_a_plan_that_is_there_and_a_search_that_was_stopped_are_not_overwritten(fewstep, tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    answer = fewstep("search", "digits", "--nfe", "2")
    assert (answer.code, "plan.json is already there" in one_line(answer)) == (2, True)
    assert (tmp_path / "plan.json").read_text() == "mine"
    (tmp_path / "other.json.search").mkdir()
    answer = fewstep("search", "digits", "--nfe", "2", "-o", "other.json")
    assert (answer.code, "add --resume" in one_line(answer)) == (2, True)


def test_a_search_writes_a_plan_that_sample_follows_and_says_what_it_gains(fewstep, tmp_path):
    answer = fewstep("search", "digits", "--nfe", "2", *SMALL, "--json", "-q")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert SolverPlan.load(tmp_path / "plan.json").nfe == result["nfe"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert result["gain"] >= 1
    samplers = {row["sampler"] for row in result["fixed"]}
    assert {"recommended", "euler", "dpm2m", "unipc3", "deis"} <= samplers
    assert all(row["gain"] >= 1 - 1e-9 for row in result["fixed"])
    assert fewstep("search", "digits", "--nfe", "2", *SMALL, "--json", "-q", "-o", "again.json").code == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "plan.json").read_text()
    for folder in ("one", "same"):
        answer = fewstep("sample", "digits", "--plan", "plan.json", "-n", "2", "-o", folder, "--device", "cpu")
        assert answer.code == 0, answer.err
    assert (tmp_path / "one/00001.png").read_bytes() == (tmp_path / "same/00001.png").read_bytes()
    assert json.loads((tmp_path / "one/manifest.json").read_text())["samples"][0]["steps"] == 2
    answer = fewstep("sample", "digits", "--plan", "plan.json", "--steps", "3")
    assert (answer.code, "makes 2 calls, --steps asks for 3" in one_line(answer)) == (2, True)


def test_a_scorer_of_ones_own_is_what_the_search_makes_small(fewstep, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(samples, cond):\n"
        "    assert samples.shape == (len(cond), 1, 8, 8) and samples.abs().max() <= 1\n"
        "    return (samples + 1).flatten(1).mean(1)\n"
    )
    answer = fewstep("search", "digits", "--nfe", "2", *SMALL, "--objective", "./mine.py:score", "-q")
    assert answer.code == 0, answer.err
    assert "mine.py:score" in answer.out and "plan.json: " in answer.out


@pytest.mark.slow
def test_a_packaged_teacher_is_held_to_its_own_real_data_by_a_network_that_does_not_measure(fewstep, monkeypatch):
    from fewstep.jobs import searching

    asked, plain = [], searching.features_for

    def heard(task, *args, **more):
        asked.append((task.name, more["purpose"]))
        return plain(task, *args, **more)

    monkeypatch.setattr(searching, "features_for", heard)
    answer = fewstep("search", "digits", "--nfe", "2", *QUICK, "--json", "-q")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["objective"] == "frechet"
    assert asked == [("digits", "select")]


def test_sample_follows_the_plan_and_not_its_own_sampler(fewstep, tmp_path, path):
    recommended(path, 3).save(tmp_path / "plan.json")
    for name, more in (("plan", ["--plan", "plan.json"]), ("plain", ["--steps", "3"])):
        assert fewstep("sample", "digits", "-n", "1", "-o", name, "--device", "cpu", *more).code == 0
    assert (tmp_path / "plan/00000.png").read_bytes() != (tmp_path / "plain/00000.png").read_bytes()


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "plan.json is not a plan"),
        ('{"levels": [null], "steps": [{"order": 99}]}', "order"),
        ('{"levels": [null, 1e400], "steps": [{}, {}]}', "plan.json is not a plan"),
        (
            '{"levels": [-9.0, 0.0], "steps": [{}, {}]}',
            "does not fit digits: Exploding does not reach the plan's level",
        ),
        ('{"levels": ["__import__(\'os\')"], "steps": [{}]}', "plan.json is not a plan"),
    ],
)
def test_a_hostile_plan_or_one_for_another_path_is_refused_by_name(fewstep, tmp_path, text, says):
    (tmp_path / "plan.json").write_text(text)
    answer = fewstep("sample", "digits", "--plan", "plan.json", "--device", "cpu")
    assert answer.code == 2
    assert says in one_line(answer)
    assert not (tmp_path / "samples").exists()


def test_a_plan_that_is_not_there_and_one_for_a_student_are_refused(fewstep, tmp_path, path, monkeypatch):
    answer = fewstep("sample", "digits", "--plan", "none.json")
    assert (answer.code, "cannot read the plan none.json" in one_line(answer)) == (2, True)
    recommended(path, 2).save(tmp_path / "plan.json")
    student = tmp_path / "student"
    student.mkdir()
    contract = json.loads((packaged()["digits"] / "fewstep.json").read_text())
    contract |= {"role": "student", "steps": [{"count": 1, "times": [20.0], "sigmas": [20.0]}]}
    (student / "fewstep.json").write_text(json.dumps(contract))
    answer = fewstep("sample", "student", "--plan", "plan.json")
    assert answer.code == 2
    assert "student is a student, and a plan is for teachers" in one_line(answer)


def test_a_plan_of_one_call_and_of_free_weights_is_followed(fewstep, tmp_path):
    SolverPlan(levels=(None,), steps=(StepPlan(weights=(1.0,)),)).save(tmp_path / "plan.json")
    assert fewstep("sample", "digits", "--plan", "plan.json", "-n", "1", "--device", "cpu").code == 0


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_ends_with_the_same_plan(fewstep, tmp_path):
    arguments = ["search", "digits", "--nfe", "2", "-q", *SMALL]
    assert fewstep(*arguments, "-o", "whole.json").code == 0
    state, line = tmp_path / "plan.json.search", [sys.executable, "-m", "fewstep", *arguments]
    for how in (signal.SIGTERM, signal.SIGKILL):
        more = ["--resume"] if state.exists() else []
        with subprocess.Popen([*line, *more], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            wait_for_more(state, process)
            os.kill(process.pid, how)
            _, said = process.communicate(timeout=60)
        assert not (tmp_path / "plan.json").exists()
        if how == signal.SIGTERM:
            assert process.returncode == 130
            assert said == "fewstep: interrupted; go on with: the same command with --resume\n"
    answer = fewstep(*arguments, "--resume")
    assert answer.code == 0, answer.err
    assert (tmp_path / "plan.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not state.exists()


def wait_for_more(state: Path, process: subprocess.Popen[str]) -> None:
    """Until a search has written ten more answers than it found."""

    def size() -> int:
        file = state / "journal.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    before, until = size(), time.monotonic() + 100
    while size() < before + 10 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
