"""Two processes are one: the same losses, the same files, checkpoints that either takes up."""

from __future__ import annotations

import pytest
import torch
from crew import METHODS, run_crew

from fewstep.errors import Refused
from fewstep.tasks import task_named
from fewstep.train.build import method_options
from fewstep.train.processes import World, again, alone, gather, launched, world
from fewstep.train.recipe import recipe_from


@pytest.fixture(scope="module")
def crews(tmp_path_factory):
    return run_crew(tmp_path_factory.mktemp("crews"), "equal", "resumed", "sampled", "measured")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["replicated", "sharded"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_losses_and_the_weights_of_one(crews, method, how):
    found = crews["equal"][f"{how}_{method}"]
    assert found["steps"] == 6
    assert found["loss"] < 1e-5 and found["weights"] < 1e-6
    assert found["between"] == 0, "the processes went apart"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_very_weights_of_one_that_was_left_alone(crews, method):
    assert crews["equal"][f"resumed_{method}"] == {"same": True, "steps": [1, 2, 3, 4, 5, 6]}


@pytest.mark.slow
def test_a_batch_that_does_not_split_evenly_gives_the_same_losses(crews):
    assert crews["equal"]["uneven"]["loss"] < 1e-5 and crews["equal"]["uneven"]["weights"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["replicated", "sharded"])
@pytest.mark.parametrize("way", ["down", "up", "same"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(crews, how, way):
    found = crews["resumed"][f"{how}_{way}"]
    assert found["step"] == 4 and found["loss"] < 1e-5
    assert found["files"] == (2 if how == "sharded" and way != "up" else 1)


@pytest.mark.slow
def test_a_thousand_samples_are_the_same_files_from_one_two_and_three_processes(crews):
    found = crews["sampled"]
    assert found["count"] == {"1": 1000, "2": 1000, "3": 1000} and found["kinds"] > 900
    assert found["same"], "files differ"
    assert found["fewer"] == 130, "the last chunk is drawn another way"


@pytest.mark.slow
def test_two_processes_measure_the_same_table_as_one(crews):
    found = crews["measured"]
    assert found["rows"] >= 4 and found["same"], (found["one"], found["two"])


# What needs no second process


def test_alone_everything_is_as_it_was():
    assert world() == World(0, 1) and launched() == 1
    assert alone(lambda: 3) == 3 and gather("here") == ["here"]
    assert again("train runs/x --resume") == "fewstep train runs/x --resume"


def test_rows_of_a_batch_are_all_given_out_once():
    for size, total in ((2, 5), (3, 7), (4, 4)):
        spans = [World(rank, size).rows(total) for rank in range(size)]
        assert [row for start, stop in spans for row in range(start, stop)] == list(range(total))
    with pytest.raises(Refused, match="batch of 2 cannot be spread over 3"):
        World(0, 3).rows(2)


def test_a_process_reads_its_rows_of_the_batch_that_one_would_see():
    task = task_named("mixture", {"train_count": 30, "test_count": 10, "classes": 2})
    whole, part = task.batch(7, 0, 3), task.batch(7, 0, 3, rows=(2, 6))
    assert torch.equal(whole.data[2:6], part.data) and torch.equal(whole.noise[2:6], part.noise)
    assert torch.equal(whole.cond[2:6], part.cond)


def test_sharded_networks_take_differences_and_say_so_where_exact_was_asked_for():
    plain = {
        "steps": 1, "task": {"name": "mixture"}, "teacher": {"source": "law"}, "parallel": {"shard": True},
        "method": {"name": "dmd2", "options": {"gan": {"r1": 0.1}}},
    }  # fmt: skip
    recipe = recipe_from(plain)
    task = task_named("mixture", {"train_count": 30, "test_count": 10})
    assert method_options(recipe.method, recipe, task).gan.r1_kind == "difference"
    flow = recipe_from({**plain, "method": {"name": "meanflow"}})
    assert method_options(flow.method, flow, task).derivative == "difference"
    exact = recipe_from({**plain, "method": {"name": "meanflow", "options": {"derivative": "exact"}}})
    with pytest.raises(Refused, match="derivative = 'exact' does not go with parallel.shard"):
        method_options(exact.method, exact, task)


def test_sharding_is_a_change_of_recipe_and_no_sharding_is_none():
    plain = {"steps": 1, "task": {"name": "mixture"}, "method": {"name": "denoising"}}
    hashes = {
        recipe_from(plain | more).sha256 for more in ({}, {"parallel": {"shard": False}}, {"parallel": {"shard": True}})
    }
    assert len(hashes) == 2
