import pytest
import torch

from fewstep.errors import Refused
from fewstep.joint import Joint, nearest
from fewstep.tasks import task_named

MIXTURE = {"of": "mixture", "options": {"modes": 3, "classes": 3, "train_count": 90, "test_count": 30}}


def many(task, count=200, size=64):
    """Batches of many steps, one after the other: (data, noise)."""
    found = [task.batch(size, 3, step) for step in range(count)]
    return torch.cat([b.data for b in found]).double(), torch.cat([b.noise for b in found]).double()


def test_a_batch_holds_picture_and_noise_at_one_end_and_noise_and_label_at_the_other():
    task = task_named("labelled", {**MIXTURE, "width": 0.0})
    plain, both = task.pixels.batch(16, 1, 2), task.batch(16, 1, 2)
    assert task.shape == (5,) and both.cond is None
    assert torch.equal(both.data[:, :2], plain.data) and torch.equal(both.noise[:, :2], plain.noise)
    assert torch.equal(nearest(both.noise[:, 2:], task.joint.book), plain.cond)
    assert torch.equal(both.noise[:, 2:], task.joint.book[plain.cond])
    digits = task_named("labelled", {"code": "level"})
    assert digits.shape == (2, 8, 8) and digits.batch(4, 0, 0).noise[:, 1].flatten(1).unique(dim=1).shape[1] <= 64
    assert task_named("labelled").shape == (11, 8, 8)


def test_labels_are_blurred_over_the_whole_width_and_evenly():
    task = task_named("labelled", {**MIXTURE, "width": 0.2})
    label = many(task)[1][:, 2:]
    blur = label - task.joint.book[nearest(label, task.joint.book)]
    assert blur.abs().max() <= 0.1
    assert blur.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert (blur.abs() > 0.09).double().mean().item() == pytest.approx(0.1, abs=0.01)


def test_the_noise_of_the_label_knows_nothing_of_picture_label_blur_or_the_pictures_own_noise():
    """The broken twins: label noise that is the picture's noise, or the draw that blurs the label."""
    task = task_named("labelled", {**MIXTURE, "width": 0.2})
    data, noise = many(task)

    def most(xi):
        """The largest correlation of the label's noise with anything else in the batch."""
        label = noise[:, 2:] - task.joint.book[nearest(noise[:, 2:], task.joint.book)]
        others = torch.cat([data[:, :2], noise, label], 1)
        both = torch.corrcoef(torch.cat([xi, others], 1).T)
        return both[: xi.shape[1], xi.shape[1] :].abs().max().item()

    xi = data[:, 2:]
    assert xi.mean().abs() < 0.02 and xi.std().item() == pytest.approx(1, abs=0.02)
    assert most(xi) < 0.04
    blur = noise[:, 2:] - task.joint.book[nearest(noise[:, 2:], task.joint.book)]
    assert most(noise[:, :2]) > 0.9 and most(torch.special.ndtri((blur / 0.2 + 0.5).clamp(1e-6, 1 - 1e-6))) > 0.9
    fresh = task.batch(64, 3, 0).data[:, 2:], task.batch(64, 3, 1).data[:, 2:], task.batch(64, 4, 0).data[:, 2:]
    assert not torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert torch.equal(fresh[0], task.batch(64, 3, 0).data[:, 2:])


def test_parts_of_a_batch_are_those_of_the_whole():
    task = task_named("labelled", {"options": {"augment": True}})
    whole = task.batch(12, 0, 5, 1)
    parts = [task.batch(12, 0, 5, 1, rows=rows) for rows in ((0, 5), (5, 12))]
    assert torch.equal(whole.data, torch.cat([p.data for p in parts]))
    assert torch.equal(whole.noise, torch.cat([p.noise for p in parts]))


def test_sampling_starts_where_training_did_and_not_from_bare_codes():
    """The label's channels of a start have the law that they had in batches; a bare code has no spread at all."""
    task = task_named("labelled", {**MIXTURE, "width": 0.6})
    label = many(task)[1][:, 2:]
    blur = label - task.joint.book[nearest(label, task.joint.book)]
    labels = torch.arange(12_000) % 3
    start = task.begin(torch.randn(12_000, 5, generator=torch.Generator().manual_seed(0)), labels)
    mine = start[:, 2:].double() - task.joint.book[labels]
    assert mine.abs().max() <= 0.3
    parts = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    assert torch.allclose(mine.flatten().quantile(parts), blur.flatten().quantile(parts), atol=0.01)
    assert torch.corrcoef(torch.cat([start[:, :2].double(), mine], 1).T).fill_diagonal_(0).abs().max() < 0.04
    bare = task.joint.model_copy(update={"width": 0.0}).begin(torch.randn(12, 5), labels[:12])
    assert torch.equal(bare[:, 2:], task.joint.book[labels[:12]])


def test_sampling_starts_from_the_label_and_what_is_seen_is_the_picture():
    task = task_named("labelled")
    noise, labels = torch.randn(4, 11, 8, 8), torch.tensor([0, 9, 3, 3])
    start = task.begin(noise, labels)
    assert torch.equal(start[:, :1], noise[:, :1])
    assert torch.equal(nearest(start[:, 1:], task.joint.book), labels)
    assert torch.equal(task.finish(3 * noise), (3 * noise[:, :1]).clamp(-1, 1))
    assert torch.equal(task.pictures(noise), task.pixels.pictures(noise[:, :1]))
    assert task.pictures(noise[:, :1]).shape == (4, 8, 8, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels \\[batch\\]"),
        (torch.zeros(2), "whole numbers"),
        (torch.zeros(2, 8, 8, dtype=torch.long), "labels \\[batch\\]"),
        (torch.tensor([0, 10]), "labels are 0 to 9, got 0 to 10"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(labels, message):
    with pytest.raises(Refused, match=message):
        Joint(picture=1, classes=10).begin(torch.randn(2, 11, 8, 8), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "labelled"}, "of = 'labelled'"),
        ({"of": "mixture"}, "task 'mixture' has no two labels"),
        ({"options": {"hold_off": 3}}, "unknown option 'hold_off'"),
        ({"of": "digit"}, "unknown task 'digit'"),
    ],
)
def test_a_task_without_labels_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as found:
        task_named("labelled", options)
    assert "\n" not in str(found.value)
