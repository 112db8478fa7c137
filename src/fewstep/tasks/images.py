"""Images: a folder of pictures, or an .npz of pixels."""

from __future__ import annotations

import json
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..errors import Refused, need
from ..part import Part
from ..registry import task
from ..rng import Rng
from .base import Split, Task
from .split import data_hash, stratified

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])
MAX_PIXELS = 100_000_000
"""Of one picture; a larger one is taken for a decompression bomb."""
MAX_BYTES = 16 * 2**30
"""Of all pixels of a data set in memory, as float32."""
TEST_SHARE, TEST_MOST = 0.1, 2000
"""Where the data has no test split, this share of it becomes one, up to so many."""


class ImagesOptions(Part):
    path: str = Field(description="a folder of pictures, or an .npz")
    size: int | None = Field(None, ge=1, description="side in pixels: the shorter side is resized, the rest cropped")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; None: as found")
    patch: int = Field(1, ge=1, description="blocks of patch x patch pixels become channels: smaller networks")
    flip: bool = Field(False, description="mirror half of the training pictures, left and right")
    test_count: int | None = Field(None, ge=1, description="pictures to measure against; None: all, or a tenth")
    train_count: int | None = Field(None, ge=1, description="pictures to learn from; None: all")
    hold_out: int = Field(
        0,
        ge=0,
        description="this many training pictures, stratified, take the place of the test split: to choose recipes",
    )
    seed: int = Field(0, description="of the split, where the data has none")


@dataclass(frozen=True)
class Pixels:
    """uint8 [count, height, width, channels] with labels [count], or None where there are none."""

    data: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, index: np.ndarray | slice) -> Pixels:
        return Pixels(self.data[index], None if self.labels is None else self.labels[index])


