import pytest
import torch
from games import Lines, Nudged, Script, batch_of, gradients, mlp, play, sigma_points, sliced_distance
from laws import gaussian, mixture, seeded, spd

from fewstep.denoiser import Denoiser, Reframed
from fewstep.method import Batch, PairOptions
from fewstep.methods.denoising import FlowMatching, FlowMatchingOptions
from fewstep.methods.reflow import Reflow, ReflowOptions, straightness
from fewstep.path import Exploding, NoiseSampler, Straight
from fewstep.rng import Rng
from fewstep.solvers import Euler, sample
from fewstep.student import Student
from fewstep.tasks import task_named
from fewstep.teachers import Gaussian
from fewstep.train.pairs import Pairs

UNIFORM = NoiseSampler(kind="uniform", low=0.001)
PLAIN = {"levels": UNIFORM, "look": 0}


def pairs_of_a_gaussian(folder, count=2048):
    """Pairs of a Gaussian law that is not diagonal, as the package makes them, in float64; and its covariance."""
    covariance = spd(2, 0)
    law = Gaussian([0.7, -0.4], covariance=covariance)
    task = task_named("mixture", {"modes": 2})
    plan = PairOptions(count=count, solver="heun", nfe=255, grid="uniform")
    batch = Pairs(law, task, plan, folder, teacher_hash="law").rows(torch.arange(count))
    return law, covariance, Batch(batch.target.double(), None, batch.noise.double(), batch.target.double())


def root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def taught_by(batch, steps=150):
    """Reflow of given pairs, by a flow of lines that starts wrong."""
    torch.manual_seed(0)
    student = Student(
        Lines(torch.tensor([[1.0, 0.4], [-0.4, 0.8]], dtype=torch.float64), torch.zeros(2).double()), (2,)
    )
    method = Reflow(None, student, ReflowOptions(**PLAIN))
    draw = lambda step, turn: batch.rows(torch.randint(len(batch), (256,)))  # noqa: E731
    play(method, draw, steps, rate=5e-2, average=0.9)
    return student


def test_reflow_of_pairs_of_a_gaussian_is_the_straight_optimal_coupling(tmp_path):
    """The cheapest map from N(0, I) to a Gaussian is ``mean + covariance^(1/2) z``, and it is what one step gives."""
    law, covariance, batch = pairs_of_a_gaussian(tmp_path)
    z = torch.randn(4000, 2, generator=seeded(1), dtype=torch.float64)

    def slope_error(student):
        """Regression of what one Euler step gives on z, against the square root."""
        x = student.generate(z).detach()
        design = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
        slope = torch.linalg.lstsq(design, x).solution[:2].T
        return (slope - root(covariance)).abs().max().item()

    student = taught_by(batch)
    assert slope_error(student) < 1e-3
    assert straightness(student.denoiser, z).mean() < 1e-12 < 1e-2 < straightness(law, z).mean()
    shuffled = Batch(batch.data, None, batch.noise.roll(1, 0), batch.target.roll(0, 0))
    assert slope_error(taught_by(shuffled)) > 0.02, "the broken twin: noise and image of different pairs"


def test_the_straightness_defect_of_a_gaussian_is_the_variance_of_its_speed():
    """In one dimension x_t = m_t + z s_t / s_1, s_t^2 = (1 - t)^2 l + t^2: S = z^2 Var[ds/dt], by quadrature."""
    l, z = 0.04, torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    rate = (t - (1 - t) * l) / ((1 - t) ** 2 * l + t**2).sqrt()
    wanted = z[:, 0] ** 2 * rate.var(correction=0)
    assert torch.allclose(straightness(Gaussian([0.0], [0.2]), z, steps=4000), wanted, rtol=2e-3)


