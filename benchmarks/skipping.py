"""Blocks left out of the packaged digits teacher: Fréchet distance, FLOPs and time beside the whole network.

    python benchmarks/skipping.py --plan plan.json   # of `fewstep search digits --nfe 4 --out plan.json`
    python benchmarks/skipping.py --keep 0.8 --nfe 8 # the recommended plan of 8 calls

The search for blocks sees what ``--judge`` says and no network that measures: ``features`` is the distance to the fine
solution in the teacher's own layers, with a fit by gradient, ``plan`` the same distance to the whole network's samples
by the same plan, ``data`` the Fréchet distance to real training digits in
the features of a network that chooses, without one, which is what `fewstep search digits --keep 0.9` does. Fréchet
distances are means over the protocol's draws of noise, which no search has seen; both plans meet the same ones, so that
the standard error of their difference is that of the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.denoiser import choose_taps
from fewstep.evaluate import Protocol
from fewstep.evaluate.measure import Evaluation
from fewstep.evaluate.sampling import Candidate
from fewstep.evaluate.stage import Quiet, measuring
from fewstep.interop import load_teacher
from fewstep.metrics.features import features_for
from fewstep.rng import mix
from fewstep.search import (
    Contest,
    Evolution,
    FeatureDistance,
    Fitting,
    FrechetTo,
    Objective,
    Pairs,
    prune,
    solved,
)
from fewstep.solvers import SolverPlan, recommended, sample, start_noise
from fewstep.tasks import task_named


def contest_of(teacher: Any, task: Any, plan: SolverPlan, budget: int, fitting: int, seed: int, judge: str) -> Contest:
    def pairs(name: str, count: int) -> Pairs:
        rng = torch.Generator().manual_seed(mix(seed, "starts", name))
        x = start_noise(teacher.path, teacher.path.t_max, torch.randn(count, *task.shape, generator=rng))
        cond = torch.arange(count) % 10
        if judge == "plan":
            return Pairs(x, cond, sample(teacher, x, plan, cond=cond))
        return Pairs(x, cond, x) if judge == "data" else solved(teacher, x, cond)  # data: no fine solution is read

    law = judge == "data"
    train, valid, held = pairs("train", 256), pairs("valid", 256 if law else 128), pairs("held", 256)
    objective: Objective
    if law:
        objective = FrechetTo(features_for(task, purpose="select"), task.train.data, task.finish)
    else:
        few = train.rows(slice(0, 2))
        teacher.taps = choose_taps(teacher.net, lambda: teacher(few.x, teacher.path.t_max, few.cond), 3)
        objective = FeatureDistance(teacher, train)
        train, valid, held = (objective.marked(one) for one in (train, valid, held))
    return Contest(
        teacher, train, valid, held, objective,
        evolution=Evolution(budget=budget, first=128 if law else 64, seed=seed),
        fitting=Fitting(steps=fitting, seed=seed), batch=128 if law else 64,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--nfe", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--judge", choices=("data", "features", "plan"), default="data")
    parser.add_argument("--fitting", type=int, default=100, help="steps of the fit to what is left (features)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--save", type=Path, help="write the plan that leaves blocks out here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, task = load_teacher("digits").denoiser.requires_grad_(False), task_named("digits")
    plan = SolverPlan.load(options.plan) if options.plan else recommended(teacher.path, options.nfe)
    began = time.perf_counter()
    contest = contest_of(teacher, task, plan, options.budget, options.fitting, options.seed, options.judge)
    found = prune(plan, contest, keep=options.keep)
    print(f"{found.flops:.3f} of the FLOPs, found in {time.perf_counter() - began:.0f} s")
    print(f"{contest.objective.name} on unseen starts {found.score:.4f}, of the whole network {found.whole:.4f}")
    print(
        f"of random masks {statistics.fmean(found.chance):.4f}, {min(found.chance):.4f} the best of {len(found.chance)}"
    )
    for i, step in enumerate(found.plan.steps):
        print(f"  call {i}: {', '.join(step.skip) or 'nothing left out'}")

    distances, seconds = dict[str, list[float]](), dict[str, float]()
    noise, cond = torch.randn(512, *task.shape, generator=torch.Generator().manual_seed(0)), torch.arange(512) % 10
    with measuring(teacher):
        evaluation = Evaluation(task, Protocol(), features_for(task), None, options.seed, Quiet())
        for name, one in (("whole", plan), ("left out", found.plan)):

            def draw(network: Any, z: Any, cond: Any, rng: Any, plan: SolverPlan = one) -> Any:
                return sample(network, start_noise(network.path, network.path.t_max, z), plan, cond=cond, rng=rng)

            candidate = Candidate(f"teacher:{name}", name, one.nfe, teacher, draw)
            drawn = evaluation.stage.many(candidate, "noise", options.draws, strict=True)
            assert drawn is not None
            distances[name] = evaluation.ruler.frechets(drawn[0])
            began = time.perf_counter()
            for _ in range(3):
                draw(teacher, noise, cond, None)
            seconds[name] = (time.perf_counter() - began) / 3
            print(f"{name:9s} Fréchet {statistics.fmean(distances[name]):.4f}   {seconds[name]:.2f} s for 512 samples")
    gaps = [b - a for a, b in zip(*distances.values(), strict=True)]
    spread = statistics.stdev(gaps) / math.sqrt(len(gaps))
    print(f"difference {statistics.fmean(gaps):+.4f} ± {spread:.4f} over {len(gaps)} draws")
    if options.save:
        found.plan.save(options.save)
    if options.json:
        result = {"flops": found.flops, "score": found.score, "whole": found.whole, "chance": found.chance}
        options.json.write_text(json.dumps({**result, "frechet": distances, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
