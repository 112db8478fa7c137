"""A training method of your own, in one file.

Used from the command line, without any change to the package:

    fewstep distill examples/mixture.toml --method examples/04_my_method.py:MyMethod

or as a script, which trains for a few seconds and prints what it reached:

    python examples/04_my_method.py
"""

import torch
from pydantic import Field
from torch import Tensor

from fewstep.method import Batch, Loss, Method
from fewstep.part import Part
from fewstep.registry import method
from fewstep.rng import Source


class MyOptions(Part):
    label_scale: float = Field(4.0, gt=0, description="how far apart two labels lie, in units of the data")
    start: float | None = Field(None, gt=0, description="time of the single step; None: the path's end")


def apart(a: Tensor, b: Tensor) -> Tensor:
    """The mean distance of each row of a to the rows of b: [batch]."""
    return torch.sqrt((a[:, None] - b).square().sum(2) + 1e-12).mean(1)


@method("energy")
class MyMethod(Method):
    """Energy distance between a batch of one-step samples and a batch of data; no teacher.

    ``2 E|x - y| - E|x - x'| - E|y - y'|`` is zero only where both laws agree (Szekely & Rizzo 2013). Rows
    are samples with their label beside them, so that it is the joint law that is matched. The last term does not
    depend on the student and is left out.
    """

    Options = MyOptions
    needs_teacher = False

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        student = self.student
        x = student(student.start_scale * batch.noise, student.start, student.path.t_min, batch.cond)
        fake, real = self.joint(x, batch), self.joint(batch.data, batch)
        others = len(fake) / max(len(fake) - 1, 1)  # a sample is no peer of itself: unbiased
        return Loss.mean({"energy": 2 * apart(fake, real) - others * apart(fake, fake)})

    def joint(self, x: Tensor, batch: Batch) -> Tensor:
        flat = x.flatten(1)
        if not isinstance(batch.cond, Tensor) or self.student.classes is None:
            return flat
        label = torch.nn.functional.one_hot(batch.cond, self.student.classes)
        return torch.cat([flat, self.options.label_scale * label.to(flat)], 1)

    @classmethod
    def student_options(cls, options: MyOptions, path: object) -> dict[str, float | None]:
        return {"start": options.start}


def main() -> None:
    import tempfile
    from pathlib import Path as File

    from fewstep.metrics import Sample, metric_named
    from fewstep.tasks import task_named
    from fewstep.train import Trainer, load_recipe
    from fewstep.train.build import make_student, method_options

    torch.set_num_threads(1)
    torch.manual_seed(0)
    changes = ["steps=300", "batch=128", f'method={{ name = "{__file__}:MyMethod" }}']
    recipe = load_recipe(File(__file__).with_name("mixture.toml"), changes)
    task = task_named(recipe.task.name, recipe.task.options)
    student = make_student(recipe, task, None, task.shape)
    game = MyMethod(None, student, method_options(recipe.method, recipe, task))
    with tempfile.TemporaryDirectory() as folder:
        student = Trainer(recipe, File(folder)).fit(game, task)
    noise = torch.randn(len(task.test), *task.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        fake = Sample(student.generate(noise, task.test.cond))
    value = metric_named("sliced")(fake, Sample(task.test.data), torch.Generator().manual_seed(2)).value
    print(f"sliced Wasserstein distance of one-step samples to real data: {value:.3f}  (promised: at most 0.3)")


if __name__ == "__main__":
    main()
