"""Rows of tensors that are made once and kept: safetensors shards named by the hash of all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Failed

VARIABLE = "FEWSTEP_CACHE"
FORMAT = 1
ABANDONED = 3600.0
"""Seconds after which a half-written shard is one that a kill left."""


def cache_folder() -> File:
    """Where shards are kept: ``FEWSTEP_CACHE``, else ``fewstep`` in the user's cache."""
    if os.environ.get(VARIABLE):
        return File(os.environ[VARIABLE]).expanduser()
    return File(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fewstep"


class Shards:
    """``count`` rows of a tensor, or of a dictionary of tensors, from ``make(rows)``; a ``Lazy``.

    ``facts`` name all that the rows depend on: their hash is the folder's name, so that a changed encoder or changed
    data never meets old rows. A shard is written aside and renamed, and carries the hash of its bytes: one that is
    whole is not made again, one that is damaged is. Shards are mapped, not read: only the rows that are asked for are
    in memory. Without a folder they are kept in memory. ``seconds`` is what making the rows took that were looked at,
    whoever made them.
    """

    def __init__(
        self,
        what: str,
        facts: Mapping[str, Any],
        count: int,
        make: Callable[[range], Tensor | dict[str, Tensor]],
        *,
        folder: File | None = None,
        size: int = 256,
        batch: int = 32,
    ) -> None:
        self.count, self.make, self.size, self.batch = count, make, size, batch
        self.key = hashlib.sha256(json.dumps({"format": FORMAT, **facts}, sort_keys=True).encode()).hexdigest()
        self.folder = None if folder is None else folder / f"{what}-{self.key[:32]}"
        self.made = 0
        self._open: dict[int, dict[str, Tensor]] = {}
        self._seconds: dict[int, float] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def number(self) -> int:
        """How many shards there are."""
        return -(-self.count // self.size)

    @property
    def seconds(self) -> float:
        return sum(self._seconds.values())

    def __getitem__(self, index: Tensor | slice) -> Any:
        if isinstance(index, slice):
            index = torch.arange(self.count)[index]
        home = index.div(self.size, rounding_mode="floor")
        out: dict[str, Tensor] = {}
        for number in home.unique().tolist() or [0]:
            here = (home == number).nonzero().flatten()
            rows = index[here] - number * self.size
            for name, value in self.shard(number).items():
                if name not in out:
                    out[name] = value.new_empty((len(index), *value.shape[1:]))
                out[name][here] = value[rows]
        return out["rows"] if out.keys() == {"rows"} else out

    def fill(self, watch: Callable[[int], None] | None = None) -> None:
        """Make every shard that is missing or damaged; ``watch`` is told how many rows are there."""
        for number in range(self.number):
            self.shard(number)
            if watch is not None:
                watch(min((number + 1) * self.size, self.count))

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """All shards, in their order."""
        for number in range(self.number):
            yield self.shard(number)

    def shard(self, number: int) -> dict[str, Tensor]:
        """The rows of a shard, made where it is missing or damaged."""
        found = self.found(number)
        if found is None:
            begin, end, file = self._place(number)
            began = time.perf_counter()
            found = self._made(begin, end)
            self._seconds[number] = time.perf_counter() - began
            if file is not None:
                self._write(file, found, self._seconds[number])
                found = self._read(number) or found
            self._open[number] = found
        return found

    def found(self, number: int) -> dict[str, Tensor] | None:
        """The rows of a shard that is there and whole; None for another."""
        if number not in self._open:
            rows = self._read(number)
            if rows is None:
                return None
            self._open[number] = rows
        return self._open[number]

    def _place(self, number: int) -> tuple[int, int, File | None]:
        begin, end = number * self.size, min((number + 1) * self.size, self.count)
        return begin, end, None if self.folder is None else self.folder / f"{begin:08d}-{end:08d}.safetensors"

    @torch.no_grad()
    def _made(self, begin: int, end: int) -> dict[str, Tensor]:
        self.made += 1
        parts = []
        for start in range(begin, end, self.batch):
            rows = self.make(range(start, min(start + self.batch, end)))
            parts.append(rows if isinstance(rows, dict) else {"rows": rows})
        shapes = {name: {tuple(part[name].shape[1:]) for part in parts} for name in parts[0]}
        for name, found in shapes.items():
            if len(found) > 1:
                raise ValueError(f"rows of {name!r} differ in shape, {sorted(found)}: pad them to one length")
        return {name: torch.cat([part[name].detach().cpu() for part in parts]).contiguous() for name in parts[0]}

    def _write(self, file: File, rows: dict[str, Tensor], seconds: float) -> None:
        from safetensors.torch import save_file

        aside = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for left in file.parent.glob(".*.part"):
                with contextlib.suppress(OSError):
                    if time.time() - left.stat().st_mtime > ABANDONED:
                        left.unlink()
            about = {"key": self.key, "sha256": tensors_hash(rows), "seconds": f"{seconds:.3f}"}
            save_file(rows, aside, metadata=about)
            with aside.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(aside, file)
        except Exception as error:  # safetensors has its own error for a full disk
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise Failed(f"could not keep {file}: {reason}; set {VARIABLE} to a folder with room") from None

    def _read(self, number: int) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        begin, end, file = self._place(number)
        if file is None:
            return None
        try:
            with safe_open(str(file), framework="pt") as tensors:
                about = tensors.metadata() or {}
                rows = {name: tensors.get_tensor(name) for name in tensors.keys()}
            seconds = float(about.get("seconds", 0.0))
        except (SafetensorError, OSError, ValueError):
            return None
        whole = about.get("key") == self.key and rows and all(len(value) == end - begin for value in rows.values())
        if not whole or about.get("sha256") != tensors_hash(rows):
            return None
        self._seconds[number] = seconds
        return rows


def tensors_hash(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """SHA-256 of named tensors, of any type, and of a description."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def encoder_hash(*parts: Any) -> str:
    """SHA-256 of an encoder: of networks weights and configuration, of tokenizers all that they say, and words."""
    digests = []
    for part in parts:
        if isinstance(part, nn.Module):
            config: Any = getattr(part, "config", None) or {}
            plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            about = {k: v for k, v in plain.items() if k[:1] != "_"}  # where it was loaded from, and by what
            text = json.dumps(about, sort_keys=True, default=str)
            digests.append(tensors_hash(part.state_dict(), f"{type(part).__name__} {text}"))
            continue
        if isinstance(part, str):
            digests.append(part)
            continue
        backend = getattr(part, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else getattr(part, "get_vocab", dict)()
        limit = getattr(part, "model_max_length", None)
        text = json.dumps([type(part).__name__, words, limit], sort_keys=True, default=str)
        digests.append(hashlib.sha256(text.encode()).hexdigest())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
