import math

import pytest
import torch
from laws import hermite, seeded

from fewstep import losses
from fewstep.losses import (
    absolute_error,
    batch_mean,
    discriminator_loss,
    dispersive,
    distance,
    generator_loss,
    ict_c,
    pseudo_huber,
    r1_by_difference,
    r1_penalty,
    squared_error,
    stopped_pull,
)
from fewstep.method import Loss

A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
SILENT = 700.0
"""A logit whose softplus is 0 to the last digit on its quiet side."""


def rows(count=4, *shape, seed=0):
    return torch.randn(count, *(shape or (3,)), generator=seeded(seed), dtype=torch.float64)


# -- distances ---------------------------------------------------------------------------------


def test_distances_are_one_number_a_row_whatever_the_shape():
    a, b = rows(4, 2, 3, 5), rows(4, 2, 3, 5, seed=1)
    gap = (a - b).flatten(1)
    assert torch.allclose(squared_error(a, b), gap.norm(dim=1) ** 2 / 30)
    assert torch.allclose(absolute_error(a, b), gap.norm(p=1, dim=1) / 30)
    assert torch.allclose(pseudo_huber(a, b, 0.3), (gap.norm(dim=1) ** 2 + 0.09).sqrt() - 0.3)


@pytest.mark.parametrize("c", [1e-3, 0.3, 10.0])
def test_the_pseudo_huber_distance_never_pulls_harder_than_one(c):
    guess = (100 * rows(64)).requires_grad_()
    (pull,) = torch.autograd.grad(pseudo_huber(guess, torch.zeros_like(guess), c).sum(), guess)
    length = pull.norm(dim=1)
    assert (length < 1).all()
    assert torch.allclose(length, guess.norm(dim=1) / (guess.norm(dim=1) ** 2 + c**2).sqrt())
    (square,) = torch.autograd.grad(squared_error(guess, torch.zeros_like(guess)).sum(), guess)
    assert square.norm(dim=1).max() > 1  # what it is there for


def test_the_pseudo_huber_distance_lies_between_a_square_and_a_norm():
    a, b = rows(), rows(seed=1)
    norm = (a - b).norm(dim=1)
    assert torch.allclose(pseudo_huber(a, b, 1e-9), norm, atol=1e-8)
    assert torch.allclose(pseudo_huber(a, b, 1e4), norm**2 / 2e4, rtol=1e-4)
    assert torch.equal(pseudo_huber(a, a, 0.5), torch.zeros(4).double())


def test_distances_by_name():
    a, b = rows(), rows(seed=1)
    assert torch.equal(distance("l2", a, b), squared_error(a, b))
    assert torch.equal(distance("l1", a, b), absolute_error(a, b))
    assert torch.equal(distance("huber", a, b, 0.1), pseudo_huber(a, b, 0.1))
    with pytest.raises(ValueError, match="unknown distance 'l3': one of l2, l1, huber"):
        distance("l3", a, b)


def test_ict_s_constant_for_cifar_is_the_one_in_the_paper():
    assert ict_c(3 * 32 * 32) == pytest.approx(0.03, abs=1e-4)


# -- R1 ----------------------------------------------------------------------------------------


def quadratic(x):
    return (0.5 * torch.einsum("bi,ij,bj->b", x, A, x) + x @ B)[:, None]


def test_r1_is_the_squared_gradient_in_closed_form():
    x = rows()
    assert torch.allclose(r1_penalty(quadratic, x), ((x @ A + B) ** 2).sum(1), atol=1e-12)


def test_r1_of_several_logits_is_that_of_their_mean():
    x = rows()
    many = r1_penalty(lambda v: torch.cat([quadratic(v), 3 * quadratic(v)], 1), x)
    assert torch.allclose(many, 4 * r1_penalty(quadratic, x))


def test_r1_teaches_the_discriminator_by_its_exact_second_derivative():
    """d/dA of ||A x||^2 is 2 (A x) x^T; detaching the slope, as a careless R1 does, would give none at all."""
    x, weight = rows(), A.clone().requires_grad_()
    penalty = r1_penalty(lambda v: 0.5 * torch.einsum("bi,ij,bj->b", v, (weight + weight.T) / 2, v), x)
    penalty.sum().backward()
    exact = 2 * torch.einsum("bi,bj->ij", x @ A, x)
    assert torch.allclose(weight.grad, (exact + exact.T) / 2, atol=1e-12)


