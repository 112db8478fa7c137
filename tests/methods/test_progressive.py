import pytest
import torch
from games import Nudged, batch_of, gradients, mlp, play, stream
from laws import gaussian, mixture, seeded

from fewstep.denoiser import Denoiser
from fewstep.grid import grid
from fewstep.losses import squared_error
from fewstep.methods.progressive import Progressive, ProgressiveOptions, jump_guess, round_weight
from fewstep.path import Exploding, Straight, Trigonometric, VariancePreserving
from fewstep.rng import Rng
from fewstep.solvers import Euler, sample
from fewstep.student import Student

PATHS = [Straight(), Trigonometric(), Exploding(sigma_min=0.02, sigma_max=20.0), VariancePreserving()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)


class Doubled(Denoiser):
    """Two steps of a denoiser between the points of a grid, as the guess of one: what a round teaches at its best."""

    def __init__(self, inner, times):
        super().__init__()
        self.inner, self.path, self.times = inner, inner.path, times

    def forward(self, x, t, cond=None, want="x0", s=None):
        path, inner = self.path, self.inner
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        at = (t[:, None] - self.times[:, None].T.to(x)).abs().argmin(1)
        m, s = (self.times.to(x)[at + k] for k in (1, 2))
        x_m = path.move(x, inner(x, t, None, path.slope), t, m)
        x_s = path.move(x_m, inner(x_m, m, None, path.slope), m, s)
        return path.convert(jump_guess(path, x, x_s, t, s), x, t, "x0", want)


def rounds(law, finest=8, kind="karras"):
    """Each round's (teacher, its best student, options), until one step is left."""
    teacher, steps = law, finest // 2
    while steps:
        options = ProgressiveOptions(steps=steps, finest=finest, grid=kind)
        student = Doubled(teacher, grid(law.path, finest, kind)[:: finest // steps // 2])
        yield teacher, student, options
        teacher, steps = student, steps // 2


@every_path
def test_every_round_rests_at_two_steps_of_its_teacher_and_the_last_gives_the_first_ones_samples(path):
    law = gaussian(path=path)
    batch = batch_of(64, dtype=torch.float64)
    z = torch.randn(32, 2, generator=seeded(0), dtype=torch.float64)
    for teacher, student, options in rounds(law):
        one = Student(student, (2,), **Progressive.student_options(options, path))
        assert Progressive(teacher, one, options).loss("student", batch, Rng(0)).total < 1e-18
        lazy = Student(teacher, (2,), **Progressive.student_options(options, path))
        assert Progressive(teacher, lazy, options).loss("student", batch, Rng(0)).total > 1e-7, "one step is not two"
    scale = float(path.coefs(path.t_max).sigma)
    ends = sample(law, scale * z, grid(path, 8), Euler())
    assert one.steps.keys() == {1}
    assert torch.allclose(one.generate(z), ends, atol=1e-9)


def test_the_target_on_a_gaussian_is_the_product_of_two_steps_multipliers():
    """N(0, l) in one dimension on the straight path: a step multiplies x by ``1 + (s - t) c(t)``,
    ``c(t) = (t - (1 - t) l) / ((1 - t)^2 l + t^2)``."""
    l = 0.25
    options = ProgressiveOptions(steps=2, finest=4, grid="uniform", weight="none")

    def c(t):
        return (t - (1 - t) * l) / ((1 - t) ** 2 * l + t**2)

    law = gaussian(mean=(0.0,), std=(l**0.5,))
    batch = batch_of(6, (1,), dtype=torch.float64)
    t0, m0, s0 = 1.0, 0.75, 0.5  # the first of the two steps
    factor = (1 + (m0 - t0) * c(t0)) * (1 + (s0 - m0) * c(m0))
    student = Student(Nudged(law, size=1), (1,), **Progressive.student_options(options, law.path))
    method = Progressive(law, student, options)
    found = method.loss("student", batch, Pick(0)).total
    x_t = batch.noise
    target = x_t + t0 * (factor - 1) * x_t / (t0 - s0)  # x0 = x_t - t v, x_s = x_t + (s - t) v
    assert found.item() == pytest.approx((student(x_t, t0, s0, None, "x0") - target).square().mean().item(), rel=1e-6)
    assert method.ends.tolist() == [[1.0, 0.5], [0.75, 0.25], [0.5, 0.0]]


class Pick(Rng):
    """Always the same step."""

    def __init__(self, step):
        super().__init__("pick")
        self.step = step

    def integers(self, high, count):
        return torch.full((count,), self.step)


@every_path
def test_the_guess_of_a_jump_is_the_papers_quotient(path):
    x_t, x_s = torch.randn(2, 5, 3, generator=seeded(0), dtype=torch.float64)
    t, s = (torch.full((5,), part * path.t_max, dtype=torch.float64) for part in (0.7, 0.3))
    here, there = path.at(t, x_t), path.at(s, x_t)
    ratio = there.sigma / here.sigma
    wanted = (x_s - ratio * x_t) / (there.alpha - ratio * here.alpha)
    assert torch.allclose(jump_guess(path, x_t, x_s, t, s), wanted, atol=1e-9)


def test_weights_are_the_papers():
    path = Trigonometric()
    t = torch.tensor([0.3, 1.2], dtype=torch.float64)
    snr = 1 / t.tan() ** 2
    assert torch.allclose(round_weight("truncated_snr", path, t), snr.clamp(min=1))
    assert torch.allclose(round_weight("snr", path, t), snr)
    assert round_weight("none", path, t).tolist() == [1, 1]
    x_t, guess, target = torch.randn(3, 2, 4, generator=seeded(0), dtype=torch.float64)
    v = [path.convert(x0, x_t, t, "x0", "v") for x0 in (guess, target)]
    assert torch.allclose(round_weight("snr_plus_one", path, t) * squared_error(guess, target), squared_error(*v))


def test_the_teacher_gets_no_gradient():
    teacher, student = Nudged(gaussian(), size=2), Student(mlp(dtype=torch.float64), (2,))
    method = Progressive(teacher, student)
    teacher.requires_grad_(True)
    loss = method.loss("student", batch_of(4, dtype=torch.float64), Rng(0)).total
    assert not torch.autograd.grad(loss, teacher.matrix, allow_unused=True, retain_graph=True)[0]
    assert any(g.abs().max() > 0 for g in gradients(loss, student).values())


def test_steps_that_do_not_halve_are_refused():
    for steps, finest in ((3, 8), (8, 8), (1, 6)):
        with pytest.raises(ValueError, match=f"finest = {finest} is not steps = {steps} times 2, 4, 8"):
            ProgressiveOptions(steps=steps, finest=finest)


def test_a_short_run_takes_two_steps_of_a_mixture_in_one():
    law, path = mixture(), Straight()
    options = ProgressiveOptions(steps=4, finest=8, grid="uniform")
    student = Student(mlp(width=64, prediction="velocity"), (2,), **Progressive.student_options(options, path))
    z = torch.randn(2000, 2, generator=seeded(0))

    def gap():
        return (student.generate(z, steps=4) - sample(law, z, grid(path, 8, "uniform"), Euler())).square().mean().sqrt()

    before = gap()
    play(Progressive(law, student, options), stream(law, 128), 400, rate=6e-3)
    ddim = sample(law, z, grid(path, 4, "uniform"), Euler())
    own = (ddim - sample(law, z, grid(path, 8, "uniform"), Euler())).square().mean().sqrt()
    assert gap() < min(0.2 * before, 0.7 * own)
