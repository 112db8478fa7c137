import pytest
import torch
from games import batch_of, gradients, mlp, play, stream
from laws import exact_student, gaussian, seeded

from fewstep.losses import distance
from fewstep.method import Batch, PairOptions
from fewstep.methods.regression import Regression, RegressionOptions
from fewstep.path import Exploding
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
