"""``--method auto`` chooses by what was measured, says why in one line, and leaves a recipe that needs no auto."""

from __future__ import annotations

import json

import pytest
import torch
from command import one_line

from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.jobs.choosing import decide
from fewstep.jobs.setting import Setting, prepare
from fewstep.jobs.training import _learn
from fewstep.nets import build
from fewstep.path import Exploding
from fewstep.tasks.base import Split, Task
from fewstep.train.recipe import load_recipe, recipe_from
from fewstep.train.store import load_state
from fewstep.train.trainer import Nobody

RECIPE = """
steps = 12
batch = 32
[task]
name = "mixture"
options = { modes = 4, std = 0.25, train_count = 200, test_count = 100 }
[teacher]
source = "law"
[student]
net = { kind = "mlp", width = 16, depth = 1 }
path = { kind = "exploding", sigma_min = 0.02, sigma_max = 20.0 }
prediction = "cm"
clock = "250 log_sigma"
scale_input = true
[method]
name = "dmd2"
[evaluate]
enabled = false
"""
GIB = 2**30


class Pictures(Task):
    """Random pictures of a side, with or without a claim to be data."""

    name = "made"
    classes, data_std, value_range = 10, 0.6, (-1.0, 1.0)

    def __init__(self, side, has_data=True):
        self.shape, self.has_data = (1, side, side), has_data
        self._split = Split(torch.zeros(64, *self.shape), torch.arange(64) % 10)

    @property
    def train(self):
        return self._split

    test = train


def setting(side, has_data=True):
    net = build({"kind": "unet", "shape": (1, side, side), "widths": (8, 16), "classes": 10})
    teacher = Wrapped(net, Exploding(sigma_min=0.02, sigma_max=20.0), "cm", "250 log_sigma", scale_input=True)
    return Setting(Pictures(side, has_data), None, teacher, teacher, (1, side, side))


def base(**changes):
    plain = {"steps": 700, "batch": 8, "task": {"name": "digits"}, "teacher": {"source": "digits"}}
    return recipe_from({**plain, "method": {"name": "consistency"}, **changes})


@pytest.mark.parametrize(
    ("side", "has_data", "name"), [(8, True, "regression"), (28, True, "sim"), (28, False, "dmd2")]
)
def test_small_pictures_take_pairs_larger_ones_scores_and_prompts_the_game_without_pictures(side, has_data, name):
    recipe, line = decide(base(), setting(side, has_data), "cpu", 8 * GIB)
    assert recipe.method.name == name
    assert line.startswith(f"auto: {name} (") and "\n" not in line and "of 8.0 GiB" in line
    assert recipe.checkpoint.best and len(recipe.stages) == (name == "regression")
    assert recipe.method.options["start"] == 2.0  # 2.5 / 0.75 of the spread
    if name != "regression":
        assert recipe.method.options["critic_turns"] == 1
        assert recipe.optim_of("critic").lr == 2 * recipe.optim.lr


def test_behind_pairs_comes_a_game_whose_critic_keeps_up_where_memory_time_and_steps_hold_it():
    where = setting(8)
    recipe, line = decide(base(), where, "cpu", 8 * GIB)
    (stage,) = recipe.stages
    assert (recipe.steps, stage.steps) == (700, 210) and "700 steps, then 210" in line and ", then sim (" in line
    assert stage.method.name == "sim" and stage.method.options["critic_turns"] == 4
    assert stage.method.options["start"] == recipe.method.options["start"]
    rate = stage.optim.players["critic"].lr / stage.optim.lr
    assert rate == pytest.approx(5.0)
    alone = [
        decide(base(steps=600), where, "cpu", 8 * GIB),
        decide(base(), where, "cpu", 8 * GIB, minutes=0.05),
        decide(base(), where, "cpu", int(1.1 * 2**20 * int(line.split("about ")[1].split(" ")[0]) / 2)),
    ]
    for recipe, line in alone:
        assert recipe.method.name == "regression" and recipe.stages == () and ", then" not in line
    long, line = decide(base(), where, "cpu", 8 * GIB, minutes=1000.0)
    assert (long.steps, long.stages[0].steps) == (700, 210) and "700 steps in 500 min, then 210" in line


