"""Blocks left out of the packaged digits teacher: Fréchet distance, FLOPs and time beside the whole plan.

    python benchmarks/skipping.py                    # the recommended plan of 4 calls; --plan FILE for another
    python benchmarks/skipping.py --keep 0.8 --nfe 8

The search sees the distance to the whole network's samples, and no network that measures. Fréchet distances are means
over the protocol's draws of noise, which the search has not seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from fewstep.evaluate import Protocol
from fewstep.evaluate.measure import Evaluation
from fewstep.evaluate.sampling import Candidate
from fewstep.evaluate.stage import Quiet, measuring, spread_of
from fewstep.interop import load_teacher
from fewstep.metrics.features import features_for
from fewstep.search.evolve import Evolution
from fewstep.search.skipping import masked, prune
from fewstep.solvers import SolverPlan, recommended, sample, start_noise
from fewstep.tasks import task_named


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--nfe", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the plan that leaves blocks out here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher, task = load_teacher("digits").denoiser, task_named("digits")
    plan = SolverPlan.load(arguments.plan) if arguments.plan else recommended(teacher.path, arguments.nfe)
    noise = torch.randn(512, *task.shape, generator=torch.Generator().manual_seed(1000 + arguments.seed))
    began = time.perf_counter()
    found = prune(
        teacher, plan, noise, torch.arange(512) % 10, keep=arguments.keep,
        options=Evolution(budget=arguments.budget, starts=256, first=64, seed=arguments.seed),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    chance = statistics.fmean(found.chance)
    print(
        f"found in {seconds:.0f} s: {found.flops:.3f} of the FLOPs; distance to the whole network's samples on unseen"
    )
    print(
        f"starts {found.held_out:.4f}, of random masks of that budget {chance:.4f} ({min(found.chance):.4f} at least)"
    )
    for i, step in enumerate(found.plan.steps):
        print(f"  call {i}: {', '.join(step.skip) or 'nothing left out'}")

    rows = []
    with measuring(teacher):
        stage = Evaluation(task, Protocol(), features_for(task), None, arguments.seed, Quiet())
        for name, one in (("whole", masked(plan, frozenset())), ("pruned", found.plan)):
            times, rule = one.times(teacher.path), one.solver()
            candidate = Candidate(
                f"teacher:{name}", name, one.nfe, teacher,
                lambda network, z, cond, rng, times=times, rule=rule: sample(
                    network, start_noise(network.path, times[0], z), times, rule, cond=cond, rng=rng
                ),
            )  # fmt: skip
            drawn = stage.stage.many(candidate, "noise", 16, strict=True)
            assert drawn is not None
            distances = stage.ruler.frechets(drawn[0])
            began = time.perf_counter()
            for _ in range(3):
                candidate.draw(teacher, noise, torch.arange(512) % 10, None)  # type: ignore[arg-type]
            spent = (time.perf_counter() - began) / 3
            rows.append(
                {"plan": name, "frechet": statistics.fmean(distances), "spread": spread_of(distances), "seconds": spent}
            )
            print(f"{name:7s} Fréchet {rows[-1]['frechet']:.4f} ± {rows[-1]['spread']:.4f}   {spent:.2f} s for 512")
    if arguments.save:
        found.plan.save(arguments.save)
    if arguments.json:
        arguments.json.write_text(json.dumps({"flops": found.flops, "chance": chance, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
