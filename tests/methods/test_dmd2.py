import copy

import pytest
import torch
from games import (
    Affine,
    Script,
    affine_student,
    batch_of,
    gradients,
    mlp,
    play,
    sigma_points,
    sliced_distance,
    stream,
)
from laws import exact_student, gaussian, largest_gradient, mixture, noise_batch, seeded, spd

from fewstep.denoiser import Denoiser, Guided
from fewstep.losses import distance, generator_loss, squared_error, stopped_pull
from fewstep.method import Batch
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.families.score_gap import Adversary, GanOptions, gap, ratio_of, ratio_weight, rollout
from fewstep.path import Exploding, NoiseSampler, Straight, normal
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import Gaussian

UNIFORM = NoiseSampler(low=0.02, high=0.98)
GAN = GanOptions(width=8)


def game_of(options=None, *, classes=None, critic=None, shape=(2,), seed=0, dtype=None, **student):
    """A game of small networks: teacher, student and critic each with weights of its own."""
    teacher = mlp(shape=shape, classes=classes, seed=seed, dtype=dtype)
    made = Student(mlp(shape=shape, classes=classes, seed=seed + 1, dtype=dtype), shape, classes=classes, **student)
    if critic is None:
        critic = mlp(shape=shape, classes=classes, seed=seed + 2, dtype=dtype)
    return DMD2(teacher, made, options or DMD2Options(levels=UNIFORM), critic=critic)


# -- at rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Straight(), Exploding(sigma_max=10.0)], ids=lambda p: p.kind)
def test_dmd_rests_when_the_student_has_the_teachers_law(path):
    covariance = spd(3, 1)
    mean = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    teacher = Gaussian(mean, covariance=covariance, path=path)
    student = affine_student(torch.linalg.cholesky(covariance), mean, path)
    game = DMD2(teacher, student, DMD2Options(match_weight="none"), critic=student.denoiser.law())
    loss = game.loss("student", noise_batch(64, 3), Rng(0)).total
    assert max(g.abs().max() for g in gradients(loss, student.denoiser).values()) < 1e-12
    wrong = DMD2(teacher, student, DMD2Options(match_weight="none"), critic=gaussian([1, -0.5, 0.4], [1, 1, 1], path))
    loss = wrong.loss("student", noise_batch(64, 3), Rng(0)).total
    assert max(g.abs().max() for g in gradients(loss, student.denoiser).values()) > 1e-3


def test_the_match_is_exactly_nothing_while_the_critic_is_a_copy_of_the_teacher():
    teacher = mlp()
    game = DMD2(teacher, Student.like(teacher, (2,)), DMD2Options())
    loss = game.loss("student", batch_of(16), Rng(0))
    loss.total.backward()
    assert loss.parts["match"] == 0
    assert largest_gradient(game.student) == 0
    with torch.no_grad():
        next(game.critic.parameters()).add_(0.1)
    game.loss("student", batch_of(16), Rng(0)).total.backward()
    assert largest_gradient(game.student) > 0


def test_the_critic_rests_at_the_law_of_the_students_samples():
    """The expectation is quadratic in (z, eps), so sigma points give it exactly."""
    path = Straight()
    student = affine_student(spd(2, 1), torch.tensor([0.4, -1.0], dtype=torch.float64), path)
    level = NoiseSampler(low=0.6, high=0.6)
    law = student.denoiser.law()
    z, eps = sigma_points(2, 2)

    def steepest(critic):
        game = DMD2(gaussian(), student, DMD2Options(critic_levels=level), critic=critic)
        loss = game.loss("critic", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5])).total
        return max(g.abs().max().item() for g in gradients(loss, critic).values())

    # the posterior mean of a Gaussian is affine in x_t: read its matrix and offset off the law
    still = law(torch.zeros(1, 2, dtype=torch.float64), 0.6)[0]
    matrix = torch.stack([law(row[None], 0.6)[0] - still for row in torch.eye(2, dtype=torch.float64)], 1)
    assert steepest(Affine(matrix, still, path)) < 1e-13
    assert steepest(Affine(1.05 * matrix, still, path)) > 1e-3


# -- the loss, written out ---------------------------------------------------------------------------------