def test_a_smaller_memory_takes_a_cheaper_game_then_adapters_then_nothing():
    """Every step down the budget is the next candidate; what it needs by its own count is what it is given."""
    where, found, limit = setting(28), [], 8 * GIB
    for _ in range(8):
        try:
            recipe, line = decide(base(), where, "cpu", limit)
        except Refused as error:
            found.append(str(error))
            break
        lora = recipe.method.options.get("critic_lora")
        found.append((recipe.method.name, lora, recipe.student.lora is not None))
        assert ("critic LoRA" in line) == (lora is not None)
        need = int(line.split("about ")[1].split(" ")[0]) * 2**20
        assert need <= limit
        limit = int(need * 0.8)
    *kinds, refusal = found
    assert kinds[0] == ("sim", None, False)
    assert len(set(kinds)) == len(kinds) >= 2
    assert "take a smaller batch" in refusal and "\n" not in refusal


def test_little_time_takes_pairs_and_as_few_of_them_as_there_is_time_for():
    long, line = decide(base(), setting(28), "cpu", 8 * GIB, minutes=1000.0)
    assert (long.method.name, long.steps) == ("sim", 700) and "in 1000 min" in line
    short, line = decide(base(), setting(28), "cpu", 8 * GIB, minutes=0.05)
    assert short.method.name == "regression" and short.steps < 700
    assert short.method.options["pairs"]["count"] < 12_000 and "too few for a game" in line


def test_a_run_by_auto_says_why_and_its_recipe_runs_to_the_same_weights_without_auto(fewstep, tmp_path):
    (tmp_path / "toy.toml").write_text(RECIPE)
    one = fewstep("distill", "toy.toml", "--method", "auto", "method.options.pairs.count=64", "--out", "one", "-q")
    assert one.code == 0, one.err
    chosen = load_recipe(tmp_path / "one" / "recipe.toml")
    assert chosen.method.name == "regression" and chosen.method.options["pairs"]["count"] == 64
    line = json.loads((tmp_path / "one" / "environment.json").read_text())["chosen"]
    assert line.startswith("auto: regression (")
    again = prepare(chosen, tmp_path / "two", "cpu", Nobody())
    _learn(chosen, tmp_path / "two", again, False, "cpu", Nobody(), "distill")
    first, second = (load_state(tmp_path / run / "stages" / "00")[0] for run in ("one", "two"))
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_plan_by_auto_opens_with_the_same_line(fewstep, tmp_path):
    (tmp_path / "toy.toml").write_text(RECIPE)
    answer = fewstep("plan", "toy.toml", "--method", "auto", "method.options.pairs.count=64", "--json")
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    assert plan["method"] == "regression" and plan["chosen"].startswith("auto: regression (pairs of the teacher): ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["distill", "digits", "--minutes", "5"], "--minutes 5 is a budget to choose by: add --method auto"),
        (["distill", "digits", "--memory", "2"], "--memory 2 is a budget to choose by: add --method auto"),
        (["distill", "digits", "--method", "auto", "--lora", "4"], "--lora 4 and --method auto both choose"),
        (["plan", "digits_teacher", "--method", "auto"], "recipe 'digits_teacher' names none"),
        (["distill", "digits", "--method", "auto", "--minutes", "0"], "invalid value for '--minutes'"),
        (["distill", "digits", "--method", "autoo"], "unknown method 'autoo'"),
        (["plan", "toy.toml", "--method", "auto", "--memory", "0.01", "batch=100000"], "found nothing for 10 MiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_budget_is_one_line(fewstep, tmp_path, arguments, line):
    (tmp_path / "toy.toml").write_text(RECIPE)
    answer = fewstep(*arguments)
    assert answer.code == 2
    assert line in one_line(answer)
