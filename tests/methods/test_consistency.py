import math

import pytest
import torch
from games import Nudged, batch_of, gradients, mlp, play, stream
from laws import ExactMap, draw, exact_student, gaussian, seeded

from fewstep.denoiser import Centred, Wrapped
from fewstep.losses import pseudo_huber
from fewstep.method import Batch
from fewstep.methods.consistency import (
    Consistency,
    ConsistencyOptions,
    ConsistencyTrajectory,
    ConsistencyTrajectoryOptions,
    level_count,
    same_dropout,
)
from fewstep.nets import build
from fewstep.path import Exploding, Straight, Trigonometric, VariancePreserving
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import FiniteSet

EDM = Exploding(sigma_min=0.02, sigma_max=20.0)
PATHS = [Straight(), Trigonometric(), EDM, VariancePreserving()]


def options(levels=40, **other):
    """A number of levels that does not change."""
    return ConsistencyOptions(
        **{"first": levels, "last": levels, "horizon": 1, "distance": "l2", "weight": "none", "anchor": False, **other}
    )


def nudged(law):
    return Student(Nudged(ExactMap(law), size=2), (2,))


def steepest(loss, module):
    return max(g.abs().max().item() for g in gradients(loss, module).values())


def law_batch(law, count=64, seed=0):
    rng = seeded(seed)
    data = law.sample(count, rng)
    return Batch(data, None, torch.randn(count, 2, generator=rng, dtype=torch.float64))


class Followed(Consistency):
    """Consistency whose earlier point lies exactly on the trajectory."""

    def _follow(self, x, t, s, batch):
        return self.teacher.flow_map(x, t, s)


def test_each_weight_is_of_the_noisier_level_of_its_pair():
    for name, stated in {
        "inverse_gap": lambda low, high: 1 / (high - low),
        "inverse_ratio": lambda low, high: high / (high - low),
        "edm": lambda low, high: 1 / high**2 + 1 / 0.5**2,
        "none": lambda low, high: torch.ones_like(high),
    }.items():
        own = options(8, mode="training", weight=name, data_std=0.5, anchor=True)
        times, _, weight = Consistency(None, nudged(gaussian(path=EDM)), own)._table(EDM, torch.device("cpu"))
        low, high = times[:-1], times[1:]  # an exploding path's times are its sigmas
        torch.testing.assert_close(weight, stated(low, high), rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_exact_map_to_the_data_does_not_change_along_the_flow(path):
    law = gaussian(path=path)
    student = exact_student(law)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64) * path.t_max
    x = draw(law, 4, 0.5 * path.t_max)

    def along(v):
        return torch.func.jvp(lambda x, t: student(x, t, path.t_min), (x, t), (v, torch.ones_like(t)))[1]

    velocity = law.velocity(x, t)
    assert along(velocity).abs().max() < 1e-12 * velocity.abs().max().clamp(min=1)
    assert along(-velocity).abs().max() > 1e-3
    assert along(torch.zeros_like(velocity)).abs().max() > 1e-3


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_loss_and_gradient_vanish_at_the_exact_map_on_exact_trajectories(path):
    law, batch = gaussian(path=path), law_batch(gaussian())
    student = nudged(law)
    game = Followed(law, student, options())
    loss = game.loss("student", batch, Rng(0)).total
    assert loss < 1e-22
    assert steepest(loss, student.denoiser) < 1e-12
    wrong = nudged(gaussian(std=(0.6, 1.5), path=path))
    loss = Followed(law, wrong, options()).loss("student", batch, Rng(0)).total
    assert steepest(loss, wrong.denoiser) > 1e-6


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_what_is_left_at_the_exact_map_is_the_error_of_the_teachers_step(solver, order):
    """A local error of order + 1 in the gap."""
    law = gaussian(path=EDM)
    batch = law_batch(law, 2000)

    def left(levels):
        return Consistency(law, exact_student(law), options(levels, solver=solver)).loss("student", batch, Rng(0)).total

    assert math.log2((left(80) / left(160)).sqrt()) == pytest.approx(order + 1, abs=0.3)


