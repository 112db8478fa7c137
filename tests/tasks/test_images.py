import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch

from fewstep.errors import Refused
from fewstep.rng import Rng
from fewstep.tasks import images as module
from fewstep.tasks import task_named
from fewstep.tasks.pictures import Shape, read_picture

Image = pytest.importorskip("PIL.Image", reason="needs fewstep[evaluate]")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(file, array=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(8, 8, 3) if array is None else array).save(file, **options)
    return file


def folder(root, names=("cat", "dog"), count=6, shape=(8, 8, 3)):
    for k, name in enumerate(names):
        for i in range(count):
            save(root / name / f"{i}.png", pixels(*shape, seed=100 * k + i))
    return root


def read(file, size=None, **options):
    return read_picture(file, Shape(size, **options), str(file)).pixels


def images(path, **options):
    return task_named("images", {"path": str(path), **options})


# -- folders -----------------------------------------------------------------------------------


def test_sub_folders_are_labels(tmp_path):
    task = images(folder(tmp_path), test_count=4)
    assert task.class_names == ("cat", "dog")
    assert task.classes == 2
    assert task.test.cond.bincount().tolist() == [2, 2]
    assert task.train.cond.bincount().tolist() == [4, 4]
    known = {pixels(8, 8, 3, seed=100 * k + i).tobytes(): k for k in range(2) for i in range(6)}
    for picture, label in zip(task.pictures(task.train.data), task.train.cond.tolist(), strict=True):
        assert known[picture.numpy().tobytes()] == label


