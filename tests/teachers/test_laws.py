import math

import pytest
import torch
from laws import LAWS, PATHS, draw, finite_set, full_gaussian, full_mixture, gaussian, inner_times, mixture, seeded, spd

from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.rng import Rng
from fewstep.teachers import FiniteSet, Gaussian, Mixture

every_law = pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
SOME_PATHS = pytest.mark.parametrize(
    "path", [Straight(), VariancePreserving(), Exploding(sigma_min=0.02, sigma_max=20.0)], ids=lambda p: p.kind
)


def line(low, high, count):
    """Points and the width of a cell, for sums that stand for integrals."""
    points = torch.linspace(low, high, count, dtype=torch.float64)
    return points, (high - low) / (count - 1)


@every_law
@every_path
def test_score_is_the_gradient_of_the_log_density_at_every_time(make, path):
    law = make(path=path)
    for t in inner_times(path, 5).tolist():
        x = draw(law, 6, t).requires_grad_()
        (slope,) = torch.autograd.grad(law.log_density(x, t).sum(), x)
        score = law(x.detach(), t, want="score")
        assert torch.allclose(score, slope, rtol=1e-8, atol=1e-8 * slope.abs().max().item())


def test_a_score_without_the_path_s_alpha_is_caught():
    """Broken twin: the score of data that were not shrunk."""
    law, t = gaussian(path=VariancePreserving()), 0.4
    x = draw(law, 6, t)
    wrong = -(x - law.mean) / (law.variance + law.path.coefs(t).sigma ** 2)
    assert not torch.allclose(wrong, law(x, t, want="score"), rtol=1e-2)


@every_law
@SOME_PATHS
def test_posterior_mean_and_score_agree_by_tweedie(make, path):
    law = make(path=path)
    for t in inner_times(path, 4).tolist():
        x, (alpha, sigma, _, _) = draw(law, 6, t), path.coefs(t)
        tweedie = (x + sigma**2 * law(x, t, want="score")) / alpha
        assert torch.allclose(law(x, t), tweedie, rtol=1e-8, atol=1e-8)


@SOME_PATHS
def test_posterior_mean_is_the_integral_that_it_stands_for(path):
    law = Mixture([0.7, 0.3], [[-1.0], [1.5]], [0.3, 0.6], path=path)
    x0, _ = line(-6, 8, 20_001)
    prior = law.log_density(x0[:, None])
    for t in inner_times(path, 4).tolist():
        alpha, sigma, _, _ = path.coefs(t)
        for x in (-2.0, 0.1, 1.3):
            weight = (prior - (x - alpha * x0) ** 2 / (2 * sigma**2)).softmax(0)
            guess = law(torch.tensor([[x]], dtype=torch.float64), t).item()
            assert guess == pytest.approx((weight * x0).sum().item(), abs=1e-7)


@SOME_PATHS
def test_the_guess_of_a_finite_set_is_the_weighted_mean_of_its_points(path):
    points, weights = torch.tensor([[-1.0, 0.0], [2.0, 1.0], [0.5, 3.0]]).double(), [1.0, 2.0, 5.0]
    law, t = FiniteSet(points, weights, path=path), inner_times(path, 4)[2].item()
    alpha, sigma, _, _ = path.coefs(t)
    x = draw(law, 5, t)
    near = -((x[:, None] - alpha * points) ** 2).sum(2) / (2 * sigma**2)
    share = (torch.tensor(weights).double().log() + near).softmax(1)
    assert torch.allclose(law(x, t), share @ points, atol=1e-10)


def test_a_finite_set_is_a_mixture_of_hardly_any_spread():
    points = torch.randn(6, 3, generator=seeded(0), dtype=torch.float64)
    atoms, blobs = FiniteSet(points), Mixture(torch.ones(6), points, 1e-7)
    x, t = draw(atoms, 8, 0.3), 0.3
    assert torch.allclose(atoms(x, t), blobs(x, t), atol=1e-9)
    assert torch.allclose(atoms.log_density(x, t), blobs.log_density(x, t), atol=1e-9)


