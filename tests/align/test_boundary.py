"""One start for a task: what is chosen on some inputs serves others, and never by being short."""

import math

import pytest
import torch
from games import affine_student, mlp
from laws import seeded

from fewstep.align import StartOptions, choose_start
from fewstep.align.noise import on_shell
from fewstep.denoiser import Denoiser
from fewstep.errors import Refused
from fewstep.grid import grid
from fewstep.path import Straight
from fewstep.solvers import Euler, sample
from fewstep.student import Student
from fewstep.teachers import Gaussian


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def squares(x, reference):
    return (x - reference).square().flatten(1).mean(1)


def edges(x, reference):
    """L1 of both gradients of the pictures: where lines are, whatever the grey."""
    gap = (x - reference).view(-1, 8, 8)
    return gap.diff(dim=1).abs().mean((1, 2)) + gap.diff(dim=2).abs().mean((1, 2))


class Upscaled(Denoiser):
    """Digits of 8x8 from 4x4: a Gaussian law of digits, conditioned on block means seen under a little noise.

    Posterior N(m + K (y - A m), C - K A C), K = C A^T (A C A^T + s^2)^-1.
    """

    def __init__(self, digits, noise=0.05):
        super().__init__()
        self.path = Straight()
        self.mean, cov = digits.mean(0), digits.T.cov() + 1e-4 * torch.eye(64)
        eye = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
        self.blocks = torch.nn.functional.avg_pool2d(eye, 2).view(64, 16).T  # A: 16 means of 2x2
        seen = self.blocks @ cov @ self.blocks.T + noise**2 * torch.eye(16)
        self.gain = cov @ self.blocks.T @ torch.linalg.inv(seen)
        rest = cov - self.gain @ self.blocks @ cov
        self.rest = Gaussian(torch.zeros(64), covariance=(rest + rest.T) / 2, path=self.path)

    def forward(self, x, t, cond=None, want="x0", s=None):
        middle = self.mean + (cond - self.blocks @ self.mean) @ self.gain.T
        alpha = self.path.at(t, x).alpha
        return self.path.convert(middle + self.rest(x - alpha * middle, t), x, t, "x0", want)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [squares, edges])
def test_the_start_chosen_on_fifty_digits_is_among_the_best_tenth_on_hundreds_of_others(distance):
    pytest.importorskip("sklearn")
    from fewstep.tasks import task_named

    task = task_named("digits")
    law, others = Upscaled(task.train.data.flatten(1).double()), task.test.data.flatten(1).double()
    small = others @ law.blocks.T
    times = grid(law.path, 4, "uniform")

    def generate(noise, cond):  # four DDIM steps
        return sample(law, noise, times, Euler(), cond=cond)

    options = StartOptions(candidates=200, batch=10_000)
    start = choose_start(
        generate, small[:50], others[:50], distance, options, rng=seeded(1), held_out=(small[50:500], others[50:500])
    )
    assert start.noise.norm().item() == pytest.approx(8.0)
    assert start.correlation >= 0.5
    assert start.rank <= 0.1
    assert start.gain > 0.05
    assert start.loss == start.losses.min()
    mine = distance(generate(start.repeat(450), small[50:500]), others[50:500]).mean()
    assert mine.item() == pytest.approx(start.held_out)


def test_the_loss_of_a_candidate_is_its_mean_distance_over_the_reference_pairs_in_pieces_of_any_size():
    student = affine_student(draw(3, 3, seed=3), draw(3, seed=4), Straight()).requires_grad_(False)
    goal = draw(6, 3, seed=5)
    found = [
        choose_start(student, None, goal, squares, StartOptions(candidates=9, batch=b), rng=seeded(0))
        for b in (1, 7, 99)
    ]
    noises = on_shell(draw(9, 3))
    by_hand = torch.stack([squares(student.generate(z.expand(5, 3)), goal[:5]).mean() for z in noises])
    for start in found:
        assert torch.allclose(start.losses, by_hand)
        assert torch.equal(start.noise[0], noises[by_hand.argmin()])
        last = squares(student.generate(start.noise), goal[5:]).item()
        assert start.held_out == pytest.approx(last)
        assert start.gain == pytest.approx(1 - last / squares(student.generate(noises), goal[5:].expand(9, 3)).mean())


def test_a_short_noise_cannot_win_by_being_short():
    # the answer is the mean, so the squared error falls with the length alone
    start = choose_start(lambda z, c: z, None, torch.zeros(20, 5).double(), squares, rng=seeded(0))
    assert torch.allclose(start.losses, torch.ones(1000).double())


def test_rounds_of_local_moves_go_on_from_the_best_and_stay_on_the_shell():
    goal = draw(1, 12, seed=9).expand(10, 12)
    plain = choose_start(lambda z, c: z, None, goal, squares, StartOptions(candidates=50), rng=seeded(0))
    finer = choose_start(lambda z, c: z, None, goal, squares, StartOptions(candidates=50, rounds=6), rng=seeded(0))
    assert torch.equal(plain.losses, finer.losses)
    assert finer.loss < 0.6 * plain.loss
    assert finer.held_out == pytest.approx(finer.loss)
    assert finer.noise.norm().item() == pytest.approx(math.sqrt(12))


def test_where_a_start_decides_nothing_that_is_told():
    with pytest.raises(Refused, match="another sample each time"):
        choose_start(lambda z, c: z + torch.randn(z.shape), None, draw(9, 3), squares, rng=seeded(0))
    student = Student(mlp(), (2,), steps={1: (1.0,), 2: (1.0, 0.5)}, policy="renoise")
    with pytest.raises(Refused, match="renoises between its 2 steps"):
        choose_start(student, None, draw(9, 2), squares, rng=seeded(0), steps=2)


def test_progress_counts_every_row_and_bad_requests_are_named():
    heard = []
    options = StartOptions(candidates=5, rounds=2, parents=2, moves=3, batch=4)
    choose_start(lambda z, c: z, None, draw(10, 3), squares, options, rng=seeded(0), watch=lambda *a: heard.append(a))
    assert heard[-1] == (17 * 8 + 6 * 2,) * 2
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    with pytest.raises(Refused, match=r"one number a row, \[1024\], got \[\]"):
        choose_start(lambda z, c: z, None, draw(10, 3), lambda x, y: x.sum(), rng=seeded(0))
    with pytest.raises(Refused, match="at least 2"):
        choose_start(lambda z, c: z, None, draw(1, 3), squares, rng=seeded(0))
    with pytest.raises(Refused, match="3 conditions for 10 references"):
        choose_start(lambda z, c: z, draw(3, 1), draw(10, 3), squares, rng=seeded(0))
