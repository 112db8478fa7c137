"""ReNO on a one-step digits student: a reward and a judge that is held out, beside the best of as many random draws.

    fewstep distill digits evaluate.enabled=false --out runs/digits
    python benchmarks/noise.py runs/digits/student      # without one, a student is distilled for a short while first

The reward is the log-probability of the wanted class by a classifier of its own; the judge is the classifier that
measures digits everywhere else, which no reward reads.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.align import NoiseOptimiser, NoiseOptions
from fewstep.cond import Cond
from fewstep.interop import load_student
from fewstep.metrics.features import shipped_digits, train_classifier
from fewstep.tasks import task_named


def log_probability(net: torch.nn.Module) -> Callable[[Tensor, Cond], Tensor]:
    def of(x: Tensor, cond: Cond) -> Tensor:
        assert isinstance(cond, Tensor)
        return F.log_softmax(net(x), 1).gather(1, cond[:, None])[:, 0]

    return of


def short_run(folder: Path) -> Path:
    from fewstep.jobs import distill
    from fewstep.train.recipe import load_recipe

    changes = ["steps=400", "method.options.pairs.count=2000", "evaluate.enabled=false"]
    distill(load_recipe("digits", changes), folder)
    return folder / "student"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        student = load_student(options.student or short_run(Path(folder) / "run")).student
    train = task_named("digits").train
    assert isinstance(train.cond, Tensor)
    reward = log_probability(train_classifier(train.data, train.cond, 10, seed=1, design="wide"))
    judge = log_probability(shipped_digits().net)
    rng = torch.Generator().manual_seed(options.seed)
    cond = torch.arange(options.count) % 10
    noise = torch.randn(options.count, *student.shape, generator=rng)
    with torch.no_grad():
        first = student.generate(noise, cond)
        best = torch.full((options.count,), -math.inf)
        chosen = first.clone()
        for _ in range(options.iterations):
            x = student.generate(torch.randn(noise.shape, generator=rng), cond)
            value = reward(x, cond)
            chosen = torch.where((value > best).view(-1, 1, 1, 1), x, chosen)
            best = torch.maximum(best, value)
    began = time.perf_counter()
    settings = NoiseOptions(iterations=options.iterations)
    found = NoiseOptimiser(student, {"class": reward}, settings, held_out={"judge": judge})(noise, cond)
    seconds = time.perf_counter() - began
    length = found.noise.flatten(1).norm(dim=1) / math.sqrt(noise[0].numel())
    with torch.no_grad():
        rows = {
            "first draw": (reward(first, cond), judge(first, cond)),
            f"best of {options.iterations} draws": (best, judge(chosen, cond)),
            f"{options.iterations} iterations": (found.reward.float(), found.held_out["judge"]),
        }
    for name, (mine, other) in rows.items():
        print(
            f"{name:20s} reward {mine.mean():8.4f}   judge: log-probability {other.mean():8.4f}, "
            f"probability {other.exp().mean():.4f}, right {(other > math.log(0.5)).double().mean():.3f}"
        )
    print(
        f"above the best draw: {(found.reward > best).double().mean():.3f} of {options.count} rows; norm over sqrt(d) "
        f"{length.min():.3f} to {length.max():.3f}; off the shell by at most {found.shell.abs().max():.2f} standard "
        f"deviations; {seconds:.1f} s"
    )
    if options.json:
        table = {name: [float(mine.mean()), float(other.mean())] for name, (mine, other) in rows.items()}
        options.json.write_text(json.dumps({"rows": table, "shell": float(found.shell.abs().max())}, indent=1))


if __name__ == "__main__":
    main()
