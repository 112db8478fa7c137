from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewstep import jobs
from fewstep.errors import Refused
from fewstep.interop import load_student
from fewstep.methods.scale import Scale
from fewstep.rng import Rng
from fewstep.tasks import task_named
from fewstep.tasks.lowres import blurred, lowered
from fewstep.train.recipe import recipe_from


def digits(**options):
    return task_named("lowres", {"scales": [2, 4], **options})


def test_a_small_picture_is_means_over_blocks_on_the_grid_of_the_large_one():
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    half, quarter = lowered(x, (2, 4), resize="nearest")
    assert half.shape == quarter.shape == x.shape
    assert torch.allclose(half[:, :, 2, 5], x[:, :, 2:4, 4:6].mean((2, 3)), atol=1e-6)
    assert torch.allclose(quarter[:, :, 2, 5], x[:, :, :4, 4:].mean((2, 3)), atol=1e-6)
    smooth = lowered(x, (2, 4), resize="bilinear")[1]
    wanted = F.interpolate(F.avg_pool2d(x, 4), size=8, mode="bilinear", align_corners=False)
    assert torch.allclose(smooth, wanted, atol=1e-6)


def test_the_worse_picture_is_a_function_of_the_better_one_noise_included():
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    half, quarter = lowered(x, (2, 4), blur=0.7, noise=0.3, drawn=noise, resize="nearest")
    assert torch.allclose(F.avg_pool2d(half, 4), F.avg_pool2d(quarter, 4), atol=1e-6)
    clean = lowered(x, (2, 4), blur=0.7, resize="nearest")[0]
    assert torch.allclose(half[:, :, ::2, ::2] - clean[:, :, ::2, ::2], 0.3 * noise, atol=1e-6)
    apart = lowered(x, (4,), blur=0.7, noise=0.3, drawn=noise[:, :, :2, :2], resize="nearest")[0]
    assert not torch.allclose(F.avg_pool2d(half, 4), F.avg_pool2d(apart, 4)), "the broken twin: noise of its own"


def test_a_blur_keeps_the_mean_and_has_the_width_it_says():
    x = torch.zeros(1, 2, 41, 41)
    x[:, 0, 20, 20] = 1.0
    soft = blurred(x, 2.0)
    assert soft.sum().item() == pytest.approx(1.0, abs=1e-5) and soft[:, 1].abs().max() == 0
    place = torch.arange(41.0) - 20
    for axis in (0, 1):
        assert (soft[0, 0].sum(axis) * place.square()).sum().item() == pytest.approx(4.0, rel=0.03)
    assert torch.allclose(blurred(torch.ones(1, 1, 6, 6), 1.5), torch.ones(1, 1, 6, 6), atol=1e-6)
    assert torch.equal(blurred(x, 0.0), x)


def test_conditions_belong_to_their_pictures_in_every_split_and_in_every_batch():
    task = digits()
    assert task.shape == (1, 8, 8) and task.classes is None and task.data_std == 0.75
    for split in (task.train, task.test):
        part = split.rows(torch.tensor([5, 2]))
        half, quarter = lowered(part.data, (2, 4))
        assert set(part.cond) == {"low", "x2"}
        assert torch.equal(part.cond["low"], quarter) and torch.equal(part.cond["x2"], half)
    assert task.test.cond["low"].shape == task.test.data.shape
    batch = digits(of_options={"augment": True}).batch(64, 0, 3)
    assert torch.equal(batch.cond["low"], lowered(batch.data, (2, 4))[1]), "made after the picture was moved"
    plain = task.batch(64, 0, 3)
    assert not torch.equal(batch.data, plain.data)
    part = task.batch(64, 0, 3, rows=(8, 24))
    assert torch.equal(part.cond["low"], plain.cond["low"][8:24])


def test_noise_is_a_rows_own_in_a_split_and_a_steps_own_in_a_batch():
    task = digits(noise=0.2)
    whole = task.test.cond["x2"]
    assert torch.equal(task.test.rows(torch.tensor([7])).cond["x2"][0], whole[7])
    assert torch.equal(task.test.rows(slice(3, 9)).cond["low"], task.test.cond["low"][3:9])
    one, same, other = (task.batch(32, 0, step) for step in (1, 1, 2))
    assert torch.equal(one.cond["low"], same.cond["low"]) and not torch.equal(one.cond["low"], other.cond["low"])
    part = task.batch(32, 0, 1, rows=(8, 16))
    assert torch.equal(part.cond["low"], one.cond["low"][8:16])
    spread = (whole - digits().test.cond["x2"]).std().item()
    assert 0.05 < spread < 0.2, "bilinear enlarging averages some of it away"


