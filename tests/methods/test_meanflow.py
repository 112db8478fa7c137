import pytest
import torch
from games import Lines, Nudged, Script, batch_of, gradients, mlp, play, sigma_points, stream
from laws import ExactMap, draw, exact_student, gaussian, seeded

from fewstep.denoiser import Denoiser, Reframed, Wrapped, tapped
from fewstep.derivative import along_flow, still_fast_waves
from fewstep.interop import load_teacher
from fewstep.losses import dispersive, squared_error
from fewstep.method import Batch, PairOptions
from fewstep.methods.consistency import Consistency
from fewstep.methods.denoising import FlowMatching, FlowMatchingOptions
from fewstep.methods.meanflow import DispersiveOptions, MeanFlow, MeanFlowOptions
from fewstep.nets import build
from fewstep.path import Exploding, NoiseSampler, Straight, column
from fewstep.rng import Rng
from fewstep.student import Student

TIMES = [(0.9, 0.2), (1.0, 0.0), (0.5, 0.45), (0.3, 0.01)]
UNIFORM = NoiseSampler(kind="uniform")


def points(law):
    z, eps = sigma_points(2, 2)
    return Batch(law.mean + law.variance.sqrt() * z, None, eps)


def steepest(loss, module):
    return max(g.abs().max().item() for g in gradients(loss, module).values())


@pytest.mark.parametrize(("t", "s"), TIMES)
def test_the_average_velocity_of_a_gaussian_obeys_its_identity(t, s):
    """u = v - (t - s) du/dt, the derivative taken by the method itself along the flow."""
    law = gaussian()
    game = MeanFlow(law, exact_student(law))
    x = draw(law, 32, t)
    t, s = (torch.full((32,), v, dtype=torch.float64) for v in (t, s))
    v = law.velocity(x, t)
    u = game.student(x, t, s, None, "average_velocity")
    rate = game.derivative(x, t, s, v, None)
    assert torch.allclose(u, v - column(t - s, x) * rate, rtol=0, atol=1e-12)
    assert not torch.allclose(u, v + column(t - s, x) * rate, atol=1e-3)  # the sign
    other = game.derivative(x, t, s, torch.zeros_like(v), None)  # not along the flow
    assert not torch.allclose(u, v - column(t - s, x) * other, atol=1e-3)


@pytest.mark.parametrize(("t", "s"), TIMES)
def test_the_average_velocity_times_the_jump_is_how_far_the_flow_goes(t, s):
    law = gaussian()
    x = draw(law, 32, t)
    u = exact_student(law)(x, t, s, None, "average_velocity")
    assert torch.allclose(x - (t - s) * u, law.flow_map(x, t, s), atol=1e-12)


@pytest.mark.parametrize("t", [0.2, 0.9])
def test_a_central_difference_is_the_exact_derivative_to_second_order(t):
    law, s = gaussian(), 0.05
    x = draw(law, 32, t)
    times = [torch.full((32,), v, dtype=torch.float64) for v in (t, s)]
    v = law.velocity(x, times[0])
    exact = MeanFlow(law, exact_student(law)).derivative(x, *times, v, None)

    def error(step):
        options = MeanFlowOptions(derivative="difference", step=step)
        return (MeanFlow(law, exact_student(law), options).derivative(x, *times, v, None) - exact).abs().max().item()

    assert error(1e-3) < 1e-4
    assert 3.5 < error(4e-2) / error(2e-2) < 4.5


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_loss_and_gradient_vanish_at_the_exact_flow_map_of_the_teacher(power):
    law = gaussian()
    student = Student(Nudged(ExactMap(law), "flow", 2), (2,))
    game = MeanFlow(law, student, MeanFlowOptions(jumps=1.0, power=power, levels=NoiseSampler(low=0.01)))
    loss = game.loss("student", batch_of(64, dtype=torch.float64), Rng(0)).total
    assert loss < 1e-22
    assert steepest(loss, student.denoiser) < 1e-12
    wrong = Student(Nudged(ExactMap(gaussian(std=(0.6, 1.5))), "flow", 2), (2,))
    game = MeanFlow(law, wrong, game.options)
    assert steepest(game.loss("student", batch_of(64, dtype=torch.float64), Rng(0)).total, wrong.denoiser) > 1e-3


