"""Nothing is lost: whatever ends a run, it goes on to the very weights of one that was left alone."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from crew import Stopper, recipe_of, run_crew

from fewstep import jobs
from fewstep.errors import Failed, Interrupted, Refused
from fewstep.jobs.training import _checkpointed
from fewstep.train.store import load_state, open_state, save_state, sweep, whole_folder


@pytest.fixture(scope="module")
def crews(tmp_path_factory):
    return run_crew(
        tmp_path_factory.mktemp("crews"), "killed", "terminated", "pair_killed", "pair_terminated", "bad_days"
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "terminated", "pair_killed", "pair_terminated"])
def test_a_run_ended_at_any_instant_goes_on_to_the_very_same_weights(crews, how):
    found = crews[how]
    assert len(found["rows"]) >= {"killed": 12, "terminated": 4, "pair_killed": 3, "pair_terminated": 2}[how]
    for row in found["rows"]:
        assert row["same"], row
        assert row["left"] == [] and not row["checkpoints"], row
        assert row["steps"] == [1, 2, 3, 4, 5, 6], row
        assert "hung" not in row["codes"], row
    ended = [row for row in found["rows"] if set(row["codes"]) != {0}]
    assert len(ended) >= len(found["rows"]) // 2, "too few of them were ended at all"
    if how == "killed":
        assert all(row["codes"] == [-signal.SIGKILL] for row in found["rows"] if row["kind"] == "event")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(crews):
    found = crews["bad_days"]
    assert "could not write" in found["full"] and "is whole" in found["full"] and "\n" not in found["full"]
    assert found["full_left"] == ["stage_0_step_00000002"] and found["full_whole"] == 2


@pytest.mark.slow
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(crews):
    assert crews["bad_days"]["torn_steps"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_changed_teacher_is_refused(crews):
    kind, line = crews["bad_days"]["teacher"]
    assert kind == "Refused" and "the teacher changed" in line


@pytest.mark.slow
def test_processes_that_hold_different_networks_stop_at_once_on_all(crews):
    for kind, line in crews["bad_days"]["differing"]:
        assert kind == "Failed" and "different networks" in line
    for kind, line in crews["bad_days"]["narrow"]:
        assert kind == "Refused" and "batch of 1 cannot be spread over 2" in line


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_none_hangs(crews):
    assert crews["bad_days"]["one_fails"] == crews["bad_days"]["first_fails"] == [1, 1]
    first, second = crews["bad_days"]["one_fails_lines"]
    assert "another process of this run ended" in first and "the disk of process 1 is gone" in second


def test_a_stopped_run_gives_out_the_averaged_student_of_its_last_checkpoint(tmp_path):
    recipe = recipe_of("denoising")
    with pytest.raises(Interrupted):
        jobs.train(recipe, tmp_path / "run", watch=Stopper(4))
    found, _, student, spent = _checkpointed(tmp_path / "run")
    tensors, facts = load_state(tmp_path / "run" / "checkpoints" / "stage_0_step_00000004")
    assert found.sha256 == recipe.sha256 and spent["steps"] == [facts["step"]] == [4]
    for name, value in student.named_parameters():
        assert torch.equal(value, tensors[f"ema/{name}"])
        assert not torch.equal(value, tensors[f"method/student.{name}"])
    with pytest.raises(Refused, match="neither a model nor a whole checkpoint"):
        jobs.unfinished(tmp_path)


# What needs no run


def test_a_state_is_read_whole_or_in_rows_and_not_at_all_once_a_byte_is_gone(tmp_path):
    tensors = {"a": torch.arange(12.0).view(6, 2), "b": torch.tensor(3.0)}
    save_state(tmp_path / "one", tensors, {"step": 7})
    state = open_state(tmp_path / "one")
    assert state is not None and state.facts["step"] == 7 and sorted(state.names()) == ["a", "b"]
    assert torch.equal(state.read("a", 1, 4), tensors["a"][1:4]) and state.read("b") == 3
    file = tmp_path / "one" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert open_state(tmp_path / "one") is None and load_state(tmp_path / "one") is None


def test_a_file_outside_its_folder_is_no_state(tmp_path):
    save_state(tmp_path / "one", {"a": torch.ones(1)}, {})
    about = tmp_path / "one" / "state.json"
    facts = json.loads(about.read_text())
    facts["files"] = {"../one/state.safetensors": next(iter(facts["files"].values()))}
    about.write_text(json.dumps(facts))
    assert open_state(tmp_path / "one") is None


def test_what_a_killed_process_left_is_cleared_away_and_what_it_moved_aside_comes_back(tmp_path):
    for name in (".log.jsonl.77.part", "figures.json.77.part"):
        (tmp_path / name).write_text("half")
    for name in ("checkpoints/.stage_0_step_4.77.part", ".student.partial-x_1", ".kept.77.old"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("half")
    (tmp_path / "kept").mkdir()
    (tmp_path / ".student.old-y2" / "model").mkdir(parents=True)
    (tmp_path / ".student.old-y2" / "model" / "file").write_text("whole")
    (tmp_path / "notes.old").write_text("mine")
    sweep(tmp_path)
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["checkpoints", "file", "kept", "notes.old", "student"]
    assert (tmp_path / "student" / "file").read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_as_it_was(tmp_path):
    with whole_folder(tmp_path / "kept") as folder:
        (folder / "file").write_text("old")

    def full() -> None:
        with whole_folder(tmp_path / "kept") as folder:
            (folder / "file").write_text("new")
            raise OSError(28, "no space")

    with pytest.raises(Failed, match="no space"):
        full()
    assert (tmp_path / "kept" / "file").read_text() == "old" and os.listdir(tmp_path) == ["kept"]