def test_labels_stay_on_demand_and_can_be_left_out():
    task = digits(labels=True)
    cond = task.train.rows(slice(4)).cond
    assert task.classes == 10 and torch.equal(cond["label"], task_named("digits").train.cond[:4])
    null = task.null(cond)
    assert (null["label"] == 10).all() and torch.equal(null["low"], cond["low"])
    assert digits().null({"low": cond["low"]})["low"] is cond["low"]
    assert task.augment(cond["low"], Rng(0)) is cond["low"] and len(task.views(cond["low"])) == 1
    assert task.pictures(cond["low"]).shape == (4, 8, 8, 1)


def test_other_pictures_come_with_their_own_options(tmp_path):
    file = tmp_path / "colour.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8))
    task = task_named("lowres", {"of": "images", "of_options": {"path": str(file)}, "scales": [3]})
    assert task.train.rows(slice(2)).cond["low"].shape == (2, 3, 12, 12)
    assert set(task.batch(4, 0, 0).cond) == {"low"} and "pictures" in task.summary()
    assert task.fingerprint != task_named("lowres", {"of": "images", "of_options": {"path": str(file)}}).fingerprint


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"scales": [4, 2]}, r"rise by whole factors from above 1, got \[4, 2\]"),
        ({"scales": [2, 3]}, "rise by whole factors"),
        ({"scales": [1]}, "rise by whole factors"),
        ({"scales": [3]}, "8x8 are no multiple of 3"),
        ({"of": "mixture"}, "'mixture' has no pictures"),
        ({"of": "digit"}, "did you mean 'digits'"),
    ],
)
def test_what_cannot_be_made_small_is_refused_in_one_line(options, line):
    with pytest.raises((Refused, ValueError), match=line) as caught:
        task_named("lowres", options)
    assert "\n" not in str(caught.value)


def test_labels_that_are_not_there_are_refused(tmp_path):
    file = tmp_path / "grey.npz"
    np.savez(file, images=np.zeros((20, 4, 4), dtype=np.uint8))
    with pytest.raises(Refused, match="has no labels: leave out labels"):
        task_named("lowres", {"of": "images", "of_options": {"path": str(file)}, "scales": [2], "labels": True})


def test_a_chain_of_scales_is_one_recipe_and_its_student_reads_the_worst_picture(tmp_path, monkeypatch):
    """x2 from the clean samples, then x4 from that student: taught by it, from its weights."""
    monkeypatch.setattr("fewstep.interop.student.write_program", lambda *_: "not exported")  # elsewhere
    file = tmp_path / "grey.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    recipe = recipe_from(
        {
            "name": "chain", "steps": 4, "batch": 8, "ema": {"decay": 0.0}, "evaluate": {"enabled": False},
            "task": {
                "name": "lowres", "options": {"of": "images", "of_options": {"path": str(file)}, "scales": [2, 4]}
            },
            "student": {
                "net": {"kind": "mlp", "width": 8, "depth": 1, "beside": {"low": 1}}, "prediction": "x0",
                "clock": "1000t",
            },
            "method": {"name": "scale", "options": {"reads": "x2"}},
            "stages": [
                {"steps": 4, "teacher": "previous", "method": {"name": "scale", "options": {"better": "x2"}}}
            ],
        }
    )  # fmt: skip
    asked = []
    plain = Scale.loss

    def loss(self, player, batch, rng):
        asked.append((self.options.reads, self.options.better, self.teacher))
        found = plain(self, player, batch, rng)
        if self.teacher is not None and len(asked) == 5:  # the student begins as its teacher
            same = zip(self.teacher.parameters(), self.student.denoiser.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in same)
            moved = replace(batch, cond={**batch.cond, "x2": batch.cond["x2"] + 1})
            assert not torch.equal(plain(self, player, moved, Rng(1)).total, plain(self, player, batch, Rng(1)).total)
        return found

    monkeypatch.setattr(Scale, "loss", loss)
    jobs.train(recipe, tmp_path / "run")
    assert [one[:2] for one in asked] == [("x2", None)] * 4 + [("low", "x2")] * 4
    assert asked[0][2] is None and asked[7][2] is asked[4][2] is not None
    student = load_student(tmp_path / "run" / "student").student
    test = task_named("lowres", recipe.task.options).test
    noise = torch.randn(len(test), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = student.generate(noise, test.cond)
    assert torch.equal(made, student.generate(noise, {"low": test.cond["low"]})), "it reads no better picture"
    assert not torch.allclose(made, student.generate(noise, {"low": test.cond["low"].roll(1, 0)}))
