"""What a working row shows on a Gaussian, where critic, teacher and divergence are known exactly."""

import math

import pytest
import torch
from games import Script, affine_student, gradients, sigma_points
from laws import seeded, spd

from fewstep.denoiser import Denoiser, Wrapped
from fewstep.method import Batch
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.families.score_gap import Anchor, rollout
from fewstep.methods.score_gap import TDM, TDMOptions
from fewstep.path import NoiseSampler, Straight, column
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import Gaussian

PATH = Straight()
EYE = torch.eye(2, dtype=torch.float64)
TEACHER = Gaussian([1.0, -0.5], covariance=spd(2, 1), path=PATH)
MIDDLE, STEPS = 0.5, 250


def divergence(mean, ours, centre, theirs):
    """KL(N(mean, ours), N(centre, theirs))."""
    away = mean - centre
    kl = torch.trace(torch.linalg.solve(theirs, ours)) + away @ torch.linalg.solve(theirs, away) - len(mean)
    return ((kl + torch.logdet(theirs) - torch.logdet(ours)) / 2).item()


class Steps(torch.nn.Module):
    """The guess ``A x + b``, other numbers for each of two steps."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.stack([0.5 * spd(2, 3), 0.5 * spd(2, 4)]))
        self.offset = torch.nn.Parameter(torch.tensor([[0.2, 0.3], [0.1, -0.4]], dtype=torch.float64))

    def forward(self, x, time, cond=None):
        k = int(time[0] <= MIDDLE)
        return x @ self.matrix[k].T + self.offset[k]


def two_steps(policy="ode"):
    return Student(Wrapped(Steps(), PATH, "x0", "t"), (2,), steps={2: (1.0, MIDDLE)}, policy=policy)


@torch.no_grad()
def ends(student):
    """(mean, covariance, s) at the end of each step."""
    (z,) = sigma_points(2)
    found, times = [], (*student.times(2), 0.0)
    x = z
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = student(x, t, s)
        mean = x.mean(0)
        found.append((mean, (x - mean).T @ (x - mean) / len(x), s))
    return found


def from_teacher(student):
    """KL from the teacher's marginal at the end of each step."""
    return [
        divergence(mean, ours, (1 - s) * TEACHER.mean[0], TEACHER.noised_covariance(s))
        for mean, ours, s in ends(student)
    ]


LOW, HIGH = 0.2, 0.95  # of the drawn levels


class OneForAll(Denoiser):
    """The exact critic of a deterministic student of two steps: at each level the mixture of both ends, taken on to it.

    Levels of the second step are even in [LOW, HIGH], those of the first are brought above its end: so half the range,
    and twice as dense there.
    """

    def __init__(self, student):
        super().__init__()
        self.watched, self.path = [student], PATH

    def forward(self, x, t, cond=None, want="x0", s=None):
        alpha, sigma, _, _ = (column(c, x) for c in PATH.coefs(t))
        least = Anchor(x, MIDDLE, x).above(PATH, torch.tensor(LOW, dtype=torch.float64))
        logs, pulls = [], []
        for mean, covariance, s_k in ends(self.watched[0]):
            keep, away = alpha / (1 - s_k), x - alpha / (1 - s_k) * mean
            inside = (keep**2)[..., None] * covariance + (sigma**2 - keep**2 * s_k**2)[..., None] * EYE
            pulls.append(torch.linalg.solve(inside, away))
            dense = torch.where(t > least, math.log(2.0), -math.inf) if s_k > 0 else torch.zeros_like(t)
            logs.append(dense - ((away * pulls[-1]).sum(1) + torch.logdet(inside).nan_to_num()) / 2)
        share = torch.softmax(torch.stack(logs), 0)[..., None]
        return (x - sigma**2 * (share * torch.stack(pulls)).sum(0)) / alpha


def test_tdm_brings_the_state_between_two_steps_and_the_sample_to_the_teachers_laws(monkeypatch):
    student = two_steps()
    assert min(from_teacher(student)) > 0.05
    levels = NoiseSampler(low=LOW, high=HIGH)
    options = TDMOptions(steps=2, times=(1.0, MIDDLE), match_weight="none", levels=levels)
    game = TDM(TEACHER, student, options, critic=OneForAll(student))
    optimiser = torch.optim.Adam(student.parameters(), 0.05, (0.8, 0.99))
    for k in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - k / STEPS)
        z = torch.randn(64, 2, generator=seeded(k), dtype=torch.float64)
        optimiser.zero_grad()
        game.loss("student", Batch(z, None, z), Rng(k)).total.backward()
        optimiser.step()
    assert max(from_teacher(student)) < 2e-3


