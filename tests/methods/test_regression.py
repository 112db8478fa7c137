import pytest
import torch
from games import Lines, Nudged, Script, batch_of, gradients, mlp, play, stream
from laws import exact_student, gaussian, seeded

from fewstep.denoiser import Reframed
from fewstep.losses import distance
from fewstep.method import Batch, PairOptions
from fewstep.methods.regression import Regression, RegressionOptions
from fewstep.path import Exploding, Straight
from fewstep.rng import Rng
from fewstep.student import Student


def with_targets(law, draw):
    """Batches whose target is where the exact flow takes their noise."""
    start = law.path.t_max
    scale = float(law.path.coefs(start).sigma)

    def pairs(step, turn):
        batch = draw(step, turn)
        return Batch(batch.data, None, batch.noise, law.flow_map(scale * batch.noise, start, law.path.t_min))

    return pairs


@pytest.mark.parametrize("kind", ["huber", "l2", "l1"])
def test_regression_rests_at_the_exact_flow_map(kind):
    law = gaussian()
    batch = with_targets(law, stream(law, 32, torch.float64))(0, 0)
    options = RegressionOptions(distance=kind)
    assert Regression(None, exact_student(law), options).loss("student", batch, Rng(0)).total < 1e-12
    wrong = exact_student(gaussian(std=(0.6, 1.5)))
    assert Regression(None, wrong, options).loss("student", batch, Rng(0)).total > 1e-4


def test_the_loss_is_the_distance_from_where_the_student_starts():
    path = Exploding(sigma_max=20.0)
    student, batch = Student(mlp(path), (2,), start=2.5), batch_of(8, pairs=True)
    loss = Regression(None, student, RegressionOptions(huber_c=0.3)).loss("student", batch, Rng(0)).total
    wanted = distance("huber", student.generate(batch.noise), batch.target, 0.3).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    ours, theirs = gradients(loss, student), gradients(wanted, student)
    assert all(torch.allclose(ours[k], theirs[k]) for k in ours)


def test_a_batch_without_targets_is_refused():
    with pytest.raises(ValueError, match="pairs"):
        Regression(None, Student(mlp(), (2,))).loss("student", batch_of(4), Rng(0))


def test_it_says_which_pairs_it_needs_and_where_its_student_starts():
    options = RegressionOptions(pairs=PairOptions(count=10), start=2.5)
    assert Regression(None, Student(mlp(), (2,)), options).pairs().count == 10
    assert Regression.student_options(options, Exploding()) == {"start": 2.5}


def test_a_short_run_comes_close_to_the_flow_map_of_a_gaussian():
    law = gaussian(mean=(0.5, -0.3), std=(0.5, 1.2))
    student = Student(mlp(width=64, depth=1), (2,))
    z = torch.randn(2000, 2, generator=seeded(1))
    wanted = law.flow_map(z, 1.0, 0.0)

    def error():
        return ((student.generate(z) - wanted).square().mean() / wanted.var(0).mean()).sqrt().item()

    before = error()
    play(Regression(None, student), with_targets(law, stream(law, 64)), 300, rate=1e-2)
    assert before > 0.5
    assert error() < 0.03


# -- flow guidance ------------------------------------------------------------------------------


def guided(student, teacher, **options):
    return Regression(teacher, student, RegressionOptions(distance="l2", guide=1.0, **options))


def test_flow_guidance_rests_where_the_teachers_flow_is_straight_and_the_student_is_on_it():
    matrix, offset = torch.tensor([[0.5, 0.2], [0.2, 1.5]], dtype=torch.float64), torch.tensor([2.0, -1.0]).double()
    batch = batch_of(16, pairs=True, dtype=torch.float64)

    def guide(student):
        return guided(Student(Lines(student, offset), (2,)), Lines(matrix, offset)).loss("student", batch, Rng(0)).parts

    assert guide(matrix)["guide"] < 1e-20
    assert guide(1.1 * matrix)["guide"] > 1e-4


