"""Peak memory of a training step, method by method, and what saves it.

    python benchmarks/memory.py                    # tables; --json FILE writes them, --quick is a smoke run

The peak is counted tensor by tensor, from shapes alone (weights, gradients, moments, average, activations; not what a
library takes inside one operation), over a turn of every player. With ``--resident`` every step is also run, in a
process of its own, and the table has what the operating system saw it take above what it had before the first network:
libraries and the allocator's slack are in it. The second table holds one call for teacher and critic together against
two calls, and reading features early against running the whole network, in time (medians of interleaved rounds,
processor time of one thread) and in memory. An option that saves nothing is a failure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPE = (1, 32, 32)
WIDTHS, QUICK = (32, 64), (8, 16)
MB = 2**20
LORA: dict[str, Any] = {"rank": 16, "targets": "all"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: method, its options, precision
    "regression": ("regression", {}, {}),
    "dmd2": ("dmd2", {}, {}),
    "dmd2, LoRA critic": ("dmd2", {"critic_lora": LORA}, {}),
    "dmd2, adversary": ("dmd2", {"gan": {}}, {}),
    "disback": ("disback", {}, {}),
    "tdm": ("tdm", {}, {}),
    "swiftbrush": ("swiftbrush", {}, {}),
    "f_distill": ("f_distill", {}, {}),
    "sim": ("sim", {}, {}),
    "sim, LoRA critic": ("sim", {"critic_lora": LORA}, {}),
    "sim, checkpointing": ("sim", {}, {"checkpointing": True}),
    "sim, both": ("sim", {"critic_lora": LORA}, {"checkpointing": True}),
    "sid": ("sid", {}, {}),
    "uni_instruct": ("uni_instruct", {}, {}),
}
SAVES = {"sim, checkpointing": "sim", "sim, both": "sim", "dmd2, LoRA critic": "dmd2"}
"""A case that must take less than another."""


def denoiser(widths: tuple[int, ...]) -> Any:
    from fewstep.denoiser import Wrapped
    from fewstep.nets import build
    from fewstep.path import Exploding

    attention = (False,) * (len(widths) - 1) + (True,)
    net = build({"kind": "unet", "shape": SHAPE, "widths": widths, "attention": attention, "classes": 10})
    return Wrapped(net, Exploding(sigma_min=0.02, sigma_max=20.0), "cm", "250 log_sigma", scale_input=True)


def task_of(count: int) -> Any:
    import torch

    from fewstep.tasks.base import Split, Task

    class Pictures(Task):
        """Random pictures with ten labels."""

        name = "pictures"
        shape, classes, data_std, value_range = SHAPE, 10, 0.5, (-1.0, 1.0)
        split = Split(torch.zeros(count, *SHAPE), torch.arange(count) % 10)

        @property
        def train(self) -> Split:
            return self.split

        @property
        def test(self) -> Split:
            return self.split

    return Pictures()


def alone(name: str, batch: int, widths: tuple[int, ...]) -> dict[str, float]:
    """A case run in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--batch", str(batch), "--resident"]
    command += ["--quick"] * (widths == QUICK)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(name: str, batch: int, widths: tuple[int, ...], fake: bool = True) -> dict[str, float]:
    """A case in this process: counted from shapes, or run."""
    import torch

    from fewstep.registry import METHODS
    from fewstep.student import Student
    from fewstep.train.footprint import Meter, footprint, shapes_alone, size
    from fewstep.train.recipe import Recipe

    torch.set_num_threads(1)
    torch.nn.functional.silu(torch.nn.Linear(8, 8)(torch.randn(8, 8))).sum().backward()  # what torch takes by itself
    meter, (method_name, given, precision) = Meter("cpu"), CASES[name]
    meter.reset()
    before = meter.now()
    cls = METHODS.get(method_name).thing
    options, teacher = cls.Options(**given), denoiser(widths)
    student = Student.like(teacher, SHAPE, classes=10, **cls.student_options(options, teacher.path))
    method = cls(teacher, student, options)
    if method_name == "disback":
        method.step = 10_000  # its student moves
    weights = size(method)
    recipe = Recipe.model_validate({
        "steps": 1000, "batch": batch, "task": {"name": "digits"}, "method": {"name": method_name},
        "precision": precision,
    })  # fmt: skip
    step = footprint(method, task_of(64), recipe, batch, fake=shapes_alone() if fake else None)
    found = {"weights": weights / MB, "peak": (weights + step.peak) / MB}
    return found if fake else {**found, "resident": (meter.peak() - before) / MB}


def together(batch: int, widths: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Two calls against one of twice the rows; features early against the whole network."""
    import torch

    from fewstep.adapters import LoraOptions, adapted
    from fewstep.methods.families.score_gap import Adversary
    from fewstep.train.footprint import Ledger

    torch.set_num_threads(1)
    teacher = denoiser(widths)
    critic = adapted(teacher, LoraOptions(**LORA))
    Adversary.choose(teacher, SHAPE, 1)
    x, t, cond = torch.randn(batch, *SHAPE), torch.full((batch,), 1.0), torch.arange(batch) % 10
    twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, cond]))
    works = {
        "teacher, then LoRA critic": lambda: (teacher(x, t, cond), critic(x, t, cond)),
        "one call of all rows, no adapters": lambda: teacher(*twice),
        "one call of all rows, adapters": lambda: critic(*twice),
        "features by the whole network": lambda: teacher(x, t, cond, "both"),
        "features, out at the tap": lambda: teacher(x, t, cond, "features"),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    peaks = {}
    with torch.no_grad():
        for name, work in works.items():
            with Ledger() as ledger:
                work()
            peaks[name] = ledger.peak / MB
        for _ in range(rounds):
            for name, work in works.items():
                begin = time.process_time()
                work()
                times[name].append(time.process_time() - begin)
    return {name: {"ms": 1e3 * statistics.median(times[name]), "peak": peaks[name]} for name in works}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a small network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--resident", action="store_true", help="run every step too, and ask the operating system")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    widths, batch = (QUICK, 2) if chosen.quick else (WIDTHS, chosen.batch)
    if chosen.one:
        print(json.dumps(one(chosen.one, batch, widths, False)))
        return 0
    rows: dict[str, dict[str, float]] = {}
    print(f"U-Net {widths} on {SHAPE[1]}x{SHAPE[2]}, batch {batch}, MiB\n")
    resident = " resident |" if chosen.resident else ""
    print(f"| method | weights | peak | of regression |{resident}\n|---|---|---|---|{'---|' if resident else ''}")
    for name in list(CASES)[:: 5 if chosen.quick else 1]:
        row = rows[name] = alone(name, batch, widths) if chosen.resident else one(name, batch, widths)
        last = f" {row['resident']:.0f} |" if resident else ""
        share = row["peak"] / rows["regression"]["peak"]
        print(f"| {name} | {row['weights']:.1f} | {row['peak']:.1f} | {share:.2f} |{last}", flush=True)
    pairs = together(batch, widths, 1 if chosen.quick else chosen.rounds)
    print("\n| calls without a gradient | ms | peak |\n|---|---|---|")
    for name, row in pairs.items():
        print(f"| {name} | {row['ms']:.1f} | {row['peak']:.1f} |")
    if chosen.json:
        facts = {"schema": 1, "widths": widths, "batch": batch, "rows": rows, "calls": pairs}
        chosen.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    more = [name for name, other in SAVES.items() if name in rows and rows[name]["peak"] >= rows[other]["peak"]]
    if more:
        print(f"saves nothing: {', '.join(more)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
