"""Scale distillation on digits: does a teacher that sees 4x4 pixels help a student that sees 2x2?

    python benchmarks/scale.py --seeds 3 --steps 600
    python benchmarks/scale.py --settle          # choose on held-out training digits, never on the test half

Three ways to the same one-step network for x4, with equal updates: ``scale`` learns x2 from the data and then x4 from
itself; ``direct`` learns x4 from the data all along; ``x2, then data`` goes on from x2 with the clean sample as target.
PSNR is of one call on the test half; ``spread`` is the mean training loss over the last tenth of the second part, as a
share of that of ``x2, then data``: how much the targets spread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch

from fewstep import jobs
from fewstep.jobs.training import _learn
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks import task_named
from fewstep.train.recipe import Recipe, load_recipe
from fewstep.train.trainer import Nobody

WAYS = {
    "scale": ["method.options.reads=x2"],
    "direct": ["method.options.reads=low"],
    "x2, then data": ["method.options.reads=x2"],
}


def recipe_of(way: str, steps: int, seed: int, held: int, changes: list[str]) -> Recipe:
    """The shipped recipe with the second part that this way has."""
    base = load_recipe(
        "digits_scale", [f"steps={steps}", f"seed={seed}", "evaluate.enabled=false", *WAYS[way], *changes]
    )
    method = base.stages[0].method
    if way != "scale":
        method = method.model_copy(update={"options": {k: v for k, v in method.options.items() if k != "better"}})
    stage = base.stages[0].model_copy(update={"steps": steps, "method": method})
    options = {**base.task.options, "of_options": {"hold_out": held}} if held else base.task.options
    return base.model_copy(
        update={"stages": (stage,), "task": base.task.model_copy(update={"options": options}), "name": "scale"}
    )


def psnr(student: Student, recipe: Recipe) -> float:
    """Of one call, over all pictures that are measured against."""
    test = task_named(recipe.task.name, recipe.task.options).test
    noise = Rng(0, "benchmark").normal(tuple(test.data.shape))
    with torch.no_grad():
        made = student.generate(noise, test.cond).clamp(-1, 1)
    return -10 * math.log10((made - test.data).square().mean().item() / 4)


def spread(folder: Path, steps: int) -> float:
    """The second part's loss over its last tenth."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line["student/scale"] for line in lines if line.get("stage") == 1 and line["step"] > 0.9 * steps]
    return statistics.mean(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="updates of each of the two parts")
    parser.add_argument("--settle", action="store_true", help="measure on 198 training digits that are held out")
    parser.add_argument("--set", action="append", default=[], help="a change to the recipe, key=value")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    held = 198 if given.settle else 0
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        table: dict[str, list[float]] = {way: [] for way in WAYS}
        spreads: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(given.seeds):
            for way in WAYS:
                recipe = recipe_of(way, given.steps, seed, held, given.set)
                place = out / f"{way.replace(', ', '_').replace(' ', '_')}_{seed}"
                setting = jobs.prepare(recipe, place, "cpu", Nobody())
                student, _ = _learn(recipe, place, setting, False, "cpu", Nobody(), "train")
                table[way].append(psnr(student, recipe))
                spreads[way].append(spread(place, given.steps))
                print(f"seed {seed} {way}: {table[way][-1]:.3f} dB, loss {spreads[way][-1]:.4f}", flush=True)
    print("\n| way | PSNR | gain | spread |\n|---|---|---|---|")
    for way in WAYS:
        gain = statistics.median(a - b for a, b in zip(table[way], table["direct"], strict=True))
        share = statistics.median(a / b for a, b in zip(spreads[way], spreads["x2, then data"], strict=True))
        print(f"| {way} | {statistics.median(table[way]):.2f} | {gain:+.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
