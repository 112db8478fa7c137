"""Distribution matching, exactly: expectations over sigma points and grids, in float64."""

import math
from typing import get_args

import pytest
import torch
from games import Script, affine_student, gradients, sigma_points
from laws import seeded, spd

from fewstep.losses import stopped_pull
from fewstep.method import Batch
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.families.score_gap import (
    DIVERGENCES,
    F_OF_RATIO,
    SLOPES,
    Divergence,
    RatioBins,
    fisher,
    gap,
    one_in,
    ratio_of,
    ratio_weight,
)
from fewstep.path import Exploding, NoiseSampler, Straight, Trigonometric, VariancePreserving
from fewstep.rng import Rng
from fewstep.teachers import Gaussian

PATHS = [Straight(), Trigonometric(), Exploding(sigma_max=10.0), VariancePreserving()]
MATRIX = spd(3, 4) + torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.0, -0.2], [0.1, 0.0, 0.0]], dtype=torch.float64)
OFFSET = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


def fixed(part):
    """A noise level that is always the same."""
    return NoiseSampler(kind="uniform", low=part, high=part)


def divergence_gradient(student, teacher, t):
    """d KL(student, teacher) at t in A and b, from the closed form for two Gaussians."""
    path, net = teacher.path, student.denoiser
    alpha, sigma, _, _ = path.coefs(t)
    eye = torch.eye(len(net.offset), dtype=torch.float64)
    ours = alpha**2 * net.matrix @ net.matrix.T + sigma**2 * eye
    theirs = teacher.noised_covariance(t)
    away = alpha * (net.offset - teacher.mean[0])
    kl = torch.trace(torch.linalg.solve(theirs, ours)) + away @ torch.linalg.solve(theirs, away)
    return gradients((kl + torch.logdet(theirs) - torch.logdet(ours)) / 2, net)


def relative(found, wanted):
    """The largest relative error over the parameters."""
    return max(((found[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)


def match_gradient(game, t, points=None):
    """What the student of DMD2 descends at a level, in units of the KL: numel alpha^2 / sigma^2 times its gradient."""
    z, eps = sigma_points(3, 3)
    loss = game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5]))
    alpha, sigma, _, _ = game.student.path.coefs(t)
    return {k: 3 * alpha**2 / sigma**2 * g for k, g in gradients(loss.total, game.student.denoiser).items()}


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_students_loss_has_the_gradient_of_the_divergence_between_the_noised_laws(path, part):
    teacher = Gaussian([1.0, -0.5, 0.3], covariance=spd(3, 1), path=path)
    student = affine_student(MATRIX, OFFSET, path)
    options = DMD2Options(match_weight="none", levels=fixed(part))
    game = DMD2(teacher, student, options, critic=student.denoiser.law())
    t = part * path.t_max
    wanted = divergence_gradient(student, teacher, t)
    assert relative(match_gradient(game, t), wanted) < 1e-11


def score_distance_gradient(student, teacher, t):
    """d E ||score_student - score_teacher||^2 in A and b, the density of the student's samples held still."""
    path, net = teacher.path, student.denoiser
    alpha, sigma, _, _ = path.coefs(t)
    ours = alpha**2 * net.matrix @ net.matrix.T + sigma**2 * torch.eye(3, dtype=torch.float64)
    (z,) = sigma_points(3)
    x = (alpha * net.offset + z @ torch.linalg.cholesky(ours).T).detach()
    score = -torch.linalg.solve(ours, (x - alpha * net.offset).T).T
    return gradients((score - teacher(x, t, want="score")).square().sum(1).mean(), net)


@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_distance_of_scores_has_its_own_gradient_with_the_density_held_still(path, part):
    """Luo et al. 2024, Theorem 3.1, and the twin that stops what must not be stopped."""
    teacher = Gaussian([1.0, -0.5, 0.3], covariance=spd(3, 1), path=path)
    student = affine_student(MATRIX, OFFSET, path)
    critic, t = student.denoiser.law(), part * path.t_max
    game = DMD2(
        teacher,
        student,
        DMD2Options(gap="fisher", fisher_c=0.0, match_weight="none", levels=fixed(part)),
        critic=critic,
    )
    wanted = score_distance_gradient(student, teacher, t)
    z, eps = sigma_points(3, 3)
    alpha, sigma, _, _ = path.coefs(t)
    scale = 2 * (alpha / sigma**2) ** 2

    def error(loss):
        return relative({k: scale * g for k, g in gradients(loss, student.denoiser).items()}, wanted)

    assert error(game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5])).total) < 1e-9
    x = student(student.start_scale * z, student.start, path.t_min)
    x_t = path.corrupt(x, torch.full((12,), t, dtype=torch.float64), eps)
    fake, real = critic(x_t, t), teacher(x_t, t)
    assert error(-((fake - real).detach() * (fake - x)).sum(1).mean()) > 0.05