@pytest.mark.parametrize(("t", "s"), TIMES)
def test_without_a_teacher_the_expected_gradient_vanishes_at_the_exact_flow_map(t, s):
    """eps - x0 is right on average given x_t, and the target is linear in it: quadratic, so sigma points are exact."""
    law = gaussian()

    def slope(**other):
        student = Student(Nudged(ExactMap(gaussian(**other)), "flow", 2), (2,))
        game = MeanFlow(None, student, MeanFlowOptions(jumps=1.0, power=0.0, levels=UNIFORM))
        loss = game.loss("student", points(law), Script(uniforms=[s, t, 0.0])).total
        return steepest(loss, student.denoiser), loss

    rest, loss = slope()
    assert rest < 1e-11
    assert loss > 0.1  # the spread of eps - x0 stays
    assert slope(mean=(2.1, -1.0))[0] > 1e-3


def test_the_target_carries_no_gradient():
    """The gradient is that of the error to a target held still; through the target it would be another."""
    game = MeanFlow(None, Student(mlp(reads_s=True, prediction="flow", dtype=torch.float64), (2,)),
                    MeanFlowOptions(jumps=1.0, power=0.0, levels=UNIFORM))  # fmt: skip
    torch.nn.init.normal_(game.student.denoiser.net.span_embedding.linear_2.weight, std=0.1)
    batch = batch_of(8, dtype=torch.float64)
    found = gradients(game.loss("student", batch, Script(uniforms=[0.2, 0.8, 0.0])).total, game.student)
    t, s = (torch.full((8,), v, dtype=torch.float64) for v in (0.8, 0.2))
    x_t, v = game.student.path.corrupt(batch.data, t, batch.noise), batch.noise - batch.data

    def u(x, time):
        return game.student(x, time, s, None, "average_velocity")

    value, rate = torch.func.jvp(u, (x_t, t), (v, torch.ones_like(t)))

    def against(target):
        return gradients(2 * squared_error(u(x_t, t), target).mean(), game.student)  # a sum over two elements

    stopped, through = against((v - 0.6 * rate).detach()), against(v - 0.6 * rate)
    assert all(torch.allclose(found[k], stopped[k], rtol=1e-9, atol=1e-12) for k in found)
    assert any(not torch.allclose(found[k], through[k], rtol=0.05) for k in found)


def test_without_jumps_it_is_flow_matching():
    student = Student(mlp(reads_s=True, prediction="flow"), (2,))
    batch = batch_of(16)
    level = NoiseSampler(low=0.4, high=0.4)
    mean = MeanFlow(None, student, MeanFlowOptions(jumps=0.0, power=0.0, levels=level)).loss("student", batch, Rng(0))
    flow = FlowMatching(None, student, FlowMatchingOptions(levels=level)).loss("student", batch, Rng(0))
    assert mean.total.item() == pytest.approx(2 * flow.total.item(), rel=1e-6)  # a sum over two elements
    ours, theirs = gradients(mean.total, student), gradients(flow.total, student)
    shared = [k for k in ours if "span" not in k]
    assert all(torch.allclose(ours[k], 2 * theirs[k], rtol=1e-4, atol=1e-7) for k in shared)


def test_the_adaptive_weight_is_a_power_of_the_stopped_squared_error():
    student, batch = Student(mlp(reads_s=True, prediction="flow"), (2,)), batch_of(1)

    def loss(**options):
        given = MeanFlowOptions(jumps=1.0, levels=UNIFORM, c=0.01, **options)
        return MeanFlow(None, student, given).loss("student", batch, Rng(0)).total

    plain, weighted = loss(power=0.0), loss(power=0.75)
    assert weighted.item() == pytest.approx(plain.item() * (plain.item() + 0.01) ** -0.75, rel=1e-5)
    one, other = gradients(weighted, student), gradients(plain, student)
    assert all(torch.allclose(one[k], other[k] * (plain.item() + 0.01) ** -0.75, rtol=1e-4, atol=1e-8) for k in one)


def test_the_derivative_is_paid_for_the_rows_that_jump_alone():
    student = Student(mlp(reads_s=True, prediction="flow"), (2,))
    game = MeanFlow(None, student, MeanFlowOptions(jumps=0.5))
    seen = []
    plain = game.derivative
    game.derivative = lambda x, *rest: seen.append(len(x)) or plain(x, *rest)
    for k in range(20):
        game.loss("student", batch_of(50), Rng(k))
    assert 400 < sum(seen) < 600
    assert max(seen) < 50


