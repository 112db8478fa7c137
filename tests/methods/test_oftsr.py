import pytest
import torch
from games import Script, batch_of, gradients, mlp, play, sliced_distance
from laws import exact_student, gaussian, mixture, seeded

from fewstep.method import Batch
from fewstep.methods.oftsr import OFTSR, OFTSROptions, traded
from fewstep.path import Exploding, Straight
from fewstep.student import Student

ALONE = {"align": 0.0, "boundary": 0.0}


def jump_error(law, student, further, gone=0.4):
    options = OFTSROptions(**ALONE, further=further, low=gone, high=gone)
    batch = batch_of(64, dtype=torch.float64)
    return OFTSR(law, student, options).loss("student", batch, Script(uniforms=[0.5])).total.item()


def test_it_rests_at_the_average_velocity_of_the_exact_flow_to_the_order_of_the_midpoint_step():
    law = gaussian()
    student = exact_student(law)
    coarse, fine = jump_error(law, student, 0.1), jump_error(law, student, 0.05)
    assert fine < 1e-7
    assert coarse / fine > 30, "the error of one midpoint step is of third order, its square of sixth"
    assert jump_error(law, exact_student(gaussian(std=(0.6, 1.5))), 0.05) > 1e-5


def test_dividing_by_the_shorter_jump_is_the_broken_twin():
    """target = (x_{u + du} - x) / u instead of (u + du): off by du / u of the velocity."""
    law, gone, further = gaussian(), 0.4, 0.05
    x = torch.randn(64, 2, generator=seeded(0), dtype=torch.float64)
    ends = law.flow_map(x, 1.0, 1 - gone - further)
    exact, wrong = (x - ends) / (gone + further), (x - ends) / gone
    own = exact_student(law)(x, 1.0, 1 - gone - further, None, "average_velocity")
    assert torch.allclose(own, exact, atol=1e-9)
    assert (own - wrong).square().mean() > 100 * jump_error(law, exact_student(law), further)


def test_the_loss_is_the_papers_in_its_own_time():
    """s = u + du; v(s) against v(u) + (du / s)(v_teacher(x_u, u) - v(u)), x_u = x_0 + u v(u), time 0 at the start."""
    law, u, du = gaussian(), 0.3, 0.05
    student = Student(mlp(reads_s=True, prediction="flow", dtype=torch.float64), (2,))
    options = OFTSROptions(further=du, low=u, high=u)
    batch = batch_of(16, dtype=torch.float64)
    loss = OFTSR(law, student, options).loss("student", batch, Script(uniforms=[0.0]))
    x = batch.noise

    def v(u):
        return -student(x, 1.0, 1 - u, None, "average_velocity")

    def v_teacher(x, u):
        return -law(x, 1 - u, None, "velocity")

    x_u = (x + u * v(u)).detach()
    midpoint = v_teacher(x_u + du / 2 * v_teacher(x_u, u), u + du / 2)
    target = (v(u) + du / (u + du) * (midpoint - v(u))).detach()
    wanted = (v(u + du) - target).square().mean()
    wanted = wanted + 0.01 * ((1 - u) * (v(u) - v_teacher(x_u, u))).square().mean()
    wanted = wanted + 0.1 * (v(0.0) - v_teacher(x, 0.0)).square().mean()
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-6)
    ours, theirs = gradients(loss.total, student), gradients(wanted, student)
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-8) for k in ours)


def test_the_knob_runs_from_the_mean_answer_to_the_end_of_the_flow():
    law = gaussian()
    student, x = exact_student(law), torch.randn(32, 2, generator=seeded(0), dtype=torch.float64)
    assert torch.allclose(traded(student, x, 1.0), law.flow_map(x, 1.0, 0.0), atol=1e-9)
    assert torch.allclose(traded(student, x, 1.0), student.generate(x), atol=1e-9)
    assert torch.allclose(traded(student, x, 1e-6), law(x, 1.0), atol=1e-4)
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5"):
        traded(student, x, 1.5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="wrap it in Reframed"):
        OFTSR(gaussian(), Student(mlp(Exploding()), (2,)))
    with pytest.raises(ValueError, match="low = 0.9, is longer than the longest, high = 0.2"):
        OFTSROptions(low=0.9, high=0.2)
    assert OFTSR.student_options(OFTSROptions(start=0.9), Straight()) == {"start": 0.9}


def test_a_short_run_trades_error_against_realism_both_ways_monotone():
    """A start that says nothing of the truth: the mean has the least error, the flow's end has the law."""
    law = mixture()
    student = Student(mlp(width=64, reads_s=True, prediction="flow"), (2,))

    def draw(step, turn):
        z = torch.randn(128, 2, generator=seeded(step))
        return Batch(z, None, z)

    play(OFTSR(law, student, OFTSROptions()), draw, 500, rate=6e-3)
    z = torch.randn(2000, 2, generator=seeded(10_001))
    truth, data = (law.sample(2000, seeded(k), dtype=torch.float32) for k in (1, 2))
    with torch.no_grad():
        answers = [traded(student, z, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    errors = [(answer - truth).square().mean().item() for answer in answers]
    distances = [sliced_distance(answer, data) for answer in answers]
    assert all(a < b for a, b in zip(errors[:-1], errors[1:], strict=True)), errors
    assert all(a > b for a, b in zip(distances[:-1], distances[1:], strict=True)), distances
    assert errors[0] < 1.1 * truth.var(0).mean() and distances[-1] < 0.4 * distances[0]
