"""Our samplers in a diffusers pipeline: one line changes the sampler, the pipeline stays as it is.

    python examples/06_scheduler.py

The packaged digits teacher runs in its stock pipeline. Each line below puts a ``FewstepScheduler`` in the place of the
pipeline's scheduler and asks for eight calls of the network; what is printed is the distance to a fine solution from
the same noise, and the calls that were counted.
"""

import importlib.util
from pathlib import Path

import torch
from diffusers import ConsistencyModelPipeline

from fewstep.interop.scheduler import FewstepScheduler

torch.set_num_threads(1)
package = importlib.util.find_spec("fewstep")
assert package is not None and package.origin is not None
pipe = ConsistencyModelPipeline.from_pretrained(str(Path(package.origin).parent / "assets" / "digits_teacher"))
pipe.set_progress_bar_config(disable=True)
settings = pipe.scheduler.config
calls = 0


def count(*_: object) -> None:
    global calls
    calls += 1


pipe.unet.register_forward_hook(count)


def draw(steps: int, **options: object) -> torch.Tensor:
    global calls
    calls = 0
    pipe.scheduler = FewstepScheduler.from_config(settings, **options)
    labels = [k % 10 for k in range(40)]
    noise = torch.manual_seed(0)
    return pipe(40, class_labels=labels, num_inference_steps=steps, generator=noise, output_type="pt").images


fine = draw(48, solver="dpm3m", grid="logsnr")
error = {}
for solver, grid in (("euler", "logsnr"), ("dpm2m", "logsnr"), ("unipc3", "logsnr"), ("recommended", None)):
    images = draw(8, solver=solver, grid=grid)
    error[solver] = float((images - fine).square().mean().sqrt())
    print(f"{solver:>11} {'on ' + grid if grid else '':<9} {calls} calls, distance {error[solver]:.4f}")

ratio = error["euler"] / error["recommended"]
print(f"\nthe recommended plan is nearer than Euler by a factor of {ratio:.2f}  (promised: at least 3)")
