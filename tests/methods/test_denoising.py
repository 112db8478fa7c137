import pytest
import torch
from games import Nudged, Script, batch_of, gradients, mlp, play, sigma_points, stream
from laws import draw, finite_set, gaussian, hermite, mixture, seeded

from fewstep.losses import squared_error
from fewstep.method import Batch
from fewstep.methods.denoising import (
    Denoising,
    DenoisingOptions,
    FlowMatching,
    FlowMatchingOptions,
    drop_condition,
    level_weight,
    straight_rate,
)
from fewstep.path import Exploding, NoiseSampler, Straight, Trigonometric, VariancePreserving
from fewstep.rng import Rng
from fewstep.student import Student

PATHS = [Straight(), Trigonometric(), Exploding(sigma_max=10.0), VariancePreserving()]


def fixed(part):
    return NoiseSampler(kind="uniform", low=part, high=part)


def steepest(loss, module):
    return max(g.abs().max().item() for g in gradients(loss, module).values())


def gaussian_batch(law):
    """Every sigma point of (x0, eps) for a diagonal Gaussian."""
    z, eps = sigma_points(2, 2)
    return Batch(law.mean + law.variance.sqrt() * z, None, eps), eps


# expectations of an affine perturbation times the error are quadratic in (x0, eps): sigma points are exact
@pytest.mark.parametrize("weight", ["edm", "snr", "none"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_denoising_rests_at_the_exact_posterior_mean(path, part, weight):
    def slope(model):
        law = gaussian(path=path)
        batch, eps = gaussian_batch(law)
        student = Student(Nudged(model, size=2), (2,))
        game = Denoising(None, student, DenoisingOptions(levels=fixed(part), weight=weight))
        loss = game.loss("student", batch, Script(normals=[eps], uniforms=[0.0]))
        scale = level_weight(weight, path, torch.tensor([part * path.t_max], dtype=torch.float64), 1.0).item()
        return steepest(loss.total, student.denoiser) / scale

    assert slope(gaussian(path=path)) < 1e-12
    assert slope(gaussian(mean=(2.1, -1.0), path=path)) > 1e-3 or path.kind != "straight"
    assert slope(gaussian(std=(0.6, 1.5), path=path)) > 1e-4


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_flow_matching_rests_at_the_exact_velocity(path, part):
    def slope(model):
        batch, _ = gaussian_batch(gaussian(path=path))
        student = Student(Nudged(model, "velocity", size=2), (2,))
        game = FlowMatching(None, student, FlowMatchingOptions(levels=fixed(part)))
        return steepest(game.loss("student", batch, Script(uniforms=[0.0])).total, student.denoiser)

    assert slope(gaussian(path=path)) < 1e-11
    assert slope(gaussian(std=(0.6, 1.5), path=path)) > 1e-4


def test_denoising_rests_at_the_posterior_mean_of_a_law_that_is_no_gaussian():
    """Atoms with equal weights, and Gauss-Hermite quadrature in the noise."""
    nodes, weights = hermite(120)
    law = finite_set(points=4, dimension=1)
    game = Denoising(None, Student(Nudged(law, size=1), (1,)), DenoisingOptions(levels=fixed(0.5), weight="none"))

    def slope(shift):
        total = sum(
            w * game.loss(
                "student", Batch(law.mean + shift, None, law.mean), Script([x.expand(4, 1)], [0.0])
            ).total
            for x, w in zip(nodes, weights, strict=True)
        )  # fmt: skip
        return steepest(total, game.student.denoiser)

    assert slope(0.0) < 1e-12
    assert slope(0.1) > 1e-3


def test_flow_matching_is_denoising_with_the_weight_of_the_velocity():
    """On the straight path v - (eps - x0) = (x0 - D) / t."""
    net, batch = mlp(dtype=torch.float64), batch_of(8, dtype=torch.float64)
    student = Student(net, (2,))
    flow = FlowMatching(None, student, FlowMatchingOptions(levels=fixed(0.4))).loss("student", batch, Rng(0)).total
    options = DenoisingOptions(levels=fixed(0.4), weight="none")
    script = Script(normals=[batch.noise], uniforms=[0.0])
    denoise = Denoising(None, student, options).loss("student", batch, script).total
    assert flow.item() == pytest.approx(denoise.item() / 0.16)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_snr_weight_is_the_squared_error_of_the_noise(path):
    t = torch.tensor([0.2, 0.6], dtype=torch.float64) * path.t_max
    x0, guess, eps = torch.randn(3, 2, 4, generator=seeded(0), dtype=torch.float64)
    x_t = path.corrupt(x0, t, eps)
    noise = path.convert(guess, x_t, t, "x0", "eps")
    weight = level_weight("snr", path, t, 1.0)
    assert torch.allclose(weight * squared_error(guess, x0), squared_error(noise, eps), rtol=1e-9)


def test_the_edm_weight_gives_the_network_of_the_preconditioned_denoiser_a_loss_of_one_at_every_level():
    """x0 = c_skip x + c_out F, and the best constant F = 0 for white data of that spread leaves an error c_out^2."""
    path, sd = Exploding(), 0.5
    t = torch.logspace(-2, 1.8, 9, dtype=torch.float64)
    left = t**2 * sd**2 / (t**2 + sd**2)  # Var[x0 | x_t]
    assert torch.allclose(level_weight("edm", path, t, sd) * left, torch.ones_like(t))


def test_an_unknown_weight_is_refused():
    with pytest.raises(ValueError, match="unknown weight 'loud'"):
        level_weight("loud", Straight(), torch.ones(1), 1.0)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_rate_of_a_pair_is_the_derivative_of_its_noised_sample(path):
    x0, eps = torch.randn(2, 5, 3, generator=seeded(0), dtype=torch.float64)
    t = torch.full((5,), 0.3 * path.t_max, dtype=torch.float64)
    _, rate = torch.func.jvp(lambda u: path.corrupt(x0, u, eps), (t,), (torch.ones_like(t),))
    assert torch.allclose(straight_rate(path, x0, eps, t), rate, atol=1e-10)


def test_the_share_of_conditions_that_is_dropped_is_the_one_asked_for():
    net, labels, x = mlp(classes=3), torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 2)
    dropped = drop_condition(net, labels, x, 0.2, Rng(0))
    assert set(dropped.tolist()) == {0, 3}
    assert 0.17 < (dropped == 3).float().mean() < 0.23
    assert drop_condition(net, labels, x, 0.0, Rng(0)) is labels
    assert drop_condition(net, None, x, 0.5, Rng(0)) is None


@pytest.mark.parametrize("kind", [Denoising, FlowMatching])
def test_a_short_run_comes_close_to_the_exact_score_of_a_mixture(kind):
    law = mixture()
    student = Student(mlp(width=64, prediction="x0" if kind is Denoising else "flow"), (2,))
    levels = NoiseSampler(low=0.02)
    options = (
        DenoisingOptions(levels=levels, weight="none") if kind is Denoising else FlowMatchingOptions(levels=levels)
    )
    x = draw(law, 2000, 0.5).float()

    def error():
        with torch.no_grad():
            guess, truth = student(x, 0.5, 0.0, None, "x0"), law(x, 0.5)
        return ((guess - truth).square().mean() / truth.var(0).mean()).item()

    before = error()
    play(kind(None, student, options), stream(law, 128), 300, rate=6e-3)
    assert error() < min(0.02, before / 10)