@task("images")
class Images(Task):
    """Pictures from a folder or an .npz, with or without labels, in [-1, 1].

    A folder: labels are the names of its sub-folders, or the field ``label`` in ``metadata.jsonl`` (one line
    for each picture, with ``file_name``); pictures straight in the folder have none. Sub-folders ``train`` and
    ``test`` are the splits. Files that cannot be read are skipped, with a warning and a count in ``skipped``.

    An .npz: ``images`` uint8 [N, H, W] or [N, H, W, C] and, if known, ``labels`` [N]; or both twice, as
    ``train_images, train_labels, test_images, test_labels``.

    ``patch = p`` moves blocks of pixels to channels, [C p p, H / p, W / p]; ``pictures`` undoes it.
    """

    Options = ImagesOptions
    value_range = (-1.0, 1.0)

    def __init__(self, options: ImagesOptions) -> None:
        self.options = options
        self.skipped = 0
        self.class_names: tuple[str, ...] = ()
        source = File(options.path).expanduser()
        if not source.exists():
            raise Refused(f"no such folder or file: {options.path}")
        if source.is_dir():
            train, test = self._from_folder(source)
        elif source.suffix == ".npz":
            train, test = self._from_npz(source)
        else:
            raise Refused(f"{options.path} is neither a folder of pictures nor an .npz")
        train, test = self._cut(train, test)
        height, width, channels = train.data.shape[1:]
        p = options.patch
        if height % p or width % p:
            raise Refused(f"patch = {p} does not divide pictures of {height}x{width}: pass a size that it divides")
        if train.labels is not None and test.labels is not None:
            top = int(max(train.labels.max(), test.labels.max()))
            self.class_names = self.class_names or tuple(map(str, range(top + 1)))
            self.classes = len(self.class_names)
        self.shape = (channels * p * p, height // p, width // p)
        self.data_std = _std(train.data) / 127.5 or 1.0
        self._train, self._test = (self._split(part) for part in (train, test))

    @property
    def train(self) -> Split:
        return self._train

    @property
    def test(self) -> Split:
        return self._test

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and labels of both splits."""
        return data_hash(self._train.data, self._train.cond, self._test.data, self._test.cond)

    def augment(self, data: Tensor, rng: Rng) -> Tensor:
        if not self.options.flip:
            return data
        mirrored = F.pixel_unshuffle(F.pixel_shuffle(data, self.options.patch).flip(3), self.options.patch)
        half = rng.integers(2, len(data)).to(data.device).bool()
        return torch.where(half[:, None, None, None], mirrored, data)

    def pictures(self, x: Tensor) -> Tensor | None:
        low, high = self.value_range
        scaled = (F.pixel_shuffle(self.finish(x.float()), self.options.patch) - low) / (high - low) * 255
        return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    # -- splits -------------------------------------------------------------------------------

    def _cut(self, train: Pixels, test: Pixels | None) -> tuple[Pixels, Pixels]:
        """Both splits: the data's own, or drawn by class; ``hold_out`` trades the test split for a part of train."""
        o = self.options
        if test is None:
            share = o.test_count or min(TEST_MOST, max(1, int(TEST_SHARE * len(train))))
            train, test = self._hold(train, share, "test_count")
        elif o.test_count is not None:
            test = test.rows(slice(o.test_count))
        if o.train_count is not None:
            train = train.rows(slice(o.train_count))
        if o.hold_out:
            train, test = self._hold(train, o.hold_out, "hold_out")
        return train, test

    def _hold(self, whole: Pixels, count: int, name: str) -> tuple[Pixels, Pixels]:
        if count >= len(whole):
            raise Refused(f"{name} = {count} leaves nothing of {len(whole)} pictures to learn from: pass fewer")
        labels = None if whole.labels is None else torch.from_numpy(whole.labels)
        kept, held = stratified(labels, len(whole), count, self.options.seed)
        return whole.rows(kept.numpy()), whole.rows(held.numpy())

    def _split(self, part: Pixels) -> Split:
        data = torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)
        label = None if part.labels is None else torch.from_numpy(part.labels)
        return Split(F.pixel_unshuffle(data, self.options.patch), label)

    def _fits(self, count: int, height: int, width: int, channels: int) -> None:
        size = 4 * count * height * width * channels
        if size > MAX_BYTES:
            memory = f"{size / 2**30:.0f} GiB of memory"
            raise Refused(f"{count} pictures of {height}x{width} need {memory}: pass a smaller size, or fewer pictures")

    # -- folders ------------------------------------------------------------------------------

    def _from_folder(self, root: File) -> tuple[Pixels, Pixels | None]:
        need("PIL", "evaluate")
        parts = [root / "train", root / "test"] if (root / "train").is_dir() and (root / "test").is_dir() else [root]
        listed = [_listing(part) for part in parts]
        names = sorted({name for rows in listed for _, name in rows if name is not None}, key=_natural)
        self.class_names = tuple(names)
        read = [self._read_all(rows, names) for rows in listed]
        if self.skipped:
            total = sum(map(len, listed))
            warnings.warn(f"skipped {self.skipped} of {total} files in {root}: not a readable picture", stacklevel=4)
        grey = all(picture.shape[2] == 1 for pictures, _ in read for picture in pictures)
        channels = self.options.channels or (1 if grey else 3)
        split = [self._stack(pictures, labels, channels, root) for pictures, labels in read]
        return split[0], split[1] if len(split) == 2 else None

    def _read_all(self, rows: list[tuple[File, str | None]], names: list[str]) -> tuple[list[np.ndarray], list[int]]:
        pictures: list[np.ndarray] = []
        labels: list[int] = []
        number = {name: i for i, name in enumerate(names)}
        for file, name in rows:
            picture = read_picture(file, self.options.size, self.options.channels)
            if picture is None:
                self.skipped += 1
                continue
            if not pictures:
                self._fits(len(rows), *picture.shape)
            pictures.append(picture)
            labels.append(number[name] if name is not None else -1)
        return pictures, labels

    def _stack(self, pictures: list[np.ndarray], labels: list[int], channels: int, root: File) -> Pixels:
        if not pictures:
            raise Refused(f"none of the pictures in {root} could be read")
        sizes = sorted({p.shape[:2] for p in pictures})
        if len(sizes) > 1:
            (h, w), (i, j) = sizes[0], sizes[-1]
            raise Refused(f"pictures in {root} differ in size, {w}x{h} and {j}x{i}: pass a size")
        data = np.stack([p if p.shape[2] == channels else p.repeat(channels, 2) for p in pictures])
        return Pixels(data, np.array(labels, dtype=np.int64) if self.class_names else None)

    # -- npz ----------------------------------------------------------------------------------

    def _from_npz(self, file: File) -> tuple[Pixels, Pixels | None]:
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > MAX_BYTES:
                raise Refused(f"{file} unpacks to {unpacked / 2**30:.0f} GiB, which is more than fits: split it")
            with np.load(file, allow_pickle=False) as archive:
                keys = set(archive.files)
                if {"train_images", "test_images"} <= keys:
                    if ("train_labels" in keys) != ("test_labels" in keys):
                        raise Refused(f"{file} has labels for one split only: give both, or none")
                    return self._member(archive, file, "train_"), self._member(archive, file, "test_")
                if "images" in keys:
                    return self._member(archive, file, ""), None
        except Refused:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, MemoryError) as error:
            if "pickle" in str(error).lower() or "object array" in str(error).lower():
                raise Refused(f"{file} holds pickled objects, which could run code: save plain arrays") from None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Refused(f"{file} is not a readable .npz ({reason})") from None
        found = ", ".join(sorted(keys)) or "nothing"
        raise Refused(f"{file} holds {found}: name the arrays images and labels, or train_images and test_images")

    def _member(self, archive: Any, file: File, prefix: str) -> Pixels:
        images = archive[f"{prefix}images"]
        got = f"{images.dtype} {list(images.shape)}"
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
            raise Refused(f"{prefix}images in {file} must be uint8 [N, H, W] or [N, H, W, 1 or 3], got {got}")
        if images.size == 0:
            raise Refused(f"{prefix}images in {file} is empty: {got}")
        images = images[..., None] if images.ndim == 3 else images
        labels = archive[f"{prefix}labels"] if f"{prefix}labels" in archive.files else None
        if labels is not None:
            if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
                got = f"{labels.dtype} {list(labels.shape)}"
                raise Refused(f"{prefix}labels in {file} must be {len(images)} whole numbers from 0, got {got}")
            labels = labels.astype(np.int64)
        size, channels = self.options.size, self.options.channels
        if (size and images.shape[1:3] != (size, size)) or (channels and images.shape[3] != channels):
            need("PIL", "evaluate")
            from PIL import Image

            whole = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)
            images = np.stack([_shaped(picture, size, channels) for picture in whole])
        self._fits(*images.shape)
        return Pixels(images, labels)


