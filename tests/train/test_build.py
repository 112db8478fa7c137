"""A student that is smaller than its teacher."""

from pathlib import Path

import pytest
import torch

from fewstep import jobs
from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.interop import check_student, load_student, save_teacher
from fewstep.jobs.training import _inherit
from fewstep.nets import build
from fewstep.path import Exploding
from fewstep.student import Student
from fewstep.train.build import inner_of, make_student
from fewstep.train.recipe import load_recipe, recipe_from
from fewstep.train.trainer import Nobody

NETS = {
    "unet": {"kind": "unet", "shape": (1, 8, 8), "widths": (16, 32), "head_width": 32, "classes": 10},
    "dit": {"kind": "dit", "shape": (1, 8, 8), "width": 32, "depth": 2, "heads": 2, "classes": 10},
    "mlp": {"kind": "mlp", "shape": (1, 8, 8), "width": 32, "depth": 2, "classes": 10},
}


def recipe_of(teacher, **student):
    return recipe_from(
        {
            "name": "small", "steps": 2, "batch": 8, "task": {"name": "digits"}, "teacher": {"source": str(teacher)},
            "student": student, "ema": {"decay": 0.0}, "evaluate": {"enabled": False},
            "method": {"name": "reflow", "options": {"pairs": {"count": 16, "nfe": 2}}},
            "stages": [{"steps": 2, "teacher": "previous", "method": {
                "name": "regression", "options": {"pairs": {"count": 16, "nfe": 2}, "guide": 1.0}}}],
        }
    )  # fmt: skip


@pytest.fixture(params=NETS)
def teacher(request, tmp_path):
    torch.manual_seed(0)
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    denoiser = Wrapped(build(NETS[request.param]), path, "cm", "250 log_sigma", scale_input=True, data_std=0.75)
    save_teacher(denoiser, tmp_path / "teacher", shape=(1, 8, 8), name="tiny", method="denoising", licence="mit")
    return tmp_path / "teacher"


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_a_quarter_of_the_teacher_is_taught_in_two_stages_saved_and_loaded(teacher, tmp_path):
    recipe = recipe_of(teacher, size=0.25)
    setting = jobs.prepare(recipe, tmp_path / "run", "cpu", Nobody())
    fresh = make_student(recipe, setting.task, setting.raw, setting.shape)
    assert count(fresh) <= 0.25 * count(setting.raw) < 4 * count(fresh)
    outer, inner = inner_of(setting.raw), inner_of(fresh.denoiser)
    assert (inner.prediction, inner.clock, inner.data_std) == (outer.prediction, outer.clock, outer.data_std)
    done = jobs.train(recipe, tmp_path / "run")
    loaded = load_student(done["model"])
    assert count(loaded.student) == count(fresh)
    noise = torch.randn(4, 1, 8, 8)
    assert loaded.student.generate(noise, torch.arange(4)).isfinite().all()


def test_a_size_goes_with_a_copy_of_a_network_of_ours_alone(tmp_path):
    law = {"task": {"name": "mixture"}, "teacher": {"source": "law"}, "method": {"name": "regression"}, "steps": 1}

    def refusal(student):
        recipe = recipe_from({**law, "student": student})
        setting = jobs.prepare(recipe, tmp_path, "cpu", Nobody())
        with pytest.raises(Refused) as found:
            make_student(recipe, setting.task, setting.raw, setting.shape)
        return str(found.value)

    assert "needs a network to train" in refusal({"size": 0.5})
    assert "leave it out, or student.net" in refusal({"size": 0.5, "net": {"kind": "mlp"}})
    with pytest.raises(Refused, match="student.size"):
        recipe_from({**law, "student": {"size": 1.5}})


def test_a_student_that_reads_no_jump_goes_on_from_the_plain_guess_of_a_flow_map():
    description = {**NETS["unet"], "groups": 8}
    reading, plain = build({**description, "reads_s": True}), build(description)
    with torch.no_grad():
        for value in reading.parameters():
            value.add_(0.05 * torch.randn_like(value))  # what reads the jump says something
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    before, after = (Student(Wrapped(net, path, "edm", "log_sigma/4"), (1, 8, 8)) for net in (reading, plain))
    _inherit(after, before)
    x, cond = torch.randn(4, 1, 8, 8), torch.arange(4)
    guess, jump = before.denoiser(x, 2.5, cond), before.denoiser(x, 2.5, cond, s=0.0)
    assert torch.allclose(after.denoiser(x, 2.5, cond), guess, atol=1e-5)
    assert not torch.allclose(jump, guess, atol=1e-2)


def test_a_flow_map_that_learned_from_data_becomes_the_teacher_of_its_own_one_step_student(tmp_path):
    """Self-E and its late stage: a method of matching, taught by the student so far; nobody else teaches."""
    recipe = load_recipe(
        "digits_self_e",
        ["steps=2", "batch=8", "evaluate.enabled=false", "ema.decay=0", "stages=[]", "student.net.widths=[8, 16]",
         "student.net.head_width=8"],
    )  # fmt: skip
    late = load_recipe("digits_self_e").stages[0].model_copy(update={"steps": 2, "batch": 8})
    recipe = recipe.model_copy(update={"stages": (late,), "teacher": None})
    done = jobs.train(recipe, tmp_path / "run")
    assert check_student(Path(done["model"])).steps == (1,)
    student = load_student(done["model"]).student
    assert not student.denoiser.net.reads_s
