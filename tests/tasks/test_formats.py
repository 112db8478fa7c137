"""The same pictures, labels and captions in every format are the same split."""

import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from fewstep.errors import Refused
from fewstep.tasks import task_named
from fewstep.tasks.pictures import Shape, read_picture, read_pictures

Image = pytest.importorskip("PIL.Image", reason="needs fewstep[evaluate]")

LABELS = [k % 3 for k in range(12)]
CAPTIONS = [f"picture number {k % 5}" for k in range(12)]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def encoded(array, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def images(path, **options):
    return task_named("images", {"path": str(path), "test_count": 3, **options})


def beside():
    """Files of a data set with labels and captions beside each picture."""
    found = {}
    for k in range(12):
        found |= {f"{k:03d}.png": encoded(PIXELS[k]), f"{k:03d}.txt": CAPTIONS[k].encode()}
        found[f"{k:03d}.cls"] = str(LABELS[k]).encode()
    return found


def write_tar(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def as_folder(root):
    for name, content in beside().items():
        (root / name).write_bytes(content)
    return root


def as_sub_folders(root):
    for k in range(12):
        place = root / "pictures" / str(LABELS[k])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{k:03d}.png").write_bytes(encoded(PIXELS[k]))
        (place / f"{k:03d}.caption").write_text(CAPTIONS[k])
    return root / "pictures"


def as_metadata(root):
    lines = []
    for k in range(12):
        (root / f"{k:03d}.png").write_bytes(encoded(PIXELS[k]))
        lines.append(json.dumps({"file_name": f"{k:03d}.png", "label": LABELS[k], "prompt": CAPTIONS[k]}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def as_npz(root):
    np.savez(root / "a.npz", images=PIXELS, labels=np.array(LABELS), captions=np.array(CAPTIONS))
    return root / "a.npz"


def as_tar(root):
    write_tar(root / "a.tar", beside())
    return root / "a.tar"


def as_tar_shards(root):
    members = sorted(beside().items())
    for k in range(2):
        write_tar(root / f"shard-{k:05d}.tar", dict(members[18 * k : 18 * (k + 1)]))
    return root


def as_json_beside(root):
    members = {}
    for k in range(12):
        members[f"{k:03d}.png"] = encoded(PIXELS[k])
        members[f"{k:03d}.json"] = json.dumps({"cls": LABELS[k], "caption": CAPTIONS[k]}).encode()
    write_tar(root / "a.tar", members)
    return root / "a.tar"


def as_zip(root):
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        for name, content in beside().items():
            archive.writestr(f"folder/{name}", content)  # as packers make it: one folder that holds all
    return root / "a.zip"


def table(raw=False):
    pa = pytest.importorskip("pyarrow", reason="needs fewstep[data]")
    image = PIXELS.tolist() if raw else [{"bytes": encoded(p), "path": None} for p in PIXELS]
    return pa.table({"image": image, "label": LABELS, "text": CAPTIONS})


def as_parquet(root, raw=False):
    found = table(raw)
    from pyarrow import parquet

    parquet.write_table(found, root / "a.parquet", row_group_size=5)
    return root / "a.parquet"


def as_raw_parquet(root):
    return as_parquet(root, raw=True)


def as_parquet_with_files_beside(root):
    pa = pytest.importorskip("pyarrow", reason="needs fewstep[data]")
    from pyarrow import parquet

    for k in range(12):
        (root / f"{k}.bin").write_bytes(encoded(PIXELS[k]))
    image = [{"bytes": None, "path": f"{k}.bin"} for k in range(12)]
    parquet.write_table(pa.table({"image": image, "label": LABELS, "text": CAPTIONS}), root / "a.parquet")
    return root / "a.parquet"


def as_arrow(root):
    found = table()
    import pyarrow as pa

    with pa.OSFile(str(root / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=5)
    return root / "a.arrow"


def as_saved_dataset(root):
    """What ``save_to_disk`` leaves: arrow streams and a list of them."""
    found = table()
    import pyarrow as pa

    for k in range(2):
        sink = pa.OSFile(str(root / f"data-{k:05d}-of-00002.arrow"), "wb")
        with sink, pa.ipc.new_stream(sink, found.schema) as writer:
            writer.write_table(found.slice(6 * k, 6))
    state = {"_data_files": [{"filename": f"data-{k:05d}-of-00002.arrow"} for k in range(2)], "_split": "train"}
    (root / "state.json").write_text(json.dumps(state))
    return root


FORMATS = [
    as_sub_folders,
    as_metadata,
    as_npz,
    as_tar,
    as_tar_shards,
    as_json_beside,
    as_zip,
    as_parquet,
    as_raw_parquet,
    as_parquet_with_files_beside,
    as_arrow,
    as_saved_dataset,
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return images(as_folder(tmp_path_factory.mktemp("plain")))


def by_pixels(split):
    """Rows in an order that does not depend on the format's own."""
    rows = zip(split.data.flatten(1).tolist(), split.cond.tolist(), split.captions, strict=True)
    return sorted(rows)


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_split_of_the_plain_folder(write, plain, tmp_path):
    task = images(write(tmp_path))
    assert task.classes == plain.classes == 3
    assert task.shape == plain.shape
    if write is as_sub_folders:  # its order is by label, so that other rows are held out
        whole = [by_pixels(t.train) + by_pixels(t.test) for t in (task, plain)]
        assert sorted(whole[0]) == sorted(whole[1])
        return
    for mine, its in ((task.train, plain.train), (task.test, plain.test)):
        assert torch.equal(mine.data, its.data)
        assert torch.equal(mine.cond, its.cond)
        assert mine.captions == its.captions


def test_captions_and_labels_belong_to_their_pictures(plain):
    known = {PIXELS[k].tobytes(): (LABELS[k], CAPTIONS[k]) for k in range(12)}
    for split in (plain.train, plain.test):
        shown = plain.pictures(split.data)
        for picture, label, caption in zip(shown, split.cond.tolist(), split.captions, strict=True):
            assert known[picture.numpy().tobytes()] == (label, caption)


def test_what_datasets_itself_saved_is_read_with_its_label_names(tmp_path, plain):
    datasets = pytest.importorskip("datasets", reason="needs the datasets package")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"]), text=datasets.Value("string")
    )
    rows = {"image": [{"bytes": encoded(p), "path": None} for p in PIXELS], "label": LABELS, "text": CAPTIONS}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole, test=whole.select(range(4))).save_to_disk(str(tmp_path / "saved"))
    task = images(tmp_path / "saved", test_count=4)
    assert task.class_names == ("ant", "bee", "cat")
    assert (len(task.train), len(task.test)) == (12, 4)
    assert np.array_equal(task.pictures(task.train.data).numpy(), PIXELS)
    whole.to_parquet(tmp_path / "train-0.parquet")
    assert images(tmp_path / "train-0.parquet").class_names == ("ant", "bee", "cat")


def test_names_of_files_say_the_splits_of_tables_and_of_shards(tmp_path):
    for name, first in (("train-00000-of-00001", 0), ("validation-00000-of-00001", 8)):
        write_tar(tmp_path / f"{name}.tar", {f"{k:02d}.png": encoded(PIXELS[k]) for k in range(first, first + 4)})
    task = images(tmp_path)
    assert np.array_equal(task.pictures(task.train.data).numpy(), PIXELS[:4])
    assert np.array_equal(task.pictures(task.test.data).numpy(), PIXELS[8:11])


def test_what_was_found_is_said_in_one_line(tmp_path):
    as_folder(tmp_path)
    (tmp_path / "020.png").write_bytes(b"")
    (tmp_path / "020.cls").write_bytes(b"0")
    Image.fromarray(PIXELS[0]).save(
        tmp_path / "021.gif", save_all=True, append_images=[Image.fromarray(PIXELS[1])], duration=50
    )
    (tmp_path / "021.cls").write_bytes(b"0")
    with pytest.warns(UserWarning, match=r"skipped 1 of 14 files .*020.png: empty"):
        said = images(tmp_path).summary()
    for part in ("13 pictures (10 to learn from, 3 to measure", "8x8 colour", "3 labels", "captions", "1 animated"):
        assert part in said
    assert "1 skipped" in said and "020.png: empty" in said and "\n" not in said


def test_a_job_says_what_it_found_before_it_starts(tmp_path):
    from fewstep import jobs
    from fewstep.train.recipe import recipe_from
    from fewstep.train.trainer import Nobody

    class Listener(Nobody):
        said: list[str] = []

        def say(self, line):
            self.said.append(line)

    recipe = {
        "steps": 1,
        "task": {"name": "images", "options": {"path": str(as_folder(tmp_path)), "test_count": 3}},
        "student": {"net": {"kind": "unet", "widths": [8], "groups": 4}},
        "method": {"name": "flow_matching"},
    }
    jobs.prepare(recipe_from(recipe), tmp_path / "run", "cpu", Listener())
    assert Listener.said == [images(tmp_path).summary()]


def test_a_picture_without_a_caption_has_an_empty_one(tmp_path):
    as_folder(tmp_path)
    (tmp_path / "003.txt").unlink()
    task = images(tmp_path)
    assert sorted([*task.train.captions, *task.test.captions]).count("") == 1


def test_folders_that_are_links_are_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    as_folder(tmp_path / "real")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "back").symlink_to(tmp_path / "set", target_is_directory=True)
    task = images(tmp_path / "set")
    assert len(task.train) + len(task.test) == 12


# -- pictures ------------------------------------------------------------------------------------


def test_transparent_parts_take_the_background_that_was_chosen(tmp_path):
    array = np.zeros((2, 2, 4), dtype=np.uint8)
    array[0, 0] = (10, 20, 30, 255)
    for background, value in (("white", 255), ("black", 0)):
        seen = read_picture(encoded(array), Shape(background=background), "a").pixels
        assert seen[0, 0].tolist() == [10, 20, 30]
        assert (seen[1] == value).all()


def test_of_an_animation_the_first_frame_is_read_and_it_is_said():
    out = io.BytesIO()
    frames = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (10, 200)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    read = read_picture(out.getvalue(), Shape(channels=1), "a")
    assert read.animated
    assert (read.pixels == 10).all()


def test_a_long_strip_is_cropped_to_its_middle():
    strip = np.zeros((1, 3000, 3), dtype=np.uint8)
    strip[:, 1499:1501] = 255
    assert read_picture(encoded(strip), Shape(size=2), "a").pixels.shape == (2, 2, 3)


def test_threads_keep_the_order_and_hold_few_pictures_at_once():
    made = []

    def source(k):
        def fetch():
            made.append(k)
            return np.full((2, 2), k, dtype=np.uint8)

        return fetch

    seen = []
    for read in read_pictures(((str(k), source(k)) for k in range(100)), Shape(), threads=2):
        seen.append(int(read.pixels[0, 0, 0]))
        assert len(made) - len(seen) <= 2 * 4
    assert seen == list(range(100))


def test_an_archive_is_never_unpacked_to_disk(tmp_path):
    file = as_tar(tmp_path)
    before = sorted(os.listdir(tmp_path))
    images(file)
    assert sorted(os.listdir(tmp_path)) == before


def test_pixels_are_kept_as_bytes_and_read_as_numbers(plain):
    assert plain.train.held.data.dtype == torch.uint8
    part = plain.train.rows(torch.tensor([4, 1]))
    assert part.data.dtype == torch.float32
    assert torch.equal(part.data, plain.train.data[[4, 1]])
    assert torch.equal(plain.batch(4, 0, 1).data, plain.batch(4, 0, 1).data)


def test_half_labelled_tables_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs fewstep[data]")
    from pyarrow import parquet

    image = [encoded(p) for p in PIXELS]
    parquet.write_table(pa.table({"image": image, "label": [None, *LABELS[1:]]}), tmp_path / "a.parquet")
    with pytest.raises(Refused, match="1 of 12 pictures have no label"):
        images(tmp_path / "a.parquet")
