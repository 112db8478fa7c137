"""Images: pictures from folders, archives and tables, or an .npz of pixels."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..cond import Cond
from ..errors import Refused, need
from ..part import Part
from ..registry import task
from ..rng import Rng
from .base import Split, Task
from .captions import captioned
from .pictures import Background, Shape, read_pictures
from .split import data_hash, stratified
from .tables import saved_splits, table_portion
from .trees import Folder, Found, Portion, Tar, Zip, portions

MAX_BYTES = 16 * 2**30
"""Of all pixels of a data set in memory, a byte each."""
MAX_CLASSES = 100_000
TEST_SHARE, TEST_MOST = 0.1, 2000
"""Where the data has no test split, this share of it becomes one, up to so many."""
NAMED = 3
"""So many of the files that were skipped are named."""
FORMATS = "a folder of pictures, an .npz, .parquet, .arrow, .tar or .zip, or a folder of datasets.save_to_disk"


class ImagesOptions(Part):
    path: str = Field(description=FORMATS)
    size: int | None = Field(
        None, ge=1, le=2**14, description="side in pixels: the shorter side is resized, the rest cropped"
    )
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; None: as found")
    background: Background = Field("white", description="what is seen through transparent parts")
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
    """uint8 [count, channels, height, width], with labels [count] and captions, or None where there are none."""

    data: np.ndarray
    labels: np.ndarray | None
    captions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, index: np.ndarray | slice) -> Pixels:
        labels, captions = (None if held is None else held[index] for held in (self.labels, self.captions))
        return Pixels(self.data[index], labels, captions)


@dataclass(frozen=True)
class Unpacked:
    """Rows of bytes as samples in [-1, 1], in patches: a quarter of the memory of numbers."""

    data: Tensor
    patch: int

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return F.pixel_unshuffle(self.data[index].float().div_(127.5).sub_(1), self.patch)


@task("images")
class Images(Task):
    """Pictures with or without labels or captions, in [-1, 1]; whatever the format, the same split.

    A folder, a .zip or a .tar: labels are the names of sub-folders, or stand in a ``.cls`` or ``.json`` beside each
    picture; captions in a ``.txt``. Or all in ``metadata.jsonl``: one line for each picture with ``file_name`` and,
    if known, ``label`` and ``text``. Folders ``train`` and ``test`` are the splits. Parquet, arrow and what
    ``save_to_disk`` wrote: columns ``image``, ``label``, ``text``.

    An .npz: ``images`` uint8 [N, H, W] or [N, H, W, C] and, if known, ``labels`` and ``captions`` [N]; or all twice,
    as ``train_images, train_labels, test_images, test_labels``.

    Files that cannot be read are skipped, with a warning, a count in ``skipped`` and their first names. Pixels are
    kept as bytes. ``patch = p`` moves blocks of pixels to channels, [C p p, H / p, W / p]; ``pictures`` undoes it.
    """

    Options = ImagesOptions
    value_range = (-1.0, 1.0)

    def __init__(self, options: ImagesOptions) -> None:
        self.options = options
        self.skipped = self.animated = 0
        self.skipped_names: list[str] = []
        self.class_names: tuple[str, ...] = ()
        self._null: Callable[[int], Cond] | None = None
        train, test = self._cut(*self._open(File(options.path).expanduser()))
        channels, height, width = train.data.shape[1:]
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

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and labels of both splits."""
        return data_hash(self._train.data, self._train.cond, self._test.data, self._test.cond)

    def summary(self) -> str:
        p = self.options.patch
        channels, height, width = self.shape[0] // p**2, self.shape[1] * p, self.shape[2] * p
        parts = [
            f"{len(self._train) + len(self._test):,} pictures ({len(self._train):,} to learn from, "
            f"{len(self._test):,} to measure against)",
            f"{width}x{height} {'grey' if channels == 1 else 'colour'}",
            f"{self.classes} labels" if self.class_names else "no labels",
            "captions" if self._train.captions is not None else "no captions",
        ]
        if self.animated:
            parts.append(f"{self.animated} animated (first frame)")
        parts.append(f"{self.skipped} skipped ({self._named()})" if self.skipped else "none skipped")
        return f"{self.options.path}: {', '.join(parts)}"

    def use_captions(
        self,
        embed: Callable[[list[str]], dict[str, Tensor]],
        encoder: str,
        cache: File | None = None,
    ) -> None:
        """Take captions, as a text encoder reads them, for the condition; labels are left aside.

        ``embed`` gives a dictionary with one row a caption; ``encoder`` is the hash of what stands behind it, and
        names the shards in ``cache``. Refused where the data has no captions.
        """
        self._train, self._test = (
            captioned(split, embed, encoder, cache, self.options.path) for split in (self._train, self._test)
        )
        nothing = embed([""])
        self._null = lambda count: {k: v[:1].expand(count, *v.shape[1:]) for k, v in nothing.items()}
        self.classes = None

    def null(self, cond: Cond) -> Cond:
        """ "No condition": the label one past the last, or the empty caption."""
        if isinstance(cond, dict) and self._null is not None:
            first = next(iter(cond.values()))
            return {k: v.to(first.device) for k, v in self._null(len(first)).items()}  # type: ignore[union-attr]
        return super().null(cond)

    def augment(self, data: Tensor, rng: Rng) -> Tensor:
        if not self.options.flip:
            return data
        half = rng.integers(2, len(data)).to(data.device).bool()
        return torch.where(half[:, None, None, None], self._mirrored(data), data)

    def views(self, data: Tensor) -> tuple[Tensor, ...]:
        return (data, self._mirrored(data)) if self.options.flip else (data,)

    def _mirrored(self, data: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.pixel_shuffle(data, self.options.patch).flip(3), self.options.patch)

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
        data = Unpacked(torch.from_numpy(np.ascontiguousarray(part.data)), self.options.patch)
        label = None if part.labels is None else torch.from_numpy(part.labels)
        return Split(data, label, None if part.captions is None else tuple(part.captions.tolist()))

    def _fits(self, count: int, height: int, width: int, channels: int) -> None:
        size = count * height * width * channels
        if size > MAX_BYTES:
            memory = f"{size / 2**30:.0f} GiB of memory"
            raise Refused(f"{count} pictures of {height}x{width} need {memory}: pass a smaller size, or fewer pictures")

    # -- sources ------------------------------------------------------------------------------

    def _open(self, source: File) -> tuple[Pixels, Pixels | None]:
        """Whatever the path is, as pixels: both splits, or all in one."""
        where = self.options.path
        try:
            there = "\0" not in where and source.exists()
        except OSError:  # a name that no file can have
            there = False
        if not there:
            raise Refused(f"no such folder or file: {where!r:.200}")
        if source.is_file() and source.suffix == ".npz":
            return self._from_npz(source)
        need("PIL", "evaluate")
        if source.is_dir():
            found = _in_folder(source)
        elif source.is_file() and source.suffix in READERS:
            found = READERS[source.suffix](source)
            if not found[0].count and found[0].count is not None:
                raise Refused(f"no pictures in {source}: it needs files such as .png, .jpg or .webp, or rows")
        else:
            raise Refused(f"{where} is none of these: {FORMATS}")
        return self._read(found, source)

    def _read(self, found: tuple[Portion, Portion | None], root: File) -> tuple[Pixels, Pixels | None]:
        parts = [part for part in found if part is not None]
        with warnings.catch_warnings():  # of Pillow, about odd files; they are counted
            warnings.simplefilter("ignore")
            blocks = [self._decoded(part) for part in parts]
        if self.skipped:
            total = sum(len(held) for held, _ in blocks) + self.skipped
            line = f"skipped {self.skipped} of {total} files in {root}: not a readable picture ({self._named()})"
            warnings.warn(line, stacklevel=5)
        labels = [row.label for _, rows in blocks for row in rows]
        names, number = _numbered(labels, parts[0].names, root)
        self.class_names = names
        grey = all(picture.shape[2] == 1 for pictures, _ in blocks for picture in pictures)
        channels = self.options.channels or (1 if grey else 3)
        captions = any(row.caption is not None for _, rows in blocks for row in rows)
        split = []
        for pictures, rows in blocks:
            data = _stacked(pictures, channels, root, self._named())
            split.append(
                Pixels(
                    data,
                    np.array([number(row.label) for row in rows], dtype=np.int64) if names else None,
                    np.array([row.caption or "" for row in rows], dtype=object) if captions else None,
                )
            )
        return split[0], split[1] if len(split) == 2 else None

    def _decoded(self, part: Portion) -> tuple[list[np.ndarray], list[Found]]:
        """All pictures that can be read, and what is known about them; memory is checked while it grows."""
        pictures: list[np.ndarray] = []
        kept: list[Found] = []
        seen: list[Found] = []
        size = 0

        def noted() -> Any:
            for row in part.items:
                seen.append(row)
                yield row.name, row.picture

        o = self.options
        for k, read in enumerate(read_pictures(noted(), Shape(o.size, o.channels, o.background))):
            row = seen[k]
            seen[k] = None  # type: ignore[call-overload]
            if read.pixels is None:
                self.skipped += 1
                if len(self.skipped_names) < NAMED:
                    self.skipped_names.append(f"{row.name}: {read.reason}")
                continue
            self.animated += read.animated
            size += read.pixels.size
            if not pictures:
                self._fits(part.count or 1, *read.pixels.shape)
            elif size > MAX_BYTES:
                self._fits(len(pictures) + 1, *read.pixels.shape)
            pictures.append(read.pixels)
            kept.append(Found(row.name, None, row.label, row.caption))
        return pictures, kept

    def _named(self) -> str:
        more = self.skipped - len(self.skipped_names)
        return "; ".join(self.skipped_names) + (f"; and {more} more" if more > 0 else "")

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
        captions = archive[f"{prefix}captions"] if f"{prefix}captions" in archive.files else None
        if captions is not None and (captions.shape != images.shape[:1] or captions.dtype.kind != "U"):
            got = f"{captions.dtype} {list(captions.shape)}"
            raise Refused(f"{prefix}captions in {file} must be {len(images)} texts, got {got}")
        labels = archive[f"{prefix}labels"] if f"{prefix}labels" in archive.files else None
        if labels is not None:
            if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
                got = f"{labels.dtype} {list(labels.shape)}"
                raise Refused(f"{prefix}labels in {file} must be {len(images)} whole numbers from 0, got {got}")
            if labels.max() >= MAX_CLASSES:
                raise Refused(f"{prefix}labels in {file} go up to {labels.max()}: at most {MAX_CLASSES - 1} is read")
            labels = labels.astype(np.int64)
        size, channels = self.options.size, self.options.channels
        if (size and images.shape[1:3] != (size, size)) or (channels and images.shape[3] != channels):
            need("PIL", "evaluate")
            read = read_pictures(((str(file), image) for image in images), Shape(size, channels))
            images = np.stack([one.pixels for one in read if one.pixels is not None])
        self._fits(*images.shape)
        return Pixels(images.transpose(0, 3, 1, 2), labels, captions)


