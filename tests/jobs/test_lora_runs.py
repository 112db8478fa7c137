"""A LoRA run as a user starts it: from a recipe to a merged student with its LoRA beside it."""

from __future__ import annotations

import pytest
import torch
from games import mlp
from safetensors.torch import load_file, save_file

from fewstep import jobs
from fewstep.adapters import LoraOptions, adapters, options_of, shared
from fewstep.cli.asked import recipe_of
from fewstep.errors import Refused
from fewstep.interop import load_student, load_teacher, save_teacher
from fewstep.interop.lora import FILES, FOLDER, fold_into
from fewstep.tasks import task_named
from fewstep.train.build import make_student
from fewstep.train.recipe import recipe_from
from fewstep.train.store import load_state
from fewstep.train.trainer import Nobody

MODES = {"modes": 4, "std": 0.25, "train_count": 200, "test_count": 100}


@pytest.fixture(scope="module", autouse=True)
def no_program():
    """Leave the exported program out: tracing it is most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.interop.student.write_program", lambda *_: "not exported")
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a small network of random weights, which is teacher enough."""
    folder = tmp_path_factory.mktemp("teacher") / "toy"
    save_teacher(mlp(width=8, depth=1), folder, shape=(2,), name="toy", method="denoising", licence="apache-2.0")
    return folder


def recipe(folder, **changes):
    plain = {
        "name": "toy", "steps": 6, "batch": 8, "task": {"name": "mixture", "options": MODES},
        "teacher": {"source": str(folder)}, "student": {"lora": {"rank": 2, "alpha": 6.0, "targets": "all"}},
        "method": {"name": "dmd2", "options": {"critic_turns": 1}}, "optim": {"lr": 0.02}, "ema": {"decay": 0.5},
        "evaluate": {"enabled": False}, "log": {"every": 2}, "checkpoint": {"every": 2},
    }  # fmt: skip
    return recipe_from({**plain, **changes})


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "toy"
    jobs.distill(recipe(teacher), run)
    return run


def test_a_run_ends_with_a_merged_student_and_its_lora_fits_the_teacher(teacher, finished):
    student = load_student(finished / "student").student
    base = load_teacher(teacher).denoiser
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    wanted = student.generate(noise)
    plain = base(noise, 1.0)
    assert (wanted - plain).abs().max() > 1e-3
    for file in FILES.values():
        again = load_teacher(teacher).denoiser
        fold_into({"unet": again.net}, finished / "student" / FOLDER / file)
        assert (again(noise, 1.0) - wanted).abs().max() < 1e-5
    names = {name.rpartition(".")[2] for name in load_state(finished / "stages" / "00")[0]}
    assert names == {"lora_down", "lora_up"}