def test_training_from_one_point_is_distillation_from_its_law():
    """The flow of a single atom is a straight line through data and noise."""
    atom = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    law = FiniteSet(atom, path=EDM)
    student = Student(mlp(EDM, dtype=torch.float64), (2,))
    batch = Batch(atom.expand(16, 2), None, batch_of(16, dtype=torch.float64).noise)
    losses = {
        mode: Consistency(law, student, options(mode=mode)).loss("student", batch, Rng(0)).total
        for mode in ("training", "distillation")
    }
    assert losses["training"].item() == pytest.approx(losses["distillation"].item(), rel=1e-12)
    other = Batch(batch.data + 0.5, None, batch.noise)
    losses = {
        mode: Consistency(law, student, options(mode=mode)).loss("student", other, Rng(0)).total
        for mode in ("training", "distillation")
    }
    assert losses["training"].item() != pytest.approx(losses["distillation"].item(), rel=1e-3)


def test_the_guess_at_the_lowest_level_is_the_sample_itself():
    torch.manual_seed(0)
    net = build({"kind": "mlp", "shape": (2,), "width": 16})
    student = Student(Wrapped(net, EDM, "cm", "250 log_sigma", scale_input=True, boundary=EDM.sigma_min), (2,))
    x = torch.randn(8, 2)
    assert torch.equal(student(x, EDM.sigma_min, 0.0), x)
    assert not torch.allclose(student(x, 1.0, 0.0), x, atol=1e-2)
    loose = Student(Wrapped(net, EDM, "edm", "250 log_sigma", scale_input=True), (2,))
    assert not torch.equal(loose(x, EDM.sigma_min, 0.0), x)


