"""Pictures in parquet and arrow files, as Hugging Face datasets keep them: read row by row, by pyarrow alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import numpy as np

from ..errors import Refused, need
from .trees import CAPTIONS, MAX_MEMBER, MAX_TEXT, Found, Portion, _first

IMAGES = ("image", "img", "picture", "images", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "cls", "class", "fine_label")
ROWS = 64
"""Rows that are unpacked at a time."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and the names of the labels."""

    image: str
    label: str | None
    caption: str | None
    names: tuple[str, ...]

    @property
    def wanted(self) -> list[str]:
        return [name for name in (self.image, self.label, self.caption) if name is not None]


def saved_splits(root: File) -> dict[str, list[File]] | None:
    """The arrow files of a folder that ``save_to_disk`` of Hugging Face datasets wrote, by split; None for another."""
    if (root / "dataset_dict.json").is_file():
        splits = _small_json(root / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(_plain(name) for name in splits):
            raise Refused(f"{root / 'dataset_dict.json'} lists no splits by plain names")
        return {name: _saved_files(root / name) for name in splits}
    return {"all": _saved_files(root)} if (root / "state.json").is_file() else None


def _saved_files(root: File) -> list[File]:
    state = _small_json(root / "state.json")
    listed = state.get("_data_files")
    names = [one.get("filename") if isinstance(one, dict) else None for one in listed or () if listed]
    if not names or not all(_plain(name) for name in names):
        raise Refused(f"{root / 'state.json'} lists no data files by plain names")
    if state.get("_indices_data_files"):
        raise Refused(f"{root} is a selection of rows: save it again after flatten_indices()")
    files = [root / str(name) for name in names]
    for file in files:
        if not file.is_file():
            raise Refused(f"{file} is missing, though state.json lists it")
    return files


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def _small_json(file: File) -> dict[str, Any]:
    try:
        if file.stat().st_size > 2**22:
            raise Refused(f"{file} is larger than {2**22} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
    except Refused:
        raise
    except FileNotFoundError:
        raise Refused(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{file} is no JSON ({_first(error)})") from None
    if not isinstance(found, dict):
        raise Refused(f"{file} is no JSON object")
    return found


def table_portion(files: list[File]) -> Portion:
    """The rows of parquet or arrow files, one after the other."""
    need("pyarrow", "data")
    columns = {file: _columns(file) for file in files}
    first = columns[files[0]]
    for file, found in columns.items():
        if found != first:
            raise Refused(f"{file} has other columns or label names than {files[0]}: read them apart")
    counts = [_count(file) for file in files]
    total = None if None in counts else sum(count for count in counts if count is not None)
    return Portion(_Rows(files, first), total, first.names)


@dataclass(frozen=True)
class _Rows:
    files: list[File]
    columns: Columns

    def __iter__(self) -> Iterator[Found]:
        for file in self.files:
            yield from _items(file, self.columns)


def _damage(file: File, error: BaseException) -> Refused:
    return Refused(f"{file} is damaged or no {file.suffix[1:]} file ({_first(error)})")


def _count(file: File) -> int | None:
    if file.suffix != ".parquet":
        return None
    parquet: Any = need("pyarrow.parquet", "data")
    return int(parquet.read_metadata(file).num_rows)


def _open_arrow(file: File) -> Any:
    """A reader of record batches, of either arrow format, on the mapped file."""
    pa: Any = need("pyarrow", "data")
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file)))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        return pa.RecordBatchReader.from_batches(
            reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        )


def _columns(file: File) -> Columns:
    pa: Any = need("pyarrow", "data")
    parquet: Any = need("pyarrow.parquet", "data")
    try:
        schema = parquet.read_schema(file) if file.suffix == ".parquet" else _open_arrow(file).schema
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damage(file, error) from None
    names = list(schema.names)

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    image = next((name for name in IMAGES if name in names), None)
    image = image or next((name for name in names if holds_bytes(schema.field(name).type)), None)
    if image is None:
        raise Refused(f"{file} has columns {', '.join(names) or 'none'}: name the one with pictures 'image'")
    label = next((name for name in LABELS if name in names), None)
    caption = next((name for name in CAPTIONS if name in names), None)
    return Columns(image, label, caption, _label_names(schema, label))


def _label_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The names of a ClassLabel column, from the description that datasets leaves in a schema."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        names = about["names"] if about.get("_type") == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _items(file: File, columns: Columns) -> Iterator[Found]:
    pa: Any = need("pyarrow", "data")
    parquet: Any = need("pyarrow.parquet", "data")
    row = 0
    try:
        if file.suffix == ".parquet":
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(ROWS, columns=columns.wanted, use_threads=False):
                    yield from _rows(file, batch, columns, row)
                    row += batch.num_rows
        else:
            for batch in _open_arrow(file):
                batch.validate(full=True)  # offsets are the file's own, and are followed
                yield from _rows(file, batch, columns, row)
                row += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise _damage(file, error) from None


def _rows(file: File, batch: Any, columns: Columns, before: int) -> Iterator[Found]:
    for i in range(batch.num_rows):
        where = f"{file}, row {before + i}"
        label = caption = None
        if columns.label is not None:
            label = batch.column(columns.label)[i].as_py()
            if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
                raise Refused(f"{where}: a label is a whole number or a word, got {label!r:.60}")
        if columns.caption is not None:
            caption = batch.column(columns.caption)[i].as_py()
            caption = caption[0] if isinstance(caption, list) and caption else caption
            caption = "" if caption is None else str(caption)[:MAX_TEXT]
        yield Found(where, _picture(batch.column(columns.image)[i].as_py(), file), label, caption)


def _picture(value: Any, file: File) -> Any:
    """Bytes, a file beside the table, or raw pixels; what is neither is an empty picture, and is skipped."""
    if isinstance(value, dict):
        name = value.get("path")
        if value.get("bytes") is None and isinstance(name, str):
            beside = file.parent / name
            if not beside.resolve().is_relative_to(file.parent.resolve()):
                raise Refused(f"{file} names {name!r:.120}, which lies outside its folder")
            return beside
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value if len(value) <= MAX_MEMBER else b""
    if isinstance(value, list | np.ndarray):
        return lambda: _pixels(value)
    return b""


def _pixels(value: Any) -> np.ndarray:
    """Raw pixels as uint8 [height, width] or [height, width, channels]; channels may stand first."""
    found = np.asarray(value)
    if found.dtype.kind not in "iu" or found.size == 0 or found.min() < 0 or found.max() > 255:
        raise ValueError("raw pixels are whole numbers from 0 to 255")
    if found.ndim == 3 and found.shape[0] in (1, 3) and found.shape[2] not in (1, 3, 4):
        found = found.transpose(1, 2, 0)
    return found.astype(np.uint8)
