import pytest
import torch
from games import Nudged, Script, batch_of, gradients, mlp, play
from laws import ExactMap, draw, exact_student, gaussian

from fewstep.method import Batch, PairOptions
from fewstep.methods.denoising import level_weight
from fewstep.methods.regression import Regression
from fewstep.methods.trajectory import Trajectory, TrajectoryOptions
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.rng import Rng
from fewstep.student import Student

PATHS = [Straight(), Exploding(sigma_min=0.02, sigma_max=20.0), VariancePreserving()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
EIGHT = {"pairs": PairOptions(count=8, solver="dpm2m", nfe=8)}


def way_of(law, options, count=64):
    """Exact trajectories of a law from its own marginal, at the times that the student is to step to."""
    made = Trajectory.student_options(options, law.path)
    times = torch.tensor([*made["steps"][8], law.path.t_min], dtype=torch.float64)
    x = draw(law, count, times[0].item())
    states = torch.stack([law.flow_map(x, times[0].item(), t) for t in times.tolist()], 1)
    return Batch(states[:, -1], None, x, states[:, -1], states, times), made


def steepest(loss, module):
    return max(g.abs().max().item() for g in gradients(loss, module).values())


@every_path
def test_loss_and_gradient_vanish_at_the_flow_map_that_the_trajectories_follow(path):
    law, options = gaussian(path=path), TrajectoryOptions(**EIGHT)
    batch, made = way_of(law, options)

    def left(of):
        student = Student(Nudged(ExactMap(of), "x0", 2), (2,), **made)
        loss = Trajectory(law, student, options).loss("student", batch, Rng(0)).total
        return loss.item(), steepest(loss, student.denoiser)

    loss, slope = left(law)
    assert loss < 1e-12
    assert slope < 1e-6
    assert left(gaussian(std=(0.6, 1.5), path=path))[1] > 1e-3


JUMPS = [((0.1, 0.9), (0, 8)), ((0.3, 0.1), (0, 4)), ((0.3, 0.9), (4, 8)), ((0.6, 0.3), (2, 4)), ((0.9, 0.0), (0, 1)),
         ((0.9, 0.99), (7, 8))]  # fmt: skip
every_jump = pytest.mark.parametrize(("drawn", "jump"), JUMPS, ids=lambda v: "-".join(map(str, v)))


@every_path
@every_jump
def test_one_error_of_the_guess_costs_its_levels_weight_whatever_the_length_of_the_jump(path, drawn, jump):
    """A line that points to x0 + d is off by (tau_t - tau_s) / tau_t d where the jump ends: the loss is that of d."""
    law = gaussian(path=path)
    options = TrajectoryOptions(**EIGHT, distance="l2", data_std=0.7)
    batch, made = way_of(law, options, 4)
    student = Student(Nudged(ExactMap(law), "x0", 2), (2,), **made)
    with torch.no_grad():
        student.denoiser.offset += 0.3
    loss = Trajectory(law, student, options).loss("student", batch, Script(uniforms=drawn)).total
    weight = level_weight("edm", path, batch.times[jump[0]][None], 0.7)
    assert loss.item() == pytest.approx(weight.item() * (0.7 * 0.3) ** 2, rel=1e-5)


@every_jump
def test_it_asks_for_the_jump_between_two_points_of_the_way_that_were_drawn(drawn, jump):
    """A number of steps, then one of its jumps."""
    law, asked = gaussian(), []

    class Watching(ExactMap):
        def forward(self, x, t, cond=None, want="x0", s=None):
            asked.append((x, t, s))
            return super().forward(x, t, cond, want, s)

    options = TrajectoryOptions(**EIGHT)
    batch, made = way_of(law, options, 4)
    Trajectory(law, Student(Watching(law), (2,), **made), options).loss("student", batch, Script(uniforms=drawn))
    x, t, s = asked[0]
    assert torch.equal(x, batch.states[:, jump[0]])
    assert t.tolist() == [batch.times[jump[0]]] * 4 and s.tolist() == [batch.times[jump[1]]] * 4


def test_the_jumps_of_the_steps_that_are_served_are_drawn_and_no_others():
    law, asked = gaussian(), []

    class Watching(ExactMap):
        def forward(self, x, t, cond=None, want="x0", s=None):
            asked.extend(zip(t.tolist(), s.tolist(), strict=True))
            return super().forward(x, t, cond, want, s)

    options = TrajectoryOptions(**EIGHT, steps=(1, 4))
    made = Trajectory.student_options(TrajectoryOptions(**EIGHT), law.path)
    batch, _ = way_of(law, TrajectoryOptions(**EIGHT), 4000)
    Trajectory(law, Student(Watching(law), (2,), **made), options).loss("student", batch, Rng(0))
    times = batch.times.tolist()
    four = list(zip(times[:-1:2], times[2::2], strict=True))
    assert set(asked) == {(times[0], times[8]), *four}
    assert asked.count((times[0], times[8])) == pytest.approx(2000, rel=0.06)
    assert all(asked.count(jump) == pytest.approx(500, rel=0.15) for jump in four)


def test_of_a_pair_alone_it_is_regression():
    path = Exploding(sigma_max=20.0)
    student, batch = Student(mlp(path, reads_s=True, prediction="flow"), (2,)), batch_of(8, pairs=True)
    loss = Trajectory(None, student, TrajectoryOptions(huber_c=0.3)).loss("student", batch, Rng(0)).total
    plain = Regression(None, student, Regression.Options(huber_c=0.3)).loss("student", batch, Rng(0)).total
    assert loss.item() == pytest.approx(plain.item(), rel=2e-3)  # the weight at sigma 20 is 1 + 1/400


def test_a_student_steps_to_the_times_of_the_sampler_that_made_the_ways():
    made = Trajectory.student_options(TrajectoryOptions(**EIGHT, steps=(1, 2, 8)), Straight())
    times = made["steps"][8]
    assert made["start"] == times[0] == 1.0
    assert made["steps"][1] == (1.0,) and made["steps"][2] == (1.0, times[4])
    law, options = gaussian(), TrajectoryOptions(**EIGHT)
    batch, made = way_of(law, options)
    student = exact_student(law, **made)
    for count in (1, 2, 4, 8):
        assert torch.allclose(student.generate(batch.noise, steps=count), batch.target, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": (3,)}, "3 steps are no even part of the 8 of the pairs: pass divisors of 8, or other pairs"),
        ({"steps": (0,)}, "0 steps are no even part"),
        ({"pairs": PairOptions(solver="heun", nfe=7)}, "8 steps are no even part of the 4"),
        ({"pairs": PairOptions(solver="nothing")}, "nothing"),
        ({"steps": ()}, "at least 1"),
    ],
)
def test_steps_that_no_way_has_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryOptions(**given)


