"""Files that are whole or not there: folders written aside and renamed, tensors with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import Failed
from .processes import alone, gather, world

# .NAME.PID.part and .NAME.PID.old are ours, .NAME.partial-X and .NAME.old-X/model those of model folders
ASIDE = re.compile(r"\.(?P<name>.+?)\.(\d+\.)?(?P<kind>part|old|partial-\w+|old-\w+)\Z|.+\.part\Z")


@contextmanager
def whole_folder(target: File) -> Iterator[File]:
    """A folder to fill; it appears at ``target``, synced, only if nothing failed.

    An older folder there is replaced at the last moment.
    """
    aside = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(aside)
        old = target.parent / f".{target.name}.{os.getpid()}.old"
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Failed(f"could not write {target}: {_why(error)}; what was there is as it was") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(file: File, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Plain data as JSON can say it: None for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sweep(folder: File) -> None:
    """Clear away what a killed process left: half-written files, and folders that were about to be replaced.

    A folder that was moved aside and has no successor yet comes back.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        found = ASIDE.match(path.name)
        if found is None or not path.exists():
            continue
        former = path / "model" if "old-" in (found["kind"] or "") else path
        if (found["kind"] or "").startswith("old") and former.exists() and not path.with_name(found["name"]).exists():
            os.replace(former, path.with_name(found["name"]))
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())


def _sync(path: File) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(file: File) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# Tensors


def save_state(
    target: File,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    rows: Mapping[str, int] | None = None,
) -> None:
    """A folder with tensors in safetensors and ``state.json``, the latter with the checksums of the former.

    ``rows`` gives the tensors that are parts of larger ones their first row. With it every process
    calls, and writes its parts into a file of its own; the first one writes what is whole.
    """
    if rows is None:
        with whole_folder(target) as folder:
            weights = folder / "state.safetensors"
            _write(weights, tensors)
            write_text(folder / "state.json", json.dumps({**facts, "files": {weights.name: file_hash(weights)}}))
        return
    here = world()
    with whole_folder(target) if here.first else contextlib.nullcontext() as place:
        folder = File(alone(lambda: str(place)))
        mine = folder / f"state-{here.rank:05d}-of-{here.size:05d}.safetensors"
        parts = {k: v for k, v in tensors.items() if (v.numel() if k in rows else here.first)}
        error, digest = "", ""
        try:
            _write(mine, parts)
            _sync(mine)
            digest = file_hash(mine)
        except (OSError, SafetensorError) as problem:
            error = _why(problem)
        spans = {k: (rows[k], rows[k] + len(v)) for k, v in parts.items() if k in rows}
        told = gather((mine.name, digest, spans, error))
        wrong = next((text for *_, text in told if text), None)
        if wrong is not None:
            raise Failed(f"could not write {target}: {wrong}; what was there is as it was")
        if here.first:
            pieces: dict[str, list[Any]] = {}
            for name, _, found, _ in told:
                for key, (start, stop) in found.items():
                    pieces.setdefault(key, []).append([name, start, stop])
            files = {name: digest for name, digest, *_ in told}
            write_text(folder / "state.json", json.dumps({**facts, "files": files, "pieces": pieces}))
    alone(lambda: None)  # nobody goes on before it is there


def _write(file: File, tensors: Mapping[str, Tensor]) -> None:
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, file)


class State:
    """What ``save_state`` wrote: ``facts``, and tensors by name, whole or some of their rows."""

    def __init__(self, folder: File, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self._files = {name: safe_open(folder / name, "pt") for name in facts["files"]}
        self._pieces: dict[str, list[tuple[str, int, int]]] = facts.get("pieces", {})
        self._home = {key: name for name, file in self._files.items() for key in file.keys() if key not in self._pieces}

    def names(self) -> list[str]:
        return [*self._home, *self._pieces]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, from whichever files hold them; KeyError for a name that is not there."""
        if name in self._home:
            whole: Tensor = self._files[self._home[name]].get_tensor(name)
            return whole if start == 0 and stop is None else whole[start:stop]
        found = []
        for file, first, last in sorted(self._pieces[name], key=lambda piece: piece[1]):
            low, high = max(first, start), last if stop is None else min(last, stop)
            if low < high:
                found.append(self._files[file].get_slice(name)[low - first : high - first])
        if not found:  # no row is asked for
            file, *_ = self._pieces[name][0]
            found.append(self._files[file].get_slice(name)[:0])
        return found[0] if len(found) == 1 else torch.cat(found)


def open_state(source: File) -> State | None:
    """What ``save_state`` wrote, to be read in parts; None where it is not whole."""
    try:
        facts = json.loads((source / "state.json").read_text(encoding="utf-8"))
        for name, digest in facts["files"].items():
            if File(name).name != name or file_hash(source / name) != digest:
                return None
        return State(source, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def load_state(source: File) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """All that ``save_state`` wrote, or None where it is not whole."""
    state = open_state(source)
    if state is None:
        return None
    return {name: state.read(name) for name in state.names()}, state.facts