def test_both_derivatives_give_nearly_the_same_loss():
    student, batch = (
        Student(mlp(reads_s=True, prediction="flow", dtype=torch.float64), (2,)),
        batch_of(32, dtype=torch.float64),
    )
    exact, difference = (
        MeanFlow(None, student, MeanFlowOptions(derivative=kind, step=1e-3, power=0.0))
        .loss("student", batch, Rng(0))
        .total
        for kind in ("exact", "difference")
    )
    assert difference.item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize(("t", "s"), [(0.8, 0.1), (0.3, 0.6)])
def test_the_ends_of_jumps_have_levels_of_their_own(t, s):
    """The later of both draws is s, as in the paper's code: families may overlap."""
    asked = []

    class Asked(ExactMap):
        def forward(self, x, t, cond=None, want="x0", s=None):
            asked.append((float(t[0]), float(s[0])))
            return super().forward(x, t, cond, want, s)

    student = Student(Nudged(Asked(gaussian()), "flow", 2), (2,))
    options = MeanFlowOptions(jumps=1.0, levels=NoiseSampler(low=t, high=t), ends=NoiseSampler(low=s, high=s))
    MeanFlow(None, student, options).loss("student", batch_of(4, dtype=torch.float64), Rng(0))
    assert asked[0] == pytest.approx((max(t, s), min(t, s)))


def test_the_exact_derivative_of_a_network_that_is_laid_out_channels_last_is_that_of_the_same_network():
    net = build({"kind": "unet", "shape": (1, 8, 8), "widths": (8, 16), "head_width": 8, "groups": 4, "reads_s": True})
    game = MeanFlow(None, Student(Wrapped(net, Straight(), "velocity"), (1, 8, 8)))
    x, v = (torch.randn(3, 1, 8, 8, generator=seeded(k)) for k in (0, 1))
    t, s = torch.full((3,), 0.7), torch.full((3,), 0.2)
    plain = game.derivative(x, t, s, v, None)
    net.to(memory_format=torch.channels_last)
    there = game.derivative(x.to(memory_format=torch.channels_last), t, s, v, None)
    assert torch.allclose(there, plain, rtol=1e-4, atol=1e-4 * plain.abs().max())


def test_a_network_that_does_not_depend_on_what_moves_has_no_derivative():
    class Constant(torch.nn.Module):
        reads_s = True

        def forward(self, x, time, cond, span):
            return torch.ones(x.shape)

    game = MeanFlow(None, Student(Wrapped(Constant(), Straight(), "flow"), (2,)))
    x, t = torch.ones(4, 2), torch.full((4,), 0.5)
    assert game.derivative(x, t, 0.5 * t, x, None).tolist() == torch.zeros(4, 2).tolist()


def test_another_path_is_refused_unless_it_is_seen_as_a_straight_one():
    with pytest.raises(ValueError, match="straight path, got Exploding"):
        MeanFlow(None, Student(mlp(Exploding(), reads_s=True), (2,)))
    straight = Student(Reframed(mlp(Exploding(), reads_s=True), Straight(end=0.98)), (2,))
    assert MeanFlow(None, straight).loss("student", batch_of(4), Rng(0)).total.isfinite()


@pytest.mark.parametrize("distil", [False, True], ids=["from data", "from a teacher"])
def test_a_short_run_comes_close_to_the_average_velocity_of_a_gaussian(distil):
    law = gaussian(mean=(0.5, -0.3), std=(0.5, 1.2))
    student = Student(mlp(width=64, depth=1, reads_s=True, prediction="flow"), (2,))
    game = MeanFlow(law if distil else None, student, MeanFlowOptions(levels=UNIFORM, power=0.0))
    z = torch.randn(2000, 2, generator=seeded(1))
    wanted = law.flow_map(z, 1.0, 0.0)

    def error():
        return ((student.generate(z) - wanted).square().mean() / wanted.var(0).mean()).sqrt().item()

    before = error()
    play(game, stream(law, 128 if distil else 256), 400, rate=8e-3)
    assert before > 0.5
    assert error() < (0.06 if distil else 0.16)  # from data v is a noisy draw


