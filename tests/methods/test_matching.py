"""Second-order matching, roll-outs that stop on the way, and the papers that are rows of one game: exactly."""

import math

import pytest
import torch
from games import Affine, Script, affine_student, batch_of, gradients, mlp, play, sigma_points
from laws import seeded, spd

from fewstep.denoiser import Guided
from fewstep.method import Batch
from fewstep.methods.families.matching import Matching, MatchingOptions
from fewstep.methods.families.score_gap import (
    DIVERGENCES,
    F_OF_RATIO,
    SLOPES,
    Anchor,
    error_size,
    fisher,
    gap,
    rollout,
    weighted_fisher,
)
from fewstep.methods.score_gap import (
    TDM,
    DisBack,
    DisBackOptions,
    FDistill,
    FDistillOptions,
    SwiftBrush,
    SwiftBrushOptions,
    TDMOptions,
)
from fewstep.path import Exploding, NoiseSampler, Straight, Trigonometric
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import Gaussian

ALPHA, SIGMA = 0.6, 0.5
MEAN, SPREAD = 0.7, math.sqrt(0.5)  # of the teacher
FIXED = NoiseSampler(kind="uniform", low=0.7, high=0.7)


def hermite(count):
    """Nodes and weights with sum w f(z) = E f(z), z ~ N(0, 1)."""
    import numpy

    z, w = numpy.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(z), torch.tensor(w / w.sum())


def second_order(name, loss_of, count=60):
    """(gradient of E h(r) gap^2 by autograd of its integral, the same from a loss a row): scale and mean of a student.

    Student N(0.1, 0.8^2), teacher N(0.7, 0.5), noised by alpha = 0.6, sigma = 0.5 (no path: the loss knows none).
    """
    scale, mean = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.1))
    ours, theirs = ALPHA**2 * scale**2 + SIGMA**2, ALPHA**2 * SPREAD**2 + SIGMA**2

    def log_normal(x, centre, variance):
        return -((x - centre) ** 2) / (2 * variance) - torch.log(2 * math.pi * variance) / 2

    def gap_of(x, mean, variance):
        return -(x - ALPHA * mean) / variance + (x - ALPHA * MEAN) / theirs

    def log_ratio(x, mean, variance):
        return log_normal(x, ALPHA * MEAN, torch.tensor(theirs)) - log_normal(x, ALPHA * mean, variance)

    x = torch.linspace(-9, 9, 40_001, dtype=torch.float64)
    density = log_normal(x, ALPHA * mean, ours).exp()
    whole = density * DIVERGENCES[name](log_ratio(x, mean, ours).exp()) * gap_of(x, mean, ours) ** 2
    wanted = torch.stack(torch.autograd.grad(whole.sum() * (x[1] - x[0]), (scale, mean)))

    z, w = hermite(count)
    z, eps, w = z.repeat(count), z.repeat_interleave(count), w.repeat(count) * w.repeat_interleave(count)
    clean = scale * z + mean
    x_t = ALPHA * clean + SIGMA * eps
    still, centre = ours.detach(), mean.detach()  # the critic: right about the student, and no function of its weights
    ratio = torch.exp(log_ratio(x_t, centre, still))
    unit = SIGMA**2 / ALPHA
    fake = (x_t + SIGMA**2 * -(x_t - ALPHA * centre) / still) / ALPHA
    real = fake - unit * gap_of(x_t, centre, still)
    rows = loss_of(x_t[:, None], clean[:, None], fake[:, None], real[:, None], ratio)
    found = torch.autograd.grad((w * rows).sum() * 2 / unit**2, (scale, mean))
    return wanted, torch.stack(found)


def whole(name, gradient):
    """The loss without its division by the batch's mean of h."""
    from fewstep.losses import batch_mean

    def rows(x_t, clean, fake, real, ratio):
        size = batch_mean(DIVERGENCES[name](ratio.detach()))
        return size * weighted_fisher(x_t, clean, fake, real, ratio, name, gradient)

    return rows


EXACT = ["reverse_kl", "forward_kl", "jensen_shannon", "softened_rkl", "jeffreys", "hellinger"]


