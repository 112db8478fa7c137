import math

import pytest
import torch
from games import Nudged, batch_of, gradients, mlp, play, stream
from laws import ExactMap, draw, exact_student, gaussian, seeded

from fewstep.denoiser import Wrapped
from fewstep.losses import pseudo_huber
from fewstep.method import Batch
from fewstep.methods.consistency import Consistency, ConsistencyOptions, level_count, same_dropout
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
        **{"first": levels, "last": levels, "horizon": 1, "distance": "l2", "weight": "none", **other}
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
    game = Consistency(None, student, ConsistencyOptions(mode="training", first=2, last=2, horizon=1, huber_c=0.1))
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
    game = Consistency(None, Student(mlp(EDM), (2,)), ConsistencyOptions(mode="training", mean=-1.1, std=2.0))
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
