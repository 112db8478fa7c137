"""What a recipe would cost, before it is run."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path as File
from typing import Any

from ..method import Method
from ..train.build import make_student
from ..train.pairs import Pairs
from ..train.recipe import Recipe, load_recipe
from ..train.trainer import Nobody, Trainer
from .setting import Setting, game, prepare
from .training import train


def plan(recipe: Recipe, *, device: str = "cpu", timed: int = 3) -> dict[str, Any]:
    """What a recipe would cost: parameters, memory and time, from a few steps that are thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        run = File(scratch)
        eyes = Nobody()
        if recipe.teacher is not None and recipe.teacher.source.startswith("recipe:"):
            nested = load_recipe(recipe.teacher.source.removeprefix("recipe:"), [f"seed={recipe.seed}"])
            small = nested.model_copy(
                update={"steps": 1, "task": recipe.task if nested.task.name == recipe.task.name else nested.task}
            )
            train(small, run / "teacher_run", device=device)
        setting = prepare(recipe, run, device, eyes)
        parts = []
        for index in range(len(recipe.stages) + 1):
            part = recipe.stage(index)
            student = make_student(part, setting.task, setting.raw, setting.shape)
            method = game(part, setting, student)
            parts.append(_cost(part, setting, method, run, index, device, timed))
    licence = setting.teacher.licence if setting.teacher is not None else "unknown"
    return {
        "recipe": recipe.name,
        "method": " then ".join(p["method"] for p in parts),
        "task": recipe.task.name,
        "parameters": max(p["parameters"] for p in parts),
        "teacher_parameters": sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0,
        "memory_mb": max(p["memory_mb"] for p in parts),
        "minutes": round(sum(p["seconds"] for p in parts) / 60, 2),
        "steps": [p["steps"] for p in parts],
        "licence": licence,
        "device": device,
    }


def _cost(
    part: Recipe, setting: Setting, method: Method, run: File, index: int, device: str, timed: int
) -> dict[str, Any]:
    """Parameters, states in memory and seconds of one stage."""
    learning = sum(p.numel() for name in method.players for p in getattr(method, name).parameters())
    frozen = sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0
    wanted = method.pairs()
    seconds = 0.0
    pairs = None
    if wanted is not None and setting.denoiser is not None:
        few = wanted.model_copy(update={"count": min(wanted.count, max(part.batch, 256))})
        began = time.perf_counter()
        pairs = Pairs(setting.denoiser, setting.task, few, run / "pairs", teacher_hash="plan", device=device)
        seconds += (time.perf_counter() - began) * wanted.count / few.count
    small = part.model_copy(update={"steps": timed})
    trainer = Trainer(small, run / f"plan_{index}", device=device)
    trainer.fit(method, setting.task, pairs)
    lines = (run / f"plan_{index}" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    each = json.loads(lines[-1])["seconds"] / timed
    seconds += each * part.steps
    # weights, gradient, two moments of every learning parameter; the average; the frozen teacher
    states = 4 * (4 * learning + sum(p.numel() for p in method.student.parameters()) + frozen)
    return {
        "method": part.method.name,
        "parameters": learning,
        "memory_mb": round(states / 2**20, 1),
        "seconds": seconds,
        "steps": part.steps,
    }
