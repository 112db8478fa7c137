"""Whatever is wrong with what a person hands in: exit code 1 or 2, one line that says what, and nothing is written.

One table, ``CASES``: a name, how the input is made, and a part of the line. Most run in this process; some are
repeated as true commands.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.denoiser import Wrapped
from fewstep.interop import save_student
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.student import Student
from fewstep.train.recipe import load_recipe, write_recipe

Image = pytest.importorskip("PIL.Image", reason="needs fewstep[evaluate]")
pytest.importorskip("diffusers", reason="needs fewstep[diffusers]")

LIMIT = 5.0
Build = Callable[[Path], list[str]]

# -- what is sound, to be spoiled ----------------------------------------------------------------

MIXTURE = """
steps = 2
batch = 8
[task]
name = "mixture"
options = { modes = 3, train_count = 50, test_count = 50 }
[student]
net = { kind = "mlp", width = 8, depth = 1 }
[method]
name = "flow_matching"
[evaluate]
enabled = false
"""
PICTURES = """
steps = 2
batch = 4
[task]
name = "images"
options = { path = "data" }
[student]
net = { kind = "unet", widths = [8], groups = 4 }
[method]
name = "flow_matching"
[evaluate]
enabled = false
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stock pipeline, a student and a run that are as they should be."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    root = tmp_path_factory.mktemp("sound")
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        add_attention=False, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(net, DDPMScheduler(clip_sample=False)).save_pretrained(str(root / "pipe"))
    (root / "mixture.toml").write_text(MIXTURE)
    torch.manual_seed(0)
    model = Wrapped(build({"kind": "mlp", "shape": (2,), "width": 8, "depth": 1}), Straight(), "velocity", "1000t")
    save_student(
        Student(model, (2,)), root / "run" / "student", method="consistency", teacher=None, program=False,
        value_range=None,
    )  # fmt: skip
    write_recipe(load_recipe(root / "mixture.toml"), root / "run" / "recipe.toml")
    return root


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil."""
    place = tmp_path / "work"
    shutil.copytree(sound, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("FEWSTEP_CACHE", str(place / "cache"))
    return place


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """All files and folders with their size and time of writing."""
    found = {}
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            about = os.lstat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), root)] = (about.st_size, about.st_mtime_ns)
    return {
        name: facts for name, facts in found.items() if (root / name).is_symlink() or not (root / name).is_dir()
    } | {name: (0, 0) for name in found if (root / name).is_dir() and not (root / name).is_symlink()}


# -- ways to spoil it ----------------------------------------------------------------------------


def recipe(extra: str | bytes, base: str = MIXTURE, command: str = "train") -> Build:
    """A recipe with lines put before it (or, for bytes, in its place)."""

    def build(here: Path) -> list[str]:
        content = extra if isinstance(extra, bytes) else (extra + "\n" + base).encode()
        (here / "bad.toml").write_bytes(content)
        return [command, "bad.toml", *(["--out", "new"] if command == "train" else [])]

    return build


def changed(*overrides: str, base: str = MIXTURE) -> Build:
    def build(here: Path) -> list[str]:
        (here / "bad.toml").write_text(base)
        return ["train", "bad.toml", *overrides, "--out", "new"]

    return build


def data(make: Callable[[Path], Any], *overrides: str) -> Build:
    """A recipe on images whose data ``make`` writes to ``data``, or to the path that it returns."""

    def build(here: Path) -> list[str]:
        path = make(here / "data") or "data"
        (here / "images.toml").write_text(PICTURES)
        return ["train", "images.toml", f"task.options.path={json.dumps(str(path))}", *overrides, "--out", "new"]

    return build


def files(**content: bytes | str) -> Callable[[Path], None]:
    """A folder of files; a double underscore in a name stands for a dot, ``_in_`` for a slash."""

    def make(root: Path) -> None:
        root.mkdir()
        for name, value in content.items():
            file = root / name.replace("_in_", "/").replace("__", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(value.encode() if isinstance(value, str) else value)

    return make


def named(name: str, content: bytes) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root.parent / name).write_bytes(content)
        return name

    return make


def png(width: int = 8, height: int = 8, seed: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def stated(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that states a huge size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def saved(array: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def tar(name: str = "a.png", kind: bytes = tarfile.REGTYPE, size: int | None = None, end: int | None = None) -> bytes:
    """A tar with a sound picture and one strange member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for at, one in enumerate(("first.png", name)):
            body = png()
            info = tarfile.TarInfo(one)
            info.size = len(body)
            if at:
                info.type, info.linkname = kind, "/etc/passwd"
            if at and size is not None:
                info.size = size
                out.write(info.tobuf(tarfile.GNU_FORMAT))
                continue
            archive.addfile(info, io.BytesIO(body) if info.isreg() else None)
    return out.getvalue()[:end]