def test_straightness_is_in_time_from_0_to_1_on_a_path_that_ends_early_and_wants_a_straight_path():
    law, z = gaussian(), torch.randn(64, 2, generator=seeded(0), dtype=torch.float64)
    cut = Reframed(law, Straight(end=0.9))
    first = law(0.9 * z, 0.9, None, "velocity")
    v = torch.stack([first, law(0.9 * z - 0.45 * first, 0.45, None, "velocity")])
    wanted = 0.9**2 * (v - v.mean(0)).square().sum(2).mean(0)
    assert torch.allclose(straightness(cut, z, steps=2), wanted)
    with pytest.raises(ValueError, match="wrap it in Reframed"):
        straightness(gaussian(path=Exploding()), z)
    with pytest.raises(ValueError, match="wrap it in Reframed"):
        Reflow(None, Student(mlp(Exploding()), (2,)))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_reflow_rests_at_the_lines_of_its_pairs(t):
    matrix, offset = torch.tensor([[0.5, 0.2], [-0.1, 1.5]], dtype=torch.float64), torch.tensor([2.0, -1.0]).double()
    (z,) = sigma_points(2)
    batch = Batch(z @ matrix.T + offset, None, z, z @ matrix.T + offset)
    options = ReflowOptions(levels=NoiseSampler(low=t, high=t), look=0)

    def steepest(matrix):
        student = Student(Nudged(Lines(matrix, offset), "velocity"), (2,))
        loss = Reflow(None, student, options).loss("student", batch, Script(uniforms=[0.0])).total
        return max(g.abs().max().item() for k, g in gradients(loss, student.denoiser).items() if "inner" not in k)

    assert steepest(matrix) < 1e-12
    assert steepest(matrix.T) > 1e-2
    assert steepest(-matrix) > 1e-2, "the broken twin: noise and image change their ends"