def test_one_logit_a_row_may_come_without_a_second_dimension():
    x, logits = rows(), rows(4, 1)
    assert torch.allclose(r1_penalty(lambda v: quadratic(v)[:, 0], x), r1_penalty(quadratic, x))
    assert torch.equal(discriminator_loss(logits[:, 0], -logits[:, 0]), discriminator_loss(logits, -logits))
    assert torch.equal(generator_loss(logits[:, 0]), generator_loss(logits))
    assert torch.equal(r1_by_difference(logits[:, 0], 2 * logits[:, 0], 0.1), r1_by_difference(logits, 2 * logits, 0.1))


def test_r1_works_inside_no_grad_and_leaves_the_sample_alone():
    x = rows()
    with torch.no_grad():
        penalty = r1_penalty(quadratic, x)
    assert penalty.shape == (4,)
    assert not x.requires_grad


def directions(size):
    """2 n points +- sqrt(n) e_i: second moments of N(0, I), exactly."""
    return math.sqrt(size) * torch.cat([torch.eye(size), -torch.eye(size)]).double()


def test_r1_by_difference_is_r1_on_average_for_a_linear_discriminator_at_any_step():
    x, n = rows(1).expand(6, 3), directions(3)
    for step in (1e-3, 0.5):
        found = r1_by_difference((x @ B)[:, None], ((x + step * n) @ B)[:, None], step)
        assert found.mean().item() == pytest.approx((B**2).sum().item(), rel=1e-9)


def test_r1_by_difference_is_r1_to_first_order_for_a_curved_one():
    nodes, weights = hermite(6)
    n = torch.cartesian_prod(nodes, nodes, nodes)
    share = torch.cartesian_prod(weights, weights, weights).prod(1)
    x = rows(1).expand(len(n), 3)
    exact = ((x[:1] @ A + B) ** 2).sum()
    gaps = []
    for step in (0.1, 0.05):
        found = r1_by_difference(quadratic(x), quadratic(x + step * n), step)
        gaps.append(((share * found).sum() - exact).abs().item())
    assert gaps[1] < 0.01 * exact
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(2, abs=0.01)  # odd moments vanish: second order, even


def test_r1_by_difference_divided_once_by_the_step_is_wrong():
    """Broken twin: its size would depend on the step."""
    x, n = rows(1).expand(6, 3), directions(3)
    wrong = [(((x + h * n) @ B - x @ B) ** 2 / h).mean().item() for h in (0.1, 0.2)]
    assert wrong[1] == pytest.approx(2 * wrong[0])


# -- the game ----------------------------------------------------------------------------------

GRID = torch.linspace(-10, 12, 4001, dtype=torch.float64)
WIDTH = 22 / 4000
REAL, FAKE = (
    -0.5 * ((GRID - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi)) for mean, std in ((0.3, 1.0), (1.5, 0.9))
)


def game(logit):
    """The discriminator's expected loss over both laws, by quadrature; one logit a grid point."""
    silent = torch.full_like(logit, SILENT)
    real = discriminator_loss(logit[:, None], -silent[:, None])
    fake = discriminator_loss(silent[:, None], logit[:, None])
    return ((REAL.exp() * real + FAKE.exp() * fake) * WIDTH).sum()


def test_the_discriminator_rests_at_the_log_ratio_of_densities():
    best = (REAL - FAKE).requires_grad_()
    (slope,) = torch.autograd.grad(game(best), best)
    assert slope.abs().max() < 1e-15
    (slope,) = torch.autograd.grad(game(best / 2), best)
    assert slope.abs().max() > 1e-5  # the twin at half the logit moves


def test_the_discriminator_s_best_value_is_2_log_2_less_twice_jensen_and_shannon_s_divergence():
    p, q = REAL.exp(), FAKE.exp()
    middle = ((p + q) / 2).log()
    js = ((p * (REAL - middle) + q * (FAKE - middle)) * WIDTH).sum() / 2
    assert js > 0.1
    assert game(REAL - FAKE).item() == pytest.approx((2 * math.log(2) - 2 * js).item(), abs=1e-11)


