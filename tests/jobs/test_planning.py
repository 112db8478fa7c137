"""A plan says what a run costs, whether it fits, what would make it fit, and whose licence comes with it."""

from __future__ import annotations

import pytest
import torch

from fewstep import jobs
from fewstep.jobs import planning
from fewstep.screen import plan_text
from fewstep.train.recipe import recipe_from

MIXTURE = {"name": "mixture", "options": {"modes": 4, "std": 0.25, "train_count": 500, "test_count": 200}}
PRECONDITIONED = {
    "path": {"kind": "exploding", "sigma_min": 0.02, "sigma_max": 20.0},
    "prediction": "cm",
    "clock": "250 log_sigma",
    "scale_input": True,
}
TOY = {
    "name": "toy",
    "steps": 40,
    "batch": 64,
    "task": MIXTURE,
    "teacher": {"source": "law"},
    "student": {"net": {"kind": "mlp", "width": 16, "depth": 1}, **PRECONDITIONED},
    "method": {"name": "dmd2", "options": {"critic_turns": 2}},
    "evaluate": {"enabled": False},
}
LARGE = {**TOY, "student": {"net": {"kind": "mlp", "width": 256, "depth": 8}, **PRECONDITIONED}, "batch": 512}


def parameters(width: int, depth: int, size: int = 2) -> int:
    """Of an MLP, by hand."""
    waves = min(64, 2 * (width // 2))
    time = (waves + 1) * width + (width + 1) * width
    block = 2 * width + 3 * (width + 1) * width
    return (size + 1) * width + time + depth * block + 2 * width + (width + 1) * size


@pytest.fixture(scope="module")
def planned():
    return jobs.plan(recipe_from(TOY))


def test_a_plan_counts_every_network_and_what_is_kept_of_it(planned):
    count = parameters(16, 1)
    assert planned["networks"]["student"] == {"parameters": count, "learned": count, "frozen": 0}
    assert planned["networks"]["critic"]["learned"] == count
    assert planned["parameters"] == 2 * count
    mb = 2**20
    assert planned["states_mb"]["moments"] == pytest.approx(2 * count * 8 / mb, abs=0.006)
    assert planned["states_mb"]["gradients"] == pytest.approx(2 * count * 4 / mb, abs=0.006)
    assert planned["states_mb"]["average"] == pytest.approx(count * 4 / mb, abs=0.006)


def test_a_small_run_fits_and_each_phase_has_its_time_and_its_peak(planned):
    assert planned["fits"] and planned["how"] == "rehearsed" and planned["options"] == []
    assert [p["phase"] for p in planned["phases"]] == ["loading", "training", "saving"]
    assert planned["memory_mb"] == max(p["memory_mb"] for p in planned["phases"])
    assert planned["minutes"] == pytest.approx(sum(p["seconds"] for p in planned["phases"]) / 60, abs=0.01)
    assert planned["licences"] == [] and planned["licence"] == "unknown"
    assert "fits:" in plan_text(planned)


def test_a_hundred_times_the_steps_are_about_a_hundred_times_the_training(planned, monkeypatch):
    monkeypatch.setattr(planning, "SHIPPED", 0)
    longer = jobs.plan(recipe_from({**TOY, "steps": 4000}))
    one, other = (p["phases"][1]["processor_seconds"] for p in (planned, longer))
    assert 10 < other / one < 300  # the first steps, probes and checkpoints cost the same
    assert longer["steps"] == [4000]


def test_what_does_not_fit_is_told_what_would_make_it_fit(monkeypatch):
    monkeypatch.setattr(planning, "SHIPPED", 0)  # what saving costs is not asked here
    plan = jobs.plan(recipe_from({**LARGE, "teacher": None, "method": {"name": "denoising"}}), memory=0.2)
    assert not plan["fits"]
    figures = {one["option"]: one for one in plan["options"]}
    assert {"gradient checkpointing", "passes in bfloat16", "weights in bfloat16"} <= set(figures)
    assert all(one["fits"] == (one["memory_mb"] <= 0.2 * 1024 + 0.1) for one in plan["options"])
    assert figures["gradient checkpointing"]["memory_mb"] < plan["memory_mb"]
    assert figures["passes in bfloat16"]["memory_mb"] < plan["memory_mb"]
    text = plan_text(plan)
    assert "does not fit" in text and "precision.checkpointing=true" in text


def test_what_is_too_large_to_try_is_counted_from_its_shapes(monkeypatch):
    recipe = recipe_from({**LARGE, "teacher": None, "method": {"name": "denoising"}, "steps": 10})
    monkeypatch.setattr("fewstep.machine.memory", lambda device: 2**24)
    monkeypatch.setattr(planning.training, "_learn", lambda *_: pytest.fail("nothing may be run"))
    plan = jobs.plan(recipe)
    assert not plan["fits"] and plan["how"].startswith("counted")
    count = parameters(256, 8)
    assert plan["parameters"] == count
    states = sum(plan["states_mb"].values())
    assert states == pytest.approx(count * (4 + 4 + 8 + 4) / 2**20, rel=0.01)
    activations = plan["phases"][1]["memory_mb"] - plan["phases"][0]["memory_mb"] - states
    vectors = (activations + plan["states_mb"]["gradients"]) / (512 * 8 * 256 * 4 / 2**20)  # before gradients are made
    assert 4 < vectors < 12  # a block keeps what enters its norm, its layers and its activation
    assert plan["minutes"] >= 0
    together = plan["options"][-1]
    assert "batch=" in together["change"] or together["option"].startswith("sharding")


def test_sixteen_bits_halve_weights_and_gradients_and_leave_the_moments():
    recipe = recipe_from({**LARGE, "precision": {"dtype": "bfloat16", "weights": "bfloat16"}})
    setting = jobs.prepare(recipe, planning.File("."), "cpu", planning.Nobody())
    torch.manual_seed(0)
    facts = planning._facts(recipe, planning._built(recipe, setting))
    count = 2 * parameters(256, 8)
    assert facts["states"]["gradients"] == 2 * count
    assert facts["states"]["moments"] == 8 * count
    assert facts["states"]["weights"] == pytest.approx(2 * count, rel=0.01)