def test_one_more_reflow_never_increases_the_straightness_defect():
    """Any linear coupling of z with x, with noise or without: ``v = E[z - x | x_t]`` is linear, so that each flow, and
    the coupling that the next one learns from, is exact to the order of the solver."""
    path, count = Straight(), 64
    z = torch.randn(512, 2, generator=seeded(0), dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    class Linear(Denoiser):
        def __init__(self, cross, variance):
            super().__init__()
            self.path, self.cross, self.variance = path, cross, variance  # E[x z^T], E[x x^T]

        def forward(self, x, t, cond=None, want="x0", s=None):
            t = float(t)
            joint = (1 - t) ** 2 * self.variance + t * (1 - t) * (self.cross + self.cross.T) + t**2 * eye
            rate = (1 - t) * (self.cross.T - self.variance) + t * (eye - self.cross)  # E[(z - x) x_t^T]
            return path.convert(x @ torch.linalg.solve(joint, rate.T), x, t, "velocity", want)

    for seed in range(4):
        variance = spd(2, seed)
        cross = 0.5 * torch.randn(2, 2, generator=seeded(seed), dtype=torch.float64) @ root(variance) * (seed > 0)
        flow, defects = Linear(cross, variance), []
        for _ in range(3):
            defects.append(straightness(flow, z, steps=count).mean().item())
            ends = sample(flow, torch.eye(2, dtype=torch.float64), torch.linspace(1, 0, count + 1), Euler())
            matrix = ends.T  # the rows are where the flow takes the axes
            flow = Linear(matrix, matrix @ matrix.T)
        assert defects[0] > 1e-3
        assert defects[1] < 1e-12 and defects[2] <= defects[1] + 1e-12, defects


def test_annealing_runs_from_flow_matching_to_reflow_and_both_ends_are_exact():
    net, batch = mlp(dtype=torch.float64), batch_of(8, pairs=True, dtype=torch.float64)
    student = Student(net, (2,))
    options = ReflowOptions(**PLAIN, anneal=0.5, horizon=100)
    method = Reflow(None, student, options)

    def loss(step, game=method):
        game.step = step
        return game.loss("student", batch, Script(normals=[fresh], uniforms=[0.3])).total.item()

    fresh = torch.randn(8, 2, generator=seeded(5), dtype=torch.float64)
    matching = FlowMatching(None, student, FlowMatchingOptions(levels=UNIFORM))
    random = matching.loss("student", Batch(batch.target, None, fresh), Script(uniforms=[0.3])).total.item()
    paired = Reflow(None, student, ReflowOptions(**PLAIN)).loss("student", batch, Script(uniforms=[0.3])).total.item()
    assert loss(0) == random
    assert loss(50) == loss(99) == paired
    assert len({loss(k) for k in (0, 20, 40, 50)}) == 4


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_mixed_noise_keeps_unit_variance_and_beta_falls_to_exactly_zero(kind):
    method = Reflow(None, Student(mlp(), (2,)), ReflowOptions(**PLAIN, anneal=0.8, horizon=100, anneal_kind=kind))
    z = torch.randn(200_000, 1, generator=seeded(0))
    betas = []
    for step in range(0, 100, 10):
        method.step = step
        betas.append(method.beta(step))
        assert method.noise_end(z, Rng(step)).var().item() == pytest.approx(1.0, abs=0.01)
        plain = (1 - betas[-1]) * z + betas[-1] * torch.randn(200_000, 1, generator=seeded(step + 1))
        assert betas[-1] in (0.0, 1.0) or plain.var().item() < 0.99, "the broken twin: a plain mixture shrinks"
    assert betas[0] == 1 and betas[8] == betas[9] == 0
    assert all(a > b for a, b in zip(betas[:8], betas[1:9], strict=True))
    method.step = 80
    assert torch.equal(method.noise_end(z, Rng(0)), z)


def test_the_log_tells_the_straightness_and_the_loss_does_not_descend_it():
    law, z = mixture(), torch.randn(100, 2, generator=seeded(0), dtype=torch.float64)
    batch = Batch(z, None, z, z)
    method = Reflow(None, Student(Nudged(law, "velocity"), (2,)), ReflowOptions(look=10, look_steps=16))
    loss = method.loss("student", batch, Rng(0))
    assert loss.parts["straightness"].item() == pytest.approx(straightness(law, z[:64], steps=16).mean().item())
    assert loss.total.item() == pytest.approx(loss.parts["reflow"].item())
    method.step = 5
    assert method.loss("student", batch.rows(slice(0, 3)), Rng(0)).parts["straightness"] == loss.parts["straightness"]


def test_its_student_serves_even_steps_and_says_which_pairs_it_needs():
    options = ReflowOptions(steps=(1, 4), pairs=PairOptions(count=10))
    steps = Reflow.student_options(options, Straight(end=0.8))["steps"]
    assert steps == {1: (0.8,), 4: pytest.approx((0.8, 0.6, 0.4, 0.2))}
    assert Reflow(None, Student(mlp(), (2,)), options).pairs().count == 10
    with pytest.raises(ValueError, match="pairs"):
        Reflow(None, Student(mlp(), (2,))).loss("student", batch_of(4), Rng(0))


def test_a_short_run_straightens_a_mixture_and_random_couplings_do_not(tmp_path):
    law, count = mixture(), 4096
    z = torch.randn(count, 2, generator=seeded(0))
    ends = sample(law, z, torch.linspace(1, 0, 33), Euler())
    data = law.sample(2000, seeded(3), dtype=torch.float32)
    fresh = torch.randn(2000, 2, generator=seeded(4))

    def run(target):
        student = Student(mlp(width=64, prediction="velocity", seed=1), (2,))

        def draw(step, turn):
            index = torch.randint(count, (128,), generator=seeded(step))
            return Batch(target[index], None, z[index], target[index])

        play(Reflow(None, student, ReflowOptions(look=0)), draw, 500, rate=6e-3)
        return sliced_distance(student.generate(fresh), data), straightness(student.denoiser, fresh).mean().item()

    one_step, defect = run(ends)
    assert one_step < 0.25 and defect < straightness(law, fresh.double()).mean().item() / 20
    random, bent = run(ends.roll(1, 0))
    assert random > 1 and bent > 0.5, "the broken twin: random couplings"
