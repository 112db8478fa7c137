"""What every option of [precision] costs and saves: time of a step, and what a step holds.

    python benchmarks/precision.py            # table; --json FILE writes it, --quick is a smoke run

A step of DMD2 (one critic turn, one of the student) on a transformer. Time is processor time on one thread, the median
of several steps; memory is counted tensor by tensor, weights included. ``compile`` is left out here: it pays on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.denoiser import Wrapped
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.nets import build
from fewstep.path import Exploding
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks.base import Split, Task
from fewstep.train.footprint import footprint, size
from fewstep.train.player import Player
from fewstep.train.precision import Prepared
from fewstep.train.recipe import Recipe

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "dtype": {"dtype": "bfloat16"},
    "dtype, weights": {"dtype": "bfloat16", "weights": "bfloat16"},
    "checkpointing": {"checkpointing": True},
    "channels_last": {"channels_last": True},
    "offload_teacher": {"offload_teacher": True},
}


class Noise(Task):
    """Random pictures."""

    name, shape = "noise", (1, 8, 8)

    def __init__(self) -> None:
        self._split = Split(torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)), None)

    @property
    def train(self) -> Split:
        return self._split

    @property
    def test(self) -> Split:
        return self._split


def game(width: int) -> DMD2:
    net = build({"kind": "dit", "shape": (1, 8, 8), "width": width, "depth": 6, "heads": 4})
    teacher = Wrapped(net, Exploding(sigma_min=0.02, sigma_max=20.0), "cm", "250 log_sigma", scale_input=True)
    return DMD2(teacher, Student.like(teacher, (1, 8, 8)), DMD2Options(critic_turns=1))


def seconds(method: DMD2, recipe: Recipe, rounds: int) -> float:
    """Of one step, in processor time: the median."""
    prepared = Prepared(method.train(), recipe.precision, "cpu")
    players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
    narrow, taken = recipe.precision.dtype == "bfloat16", []
    for step in range(rounds + 1):
        batch, began = Noise().batch(recipe.batch, 0, step), time.process_time()
        for name in ("critic", "student"):
            for other, player in players.items():
                player.learns(other == name)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = method.loss(name, batch, Rng(step, name))
            loss.total.backward()
            players[name].update(1e-3, key=step)
            prepared.rest()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    if options.quick:
        options.width, options.batch, options.rounds = 16, 8, 1
    torch.set_num_threads(1)
    rows = []
    print(f"transformer of width {options.width}, batch {options.batch}; processor time, one thread", flush=True)
    for name, precision in OPTIONS.items():
        recipe = Recipe.model_validate({
            "steps": 1, "batch": options.batch, "task": {"name": "digits"}, "method": {"name": "dmd2"},
            "precision": precision,
        })  # fmt: skip
        torch.manual_seed(0)
        took = seconds(game(options.width), recipe, options.rounds)
        method = game(options.width)
        weights = size(method)
        if recipe.precision.weights == "bfloat16":
            weights -= 2 * sum(p.numel() for n in method.players for p in getattr(method, n).parameters())
        held = weights + footprint(method, Noise(), recipe, options.batch).peak
        rows.append({"option": name, "ms": 1e3 * took, "mb": held / 2**20})
        print(f"{name:20}{1e3 * took:10.0f} ms{held / 2**20:10.1f} MiB", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"schema": 1, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
