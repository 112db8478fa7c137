"""Sample a law whose denoiser is known in closed form, under three solvers. Needs the light core alone.

Because the denoiser is exact, what is left is the error of the solver itself: its distance to a very fine
solution from the same noise. One network call is one call whoever makes it, so solvers are compared at equal calls.

    python examples/01_exact_law.py
"""

import math

import torch
from torch import Tensor

from fewstep.grid import grid
from fewstep.path import Exploding
from fewstep.solvers import sample, solver_named, start_noise
from fewstep.teachers import Mixture

torch.set_num_threads(1)
angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
ring = 2 * torch.stack([angle.cos(), angle.sin()], 1)
law = Mixture(weights=[1.0] * 8, means=ring, std=0.3, path=Exploding(sigma_min=0.02, sigma_max=20.0))

noise = torch.randn(512, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def draw(solver: str, steps: int) -> Tensor:
    times = grid(law.path, steps, "karras")
    return sample(law, start_noise(law.path, float(times[0]), noise), times, solver_named(solver))


fine = draw("heun", 256)
error = {}
print(f"{'calls':>5} {'euler':>8} {'heun':>8} {'dpm2m':>8}   (root mean squared distance to the fine solution)")
for calls in (9, 17, 33):
    for solver in ("euler", "heun", "dpm2m"):
        steps = solver_named(solver).steps_for(calls)
        error[solver, calls] = float((draw(solver, steps) - fine).square().mean().sqrt())
    print(f"{calls:>5} " + " ".join(f"{error[solver, calls]:8.4f}" for solver in ("euler", "heun", "dpm2m")))

ratio = error["euler", 33] / error["dpm2m", 33]
print(f"\nat 33 calls DPM-Solver++ 2M is nearer than Euler by a factor of {ratio:.2f}  (promised: at least 5)")