def test_a_run_that_was_stopped_ends_with_the_very_weights_of_one_that_was_not(teacher, finished, tmp_path):
    class Reader(Nobody):
        def advance(self, label, done, note=""):
            if done == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.distill(recipe(teacher), tmp_path / "run", watch=Reader())
    found = load_state(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    assert found is not None
    tensors, facts = found
    assert facts["step"] == 2
    assert all(
        name.endswith(("lora_down", "lora_up")) for name in tensors if not name.startswith(("optim", "ema"))
    ) and any("critic" in name for name in tensors)
    jobs.distill(recipe(teacher), tmp_path / "run", resume=True)
    one, other = (load_file(place / "student" / "model.safetensors") for place in (finished, tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_second_stage_and_a_second_run_go_on_from_the_adapters(teacher, finished, tmp_path):
    student = {"lora": {"rank": 2, "alpha": 6.0, "targets": "all"}}
    stage = {"steps": 1, "method": {"name": "dmd2", "options": {"critic_turns": 1}}, "optim": {"lr": 1e-9}}
    jobs.distill(recipe(teacher, stages=[stage]), tmp_path / "two")
    jobs.distill(
        recipe(teacher, steps=1, optim={"lr": 1e-9}, student={**student, "init": str(finished)}), tmp_path / "next"
    )
    wanted = load_file(finished / "student" / "model.safetensors")
    for run in ("two", "next"):
        found = load_file(tmp_path / run / "student" / "model.safetensors")
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_style_becomes_a_fast_style(teacher, tmp_path):
    rng = torch.Generator().manual_seed(0)
    style = {
        "lora_unet_stem.lora_down.weight": torch.randn(1, 2, generator=rng),
        "lora_unet_stem.lora_up.weight": torch.randn(8, 1, generator=rng), "lora_unet_stem.alpha": torch.tensor(0.5),
    }  # fmt: skip
    save_file(style, str(tmp_path / "style.safetensors"))
    source = {"source": str(teacher), "lora": str(tmp_path / "style.safetensors"), "lora_strength": 0.8}
    jobs.distill(recipe(teacher, teacher=source, steps=2), tmp_path / "run")
    student = load_student(tmp_path / "run" / "student")
    assert student.teacher.name == "toy+style"
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    again = load_teacher(teacher).denoiser  # the base without the style: the student's file brings both
    fold_into({"unet": again.net}, tmp_path / "run" / "student" / FOLDER / FILES["kohya"])
    assert (again(noise, 1.0) - student.student.generate(noise)).abs().max() < 1e-5


def test_the_option_of_the_command_line_is_the_rank():
    made = recipe_of("digits", ["student.lora.targets=all"], None, lora=8)
    assert made.student.lora == LoraOptions(rank=8, targets="all")
    assert recipe_of("digits", None, None).student.lora is None


def test_a_student_shares_its_teachers_weights_and_starts_where_it_stands(teacher):
    loaded = load_teacher(teacher)
    chosen = recipe(teacher)
    student = make_student(chosen, task_named("mixture", MODES), loaded.denoiser, (2,))
    assert {id(t) for t in shared(student)} == {id(t) for t in loaded.denoiser.parameters()}
    assert [p for p in student.parameters() if p.requires_grad] == [
        p for _, layer in adapters(student) for p in (layer.lora_down, layer.lora_up)
    ]
    x = torch.randn(4, 2)
    assert torch.equal(student.denoiser(x, 0.5), loaded.denoiser(x, 0.5))
    assert options_of(student) == chosen.student.lora


def test_a_flow_map_learns_its_jump_in_full_and_has_no_lora_file(teacher, tmp_path):
    """What the network newly reads has no weights to share; the merged student is whole all the same."""
    loaded = load_teacher(teacher)
    chosen = recipe(teacher, method={"name": "meanflow"})
    student = make_student(chosen, task_named("mixture", MODES), loaded.denoiser, (2,))
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    assert any("span_embedding.linear_2.weight" in name for name in learning)
    assert all("lora_" in name or "span_embedding" in name for name in learning)
    jobs.distill(recipe(teacher, method={"name": "meanflow"}, steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "student" / FOLDER).exists()
    assert load_student(tmp_path / "run" / "student").student.generate(torch.zeros(2, 2)).isfinite().all()


BAD = {
    "a network of its own": ({"student": {"lora": {}, "net": {"kind": "mlp"}}}, "leave out student.net"),
    "no layer": ({"student": {"lora": {"targets": "to_q"}}}, "student.lora: adapters found no layer"),
    "no attention": ({"student": {"lora": {}}}, "found no layer for targets 'attention'"),
    "a critic without layers": (
        {"method": {"name": "dmd2", "options": {"critic_lora": {"targets": "to_q"}}}},
        "dmd2.*found no layer",
    ),
    "a law": ({"teacher": {"source": "law"}}, "needs a network to train"),
    "a styled law": ({"teacher": {"source": "law", "lora": "x.safetensors"}}, "an exact law has none"),
    "no style": ({"teacher": {"source": "digits", "lora": "gone.safetensors"}}, "gone.safetensors is missing"),
    "an init without a lora": ({"student": {"lora": {"targets": "all"}, "init": "."}}, "holds no LoRA"),
}


@pytest.mark.parametrize(("changes", "complaint"), BAD.values(), ids=list(BAD))
def test_what_cannot_be_is_refused_in_one_line(teacher, tmp_path, monkeypatch, changes, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=complaint) as caught:
        jobs.distill(recipe(teacher, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "student").exists()
