import pytest
import torch
from laws import PATHS, ExactMap, draw, exact_student, full_gaussian, gaussian, inner_times, mixture, seeded
from torch import nn

from fewstep.denoiser import Counted, Wrapped
from fewstep.path import Exploding, Straight, normal
from fewstep.solvers import Euler, sample
from fewstep.student import Student, frozen, trainable_copy

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
VE = Exploding(sigma_min=0.02, sigma_max=20.0)


def noise(rows=4, size=2, seed=0):
    return torch.randn(rows, size, generator=seeded(seed), dtype=torch.float64)


# -- jumps -------------------------------------------------------------------------------------


@every_path
def test_one_step_is_the_guess_at_the_start(path):
    law = mixture(path)
    student = Student(law, (2,))
    x = student.start_scale * noise()
    assert student.start_scale == pytest.approx(path.coefs(path.t_max).sigma.item())
    assert torch.equal(student.generate(noise()), law(x, path.t_max))


@every_path
def test_a_jump_that_goes_nowhere_changes_nothing(path):
    student, x = Student(mixture(path), (2,)), noise()
    for t in inner_times(path)[1:6:2].tolist():
        assert torch.allclose(student(x, t, t), x, atol=1e-12)


@every_path
def test_a_jump_moves_along_the_line_of_its_guess(path):
    law, x = mixture(path), noise()
    s, t = inner_times(path)[[2, 5]].tolist()
    end = path.coefs(s)
    line = end.alpha * law(x, t) + end.sigma * law(x, t, want="eps")
    assert torch.allclose(Student(law, (2,))(x, t, s), line, atol=1e-9)


@every_path
def test_clean_time_as_a_number_or_a_tensor_is_the_same_jump(path):
    student, x, t = Student(mixture(path), (2,)), noise(), inner_times(path)[5]
    one = student(x, t.item(), path.t_min)
    other = student(x, t.expand(4), torch.full((4,), path.t_min).double())
    assert torch.allclose(one, other, atol=1e-7)


@every_path
def test_rows_may_jump_between_their_own_times(path):
    student, x = Student(mixture(path), (2,)), noise(3)
    t, s = inner_times(path)[4:7], inner_times(path)[1:4]
    rows = [student(x[i : i + 1], t[i].item(), s[i].item()) for i in range(3)]
    assert torch.allclose(student(x, t, s), torch.cat(rows), atol=1e-9)


@every_path
def test_a_student_of_the_exact_map_lands_on_the_flow(path):
    law = full_gaussian(path)
    student, x = exact_student(law), noise(size=3)
    times = inner_times(path)
    for t, s in ((6, 0), (5, 4), (3, 1)):
        t, s = times[t].item(), times[s].item()
        assert torch.allclose(student(x, t, s), law.flow_map(x, t, s), atol=1e-8)


@every_path
def test_a_student_of_the_exact_map_gives_one_answer_in_any_number_of_steps(path):
    law = full_gaussian(path)
    start, middle, low = path.t_max, *inner_times(path)[[4, 1]].tolist()
    student = exact_student(law, steps={1: (start,), 2: (start, middle), 3: (start, middle, low)})
    one, two, three = (student.generate(noise(size=3), steps=n) for n in (1, 2, 3))
    assert torch.allclose(one, two, atol=1e-7)
    assert torch.allclose(one, three, atol=1e-7)


def test_a_denoiser_s_guess_is_not_the_exact_map():
    """Broken twin: with a guess in place of the map, the number of steps matters."""
    student = Student(full_gaussian(), (3,), steps={1: (1.0,), 2: (1.0, 0.5)})
    assert not torch.allclose(student.generate(noise(size=3)), student.generate(noise(size=3), steps=2), atol=1e-2)


# -- average velocity --------------------------------------------------------------------------


def test_average_velocity_is_distance_over_time():
    law = full_gaussian()
    student, x = exact_student(law), noise(size=3)
    u = student(x, 0.8, 0.3, want="average_velocity")
    assert torch.allclose(u, (x - law.flow_map(x, 0.8, 0.3)) / 0.5, atol=1e-12)


def meanflow_gap(law, student, x, t, s, sign=-1.0):
    """How far u is from v -+ (t - s) du/dt, the derivative taken along the flow."""
    velocity = law.velocity(x, t)
    u, rate = torch.func.jvp(
        lambda y, now: student(y, now, s, want="average_velocity"), (x, t), (velocity, torch.ones_like(t))
    )
    return (u - velocity - sign * (t - s)[:, None] * rate).abs().max().item()


def test_average_velocity_of_the_exact_map_obeys_meanflow_s_identity():
    law = full_gaussian()
    student, x = exact_student(law), noise(size=3)
    t, s = torch.tensor([0.9, 0.7, 0.5, 0.95]).double(), torch.tensor([0.1, 0.6, 0.3, 0.0]).double()
    assert meanflow_gap(law, student, x, t, s) < 1e-12
    assert meanflow_gap(law, student, x, t, s, sign=1.0) > 1e-2  # the twin with its sign turned
    assert meanflow_gap(law, Student(law, (3,)), x, t, s) > 1e-2  # and the velocity in place of the average