def test_with_hardly_any_noise_a_finite_set_guesses_its_nearest_point():
    law = finite_set()
    x = law.path.corrupt(law.mean, 0.01, torch.ones_like(law.mean))
    assert torch.allclose(law(x, 0.01), law.mean, atol=1e-9)


@SOME_PATHS
@pytest.mark.parametrize("make", [gaussian, full_gaussian], ids=["diagonal", "full"])
def test_the_flow_map_is_where_a_fine_integration_ends(make, path):
    law = make(path=path)
    high, low = inner_times(path)[-1].item(), inner_times(path)[1].item()
    ends = path.lam(torch.tensor([high, low], dtype=torch.float64))  # even in log-SNR: quick near the data
    times = path.time(torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 161, dtype=torch.float64)))
    start = x = draw(law, 5, high)
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):  # Runge and Kutta's rule
        h = s - t
        k1 = law.velocity(x, t)
        k2 = law.velocity(x + h / 2 * k1, t + h / 2)
        k3 = law.velocity(x + h / 2 * k2, t + h / 2)
        k4 = law.velocity(x + h * k3, s)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert torch.allclose(law.flow_map(start, high, low), x, rtol=1e-6, atol=1e-6)


@every_path
def test_flowing_in_two_jumps_is_flowing_in_one(path):
    law, times = full_gaussian(path), inner_times(path)
    x = draw(law, 4, times[6].item())
    t, s, r = (times[i].item() for i in (6, 3, 1))
    assert torch.allclose(law.flow_map(law.flow_map(x, t, s), s, r), law.flow_map(x, t, r), atol=1e-10)
    assert torch.allclose(law.flow_map(law.flow_map(x, t, s), s, t), x, atol=1e-8)


@every_path
def test_the_flow_map_takes_a_time_for_each_row(path):
    law, times = full_gaussian(path), inner_times(path)
    x, t, s = draw(law, 3, times[5].item()), times[4:7], times[1:4]
    each = [law.flow_map(x[i : i + 1], t[i].item(), s[i].item()) for i in range(3)]
    assert torch.allclose(law.flow_map(x, t, s), torch.cat(each), atol=1e-12)


def test_a_mixture_has_no_closed_flow_map():
    with pytest.raises(ValueError, match="condition on classes of one component"):
        mixture().flow_map(torch.zeros(1, 2).double(), 0.5, 0.1)


def test_a_class_of_one_component_flows_like_that_gaussian():
    law = Mixture([0.5, 0.5], [[1.0, 0.0], [-1.0, 2.0]], [[0.3, 0.5], [0.2, 0.9]], labels=[0, 1])
    alone = Gaussian([-1.0, 2.0], [0.2, 0.9])
    x = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.long)
    assert torch.allclose(law.flow_map(x, 0.9, 0.2, ones), alone.flow_map(x, 0.9, 0.2))


@every_law
def test_samples_have_the_law_s_mean_and_covariance(make):
    law, count = make(), 40_000
    x = law.sample(count, seeded(0))
    mean = law.weight @ law.mean
    basis = torch.eye(law.mean.shape[1]).double().expand(len(law.mean), -1, -1) if law.basis is None else law.basis
    inside = torch.einsum("k,kij,kj,klj->il", law.weight, basis, law.variance, basis)
    between = torch.einsum("k,ki,kj->ij", law.weight, law.mean - mean, law.mean - mean)
    spread = (inside + between).diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * spread / math.sqrt(count)).all()
    outer = spread[:, None] * spread
    assert ((x.T.cov() - inside - between).abs() < 8 * outer / math.sqrt(count)).all()


def test_modes_are_drawn_by_their_weights():
    law, count = mixture(), 40_000
    nearest = torch.cdist(law.sample(count, seeded(0)), law.mean).argmin(1).bincount() / count
    assert torch.allclose(nearest, law.weight.float(), atol=0.012)