def _std(pixels: np.ndarray) -> float:
    """The spread of uint8 values, from their histogram: exact, and small in memory."""
    count = sum(np.bincount(block.ravel(), minlength=256) for block in np.array_split(pixels, 64))
    share, level = count / pixels.size, np.arange(256)
    return float(np.sqrt(share @ (level - share @ level) ** 2))


def _natural(name: str) -> tuple[int, int, str]:
    """Whole numbers in their order, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _listing(root: File) -> list[tuple[File, str | None]]:
    """Picture files under a folder in a fixed order, each with its label's name."""
    table = root / "metadata.jsonl"
    if table.is_file():
        return _from_table(root, table)
    found = [
        file
        for file in sorted(root.rglob("*"), key=lambda f: f.relative_to(root).as_posix())
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(root).parts)
    ]
    if not found:
        raise Refused(f"no pictures in {root}: it needs files such as .png, .jpg or .webp")
    tops = [file.relative_to(root).parts for file in found]
    labelled = all(len(top) > 1 for top in tops) and len({top[0] for top in tops}) > 1
    return [(file, top[0] if labelled else None) for file, top in zip(found, tops, strict=True)]


def _from_table(root: File, table: File) -> list[tuple[File, str | None]]:
    rows: list[tuple[File, str | None]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, label = entry["file_name"], entry.get("label")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refused(f"{table}, line {number}: not an object with a file_name") from None
        file = root / str(name)
        if not file.resolve().is_relative_to(root.resolve()):
            raise Refused(f"{table}, line {number}: {name!r} lies outside the folder")
        if isinstance(label, float | bool | list | dict):
            raise Refused(f"{table}, line {number}: a label is a whole number or a word, got {label!r}")
        rows.append((file, None if label is None else str(label)))
    if not rows:
        raise Refused(f"{table} lists no pictures")
    without = sum(label is None for _, label in rows)
    if 0 < without < len(rows):
        raise Refused(f"{table}: {without} of {len(rows)} lines have no label: give all of them one, or none")
    return rows


def read_picture(file: File, size: int | None, channels: int | None) -> np.ndarray | None:
    """A file as uint8 [height, width, 1 or 3], upright; None where it is no picture or damaged.

    Transparent parts are shown on white; 16-bit values are scaled to 8; of an animation it is the first frame.
    Refused for a picture so large that it must be a decompression bomb.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return _shaped(_upright(picture), size, channels)
    except Image.DecompressionBombError:
        raise Refused(f"{file} unpacks to more than {MAX_PIXELS // 10**6} million pixels: remove it") from None
    except Exception:  # a damaged file can fail anywhere in a decoder; it is counted and skipped
        return None


def _upright(picture: Any) -> Any:
    from PIL import ImageOps

    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF says nothing about the pixels
        return picture


def _shaped(picture: Any, size: int | None, channels: int | None) -> np.ndarray:
    """8-bit grey or colour, resized and cropped: [height, width, channels]."""
    from PIL import Image, ImageOps

    picture = _eight_bit(picture)
    if picture.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        picture = flat.convert("L" if picture.mode in ("LA", "La", "L") else "RGB")
    grey = picture.mode in ("1", "L")
    mode = "L" if channels == 1 or (channels is None and grey) else "RGB"
    picture = picture.convert(mode)
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _eight_bit(picture: Any) -> Any:
    """Grey of more than 8 bits, scaled: whole numbers from 0..65535, fractions from 0..1."""
    from PIL import Image

    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("not finite")
    if picture.mode == "F":
        top = 1.0 if values.max() <= 1 else 255.0
    else:
        top = 255.0 if picture.mode == "I" and values.max() <= 255 else 65535.0
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
