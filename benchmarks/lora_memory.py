"""What LoRA saves: a DMD2 run with three full copies of the network against one with adapters on one copy.

    python benchmarks/lora_memory.py               # table; --json FILE writes it, --quick is a smoke run

Each run is a process of its own on random weights: a few updates of critic and student with Adam and an average.
``states`` are the bytes of weights, gradients, moments and averages, each tensor counted once. ``peak`` is what
the process took at most above what it had before the first network was made: activations are in it, and on a CPU
the allocator's slack. A LoRA run above 0.20 of the full one in states is a failure.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

BAR = 0.20
WIDE: dict[str, Any] = {"width": 512, "depth": 8, "heads": 8, "patch": 2}
QUICK: dict[str, Any] = {"width": 96, "depth": 2, "heads": 4, "patch": 2}
SHAPE = (4, 16, 16)
RUNS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora 16": {"rank": 16},
    "lora 32": {"rank": 32},
    "lora 32, all layers": {"rank": 32, "targets": "all"},
}


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def measure(name: str, quick: bool, batch: int) -> dict[str, float]:
    """One run in this process."""
    import torch

    from fewstep.adapters import LoraOptions, adapted
    from fewstep.denoiser import Wrapped
    from fewstep.method import Batch
    from fewstep.methods.dmd2 import DMD2, DMD2Options
    from fewstep.nets import build
    from fewstep.path import Straight
    from fewstep.rng import Rng
    from fewstep.student import Student, trainable_copy
    from fewstep.train.average import Average
    from fewstep.train.recipe import Optim
    from fewstep.train.trainer import Player

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.functional.silu(torch.nn.Linear(8, 8)(torch.randn(8, 8))).sum().backward()  # what torch takes by itself
    before = peak_bytes()
    net = build({"kind": "dit", "shape": SHAPE, **(QUICK if quick else WIDE)}).to(device)
    teacher = Wrapped(net, Straight(), "velocity", "1000t")
    given = RUNS[name]
    inside = trainable_copy(teacher) if given is None else adapted(teacher, LoraOptions(**given))
    method = DMD2(teacher, Student(inside, SHAPE), DMD2Options(critic_turns=1)).to(device)
    players = {one: Player(getattr(method, one), Optim()) for one in method.players}
    average = Average(method.student, 0.99)
    began = 0.0
    held: dict[int, int] = {}
    for step in range(3):
        began = time.perf_counter() if step == 1 else began
        for turn, acting in enumerate(method.turns(step)):
            for one, player in players.items():
                player.learns(one == acting)
            noise = torch.randn(batch, *SHAPE, device=device)
            method.loss(acting, Batch(noise, None, noise), Rng(0, step, turn, device=device)).total.backward()
            if step == 2:
                with_gradient = [p for p in method.parameters() if p.grad is not None]
                held.update((id(p), p.numel() * p.element_size()) for p in with_gradient)
            players[acting].update(1.0)
        average.update()
    tensors = [*method.state_dict(keep_vars=True).values(), *average.values]
    for player in players.values():
        tensors += [value for state in player.optimiser.state.values() for value in state.values()]
    once = {id(t): t.numel() * t.element_size() for t in tensors}
    return {
        "weights": sum(p.numel() for p in method.parameters()),
        "states": sum(once.values()) + sum(held.values()),
        "peak": peak_bytes() - before,
        "seconds": (time.perf_counter() - began) / 2,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a small network")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--one", choices=list(RUNS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.quick, chosen.batch)))
        return 0
    rows = {}
    for name in RUNS:
        command = [sys.executable, __file__, "--one", name, "--batch", str(chosen.batch)]
        done = subprocess.run(command + ["--quick"] * chosen.quick, capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    full = rows["full"]
    print("| run | numbers | states MB | of full | peak MB | of full | s / step |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['weights'] / 1e6:.2f} M"]
        for key, digits in (("states", 1), ("peak", 0)):
            cells += [f"{row[key] / 1e6:.{digits}f}", f"{row[key] / full[key]:.3f}"]
        print(f"| {' | '.join([name, *cells, format(row['seconds'], '.2f')])} |")
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"network": QUICK if chosen.quick else WIDE, "batch": chosen.batch, "rows": rows}, file, indent=1)
    worst = rows["lora 32"]["states"] / full["states"]
    if not chosen.quick and worst > BAR:
        print(f"lora 32 takes {worst:.3f} of the full run's states, allowed {BAR:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