@pytest.mark.parametrize("name", EXACT)
def test_the_second_order_loss_has_the_whole_gradient_of_the_weighed_distance_of_scores(name):
    wanted, found = second_order(name, whole(name, "exact"))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_the_second_order_gradients_are_those_of_the_closed_forms():
    """Of reverse and forward KL, in the scale and the mean."""
    for name, values in {"reverse_kl": (0.6194, -2.3364), "forward_kl": (-0.823, -1.872)}.items():
        wanted, _ = second_order(name, whole(name, "exact"))
        assert wanted.tolist() == pytest.approx(values, abs=2e-3)


def test_a_ratio_held_still_moves_the_mean_rightly_and_the_spread_wrongly():
    wanted, found = second_order("forward_kl", whole("forward_kl", "stop"))
    assert found[1].item() == pytest.approx(wanted[1].item(), rel=0.02)
    assert abs(found[0] - wanted[0]) > 0.5
    _, paper = second_order("forward_kl", whole("forward_kl", "paper"))
    assert torch.equal(paper, found)  # its correction has the factor h'' = 0
    _, paper = second_order("jensen_shannon", whole("jensen_shannon", "paper"))
    _, stop = second_order("jensen_shannon", whole("jensen_shannon", "stop"))
    assert not torch.allclose(paper, stop, rtol=1e-3)


def test_where_the_weight_is_one_both_losses_are_the_same_at_a_half():
    wanted, found = second_order("reverse_kl", lambda x_t, clean, fake, real, r: fisher(clean, fake, real, a=0.5))
    assert torch.allclose(found, wanted, rtol=1e-3)
    for twin in (
        lambda x_t, clean, fake, real, r: fisher(clean, fake, real, a=1.0),  # the density held still
        lambda x_t, clean, fake, real, r: fisher(clean, real, fake, a=0.5),  # the roles
        lambda x_t, clean, fake, real, r: fisher(clean, fake.detach(), real.detach(), a=0.5),  # the networks' inputs
    ):
        _, other = second_order("reverse_kl", twin)
        assert (other - wanted).norm() > 0.05 * wanted.norm()


def test_the_papers_correction_has_the_coefficients_that_its_code_is_read_to_have():
    """``2 r^2 / (1 + r)^3 |y| y`` for Jensen-Shannon, ``4 r^2 |y| y`` for chi-squared, nothing for forward KL."""
    x_t, clean, fake, real = torch.randn(4, 5, 2, generator=seeded(0), dtype=torch.float64)
    r, y = torch.linspace(0.2, 3, 5, dtype=torch.float64), fake - real

    def push(name):
        at = x_t.clone().requires_grad_()
        rows = weighted_fisher(at, clean, fake, real, r, name, "paper") * DIVERGENCES[name](r).mean()
        (found,) = torch.autograd.grad(rows.sum(), at, allow_unused=True)
        return 2 * found  # the loss is half of E h ||y||^2

    size = y.norm(dim=1, keepdim=True)
    assert push("forward_kl").abs().max() == 0
    assert torch.allclose(push("chi2"), (4 * r**2)[:, None] * size * y)
    assert torch.allclose(push("jensen_shannon"), -(2 * r**2 / (1 + r) ** 3)[:, None] * size * y)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_slope_is_the_derivative_of_its_weight(name):
    ratio = torch.logspace(-2, 2, 41, dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(DIVERGENCES[name]))(ratio)
    assert torch.allclose(SLOPES[name](ratio), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "chi2"])