@every_path
def test_the_exact_consistency_map_does_not_change_along_the_flow(path):
    law = full_gaussian(path)
    student, t = exact_student(law), inner_times(path)[2:6]
    x = noise(size=3)
    clean = torch.zeros(4).double()
    _, rate = torch.func.jvp(lambda y, now: student(y, now, clean), (x, t), (law.velocity(x, t), torch.ones_like(t)))
    _, moved = torch.func.jvp(lambda y, now: law(y, now), (x, t), (law.velocity(x, t), torch.ones_like(t)))
    assert rate.abs().max() < 1e-8 * (1 + moved.abs().max())
    assert moved.abs().max() > 1e-2  # a denoiser's guess does change


# -- several steps -----------------------------------------------------------------------------


def test_steps_along_the_ode_are_ddim_s():
    law, times = mixture(VE), (20.0, 3.0, 0.5)
    student = Student(law, (2,), steps={3: times})
    assert torch.allclose(
        student.generate(noise(), steps=3), sample(law, 20 * noise(), (*times, 0.0), Euler()), atol=1e-9
    )


def test_renoising_steps_corrupt_the_guess_afresh():
    law = mixture(VE)
    student = Student(law, (2,), steps={2: (20.0, 1.0)}, policy="renoise")
    guess = law(20 * noise(), 20.0)
    again = VE.corrupt(guess, 1.0, normal(guess, seeded(5)))
    assert torch.equal(student.generate(noise(), steps=2, rng=seeded(5)), law(again, 1.0))


@pytest.mark.parametrize("policy", ["ode", "renoise"])
def test_a_step_is_one_call(policy):
    counted = Counted(mixture())
    steps = {n: tuple(1 - i / n for i in range(n)) for n in (1, 2, 4)}
    student = Student(counted, (2,), steps=steps, policy=policy)
    for n in steps:
        counted.calls = 0
        student.generate(noise(), steps=n, rng=seeded(0))
        assert counted.calls == n


def test_steps_along_the_ode_need_and_use_no_chance():
    student = Student(mixture(), (2,), steps={2: (1.0, 0.5)})
    rng = seeded(0)
    before = rng.get_state()
    assert torch.equal(student.generate(noise(), steps=2), student.generate(noise(), steps=2, rng=rng))
    assert torch.equal(rng.get_state(), before)


def test_renoising_without_a_source_of_noise_is_refused():
    student = Student(mixture(), (2,), steps={2: (1.0, 0.5)}, policy="renoise")
    with pytest.raises(ValueError, match="needs a generator: pass rng"):
        student.generate(noise(), steps=2)


def test_a_step_count_that_was_not_trained_is_refused_with_those_that_were():
    student = Student(mixture(), (2,), steps={1: (1.0,), 4: (1.0, 0.7, 0.4, 0.2)})
    with pytest.raises(ValueError, match=r"trained for 1, 4 step\(s\), got 2: pass one of those"):
        student.generate(noise(), steps=2)


@pytest.mark.parametrize(
    ("times", "complaint"),
    [((1.0, 0.5, 0.2), "2 steps need 2 times"), ((0.9, 0.5), "from 1 down"), ((1.0, 1.5), "must descend")],
)
def test_times_that_are_no_way_down_are_refused(times, complaint):
    with pytest.raises(ValueError, match=complaint):
        Student(mixture(), (2,), steps={2: times})


def test_a_student_may_start_below_the_noisiest_time():
    law = mixture(VE)
    student = Student(law, (2,), start=2.5)
    assert student.start_scale == 2.5
    assert torch.equal(student.generate(noise()), law(2.5 * noise(), 2.5))
    assert torch.equal(Student(law, (2,), start=2.5, start_scale=3.0).generate(noise()), law(3 * noise(), 2.5))


def test_the_condition_reaches_every_step():
    law = mixture(classes=True)
    student = Student(law, (2,), steps={2: (1.0, 0.5)})
    labels = torch.tensor([0, 1, 0, 1])
    rows = [student.generate(noise()[i : i + 1], labels[i : i + 1], steps=2) for i in range(4)]
    assert torch.allclose(student.generate(noise(), labels, steps=2), torch.cat(rows), atol=1e-12)
    assert not torch.allclose(student.generate(noise(), labels, steps=2), student.generate(noise(), steps=2))


# -- copies ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x, clock, cond=None):
        return self.body(x)


def test_a_student_like_its_teacher_starts_equal_and_learns_alone():
    teacher = frozen(Wrapped(Net(), Straight(), "x0"))
    student = Student.like(teacher, (2,))
    x = torch.randn(3, 2)
    assert torch.equal(student(x, 1.0, 0.0), teacher(x, 1.0))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert not torch.equal(student(x, 1.0, 0.0), teacher(x, 1.0))


def test_a_frozen_network_does_not_learn_and_a_copy_does():
    net = frozen(Net())
    assert not net.training
    twin = trainable_copy(net)
    assert twin.training
    assert twin.body.weight.requires_grad
    assert not net.body.weight.requires_grad


def test_every_want_of_a_jump_is_the_denoiser_s():
    law = gaussian()
    student, exact, x = Student(law, (2,)), ExactMap(law), draw(law, 4, 0.7)
    for want in ("x0", "eps", "flow", "velocity"):
        assert torch.equal(student(x, 0.7, 0.2, want=want), law(x, 0.7, want=want))
        assert torch.equal(Student(exact, (2,))(x, 0.7, 0.2, want=want), exact(x, 0.7, want=want, s=0.2))