def test_any_other_discriminator_does_worse():
    best = game(REAL - FAKE)
    for k in range(5):
        assert game(REAL - FAKE + 0.3 * torch.sin((k + 1) * GRID)) > best


def test_the_generator_gains_where_the_discriminator_says_real():
    fake = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    value = generator_loss(fake)
    assert (value.diff() < 0).all()
    assert torch.allclose(value, torch.log1p(torch.exp(-fake[:, 0])))
    assert generator_loss(torch.tensor([[-1e4]])).item() == 1e4  # never saturates, never overflows


# -- gradients by hand, batch statistics -------------------------------------------------------


def test_a_stopped_pull_has_the_gradient_that_it_is_given():
    x, direction = rows(4, 2, 3).requires_grad_(), rows(4, 2, 3, seed=1).requires_grad_()
    stopped_pull(x, direction).sum().backward()
    assert torch.allclose(x.grad, direction / 6)
    assert direction.grad is None


def test_a_batch_mean_goes_through_the_trainer_s_reduction():
    value = torch.tensor([1.0, 3.0])
    assert batch_mean(value) == 2
    try:
        losses.set_reduction(lambda mean: (mean + 10) / 2)
        assert batch_mean(value) == 6
    finally:
        losses.set_reduction(None)
    assert batch_mean(value) == 2


def test_a_loss_adds_the_weighted_means_of_its_parts():
    parts = {"a": torch.tensor([1.0, 3.0], requires_grad=True), "b": torch.tensor([5.0])}
    loss = Loss.mean(parts, {"b": 0.5})
    assert loss.total.item() == 4.5
    assert {name: value.item() for name, value in loss.parts.items()} == {"a": 2.0, "b": 5.0}
    assert loss.total.requires_grad
    assert not any(value.requires_grad for value in loss.parts.values())


def pairs_of(features):
    return [(i, j) for i in range(len(features)) for j in range(len(features)) if i != j]


@pytest.mark.parametrize("kind", ["infonce", "cosine", "hinge", "covariance", "dm1"])
def test_the_dispersive_terms_are_what_their_formulas_say(kind):
    f = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs, temperature = pairs_of(f), 0.5
    far = {p: (f[p[0]] - f[p[1]]).norm() for p in pairs}
    if kind == "infonce":
        wanted = torch.stack([torch.exp(-(far[p] ** 2) / 3 / temperature) for p in pairs]).mean().log()
    elif kind == "cosine":
        angle = [torch.nn.functional.cosine_similarity(f[i], f[j], dim=0) for i, j in pairs]
        wanted = torch.stack([torch.exp(-(1 - a) / temperature) for a in angle]).mean().log()
    elif kind == "hinge":
        wanted = torch.stack([torch.relu(1 - far[p]) ** 2 for p in pairs]).mean()
    elif kind == "covariance":
        c = torch.cov(f.T)
        wanted = (c - c.diag().diag()).square().sum() / 6 + torch.relu(1 - c.diag()).mean()
    else:  # the diagonal, masked with a large negative number, clamped to -10 and turned over
        near = torch.cdist(f, f) / temperature
        turned = -(-near).masked_fill(torch.eye(5, dtype=torch.bool), -1e9).clamp(-10, 10)
        wanted = -torch.logsumexp(turned, 1).mean()
    assert dispersive(f, kind, temperature).item() == pytest.approx(wanted.item(), rel=1e-9)
    assert dispersive(f[:1], kind, temperature).item() == 0


@pytest.mark.parametrize("kind", ["infonce", "cosine", "dm1"])
def test_every_pair_is_pushed_apart_and_the_coded_variant_pushes_less(kind):
    f = 0.3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f.requires_grad_(True)
    (slope,) = torch.autograd.grad(dispersive(f, kind), f)
    assert (slope.norm(dim=1) > 1e-7).all()
    wider = f.detach() - 1e-3 * slope / slope.norm()
    assert dispersive(wider, kind) < dispersive(f, kind)
    (plain,) = torch.autograd.grad(dispersive(f, "infonce"), f)
    if kind == "dm1":
        assert slope.norm() < 0.1 * plain.norm()


def test_an_unknown_dispersive_term_is_refused():
    with pytest.raises(ValueError, match="one of infonce"):
        dispersive(torch.zeros(2, 2), "other")
