"""Run model folders with plain diffusers and compare them with their golden samples.

This file is a script for a fresh process: it reads folders and must never import the package it belongs to.
It prints one line of JSON a folder: the largest error of every step count.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def load_pipeline(folder: str, kind: str) -> Any:
    """The stock pipeline, quiet and from this folder alone."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    if type(pipe).__name__ != kind:
        raise SystemExit(f"the folder loads as {type(pipe).__name__}, the contract says {kind}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: Any, facts: dict[str, Any], tensors: dict[str, Any], count: int, call: dict[str, Any]) -> Any:
    """What the last scheduler step gives inside ``pipe(...)``: samples before any decoding or clamp."""
    import inspect

    import torch

    wanted = inspect.signature(type(pipe).__call__).parameters
    text = bool(facts.get("prompts"))
    arguments = dict(call, generator=torch.Generator().manual_seed(facts["seed"]))
    arguments["output_type"] = "latent" if text else "pt"
    torch.manual_seed(facts["seed"])  # some pipelines give their scheduler no generator
    if text:
        arguments["prompt"] = list(facts["prompts"])
    if "labels" in tensors:
        arguments["class_labels"] = tensors["labels"].tolist()
    if "batch_size" in wanted:
        arguments["batch_size"] = count
    for name in ("image", "mask_image"):
        if name in tensors:
            arguments[name] = tensors[name]
    seen: list[Any] = []
    plain = pipe.scheduler.step

    @functools.wraps(plain)  # pipelines look at its arguments before they pass a generator
    def step(*args: Any, **kwargs: Any) -> Any:
        answer = plain(*args, **kwargs)
        seen.append(answer[0] if isinstance(answer, tuple) else answer.prev_sample)
        return answer

    pipe.scheduler.step = step
    try:
        made = pipe(**{name: value for name, value in arguments.items() if name in wanted})
    finally:
        del pipe.scheduler.step
    if not text and not torch.isfinite(torch.as_tensor(made.images)).all():
        raise SystemExit("the pipeline's pictures hold a NaN or an infinity")
    return seen[-1][:count]


def run_program(folder: str, tensors: dict[str, Any]) -> Any:
    """What the exported program answers: to noise alone, with labels, or with a dictionary of conditions."""
    import torch

    program = torch.export.load(os.path.join(folder, "model.pt2")).module()
    parts = {name[5:]: value for name, value in sorted(tensors.items()) if name.startswith("cond.")}
    conditions = [parts] if parts else [tensors["labels"]] if "labels" in tensors else []
    return program(tensors["noise"], *conditions)


def compare(folder: str) -> dict[str, float]:
    """The largest error of every step count, as a share of the largest value (at least 1)."""
    import torch
    from safetensors import safe_open

    with safe_open(os.path.join(folder, "golden.safetensors"), framework="pt") as file:
        facts = json.loads(file.metadata()["golden"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    pipe = None if facts["pipeline"] is None else load_pipeline(folder, facts["pipeline"])
    errors = {}
    for steps, call in facts["calls"].items():
        wanted = tensors[f"output_{steps}"]
        if pipe is None:
            got = run_program(folder, tensors)
        elif call is None:
            continue
        else:
            got = run_pipeline(pipe, facts, tensors, len(wanted), call)
        if got.shape != wanted.shape:
            raise SystemExit(f"{steps} step(s) gave {list(got.shape)}, the golden sample has {list(wanted.shape)}")
        size = max(1.0, float(wanted.abs().max()))
        errors[steps] = float((torch.as_tensor(got).float() - wanted).abs().max()) / size
    return errors


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = compare(str(Path(name).resolve()))
        assert "fewstep" not in sys.modules
        print(json.dumps({"errors": found}), flush=True)