def _in_folder(root: File) -> tuple[Portion, Portion | None]:
    """Pictures in a folder, else tables or archives in it."""
    saved = saved_splits(root)
    if saved is not None:
        return _by_split(saved)
    tree = Folder(root)
    found = portions(tree)
    if all(part is None or part.count for part in found):
        return found
    for suffix in (".parquet", ".arrow", ".tar", ".zip"):
        files = [root / name for name in tree.names if name.endswith(suffix)]
        if files and suffix in (".parquet", ".arrow"):
            return _by_split(_grouped(files))
        if files:
            trees = {name: [READERS[suffix](file)[0] for file in held] for name, held in _grouped(files).items()}
            joined = {name: _joined(held) for name, held in trees.items()}
            return _two(joined)
    raise Refused(f"no pictures in {root}: it needs files such as .png, .jpg or .webp (or .parquet, .tar, .zip)")


def _joined(parts: list[Portion]) -> Portion:
    rows = [row for part in parts for row in part.items]
    return Portion(rows, len(rows))


def _grouped(files: list[File]) -> dict[str, list[File]]:
    """Files by the split that their names or their folders say: train-00000-of-00002.parquet, test/0.tar."""
    groups: dict[str, list[File]] = {}
    for file in files:
        words = [re.split(r"[-_.0-9]", file.name, maxsplit=1)[0], file.parent.name]
        name = next((SPLITS[word] for word in words if word in SPLITS), "all")
        groups.setdefault(name, []).append(file)
    return groups