def test_the_students_loss_is_the_stopped_pull_along_the_gap():
    game, batch = game_of(), batch_of(8)
    found = game.loss("student", batch, Rng(3)).total
    rng = Rng(3)
    x = game.student(batch.noise, 1.0, 0.0)
    t = UNIFORM.on(game.student.path)(x, rng)
    x_t = game.student.path.corrupt(x, t, normal(x, rng))
    with torch.no_grad():
        direction = gap(x, game.critic(x_t, t), game.teacher(x_t, t))
    wanted = stopped_pull(x, direction).mean()
    assert torch.equal(found, wanted)
    ours, theirs = gradients(found, game.student), gradients(wanted, game.student)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_critics_loss_is_the_weighted_error_of_denoising_the_students_samples():
    levels = NoiseSampler(low=0.1, high=0.9)
    game, batch = game_of(DMD2Options(critic_levels=levels, data_std=0.5)), batch_of(8)
    found = game.loss("critic", batch, Rng(3)).total
    rng = Rng(3)
    x = game.student(batch.noise, 1.0, 0.0).detach()
    t = levels.on(game.student.path)(x, rng)
    guess = game.critic(game.student.path.corrupt(x, t, normal(x, rng)), t)
    weight = 1 / 0.5**2 + ((1 - t) / t) ** 2
    assert found.item() == pytest.approx((weight * squared_error(guess, x)).mean().item(), rel=1e-5)


def test_the_adversary_adds_its_weight_times_softplus_of_minus_the_logit():
    game, batch = game_of(DMD2Options(levels=UNIFORM, gan=GanOptions(student=0.5))), batch_of(8)
    loss = game.loss("student", batch, Rng(3))
    rng = Rng(3)
    x = game.student(batch.noise, 1.0, 0.0)
    t = UNIFORM.on(game.student.path)(x, rng)
    features = game.critic(game.student.path.corrupt(x, t, normal(x, rng)), t, None, "features")
    logits = game.critic.adversary(features)
    assert loss.parts["gan"].item() == pytest.approx(generator_loss(logits).mean().item(), rel=1e-5)
    assert loss.total.item() == pytest.approx((loss.parts["match"] + 0.5 * loss.parts["gan"]).item(), rel=1e-5)


def test_reverse_kl_with_an_adversary_weighs_every_row_alike_bit_by_bit():
    batch = batch_of(16)
    plain = game_of(DMD2Options(levels=UNIFORM)).loss("student", batch, Rng(3)).parts["match"]
    match = {
        name: game_of(DMD2Options(levels=UNIFORM, gan=GAN, divergence=name))
        .loss("student", batch, Rng(3))
        .parts["match"]
        for name in ("reverse_kl", "forward_kl")
    }
    assert torch.equal(match["reverse_kl"], plain)
    assert not torch.equal(match["forward_kl"], plain)


def test_a_divergence_without_an_adversary_is_refused():
    with pytest.raises(ValueError, match="jensen_shannon.*gan"):
        game_of(DMD2Options(divergence="jensen_shannon"))


def test_student_and_teacher_on_two_paths_are_refused():
    with pytest.raises(ValueError, match="one path"):
        DMD2(mlp(Exploding()), Student(mlp(Straight()), (2,)), DMD2Options())


def test_guidance_changes_the_teachers_guess_alone():
    options = {scale: DMD2Options(levels=UNIFORM, guidance=scale) for scale in (1.0, 3.0)}
    games = {scale: game_of(option, classes=4) for scale, option in options.items()}
    batch = batch_of(8, classes=4)
    plain, guided = (games[scale].loss("student", batch, Rng(3)).parts["match"] for scale in (1.0, 3.0))
    assert not torch.equal(plain, guided)
    one, three = (games[scale].loss("critic", batch, Rng(3)).total for scale in (1.0, 3.0))
    assert torch.equal(one, three)  # the critic never sees guidance
    rng, game = Rng(3), games[3.0]
    x = game.student(batch.noise, 1.0, 0.0, batch.cond)
    t = UNIFORM.on(game.student.path)(x, rng)
    x_t = game.student.path.corrupt(x, t, normal(x, rng))
    real = Guided(game.teacher, 3.0)(x_t, t, batch.cond)
    wanted = stopped_pull(x, gap(x, game.critic(x_t, t, batch.cond), real)).mean()
    assert torch.equal(guided, wanted.detach())


