"""One More Step: brightness lost by starting from pure noise comes back, and nothing else changes."""

import math

import pytest
import torch
from games import batch_of, play
from laws import TABLE, seeded

from fewstep.denoiser import Counted, Denoiser, Wrapped
from fewstep.grid import grid
from fewstep.method import Batch
from fewstep.methods.one_more_step import OneMoreStepOptions, OneMoreStepTraining
from fewstep.nets import build
from fewstep.path import PREDICTIONS, Exploding, Straight, Tabulated, VariancePreserving, column
from fewstep.rng import Rng
from fewstep.solvers import DPM2M, OneMoreStep, sample, start_noise
from fewstep.student import Student

BRIGHT = torch.tensor([-0.8, -0.3, 0.2, 0.6], dtype=torch.float64)
SPREAD = 0.1
DIFFUSION = Tabulated(alphas_cumprod=TABLE)
SMALL = {
    "kind": "unet", "shape": (1, 64, 64), "patch": 4, "widths": (8,), "groups": 4, "attention": (False,),
    "mid_attention": False, "classes": 4,
}  # fmt: skip


class Grey(Denoiser):
    """Pictures of one grey, N(b, 0.1^2) with the label's b: along the constant direction of 64x64 pixels, whose unit
    vector is 1/64, mean 64 b and spread 6.4; nothing in any other direction."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x, t, cond=None, want="x0", s=None):
        alpha, sigma, _, _ = self.path.coefs(t)
        seen, mean = x.flatten(1).mean(1), BRIGHT[cond].to(x)  # seen = alpha grey + sigma n / 64
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2 / 64**2)
        x0 = column(mean + gain * (seen - alpha * mean), x).expand_as(x).to(x)
        return self.path.convert(x0, x, t, "x0", want)


class Means(torch.nn.Module):
    """What the module learns at best: v = -E[x0 | cond], whatever the noise."""

    def forward(self, x, time, cond=None):
        return column(-BRIGHT[cond].to(x), x).expand_as(x)

    def null(self, cond):
        return torch.full_like(cond, 3)


EXACT = Wrapped(Means(), Straight(), "v")


def brightness(start, path=DIFFUSION):
    """The mean brightness of each label, over starts that are each there with their opposite: no chance is left."""
    law, cond = Grey(path), torch.arange(4).repeat(2)
    times = grid(path, 24, "logsnr")
    z = torch.randn(4, 1, 64, 64, generator=seeded(0), dtype=torch.float64)
    x = start(path, float(times[0]), torch.cat([z, -z]), cond)
    return sample(law, x, times, DPM2M(), cond=cond).flatten(1).mean(1).view(2, 4).mean(0)


def plainly(path, t, noise, cond):
    return start_noise(path, t, noise)


def with_module(module, **options):
    step = OneMoreStep(module, **options)
    return lambda path, t, noise, cond: step(path, t, noise, cond, rng=Rng(1))


def test_plain_noise_loses_the_share_of_brightness_that_the_flow_map_says():
    # (x_0 - m) / S = (x_1 - alpha m) / root(alpha^2 S^2 + sigma^2), and E x_1 = 0
    alpha = math.sqrt(TABLE[-1])
    assert alpha == pytest.approx(0.068, abs=5e-4)
    kept = 1 - alpha * 6.4 / math.sqrt(alpha**2 * 6.4**2 + 1 - alpha**2)
    assert kept == pytest.approx(0.60, abs=0.005)
    assert torch.allclose(brightness(plainly), kept * BRIGHT, atol=2e-3)


def test_one_more_step_gives_the_brightness_back():
    assert (brightness(with_module(EXACT)) - BRIGHT).abs().max() < 0.02


def test_so_does_a_module_that_was_trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(SMALL)
    student = Student(Wrapped(net, Straight(), "v"), (1, 64, 64), classes=4)

    def draw(step, turn):
        rng = Rng(5, step)
        cond = rng.integers(4, 32)
        grey = BRIGHT[cond].float() + SPREAD * rng.normal((32,))
        data = column(grey, torch.empty(32, 1, 1, 1)).expand(-1, 1, 64, 64)
        return Batch(data, cond, data)

    play(OneMoreStepTraining(None, student), draw, 60, rate=5e-3, average=0.9)
    assert (brightness(with_module(student.denoiser.double().eval())) - BRIGHT).abs().max() < 0.02


def test_where_no_signal_is_left_it_changes_nothing_and_asks_nothing():
    z, cond = torch.randn(4, 1, 64, 64, generator=seeded(2), dtype=torch.float64), torch.arange(4)
    for path in (Straight(), VariancePreserving(schedule="cosine"), VariancePreserving(zero_snr=True)):
        counted = Counted(EXACT)
        assert torch.equal(
            OneMoreStep(counted)(path, path.t_max, z, cond, rng=Rng(0)), start_noise(path, path.t_max, z)
        )
        assert counted.calls == 0
    almost = Straight(end=1 - 1e-7)
    gap = OneMoreStep(EXACT)(almost, almost.t_max, z, cond, rng=Rng(0)) - start_noise(almost, almost.t_max, z)
    assert 0 < gap.abs().max() < 1e-6


@pytest.mark.parametrize("path", [DIFFUSION, Straight(end=0.8), Exploding()], ids=lambda path: path.kind)
def test_the_start_has_the_mean_and_the_spread_of_the_path(path):
    # the root of the variance, not the variance: at alpha = 0.2 of the straight path they differ
    t, cond = path.t_max, torch.arange(4)
    coefs = path.coefs(t)
    zero = OneMoreStep(EXACT)(path, t, torch.zeros(4, 1, 8, 8, dtype=torch.float64), cond, rng=Rng(0))
    one = OneMoreStep(EXACT)(path, t, torch.ones(4, 1, 8, 8, dtype=torch.float64), cond, rng=Rng(0))
    assert torch.allclose(zero.flatten(1).mean(1), coefs.alpha * BRIGHT)
    assert torch.allclose(one - zero, coefs.sigma.expand(4, 1, 8, 8))


def test_its_own_guidance_moves_the_guess_away_from_the_negative_condition():
    t, cond = DIFFUSION.t_max, torch.tensor([0, 1])
    start = OneMoreStep(EXACT, guidance=2.5)(DIFFUSION, t, torch.zeros(2, 1, 4, 4).double(), cond, rng=Rng(0))
    wanted = BRIGHT[3] + 2.5 * (BRIGHT[:2] - BRIGHT[3])
    assert torch.allclose(start.flatten(1).mean(1), math.sqrt(TABLE[-1]) * wanted)


def test_a_module_on_a_path_that_keeps_signal_is_refused():
    with pytest.raises(ValueError, match=r"keeps alpha = 0\.0683 there"):
        OneMoreStep(Wrapped(Means(), DIFFUSION, "v"))
    with pytest.raises(ValueError, match="take student.path"):
        OneMoreStepTraining(None, Student(Wrapped(Means(), DIFFUSION, "v"), (2,)))


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p not in ("eps", "score")])
def test_the_loss_is_zero_at_minus_the_data_in_whatever_the_network_predicts(prediction):
    batch = batch_of(4, shape=(3,), classes=2)

    class Knows(torch.nn.Module):
        def forward(self, x, time, cond=None):  # v = -x0 and velocity = flow = eps - x0 at pure noise
            x0 = batch.data
            return {"x0": x0, "v": -x0, "velocity": x - x0, "flow": x - x0}[prediction]

    student = Student(Wrapped(Knows(), Straight(), prediction), (3,))
    assert OneMoreStepTraining(None, student).loss("student", batch, Rng(0)).total < 1e-12


def test_the_noise_it_reads_is_independent_of_the_data():
    read = []

    class Reads(torch.nn.Module):
        def forward(self, x, time, cond=None):
            read.append(x)
            return x

    student = Student(Wrapped(Reads(), Straight(), "x0"), (3,))
    batch = batch_of(2000, shape=(3,))
    OneMoreStepTraining(None, student, OneMoreStepOptions()).loss("student", batch, Rng(0))
    assert torch.corrcoef(torch.cat([read[0], batch.data, batch.noise], 1).T)[:3, 3:].abs().max() < 0.1
    assert read[0].std().item() == pytest.approx(1, abs=0.03)


def test_the_shipped_recipe_trains_one_that_is_saved_and_loaded(tmp_path):
    from fewstep.interop import load_teacher
    from fewstep.jobs import train
    from fewstep.train.recipe import load_recipe

    run = tmp_path / "run"
    facts = train(load_recipe("mixture_one_more_step"), run)
    assert facts["warnings"] == []  # it gives means: that they look alike is no collapse
    module = load_teacher(run / "teacher").denoiser
    cond = torch.tensor([0, 1])
    path = Straight(end=0.5)
    start = OneMoreStep(module)(path, 0.5, torch.zeros(2, 2), cond, rng=Rng(0))
    # modes at (2, 0), (0, 2), (-2, 0), (0, -2) with weights .4, .3, .2, .1 and labels 0, 1, 0, 1
    assert torch.allclose(start, 0.5 * torch.tensor([[2 / 3, 0.0], [0.0, 1.0]]), atol=0.06)