def test_another_path_than_the_teachers_and_a_batch_without_ways_are_refused():
    law = gaussian()
    with pytest.raises(ValueError, match=r"its own path, Straight\(.*alone; this one is on Exploding\("):
        Trajectory(law, exact_student(gaussian(path=Exploding())))
    with pytest.raises(ValueError, match="a batch with states"):
        Trajectory(law, exact_student(law)).loss("student", batch_of(4), Rng(0))


def test_a_short_run_comes_close_to_the_flow_map_in_every_number_of_steps():
    law, options = gaussian(), TrajectoryOptions(**EIGHT)
    batch, made = way_of(law, options, 4096)
    student = Student(mlp(reads_s=True, prediction="flow"), (2,), **made)
    states = batch.states.float()

    def ways(step, turn):
        index = torch.arange(64 * step, 64 * step + 64) % 4096
        clean, start = states[index, -1], states[index, 0]
        return Batch(clean, None, start, clean, states[index], batch.times)

    play(Trajectory(law, student, options), ways, 600, rate=3e-3)
    other, _ = way_of(law, options, 512)
    spread = other.target.std().item()
    for count in (1, 2, 4, 8):
        with torch.no_grad():
            ends = student.generate(other.noise.float(), steps=count)
        assert (ends - other.target).square().mean().sqrt() < 0.15 * spread, count
