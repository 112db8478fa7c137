"""A task of prompts without data, measured in seconds: coloured 8x8 pictures that a teacher knows by heart."""

import torch

from fewstep.evaluate import Protocol
from fewstep.path import Exploding
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks import Split, Task
from fewstep.teachers import FiniteSet

PATH = Exploding(sigma_min=0.02, sigma_max=20.0)
QUICK = Protocol(
    noise_seeds=2, scout_seeds=1, nfes=(1,), solvers=("euler",), full_solver="euler", full_nfe=10,
    timing_rounds=0, batch=64, count=24,
)  # fmt: skip


class Spoken(Task):
    """Conditions and words, and not one picture."""

    name, value_range = "spoken", (-1.0, 1.0)

    def __init__(self, prompts=("a red boat", "a blue boat", "a green boat"), shape=(3, 8, 8)):
        self.prompts, self.shape = tuple(prompts), shape

    @property
    def train(self):
        return Split(torch.empty(0, *self.shape), torch.arange(len(self.prompts)))

    test = train


def painter(shape=(3, 8, 8), prompts=3, each=8):
    """A teacher that has ``each`` pictures for every prompt."""
    data = 0.5 * Rng(0, "pictures").normal((prompts * each, *shape)).tanh()
    return FiniteSet(data, labels=torch.arange(prompts).repeat_interleave(each), path=PATH)


class Equal(Student):
    """Gives exactly what the teacher's own sampler gives; or the same picture whatever the noise."""

    def __init__(self, teacher, shape, protocol=QUICK, collapsed=False, shift=0.0):
        super().__init__(teacher, shape)
        self.protocol, self.collapsed, self.shift = protocol, collapsed, shift

    def generate(self, noise, cond=None, rng=None, steps=1):
        from fewstep.evaluate.sampling import full_teacher

        noise = torch.full_like(noise, 0.3) if self.collapsed else noise
        return full_teacher(self.denoiser, self.protocol).draw(self.denoiser, noise, cond, rng) + self.shift