def test_a_divergence_is_the_integral_along_the_diffusion_of_its_weighed_distance_of_scores(name):
    """``D_f(0) - D_f(T) = int g^2 / 2 E h(r) gap^2 dt``, on the exploding path with g^2 = d sigma^2 / dt."""
    x = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    width = x[1] - x[0]

    def at(variance):
        ours, theirs = 0.8**2 + variance, 0.5 + variance
        log_p = -((x - 0.1) ** 2) / (2 * ours) - math.log(2 * math.pi * ours) / 2
        log_q = -((x - 0.7) ** 2) / (2 * theirs) - math.log(2 * math.pi * theirs) / 2
        r, away = (log_q - log_p).exp(), -(x - 0.1) / ours + (x - 0.7) / theirs
        p = log_p.exp()
        total = (p * torch.nan_to_num(F_OF_RATIO[name](r), posinf=0.0, neginf=0.0)).sum() * width
        return total.item(), ((p * DIVERGENCES[name](r) * away**2).nan_to_num().sum() * width).item() / 2

    nodes, weights = torch.linspace(0, 1, 401, dtype=torch.float64), torch.full((401,), 2.0, dtype=torch.float64)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0  # Simpson's rule, in a variable that is dense at 0
    total = sum(float(w) * at(9 * u**3)[1] * 27 * u**2 for u, w in zip(nodes.tolist(), weights, strict=True)) / 1200
    assert total == pytest.approx(at(0.0)[0] - at(9.0)[0], abs=3e-4)


# -- a roll-out that stops on the way ----------------------------------------------------------------------


@pytest.mark.parametrize("path", [Straight(), Trigonometric(), Exploding(sigma_max=10.0)], ids=lambda p: p.kind)
def test_a_sample_taken_on_from_s_to_t_has_the_paths_law_at_t(path):
    s, t = 0.3 * path.t_max, torch.full((4000,), 0.6 * path.t_max, dtype=torch.float64)
    rng = seeded(0)
    clean, first, second = torch.randn(3, 4000, 1, generator=rng, dtype=torch.float64)
    x = path.corrupt(1 + 0.2 * clean, s, first)
    x_t, _ = Anchor(x, s, x).noised(path, t, second)
    alpha, sigma, _, _ = path.coefs(float(t[0]))
    assert x_t.mean().item() == pytest.approx(float(alpha), abs=4 * x_t.std().item() / 63)
    assert x_t.var().item() == pytest.approx(float(0.04 * alpha**2 + sigma**2), rel=0.09)


@pytest.mark.parametrize("path", [Straight(), Trigonometric(), Exploding(sigma_max=10.0)], ids=lambda p: p.kind)
def test_the_unbiased_target_has_the_denoisers_answer_as_its_mean_and_the_sample_itself_has_not(path):
    """Regression on x_t over sigma points: exact, because everything is linear and Gaussian."""
    s, level = 0.5 * path.t_max, 0.8 * path.t_max
    law = Gaussian([0.7], [SPREAD], path=path)
    z, eps = sigma_points(1, 1)
    coefs = path.coefs(s)
    spread = (coefs.alpha**2 * SPREAD**2 + coefs.sigma**2).sqrt()
    x = coefs.alpha * 0.7 + spread * z  # the law at s, no clean sample behind it
    t = torch.full((4,), level, dtype=torch.float64)
    x_t, clean = Anchor(x, s, x).noised(path, t, eps)

    def fit(target):
        rows = torch.cat([x_t, torch.ones_like(x_t)], 1)
        return torch.linalg.lstsq(rows, target).solution[:, 0]

    zero = law(torch.zeros(1, 1, dtype=torch.float64), level)[0, 0]
    slope = law(torch.ones(1, 1, dtype=torch.float64), level)[0, 0] - zero
    assert torch.allclose(fit(clean), torch.stack([slope, zero]), rtol=1e-10, atol=1e-12)
    assert (fit(x) - torch.stack([slope, zero])).norm() > 0.02


def test_the_targets_velocity_on_the_straight_path_is_phased_dmds():
    """``v = ((alpha_s^2 sigma_t + alpha_t sigma_s^2) eps) / (alpha_s^2 sigma_ts) - x_s / alpha_s``."""
    path, s, t = Straight(), 0.5, torch.tensor([0.8, 0.6], dtype=torch.float64)
    x, eps = torch.randn(2, 2, 1, generator=seeded(0), dtype=torch.float64)
    x_t, clean = Anchor(x, s, x).noised(path, t, eps)
    added = torch.sqrt(t**2 - ((1 - t) / (1 - s) * s) ** 2)
    wanted = ((1 - s) ** 2 * t + (1 - t) * s**2) / ((1 - s) ** 2 * added) * eps[:, 0] - x[:, 0] / (1 - s)
    assert torch.allclose((x_t[:, 0] - clean[:, 0]) / t, wanted, rtol=1e-12)