def packed(name: str = "a.png", mode: int = 0o100644, patch: tuple[int, bytes] | None = None) -> bytes:
    """A zip with one member; ``patch`` writes bytes into its entry of the central directory."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, png())
    content = bytearray(out.getvalue())
    if patch is not None:
        at = content.index(b"PK\x01\x02") + patch[0]
        content[at : at + len(patch[1])] = patch[1]
    return bytes(content)


def npz(**arrays: Any) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        np.savez(root.parent / "data.npz", **arrays)
        return "data.npz"

    return make


def pixels(count: int = 6, side: int = 8) -> np.ndarray:
    return np.zeros((count, side, side), dtype=np.uint8)


def parquet(**columns: Any) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        pa = pytest.importorskip("pyarrow", reason="needs fewstep[data]")
        from pyarrow import parquet as pq

        pq.write_table(pa.table(columns), root.parent / "data.parquet")
        return "data.parquet"

    return make


def pipe(change: Callable[[Path], Any], *argv: str) -> Build:
    """A pipeline folder, spoiled, and a command on it."""

    def build(here: Path) -> list[str]:
        change(here / "pipe")
        return list(argv) or ["sample", "pipe", "-n", "1", "-o", "new"]

    return build


def student(change: Callable[[Path], Any], *argv: str) -> Build:
    def build(here: Path) -> list[str]:
        change(here / "run" / "student")
        return list(argv) or ["sample", "run/student", "-n", "1", "-o", "new"]

    return build


def edit(name: str, **keys: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; a value may be any text that ``json`` writes, NaN too."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **keys}))

    return change


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut(name: str, by: int = 40) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-by])

    return change


def spoil_weights(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / name)
        key = next(k for k, v in tensors.items() if v.is_floating_point())
        tensors[key].view(-1)[0] = value
        save_file({k: v.clone() for k, v in tensors.items()}, folder / name)

    return change


def gone(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return change


def only_pickle(folder: Path) -> None:
    file = folder / UNET
    tensors = file.read_bytes()
    file.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(tensors)


def run(change: Callable[[Path], Any], *argv: str) -> Build:
    def build(here: Path) -> list[str]:
        change(here / "run")
        return list(argv)

    return build


def says(*argv: str, make: Callable[[Path], Any] = lambda here: None) -> Build:
    def build(here: Path) -> list[str]:
        make(here)
        return list(argv)

    return build


def loop(root: Path) -> None:
    root.mkdir()
    (root / "again").symlink_to(root, target_is_directory=True)
    (root / "a.png").symlink_to(root / "a.png")


def closed(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is closed to root")
    root.mkdir()
    root.chmod(0)


def cycle(here: Path) -> list[str]:
    for one, other in (("bad", "other"), ("other", "bad")):
        (here / f"{one}.toml").write_text(f'{MIXTURE}[teacher]\nsource = "recipe:{other}.toml"\n')
    return ["train", "bad.toml", "--out", "new"]


def plugin(text: str, wanted: str = "Mine") -> Build:
    def build(here: Path) -> list[str]:
        (here / "mine.py").write_text(text)
        (here / "bad.toml").write_text(MIXTURE.replace("flow_matching", f"mine.py:{wanted}"))
        return ["train", "bad.toml", "--out", "new"]

    return build


def state(**content: Any) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        root.mkdir()
        (root / "state.json").write_text(json.dumps(content))

    return make


def prompts(content: bytes) -> Build:
    def build(here: Path) -> list[str]:
        (here / "prompts.txt").write_bytes(content)
        return ["distill", "pipe", "--prompts", "prompts.txt", "--out", "new"]

    return build


WITH_DATA = ("--data", "pictures", "--method", "dmd2", "--out", "new")


def lora(content: bytes | None, name: str = "style.safetensors") -> Build:
    def build(here: Path) -> list[str]:
        (here / "pictures").mkdir()
        for k in range(4):
            (here / "pictures" / f"{k}.png").write_bytes(saved(np.full((8, 8), 40 * k, dtype=np.uint8), "PNG"))
        if content is not None:
            (here / name).write_bytes(content)
        return ["distill", "pipe", *WITH_DATA, f"teacher.lora={name}"]

    return build


UNET = "unet/diffusion_pytorch_model.safetensors"
DEEP = "[" * 100_000
JPEG = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")

CASES: list[tuple[str, Build, str]] = [
    # recipes
    ("recipe: unknown key", recipe("stepss = 3"), "unknown key 'stepss': did you mean 'steps'?"),
    ("recipe: a number as text", changed("steps=many"), "steps: "),
    ("recipe: a number below its range", changed("batch=0"), "batch: "),
    ("recipe: a number of 400 digits", changed("steps=1" + "0" * 400), "steps: "),
    ("recipe: a batch beyond all memory", changed("batch=1" + "0" * 18), "batch: "),
    ("recipe: NaN for a rate", changed("optim.lr=nan"), "optim.lr: "),
    ("recipe: infinity for a rate", changed("optim.lr=inf"), "optim.lr: "),
    ("recipe: infinite guidance", changed("teacher.source=law", "teacher.guidance=inf"), "teacher.guidance: "),
    ("recipe: not TOML", recipe("steps = = 3"), "bad.toml is not valid TOML"),
    ("recipe: binary", recipe(b"\x00\xff\xfe" * 100), "bad.toml is not valid TOML"),
    ("recipe: nested without end", recipe(b"a = " + DEEP.encode()), "bad.toml is not valid TOML"),
    ("recipe: empty", recipe(b""), "key 'steps' is required"),
    ("recipe: two megabytes", recipe(b"#" * 2**21), "larger than"),
    ("recipe: a folder", says("train", "x.toml", make=lambda h: (h / "x.toml").mkdir()), "is neither a teacher"),
    ("recipe: taught by itself", recipe("", MIXTURE + '[teacher]\nsource = "recipe:bad.toml"\n'), "teaches itself"),
    ("recipe: two that teach each other", cycle, "teaches itself"),
    ("recipe: a name that leaves the folder", recipe('name = "../../out"'), "name: "),
    ("recipe: a teacher outside", changed("teacher.source=../../../etc"), "no teacher"),
    ("recipe: a student to go on from that is none", changed("student.init=nowhere"), "no student folder"),
    ("recipe: an unknown task", changed("task.name=mixtur"), "unknown task 'mixtur': did you mean 'mixture'?"),
    ("recipe: a task option of the wrong type", changed("task.options.modes=three"), "option 'modes'"),
    ("recipe: an unknown method", changed("method.name=flow"), "unknown method 'flow'"),
    ("recipe: an unknown method option", changed("method.options.x=1"), "unknown key 'x'"),
    ("recipe: an unknown network", changed("student.net.kind=mpl"), "student.net"),
    ("recipe: a network beyond all memory", changed("student.net.width=10000000000"), "student.net"),
    ("recipe: betas of the wrong length", changed("optim.betas=[0.9]"), "optim.betas"),
    ("recipe: a negative seed", changed("--seed", "-1"), "seed: "),
    ("recipe: an override without a value", changed("steps"), "an override is key.sub=value"),
    ("recipe: a section that is a number", changed("optim=3"), "optim: "),
    ("method file: not there", changed("method.name=none.py:Mine"), "no method at 'none.py:Mine'"),
    ("method file: broken", plugin("1 / 0"), "mine.py does not import: ZeroDivisionError"),
    ("method file: without the class", plugin("x = 1"), "mine.py has no method class 'Mine'"),
    # folders of pictures
    ("folder: not there", data(lambda root: "nowhere"), "no such folder or file"),
    ("folder: empty", data(lambda root: root.mkdir()), "no pictures in data"),
    ("folder: no pictures", data(files(notes__md="x", table__csv="1,2")), "no pictures in data"),
    ("folder: links that lead back", data(loop), "no pictures in data"),
    ("folder: closed", data(closed), "data cannot be read: permission denied"),
    ("folder: a name with a zero in it", data(lambda root: "da\0ta"), "no such folder or file"),
    ("folder: a name of 5,000 letters", data(lambda root: "d" * 5000), "no such folder or file"),
    ("folder: a device", data(lambda root: "/dev/zero"), "is none of these"),
    ("folder: a pipe called .npz", data(lambda root: os.mkfifo(root.parent / "d.npz") or "d.npz"), "is none of these"),
    ("folder: one picture", data(files(a__png=png())), "leaves nothing of 1 pictures"),
    ("folder: sizes that differ", data(files(a__png=png(), b__png=png(9, 7))), "differ in size"),
    ("metadata: leaves the folder", data(files(a__png=png(), metadata__jsonl='{"file_name": "../a.png"}')), "line 1"),
    ("metadata: no JSON", data(files(a__png=png(), metadata__jsonl="x")), "line 1: not an object with a file_name"),
    ("metadata: nested without end", data(files(a__png=png(), metadata__jsonl=DEEP)), "line 1: not an object"),
    ("metadata: a fraction for a label", data(files(metadata__jsonl='{"file_name": "a", "label": 0.5}')), "a label is"),
    ("beside: half of the labels", data(files(a__png=png(), b__png=png(), a__cls="1")), "1 of 2 pictures have no"),
    ("beside: a .json that is none", data(files(a__png=png(), a__json="{")), "a.json is no JSON"),
    ("beside: a caption of a megabyte", data(files(a__png=png(), a__txt="x" * 2**20)), "a.txt is longer than"),
    ("beside: a label beyond all classes", data(files(a__png=png(), a__cls="9" * 30)), "labels must be whole numbers"),
    # pictures
    ("picture: empty", data(files(a__png=b"", b__png=b"")), "none of the pictures in data could be read"),
    ("picture: cut off", data(files(a__jpg=JPEG[:-2000])), "a.jpg: truncated"),
    ("picture: text", data(files(a__jpg="no picture")), "a.jpg: no picture"),
    ("picture: PostScript called .png", data(files(a__png="%!PS-Adobe-3.0 EPSF-3.0\n")), "a.png: no picture"),
    ("picture: no numbers", data(files(a__tif=saved(np.full((4, 4), np.nan, np.float32), "TIFF"))), "a.tif: damaged"),
    ("picture: a bomb of 30,000 pixels a side", data(files(a__png=stated(30_000, 30_000))), "100 million pixels"),
    ("picture: a bomb of two thousand million", data(files(a__png=stated(2**31 - 1, 2**31 - 1))), "a.png"),
    ("picture: 30,000 pixels in a row", data(files(a__png=png(30_000, 1), b__png=png())), "30000x1 and 8x8"),
    ("picture: one pixel", data(files(a__png=png(1, 1), b__png=png(1, 1)), "task.options.patch=2"), "of 1x1"),
    ("picture: a size without bound", data(files(a__png=png()), "task.options.size=1000000"), "option 'size'"),
    # archives
    ("tar: a name that climbs out", data(named("d.tar", tar("../../a.png"))), "a name that leaves the archive"),
    ("tar: a name from the root", data(named("d.tar", tar("/tmp/a.png"))), "a name that leaves the archive"),
    ("tar: a name with backslashes", data(named("d.tar", tar("..\\a.png"))), "a name that leaves the archive"),
    ("tar: a link", data(named("d.tar", tar(kind=tarfile.SYMTYPE))), "a link, a device or sparse"),
    ("tar: a hard link", data(named("d.tar", tar(kind=tarfile.LNKTYPE))), "a link, a device or sparse"),
    ("tar: a device", data(named("d.tar", tar(kind=tarfile.CHRTYPE))), "a link, a device or sparse"),
    ("tar: sparse", data(named("d.tar", tar(kind=tarfile.GNUTYPE_SPARSE))), "a link, a device or sparse"),
    ("tar: a member of a terabyte", data(named("d.tar", tar(size=2**40))), "1099511627776 bytes"),
    ("tar: cut off", data(named("d.tar", tar(end=1200))), "not a readable .tar"),
    ("tar: empty", data(named("d.tar", b"")), "not a readable .tar"),
    ("tar: compressed", data(named("d.tar", zlib.compress(tar()))), "a compressed one must be unpacked"),
    ("zip: a name that climbs out", data(named("d.zip", packed("../a.png"))), "a name that leaves the archive"),
    ("zip: a drive", data(named("d.zip", packed("C:/a.png"))), "a name that leaves the archive"),
    ("zip: a link", data(named("d.zip", packed(mode=0o120777))), "a link or a device"),
    ("zip: encrypted", data(named("d.zip", packed(patch=(8, b"\x01")))), "is encrypted"),
    ("zip: a member of two gigabytes", data(named("d.zip", packed(patch=(24, b"\xff\xff\xff\x7f")))), "at most"),
    ("zip: no zip", data(named("d.zip", b"PK")), "not a readable .zip"),
    ("zip: no pictures", data(named("d.zip", packed("a.txt"))), "no pictures in d.zip"),
    # tables
    ("parquet: no parquet", data(named("d.parquet", b"PAR1" + bytes(100))), "d.parquet is damaged"),
    ("parquet: no pictures", data(parquet(x=[1, 2])), "name the one with pictures 'image'"),
    ("parquet: a negative label", data(parquet(image=[png()] * 3, label=[0, 1, -1])), "got -1"),
    ("parquet: a list for a label", data(parquet(image=[png()] * 2, label=[[0], [1]])), "a label is"),
    ("parquet: a path outside", data(parquet(image=[{"bytes": None, "path": "../../a.png"}])), "outside its folder"),
    ("parquet: no bytes", data(parquet(image=[b"", b""])), "none of the pictures"),
    ("arrow: no arrow", data(named("d.arrow", b"\xff" * 64)), "d.arrow is damaged"),
    ("saved data set: leaves its folder", data(state(_data_files=[{"filename": "../x.arrow"}])), "no data files"),
    ("saved data set: a file is missing", data(state(_data_files=[{"filename": "x.arrow"}])), "x.arrow is missing"),
    ("saved data set: no JSON", data(files(state__json=DEEP)), "state.json is no JSON"),
    ("saved data set: a split outside", data(files(dataset_dict__json='{"splits": [".."]}')), "no splits by"),
    # arrays and pickles
    ("npz: pickled objects", data(npz(images=np.array([{}, []], dtype=object))), "pickled objects"),
    ("npz: no archive", data(named("d.npz", b"\x80\x04]q\x00.")), "not a readable .npz"),
    ("npz: negative labels", data(npz(images=pixels(), labels=np.arange(6) - 3)), "whole numbers from 0"),
    ("npz: labels beyond all classes", data(npz(images=pixels(), labels=np.arange(6) + 2**40)), "at most"),
    ("npz: fractions", data(npz(images=pixels().astype(np.float64))), "must be uint8"),
    ("npz: captions that are numbers", data(npz(images=pixels(), captions=np.arange(6))), "must be 6 texts"),
    ("npz: one row", data(npz(images=pixels(1))), "leaves nothing of 1 pictures"),
    ("pickle: as data", data(named("d.pt", b"\x80\x04]q\x00.")), "is none of these"),
    ("pickle: as a teacher", says("sample", "d.pt", make=lambda h: torch.save({}, h / "d.pt")), "no teacher 'd.pt'"),
    ("pickle: weights of a pipeline", pipe(only_pickle), "is a pickle, which can run code"),
    # pipelines
    ("pipeline: a part is missing", pipe(gone("unet")), "unet is missing"),
    ("pipeline: no scheduler", pipe(gone("scheduler")), "scheduler is missing"),
    ("pipeline: an unknown class", pipe(edit("model_index.json", _class_name="NoPipeline")), "is no pipeline"),
    ("pipeline: custom code by name", pipe(edit("model_index.json", _class_name=["x", "Y"])), "custom code"),
    ("pipeline: custom code of a part", pipe(edit("model_index.json", unet=["mine", "Net"])), "custom code"),
    ("pipeline: a file of code", pipe(put("pipeline.py", "import os")), "is custom code"),
    ("pipeline: a part that leaves", pipe(edit("model_index.json", **{"../x": ["diffusers", "U"]})), "no plain name"),
    ("pipeline: an index nested without end", pipe(put("model_index.json", DEEP)), "not valid JSON"),
    ("pipeline: an index that is a list", pipe(put("model_index.json", "[]")), "must hold a JSON object"),
    ("pipeline: an endless integer", pipe(put("model_index.json", f'{{"a": {"9" * 10_000}}}')), "not valid JSON"),
    ("pipeline: weights cut off", pipe(cut(UNET)), "truncated"),
    ("pipeline: weights that are none", pipe(put(UNET, b"\xff" * 100)), "truncated or no safetensors"),
    ("pipeline: NaN weights", pipe(spoil_weights(UNET, float("nan"))), "a NaN or an infinity"),
    ("pipeline: infinite weights", pipe(spoil_weights(UNET, float("inf"))), "a NaN or an infinity"),
    ("pipeline: another size than its weights", pipe(edit("unet/config.json", in_channels=3)), "unet"),
    ("pipeline: a size beyond all memory", pipe(edit("unet/config.json", block_out_channels=[2**40, 8])), "unet"),
    ("pipeline: remote code", pipe(edit("unet/config.json", auto_map={"a": "b"})), "auto_map"),
    (
        "pipeline: a shard outside",
        pipe(put("unet/x.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}')),
        "which is no file beside it",
    ),
    ("pipeline: betas that are no numbers", pipe(edit("scheduler/scheduler_config.json", beta_end=float("nan"))), ""),
    ("pipeline: no time at all", pipe(edit("scheduler/scheduler_config.json", num_train_timesteps=0)), ""),
    ("pipeline: without data", pipe(lambda f: None, "distill", "pipe"), "--data"),
    (
        "pipeline: with data that will not do",
        pipe(lambda f: None, "distill", "pipe", "--data", "pipe", "--method", "dmd2", "--out", "new"),
        "no pictures in pipe",
    ),
    # contracts and students
    ("contract: not there", student(gone("fewstep.json")), ""),
    ("contract: no JSON", student(put("fewstep.json", "{")), "not valid JSON"),
    ("contract: a NaN", student(edit("fewstep.json", start_scale=float("nan"))), "NaN is not a JSON number"),
    ("contract: a negative start", student(edit("fewstep.json", start=-1)), "start: "),
    ("contract: of the future", student(edit("fewstep.json", format=99)), "format 99"),
    ("contract: an unknown key", student(edit("fewstep.json", stepss=[])), "unknown key 'stepss'"),
    ("contract: no steps", student(edit("fewstep.json", steps=[])), "at least one step count"),
    ("contract: a sample beyond all memory", student(edit("fewstep.json", shape=[65536] * 6)), "too large"),
    ("contract: another shape than the network's", student(edit("fewstep.json", shape=[3])), ""),
    (
        "contract: a network beyond all memory",
        student(edit("fewstep.json", network={"kind": "mlp", "shape": [2], "width": 2**40})),
        "network: ",
    ),
    ("contract: a network that is none", student(edit("fewstep.json", network={"kind": "x"})), "network: "),
    ("student: NaN weights", student(spoil_weights("model.safetensors", float("nan"))), "a NaN or an infinity"),
    ("student: weights cut off", student(cut("model.safetensors")), "truncated"),
    ("student: weights are missing", student(gone("model.safetensors")), "model.safetensors is missing"),
    ("student: no golden sample", student(gone("golden.safetensors")), "golden.safetensors"),
    ("student: a golden sample cut off", student(cut("golden.safetensors"), "check", "run/student"), "golden"),
    ("student: labels, and it has none", student(lambda f: None, "sample", "run", "--labels", "9"), "takes no labels"),
    ("teacher: a label out of range", says("sample", "digits", "--labels", "3,10", "-o", "new"), "label 10 is not one"),
    # commands
    ("command: steps that were not trained", says("sample", "run", "--steps", "7", "-o", "new"), "got 7"),
    ("command: no steps", says("sample", "run", "--steps", "0", "-o", "new"), "'--steps'"),
    ("command: a seed beyond all bits", says("sample", "run", "--seed", "9" * 40, "-o", "new"), "seed"),
    ("command: a device that is none", says("sample", "run", "--device", "gpu"), "unknown device 'gpu'"),
    ("command: no threads", says("sample", "run", "--threads", "0"), "'--threads'"),
    ("command: a file where a folder goes", says("sample", "run", "-o", "mixture.toml"), "mixture.toml"),
    ("command: a run that is there", says("train", "mixture.toml", "--out", "run"), "run is already there"),
    ("command: a reference that will not do",
     says("evaluate", "run", "--against", "digits", "--reference", "none.npz", "-o", "new"), "no such folder"),
    ("command: models that cannot be compared", says("compare", "run", "nowhere", "--reference", "mixture"), "nowhere"),
    # runs and reports
    ("run: never evaluated", says("report", "run"), "holds no scores.json"),
    ("run: scores that are no JSON", run(put("scores.json", "{"), "report", "run"), "scores.json"),
    ("run: scores of another kind", run(put("scores.json", '{"schema": "x"}'), "report", "run"), "scores.json"),
    ("run: scores nested without end", run(put("scores.json", DEEP), "report", "run"), "scores.json"),
    ("run: a recipe that is no TOML", run(put("recipe.toml", "= ="), "train", "run", "--resume"), "not valid TOML"),
    ("run: resumed with another recipe", says("train", "run", "--resume", "steps=3"), "was started with"),
    ("run: nothing to resume", says("train", "mixture.toml", "--resume"), "nothing to resume"),
    # prompts
    ("prompts: empty", prompts(b""), "holds no prompt"),
    ("prompts: binary", prompts(b"\xff\x00\xfe" * 50), "is binary"),
    ("prompts: blank lines", prompts(b"\n \n\t\n"), "holds no prompt"),
    ("prompts: not UTF-8", prompts(b"caf\xe9\n"), "is not UTF-8"),
    ("prompts: a control character", prompts(b"a\x1b[2Jb\n"), "control character"),
    ("prompts: endless", prompts(b"a" * 10_001), "more than the 10000 allowed"),
    ("prompts: a teacher that takes none", prompts(b"a cat\n"), "takes no prompts"),
    # LoRA files, exports
    ("lora: no file", lora(None), "is missing"),
    ("lora: a pickle", lora(b"\x80\x04K\x01.", "style.bin"), "pickle"),
    ("lora: no safetensors", lora(b"abc"), "style.safetensors"),
    ("lora: rank 0", says("distill", "pipe", *WITH_DATA, "--lora", "0"), "--lora"),
    ("export: unknown kind", says("export", "run/student", "--to", "gguf", "-o", "new"), "gguf"),
    ("export: a model that is not there", says("export", "nowhere", "--to", "pt2", "-o", "new"), "nowhere"),
    ("export: no adapters", says("export", "run/student", "--to", "lora", "-o", "new"), "holds no LoRA"),
]  # fmt: skip


def test_the_table_has_its_sixty_rows_and_more():
    assert len({name for name, _, _ in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize(("build", "line"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_leaves_one_line_and_nothing_half_written(build, line, here, capfd):
    arguments = build(here)
    before = listing(here.parent)
    capfd.readouterr()
    began = time.process_time()  # of this process alone: other work on the machine is not its fault
    code = main(arguments)
    taken = time.process_time() - began
    answer = capfd.readouterr()
    assert code in (1, 2), (code, answer.err, answer.out)
    assert answer.err.startswith("fewstep: ") and answer.err.count("\n") == 1, answer.err
    assert line in answer.err
    assert len(answer.err) < 1000
    assert answer.out == ""
    assert "-vv shows where" not in answer.err, answer.err
    assert listing(here.parent) == before
    assert taken < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["recipe: taught by itself", "tar: a name that climbs out", "pipeline: NaN weights", "contract: a NaN"]
)
def test_a_true_command_behaves_the_same(name, here):
    build, line = next(case[1:] for case in CASES if case[0] == name)
    command = [sys.executable, "-m", "fewstep", *build(here)]
    before = listing(here.parent)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert line in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert listing(here.parent) == before
