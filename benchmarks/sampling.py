"""Samples per second: a one-step student, its teacher under Heun 35, and bare network calls.

    python benchmarks/sampling.py                  # table; --json FILE writes it, --quick is a smoke run

A U-Net of the digits' size on random weights (speed does not depend on them), in batches, one thread, in turns.
``over bare`` is the time beside as many calls of the network alone: what the sampling loop, the preconditioning
and the clock cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.denoiser import Counted, Wrapped
from fewstep.grid import grid
from fewstep.nets import build
from fewstep.path import Exploding
from fewstep.solvers import sample, solver_named, start_noise
from fewstep.student import Student

BAR = 30.0
PLANS = (("heun", 35), ("dpm2m", 8), ("dpm2m", 5), ("euler", 1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.rounds = 4, 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    net = build({"kind": "unet", "shape": (1, 8, 8), "widths": (options.width, 32), "classes": 10}).eval()
    teacher = Wrapped(net, path, "cm", "250 log_sigma", scale_input=True, data_std=0.75, boundary=0.002).eval()
    student = Student(teacher, (1, 8, 8), start=2.5)
    noise = torch.randn(options.batch, 1, 8, 8)
    labels, clock = torch.arange(options.batch) % 10, torch.full((options.batch,), 100.0)

    def bare(calls: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(calls):
                net(noise, clock, labels)

        return work

    works: dict[str, tuple[Callable[[], object], int]] = {"student 1": (lambda: student.generate(noise, labels), 1)}
    for name, nfe in PLANS:
        solver = solver_named(name)
        steps = solver.steps_for(nfe)
        assert steps is not None
        times = grid(path, steps)
        x, counted = start_noise(path, path.t_max, noise), Counted(teacher)
        with torch.no_grad():
            sample(counted, x, times, solver, cond=labels)
        assert counted.calls == nfe
        works[f"{name} {nfe}"] = (lambda x=x, times=times, s=solver: sample(teacher, x, times, s, cond=labels), nfe)

    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    with torch.no_grad():
        for _ in range(options.rounds):
            for name, (work, calls) in works.items():
                taken[name].append((_seconds(work, calls), _seconds(bare(calls), calls)))
    rows = []
    print(f"U-Net {options.width}/32 on 8x8, batch {options.batch}; processor time, one thread")
    print(f"{'':14}{'calls':>6}{'samples/s':>12}{'over bare':>12}")
    for name, pairs in taken.items():
        rate = options.batch / statistics.median(a for a, _ in pairs)
        row = {"name": name, "calls": works[name][1], "samples_per_s": rate}
        row["over_bare"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
        print(f"{name:14}{row['calls']:6d}{rate:12.1f}{row['over_bare']:12.3f}")
    by_name = {row["name"]: row for row in rows}
    speedup = by_name["student 1"]["samples_per_s"] / by_name["heun 35"]["samples_per_s"]
    print(f"student over Heun 35: {speedup:.1f}x")
    if options.json:
        facts = {"schema": 1, "batch": options.batch, "torch": torch.__version__, "rows": rows, "speedup": speedup}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 1 if speedup < BAR and not options.quick else 0


def _seconds(work: Callable[[], object], calls: int) -> float:
    """Processor time of one call, repeated where it is short."""
    repeats = max(1, 16 // calls)
    begin = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - begin) / repeats


if __name__ == "__main__":
    sys.exit(main())