# -- who learns from whom ----------------------------------------------------------------------------------

GANS = {
    "none": None,
    "on critic": GAN,
    "own levels": GanOptions(levels=UNIFORM, width=8),
    "on teacher": GanOptions(on="teacher", width=8),
    "r1": GanOptions(r1=1.0, width=8),
    "two taps": GanOptions(taps=2, width=8),
}


@pytest.mark.parametrize("gan", GANS.values(), ids=GANS)
def test_a_turn_leaves_a_gradient_in_its_player_and_in_nobody_else(gan):
    for player, other in (("student", "critic"), ("critic", "student")):
        game = game_of(DMD2Options(levels=UNIFORM, gan=gan, guidance=2.0), classes=3)
        game.loss(player, batch_of(8, classes=3), Rng(3)).total.backward()
        assert largest_gradient(getattr(game, player)) > 0
        assert all(p.grad is None for p in getattr(game, other).parameters())
        assert all(p.grad is None for p in game.teacher.parameters())
        assert all(p.requires_grad for p in getattr(game, other).parameters())


def test_a_sample_that_is_not_detached_would_train_the_student_on_the_critics_turn():
    game, batch = game_of(), batch_of(8)
    x = rollout(game.student, batch.noise, None, Rng(3), grad=True, steps=1).x
    t = torch.full((8,), 0.5)
    squared_error(game.critic(game.student.path.corrupt(x, t, batch.data), t), x).mean().backward()
    assert largest_gradient(game.student) > 0


def test_a_head_on_the_teachers_features_leaves_the_teacher_as_it_was():
    options = DMD2Options(levels=UNIFORM, critic_turns=2, gan=GANS["on teacher"])
    game = game_of(options)
    before = copy.deepcopy(game.teacher.state_dict())
    heads = copy.deepcopy(game.critic.adversary.state_dict())
    play(game, stream(mixture(), 16), 2)
    after = game.teacher.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(heads[k], v) for k, v in game.critic.adversary.state_dict().items())
    assert not any(p.requires_grad for p in game.teacher.parameters())


def test_an_adversary_on_the_teacher_reads_the_pass_that_the_match_needs_and_changes_no_gradient():
    options = DMD2Options(levels=UNIFORM, gan=GANS["on teacher"], divergence="forward_kl")
    game, batch, wants = game_of(options), batch_of(8), []
    game.teacher.register_forward_pre_hook(lambda module, args: wants.append(args[3:]))
    found = gradients(game.loss("student", batch, Rng(3)).total, game.student)
    assert wants == [("both",)]
    rng, critic = Rng(3), game.critic
    x = game.student(batch.noise, 1.0, 0.0)
    t = UNIFORM.on(game.student.path)(x, rng)
    x_t = game.student.path.corrupt(x, t, normal(x, rng))
    logits = critic.adversary(game.teacher(x_t, t, None, "features"))
    pull = stopped_pull(x, gap(x, critic(x_t, t), game.teacher(x_t, t)))
    match = ratio_weight("forward_kl", ratio_of(logits, *options.ratio_range)) * pull
    wanted = gradients((match + options.gan.student * generator_loss(logits)).mean(), game.student)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7) for name in wanted)


def test_the_head_on_the_teacher_is_a_player_and_the_teacher_is_not():
    game = game_of(DMD2Options(gan=GANS["on teacher"]))
    learning = {id(p) for p in game.critic.parameters()}
    assert {id(p) for p in game.critic.adversary.parameters()} <= learning
    assert not {id(p) for p in game.teacher.parameters()} & learning


@pytest.mark.parametrize("turns", [1, 5])
def test_the_critic_moves_so_many_times_before_the_student_moves_once(turns):
    assert game_of(DMD2Options(critic_turns=turns)).turns(0) == ("critic",) * turns + ("student",)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_head_reads_as_many_layers_as_asked_for(count):
    critic = mlp(depth=4)
    game = game_of(DMD2Options(levels=UNIFORM, gan=GanOptions(taps=count)), critic=critic)
    assert len(game.critic.denoiser.taps) == count == len(game.critic.adversary.head.stems)


