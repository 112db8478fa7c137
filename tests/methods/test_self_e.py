import pytest
import torch
from games import Script, batch_of, gradients, mlp, play
from laws import mixture, seeded

from fewstep.losses import squared_error
from fewstep.method import Batch
from fewstep.methods.self_e import SelfE, SelfEOptions, renormed
from fewstep.path import NoiseSampler, Straight
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import Mixture

UNIFORM = NoiseSampler(kind="uniform")


@pytest.mark.parametrize("s", [0.1, 0.4, 0.8])
def test_the_judged_guess_climbs_the_log_probability_of_its_condition(s):
    """x_self - x0_hat = sigma_s^2 / alpha_s grad log p(cond | x_s), on the exact mixture."""
    law = mixture(classes=True)
    game = SelfE(None, Student(law, (2,)))
    guess, noise = (torch.randn(64, 2, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    cond, times = torch.arange(64) % 2, torch.full((64,), s, dtype=torch.float64)
    pull = game.judged(guess, times, cond, noise) - guess
    x = law.path.corrupt(guess, s, noise).requires_grad_(True)
    (slope,) = torch.autograd.grad((law.log_density(x, s, cond) - law.log_density(x, s)).sum(), x)
    assert slope.abs().max() > 0.1
    assert torch.allclose(pull, s**2 / (1 - s) * slope, rtol=0, atol=1e-6 * slope.abs().max())
    assert not torch.allclose(pull, -(s**2) / (1 - s) * slope, rtol=0.1, atol=1e-3)  # the other sign


def late(student, critic=None, **options):
    given = {"levels": UNIFORM, "drop": 0.0, "jumps": 1.0, "weight": "none", "fake": 1.0, "fake_begin": 0.0}
    game = SelfE(None, student, SelfEOptions(**{**given, **options}))
    if critic is not None:
        game.critic = critic
    return game


@pytest.mark.parametrize("s", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("labels", [True, False])
def test_the_late_step_goes_down_the_divergence_between_the_students_law_and_the_datas(s, labels):
    """x_self - x0_hat = sigma_s^2 / alpha_s (grad log p(x_s | cond) - grad log q(x_s | cond)), q the student's law."""
    law = mixture(classes=labels)
    own = Mixture([1.0, 1.0, 1.0, 1.0], 0.8 * law.mean, 0.4, labels=law.labels)
    game = late(Student(law, (2,)), own)
    guess, noise = (torch.randn(64, 2, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    cond, times = torch.arange(64) % 2 if labels else None, torch.full((64,), s, dtype=torch.float64)
    step = game.judged(guess, times, cond, noise) - guess
    x = law.path.corrupt(guess, s, noise).requires_grad_(True)
    (slope,) = torch.autograd.grad((law.log_density(x, s, cond) - own.log_density(x, s, cond)).sum(), x)
    assert slope.abs().max() > 0.1
    assert torch.allclose(step, s**2 / (1 - s) * slope, rtol=0, atol=1e-6 * slope.abs().max())
    early = late(Student(law, (2,)), own, fake_begin=0.5).judged(guess, times, cond, noise) - guess
    assert not torch.allclose(step, early, rtol=0.05, atol=1e-3)
    added = step - early  # the auxiliary term alone, which the wrong sign would turn round
    assert not torch.allclose(step - 2 * added, s**2 / (1 - s) * slope, rtol=0.1, atol=1e-3)


def test_late_it_rests_where_the_students_law_is_the_datas_and_early_it_sharpens_on():
    law = mixture(classes=True)
    guess, noise = (torch.randn(64, 2, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    cond, times = torch.arange(64) % 2, torch.full((64,), 0.5, dtype=torch.float64)
    rest, early = (late(Student(law, (2,)), law, fake=fake) for fake in (1.0, 0.5))
    assert (rest.judged(guess, times, cond, noise) - guess).abs().max() < 1e-12
    assert (early.judged(guess, times, cond, noise) - guess).abs().max() > 0.1


def test_the_critic_denoises_the_students_guesses_and_the_student_gets_no_gradient_of_it():
    student, batch = labelled(), batch_of(8, classes=2, dtype=torch.float64)
    game, fresh = late(student), torch.randn(8, 2, generator=seeded(9), dtype=torch.float64)
    with torch.no_grad():
        for value in game.critic.parameters():
            value.add_(0.05)
    loss = game.loss("critic", batch, Script(normals=[fresh], uniforms=[0.3, 0.7, 0.0])).total
    t, s = (torch.full((8,), v, dtype=torch.float64) for v in (0.7, 0.3))
    guess = student(0.3 * batch.data + 0.7 * batch.noise, t, s, batch.cond, "x0").detach()
    wanted = squared_error(game.critic(0.7 * guess + 0.3 * fresh, s, batch.cond, "x0", s), guess).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    loss.backward()
    assert all(p.grad is None for p in student.parameters())
    assert any(p.grad.abs().max() > 0 for p in game.critic.parameters() if p.grad is not None)


def test_the_late_stage_begins_when_it_is_said_with_the_student_as_its_own_critic():
    student = labelled()
    game = late(student, fake_begin=0.5, horizon=10, critic_turns=2)
    assert game.players == ("student", "critic") and SelfE(None, student).players == ("student",)
    assert game.turns(4) == ("student",) and game.turns(5) == ("critic", "critic", "student")
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.1)
    assert game.settle(3) == () and game.settle(5) == ()
    forgotten = game.settle(4)
    assert {id(p) for p in forgotten} == {id(p) for p in game.critic.parameters()}
    pairs = zip(game.critic.parameters(), student.denoiser.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) and mine is not theirs for mine, theirs in pairs)


def scripted(student, batch, t, s, **options):
    """The loss at given times, nothing dropped, and the noise of the landing."""
    fresh = torch.randn(batch.data.shape, generator=seeded(9), dtype=batch.data.dtype)
    game = SelfE(None, student, SelfEOptions(levels=UNIFORM, drop=0.0, jumps=1.0, weight="none", **options))
    return game.loss("student", batch, Script(normals=[fresh], uniforms=[s, t, 0.0])).total, game, fresh


def labelled(seed=0):
    student = Student(mlp(classes=2, reads_s=True, dtype=torch.float64, seed=seed), (2,))
    torch.nn.init.normal_(student.denoiser.net.span_embedding.linear_2.weight, std=0.1)
    return student


def test_the_loss_is_written_out_and_its_target_carries_no_gradient():
    student, batch = labelled(), batch_of(8, classes=2, dtype=torch.float64)
    loss, _, fresh = scripted(student, batch, 0.7, 0.3)
    t, s = (torch.full((8,), v, dtype=torch.float64) for v in (0.7, 0.3))
    guess = student(0.3 * batch.data + 0.7 * batch.noise, t, s, batch.cond, "x0")
    x_s = 0.7 * guess + 0.3 * fresh
    both = [student(x_s, s, s, c, "x0") for c in (torch.full_like(batch.cond, 2), batch.cond)]
    lam = 0.7 / 0.3 - 0.3 / 0.7
    mixed = batch.data + lam * (guess - (both[0] - both[1]))
    aim = mixed * batch.data.norm(dim=1, keepdim=True) / mixed.norm(dim=1, keepdim=True)

    assert loss.item() == pytest.approx(squared_error(guess, aim).mean().item(), rel=1e-9)
    found = gradients(loss, student)
    through = gradients(squared_error(guess, aim).mean(), student)
    again = student(0.3 * batch.data + 0.7 * batch.noise, t, s, batch.cond, "x0")
    held = gradients(squared_error(again, aim.detach()).mean(), student)
    assert all(torch.allclose(found[k], held[k], rtol=1e-8, atol=1e-12) for k in found)
    assert any(not torch.allclose(found[k], through[k], rtol=0.05, atol=1e-6) for k in found)


def test_the_target_keeps_the_norm_of_the_clean_sample():
    x, like = (torch.randn(16, 3, 4, 4, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    again = renormed(x, like)
    assert torch.allclose(again.flatten(1).norm(dim=1), like.flatten(1).norm(dim=1), rtol=1e-14)
    assert torch.allclose(
        torch.nn.functional.cosine_similarity(again.flatten(1), x.flatten(1)), torch.ones(16).double()
    )


def test_where_it_does_not_jump_it_is_denoising():
    student, batch = labelled(), batch_of(8, classes=2, dtype=torch.float64)
    loss, _, _ = scripted(student, batch, 0.5, 0.5)
    t = torch.full((8,), 0.5, dtype=torch.float64)
    plain = squared_error(student(0.5 * (batch.data + batch.noise), t, t, batch.cond, "x0"), batch.data).mean()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-9)


def test_a_condition_that_says_nothing_pulls_nowhere():
    game = SelfE(None, Student(mixture(), (2,)))
    guess = torch.randn(8, 2, generator=seeded(0), dtype=torch.float64)
    assert torch.equal(game.judged(guess, torch.full((8,), 0.3), None, guess), guess)


def test_it_judges_without_dropout_and_goes_on_with_it():
    student, seen = labelled(), []
    student.denoiser.net.register_forward_hook(lambda module, args, out: seen.append(module.training))
    game = SelfE(None, student, SelfEOptions(levels=UNIFORM, jumps=1.0)).train()
    game.loss("student", batch_of(4, classes=2, dtype=torch.float64), Rng(0))
    assert seen == [True, False, False]
    assert student.training


def test_its_student_serves_several_steps_evenly():
    given = SelfE.student_options(SelfEOptions(), Straight())
    assert given["steps"][4] == pytest.approx((1.0, 0.75, 0.5, 0.25))


def test_two_steps_of_a_short_run_are_nearer_the_classes_than_two_of_plain_denoising():
    """Class-conditional mixture, equal updates: the share of two-step samples on a mode of their own class."""
    law = mixture(classes=True)

    def stream(step, turn):
        rng = Rng(3, step, turn)
        cond = rng.integers(2, 128)
        data = law.sample(128, rng, cond, dtype=torch.float32)
        return Batch(data, cond, rng.normal((128, 2)))

    def on_mode(jumps):
        student = Student(mlp(classes=2, reads_s=True, width=64, prediction="velocity"), (2,), steps={2: (1.0, 0.5)})
        game = SelfE(None, student, SelfEOptions(levels=NoiseSampler(low=0.02), jumps=jumps, drop=0.1))
        play(game, stream, 400, rate=4e-3)
        cond = torch.arange(1000) % 2
        with torch.no_grad():
            x = student.generate(torch.randn(1000, 2, generator=seeded(1)), cond, steps=2)
        near = torch.cdist(x.double(), law.mean)
        near = torch.where(law.labels[None] == cond[:, None], near, torch.inf)
        return (near.min(1).values < 3 * 0.25).double().mean().item()

    assert on_mode(0.5) > on_mode(0.0) + 0.05