def test_pictures_without_folders_have_no_labels(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png")
    task = images(tmp_path)
    assert task.classes is None
    assert task.train.cond is None
    assert (len(task.train), len(task.test)) == (4, 1)


def test_labels_come_from_metadata_where_there_is_one(tmp_path):
    lines = []
    for i in range(6):
        save(tmp_path / "all" / f"{i}.png", pixels(8, 8, 3, seed=i))
        lines.append(json.dumps({"file_name": f"all/{i}.png", "label": [10, 9, 2][i % 3]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    task = images(tmp_path, test_count=3)
    assert task.class_names == ("2", "9", "10")  # numbers in their order
    assert task.test.cond.tolist().count(0) == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "line 2: not an object with a file_name"),
        ('["a.png"]', "line 2: not an object with a file_name"),
        ('{"label": 1}', "line 2: not an object with a file_name"),
        ('{"file_name": "0.png", "label": 1.5}', "line 2: a label is a whole number or a word, got 1.5"),
        ('{"file_name": "../0.png", "label": 1}', "line 2: '../0.png' lies outside the folder"),
        ('{"file_name": "0.png"}', "1 of 2 lines have no label"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused_by_its_line(tmp_path, line, complaint):
    save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 1}\n' + line)
    with pytest.raises(Refused, match=complaint):
        images(tmp_path)


def test_train_and_test_folders_are_the_splits(tmp_path):
    folder(tmp_path / "train", count=5)
    folder(tmp_path / "test", count=2)
    task = images(tmp_path)
    assert (len(task.train), len(task.test)) == (10, 4)
    assert task.class_names == ("cat", "dog")
    assert len(images(tmp_path, test_count=3, train_count=7).train) == 7


def test_the_split_depends_on_the_seed_alone(tmp_path):
    folder(tmp_path, count=20)
    prints = [images(tmp_path, seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_held_out_pictures_come_from_the_training_split(tmp_path):
    folder(tmp_path, count=20)
    whole, chosen = images(tmp_path, test_count=10), images(tmp_path, test_count=10, hold_out=8)
    assert (len(chosen.train), len(chosen.test)) == (22, 8)
    rows = [set(map(tuple, x.data.flatten(1).tolist())) for x in (whole.train, chosen.train, chosen.test)]
    assert rows[1] | rows[2] == rows[0]


def test_unreadable_files_are_skipped_with_a_count(tmp_path):
    folder(tmp_path)
    good = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "empty.png").write_bytes(b"")
    (tmp_path / "cat" / "text.jpg").write_text("no picture")
    (tmp_path / "dog" / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "dog" / "notes.txt").write_text("not counted: no picture by its name")
    (tmp_path / "dog" / ".hidden.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 3 of 15 files"):
        task = images(tmp_path)
    assert task.skipped == 3
    assert len(task.train) + len(task.test) == 12


@pytest.mark.parametrize("fill", [None, "notes.txt"])
def test_a_folder_without_pictures_is_refused(tmp_path, fill):
    if fill:
        (tmp_path / fill).write_text("x")
    with pytest.raises(Refused, match=r"no pictures in .*: it needs files such as \.png"):
        images(tmp_path)


def test_a_folder_of_damaged_pictures_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped 1 of 1"), pytest.raises(Refused, match="none of the pictures"):
        images(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "file.csv"])
def test_a_path_that_leads_nowhere_is_refused(tmp_path, name):
    (tmp_path / "file.csv").write_text("1,2")
    with pytest.raises(Refused, match="no such folder or file|is none of these: a folder"):
        images(tmp_path / name)


def test_pictures_of_several_sizes_need_a_size(tmp_path):
    save(tmp_path / "a.png", pixels(8, 8, 3))
    save(tmp_path / "b.png", pixels(9, 12, 3))
    with pytest.raises(Refused, match="differ in size, 8x8 and 12x9: pass a size"):
        images(tmp_path)
    assert images(tmp_path, size=4).shape == (3, 4, 4)


def test_resizing_keeps_the_middle_and_the_proportions(tmp_path):
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 255
    picture = read(save(tmp_path / "a.png", wide), 8)
    assert picture.shape == (8, 8, 3)
    assert (picture > 235).all()  # the white middle third, and no squeezed black


def test_one_picture_cannot_be_split(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(Refused, match="leaves nothing of 1 pictures"):
        images(tmp_path)


# -- kinds of pictures -------------------------------------------------------------------------


def test_grey_pictures_stay_grey_unless_colour_is_asked_for(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", pixels(8, 8, seed=i))
    assert images(tmp_path).shape == (1, 8, 8)
    coloured = images(tmp_path, channels=3)
    assert coloured.shape == (3, 8, 8)
    assert torch.equal(coloured.train.data[:, 0], coloured.train.data[:, 2])


def test_grey_and_colour_together_are_colour(tmp_path):
    save(tmp_path / "a.png", pixels(8, 8))
    save(tmp_path / "b.png", pixels(8, 8, 3))
    assert images(tmp_path).shape == (3, 8, 8)
    assert images(tmp_path, channels=1).shape == (1, 8, 8)


def test_a_photograph_is_turned_as_its_camera_was(tmp_path):
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:, :8] = 255
    picture = Image.fromarray(np.rot90(upright, 1))  # as a sensor held on its side stores it
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png", None), upright)


def test_transparent_parts_are_white(tmp_path):
    array = pixels(4, 4, 4)
    array[..., 3] = 0
    array[0, 0] = (10, 20, 30, 255)
    picture = read(save(tmp_path / "a.png", array), None)
    assert picture[0, 0].tolist() == [10, 20, 30]
    assert (picture[1:] == 255).all()
    grey = read(save(tmp_path / "b.png", np.dstack([array[..., 0], array[..., 3]])), None)
    assert grey.shape == (4, 4, 1)
    assert (grey[1:] == 255).all()


def test_a_palette_is_looked_up(tmp_path):
    array = np.zeros((8, 8, 3), dtype=np.uint8)
    array[2:] = (200, 100, 50)
    Image.fromarray(array).quantize(4).save(tmp_path / "a.gif")
    assert np.array_equal(read(tmp_path / "a.gif", None), array)


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        picture = read(save(tmp_path / f"a.{suffix}", deep), None)
        assert picture[..., 0].tolist() == [[0, 1, 100, 255]]


def test_fractions_become_eight_bits_and_no_numbers_are_damage(tmp_path):
    picture = read(save(tmp_path / "a.tiff", np.array([[0, 0.5, 1.0]], dtype=np.float32)), None)
    assert picture[..., 0].tolist() == [[0, 128, 255]]
    assert read(save(tmp_path / "b.tiff", np.array([[np.nan]], dtype=np.float32)), None) is None


def test_print_colours_become_screen_colours(tmp_path):
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    picture.save(tmp_path / "a.jpg", quality=100)
    seen = read(tmp_path / "a.jpg", None)
    assert seen.shape == (8, 8, 3)
    assert np.abs(seen.astype(int) - (255, 0, 0)).max() < 8


def test_black_and_white_is_grey(tmp_path):
    Image.fromarray(pixels(8, 8)).convert("1").save(tmp_path / "a.png")
    assert set(read(tmp_path / "a.png", None).ravel()) <= {0, 255}


def bomb(side):
    """A PNG of a few hundred bytes that states a huge size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_unpacks(tmp_path, side):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(bomb(side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Refused, match=r"b.png unpacks to more than 100 million pixels: remove it"):
            images(tmp_path)


def test_more_pictures_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(Refused, match="12 pictures of 8x8 need 0 GiB of memory: pass a smaller size"):
        images(tmp_path)


# -- npz ---------------------------------------------------------------------------------------


def npz(file, **arrays):
    np.savez_compressed(file, **arrays)
    return file


def test_an_npz_with_both_splits_keeps_them(tmp_path):
    train, test = pixels(10, 8, 8), pixels(4, 8, 8, seed=1)
    labels = {"train_labels": np.arange(10) % 3, "test_labels": np.arange(4)}
    file = npz(tmp_path / "a.npz", train_images=train, test_images=test, **labels)
    task = images(file, test_count=3, train_count=8)
    assert np.array_equal(task.pictures(task.train.data)[..., 0].numpy(), train[:8])
    assert np.array_equal(task.pictures(task.test.data)[..., 0].numpy(), test[:3])
    assert task.classes == 3
    assert task.test.cond.tolist() == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_of_one_pool_is_split_by_class(tmp_path, channels):
    file = npz(tmp_path / "a.npz", images=pixels(40, 8, 8, channels), labels=np.arange(40) % 4)
    task = images(file, test_count=8)
    assert task.shape == (channels, 8, 8)
    assert task.test.cond.bincount().tolist() == [2, 2, 2, 2]


def test_an_npz_may_have_no_labels(tmp_path):
    task = images(npz(tmp_path / "a.npz", images=pixels(20, 8, 8)))
    assert task.train.cond is None
    assert (len(task.train), len(task.test)) == (18, 2)


def test_an_npz_is_resized_and_coloured_on_request(tmp_path):
    file = npz(tmp_path / "a.npz", images=pixels(4, 8, 8))
    assert images(file, size=4, channels=3).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": pixels(4, 8, 8)}, "holds x: name the arrays images and labels, or train_images and test_images"),
        ({}, "holds nothing: name the arrays"),
        ({"images": pixels(4, 8, 8).astype(np.float32)}, r"must be uint8 .* got float32 \[4, 8, 8\]"),
        ({"images": pixels(4, 8)}, r"must be uint8 .* got uint8 \[4, 8\]"),
        ({"images": pixels(4, 3, 8, 8)}, r"got uint8 \[4, 3, 8, 8\]"),
        ({"images": pixels(0, 8, 8)}, "is empty"),
        ({"images": pixels(4, 8, 8), "labels": np.arange(3)}, "must be 4 whole numbers from 0, got int64"),
        ({"images": pixels(4, 8, 8), "labels": np.arange(4) - 1}, "must be 4 whole numbers from 0"),
        ({"images": pixels(4, 8, 8), "labels": np.ones(4)}, "must be 4 whole numbers from 0, got float64"),
        (
            {"train_images": pixels(4, 8, 8), "train_labels": np.arange(4), "test_images": pixels(4, 8, 8)},
            "labels for one split only",
        ),
        ({"images": np.array([{}, []], dtype=object)}, "pickled objects, which could run code"),
        ({"images": pixels(4, 8, 8), "labels": np.array(list("abcd"), dtype=object)}, "pickled objects"),
    ],
)
def test_an_npz_that_will_not_do_is_refused_by_what_it_holds(tmp_path, arrays, complaint):
    with pytest.raises(Refused, match=complaint) as caught:
        images(npz(tmp_path / "a.npz", **arrays))
    assert "\n" not in str(caught.value)


def test_a_damaged_npz_is_refused(tmp_path):
    file = npz(tmp_path / "a.npz", images=pixels(40, 8, 8))
    whole = file.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + b"????????" + whole[208:]):
        file.write_bytes(content)
        with pytest.raises(Refused, match="not a readable .npz"):
            images(file)


def test_an_npz_that_unpacks_to_more_than_memory_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    file = npz(tmp_path / "a.npz", images=np.zeros((400, 8, 8), dtype=np.uint8))
    assert file.stat().st_size < 1000
    with pytest.raises(Refused, match="unpacks to 0 GiB, which is more than fits"):
        images(file)


def test_an_npz_that_states_a_shape_beyond_its_bytes_is_refused(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", head.getvalue() + bytes(100))
    with pytest.raises(Refused, match="not a readable .npz"):
        images(tmp_path / "a.npz")


# -- patches, flips, pictures ------------------------------------------------------------------


def test_patches_become_channels_and_pictures_undo_it(tmp_path):
    array = pixels(20, 8, 12, 3)
    file = npz(tmp_path / "a.npz", train_images=array, test_images=array)
    task = images(file, patch=2)
    assert task.shape == (12, 4, 6)
    assert np.array_equal(task.pictures(task.train.data).numpy(), array)
    plain = images(file)
    assert torch.equal(task.train.data[:, 0, 0, 0], plain.train.data[:, 0, 0, 0])
    assert torch.equal(task.train.data[:, 3, 0, 0], plain.train.data[:, 0, 1, 1])


def test_a_patch_that_does_not_divide_the_picture_is_refused(tmp_path):
    with pytest.raises(Refused, match="patch = 3 does not divide pictures of 8x8"):
        images(npz(tmp_path / "a.npz", images=pixels(20, 8, 8)), patch=3)


@pytest.mark.parametrize("patch", [1, 2])
def test_flipping_mirrors_half_of_the_pictures(tmp_path, patch):
    task = images(npz(tmp_path / "a.npz", images=pixels(200, 8, 8)), patch=patch, flip=True)
    before = task.pictures(task.train.data)
    after = task.pictures(task.augment(task.train.data, Rng(0)))
    same, mirrored = ((after == b).flatten(1).all(1) for b in (before, before.flip(2)))
    assert (same | mirrored).all()
    assert 0.35 < mirrored.float().mean() < 0.65


def test_the_stated_spread_is_that_of_the_training_pictures(tmp_path):
    task = images(npz(tmp_path / "a.npz", images=pixels(50, 8, 8) // 3))
    assert task.data_std == pytest.approx(task.train.data.std(correction=0).item(), rel=1e-5)
    flat = images(npz(tmp_path / "b.npz", images=np.zeros((20, 8, 8), dtype=np.uint8)))
    assert flat.data_std == 1.0


def test_mnist_is_read_in_patches(shared):
    task = images(shared / "mnist.npz", patch=2, test_count=2000, train_count=5000)
    assert task.shape == (4, 14, 14)
    assert (len(task.train), len(task.test), task.classes) == (5000, 2000, 10)
    with np.load(shared / "mnist.npz") as archive:
        assert np.array_equal(task.pictures(task.test.data[:50])[..., 0].numpy(), archive["test_images"][:50])
        assert np.array_equal(task.test.cond.numpy(), archive["test_labels"][:2000])
    assert task.data_std == pytest.approx(0.616, abs=0.005)