# -- the fast clock -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "given"),
    [(MeanFlow, {}), (Consistency, {"mode": "training", "target_decay": 0.5})],
    ids=["meanflow", "consistency"],
)
def test_stilled_waves_stay_silent_and_leave_the_slow_ones_alone(cls, given):
    student = Student(mlp(reads_s=True, prediction="flow"), (2,))
    first = student.denoiser.net.time_embedding.linear_1.weight
    before = first.detach().clone()
    half = first.shape[1] // 2
    game = cls(None, student, cls.Options(still=2, **given))
    fast = [0, 1, half, half + 1]
    slow = [k for k in range(2 * half) if k not in fast]
    assert not first[:, fast].any()
    assert torch.equal(first[:, slow], before[:, slow])
    with torch.no_grad():
        first.add_(1.0)
    game.settle(0)
    assert not first[:, fast].any()
    assert torch.equal(first[:, slow], before[:, slow] + 1)
    with pytest.raises(ValueError, match="leave no wave"):
        cls(None, student, cls.Options(still=half, **given))
    if given:  # its average follows silent waves
        average = game.target.denoiser.net.time_embedding.linear_1.weight
        assert not average[:, fast].any() and torch.allclose(average[:, slow], before[:, slow] + 0.5)


def test_the_fast_waves_of_the_digits_teacher_make_its_derivative_and_hardly_its_guess():
    """250 log sigma turns by a whole wave in a fortieth of an octave; the network knows the level by its slow waves."""
    teacher = load_teacher("digits").denoiser
    x, t = 2.5 * torch.randn(32, 1, 8, 8, generator=seeded(0)), torch.full((32,), 2.5)
    labels, found = torch.arange(32) % 10, []
    for count in (0, 3):
        still_fast_waves(teacher, count)
        velocity = teacher(x, t, labels, "velocity").detach()
        rate = along_flow(lambda x, t, s, c: teacher(x, t, c), x, t, t, velocity, labels)
        found.append((teacher(x, t, labels).detach(), rate))
    (guess, rate), (quiet, calm) = found
    assert (quiet - guess).norm() < 0.02 * guess.norm()
    assert calm.norm() < 0.5 * rate.norm()


# -- the teacher's own samples in place of the data ----------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "given"),
    [(MeanFlow, {}), (Consistency, {"first": 40, "last": 40, "picks": "uniform"})],
    ids=["meanflow", "consistency"],
)
def test_samples_of_the_teacher_are_learned_from_under_noise_of_their_own(cls, given):
    """A pair's own noise would put x_t on the line between them, where the law of x_t has a correlation that is none of
    the flow's: Var x_t of N(0, 1) noised is (1 - t)^2 + t^2, on the line of a pair x = z it is 1."""
    law, seen = gaussian(mean=(0.0, 0.0), std=(1.0, 1.0)), []

    class Watching(Denoiser):
        path = law.path

        def forward(self, x, t, cond=None, want="x0", s=None):
            seen.append((x.detach(), t))
            return law(x, t, cond, want)

    student = Student(mlp(path=law.path, reads_s=True, prediction="flow", dtype=torch.float64), (2,))
    game = cls(Watching(), student, cls.Options(pairs=PairOptions(count=8), **given))
    assert game.pairs().count == 8
    z = torch.randn(20_000, 2, generator=seeded(3), dtype=torch.float64)
    game.loss("student", Batch(z, None, z, z), Rng(0))
    x_t, t = seen[0]
    near = (t > 0.4) & (t < 0.6)
    assert x_t[near].var().item() == pytest.approx(0.5, abs=0.06)  # on the lines: 1
    assert cls(law, student, cls.Options()).pairs() is None


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (MeanFlow, {"velocity": "data", "jumps": 1.0, "power": 0.0}),
        (Consistency, {"mode": "training", "first": 40, "last": 40, "picks": "uniform"}),
    ],
    ids=["meanflow", "consistency"],
)
def test_on_the_lines_of_joined_pairs_loss_and_gradient_vanish_at_the_map_that_joins_them(cls, given):
    """z -> A z + b by straight lines: the velocity of a line is its average, and its end is the same all along.

    Under noise of its own each x_t is on many lines, and the map from z is not what is learned."""
    matrix = torch.tensor([[0.5, 0.2], [-0.1, 0.7]], dtype=torch.float64)
    offset = torch.tensor([1.0, -2.0], dtype=torch.float64)
    z = torch.randn(64, 2, generator=seeded(3), dtype=torch.float64)
    x = z @ matrix.T + offset
    pairs = PairOptions(count=8)

    def left(joined, matrix=matrix):
        student = Student(Lines(matrix, offset), (2,))
        game = cls(None, student, cls.Options(pairs=pairs, joined=joined, **given))
        loss = game.loss("student", Batch(torch.zeros_like(x), None, z, x), Rng(0)).total
        return loss.item(), steepest(loss, student)

    loss, slope = left(joined=True)
    assert loss < 1e-20
    assert slope < 1e-9
    assert left(joined=False)[1] > 1e-2
    assert left(joined=True, matrix=matrix.T)[1] > 1e-2