def test_a_label_changes_a_conditional_adversarys_logit_alone():
    for conditional in (False, True):
        game = game_of(DMD2Options(gan=GanOptions(conditional=conditional)), classes=3)
        adversary = game.critic.adversary
        if conditional:
            torch.nn.init.normal_(adversary.head.project.weight)
        features = [torch.randn(4, 32)]
        zero, one = (adversary(features, torch.full((4,), label)) for label in (0, 1))
        assert torch.equal(zero, one) is not conditional


# -- the gradient penalty ----------------------------------------------------------------------------------


def test_the_exact_penalty_is_half_its_weight_times_the_squared_slope_of_the_logit():
    options = GanOptions(r1=3.0, r1_every=4, width=8)
    game = game_of(DMD2Options(gan=options), dtype=torch.float64)
    x_t, t = torch.randn(5, 2, generator=seeded(1), dtype=torch.float64), torch.full((5,), 0.4, dtype=torch.float64)
    found = game.critic.adversary.penalty(game.critic, x_t, t, None, Rng(0))

    def logit(x):  # of all rows at once; row by row, the Jacobian's diagonal blocks
        return game.critic.adversary(game.critic(x, t, None, "features")).squeeze(1)

    step = 1e-5
    slopes = torch.stack([(logit(x_t + step * e) - logit(x_t - step * e)) / (2 * step) for e in torch.eye(2).double()])
    assert torch.allclose(found, 3.0 / 2 * 4 * slopes.square().sum(0), rtol=1e-5)


def test_the_penalty_by_difference_tends_to_the_exact_one():
    game = game_of(DMD2Options(gan=GAN), dtype=torch.float64)
    adversary = game.critic.adversary
    x_t, t = torch.full((4000, 2), 0.3, dtype=torch.float64), torch.full((4000,), 0.4, dtype=torch.float64)

    def penalty(**options):
        adversary.options = GanOptions(r1=1.0, r1_step=1e-3, **options)
        return adversary.penalty(game.critic, x_t, t, None, Rng(0)).mean().item()

    assert penalty(r1_kind="difference") == pytest.approx(penalty(), rel=0.1)


def test_the_penalty_trains_the_critic_and_is_paid_on_average_once_in_its_turns():
    game = game_of(DMD2Options(levels=UNIFORM, gan=GanOptions(r1=1.0, r1_every=4)))
    paid = ["r1" in game.loss("critic", batch_of(2), Rng(k)).parts for k in range(100)]
    assert 10 < sum(paid) < 40
    adversary = game.critic.adversary
    x = torch.randn(4, 2)
    adversary.penalty(game.critic, x, torch.full((4,), 0.5), None, Rng(0)).mean().backward()
    assert largest_gradient(game.critic.denoiser) > 0
    assert largest_gradient(adversary) > 0


# -- several steps -----------------------------------------------------------------------------------------