def test_the_robust_distance_of_scores_is_the_plain_one_over_its_length():
    x, fake, real = torch.randn(3, 4, 2, 3, generator=seeded(0), dtype=torch.float64)
    length = torch.sqrt((fake - real).square().sum((1, 2)) + 0.3**2)
    assert torch.allclose(fisher(x, fake, real, 0.3), fisher(x, fake, real, 0.0) / length)
    assert fisher(x, fake, fake, 0.3).abs().max() == 0


def test_other_criteria_than_the_match_would_be_noticed():
    path, part = Straight(), 0.5
    teacher = Gaussian([1.0, -0.5, 0.3], covariance=spd(3, 1), path=path)
    student = affine_student(MATRIX, OFFSET, path)
    critic, t = student.denoiser.law(), torch.full((12,), part, dtype=torch.float64)
    wanted = divergence_gradient(student, teacher, part)
    z, eps = sigma_points(3, 3)
    alpha, sigma, _, _ = path.coefs(part)

    def error(pull):
        x = student(student.start_scale * z, student.start, path.t_min)
        x_t = path.corrupt(x, t, eps)
        value = pull(x, critic(x_t, t), teacher(x_t, t)).mean()
        return relative({k: 3 * alpha**2 / sigma**2 * g for k, g in gradients(value, student.denoiser).items()}, wanted)

    assert error(lambda x, fake, real: stopped_pull(x, gap(x, fake, real, False))) < 1e-11
    assert error(lambda x, fake, real: stopped_pull(x, gap(x, real, fake, False))) == pytest.approx(2)  # the sign
    assert error(lambda x, fake, real: ((fake - real) * x).mean(1)) > 0.05  # the gap not stopped
    assert error(lambda x, fake, real: stopped_pull(x, gap(x, fake, real, True))) > 0.05  # each row over its own size
    assert error(lambda x, fake, real: stopped_pull(x, gap(x, x, real, False))) > 0.05  # no critic


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_gap_of_two_guesses_is_that_of_two_scores_times_sigma_squared_over_alpha(path):
    ours, theirs = (Gaussian([m, 0.2], [s, 0.7], path=path) for m, s in ((0.0, 0.5), (1.0, 1.5)))
    x, t = torch.randn(9, 2, generator=seeded(0), dtype=torch.float64), 0.3 * path.t_max
    alpha, sigma, _, _ = path.coefs(t)
    guesses = gap(x, ours(x, t), theirs(x, t), normalise=False)
    scores = ours(x, t, want="score") - theirs(x, t, want="score")
    assert torch.allclose(guesses, sigma**2 / alpha * scores, rtol=1e-11, atol=1e-13)


def test_a_row_of_the_normalised_gap_is_over_the_mean_size_of_the_teachers_error():
    x, fake, real = torch.randn(3, 4, 2, 3, generator=seeded(0), dtype=torch.float64)
    size = (x - real).abs().mean((1, 2))
    assert torch.allclose(gap(x, fake, real), (fake - real) / size[:, None, None], atol=1e-15)


def test_a_teacher_that_is_right_about_a_sample_does_not_blow_up_its_gap():
    x, fake = torch.zeros(2, 3), torch.ones(2, 3)
    assert gap(x, fake, x).isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_weight_is_the_squared_ratio_times_the_second_derivative_of_its_divergence(name):
    ratio = torch.logspace(-3, 3, 61, dtype=torch.float64)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(F_OF_RATIO[name])))(ratio)
    assert torch.allclose(DIVERGENCES[name](ratio), ratio**2 * second, rtol=1e-10, atol=0)
    assert not torch.allclose(DIVERGENCES[name](ratio), ratio * second, rtol=1e-2)  # one power short


@pytest.mark.parametrize("name", F_OF_RATIO)
def test_every_divergence_is_nothing_between_equal_laws(name):
    assert abs(F_OF_RATIO[name](torch.tensor(1.0, dtype=torch.float64)).item()) < 1e-15


