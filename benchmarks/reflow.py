"""Reflow on a mixture whose law is known: how straight, how good in one step, and what a small network keeps.

    python benchmarks/reflow.py                # three seeds of everything: about ten minutes on one thread
    python benchmarks/reflow.py --seeds 0 --only flow

Four modes at radius 2, std 0.25, weights .4 .3 .2 .1. Distances are sliced Wasserstein-2 of 8,192 samples in 128
directions against fresh data. ``flow``: pairs of the exact teacher, a reflow, one reflow more, a one-step student,
and the same reflow on random couplings. ``small``: a network of width 24 and 500 pairs, with and without annealing,
then one step with and without flow guidance. The exit code is 1 where a median misses its bar.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Wrapped
from fewstep.method import Batch, Method
from fewstep.methods.reflow import Reflow, ReflowOptions, straightness
from fewstep.methods.regression import Regression, RegressionOptions
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.rng import Rng
from fewstep.solvers import Euler, Heun, sample
from fewstep.student import Student
from fewstep.teachers import Mixture

MEASURED = 8192
STEPS = {"flow": 3000, "distil": 1500, "small": 3000}


def law() -> Mixture:
    angle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    return Mixture([0.4, 0.3, 0.2, 0.1], 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.25)


def network(seed: int, width: int, depth: int) -> Student:
    torch.manual_seed(seed)
    net = build({"kind": "mlp", "shape": (2,), "width": width, "depth": depth})
    return Student(Wrapped(net, Straight(), "velocity", "1000t"), (2,))


def taught(
    method: Method, noise: Tensor, target: Tensor, steps: int, seed: int, rate: float, size: int = 256
) -> Student:
    """Adam with a cosine; the average of the weights is what is measured."""
    parameters = list(method.student.parameters())
    optimiser = torch.optim.Adam(parameters, rate, (0.9, 0.99))
    mean = [p.detach().clone() for p in parameters]
    for step in range(steps):
        method.step = step
        optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        index = torch.randint(len(noise), (size,), generator=torch.Generator().manual_seed(seed * 10**6 + step))
        batch = Batch(target[index], None, noise[index], target[index])
        optimiser.zero_grad(set_to_none=True)
        method.loss("student", batch, Rng(seed, step)).total.backward()
        optimiser.step()
        torch._foreach_lerp_(mean, [p.detach() for p in parameters], 0.01)
    with torch.no_grad():
        for parameter, value in zip(parameters, mean, strict=True):
            parameter.copy_(value)
    return method.student


def reflowed(student: Student, noise: Tensor, target: Tensor, steps: int, seed: int, anneal: float = 0.0) -> Student:
    options = ReflowOptions(look=0, anneal=anneal, horizon=steps)
    return taught(Reflow(None, copy.deepcopy(student), options), noise, target, steps, seed, 3e-3)


@torch.no_grad()
def ends(model: Any, noise: Tensor, steps: int) -> Tensor:
    solver = Heun() if steps > 1 else Euler()
    return sample(model, noise, torch.linspace(1, 0, steps + 1), solver)


def distance(a: Tensor, b: Tensor) -> float:
    angle = math.pi * (torch.arange(128) + 0.5) / 128
    lines = torch.stack([angle.cos(), angle.sin()]).to(a)
    return float(((a @ lines).sort(0).values - (b.to(a) @ lines).sort(0).values).square().mean().sqrt())


def seeded(*keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(k * 1000**i for i, k in enumerate(keys)))


def flow(seed: int) -> dict[str, float]:
    teacher, found = law(), {}
    noise = torch.randn(20_000, 2, generator=seeded(1, seed))
    fresh = torch.randn(MEASURED, 2, generator=seeded(2, seed))
    data = teacher.sample(MEASURED, seeded(3, seed), dtype=torch.float32)
    target = ends(teacher, noise, 64)
    found["floor"] = distance(teacher.sample(MEASURED, seeded(4, seed), dtype=torch.float32), data)

    def look(name: str, model: Any) -> None:
        found[f"{name}, 1 step"] = distance(ends(model, fresh, 1), data)
        found[f"{name}, 64 Heun steps"] = distance(ends(model, fresh, 64), data)
        found[f"{name}, straightness"] = float(straightness(model, fresh[:2048]).mean())

    look("teacher", teacher)
    once = reflowed(network(seed, 128, 3), noise, target, STEPS["flow"], seed)
    look("reflow", once.denoiser)
    further = ends(once.denoiser, noise, 64)
    look("one reflow more", reflowed(once, noise, further, STEPS["flow"], seed).denoiser)
    one_step = Regression(None, copy.deepcopy(once), RegressionOptions(distance="l2"))
    found["distilled"] = distance(
        taught(one_step, noise, further, STEPS["distil"], seed, 1e-3).generate(fresh).detach(), data
    )
    random = reflowed(network(seed, 128, 3), noise, target.roll(1, 0), STEPS["flow"], seed)
    found["random couplings, 1 step"] = distance(ends(random.denoiser, fresh, 1), data)
    found["straighter by"] = found["teacher, straightness"] / found["reflow, straightness"]
    found["reflow more over reflow"] = found["one reflow more, straightness"] / found["reflow, straightness"]
    return found


def small(seed: int) -> dict[str, float]:
    teacher, found = law(), {}
    noise = torch.randn(500, 2, generator=seeded(5, seed))
    fresh = torch.randn(MEASURED, 2, generator=seeded(2, seed))
    data, belongs = teacher.sample(MEASURED, seeded(3, seed), dtype=torch.float32), ends(teacher, fresh, 64)
    target = ends(teacher, noise, 64)
    start = network(seed, 24, 3)
    made = {share: reflowed(start, noise, target, STEPS["small"], seed, share) for share in (0.0, 1.0)}
    for share, name in ((0.0, "reflow"), (1.0, "annealed")):
        found[f"{name}, 1 step"] = distance(ends(made[share].denoiser, fresh, 1), data)
    found["annealed over reflow"] = found["annealed, 1 step"] / found["reflow, 1 step"]
    for weight, name in ((0.0, "distilled"), (1.0, "distilled, guided")):
        options = RegressionOptions(distance="l2", guide=weight)
        method = Regression(copy.deepcopy(made[1.0].denoiser), copy.deepcopy(made[1.0]), options)
        answer = taught(method, noise, target, STEPS["distil"], seed, 1e-3).generate(fresh).detach()
        found[f"{name}, error of a held-out pair"] = float((answer - belongs).square().sum(1).mean())
        found[name] = distance(answer, data)
    guided, plain = (found[f"{name}, error of a held-out pair"] for name in ("distilled, guided", "distilled"))
    found["guided over not"] = guided / plain
    return found


BARS = {
    "reflow, 1 step": 0.2, "reflow, 64 Heun steps": 0.08, "reflow more over reflow": 1.0, "annealed over reflow": 0.9,
    "guided over not": 1.0,
}  # fmt: skip
AT_LEAST = {"straighter by": 20.0, "random couplings, 1 step": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["flow", "small"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    for part in (flow, small):
        if given.only not in (None, part.__name__):
            continue
        rows = [part(seed) for seed in given.seeds]
        print(f"\n{part.__name__}: seeds {given.seeds}")
        for name in rows[0]:
            values = [row[name] for row in rows]
            middle = statistics.median(values)
            bars = BARS if part is flow or name not in ("reflow, 1 step",) else {}
            bar = f"<= {bars[name]:g}" if name in bars else f">= {AT_LEAST[name]:g}" if name in AT_LEAST else ""
            wrong = (name in bars and middle > bars[name]) or (name in AT_LEAST and middle < AT_LEAST[name])
            missed += wrong
            shown = " ".join(f"{value:9.4f}" for value in values)
            print(f"{name:45s} {shown}   {bar} {'MISSED' if wrong else ''}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
