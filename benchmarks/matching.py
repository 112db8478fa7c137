"""Every row of distribution matching on the mixture with four uneven modes: what it reaches on equal terms.

    python benchmarks/matching.py [--seeds 3] [--steps 300] [--rows sim tdm] [--json table.json]

The teacher is the exact law; student and critic are small networks with fresh weights, trained by the ordinary trainer.
Sliced Wasserstein-2, total variation of the modes' shares, and the share of samples further than 4 std from every mode,
beside two samples of the law itself.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import jobs
from fewstep.jobs.training import _learn
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks import task_named
from fewstep.train.recipe import Recipe, recipe_from
from fewstep.train.trainer import Nobody

TASK = {
    "name": "mixture",
    "options": {"modes": 4, "std": 0.25, "weights": [0.4, 0.3, 0.2, 0.1], "train_count": 20000, "test_count": 100},
}
LEVELS = {"kind": "log_normal", "mean": -0.5, "std": 1.5}
GAN = {"width": 32}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd2": ("dmd2", {}),
    "dmd2, adversary": ("dmd2", {"gan": GAN}),
    "dmd2, one critic turn": ("dmd2", {"critic_turns": 1}),
    "ikl": ("ikl", {}),
    "swiftbrush": ("swiftbrush", {"guidance": 1.0, "guide_critic": False, "critic_lora": "off"}),
    "f_distill, forward KL": ("f_distill", {"divergence": "forward_kl", "gan": GAN}),
    "f_distill, forward KL, bins": ("f_distill", {"divergence": "forward_kl", "gan": GAN, "ratio_bins": 10}),
    "f_distill, Jensen-Shannon": ("f_distill", {"gan": GAN}),
    "sim": ("sim", {}),
    "sid": ("sid", {"fisher_a": 1.0}),
    "uni_instruct": ("uni_instruct", {}),
    "disback": ("disback", {"backtrack": {"states": 2, "every": 100, "interval": 50}}),
    "dmd2, 4 steps": ("dmd2", {"steps": 4}),
    "tdm, 4 steps": ("tdm", {}),
    "phased_dmd, 4 steps": ("phased_dmd", {}),
}


def recipe(row: str, steps: int, batch: int, seed: int) -> Recipe:
    name, options = ROWS[row]
    options = {"critic_turns": 3, "levels": LEVELS, "critic_levels": LEVELS, **options}
    optim = {"kind": "adam", "lr": 1e-3, "betas": [0.0, 0.99], "clip": 10.0}
    critic = {**optim, "lr": 2e-3}
    data: dict[str, Any] = {
        "steps": steps, "batch": batch, "seed": seed, "task": TASK, "teacher": {"source": "law"},
        "student": {
            "net": {"kind": "mlp", "width": 128, "depth": 3}, "prediction": "cm", "clock": "250 log_sigma",
            "path": {"kind": "exploding", "sigma_min": 0.02, "sigma_max": 20.0}, "scale_input": True,
        },
        "method": {"name": name, "options": options},
        "optim": {**optim, "players": {"critic": critic}},
        "schedule": {"flat": 0.3}, "ema": {"decay": 0.99}, "log": {"every": steps, "probe": steps},
        "checkpoint": {"every": steps},
    }  # fmt: skip
    if name == "phased_dmd":  # the same number of updates in all
        data["steps"] = steps // 2
        data["stages"] = [{"steps": steps - steps // 2, "method": {"name": name, "options": {**options, "phase": 2}}}]
    return recipe_from(data)


def trained(row: str, steps: int, batch: int, seed: int) -> Student:
    made = recipe(row, steps, batch, seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        return _learn(made, run, jobs.prepare(made, run, "cpu", Nobody()), False, "cpu", Nobody(), "train")[0]


def sliced(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """Sliced Wasserstein-2 of two samples of one size in the plane."""
    angle = math.pi * (torch.arange(directions, dtype=a.dtype) + 0.5) / directions
    lines = torch.stack([angle.cos(), angle.sin()])
    return ((a @ lines).sort(0).values - (b @ lines).sort(0).values).square().mean().sqrt().item()


def measured(x: Tensor, real: Tensor, law: Any) -> dict[str, float]:
    near = torch.cdist(x, law.mean.to(x))
    share = torch.bincount(near.argmin(1), minlength=len(law.weight)) / len(x)
    return {
        "sliced_w2": sliced(x, real),
        "mode_tv": (share - law.weight.to(share)).abs().sum().item() / 2,
        "off_mode": (near.min(1).values > 4 * law.variance.max().sqrt()).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--json", type=Path, help="write what was measured here, row by row, and go on from it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    law = task_named("mixture", TASK["options"]).law  # type: ignore[arg-type]
    assert law is not None
    real, other = (law.sample(8192, Rng(0, name), dtype=torch.float32) for name in ("real", "other"))
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    print(f"{options.steps} updates, batch {options.batch}, {options.seeds} seed(s): median (lowest-highest)")
    print("| row | sliced W2 | total variation of modes | off mode | processor seconds |\n|---|---|---|---|---|")
    floor = measured(other, real, law)
    print(f"| the law against itself | {' | '.join(f'{v:.3f}' for v in floor.values())} | |")
    for row in options.rows:
        results = found.setdefault(row, [])
        for seed in range(len(results), options.seeds):
            began = time.process_time()
            student = trained(row, options.steps, options.batch, seed)
            spent = time.process_time() - began
            noise = Rng(1, "noise", seed).normal((8192, 2))
            x = student.generate(noise, rng=Rng(1, "steps", seed), steps=max(student.steps))
            results.append({**measured(x, real, law), "seconds": spent})
            if options.json:
                options.json.write_text(json.dumps(found))
        cells = []
        for key in ("sliced_w2", "mode_tv", "off_mode", "seconds"):
            values = torch.tensor([result[key] for result in results])
            digits = 0 if key == "seconds" else 3
            text = f"{values.median():.{digits}f}"
            if len(values) > 1 and digits:
                text += f" ({values.min():.{digits}f}-{values.max():.{digits}f})"
            cells.append(text)
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
