"""How much faster two processes sample than one, with one thread each.

    python benchmarks/processes.py            # --json FILE writes it, --quick is a smoke run

Both are timed in turns inside one pair of processes: in one turn both draw their chunks and exchange the samples, in
the other the first draws all of them while the second waits. The ratio is the median over rounds; ``best`` compares the
fastest turn of each, which on a busy machine is what the code costs. Below 1.8 is a failure, where two cores are free.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.denoiser import Wrapped
from fewstep.evaluate.sampling import Candidate, Chunk, chunks_of, draws, of_student
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.train.processes import alone, gather, joined

BAR = 1.8


def student() -> Candidate:
    torch.manual_seed(0)
    net = build({"kind": "unet", "shape": (1, 16, 16), "widths": (16, 32)})
    return of_student(Student(Wrapped(net, Straight(), "x0", "1000t"), (1, 16, 16)).eval(), 1)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def turns(count: int, rounds: int) -> dict[str, Any]:
    """Seconds of each turn, as the first process saw them."""
    torch.set_num_threads(1)
    candidate = student()
    chunks: list[Chunk] = chunks_of(Rng(0, "noise").normal((count, 1, 16, 16)), None, 64, "steps")

    def single() -> None:
        list(draws(candidate, chunks, shared=False))

    def together() -> None:
        list(draws(candidate, chunks))

    times: dict[str, list[float]] = {"one": [], "two": []}
    for turn in range(rounds + 1):
        one = alone(lambda: seconds(single))
        gather(None)
        two = seconds(together)
        if turn:  # the first is a warm-up
            times["one"].append(one)
            times["two"].append(two)
    ratios = [a / b for a, b in zip(times["one"], times["two"], strict=True)]
    return {
        "samples_per_s_one": count / statistics.median(times["one"]),
        "samples_per_s_two": count / statistics.median(times["two"]),
        "ratio": statistics.median(ratios),
        "best": min(times["one"]) / min(times["two"]),
        "load": os.getloadavg()[0],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    count, rounds = (256, 1) if options.quick else (options.count, options.rounds)
    if "RANK" in os.environ:
        with joined() as here:
            found = turns(count, rounds)
            if here.first:
                print(json.dumps(found), flush=True)
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--count", str(count), "--rounds", str(rounds)]
    members = [
        subprocess.Popen(
            command,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    text, _ = members[0].communicate()
    if any(member.wait() for member in members):
        return 1
    found = json.loads(text.splitlines()[-1])
    for name, value in found.items():
        print(f"{name:<20} {value:.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.quick or (os.cpu_count() or 1) < 2 or found["load"] > 2.5:
        print(f"bar {BAR}: not held against it (quick, or no two free cores)")
        return 0
    print(f"bar {BAR}: {'held' if found['ratio'] >= BAR else 'missed'}")
    return 0 if found["ratio"] >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