def test_samples_take_either_kind_of_source_and_repeat_with_it():
    law = mixture()
    for source in (seeded, Rng):
        assert torch.equal(law.sample(5, source(1)), law.sample(5, source(1)))
    assert not torch.equal(law.sample(5, seeded(1)), law.sample(5, seeded(2)))


@every_law
def test_the_noised_law_is_the_law_of_noised_samples(make):
    """Second moments of x_t, by the density: E over samples of a score's square is the Fisher information's trace."""
    law, t = make(), 0.5
    x = draw(law, 20_000, t)
    score = law(x, t, want="score")
    assert score.mean(0).abs().max() < 5 * score.std(0).max() / math.sqrt(len(x))  # E score = 0
    stein = (score * x).mean(0)  # E score x = -1
    assert torch.allclose(stein, -torch.ones_like(stein), atol=0.06)


@every_law
@SOME_PATHS
def test_the_log_density_moves_as_the_flow_carries_it(make, path):
    """The continuity equation: d log p / dt = -div v - v . score."""
    law, t = make(path=path), inner_times(path)[3]
    x = draw(law, 3, t.item())
    times = t.expand(3).clone()
    _, rate = torch.func.jvp(lambda u: law.log_density(x, u), (times,), (torch.ones_like(times),))
    velocity, score = law.velocity(x, times), law(x, times, want="score")
    jacobian = torch.func.jacfwd(lambda y: law.velocity(y, times).sum(0))(x)
    divergence = torch.einsum("ibi->b", jacobian)
    expected = -divergence - (velocity * score).sum(1)
    assert torch.allclose(rate, expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize("t", [None, 0.3, 0.9])
def test_the_density_on_a_line_integrates_to_one(t):
    law = Mixture([0.7, 0.3], [[-1.0], [1.5]], [0.3, 0.6])
    x, width = line(-12, 12, 8001)
    assert (law.log_density(x[:, None], t).exp().sum() * width).item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("make", [gaussian, mixture, full_mixture, finite_set])
def test_the_density_in_the_plane_integrates_to_one(make):
    law = make()
    side, width = line(-12, 12, 401)
    x = torch.cartesian_prod(side, side)
    assert (law.log_density(x, 0.6).exp().sum() * width**2).item() == pytest.approx(1, abs=1e-8)


# -- classes -----------------------------------------------------------------------------------


def test_a_class_is_the_law_of_its_own_components():
    law = mixture(classes=True)
    for label in (0, 1):
        mine = law.labels == label
        alone = Mixture(law.weight[mine], law.mean[mine], 0.25)
        x = draw(alone, 6, 0.4)
        cond = torch.full((6,), label)
        assert torch.allclose(law(x, 0.4, cond), alone(x, 0.4), atol=1e-12)
        assert torch.allclose(law.log_density(x, 0.4, cond), alone.log_density(x, 0.4), atol=1e-12)


def test_the_label_past_the_last_is_no_condition():
    law, x = mixture(classes=True), torch.randn(5, 2, generator=seeded(0), dtype=torch.float64)
    assert torch.allclose(law(x, 0.4, torch.full((5,), law.classes)), law(x, 0.4), atol=1e-13)


def test_rows_of_several_classes_do_not_mix():
    law, x = mixture(classes=True), torch.randn(3, 2, generator=seeded(0), dtype=torch.float64)
    labels = torch.tensor([0, 2, 1])
    each = [law(x[i : i + 1], 0.4, labels[i : i + 1]) for i in range(3)]
    assert torch.allclose(law(x, 0.4, labels), torch.cat(each), atol=1e-13)


def test_samples_of_a_class_come_from_its_components():
    law = mixture(classes=True)
    labels = torch.arange(3).repeat(200)
    nearest = torch.cdist(law.sample(600, seeded(0), labels), law.mean).argmin(1)
    for label in (0, 1):
        assert (law.labels[nearest[labels == label]] == label).all()
    assert len(nearest[labels == 2].unique()) == 4


def test_the_classes_average_to_the_whole_law():
    law, t = mixture(classes=True), 0.5
    x = draw(law, 6, t)
    both = torch.stack([law.log_density(x, t, torch.full((6,), k)) for k in (0, 1)])
    share = torch.stack([law.weight[law.labels == k].sum() for k in (0, 1)]).log()
    assert torch.allclose(torch.logsumexp(both + share[:, None], 0), law.log_density(x, t), atol=1e-12)


def test_a_label_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"labels run from 0 to 2 \(any\), got 3"):
        mixture(classes=True)(torch.zeros(1, 2).double(), 0.5, torch.tensor([3]))