def test_a_clean_anchor_is_noised_as_the_path_does_and_is_its_own_target():
    path, t = Straight(), torch.tensor([0.3, 0.9])
    x, eps = torch.randn(2, 2, 3, generator=seeded(0))
    x_t, clean = Anchor(x, 0.0, x).noised(path, t, eps)
    assert torch.equal(x_t, path.corrupt(x, t, eps))
    assert clean is x
    assert Anchor(x, 0.0, x).share(path, t) == 1.0
    assert Anchor(x, 0.0, x).above(path, t) is t


def test_drawn_times_are_brought_above_the_anchor_and_the_critics_loss_stays_bounded_there():
    path, t = Straight(), torch.linspace(0, 1, 9, dtype=torch.float64)
    anchor = Anchor(torch.zeros(9, 1), 0.4, torch.zeros(9, 1))
    above = anchor.above(path, t)
    assert above.min() > 0.4
    assert above.max() == 1
    eps = torch.ones(9, 1, dtype=torch.float64)
    _, clean = Anchor(0 * eps, 0.4, 0 * eps).noised(path, above, eps)
    noise = clean[:, 0] ** 2 * path.snr(above) * anchor.share(path, above)
    assert noise[:-1].max() < 2


def two_steps(path, matrix, offset):
    """A student of two deterministic steps, affine, and the affine map from its noise to the end of each."""
    scale = float(path.coefs(path.t_max).sigma)
    net = Affine(matrix, offset, path, scale)
    middle = 0.4 * path.t_max
    return Student(net, tuple(offset.shape), start_scale=scale, steps={2: (path.t_max, middle)}, policy="ode")


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("path", [Straight(), Exploding(sigma_max=10.0)], ids=lambda p: p.kind)
def test_each_steps_match_has_the_gradient_of_the_divergence_of_its_law_taken_on(path, step, monkeypatch):
    """TDM: the law of the end of each step, noised on to t, against the teacher's there; earlier steps held still."""
    matrix = spd(2, 4) + torch.tensor([[0.0, 0.3], [-0.2, 0.0]], dtype=torch.float64)
    student = two_steps(path, matrix, torch.tensor([0.3, -0.7], dtype=torch.float64))
    teacher = Gaussian([1.0, -0.5], covariance=spd(2, 1), path=path)
    level = 0.7 * path.t_max
    net, (start, middle) = student.denoiser, student.times(2)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor([step]))
    points = sigma_points(2, 2)

    def end_of(step):
        """Mean and covariance at the end of a step, a function of the weights of that step alone."""
        z, _ = points
        x = student.start_scale * z
        if step == 1:
            with torch.no_grad():
                x = student(x, start, middle)
        x = student(x, start, middle) if step == 0 else student(x, middle, path.t_min)
        mean = x.mean(0)
        return mean, (x - mean).T @ (x - mean) / len(x)

    s = middle if step == 0 else path.t_min
    here, there = path.coefs(s), path.coefs(level)
    keep = there.alpha / here.alpha
    mean, covariance = end_of(step)
    ours = keep**2 * covariance + (there.sigma**2 - keep**2 * here.sigma**2) * torch.eye(2, dtype=torch.float64)
    theirs = teacher.noised_covariance(level)
    away = keep * mean - there.alpha * teacher.mean[0]
    kl = torch.trace(torch.linalg.solve(theirs, ours)) + away @ torch.linalg.solve(theirs, away)
    wanted = gradients((kl + torch.logdet(theirs) - torch.logdet(ours)) / 2, net)

    with torch.no_grad():  # the exact critic: the law of the student's own x_t, as a denoiser
        inside = (ours - there.sigma**2 * torch.eye(2, dtype=torch.float64)) / there.alpha**2
        centre = keep * mean / there.alpha

    class Law(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.path, self.nothing = path, torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, cond=None, want="x0", s=None):
            score = -torch.linalg.solve(ours.detach(), (x - there.alpha * centre).T).T
            return (x + there.sigma**2 * score) / there.alpha

    assert torch.isfinite(inside).all()
    options = MatchingOptions(stop="next", steps=2, match_weight="none", levels=FIXED)
    game = Matching(teacher, student, options, critic=Law())
    fixed = torch.full((8,), level, dtype=torch.float64)
    monkeypatch.setattr(Anchor, "above", lambda self, path, t: fixed)
    z, eps = points
    loss = game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5]))
    unit = 2 * keep * there.alpha / there.sigma**2  # numel, dx_t / dx_s, score of a guess
    found = {k: unit * g for k, g in gradients(loss.total, net).items()}
    for key in wanted:
        assert torch.allclose(found[key], wanted[key], rtol=1e-9, atol=1e-11)


