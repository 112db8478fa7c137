"""Files that are whole or not there: folders written aside and renamed, tensors with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import Failed


@contextmanager
def whole_folder(target: File) -> Iterator[File]:
    """A folder to fill; it appears at ``target``, synced, only if nothing failed.

    An older folder there is replaced at the last moment.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{os.getpid()}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
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
    except OSError as error:
        raise Failed(f"could not write {target}: {error.strerror or error}; what was there is as it was") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(file: File, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    os.replace(aside, file)


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


def save_state(target: File, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """A folder with ``state.safetensors`` and ``state.json``, the latter with the former's checksum."""
    with whole_folder(target) as folder:
        weights = folder / "state.safetensors"
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, weights)
        write_text(folder / "state.json", json.dumps({**facts, "sha256": file_hash(weights)}))


def load_state(source: File) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What ``save_state`` wrote, or None where it is not whole."""
    try:
        facts = json.loads((source / "state.json").read_text(encoding="utf-8"))
        weights = source / "state.safetensors"
        if file_hash(weights) != facts["sha256"]:
            return None
        return load_file(weights), facts
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