# -- shapes and types --------------------------------------------------------------------------


def test_a_law_of_pictures_is_the_law_of_their_pixels():
    points = torch.randn(4, 1, 3, 2, generator=seeded(0), dtype=torch.float64)
    pictures, pixels = FiniteSet(points), FiniteSet(points.flatten(1))
    x = torch.randn(5, 1, 3, 2, generator=seeded(1), dtype=torch.float64)
    for want in ("x0", "score", "velocity"):
        assert torch.equal(pictures(x, 0.5, want=want).flatten(1), pixels(x.flatten(1), 0.5, want=want))
    assert pictures.sample(3, seeded(0)).shape == (3, 1, 3, 2)
    law = Mixture(torch.ones(4), points, 0.1)
    assert law(x, 0.5).shape == law.sample(5, seeded(0)).shape == x.shape


@pytest.mark.parametrize("dimension", [1, 3, 20])
def test_a_gaussian_has_its_textbook_score_in_any_dimension(dimension):
    covariance, mean = spd(dimension, 0), torch.ones(dimension).double()
    law = Gaussian(mean, covariance=covariance)
    x, t = torch.randn(4, dimension, generator=seeded(0), dtype=torch.float64), 0.3
    noised = 0.7**2 * covariance + 0.3**2 * torch.eye(dimension).double()
    assert torch.allclose(law(x, t, want="score"), -torch.linalg.solve(noised, (x - 0.7 * mean).T).T, atol=1e-10)
    assert torch.allclose(law.noised_covariance(t), noised, atol=1e-12)
    textbook = torch.distributions.MultivariateNormal(0.7 * mean, noised).log_prob(x)
    assert torch.allclose(law.log_density(x, t), textbook, atol=1e-9)


@every_law
def test_single_precision_in_single_precision_out(make):
    law, t = make(), 0.5
    x = draw(law, 4, t)
    for time in (t, torch.full((4,), t)):
        for want in ("x0", "eps", "score", "velocity"):
            read = law(x.float(), time, want=want)
            assert read.dtype == torch.float32
            assert torch.allclose(read.double(), law(x, t, want=want), atol=1e-4)


@every_law
def test_a_time_for_each_row_is_the_same_as_a_batch_for_each_time(make):
    law = make()
    times = torch.tensor([0.2, 0.5, 0.9]).double()
    x = draw(law, 3, 0.5)
    rows = [law(x[i : i + 1], times[i].item(), want="eps") for i in range(3)]
    assert torch.allclose(law(x, times, want="eps"), torch.cat(rows), atol=1e-10)
    density = [law.log_density(x[i : i + 1], times[i].item()) for i in range(3)]
    assert torch.allclose(law.log_density(x, times), torch.cat(density), atol=1e-10)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Mixture([1.0], [[0.0], [1.0]], 1.0), "1 weights for 2 means"),
        (lambda: Mixture([1.0, -1.0], [[0.0], [1.0]], 1.0), "weights must be positive"),
        (lambda: Gaussian([0.0, 0.0], covariance=[[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: Gaussian([0.0, 0.0], covariance=[[1.0, 2.0], [2.0, 1.0]]), "no negative variance"),
        (lambda: Gaussian([0.0]), "either std or covariance"),
        (lambda: gaussian()(torch.zeros(1, 2), 0.5, want="features"), "no features"),
        (lambda: finite_set().log_density(torch.zeros(1, 2)), "pass t"),
    ],
)
def test_what_is_no_law_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
