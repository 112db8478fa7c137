"""SymmFlow as a user runs it: a recipe, its report, the folder it leaves, and samples by label."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fewstep import jobs
from fewstep.errors import Refused
from fewstep.interop import Contract, check_student, load_teacher
from fewstep.jobs.using import sample
from fewstep.jobs.verifying import scores_of
from fewstep.joint import Joint, nearest
from fewstep.methods.symmflow import generate, read
from fewstep.student import Student
from fewstep.tasks import task_named
from fewstep.train.recipe import load_recipe, recipe_from

MIXTURE = {"modes": 3, "classes": 3, "std": 0.25, "train_count": 2000, "test_count": 300}
PAIRS = {"name": "labelled", "options": {"of": "mixture", "options": MIXTURE, "width": 0.2}}
RECIPE = {
    "name": "pairs",
    "steps": 500,
    "batch": 128,
    "task": PAIRS,
    "student": {
        "net": {"kind": "mlp", "width": 64, "depth": 2},
        "path": {"kind": "straight"},
        "prediction": "velocity",
        "clock": "1000t",
    },
    "method": {"name": "symmflow"},
    "optim": {"lr": 4e-3},
    "ema": {"decay": 0.99},
    "evaluate": {
        "protocol": {
            "noise_seeds": 2, "scout_seeds": 1, "detail_seeds": 1, "nfes": [1, 8], "full_nfe": 15, "timing_rounds": 0
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("pairs") / "run"
    return run, jobs.distill(recipe_from(RECIPE), run)


def test_a_recipe_trains_it_and_its_report_has_generation_and_reading(finished):
    run, report = finished
    full = next(row for row in report["rows"] if row["model"] == "teacher")
    assert full["accuracy"] > 0.9 and full["count"] == 300
    assert [one["what"] for one in report["readings"]] == ["labels"] * 3
    found = scores_of(report)
    assert found["read_accuracy"] == report["readings"][1]["accuracy"] > 0.95
    assert "read_iou" not in found
    net = json.loads((run / "teacher" / "fewstep.json").read_text())["network"]
    assert net["classes"] is None and net["shape"] == [5]  # the label is in the sample, and told in no other way


def test_its_folder_loads_reads_and_generates_and_says_that_stock_pipelines_cannot(finished):
    run, _ = finished
    teacher = load_teacher(run / "teacher")
    joint = teacher.contract.joint
    assert joint == Joint(picture=2, classes=3, code="one_hot", width=0.2)
    assert teacher.contract.pipeline is None and check_student(run / "teacher").ok
    card = (run / "teacher" / "README.md").read_text()
    assert "plain diffusers cannot run it: its samples hold their labels" in card
    code = card.split("```python\n")[1].split("```")[0]
    task = task_named("mixture", MIXTURE)
    both = Student(teacher.denoiser, teacher.shape)
    told = nearest(read(both, task.test.data, joint.channels, torch.Generator().manual_seed(0), draws=4), joint.book)
    assert (told == task.test.cond).double().mean() > 0.95
    made = generate(both, torch.randn(300, 2), task.test.cond, joint.book, 8, torch.Generator().manual_seed(1), 0.2)
    assert (torch.cdist(made, task.law.mean.float()).argmin(1) == task.test.cond).double().mean() > 0.9
    scope = {}
    exec(code.replace('load_teacher(".")', f"load_teacher({str(run / 'teacher')!r})"), scope)
    assert scope["pictures"].shape == (4, 2) and scope["labels"].tolist() == [0, 1, 2, 0]


def test_samples_by_label_are_pictures_alone(finished, tmp_path):
    run, _ = finished
    files = sample(run, 6, steps=8, labels=[2, 0], out=tmp_path)
    made = torch.stack([load_file(file)["sample"] for file in files])
    assert made.shape == (6, 2)
    mean = task_named("mixture", MIXTURE).law.mean.float()
    assert torch.cdist(made, mean).argmin(1).tolist() == [2, 0] * 3


def test_a_contract_without_pairs_does_not_speak_of_them(finished):
    run, _ = finished
    kept = json.loads((run / "teacher" / "fewstep.json").read_text())
    assert "joint" in kept
    assert "joint" not in Contract.parse({k: v for k, v in kept.items() if k != "joint"}).plain()
    with pytest.raises(Refused, match="joint has 8 channels, shape 5"):
        Contract.parse({**kept, "joint": {**kept["joint"], "classes": 6}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "mixture", "options": MIXTURE}}, "take task 'labelled' of 'mixture'"),
        ({"method": {"name": "flow_matching"}}, "'flow_matching' would take for noise"),
    ],
)
def test_pairs_and_methods_that_do_not_fit_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(Refused, match=message):
        jobs.distill(recipe_from({**RECIPE, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_shipped_flow_differs_from_the_pairs_in_task_and_method_alone():
    """So that the two can be held against each other, network for network and call for call."""
    pairs, flow = (load_recipe(name).model_dump(mode="json") for name in ("digits_symmflow", "digits_flow"))
    apart = {key for key in pairs if pairs[key] != flow[key]}
    assert apart <= {"name", "papers", "task", "method", "expect"}
    assert pairs["task"]["options"]["options"] == flow["task"]["options"]
