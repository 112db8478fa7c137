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
    assert seen == [True, False]  # with and without the condition in one call
    assert student.training


def test_the_rows_that_jump_alone_are_judged_and_each_as_if_it_stood_alone():
    student, batch = labelled(), batch_of(8, classes=2, dtype=torch.float64)
    calls = []
    student.denoiser.net.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    fresh = torch.randn(batch.data.shape, generator=seeded(9), dtype=torch.float64)
    options = SelfEOptions(levels=UNIFORM, drop=0.0, jumps=0.5, weight="none")
    chosen = torch.tensor([0.0, 0.9, 0.0, 0.9, 0.9, 0.0, 0.9, 0.9])
    script = Script(normals=[fresh], uniforms=[0.3, 0.7, chosen])
    mixed = SelfE(None, student, options).loss("student", batch, script).total.item()
    assert calls == [8, 6]  # three rows, with and without their condition

    def alone(row, s):
        one = Batch(batch.data[row : row + 1], batch.cond[row : row + 1], batch.noise[row : row + 1])
        script = Script(normals=[fresh[row : row + 1]], uniforms=[s, 0.7, 0.0])
        return SelfE(None, student, options).loss("student", one, script).total.item()

    rows = [alone(row, 0.3 if jump else 0.7) for row, jump in enumerate((chosen < 0.5).tolist())]
    assert mixed == pytest.approx(sum(rows) / 8, rel=1e-9)


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