def test_the_loss_is_the_weighted_distance_of_neighbouring_guesses():
    """One level pair: nothing about the draw is left to chance."""
    student = Student(mlp(EDM), (2,))
    game = Consistency(None, student, options(2, mode="training", distance="huber", weight="inverse_gap", huber_c=0.1))
    game.levels = lambda path: (torch.tensor([0.5, 2.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    batch = batch_of(8)
    loss = game.loss("student", batch, Rng(0)).total

    def written_out(stop):
        high, low = (student(EDM.corrupt(batch.data, t, batch.noise), t, 0.0) for t in (2.0, 0.5))
        return (pseudo_huber(high, low.detach() if stop else low, 0.1) / 1.5).mean()

    assert loss.item() == pytest.approx(written_out(True).item(), rel=1e-5)
    found, stopped, through = (gradients(v, student) for v in (loss, written_out(True), written_out(False)))
    assert all(torch.allclose(found[k], stopped[k], rtol=1e-3, atol=1e-6) for k in found)
    assert any(not torch.allclose(found[k], through[k], rtol=0.05, atol=1e-3) for k in found)  # the target not stopped


def test_levels_double_at_the_steps_of_the_paper():
    """Song & Dhariwal 2023, Sec. 3.4: s0 = 10, s1 = 1280, K = 800 gives K' = 100."""
    table = {0: 11, 100: 21, 200: 41, 300: 81, 400: 161, 500: 321, 600: 641, 700: 1281}
    for step, count in table.items():
        assert level_count(step, 800, 10, 1280) == count
        assert level_count(step + 99, 800, 10, 1280) == count
    assert level_count(10**6, 800, 10, 1280) == 1281
    assert level_count(0, 800, 18, 18) == 19


def test_pairs_of_levels_follow_the_log_normal_of_sigma():
    given = ConsistencyOptions(mode="training", mean=-1.1, std=2.0, anchor=False)
    game = Consistency(None, Student(mlp(EDM), (2,)), given)
    times, mass = game.levels(EDM)
    assert len(times) == 11
    assert times[0].item() == pytest.approx(0.02)
    assert times[-1].item() == 20.0
    assert (times.diff() > 0).all()
    normal = torch.distributions.Normal(-1.1, 2.0)
    share = normal.cdf(times.log()).diff()
    assert torch.allclose(mass, share / share.sum())
    game.step = 999
    assert len(game.levels(EDM)[0]) == 1281


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_both_levels_of_a_pair_are_drawn_as_often_as_they_should_be(path):
    seen = []

    class Seen(Consistency):
        def _follow(self, x, t, s, batch):
            seen.extend(zip(s.tolist(), t.tolist(), strict=True))
            return x

    law = gaussian(path=path)
    game = Seen(law, exact_student(law), options(5))
    game.loss("student", law_batch(law, 20_000), Rng(0))
    times, mass = game.levels(path)
    for i, share in enumerate(mass.tolist()):
        pair = (times[i].item(), times[i + 1].item())
        assert seen.count(pair) / len(seen) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("mode", ["training", "distillation"])
def test_the_data_is_the_first_level_and_its_own_guess(mode):
    """One pair: the aim is the clean sample, or the teacher's guess of it; no network is asked below."""
    law, batch = gaussian(path=EDM), law_batch(gaussian(), 16)
    student = Student(mlp(EDM, dtype=torch.float64), (2,))
    game = Consistency(law, student, options(2, mode=mode, anchor=True))
    times, mass = game.levels(EDM)
    assert times[:2].tolist() == pytest.approx([0.0, 0.02])
    edges = torch.distributions.Normal(-1.1, 2.0).cdf(times.clamp(min=1e-300).log())
    assert torch.allclose(mass, edges.diff() / edges.diff().sum())
    game.levels = lambda path: (times[:2], torch.ones(1))
    x = EDM.corrupt(batch.data, 0.02, batch.noise)
    aim = batch.data if mode == "training" else law(x, 0.02)
    wanted = (student(x, 0.02, 0.0) - aim).square().mean()
    assert game.loss("student", batch, Rng(0)).total.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_without_it_a_free_network_drifts_at_the_lowest_level_and_with_it_it_does_not():
    """Nothing else holds f there: an affine student whose guess is off at the lowest level alone stays off."""
    law, batch = gaussian(path=EDM), law_batch(gaussian(), 256)

    class Off(ExactMap):
        def forward(self, x, t, cond=None, want="x0", s=None):
            return super().forward(x, t, cond, want, s) + 0.05

    def pull(anchor):
        student = Student(Nudged(Off(law), size=2), (2,))
        return steepest(Followed(law, student, options(anchor=anchor)).loss("student", batch, Rng(0)).total, student)

    assert pull(False) < 1e-12  # off by a constant everywhere, and at rest
    assert pull(True) > 1e-3


# -- the continuous form ------------------------------------------------------------------------


def continuous(**other):
    return ConsistencyOptions(**{"form": "continuous", "tangent_c": 0.0, "tangent_warmup": 0.0, **other})


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_continuous_gradient_vanishes_at_the_exact_map(path):
    law, batch = gaussian(path=path), law_batch(gaussian())
    student = nudged(law)
    loss = Consistency(law, student, continuous(mean=-0.5, std=1.0)).loss("student", batch, Rng(0)).total
    assert loss < 1e-18
    assert steepest(loss, student.denoiser) < 1e-9
    wrong = nudged(gaussian(std=(0.6, 1.5), path=path))
    loss = Consistency(law, wrong, continuous(mean=-0.5, std=1.0)).loss("student", batch, Rng(0)).total
    assert steepest(loss, wrong.denoiser) > 1e-3


class Backwards(Consistency):
    """A broken twin: the tangent of x points the wrong way."""

    def _continuous(self, batch, rng):
        teacher = self.teacher

        class Mirrored(torch.nn.Module):
            def __call__(self, x, t, cond=None, want="x0", s=None):
                return 2 * x - teacher(x, t, cond)  # its eps has the other sign

        self.__dict__["_modules"]["teacher"] = Mirrored()
        return super()._continuous(batch, rng)


def test_a_tangent_of_the_other_sign_does_not_rest_at_the_exact_map():
    law, student = gaussian(path=EDM), nudged(gaussian(path=EDM))
    loss = Backwards(law, student, continuous()).loss("student", law_batch(law), Rng(0)).total
    assert steepest(loss, student.denoiser) > 1e-2


@pytest.mark.parametrize("mode", ["distillation", "training"])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_continuous_gradient_is_the_limit_of_the_discrete_one(path, mode):
    """l2 at one pair of levels, divided by their gap and weighed as the continuous form weighs."""
    law, scale = gaussian(path=path), 0.7
    net = build({"kind": "mlp", "shape": (2,), "width": 16, "depth": 1})
    clock = "log_sigma/4" if path.kind == "exploding" else "t"
    student = Student(Wrapped(net, path, "x0", clock).double(), (2,))
    batch, level = law_batch(law, 8), 0.4
    t = float(path.time(-level))
    game = Consistency(law, student, continuous(mode=mode, mean=level, std=1e-12, data_std=scale))
    found = gradients(game.loss("student", batch, Rng(0)).total, student)
    alpha, sigma, d_alpha, d_sigma = path.coefs(t)
    size = sigma**2 + (alpha * scale) ** 2
    turn = scale * (d_sigma * alpha - sigma * d_alpha) / size
    weigh = (alpha * scale / size.sqrt() / turn) / (sigma * scale / size.sqrt())

    def slope(gap):
        discrete = Consistency(law, student, options(2, mode=mode))
        discrete.levels = lambda path: (torch.tensor([t - gap, t], dtype=torch.float64), torch.ones(1))
        grads = gradients(discrete.loss("student", batch, Rng(0)).total, student)
        return {k: 2 * weigh / gap * g for k, g in grads.items()}  # a sum over two elements

    def apart(other):
        return max((found[k] - other[k]).norm() / found[k].norm().clamp(min=1e-12) for k in found).item()

    near, far = apart(slope(1e-5 * path.t_max)), apart(slope(1e-3 * path.t_max))
    assert near < 1e-2
    assert near < 0.1 * far


def test_on_the_trigonometric_path_the_derivative_is_that_of_the_paper():
    """Lu & Song 2024, Algorithm 1: -cos^2 (F - dx/dt) - r cos sin (x + dF/dt), normalised with c = 0.1."""
    path = Trigonometric()
    law, batch = gaussian(path=path), law_batch(gaussian(), 8)
    net = build({"kind": "mlp", "shape": (2,), "width": 16, "depth": 1})
    student = Student(Wrapped(net, path, "v", "t").double(), (2,))
    game = Consistency(law, student, continuous(mean=0.3, std=1e-12, tangent_c=0.1, tangent_warmup=0.5, horizon=100))
    game.step = 19
    found = gradients(game.loss("student", batch, Rng(0)).total, student)
    t = torch.full((8,), float(path.time(-0.3)), dtype=torch.float64)
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    x = cos * batch.data + sin * batch.noise
    velocity = law.velocity(x, t)
    value, rate = torch.func.jvp(lambda x, t: net(x, t), (x, t), (velocity, torch.ones_like(t)))
    g = -(cos**2) * (value - velocity) - 0.4 * cos * sin * (x + rate)  # a row of 20 steps in 50
    g = (g / (g.norm(dim=1, keepdim=True) + 0.1)).detach()
    wanted = gradients((net(x, t) - value.detach() - g).square().sum(1).mean(), student)
    assert all(torch.allclose(found[k], wanted[k], rtol=1e-6, atol=1e-9) for k in found)


def test_a_central_difference_gives_the_continuous_gradient_too():
    law, batch = gaussian(path=EDM), law_batch(gaussian())
    student = Student(mlp(EDM, dtype=torch.float64), (2,))
    exact, difference = (
        Consistency(law, student, continuous(mean=0.0, std=0.5, derivative=kind, step=1e-5))
        .loss("student", batch, Rng(0))
        .total.item()
        for kind in ("exact", "difference")
    )
    assert difference == pytest.approx(exact, rel=1e-4)


# -- trajectories -------------------------------------------------------------------------------


class FollowedTrajectory(ConsistencyTrajectory):
    def _follow(self, x, t, s, batch):
        return self.teacher.flow_map(x, t, s)


class Reversed(FollowedTrajectory):
    """A broken twin: the jump's ends are exchanged."""

    def _end_of(self, student, x, t, end, cond):
        class Turned:
            path = student.path

            def __call__(self, x, t, s, cond):
                return student(x, s, t, cond) if isinstance(s, torch.Tensor) else student(x, t, s, cond)

        return super()._end_of(Turned(), x, t, end.clamp(min=student.path.t_low), cond)


def steady(**other):
    base = {"first": 12, "last": 12, "horizon": 1, "distance": "l2", "weight": "none", "anchor": False}
    return ConsistencyTrajectoryOptions(**{**base, **other})


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_jumps_of_the_exact_map_follow_one_another_and_their_loss_vanishes(path):
    law, batch = gaussian(path=path), law_batch(gaussian(), 128)
    student = nudged(law)
    x = draw(law, 16, 0.8 * path.t_max)
    once, twice = student(x, 0.8 * path.t_max, path.t_min), student(x, 0.8 * path.t_max, 0.3 * path.t_max)
    twice = student(twice, 0.3 * path.t_max, path.t_min)
    assert torch.allclose(once, twice, atol=1e-9)
    loss = FollowedTrajectory(law, student, steady()).loss("student", batch, Rng(0)).total
    assert loss < 1e-20
    assert steepest(loss, student.denoiser) < 1e-9
    wrong = nudged(gaussian(std=(0.6, 1.5), path=path))
    assert FollowedTrajectory(law, wrong, steady()).loss("student", batch, Rng(0)).total > 1e-8
    assert not Reversed(law, student, steady()).loss("student", batch, Rng(0)).total < 1e-8


def test_the_ends_of_jumps_are_the_data_and_every_later_level():
    law, seen = gaussian(path=EDM), []

    class Seen(FollowedTrajectory):
        def _end_of(self, student, x, t, end, cond):
            seen.append((t.clone(), end.clone()))
            return super()._end_of(student, x, t, end, cond)

    game = Seen(law, nudged(law), steady())
    game.loss("student", law_batch(law, 4000), Rng(0))
    (t, end), (s, same) = seen
    assert torch.equal(end, same)
    assert (end <= s).all() and (s < t).all()
    assert set(end.tolist()) == {0.0, *game.levels(EDM)[0][:-1].tolist()}
    top = s == s.max()
    assert (end[top] == 0).double().mean() == pytest.approx(1 / 13, abs=0.03)


# -- CoMoSpeech's form --------------------------------------------------------------------------


def test_noise_around_a_part_of_the_condition_is_the_same_flow_seen_from_there():
    """x = x0 + sigma (eps + mu): the network sees sigma mu added, and the flow's ends are those of the law."""
    law = gaussian(path=EDM)
    mu = torch.tensor([1.5, -0.5], dtype=torch.float64)

    class Moved(ExactMap):
        """The exact map of the law whose noise has the mean mu."""

        def forward(self, x, t, cond=None, want="x0", s=None):
            sigma = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
            return super().forward(x - sigma * mu, t, None, "x0", s)

    z = torch.randn(512, 2, generator=seeded(0), dtype=torch.float64)
    cond = {"mean": mu.expand(512, 2)}
    student = Student(Centred(Moved(law), "mean"), (2,))
    wanted = law.flow_map(20.0 * z, 20.0, 0.0)
    assert torch.allclose(student.generate(z, cond), wanted, atol=1e-10)
    # without the shift every sample moves by -80 mu tau / sqrt(tau^2 + 80^2), here from sigma 20
    std = law.variance.sqrt()
    lost = Student(Moved(law), (2,)).generate(z, None) - wanted
    assert torch.allclose(lost.mean(0), -20 * mu * std / (std**2 + 400).sqrt(), rtol=1e-9)
    # and its velocity is that of the plain noise, not of the shifted one
    x = draw(law, 512, 3.0)
    assert torch.allclose(
        student.denoiser(x, 3.0, cond, "velocity"), nudged(law).denoiser(x, 3.0, None, "velocity", 0.0)
    )


def test_consistency_of_centred_noise_rests_at_the_exact_map():
    law, batch = gaussian(path=EDM), law_batch(gaussian())
    mu = torch.tensor([1.5, -0.5], dtype=torch.float64)
    batch = Batch(batch.data, {"mean": mu.expand(64, 2)}, batch.noise)

    class Uncentred(ExactMap):
        def forward(self, x, t, cond=None, want="x0", s=None):
            sigma = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
            return super().forward(x - sigma * mu, t, None, want if want == "x0" else "none", s)

    student = Student(Nudged(Centred(Uncentred(law), "mean"), size=2), (2,))
    given = options(50, picks="uniform", solver="euler")
    loss = Followed(law, student, given).loss("student", batch, Rng(0)).total
    assert loss < 1e-22
    bare = Student(Nudged(Uncentred(law), size=2), (2,))
    assert Followed(law, bare, given).loss("student", batch, Rng(0)).total > 1e-6


def test_elements_that_do_not_count_change_nothing():
    student = Student(mlp(EDM), (2,))
    batch = batch_of(8)
    mask = torch.tensor([1.0, 0.0]).expand(8, 2)
    for distance in ("l2", "huber"):
        game = Consistency(None, student, options(mode="training", distance=distance, mask="mask"))
        loss = game.loss("student", Batch(batch.data, {"mask": mask}, batch.noise), Rng(0)).total
        whole = Consistency(None, student, options(mode="training", distance=distance))
        seen = []
        plain = whole._masked
        whole._masked = lambda g, a, c, seen=seen, plain=plain: seen.extend([g, a]) or plain(g, a, c)
        whole.loss("student", batch, Rng(0))
        part = (seen[0][:, 0] - seen[1][:, 0]).square()
        wanted = part if distance == "l2" else pseudo_huber(seen[0][:, :1], seen[1][:, :1], 0.00054 * math.sqrt(2))
        assert loss.item() == pytest.approx(wanted.mean().item(), rel=1e-5)


def test_a_condition_without_the_named_part_is_refused():
    game = Consistency(None, Student(mlp(EDM), (2,)), options(mode="training", mask="frames"))
    with pytest.raises(ValueError, match="no 'frames'"):
        game.loss("student", batch_of(4), Rng(0))
    with pytest.raises(ValueError, match="no 'mean'"):
        Centred(gaussian(path=EDM), "mean")(torch.zeros(2, 2), 1.0, {"text": torch.zeros(2)})


class Masked(torch.nn.Module):
    """A network whose answer is its dropout mask."""

    def __init__(self):
        super().__init__()
        self.drop, self.weight = torch.nn.Dropout(0.5), torch.nn.Parameter(torch.ones(()))

    def forward(self, x, time, cond=None):
        return self.drop(torch.ones_like(x)) * self.weight


def test_both_passes_share_one_dropout_mask():
    student = Student(Wrapped(Masked(), EDM), (64,))
    game = Consistency(None, student, options(mode="training")).train()
    assert game.loss("student", batch_of(4, (64,)), Rng(0)).total == 0
    x = torch.zeros(4, 64)
    with same_dropout(student) as again:
        one = student(x, 1.0, 0.0)
        other = student(x, 1.0, 0.0)
        again()
        same = student(x, 1.0, 0.0)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_mask_of_a_later_step_is_another():
    student = Student(Wrapped(Masked(), EDM), (64,)).train()
    masks = []
    for _ in range(2):
        with same_dropout(student) as again:
            masks.append(student(torch.zeros(4, 64), 1.0, 0.0))
            again()
            student(torch.zeros(4, 64), 1.0, 0.0)
    assert not torch.equal(*masks)


def test_teacher_and_target_never_drop_anything_out():
    student = Student(Wrapped(Masked(), EDM), (64,))
    game = Consistency(Wrapped(Masked(), EDM), student, options(target_decay=0.9)).train()
    assert game.student.training
    assert not game.teacher.net.drop.training
    assert not game.target.denoiser.net.drop.training


def test_a_target_network_is_the_running_average_of_the_student():
    student = Student(mlp(EDM), (2,))
    game = Consistency(None, student, options(mode="training", target_decay=0.9))
    before = [p.clone() for p in game.target.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    game.settle(0)
    for p, old, new in zip(game.target.parameters(), before, student.parameters(), strict=True):
        assert torch.allclose(p, 0.9 * old + 0.1 * new)
        assert not p.requires_grad


def test_distillation_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="needs a teacher"):
        Consistency(None, Student(mlp(EDM), (2,)), ConsistencyOptions())


def test_pseudo_huber_takes_the_constant_of_the_paper():
    student, batch = Student(mlp(EDM), (2,)), batch_of(8)
    given, default = (
        Consistency(None, student, options(mode="training", distance="huber", huber_c=c)).loss("student", batch, Rng(0))
        for c in (0.00054 * math.sqrt(2), None)
    )
    assert torch.equal(given.total, default.total)


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_a_short_run_comes_close_to_the_flow_map_of_a_gaussian(mode):
    """Song & Dhariwal's schedule in small: x0 = m + tau (x - m) / sqrt(tau^2 + sigma^2) at the noisiest level."""
    path = Exploding(sigma_min=0.02, sigma_max=10.0)
    law = gaussian(mean=(0.3, -0.2), std=(0.5, 0.8), path=path)
    torch.manual_seed(0)
    net = build({"kind": "mlp", "shape": (2,), "width": 64, "depth": 1})
    wrapped = Wrapped(net, path, "cm", "log_sigma/4", scale_input=True, data_std=0.7, boundary=path.sigma_min)
    student = Student(wrapped, (2,))
    game = Consistency(law, student, ConsistencyOptions(mode=mode, first=10, last=40, horizon=400, mean=-0.5, std=1.6))
    z = torch.randn(2000, 2, generator=seeded(1))
    wanted = law.flow_map(10.0 * z, 10.0, 0.0)

    def error():
        return ((student.generate(z) - wanted).square().mean() / wanted.var(0).mean()).sqrt().item()

    before = error()
    play(game, stream(law, 128), 400, rate=4e-3)
    assert before > 0.5
    assert error() < (0.1 if mode == "distillation" else 0.14)
