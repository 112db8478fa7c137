"""A task that is measured in a second: a Gaussian with two labels, and networks that tell what they saw."""

import torch

from fewstep.denoiser import Denoiser
from fewstep.evaluate import Protocol
from fewstep.path import Exploding
from fewstep.student import Student
from fewstep.tasks import task_named
from fewstep.teachers import FiniteSet

PATH = Exploding(sigma_min=0.02, sigma_max=20.0)
FAST = Protocol(
    noise_seeds=3, scout_seeds=2, detail_seeds=2, nfes=(1, 2, 3), full_nfe=9, timing_rounds=1, timing_batch=16, batch=50
)


def mixture(**options):
    return task_named("mixture", {"modes": 2, "classes": 2, "test_count": 120, "train_count": 300, **options})


class Heard(Denoiser):
    """Passes everything on and keeps the noise and the labels of first calls."""

    def __init__(self, inner):
        super().__init__()
        self.inside = [inner]  # not a submodule: the counter stands in front of this one
        self.path, self.first, self.calls = inner.path, [], 0

    def forward(self, x, t, cond=None, want="x0", s=None):
        self.calls += 1
        if t == self.path.t_max:
            self.first.append((x / self.path.t_max, cond))
        return self.inside[0](x, t, cond, want, s)


def flawed(task, shift=0.0):
    """A student that samples the law itself (one component a label), ``shift`` to the side."""
    from laws import ExactMap

    class Shifted(ExactMap):
        def forward(self, x, t, cond=None, want="x0", s=None):
            return super().forward(x, t, cond, want, s) + shift

    return Student(Shifted(task.law_on(PATH)), task.shape)


def memory(task):
    """A teacher that knows the training samples by heart."""
    return FiniteSet(task.train.data, labels=task.train.cond, path=PATH)


def teacher(task):
    return task.law_on(PATH)


def row(report, model, nfe=None):
    found = [r for r in report.rows if r.model == model and nfe in (None, r.nfe)]
    assert len(found) == 1, [r.model for r in report.rows]
    return found[0]


def seeded(seed):
    return torch.Generator().manual_seed(seed)