def test_a_roll_out_that_stops_at_the_next_time_is_where_the_student_goes_on_from(monkeypatch):
    net = mlp(dtype=torch.float64)
    student = Student(net, (2,), steps={3: (1.0, 0.6, 0.2)}, policy="ode")
    noise = torch.randn(5, 2, generator=seeded(0), dtype=torch.float64)
    x = student.start_scale * noise
    for step, (t, s) in enumerate([(1.0, 0.6), (0.6, 0.2), (0.2, 0.0)]):
        monkeypatch.setattr(torch, "randint", lambda *a, step=step, **k: torch.tensor([step]))
        anchor = rollout(student, noise, None, Rng(0), True, 3, "next")
        assert anchor.s == s
        assert torch.allclose(anchor.guess, student(x, t, 0.0, None, "x0"))
        x = student(x, t, s)
        assert torch.allclose(anchor.x, x)
        assert anchor.x.requires_grad
    assert torch.allclose(student.generate(noise, steps=3), x)


# -- the papers --------------------------------------------------------------------------------------------


def test_tdm_serves_its_own_step_count_by_deterministic_steps():
    given = TDM.student_options(TDMOptions(), Straight())
    assert list(given["steps"]) == [4]
    assert given["policy"] == "ode"
    with pytest.raises(ValueError, match="renoises"):
        TDM(mlp(), Student(mlp(seed=1), (2,), steps={4: given["steps"][4]}, policy="renoise"), TDMOptions())