def test_an_untrained_step_renoised_from_its_guess_has_another_law_than_where_it_ends():
    """Why the anchor matters: DMD2's roll-out would match a state that a deterministic student is never in."""
    student = two_steps()
    (z,) = sigma_points(2)
    guess = student(z, 1.0, 0.0).detach()
    mean = (1 - MIDDLE) * guess.mean(0)
    renoised = (1 - MIDDLE) ** 2 * (guess - guess.mean(0)).T @ (guess - guess.mean(0)) / len(z) + MIDDLE**2 * EYE
    centre, ours, _ = ends(student)[0]
    assert divergence(mean, renoised, centre, ours) > 0.05
    anchor = rollout(student, z, None, Rng(0), False, 2, "next")
    assert anchor.s in (MIDDLE, 0.0)


# -- a critic that lags ------------------------------------------------------------------------------------


class Learner(Denoiser):
    """The denoiser of a Gaussian whose mean and spread are learned: it can be exactly right, and else it lags."""

    def __init__(self, mean, std):
        super().__init__()
        self.path = PATH
        self.mean = torch.nn.Parameter(torch.tensor([mean], dtype=torch.float64))
        self.log_std = torch.nn.Parameter(torch.tensor([math.log(std)], dtype=torch.float64))

    def forward(self, x, t, cond=None, want="x0", s=None):
        alpha, sigma, _, _ = (column(c, x) for c in PATH.coefs(t))
        variance = torch.exp(2 * self.log_std)
        guess = self.mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * self.mean)
        return self.path.convert(guess, x, t, "x0", want)


def lag(turns, steps=40):
    """Mean distance of the critic's guess from that of the student's own law, over a run."""
    one = torch.ones(1, dtype=torch.float64)
    teacher = Gaussian([2.0], [0.5], path=PATH)
    student = affine_student(0.5 * one[None], -one, PATH)
    critic = Learner(-1.0, 0.5)  # right at first
    game = DMD2(
        teacher, student, DMD2Options(critic_turns=turns, levels=NoiseSampler(low=0.1, high=0.9)), critic=critic
    )
    rates = {"student": 0.05, "critic": 0.02}
    players = {name: torch.optim.Adam(getattr(game, name).parameters(), rates[name], (0.0, 0.99)) for name in rates}
    away = []
    for step in range(steps):
        for turn, player in enumerate(game.turns(step)):
            z = torch.randn(64, 1, generator=seeded(10 * step + turn), dtype=torch.float64)
            game.zero_grad()
            game.loss(player, Batch(z, None, z), Rng(step, turn)).total.backward()
            players[player].step()
        x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
        with torch.no_grad():
            away.append((critic(x, 0.5) - student.denoiser.law()(x, 0.5)).abs().mean().item())
    return sum(away) / len(away)


def test_more_critic_turns_leave_less_lag():
    assert lag(5) < 0.5 * lag(1)


def test_a_frozen_critic_pulls_a_student_past_its_teacher():
    """Score distillation with the critic held at the student's first law: nothing stops the pull where it should."""
    one = torch.ones(1, dtype=torch.float64)
    teacher, first = Gaussian([2.0], [0.5], path=PATH), Gaussian([-1.0], [0.5], path=PATH)
    student = affine_student(0.5 * one[None], 2 * one, PATH)  # at the teacher's law
    z, eps = sigma_points(1, 1)
    options = DMD2Options(levels=NoiseSampler(low=0.6, high=0.6), match_weight="none")
    for critic, rests in ((student.denoiser.law(), True), (first, False)):
        game = DMD2(teacher, student, options, critic=critic)
        loss = game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5])).total
        pull = gradients(loss, student.denoiser)["offset"].abs().item()
        assert (pull < 1e-12) == rests
        assert rests or pull > 0.5
    assert pytest.approx(2.0) == student.denoiser.offset.item()
