"""Take a student to where it is used: another folder, a LoRA file, a program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

from ..errors import Refused
from ..train.trainer import Nobody, Watch
from .using import _model

TARGETS = ("diffusers", "lora", "kohya", "onnx", "pt2")


def export(
    model: File, to: str, *, out: File | None = None, steps: int | None = None, batches: Sequence[int] | None = None,
    decode: bool = False, overwrite: bool = False, watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Export a run's student, or a student folder; it is compared with the student before it is written.

    ``out`` is ``export/TO`` beside the student folder where it is not given. Returns what was written, and the
    largest error of each file by number of rows.
    """
    from ..interop.export import BATCHES, export_lora, export_pipeline, export_programs

    if to not in TARGETS:
        raise Refused(f"a student is exported to one of {', '.join(TARGETS)}, got {to!r}")
    programs = to in ("onnx", "pt2")
    if steps is not None and not programs:
        raise Refused(f"--steps is for programs (onnx, pt2): {to} holds every step count")
    if decode and not programs:
        raise Refused(f"--decode is for programs (onnx, pt2): {to} has the autoencoder beside the network")
    folder = _model(File(model))
    place = out if out is not None else folder.resolve().parent / "export" / to
    say, sizes = (watch or Nobody()).say, tuple(batches or BATCHES)
    if to == "diffusers":
        done = export_pipeline(folder, place, batches=sizes, overwrite=overwrite, say=say)
    elif programs:
        kind: Any = to
        done = export_programs(
            folder, place, kind, steps=steps, batches=sizes, decode=decode, overwrite=overwrite, say=say
        )
    else:
        done = export_lora(folder, place, "kohya" if to == "kohya" else "diffusers", overwrite=overwrite)
    return {
        "out": str(done.out),
        "files": list(done.files),
        "max_error": done.max_error if done.errors else None,
        "errors": {name: {str(size): e for size, e in found.items()} for name, found in done.errors.items()},
        "notes": list(done.notes),
    }