def on_a_grid(name, t, weight=None, sign=1.0):
    """(gradient of D_f by autograd, the same from h and the gap), in the scale and the mean of a 1-D student."""
    path = Straight()
    alpha, sigma, _, _ = path.coefs(t)
    scale, mean = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.1))
    teacher = Gaussian([0.7], [math.sqrt(0.5)], path=path)
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    width = x[1] - x[0]

    def log_normal(centre, variance):
        return -((x - centre) ** 2) / (2 * variance) - torch.log(2 * math.pi * variance) / 2

    log_p = log_normal(alpha * mean, alpha**2 * scale**2 + sigma**2)
    log_q = teacher.log_density(x[:, None], t)
    total = (log_p.exp() * F_OF_RATIO[name]((log_q - log_p).exp())).sum() * width
    wanted = torch.stack(torch.autograd.grad(total, (scale, mean)))
    with torch.no_grad():
        p, r = log_p.exp(), (log_q - log_p).exp()
        critic = Gaussian([0.1], [0.8], path=path)
        pull = alpha / sigma**2 * gap(x[:, None], critic(x[:, None], t), teacher(x[:, None], t), False)[:, 0]
        spread = alpha**2 * scale**2 + sigma**2
        moves = torch.stack([alpha * alpha * scale * (x - alpha * mean) / spread, alpha * torch.ones_like(x)])
        h = DIVERGENCES[name](r) if weight is None else weight(r)
        found = sign * (p * h * pull * moves).sum(1) * width
    return wanted, found


@pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "jensen_shannon", "softened_rkl", "jeffreys", "hellinger", "chi2", "neyman"]
)
def test_the_weighted_gap_is_the_gradient_of_its_divergence(name, t):
    wanted, found = on_a_grid(name, t)
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)
    _, flipped = on_a_grid(name, t, sign=-1.0)
    assert not torch.allclose(flipped, wanted, rtol=0.1)
    if name != "reverse_kl":
        _, plain = on_a_grid(name, t, weight=torch.ones_like)
        assert not torch.allclose(plain, wanted, rtol=0.1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_rows_weight_is_h_of_its_ratio_over_the_mean_of_the_batch(name):
    logit = torch.linspace(-3, 3, 7)[:, None]
    h = DIVERGENCES[name](logit.exp()).squeeze(1)
    weight = ratio_weight(name, ratio_of(logit, 1e-3, 1e3))
    assert torch.allclose(weight, h / h.mean(), rtol=1e-5)
    assert weight.mean().item() == pytest.approx(1, rel=1e-5)


def test_a_weight_holds_an_extreme_logit_to_its_bound_and_carries_no_gradient():
    logit = torch.tensor([[50.0], [4.0], [-50.0], [-4.0]], requires_grad=True)
    weight = ratio_weight("forward_kl", ratio_of(logit, math.exp(-4), math.exp(4)))
    assert not weight.requires_grad
    assert weight[0] == weight[1]
    assert weight[2] == weight[3]


def test_all_eight_weights_of_the_paper_are_there():
    assert len(DIVERGENCES) == 8
    assert set(DIVERGENCES) == set(SLOPES) == set(F_OF_RATIO) == set(get_args(Divergence))


def test_a_ratio_is_divided_by_the_running_mean_of_its_bin_which_a_loss_alone_does_not_move():
    bins = RatioBins(2, decay=0.75)
    level = torch.tensor([0.1, 0.2, 0.9, 1.0])
    first = torch.tensor([1.0, 3.0, 8.0, 2.0])
    assert torch.allclose(bins(first, level), first / torch.tensor([2.0, 2.0, 5.0, 5.0]))
    assert torch.equal(bins.mean, torch.zeros(2))
    bins.settle()
    assert bins.mean.tolist() == [2.0, 5.0]
    second, low = torch.tensor([6.0, 10.0]), torch.tensor([0.0, 0.3])
    assert torch.allclose(bins(second, low), second / (0.75 * 2 + 0.25 * 8))
    bins.settle()
    assert bins.mean.tolist() == [3.5, 5.0]  # a bin that nobody stood in stays
    alone = RatioBins(2, decay=0.0)
    for ratio in (first, 7 * first):  # without memory every bin has mean 1
        divided = alone(ratio, level)
        assert torch.allclose(divided.view(2, 2).mean(1), torch.ones(2))
        alone.settle()


def test_an_adversary_that_is_off_by_a_factor_at_each_level_weighs_rows_as_one_that_is_right():
    """What the bins are for: the mean of p_teacher / p_student over the student's samples is 1 at every level."""
    rng = seeded(0)
    t = torch.rand(40_000, generator=rng)
    x = torch.randn(40_000, generator=rng)
    right = torch.exp(0.5 * x - 0.125)  # N(0.5, 1) over N(0, 1)
    wrong = right * torch.exp(3 * torch.floor(10 * t) / 10)
    found = RatioBins(10, 0.0)(wrong, t)
    assert (found / right - 1).abs().max() < 0.05
    assert (ratio_weight("forward_kl", wrong) / ratio_weight("forward_kl", right) - 1).abs().max() > 1


def test_one_in_a_thousand_is_rare_and_one_in_one_is_always():
    assert all(one_in(1, Rng(k)) for k in range(20))
    assert 60 < sum(one_in(10, Rng(k)) for k in range(1000)) < 140
