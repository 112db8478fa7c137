"""Searched plans beside every peer, on starts that nothing was chosen on.

    python benchmarks/search.py --json search.json                      # exact teachers; --quick is a smoke run
    python benchmarks/search.py --problems ring --paths vp --nfe 5      # a part of it
    python benchmarks/search.py --digits                                # the packaged digits teacher, Fréchet distance
    python benchmarks/search.py --toy                                   # evolution alone on a mixture of four

Exact teachers, starts and peers are those of ``benchmarks/solvers.py``: a plan is searched on ``--train`` starts,
chosen on others, and compared on ``--starts`` unseen ones with diffusers' schedulers, k-diffusion's samplers where
installed, every deterministic solver of ours on plain grids, and the recommended plan.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from solvers import (
    BARS,
    NFES,
    PATHS,
    diffusers_peers,
    exact,
    k_diffusion_peers,
    our_default,
    our_solvers,
    outcome,
    path_named,
    teacher_named,
)

from fewstep.rng import mix
from fewstep.search import Evolution, evolve
from fewstep.search.contest import Contest, contest
from fewstep.search.gradient import Fitting, Pairs
from fewstep.search.objective import Distance, Judge
from fewstep.search.plans import PlanSpace, fixed_samplers
from fewstep.solvers import SolverPlan, StepPlan, sample

WANTED = {("ring", 5): 2.0, ("ring", 10): 2.0, ("digits", 5): 1.5, ("digits", 10): 1.2}
"""Gain on the best peer that a search must have, by problem and calls; elsewhere 1."""


def pairs(teacher: Any, count: int, seed: int, fine: int) -> Pairs:
    x, _ = teacher.starts(count, seed)
    with torch.no_grad():
        ends = torch.cat([exact(teacher, part, None, fine) for part in x.split(512)])
    return Pairs(x.float(), None, ends.float())


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each problem, path and number of calls."""
    rows = []
    for problem in options.problems:
        for path in options.paths:
            teacher = teacher_named(problem, path_named(path))
            train, valid, held = (
                pairs(teacher, count, mix(options.seed, "search", name), options.fine)
                for name, count in (("train", options.train), ("valid", options.train // 2), ("held", options.starts))
            )
            for nfe in options.nfe:
                began = time.perf_counter()
                found = contest(
                    nfe,
                    Contest(
                        teacher, train, valid, held, Distance(teacher.std), how=options.how,
                        evolution=Evolution(budget=options.budget, first=min(128, options.train)),
                        fitting=Fitting(options.steps, options.batch, options.batch, options.rate), batch=512,
                    ),
                )  # fmt: skip
                seconds = time.perf_counter() - began

                def planned(model: Any, x: Any, *unused: Any, plan: SolverPlan = found.plan) -> Any:
                    return sample(model, x, plan)

                runs = {"diffusers " + k: v for k, v in diffusers_peers(path).items()} | k_diffusion_peers(path)
                runs |= {f"fewstep {k}": v for k, v in our_solvers().items()} | {"fewstep recommended": our_default}
                scores = {
                    name: outcome(run, teacher, held.x, nfe, None, 1.0, held.ends, teacher.std)
                    for name, run in {**runs, "plan": planned}.items()
                }
                scores = {name: score for name, score in scores.items() if "rms" in score}
                ours = scores.pop("plan")
                default = scores.pop("fewstep recommended")
                peer = min(scores, key=lambda name: scores[name]["rms"])
                bar = BARS[problem, path][NFES.index(nfe)] if (problem, path) in BARS and nfe in NFES else None
                row = {
                    "problem": problem, "path": path, "nfe": nfe, "plan": ours["rms"], "plan_median": ours["median"],
                    "recommended": default["rms"], "best_peer": peer, "peer": scores[peer]["rms"],
                    "peer_median": scores[peer]["median"], "bar": bar, "gain": scores[peer]["rms"] / ours["rms"],
                    "gain_on_bar": None if bar is None else bar / ours["rms"],
                    "wanted": WANTED.get((problem, nfe), 1.0),
                    "found_by": found.how, "seconds": seconds, "steps": json.loads(found.plan.model_dump_json()),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{problem:7}{path:7} nfe {nfe:3}  plan {row['plan']:.4f} (median {row['plan_median']:.4f})  "
                    f"recommended {row['recommended']:.4f}  best peer {row['peer']:.4f} {peer}  "
                    + (f"bar {bar:.4f} " if bar else "")
                    + f" gain {row['gain']:.2f} (wanted {row['wanted']:g})  {found.how} {seconds:.0f} s",
                    flush=True,
                )
    return rows


def digits(nfe: int, seeds: int, budget: int, starts: int, objective: str, searches: int) -> dict[str, Any]:
    """Fréchet distance to real test digits at ``nfe`` calls, over noise that no search has seen."""
    import tempfile

    from fewstep import jobs
    from fewstep.interop import load_teacher
    from fewstep.metrics.features import features_for
    from fewstep.metrics.frechet import Moments, frechet_distance
    from fewstep.tasks import task_named

    teacher, task = load_teacher("digits").denoiser, task_named("digits")
    features = features_for(task)
    real, labels = Moments.of(features(task.test.data)), task.test.cond

    def judged(name: str, plan: SolverPlan) -> float:
        found = []
        for seed in range(seeds):
            rng = torch.Generator().manual_seed(mix(seed, "unseen"))
            noise = torch.randn((len(labels), *task.shape), generator=rng) * teacher.path.t_max
            with torch.no_grad():
                parts = zip(noise.split(128), labels.split(128), strict=True)
                drawn = task.finish(torch.cat([sample(teacher, x, plan, cond=cond) for x, cond in parts]))
            found.append(float(frechet_distance(Moments.of(features(drawn)), real)))
        print(f"{name:22} Fréchet {statistics.mean(found):.4f} over {seeds} seeds", flush=True)
        return statistics.mean(found)

    rivals = fixed_samplers(teacher.path, nfe)
    scores = {name: judged(name, rivals[name]) for name in ("dpm2m karras", "recommended")}
    plans, times = list[float](), list[float]()
    for seed in range(searches):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "plan.json"
            found = jobs.search("digits", nfe, out=out, budget=budget, starts=starts, objective=objective, seed=seed)
            plan = SolverPlan.load(out)
        times.append(time.perf_counter() - began)
        print(f"search {seed}: {times[-1]:.0f} s, {found['line'].partition(': ')[2]}")
        plans.append(judged(f"plan of search {seed}", plan))
    gains = [scores["dpm2m karras"] / one for one in plans]
    print(
        f"digits, {nfe} calls, {searches} searches: {min(gains):.2f} (worst) and {statistics.median(gains):.2f} "
        f"(median) times below DPM-Solver++ 2M on the rho-7 grid (wanted 1.5), {max(times):.0f} s at most"
    )
    return {"scores": scores, "plans": plans, "gains": gains, "gain": min(gains), "seconds": times}


def toy(budget: int) -> dict[str, Any]:
    """A mixture of four in the plane: evolution over all decisions, and over the times of DDIM alone."""
    from fewstep.path import VariancePreserving
    from fewstep.teachers import Mixture

    angle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    law = Mixture([1.0] * 4, 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.25, path=VariancePreserving())

    def starts(seed: int) -> Pairs:
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(512, 2, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            return Pairs(x, None, exact(law, x, None, 200))

    train, fresh = starts(0), starts(1)
    made: dict[str, Any] = {}
    for nfe, only_levels in ((4, False), (5, False), (8, False), (4, True), (5, True)):
        rivals = fixed_samplers(law.path, nfe)
        if only_levels:
            rivals = {k: v for k, v in rivals.items() if k in ("euler uniform", "euler karras", "euler logsnr")}
            steps = tuple(StepPlan() for _ in range(nfe))
            rivals = {k: v.model_copy(update={"steps": steps}) for k, v in rivals.items()}
        else:
            rivals.pop("recommended")
        held, score = Judge(law, fresh, Distance(1.0), 512), Judge(law, train, Distance(1.0), 512)
        options = Evolution(budget=300 if only_levels else budget, starts=512, first=128)
        best = min(held(plan) for plan in rivals.values())
        found = evolve(PlanSpace(law.path, nfe, list(rivals.values()), only_levels=only_levels), score, options)
        now = held(found[0].genome)
        name = f"{'times of DDIM' if only_levels else 'all decisions'}, {nfe} calls"
        made[name] = {"fixed": best, "searched": now}
        print(
            f"{name}: best fixed {best:.4f}, searched {now:.4f} on fresh starts, {100 * (1 - now / best):.0f} % lower"
        )
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: the ring on one path, few starts")
    parser.add_argument("--problems", nargs="+", choices=("ring", "digits", "held"), default=["ring", "digits"])
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["vp", "edm"])
    parser.add_argument("--nfe", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--train", type=int, default=2048)
    parser.add_argument("--starts", type=int, default=1024, help="unseen ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", default="auto")
    parser.add_argument("--budget", type=int, help="candidates of the evolution [200; 300 with --digits]")
    parser.add_argument("--steps", type=int, default=400, help="of the gradient")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--fine", type=int, default=150, help="steps of the reference")
    parser.add_argument("--digits", action="store_true", help="the packaged teacher in place of exact ones")
    parser.add_argument("--objective", default="auto", help="with --digits")
    parser.add_argument("--searches", type=int, default=1, help="with --digits: searches, each with a seed of its own")
    parser.add_argument("--seeds", type=int, default=8, help="with --digits: draws that a figure is the mean of")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.budget is None:
        options.budget = 300 if options.digits else 200
    if options.quick:
        options.problems, options.paths, options.nfe = ["ring"], ["edm"], [5]
        options.train, options.starts, options.budget, options.steps, options.fine = 64, 32, 90, 20, 60
    if options.digits:
        result: Any = digits(
            options.nfe[0] if len(options.nfe) == 1 else 4, options.seeds, options.budget, 256, options.objective,
            options.searches,
        )  # fmt: skip
        bad = result["gain"] < 1.5
    elif options.toy:
        result, bad = toy(400), False
    else:
        result = cells(options)
        bad = not options.quick and any(row["gain"] < row["wanted"] for row in result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
