"""Pictures in a folder, a zip or a tar: named files, with labels and captions beside them. Nothing is unpacked."""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as File
from pathlib import PurePosixPath
from typing import Any

from ..errors import Refused

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])
CAPTIONS = ("text", "caption", "prompt")
"""What a caption may be called in ``metadata.jsonl``, in a .json beside a picture, and as a column."""
TABLE = "metadata.jsonl"
MAX_MEMBER = 2**28
"""Bytes of one file of an archive, unpacked."""
MAX_TEXT = 2**16
"""Bytes of one caption, label or .json beside a picture."""


@dataclass(frozen=True)
class Found:
    """A picture that was found: where it is, or how to fetch it, and what is known about it."""

    name: str
    picture: Any
    label: str | int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Portion:
    """The pictures of one split, in a fixed order; ``names`` are those of labels that are numbers."""

    items: Iterable[Found]
    count: int | None = None
    names: tuple[str, ...] = ()


class Tree(ABC):
    """Files by name, in order of their names."""

    title: str
    names: list[str]

    @abstractmethod
    def fetch(self, name: str) -> File | Callable[[], bytes]:
        """Where a file is, or a function that reads it; safe to call in threads."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""

    def text(self, name: str, limit: int) -> str:
        if self.size(name) > limit:
            raise Refused(f"{self.title}: {name} is longer than {limit} bytes: shorten it, or remove it")
        found = self.fetch(name)
        try:
            content = found.read_bytes() if isinstance(found, File) else found()
        except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
            raise Refused(f"{self.title}: {name} cannot be read") from None
        return content.decode("utf-8", errors="replace")


class Folder(Tree):
    """A folder; folders that are links are followed, each once."""

    def __init__(self, root: File) -> None:
        self.root, self.title = root, str(root)
        self.names = sorted(self._walk())

    def _walk(self) -> Iterator[str]:
        seen: set[tuple[int, int]] = set()

        def fail(error: OSError) -> None:
            raise Refused(f"{error.filename} cannot be read: {(error.strerror or str(error)).lower()}")

        for place, folders, files in os.walk(self.root, onerror=fail, followlinks=True):
            entry = os.stat(place)
            if (entry.st_dev, entry.st_ino) in seen:  # a link that leads back
                folders.clear()
                continue
            seen.add((entry.st_dev, entry.st_ino))
            here = os.path.relpath(place, self.root).replace(os.sep, "/")
            for name in files:
                if stat.S_ISREG(_mode(os.path.join(place, name))):
                    yield name if here == "." else f"{here}/{name}"

    def fetch(self, name: str) -> File:
        return self.root / name

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:  # a link to nowhere, or to itself
        return 0


class Zip(Tree):
    """A zip; refused where a name leaves it, or a member is a link, encrypted or huge."""

    def __init__(self, file: File) -> None:
        self.title = str(file)
        try:
            self.archive = zipfile.ZipFile(file)
        except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise Refused(f"{file} is not a readable .zip ({_first(error)})") from None
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self.archive.infolist():
            _check(self.title, member.filename, member.file_size)
            mode = member.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise Refused(f"{file} holds {member.filename!r}, which is a link or a device: pack plain files")
            if member.flag_bits & 1:
                raise Refused(f"{file} is encrypted: pack it without a password")
            if not member.is_dir():
                self.members[member.filename] = member
        self.names = sorted(self.members)

    def fetch(self, name: str) -> Callable[[], bytes]:
        return lambda: self.archive.read(self.members[name])

    def size(self, name: str) -> int:
        return self.members[name].file_size


class Tar(Tree):
    """An uncompressed tar; refused where a name leaves it, or a member is a link, a device, sparse or huge."""

    def __init__(self, file: File) -> None:
        self.title = str(file)
        self.places: dict[str, tuple[int, int]] = {}
        try:
            self.handle = file.open("rb")
            with tarfile.open(fileobj=self.handle, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                    self._add(member)
                end = archive.offset
            total = self.handle.seek(0, os.SEEK_END)
            if end > total or os.pread(self.handle.fileno(), 512, end).strip(b"\0"):
                raise tarfile.ReadError("it ends in the middle")
        except (OSError, ValueError, EOFError, tarfile.TarError) as error:
            if isinstance(error, Refused):
                raise
            line = f"{file} is not a readable .tar ({_first(error)}); a compressed one must be unpacked"
            raise Refused(line) from None
        self.names = sorted(self.places)

    def _add(self, member: tarfile.TarInfo) -> None:
        _check(self.title, member.name, member.size)
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            raise Refused(f"{self.title} holds {member.name!r}, which is a link, a device or sparse: pack plain files")
        self.places[member.name.removeprefix("./")] = (member.offset_data, member.size)

    def fetch(self, name: str) -> Callable[[], bytes]:
        start, size = self.places[name]
        return lambda: os.pread(self.handle.fileno(), size, start)

    def size(self, name: str) -> int:
        return self.places[name][1]


def _check(title: str, name: str, size: int) -> None:
    plain = name.replace("\\", "/")
    if plain.startswith("/") or ".." in plain.split("/") or re.match(r"[A-Za-z]:", plain) or "\0" in plain:
        raise Refused(f"{title} holds {name!r:.120}, a name that leaves the archive: pack it again")
    if size > MAX_MEMBER:
        raise Refused(f"{title} holds {name!r:.120} of {size} bytes: at most {MAX_MEMBER} are read")


def _first(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


# -- what the files say ---------------------------------------------------------------------------


def portions(tree: Tree) -> tuple[Portion, Portion | None]:
    """The pictures of a tree; its top folders ``train`` and ``test`` are the splits. Empty without pictures."""
    shown = [name for name in tree.names if not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))]
    top = "" if isinstance(tree, Folder) else _common(shown)
    if all(any(name.startswith(f"{top}{part}/") for name in shown) for part in ("train", "test")):
        return portion(tree, shown, f"{top}train/"), portion(tree, shown, f"{top}test/")
    return portion(tree, shown, top), None


def _common(names: list[str]) -> str:
    """The folder that holds everything in an archive, as packers make it."""
    heads = {name.split("/", 1)[0] for name in names}
    if len(heads) == 1 and all("/" in name for name in names) and not heads & {"train", "test"}:
        return f"{heads.pop()}/"
    return ""


def portion(tree: Tree, names: list[str], top: str) -> Portion:
    """The pictures below a folder of a tree, with their labels and captions."""
    inside = [name.removeprefix(top) for name in names if name.startswith(top)]
    if TABLE in inside:
        rows = _from_table(tree, set(inside), top)
    else:
        rows = _from_names(tree, inside, top)
    return Portion(rows, len(rows))


def _from_names(tree: Tree, inside: list[str], top: str) -> list[Found]:
    """Labels are the sub-folders or stand in a .cls or .json beside; captions in a .txt, .caption or .json."""
    there = set(inside)
    pictures = [name for name in inside if PurePosixPath(name).suffix.lower() in SUFFIXES]
    heads = {name.split("/", 1)[0] for name in pictures}
    sorted_out = len(heads) > 1 and all("/" in name for name in pictures)
    rows: list[Found] = []
    for name in pictures:
        stem = name[: -len(PurePosixPath(name).suffix)]
        label: str | int | None = None
        caption = None
        if f"{stem}.json" in there:
            label, caption = _beside(tree, f"{top}{stem}.json")
        for suffix in (".txt", ".caption"):
            if stem + suffix in there:
                caption = tree.text(top + stem + suffix, MAX_TEXT).strip()
        if f"{stem}.cls" in there:
            label = tree.text(f"{top}{stem}.cls", MAX_TEXT).strip()
        rows.append(Found(f"{tree.title}/{top}{name}", tree.fetch(top + name), label, caption))
    if all(row.label is None for row in rows) and sorted_out:
        return [
            Found(row.name, row.picture, name.split("/", 1)[0], row.caption)
            for row, name in zip(rows, pictures, strict=True)
        ]
    words = [row.label for row in rows if row.label is not None]
    if words and all(str(word).isdecimal() for word in words):  # numbers beside pictures are the labels themselves
        rows = [
            Found(row.name, row.picture, None if row.label is None else _number(row.label), row.caption) for row in rows
        ]
    return _agreed(rows, tree.title)


def _number(label: str | int) -> int:
    return int(str(label)[:19])


def _beside(tree: Tree, name: str) -> tuple[str | int | None, str | None]:
    try:
        entry = json.loads(tree.text(name, MAX_TEXT))
    except (ValueError, RecursionError):
        raise Refused(f"{tree.title}: {name} is no JSON") from None
    if not isinstance(entry, dict):
        raise Refused(f"{tree.title}: {name} is no JSON object")
    label = entry.get("label", entry.get("cls"))
    return _label(label, f"{tree.title}: {name}"), _caption(entry)


def _from_table(tree: Tree, inside: set[str], top: str) -> list[Found]:
    rows: list[Found] = []
    table = f"{tree.title}/{top}{TABLE}"
    for number, line in enumerate(tree.text(top + TABLE, MAX_MEMBER).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, label = entry["file_name"], entry.get("label")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refused(f"{table}, line {number}: not an object with a file_name") from None
        plain = os.path.normpath(str(name)).replace(os.sep, "/")
        if plain.startswith(("/", "../")) or plain == ".." or "\0" in plain:
            raise Refused(f"{table}, line {number}: {name!r} lies outside the folder")
        if isinstance(tree, Folder) and not _lies_in(tree.root, top + plain):
            raise Refused(f"{table}, line {number}: {name!r} lies outside the folder")
        picture = tree.fetch(top + plain) if plain in inside else _missing
        label = _label(label, f"{table}, line {number}")
        word = None if label is None else str(label)
        rows.append(Found(f"{tree.title}/{top}{plain}", picture, word, _caption(entry)))
    if not rows:
        raise Refused(f"{table} lists no pictures")
    return _agreed(rows, table, "lines")


def _missing() -> bytes:
    raise FileNotFoundError


def _lies_in(root: File, name: str) -> bool:
    try:
        return (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        return False


def _label(label: Any, where: str) -> str | int | None:
    if isinstance(label, float | bool | list | dict):
        raise Refused(f"{where}: a label is a whole number or a word, got {label!r:.60}")
    found: str | int | None = label
    return found


def _caption(entry: dict[str, Any]) -> str | None:
    found = next((entry[key] for key in CAPTIONS if entry.get(key) is not None), None)
    return None if found is None else str(found)[:MAX_TEXT]


def _agreed(rows: list[Found], where: str, what: str = "pictures") -> list[Found]:
    without = sum(row.label is None for row in rows)
    if 0 < without < len(rows):
        raise Refused(f"{where}: {without} of {len(rows)} {what} have no label: give all of them one, or none")
    return rows