def _by_split(files: dict[str, list[File]]) -> tuple[Portion, Portion | None]:
    named: dict[str, list[File]] = {}
    for name, held in files.items():
        named.setdefault(SPLITS.get(name, name), []).extend(held)
    return _two({name: table_portion(held) for name, held in named.items()})


def _two(parts: dict[str, Portion]) -> tuple[Portion, Portion | None]:
    """Train and test; without a test split the validation one stands in; without either, all is one."""
    if "train" in parts:
        return parts["train"], parts.get("test", parts.get("validation"))
    if len(parts) > 1:
        raise Refused(f"splits {', '.join(sorted(parts))}, and none is called train: rename one, or give one file")
    return next(iter(parts.values())), None


SPLITS = {"train": "train", "training": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val"), "validation")
READERS: dict[str, Callable[[File], tuple[Portion, Portion | None]]] = {
    ".zip": lambda file: portions(Zip(file)),
    ".tar": lambda file: portions(Tar(file)),
    ".parquet": lambda file: (table_portion([file]), None),
    ".arrow": lambda file: (table_portion([file]), None),
}


def _numbered(
    labels: list[str | int | None], names: tuple[str, ...], root: File
) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """The names of the classes, and the number of a label: numbers are what they are, words stand in their order."""
    known = [label for label in labels if label is not None]
    if not known:
        return (), int
    if len(known) < len(labels):
        raise Refused(f"{root}: {len(labels) - len(known)} of {len(labels)} pictures have no label: give all, or none")
    if all(isinstance(label, int) for label in known):
        low, high = int(min(known)), int(max(known))  # type: ignore[type-var]
        most = len(names) or MAX_CLASSES
        if low < 0 or high >= most:
            raise Refused(f"{root}: labels must be whole numbers from 0 to {most - 1}, got {low if low < 0 else high}")
        return names or tuple(map(str, range(high + 1))), int
    words = tuple(sorted({str(label) for label in known}, key=_natural))
    if len(words) > MAX_CLASSES:
        raise Refused(f"{root}: {len(words)} different labels, at most {MAX_CLASSES} are read")
    table = {word: i for i, word in enumerate(words)}
    return words, lambda label: table[str(label)]


def _stacked(pictures: list[np.ndarray], channels: int, root: File, skipped: str) -> np.ndarray:
    """[count, channels, height, width]; the list is emptied on the way, so that memory holds pixels once."""
    if not pictures:
        raise Refused(f"none of the pictures in {root} could be read" + (f" ({skipped})" if skipped else ""))
    sizes = sorted({p.shape[:2] for p in pictures})
    if len(sizes) > 1:
        (h, w), (i, j) = sizes[0], sizes[-1]
        raise Refused(f"pictures in {root} differ in size, {w}x{h} and {j}x{i}: pass a size")
    data = np.empty((len(pictures), channels, *sizes[0]), dtype=np.uint8)
    for k in range(len(pictures)):
        data[k] = pictures[k].transpose(2, 0, 1)  # grey fills every channel
        pictures[k] = data[k]
    return data


def _std(pixels: np.ndarray) -> float:
    """The spread of uint8 values, from their histogram: exact, and small in memory."""
    count = sum(np.bincount(block.ravel(), minlength=256) for block in np.array_split(pixels, 64))
    share, level = count / pixels.size, np.arange(256)
    return float(np.sqrt(share @ (level - share @ level) ** 2))


def _natural(name: str) -> tuple[int, int, str]:
    """Whole numbers in their order, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