class Watched(Denoiser):
    """Keeps what it was shown at every time."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.path, self.seen = inner, inner.path, {}

    def forward(self, x, t, cond=None, want="x0", s=None):
        self.seen.setdefault(t, []).append(x.detach().clone())
        return self.inner(x, t, cond, want, s)


@pytest.mark.parametrize("policy", ["renoise", "ode"])
def test_the_second_step_trains_on_the_law_that_it_meets_in_use(policy):
    stats = pytest.importorskip("scipy.stats")
    one = torch.ones(1, dtype=torch.float64)
    net = Watched(Affine(0.6 * one[None], 0.4 * one, Straight()))  # its samples are far from the data's N(0, 1)
    student = Student(net, (1,), steps={1: (1.0,), 2: (1.0, 0.5)}, policy=policy)
    for k in range(60):
        rollout(student, noise_batch(100, 1, k).noise, None, Rng(k), True, 2)
    trained = torch.cat(net.seen[0.5]).squeeze(1)
    net.seen.clear()
    student.generate(noise_batch(3000, 1, 999).noise, rng=seeded(5), steps=2)
    met = torch.cat(net.seen[0.5]).squeeze(1)
    assert len(trained) in range(1500, 4500)  # about half of the turns train the second step
    assert stats.ks_2samp(trained, met).pvalue > 0.01
    data = torch.randn(3000, generator=seeded(6), dtype=torch.float64)
    noised = student.path.corrupt(data, 0.5, torch.randn(3000, generator=seeded(7), dtype=torch.float64))
    assert stats.ks_2samp(noised, met).pvalue < 1e-6


def test_every_step_is_trained_and_only_the_last_one_carries_a_gradient():
    path = Straight()
    net = Watched(Affine(torch.eye(2).double(), torch.zeros(2).double(), path))
    student = Student(net, (2,), steps={1: (1.0,), 3: (1.0, 0.7, 0.3)}, policy="renoise")
    ends = set()
    for k in range(30):
        net.seen.clear()
        x = rollout(student, noise_batch(4, 2, k).noise, None, Rng(k), True, 3).x
        ends.add(len(net.seen))
        assert x.requires_grad
        (slope,) = torch.autograd.grad(x.sum(), net.inner.offset)
        assert slope.tolist() == [4.0, 4.0]  # once for each row: earlier steps add nothing
    assert ends == {1, 2, 3}


def test_a_students_options_give_it_the_times_that_it_is_trained_on():
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    given = DMD2.student_options(DMD2Options(steps=3, start=10.0), path)
    student = Student(mlp(path), (2,), **given)
    assert student.start == 10.0
    assert student.policy == "renoise"
    times = student.times(3)
    assert times[0] == 10.0
    assert list(times) == sorted(times, reverse=True)
    assert DMD2.student_options(DMD2Options(), path) == {"start": 20.0}
    chosen = DMD2.student_options(DMD2Options(steps=2, start=10.0, times=(10.0, 1.0)), path)
    assert Student(mlp(path), (2,), **chosen).times(2) == (10.0, 1.0)


@pytest.mark.parametrize("steps", [1, 2])
def test_pairs_pull_the_first_step_towards_the_teachers_answers(steps):
    from fewstep.method import PairOptions

    options = DMD2Options(
        levels=UNIFORM, pairs=PairOptions(), pairs_weight=0.5, pairs_distance="huber", steps=steps, huber_c=0.1
    )
    game = game_of(options, steps={1: (1.0,), 2: (1.0, 0.4)}, policy="renoise")
    batch = batch_of(8, pairs=True)
    loss = game.loss("student", batch, Rng(3))
    first = game.student(batch.noise, 1.0, 0.0)
    wanted = distance("huber", first, batch.target, 0.1).mean()
    assert loss.parts["pairs"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.total.item() == pytest.approx((loss.parts["match"] + 0.5 * wanted).item(), rel=1e-5)
    assert game.pairs() == options.pairs
    assert "pairs" not in game_of(DMD2Options(levels=UNIFORM)).loss("student", batch, Rng(3)).parts


# -- the right way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan", [None, GanOptions(width=16)], ids=["plain", "gan"])
def test_a_short_run_brings_the_students_law_to_that_of_a_mixture(gan):
    law = mixture()
    student = Student(mlp(width=64, seed=1), (2,))
    options = DMD2Options(levels=UNIFORM, critic_levels=NoiseSampler(low=0.02), critic_turns=2, gan=gan)
    game = DMD2(law, student, options, critic=mlp(width=64, seed=2))
    noise, real = torch.randn(2000, 2, generator=seeded(1)), law.sample(2000, seeded(2), dtype=torch.float32)
    before = sliced_distance(student.generate(noise).detach(), real)
    play(game, stream(law, 64), 200 if gan is None else 150, rate=4e-3, betas=(0.0, 0.99))
    after = sliced_distance(student.generate(noise).detach(), real)
    assert before > 1
    assert after < before / 2


def test_the_exact_student_of_a_gaussian_has_no_pull_when_it_is_watched_by_the_law_itself():
    law = gaussian()
    game = DMD2(law, exact_student(law), DMD2Options(levels=UNIFORM), critic=law)
    assert game.loss("student", noise_batch(64, 2), seeded(0)).total == 0


def test_an_exact_law_has_no_features_for_an_adversary():
    with pytest.raises(ValueError, match="features"):
        Adversary(gaussian(), (2,), GAN, None)
