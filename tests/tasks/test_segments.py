import numpy as np
import pytest
import torch

from fewstep.errors import Refused
from fewstep.evaluate.reading import iou
from fewstep.joint import nearest
from fewstep.tasks import task_named


@pytest.fixture(scope="module")
def strokes(tmp_path_factory):
    """Two thick lines, as pictures of their own."""
    rng = np.random.default_rng(0)
    pictures = np.zeros((240, 16, 16), np.uint8)
    for picture in pictures:
        row, column = rng.integers(2, 12, 2)
        picture[row : row + 3, 2:14] = 255
        picture[3:13, column : column + 3] = 255
        picture[row, 2:14] = 100  # a soft edge
    file = tmp_path_factory.mktemp("strokes") / "strokes.npz"
    np.savez(file, images=pictures, labels=rng.integers(0, 10, 240))
    return file


def segments(file, **options):
    return task_named("segments", {"path": str(file), "test_count": 120, **options})


def test_pictures_and_masks_are_functions_of_the_seed_and_the_row(strokes):
    task, again, other = segments(strokes), segments(strokes), segments(strokes, seed=1)
    assert task.fingerprint == again.fingerprint != other.fingerprint
    rows = torch.tensor([7, 3, 3])
    some = task.train.rows(rows)
    assert torch.equal(some.data, task.train.data[rows]) and torch.equal(some.cond, task.train.cond[rows])
    assert task.shape == (1, 16, 16) and some.cond.shape == (3, 16, 16) and task.places == 2
    assert not torch.equal(task.train.data[:50], task.test.data[:50])
    assert task.test.data.abs().max() <= 1


def test_the_mask_is_the_ink_and_ground_and_ink_are_apart_only_by_their_stroke(strokes):
    task = segments(strokes, contrast=0.3, depth=0.7)
    data, mask = task.test.data[:, 0], task.test.cond.bool()
    strokes_ = task.strokes.test.data[:, 0]
    assert torch.equal(mask, strokes_ > 0) and 0.05 < mask.double().mean() < 0.6
    ground = task.test.held.ground
    full = strokes_ == 1
    ink = ground.ink[:, None, None].expand_as(data)
    assert torch.equal(data[full], ink[full])
    texture = ground.texture(slice(None), 16, 16)[:, 0]
    assert torch.equal(data[strokes_ == -1], texture[strokes_ == -1])
    off = ground.ink - ground.mean
    assert off.abs().min() >= 0.3 - 1e-6 and 0.4 < (off > 0).double().mean() < 0.6


def test_no_grey_level_tells_ink_from_ground(strokes):
    """Where textures are flat and inks light, one does."""

    def best(task):
        data, mask = task.test.data[:, 0], task.test.cond
        levels = torch.linspace(-1, 1, 41)
        return max(iou((data > level).to(torch.uint8), mask, 2)[0] for level in levels)

    assert best(segments(strokes)) < 0.6
    light = segments(strokes, contrast=1.0, depth=0.0)
    keep = light.test.held.ground.ink > light.test.held.ground.mean
    data, mask = light.test.data[keep, 0], light.test.cond[keep]
    assert max(iou((data > level).to(torch.uint8), mask, 2)[0] for level in torch.linspace(-1, 1, 41)) > 0.9


def test_masks_are_labels_of_every_place_in_a_joint_batch(strokes):
    task = task_named("labelled", {"of": "segments", "options": {"path": str(strokes)}, "code": "level"})
    plain, both = task.pixels.batch(6, 0, 1), task.batch(6, 0, 1)
    assert task.shape == (2, 16, 16) and task.joint.places and task.classes is None
    assert torch.equal(nearest(both.noise[:, 1:], task.joint.book, places=True), plain.cond.long())
    start = task.begin(torch.randn(6, 2, 16, 16), plain.cond)
    assert torch.equal(nearest(start[:, 1:], task.joint.book, places=True), plain.cond.long())
    with pytest.raises(Refused, match="masks \\[batch, ...\\]"):
        task.begin(torch.randn(6, 2, 16, 16), torch.zeros(6, dtype=torch.long))


def test_bad_input_is_refused_in_one_line(strokes, tmp_path):
    for options, message in (
        ({"path": str(tmp_path / "none.npz")}, "no such folder or file"),
        ({"path": str(strokes), "contrast": 1.5}, "option 'contrast'"),
        ({}, "option 'path' is required"),
    ):
        with pytest.raises(Refused, match=message):
            task_named("segments", options)