@pytest.mark.parametrize("path", [Straight(), Exploding(sigma_min=0.02, sigma_max=20.0)], ids=lambda p: p.kind)
@pytest.mark.parametrize("along", ["student", "teacher"])
def test_flow_guidance_is_two_steps_the_first_to_a_point_of_a_straight_way(along, path):
    """In the paper's words, time 0 at noise: ``z - u`` against ``z - (tau u + (1 - tau) v(z - tau u, tau))``."""
    law, tau = gaussian(), 0.3
    net = mlp(path, dtype=torch.float64)
    student, teacher = Student(net, (2,)), gaussian(path=path)
    end = float(path.straight(path.t_max))
    method = guided(student, teacher, guide_span=(tau, tau), guide_along=along)
    batch = batch_of(8, pairs=True, dtype=torch.float64)
    z = torch.randn(8, 2, generator=seeded(1), dtype=torch.float64)
    loss = method.loss("student", batch, Script(normals=[z], uniforms=[0.7])).parts["guide"]
    straight = {k: Reframed(v, Straight(end=end)) for k, v in {"student": net, "teacher": teacher}.items()}
    x = end * z  # the start on the straight path
    guess = x - end * straight["student"](x, end, None, "velocity")
    u = straight[along](x, end, None, "velocity")
    t = (1 - tau) * end
    x_tau = x - tau * end * u
    wanted = x_tau - t * Reframed(law, Straight(end=end))(x_tau, t, None, "velocity")
    assert loss.item() == pytest.approx((guess - wanted).square().mean().item(), rel=1e-5)


def test_nothing_flows_back_through_the_point_or_the_teacher():
    student, teacher = Student(mlp(dtype=torch.float64), (2,)), Nudged(gaussian(), size=2)
    batch = batch_of(8, pairs=True, dtype=torch.float64)
    method = guided(student, teacher, guide_span=(0.4, 0.4))
    z = torch.randn(8, 2, generator=seeded(1), dtype=torch.float64)
    loss = method.loss("student", batch, Script(normals=[z], uniforms=[0.0])).total
    pairs = Regression(None, student, RegressionOptions(distance="l2")).loss("student", batch, Rng(0)).total
    ours = gradients(loss - pairs, student)
    with torch.no_grad():
        point = student.path.move(z, student(z, 1.0, 0.0, None, "velocity"), 1.0, 0.6)
        target = teacher(point, 0.6)
    wanted = gradients((student(z, 1.0, 0.0) - target).square().mean(), student)
    assert all(torch.allclose(ours[k], wanted[k], atol=1e-12) for k in ours)
    moving = student.path.move(z, student(z, 1.0, 0.0, None, "velocity"), 1.0, 0.6)
    twin = gradients((student(z, 1.0, 0.0) - teacher(moving, 0.6)).square().mean(), student)
    assert not all(torch.allclose(ours[k], twin[k], atol=1e-4) for k in ours), "the broken twin: the point flows back"


def test_guidance_without_a_teacher_or_with_a_way_that_is_none_is_refused():
    with pytest.raises(ValueError, match="needs a teacher"):
        guided(Student(mlp(), (2,)), None)
    with pytest.raises(ValueError, match="0 <= low <= high < 1, got 0.8 and 0.2"):
        guided(Student(mlp(), (2,)), gaussian(), guide_span=(0.8, 0.2))


def test_guidance_lessens_the_error_on_noise_that_no_pair_has():
    """Four pairs and a straight teacher: with the guidance, other starts come out nearer to where they belong."""
    matrix, offset = torch.tensor([[0.5, 0.2], [0.2, 1.5]]), torch.tensor([2.0, -1.0])
    z, fresh = torch.randn(4, 2, generator=seeded(0)), torch.randn(500, 2, generator=seeded(1))
    pairs = Batch(z @ matrix.T + offset, None, z, z @ matrix.T + offset)

    def error(weight):
        student = Student(mlp(width=32, depth=1, seed=2), (2,))
        options = RegressionOptions(distance="l2", guide=weight)
        play(Regression(Lines(matrix, offset), student, options), lambda step, turn: pairs, 200, rate=1e-2)
        return (student.generate(fresh) - fresh @ matrix.T - offset).square().mean().item()

    assert error(1.0) < 0.5 * error(0.0)
