"""What a game says of itself is true: against closed forms, with critics whose error is known."""

import math

import pytest
import torch
from games import affine_student, batch_of, mlp
from laws import PATHS, noise_batch

from fewstep.denoiser import Denoiser
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.families.diagnosis import NEAR, _posterior, diagnose
from fewstep.methods.families.score_gap import GanOptions
from fewstep.methods.score_gap import TDM, TDMOptions
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import Gaussian, Mixture

PATH = PATHS["exploding"]
MATRIX = torch.tensor([[0.8, 0.1], [0.0, 0.6]], dtype=torch.float64)
OFFSET = torch.tensor([0.3, -0.2], dtype=torch.float64)
MEAN, STD = torch.tensor([0.7, 0.1], dtype=torch.float64), torch.tensor([1.0, 0.7], dtype=torch.float64)
LAMS = torch.linspace(-4.0, 4.0, 65, dtype=torch.float64)


class Between(Denoiser):
    """A critic on the way from the teacher (0) to the student's law (1)."""

    def __init__(self, teacher, law, share):
        super().__init__()
        self.teacher, self.law, self.share, self.path = teacher, law, share, teacher.path

    def forward(self, x, t, cond=None, want="x0", s=None):
        guess = torch.lerp(self.teacher(x, t), self.law(x, t), self.share)
        return self.path.convert(guess, x, t, "x0", want)


def game(share=1.0):
    teacher, student = Gaussian(MEAN, STD, path=PATH), affine_student(MATRIX, OFFSET, PATH)
    law = student.denoiser.law()
    return DMD2(teacher, student, DMD2Options(), critic=Between(teacher, law, share)), law


def kl(sigma):
    """KL of student and teacher, both noised by sigma."""
    p = MATRIX @ MATRIX.T + sigma**2 * torch.eye(2, dtype=torch.float64)
    q = torch.diag(STD**2) + sigma**2 * torch.eye(2, dtype=torch.float64)
    off = OFFSET - MEAN
    whole = torch.trace(torch.linalg.solve(q, p)) + off @ torch.linalg.solve(q, off) - 2 + torch.logdet(q)
    return float(whole - torch.logdet(p)) / 2


def test_the_area_under_the_squared_gap_is_the_divergence():
    method, law = game()
    found = diagnose(method, noise_batch(4096, 2), Rng(0), lams=LAMS, law=law)
    assert found["kl"] == pytest.approx(kl(math.exp(-4)) - kl(math.exp(4)), rel=0.02)


def test_the_gap_of_two_gaussians_is_the_closed_form():
    method, law = game()
    (level,) = diagnose(method, noise_batch(8192, 2), Rng(0), lams=LAMS[32:33], law=law)["levels"]  # sigma = 1
    p = MATRIX @ MATRIX.T + torch.eye(2, dtype=torch.float64)
    q = torch.diag(STD**2) + torch.eye(2, dtype=torch.float64)
    turn = torch.linalg.inv(q) - torch.linalg.inv(p)  # score gap = turn x + shift
    off = torch.linalg.solve(q, OFFSET - MEAN)
    square = torch.trace(turn @ p @ turn.T) + off @ off
    assert level["gap"] == pytest.approx(math.sqrt(square / 2), rel=0.03)


@pytest.mark.parametrize("share", [1.0, 0.5, 2.0])
def test_the_critics_own_share_of_the_gap_is_found_without_knowing_the_optimum(share):
    """At ``share`` of the way its error is (share - 1) / share of what it shows."""
    method, law = game(share)
    for level in diagnose(method, noise_batch(8192, 2), Rng(0), lams=LAMS[:33:16], law=law)["levels"]:
        assert abs(level["behind"] - (share - 1) / share) < 4 * level["behind_error"]
        assert level["behind_error"] < 0.1


def test_the_lag_is_the_distance_to_the_exact_score_and_many_samples_stand_in_for_it():
    method, law = game(0.5)
    exact = diagnose(method, noise_batch(512, 2), Rng(0), lams=LAMS[:33:16], law=law)["levels"]
    near = diagnose(method, noise_batch(512, 2), Rng(0), lams=LAMS[:33:16])["levels"]
    for a, b in zip(exact, near, strict=True):
        assert a["lag"] == pytest.approx(a["gap"], rel=1e-6)  # half way: the error is as large as the gap it shows
        assert b["lag"] == pytest.approx(a["lag"], rel=0.15)


def test_a_posterior_mean_of_few_samples_is_not_said():
    law = Mixture([0.5, 0.5], [[-1.0], [1.0]], 0.1, path=PATH)
    points = law.sample(2048, Rng(0))
    x = law.sample(256, Rng(1))
    at = PATH.corrupt(x, 0.3, Rng(2).normal((256, 1), torch.float64))
    mean, error = _posterior(points, at, 1.0, 0.3)
    assert float((mean - law(at, 0.3)).square().mean()) < 3 * float(error.mean()) + 1e-6
    assert _posterior(points[: int(NEAR) // 2], at, 1.0, 0.3) is None


def test_it_leaves_the_game_and_its_draws_as_they_were():
    teacher = mlp(PATH, classes=3)
    options = DMD2Options(gan=GanOptions())
    method = DMD2(teacher, Student(mlp(PATH, classes=3, seed=1), (2,), classes=3), options).train()
    batch = batch_of(32, classes=3)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = method.diagnose(batch, Rng(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert method.student.training and method.critic.training and not method.teacher.training
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert found == method.diagnose(batch, Rng(0))


def test_an_adversary_that_knows_and_one_that_does_not():
    teacher = mlp(PATH)
    method = DMD2(teacher, Student(mlp(PATH, seed=1), (2,)), DMD2Options(gan=GanOptions()))
    for p in method.critic.adversary.head.out.parameters():
        torch.nn.init.zeros_(p)
    flat = method.diagnose(batch_of(64), Rng(0))["ratio"]
    assert set(flat["quantiles"].values()) == {1.0} and flat["told"] == 0.0 and flat["weights_spread"] == 0.0
    torch.nn.init.constant_(method.critic.adversary.head.out.bias, 5.0)  # everything is real
    sure = method.diagnose(batch_of(64), Rng(0))["ratio"]
    assert sure["told"] == 0.5 and sure["clipped"] == 1.0
    assert sure["quantiles"]["0.5"] == pytest.approx(math.exp(5.0), rel=1e-5)


def test_a_game_that_stops_between_steps_is_looked_at_above_where_it_stops():
    teacher = mlp(PATH)
    options = TDMOptions(steps=2)
    student = Student(mlp(PATH, seed=1), (2,), **TDM.student_options(options, PATH))
    method = TDM(teacher, student, options)
    with torch.no_grad():
        for p in method.critic.parameters():
            p.add_(0.05)
    found = method.diagnose(batch_of(32), Rng(3))["levels"]
    assert any(level["gap"] is not None and level["gap"] > 0 for level in found)