def test_swiftbrush_guides_teacher_and_critic_alike_and_weighs_by_alpha_sigma():
    """``sigma^3`` times the gap of guided scores, in a guess: ``alpha sigma (D_critic - D_teacher)``."""
    teacher, critic = mlp(classes=3, dtype=torch.float64), mlp(classes=3, seed=2, dtype=torch.float64)
    student = Student(mlp(classes=3, seed=1, dtype=torch.float64), (2,), classes=3)
    game = SwiftBrush(teacher, student, SwiftBrushOptions(levels=FIXED), critic=critic)
    z, eps = torch.randn(2, 6, 2, generator=seeded(0), dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    found = game.loss("student", Batch(z, label, z), Script(normals=[eps], uniforms=[0.5])).total
    x = student(student.start_scale * z, 1.0, 0.0, label)
    t = torch.full((6,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        x_t = 0.3 * x + 0.7 * eps
        direction = 0.3 * 0.7 * (Guided(critic, 4.5)(x_t, t, label) - Guided(teacher, 4.5)(x_t, t, label))
    wanted = gradients((x * direction).mean(), student)
    assert all(torch.allclose(g, wanted[k], rtol=1e-9) for k, g in gradients(found, student).items())
    assert not SwiftBrush.reads_data(SwiftBrushOptions())


def test_a_row_guided_at_its_own_scale_is_the_row_guided_at_that_scale_alone():
    net = mlp(classes=3, dtype=torch.float64)
    x, label = torch.randn(3, 2, generator=seeded(0), dtype=torch.float64), torch.tensor([0, 1, 2])
    t, scales = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    rows = Guided(net, scales)(x, t, label)
    inside = Guided(net, scales, interval=(0.3, 0.95))(x, t, label)
    for k, scale in enumerate(scales.tolist()):
        one = slice(k, k + 1)
        assert torch.allclose(rows[one], Guided(net, scale)(x[one], t[one], label[one]))
        assert torch.allclose(inside[one], Guided(net, scale if k else 1.0)(x[one], t[one], label[one]))


def test_random_guidance_is_one_scale_a_row_for_both_networks_and_its_mean_pull_is_the_mean_of_fixed_ones():
    """PG-SB: the pull is linear in the scale, so that drawing it evenly gives the pull at the middle on average."""
    teacher, critic = mlp(classes=3, dtype=torch.float64), mlp(classes=3, seed=2, dtype=torch.float64)
    student = Student(mlp(classes=3, seed=1, dtype=torch.float64), (2,), classes=3)
    z, eps = torch.randn(2, 6, 2, generator=seeded(0), dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1, 2])

    def pull(uniforms, **options):
        game = SwiftBrush(teacher, student, SwiftBrushOptions(levels=FIXED, **options), critic=critic)
        loss = game.loss("student", Batch(z, label, z), Script(normals=[eps], uniforms=[0.5, *uniforms])).total
        return torch.cat([g.flatten() for g in gradients(loss, student).values()])

    low, high = pull([], guidance=2.0), pull([], guidance=5.0)
    ends = [pull([u], guidance=2.0, guidance_to=5.0) for u in (0.0, 1.0)]
    assert torch.allclose(ends[0], low) and torch.allclose(ends[1], high)
    mixed = pull([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]], guidance=2.0, guidance_to=5.0)
    other = pull([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]], guidance=2.0, guidance_to=5.0)
    assert torch.allclose((mixed + other) / 2, (low + high) / 2)
    assert not torch.allclose(mixed, other, rtol=1e-3)
    with pytest.raises(ValueError, match="above guidance 4.5, got 2"):
        SwiftBrush(teacher, student, SwiftBrushOptions(guidance_to=2.0))


def test_a_guided_critic_is_entered_by_the_players_own_call():
    """Sharding and compilation hook into calls: a network that is reached past its player would run without them."""
    teacher = mlp(classes=3)
    game = SwiftBrush(teacher, Student(mlp(classes=3, seed=1), (2,), classes=3), SwiftBrushOptions(critic_lora="off"))
    calls = []
    game.critic.register_forward_hook(lambda *_: calls.append(1))
    for player in game.players:
        game.loss(player, batch_of(4, classes=3), Rng(0))
    assert calls == [1, 1]


