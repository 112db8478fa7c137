"""What ``plan`` predicts against what a run then takes: peak memory and time, each in a fresh process.

    python benchmarks/plan_check.py            # table; --json FILE writes it, --quick checks one recipe, --only NAME

A run is ``jobs.distill`` as a whole, from loading to the report; recipes are short variants of shipped ones and a
transformer large enough that its states, and not the libraries, are most of the memory. On a CPU memory is the most
that the process had resident, and time is processor time on one thread: what its neighbours do on a busy machine is
in neither. Wall clock time stands beside it. A figure that is off by more than a quarter is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomlkit

BAR = 0.25
SHORT = {
    "noise_seeds": 2, "scout_seeds": 1, "detail_seeds": 2, "nfes": [1, 4], "full_nfe": 9, "timing_rounds": 1,
    "timing_batch": 128, "count": 400,
}  # fmt: skip
LARGE: dict[str, Any] = {
    "steps": 30,
    "batch": 16,
    "task": {"name": "digits"},
    "student": {
        "net": {"kind": "dit", "width": 320, "depth": 6, "heads": 8, "patch": 2},
        "path": {"kind": "exploding", "sigma_min": 0.02, "sigma_max": 20.0},
        "prediction": "cm", "clock": "250 log_sigma", "scale_input": True,
    },
    "method": {"name": "consistency", "options": {"mode": "training"}},
    "evaluate": {"enabled": False},
}  # fmt: skip
CASES: dict[str, tuple[str, list[str]]] = {
    "digits": ("digits", ["steps=300", "method.options.pairs.count=3000"]),
    "digits, consistency": (
        "digits", ["steps=200", 'method={ name = "consistency", options = { mode = "distillation" } }'],
    ),
    "mixture, dmd2": ("mixture_dmd2", ["steps=300"]),
    "mixture, meanflow": ("mixture_meanflow", ["steps=800"]),
    "transformer of 11 M": ("large", []),
}  # fmt: skip

# both sides start with the libraries loaded: what is compared is the job
RUN = """
import json, sys, time
from pathlib import Path
import torch
from fewstep import jobs
from fewstep.train.recipe import load_recipe
torch.set_num_threads(1)
what, where, mode, *changes = sys.argv[1:]
recipe = load_recipe(what, changes)
wall, processor = time.perf_counter(), time.process_time()
if mode == "plan":
    print("@" + json.dumps(jobs.plan(recipe)))
else:
    jobs.distill(recipe, Path(where))
    peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] / 1024
    facts = {"memory_mb": peak, "wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    print("@" + json.dumps(facts))
"""


def fresh(what: str, changes: list[str], where: Path, mode: str) -> dict[str, Any]:
    """The answer of a fresh process."""
    command = [sys.executable, "-c", RUN, what, str(where), mode, *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode or not answers:
        raise SystemExit(f"{mode} of {what} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(answers[-1][1:])
    return answer


def check(name: str, folder: Path) -> dict[str, Any]:
    what, changes = CASES[name]
    if what == "large":
        file = folder / "large.toml"
        file.write_text(tomlkit.dumps(LARGE), encoding="utf-8")
        what = str(file)
    else:
        protocol = ", ".join(f"{key} = {json.dumps(value)}" for key, value in SHORT.items())
        changes = [*changes, f"evaluate.protocol={{ {protocol} }}", "evaluate.fresh=true"]
    planned = fresh(what, changes, folder, "plan")
    taken = fresh(what, changes, folder / "run", "distill")
    processor = sum(phase["processor_seconds"] for phase in planned["phases"])
    return {
        "name": name,
        "parameters": planned["parameters"],
        "planned_mb": planned["memory_mb"],
        "measured_mb": round(taken["memory_mb"], 1),
        "memory": round(planned["memory_mb"] / taken["memory_mb"], 3),
        "planned_s": round(processor, 2),
        "measured_s": round(taken["processor"], 2),
        "time": round(processor / taken["processor"], 3),
        "planned_wall_s": round(60 * planned["minutes"], 1),
        "measured_wall_s": round(taken["wall"], 1),
        "phases": planned["phases"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one recipe: does it run?")
    parser.add_argument("--only", default="", help="recipes whose name begins like this")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    names = [name for name in CASES if name.startswith(options.only)]
    rows = []
    print(f"{'':22}{'memory':>24}{'processor time':>26}{'wall':>20}   planned / measured")
    for name in names[:1] if options.quick else names:
        with tempfile.TemporaryDirectory() as folder:
            row = check(name, Path(folder))
        rows.append(row)
        print(
            f"{name:22}{row['planned_mb']:8.0f} / {row['measured_mb']:5.0f} MB {row['memory']:5.2f}"
            f"{row['planned_s']:9.1f} / {row['measured_s']:6.1f} s {row['time']:5.2f}"
            f"{row['planned_wall_s']:8.0f} / {row['measured_wall_s']:5.0f} s",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps({"schema": 1, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    missed = [row["name"] for row in rows if max(abs(row["memory"] - 1), abs(row["time"] - 1)) > BAR]
    if missed and not options.quick:
        print(f"off by more than {BAR:.0%}: {', '.join(missed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
