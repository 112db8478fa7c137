"""Folders as hostile input, and folders written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File

import torch
from torch import Tensor, nn

from ..errors import Refused
from .contract import CONTRACT, read_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib")
LIBRARIES = ("diffusers", "transformers", None)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def components(folder: File) -> tuple[str, dict[str, tuple[str | None, str | None]]]:
    """The pipeline class and its parts as ``model_index.json`` names them, after every check.

    Refused: a missing or malformed index, a class name that is no name, a part whose name leaves the folder
    or whose library is not diffusers or transformers, custom code, pickled weights without safetensors.
    """
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise Refused(f"{folder / 'model_index.json'} must hold a JSON object, got {type(index).__name__}")
    kind = index.get("_class_name")
    if isinstance(kind, list):
        raise Refused(f"{folder} asks for custom code ({kind!r}), which is never run: use a stock pipeline class")
    if not isinstance(kind, str) or not NAME.match(kind):
        raise Refused(f"{folder / 'model_index.json'} names no pipeline class: _class_name is {kind!r:.80}")
    parts: dict[str, tuple[str | None, str | None]] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if not NAME.match(name):
            raise Refused(f"{folder / 'model_index.json'} names a part {name!r:.80}, which is no plain name")
        if len(value) != 2 or not all(v is None or isinstance(v, str) for v in value):
            raise Refused(f"{folder / 'model_index.json'}: {name} must be [library, class], got {value!r:.80}")
        library, one = value
        if library is None or one is None:
            parts[name] = (None, None)
            continue
        if not (library in LIBRARIES or _of_diffusers(library)) or not NAME.match(one):
            raise Refused(
                f"{folder} asks for custom code: part {name!r} is {library!r:.60}.{one!r:.60}; "
                "only classes of diffusers and transformers are loaded"
            )
        if not (folder / name).is_dir():
            raise Refused(f"{folder / name} is missing, though model_index.json lists it")
        parts[name] = (library, one)
    scan(folder)
    return kind, parts


def _of_diffusers(library: str) -> bool:
    """Whether a part's library is a pipeline package of diffusers itself: a safety checker's, say."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None or not NAME.match(library):
        return False
    return (File(spec.origin).parent / "pipelines" / library / "__init__.py").is_file()


def scan(folder: File) -> None:
    """Refuse custom code, pickled weights without safetensors, and shard lists that leave their folder."""
    if not folder.is_dir():
        raise Refused(f"no such folder: {folder}")
    for place, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        here = File(place)
        for name in names:
            if name.endswith(".py"):
                raise Refused(f"{here / name} is custom code, which is never run: remove it, or use a stock pipeline")
        safe = [n for n in names if n.endswith(".safetensors")]
        pickled = [n for n in names if n.endswith(PICKLES) and not n.startswith(("training_args", "optimizer"))]
        if pickled and not safe:
            raise Refused(f"{here / pickled[0]} is a pickle, which can run code: convert it to safetensors")
        for name in safe:
            check_safetensors(here / name)
        for name in names:
            if name.endswith(".index.json"):
                shards = read_json(here / name, limit=64 * 2**20)
                listed = shards.get("weight_map") if isinstance(shards, dict) else None
                if not isinstance(listed, dict):
                    raise Refused(f"{here / name} lists no weight_map")
                for shard in listed.values():
                    if not isinstance(shard, str) or File(shard).name != shard or shard not in names:
                        raise Refused(f"{here / name} lists {shard!r:.80}, which is no file beside it")
            if name == "config.json":
                config = read_json(here / name)
                if isinstance(config, dict) and "auto_map" in config:
                    raise Refused(f"{here / name} asks for custom code (auto_map), which is never run")


def check_safetensors(file: File) -> None:
    """Refuse a truncated or malformed safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{file} is truncated or no safetensors file: {str(error).splitlines()[0][:120]}") from None


def read_tensors(file: File) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise Refused(f"{file} is missing")
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return {k: tensors.get_tensor(k) for k in tensors.keys()}, dict(tensors.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{file} is truncated or no safetensors file: {str(error).splitlines()[0][:120]}") from None


def load_weights(net: nn.Module, file: File) -> None:
    """Strictly load a safetensors file into a network; names, shapes and finiteness are checked."""
    tensors, _ = read_tensors(file)
    wanted = net.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise Refused(f"{file} lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if extra:
        raise Refused(f"{file} has {extra[0]!r:.100}, which the network does not")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise Refused(f"{file}: {name} has shape {list(value.shape)}, the config needs {list(wanted[name].shape)}")
    net.load_state_dict(tensors)
    check_finite(net, str(file))


def check_finite(net: nn.Module, where: str) -> None:
    """Refuse weights that hold a NaN or an infinity."""
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise Refused(f"{where}: the weights hold a NaN or an infinity in {name!r}")


def weight_files(folder: File) -> list[File]:
    """The safetensors files of one part, in the order of their names."""
    return sorted(f for f in folder.glob("*.safetensors") if f.name != "golden.safetensors")


def sha256(files: list[File]) -> str:
    """The hash of the contents of files, one after the other: for one file what ``sha256sum`` prints."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def licence_of(folder: File) -> str:
    """The licence that the model card's front matter or the index names, else "unknown"."""
    card = folder / "README.md"
    found: dict[str, str] = {}
    if card.is_file() and card.stat().st_size < 2**22:
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:200]:
                if line.strip() == "---":
                    break
                match = re.match(r"(license|license_name)\s*:\s*([^#\[]+)", line)
                if match:
                    found[match[1]] = match[2].strip().strip("\"'")
    name = found.get("license", "")
    if name in ("", "other"):
        name = found.get("license_name", name)
    if not name and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        value = index.get("license") if isinstance(index, dict) else None
        name = value if isinstance(value, str) else ""
    name = re.sub(r"[\x00-\x1f\x7f]", "", name)[:100]
    return name or "unknown"


@contextmanager
def written_whole(destination: File, overwrite: bool = False) -> Iterator[File]:
    """A temporary sibling folder that takes the destination's name once everything in it is done.

    On any error it is removed and the destination is as it was. Refused where the destination exists,
    unless ``overwrite`` is set and it is empty or a folder of ours.
    """
    destination = File(os.path.abspath(destination))
    if destination.exists():
        ours = destination.is_dir() and ((destination / CONTRACT).is_file() or not any(destination.iterdir()))
        if not overwrite:
            raise Refused(f"{destination} exists: choose another folder, or overwrite it")
        if not ours:
            raise Refused(f"{destination} exists and is no model folder of fewstep: choose another")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = File(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if destination.exists():
            old = File(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
            os.replace(destination, old / "model")
            os.replace(partial, destination)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, destination)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