def test_swiftbrush_with_exact_scores_reaches_a_gaussian_and_without_a_critic_loses_its_spread():
    covariance, mean = spd(2, 1), torch.tensor([1.0, -0.5], dtype=torch.float64)
    teacher = Gaussian(mean, covariance=covariance, path=Straight())

    def trained(with_critic, steps=700):
        student = affine_student(0.3 * torch.eye(2, dtype=torch.float64), torch.zeros(2).double(), Straight())
        optimiser = torch.optim.Adam(student.parameters(), lr=0.02)
        options = SwiftBrushOptions(guidance=1.0)
        for k in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 0.02 * (1 - k / steps)
            critic = student.denoiser.law() if with_critic else None
            game = SwiftBrush(teacher, student, options, critic=critic or Still(Straight()))
            z = torch.randn(64, 2, generator=seeded(k), dtype=torch.float64)
            optimiser.zero_grad()
            game.loss("student", Batch(z, None, z), Rng(k)).total.backward()
            optimiser.step()
        net = student.denoiser
        ours = (net.matrix @ net.matrix.T).detach()
        away = net.offset.detach() - mean
        ratio = torch.linalg.solve(covariance, ours)
        kl = torch.trace(ratio) - 2 - torch.logdet(ratio) + away @ torch.linalg.solve(covariance, away)
        return (kl / 2).item(), torch.trace(ours).item()

    class Still(Affine):
        """A critic that guesses the noised sample's own clean part: score distillation without a critic."""

        def __init__(self, path):
            super().__init__(torch.eye(2, dtype=torch.float64), torch.zeros(2).double(), path)

        def forward(self, x, t, cond=None, want="x0", s=None):
            return self.path.corrupt(x, t, torch.zeros_like(x)) * 0 + x / (1 - t[:, None]).clamp(min=0.02)

    divergence, spread = trained(True)
    assert divergence < 1e-3
    _, collapsed = trained(False, 300)
    assert collapsed < 0.3 * spread


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_disback_records_the_critics_way_to_the_untrained_student_and_walks_it_back():
    """Two still steps a state: s'_1 and s'_2 are kept, s'_3 is the critic; then s'_2, s'_1 and the teacher teach."""
    teacher, student = mlp(), Student(mlp(seed=1), (2,))
    options = DisBackOptions(critic_turns=2, backtrack={"states": 3, "every": 4, "interval": 2})
    game = DisBack(teacher, student, options)
    seen, first = [], weights(student)

    def draw(step, turn):
        if turn == 0:
            seen.append((weights(game.critic), same(weights(student), first), game._target() if step >= 6 else None))
        return batch_of(8, seed=step)

    play(game, draw, 12)
    assert [still for _, still, _ in seen[:8]] == [True] * 7 + [False]  # the first move is seen a step later
    assert same(weights(game.way[0]), seen[2][0])
    assert same(weights(game.way[1]), seen[4][0])
    assert not same(weights(game.way[1]), weights(game.way[0]))
    order = [target for _, _, target in seen[6:]]
    assert order == [game.way[1]] * 2 + [game.way[0]] * 2 + [teacher] * 2
    assert not any(p.requires_grad for p in game.way.parameters())
    assert not any(m.training for m in game.train().way.modules())
    other = DisBack(teacher, student, options)
    other.load_state_dict(game.state_dict())
    assert same(weights(other.way), weights(game.way))


def test_a_ratios_bins_are_kept_after_a_step_and_not_by_a_loss_alone():
    options = FDistillOptions(ratio_bins=4, ratio_decay=0.5)
    game = FDistill(mlp(), Student(mlp(seed=1), (2,), **FDistill.student_options(options, Straight())), options)
    losses = [game.loss("student", batch_of(64), Rng(0)).total.item() for _ in range(2)]
    assert losses[0] == losses[1] and not game.bins.mean.any()
    found = game.bins.found.clone()
    game.settle(0)
    assert torch.equal(game.bins.mean, found) and found.any()


def test_options_that_contradict_each_other_are_refused():
    teacher, student = mlp(), Student(mlp(seed=1), (2,))
    for options, what in (
        ({"divergence": "forward_kl"}, "set gan"),
        ({"ratio_gradient": "exact"}, "gap 'fisher'"),
        ({"gap": "fisher", "fisher_a": 0.5}, "fisher_c = 0"),
        ({"stop": "next", "gan": {}}, "leave gan off"),
    ):
        with pytest.raises(ValueError, match=what):
            Matching(teacher, student, MatchingOptions.model_validate(options))


def test_the_squared_distance_of_scores_is_over_the_teachers_error_like_the_gap():
    teacher, critic = mlp(dtype=torch.float64), mlp(seed=2, dtype=torch.float64)
    student = Student(mlp(seed=1, dtype=torch.float64), (2,))
    game = Matching(
        teacher, student, MatchingOptions(gap="fisher", fisher_c=0.0, fisher_a=1.2, levels=FIXED), critic=critic
    )
    z, eps = torch.randn(2, 6, 2, generator=seeded(0), dtype=torch.float64)
    found = game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5])).total
    x = student(student.start_scale * z, 1.0, 0.0)
    t = torch.full((6,), 0.7, dtype=torch.float64)
    x_t = 0.3 * x + 0.7 * eps
    fake, real = critic(x_t, t), teacher(x_t, t)
    y = fake - real
    rows = (-0.2 * y.square() - y * (fake - x)).mean(1) / error_size(x, real).detach()
    wanted = gradients(rows.mean(), student)
    assert all(torch.allclose(g, wanted[k], rtol=1e-9) for k, g in gradients(found, student).items())
    assert gap(x, fake, real).shape == x.shape
