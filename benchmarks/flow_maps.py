"""What the methods of trajectories, consistency and flow maps show on laws that are known, over seeds, with their bars.

    python benchmarks/flow_maps.py                  # three seeds of everything: some twenty minutes on one thread
    python benchmarks/flow_maps.py --seeds 0 --only flow consistency

Four modes at radius 2, std 0.25, weights .4 .3 .2 .1; or one Gaussian, whose flow has a closed form and on which errors
are root mean squares over the spread of the exact ends. Distances are sliced Wasserstein-2 of 8,192 samples in 128
directions against fresh data. A quotient names the broken or plain form that it is over. The exit code is 1 where a
median misses its bar.

- ``flow``: pairs of the exact teacher, a reflow, one reflow more, a one-step student; the same on random couplings.
- ``small``: width 24 and 500 pairs, with and without annealing, then one step with and without flow guidance.
- ``consistency``: iCT from data alone at sigma 80, the same with an averaged target; distilled; around a mean.
- ``jumps``: consistency trajectories on the Gaussian; their one step is steered to a mean, eight steps decode.
- ``meanflow``: distilled on the Gaussian; from data on the mixture, with and without jumps.
- ``self_e``: from labelled data on the mixture, beside a plain denoiser in as many steps.
- ``oftsr``: the average velocity over a part of the way, on the Gaussian.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Centred, Wrapped
from fewstep.method import Batch, Method
from fewstep.methods.consistency import Consistency, ConsistencyOptions, ConsistencyTrajectory
from fewstep.methods.meanflow import MeanFlow, MeanFlowOptions
from fewstep.methods.oftsr import OFTSR, OFTSROptions
from fewstep.methods.reflow import Reflow, ReflowOptions, straightness
from fewstep.methods.regression import Regression, RegressionOptions
from fewstep.methods.self_e import SelfE, SelfEOptions
from fewstep.nets import build
from fewstep.path import Exploding, NoiseSampler, Path, Straight
from fewstep.rng import Rng
from fewstep.solvers import Euler, Heun, sample
from fewstep.student import Student
from fewstep.teachers import Gaussian, Mixture

MEASURED = 8192
STEPS = {
    "flow": 3000, "distil": 1500, "small": 3000, "consistency": 4000, "jumps": 4000, "meanflow": 4000, "self_e": 4000,
    "oftsr": 3000,
}  # fmt: skip
EDM = Exploding(sigma_min=0.02, sigma_max=80.0)


def law() -> Mixture:
    angle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    return Mixture([0.4, 0.3, 0.2, 0.1], 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.25)


def network(seed: int, width: int, depth: int) -> Student:
    torch.manual_seed(seed)
    net = build({"kind": "mlp", "shape": (2,), "width": width, "depth": depth})
    return Student(Wrapped(net, Straight(), "velocity", "1000t"), (2,))


def taught(
    method: Method, draw: Callable[[int], Batch], steps: int, seed: int, rate: float, average: float = 0.99
) -> Student:
    """Adam with a cosine; the average of the weights is what is measured."""
    parameters = list(method.student.parameters())
    optimiser = torch.optim.Adam(parameters, rate, (0.9, 0.99))
    mean = [p.detach().clone() for p in parameters]
    for step in range(steps):
        method.step = step
        optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad(set_to_none=True)
        method.loss("student", draw(step), Rng(seed, step)).total.backward()
        optimiser.step()
        method.settle(step)
        torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - average)
    with torch.no_grad():
        for parameter, value in zip(parameters, mean, strict=True):
            parameter.copy_(value)
    return method.student


def pairs(noise: Tensor, target: Tensor, seed: int, size: int = 256) -> Callable[[int], Batch]:
    def draw(step: int) -> Batch:
        index = torch.randint(len(noise), (size,), generator=seeded(step, seed, 7))
        return Batch(target[index], None, noise[index], target[index])

    return draw


def data_of(model: Any, seed: int, size: int = 256, label: bool = False, cond: Any = None) -> Callable[[int], Batch]:
    """Fresh samples of a law, with their modes as labels where asked for, and fresh noise."""

    def draw(step: int) -> Batch:
        rng = seeded(step, seed, 8)
        given = torch.multinomial(model.weight.float(), size, True, generator=rng) if label else None
        x = model.sample(size, rng, given, torch.float32) if label else model.sample(size, rng, dtype=torch.float32)
        noise = torch.randn(size, 2, generator=rng)
        return Batch(x, given if cond is None else {k: v.expand(size, 2) for k, v in cond.items()}, noise)

    return draw


def reflowed(student: Student, noise: Tensor, target: Tensor, steps: int, seed: int, anneal: float = 0.0) -> Student:
    options = ReflowOptions(look=0, anneal=anneal, horizon=steps)
    return taught(Reflow(None, copy.deepcopy(student), options), pairs(noise, target, seed), steps, seed, 3e-3)


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
        taught(one_step, pairs(noise, further, seed), STEPS["distil"], seed, 1e-3).generate(fresh).detach(), data
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
        answer = taught(method, pairs(noise, target, seed), STEPS["distil"], seed, 1e-3).generate(fresh).detach()
        found[f"{name}, error of a held-out pair"] = float((answer - belongs).square().sum(1).mean())
        found[name] = distance(answer, data)
    guided, plain = (found[f"{name}, error of a held-out pair"] for name in ("distilled, guided", "distilled"))
    found["guided over not"] = guided / plain
    return found


def gaussian(path: Path) -> Gaussian:
    return Gaussian([0.3, -0.2], [0.5, 0.8], path=path)


def denoiser(seed: int, path: Path, reads_s: bool = False, shift: bool = False) -> Any:
    """A small network in the preconditioning of Karras et al., or of the straight path."""
    torch.manual_seed(seed)
    net = build({"kind": "mlp", "shape": (2,), "width": 128, "depth": 2, "reads_s": reads_s})
    if isinstance(path, Straight):
        return Wrapped(net, path, "flow", "t")
    wrapped = Wrapped(net, path, "cm", "log_sigma/4", scale_input=True, data_std=0.7, boundary=path.t_low)
    return Centred(wrapped, "mean") if shift else wrapped


def off(guess: Tensor, wanted: Tensor) -> float:
    """Root mean square error over the spread of what is wanted."""
    return float(((guess - wanted).square().mean() / wanted.var(0).mean()).sqrt())


def consistency(seed: int) -> dict[str, float]:
    teacher, found, steps = gaussian(EDM), {}, STEPS["consistency"]
    z = torch.randn(MEASURED, 2, generator=seeded(1, seed))
    wanted = teacher.flow_map(EDM.sigma_max * z, EDM.sigma_max, 0.0).float()
    mu = torch.tensor([1.5, -0.5])

    def error(mode: str, cond: Any = None, **options: Any) -> float:
        student = Student(denoiser(seed, EDM, shift=cond is not None), (2,))
        given = ConsistencyOptions(mode=mode, first=10, last=160, horizon=steps, mean=-0.5, std=1.8, **options)
        game = Consistency(teacher if mode == "distillation" else None, student, given)
        taught(game, data_of(teacher, seed, cond=cond), steps, seed, 3e-3)
        with torch.no_grad():
            return off(student.generate(z, None if cond is None else {"mean": mu.expand(len(z), 2)}), wanted)

    found["iCT from data, error"] = error("training")
    found["with an averaged target"] = error("training", target_decay=0.95)
    found["averaged over not"] = found["with an averaged target"] / found["iCT from data, error"]
    found["distilled, error"] = error("distillation")
    found["distilled around a mean, error"] = error("distillation", {"mean": mu})
    return found


def jumps(seed: int) -> dict[str, float]:
    teacher, steps = gaussian(EDM), STEPS["jumps"]
    options = ConsistencyTrajectory.Options(first=18, last=36, horizon=steps, mean=-0.2, std=1.8)
    times = torch.exp(torch.linspace(math.log(EDM.sigma_max), math.log(0.1), 8)).tolist()
    student = Student(denoiser(seed, EDM, reads_s=True), (2,), steps={1: (80.0,), 8: (80.0, *times[1:])})
    taught(ConsistencyTrajectory(teacher, student, options), data_of(teacher, seed), steps, seed, 3e-3)
    z = torch.randn(MEASURED, 2, generator=seeded(1, seed))
    x = EDM.sigma_max * z
    with torch.no_grad():
        whole = student(x, 80.0, 0.0)
        middle = [student(student(x, 80.0, s), s, 0.0) for s in (10.0, 2.0, 0.5)]
    found = {
        "one jump, error": off(whole, teacher.flow_map(x, 80.0, 0.0).float()),
        "by way of a point, off the whole jump": max(off(two, whole) for two in middle),
    }
    target = torch.tensor([1.0, 0.6])
    free = torch.randn(64, 2, generator=seeded(2, seed)).requires_grad_()
    optimiser = torch.optim.Adam([free], 0.1)

    def missed(count: int) -> Tensor:
        return (student.generate(free, steps=count).mean(0) - target).square().mean()

    before = {count: missed(count).item() for count in (1, 8)}
    for _ in range(50):
        optimiser.zero_grad()
        missed(1).backward()
        optimiser.step()
    found["control falls to 1 in"] = before[1] / missed(1).item()
    found["control decoded in 8 steps falls to 1 in"] = before[8] / missed(8).item()
    return found


def meanflow(seed: int) -> dict[str, float]:
    found, steps = {}, STEPS["meanflow"]
    teacher = gaussian(Straight())
    student = Student(denoiser(seed, Straight(), reads_s=True), (2,))
    given = MeanFlowOptions(levels=NoiseSampler(kind="uniform"), power=0.0)
    taught(MeanFlow(teacher, student, given), data_of(teacher, seed), steps, seed, 3e-3)
    z = torch.randn(MEASURED, 2, generator=seeded(1, seed))
    with torch.no_grad():
        found["distilled, error"] = off(student.generate(z), teacher.flow_map(z, 1.0, 0.0).float())
    mixture = law()
    data = mixture.sample(MEASURED, seeded(3, seed), dtype=torch.float32)
    for share, name in ((0.0, "from data, no jumps, 1 step"), (0.5, "from data, 1 step")):
        torch.manual_seed(seed)
        net = build({"kind": "mlp", "shape": (2,), "width": 128, "depth": 3, "reads_s": True})
        free = Student(Wrapped(net, Straight(), "velocity", "t"), (2,))
        given = MeanFlowOptions(velocity="data", levels=NoiseSampler(kind="uniform"), jumps=share, power=0.5)
        taught(MeanFlow(None, free, given), data_of(mixture, seed), steps, seed, 1e-3)
        with torch.no_grad():
            found[name] = distance(free.generate(z), data)
    return found


def self_e(seed: int) -> dict[str, float]:
    mixture, found, steps = law(), {}, STEPS["self_e"]
    z = torch.randn(MEASURED, 2, generator=seeded(1, seed))
    labels = torch.multinomial(mixture.weight.float(), MEASURED, True, generator=seeded(2, seed))
    data = mixture.sample(MEASURED, seeded(3, seed), dtype=torch.float32)
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    for share, name in ((0.0, "plain"), (0.5, "self-evaluated")):
        options = SelfEOptions(
            levels=NoiseSampler(kind="log_normal", mean=-0.2, std=1.4), jumps=share, horizon=steps, steps=(2, 50)
        )
        torch.manual_seed(seed)
        net = build({"kind": "mlp", "shape": (2,), "width": 128, "depth": 3, "reads_s": True, "classes": 4})
        wrapped = Wrapped(net, path, "edm", "log_sigma/4", scale_input=True, data_std=1.4)
        student = Student(wrapped, (2,), classes=4, **SelfE.student_options(options, path))
        taught(SelfE(None, student, options), data_of(mixture, seed, label=True), steps, seed, 3e-3)
        with torch.no_grad():
            for count in (2, 50):
                found[f"{name}, {count} steps"] = distance(student.generate(z, labels, steps=count), data)
    for count in (2, 50):
        found[f"{count} steps over plain"] = found[f"self-evaluated, {count} steps"] / found[f"plain, {count} steps"]
    return found


def oftsr(seed: int) -> dict[str, float]:
    teacher = gaussian(Straight())
    student = Student(denoiser(seed, Straight(), reads_s=True), (2,))
    taught(OFTSR(teacher, student, OFTSROptions()), data_of(teacher, seed), STEPS["oftsr"], seed, 3e-3)
    z = torch.randn(MEASURED, 2, generator=seeded(1, seed))
    worst = 0.0
    for gone in (0.2, 0.5, 0.8, 1.0):
        wanted = (z - teacher.flow_map(z, 1.0, 1 - gone).float()) / gone
        with torch.no_grad():
            worst = max(worst, off(student(z, 1.0, 1 - gone, None, "average_velocity"), wanted))
    return {"average velocity over .2 to all of the way, error": worst}


PARTS: dict[str, Callable[[int], dict[str, float]]] = {
    "flow": flow, "small": small, "consistency": consistency, "jumps": jumps, "meanflow": meanflow, "self_e": self_e,
    "oftsr": oftsr,
}  # fmt: skip
AT_MOST = {
    "flow": {"reflow, 1 step": 0.2, "reflow, 64 Heun steps": 0.08, "reflow more over reflow": 1.0},
    "small": {"annealed over reflow": 0.9, "guided over not": 1.0},
    "consistency": {
        "iCT from data, error": 0.03, "distilled, error": 0.03, "distilled around a mean, error": 0.03,
    },
    "jumps": {"by way of a point, off the whole jump": 0.02},
    "meanflow": {"distilled, error": 0.03, "from data, 1 step": 0.7},
    "self_e": {"2 steps over plain": 0.5, "50 steps over plain": 1.2},
    "oftsr": {"average velocity over .2 to all of the way, error": 0.02},
}  # fmt: skip
AT_LEAST = {
    "flow": {"straighter by": 20.0, "random couplings, 1 step": 1.0},
    "consistency": {"averaged over not": 1.0},
    "jumps": {"control falls to 1 in": 100.0, "control decoded in 8 steps falls to 1 in": 10.0},
    "meanflow": {"from data, no jumps, 1 step": 1.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=float, default=1.0, help="share of the updates that every part makes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in STEPS:
        STEPS[name] = max(2, round(STEPS[name] * given.steps))
    missed = 0
    for part in given.only:
        rows = [PARTS[part](seed) for seed in given.seeds]
        most, least = AT_MOST.get(part, {}), AT_LEAST.get(part, {})
        print(f"\n{part}: seeds {given.seeds}")
        for name in rows[0]:
            values = [row[name] for row in rows]
            middle = statistics.median(values)
            bar = f"<= {most[name]:g}" if name in most else f">= {least[name]:g}" if name in least else ""
            wrong = (
                middle > most.get(name, math.inf) or middle < least.get(name, -math.inf) or not math.isfinite(middle)
            )
            missed += wrong
            shown = " ".join(f"{value:9.4f}" for value in values)
            print(f"{name:50s} {shown}   {bar} {'MISSED' if wrong else ''}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