@pytest.mark.parametrize(("start", "scale"), [(None, None), (2.5, None), (2.5, 2.7)])
def test_the_line_of_a_joined_pair_begins_where_the_student_does_from_its_noise(start, scale):
    """On a path that ends before pure noise x0 + sigma eps is off the start by x0: the noise takes that off."""
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    student = Student(mlp(path, dtype=torch.float64), (2,), start=start, start_scale=scale)
    z, x = torch.randn(2, 16, 2, generator=seeded(3), dtype=torch.float64)
    line = Batch(torch.zeros_like(x), None, z, x).samples(Rng(0), student)
    assert torch.allclose(path.corrupt(line.data, student.start, line.noise), student.start_scale * z, atol=1e-12)
    assert torch.equal(line.data, x) and line.target is None
    halfway = path.corrupt(line.data, student.start / 2, line.noise)
    assert torch.allclose(halfway, (x + student.start_scale * z) / 2, atol=1e-12)


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (MeanFlow, {"pairs": PairOptions(count=8)}),
        (MeanFlow, {"velocity": "data"}),
        (Consistency, {"pairs": PairOptions(count=8)}),
        (Consistency, {"mode": "training"}),
    ],
)
def test_joined_without_pairs_or_with_the_teachers_own_flow_is_refused(cls, given):
    law = gaussian()
    with pytest.raises(ValueError, match="joined learns from the lines of pairs: give pairs, and"):
        cls(law, exact_student(law), cls.Options(joined=True, **given))


# -- dispersive regularisation ------------------------------------------------------------------


def test_a_dispersive_term_is_added_to_the_loss_and_moves_the_features_apart():
    student, batch = Student(mlp(reads_s=True, prediction="flow"), (2,)), batch_of(32)
    plain = MeanFlow(None, student, MeanFlowOptions(jumps=0.0, power=0.0)).loss("student", batch, Rng(0))
    given = MeanFlowOptions(jumps=0.0, power=0.0, dispersive=DispersiveOptions(weight=0.7))
    game = MeanFlow(None, student, given)
    with tapped(student.denoiser.net, game.taps) as features:
        game.loss("student", batch, Rng(0))
    loss = game.loss("student", batch, Rng(0))
    assert loss.parts["dispersive"].item() == pytest.approx(dispersive(features[0], "infonce", 0.5).item(), rel=1e-5)
    assert loss.total.item() == pytest.approx((plain.total + 0.7 * loss.parts["dispersive"]).item(), rel=1e-5)


def test_features_spread_at_an_equal_task_loss():
    law = gaussian(mean=(0.5, -0.3), std=(0.5, 1.2))

    def trained(given):
        student = Student(mlp(width=32, depth=1, reads_s=True, prediction="flow"), (2,))
        game = MeanFlow(None, student, MeanFlowOptions(jumps=0.0, power=0.0, levels=UNIFORM, dispersive=given))
        play(game, stream(law, 64), 150, rate=4e-3)
        flat = MeanFlow(None, student, MeanFlowOptions(jumps=0.0, power=0.0, levels=UNIFORM))
        taps = MeanFlow(None, student, MeanFlowOptions(dispersive=DispersiveOptions())).taps
        with torch.no_grad(), tapped(student.denoiser.net, taps) as features:
            loss = flat.loss("student", stream(law, 1000)(0, 9), Rng(3)).total.item()
        return loss, torch.pdist(features[0].flatten(1)).mean().item()

    (loss, spread), (other, wide) = trained(None), trained(DispersiveOptions(weight=0.1))
    assert wide > 1.5 * spread
    assert other < 1.1 * loss
