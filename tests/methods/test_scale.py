"""Scale distillation on a linear Gaussian law: x ~ N(0, S), y_better = A x + noise, y_worse of y_better alone."""

import pytest
import torch
from games import Script, batch_of, gradients, mlp, sigma_points
from laws import seeded

from fewstep.denoiser import Denoiser
from fewstep.errors import Refused
from fewstep.method import Batch
from fewstep.methods.denoising import Denoising, DenoisingOptions
from fewstep.methods.scale import Scale, ScaleOptions
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.student import Student

SIZE = 4
MIX = torch.tensor([[1, 0.6, 0.2, 0], [0, 0.8, 0.5, 0.1], [0, 0, 0.9, 0.4], [0.3, 0, 0, 0.7]], dtype=torch.float64)
PAIRS = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)  # x2: means of neighbours
WHOLE = torch.tensor([[0.5, 0.5]], dtype=torch.float64)  # x4: the mean of those
BETTER, WORSE = 0.1, 0.2  # noise in the better picture, and more that the worse one gets
T = 0.6


class Seen(Denoiser):
    """``E[x | x_t, cond[key]]`` of x = L n, where the part is ``part x`` plus noise of covariance ``spread``."""

    def __init__(self, key, part, spread, path):
        super().__init__()
        self.key, self.part, self.spread, self.path = key, part, spread, path
        self.seen = []

    def gain(self, t):
        coefs, cov = self.path.coefs(t), MIX @ MIX.T
        alpha, sigma = float(coefs.alpha), float(coefs.sigma)
        look = torch.cat([alpha * torch.eye(SIZE, dtype=torch.float64), self.part])
        noise = torch.block_diag(sigma**2 * torch.eye(SIZE, dtype=torch.float64), self.spread)
        return cov @ look.T @ torch.linalg.inv(look @ cov @ look.T + noise)

    def forward(self, x, t, cond=None, want="x0", s=None):
        self.seen.append((x, cond))
        gain = self.gain(float(t[0] if isinstance(t, torch.Tensor) else t))
        return self.path.convert(torch.cat([x, cond[self.key]], 1) @ gain.T, x, t, "x0", want)


class Learner(Denoiser):
    """A guess that is linear in the noisy sample and what stands beside it, for one time."""

    def __init__(self, gain, path):
        super().__init__()
        self.gain, self.path = torch.nn.Parameter(gain.clone()), path

    def forward(self, x, t, cond=None, want="x0", s=None):
        return self.path.convert(torch.cat([x, cond["low"]], 1) @ self.gain.T, x, t, "x0", want)


def teacher(path=None):
    return Seen("low", PAIRS, BETTER**2 * torch.eye(2, dtype=torch.float64), path or Straight())


def exact(path=None):
    """The denoiser that sees the worse picture."""
    spread = BETTER**2 * WHOLE @ WHOLE.T + WORSE**2
    return Seen("low", WHOLE @ PAIRS, spread, path or Straight())


def population(independent=False):
    """Points whose means of quadratics are the law's; the worse picture of the better one, or of x by itself."""
    n, eps, small, more, apart = sigma_points(SIZE, SIZE, 2, 1, 2)
    x = n @ MIX.T
    better = x @ PAIRS.T + BETTER * small
    source = x @ PAIRS.T + BETTER * apart if independent else better
    return Batch(x, {"x2": better, "low": source @ WHOLE.T + WORSE * more}, eps)


def scale(student, better="x2", path=None, **options):
    path = path or Straight()
    given = ScaleOptions(better=better, **options)
    return Scale(teacher(path), Student(Learner(student, path), (SIZE,)), given)


def loss_of(method, batch, t=T):
    high, low = method.student.path.t_max, method.student.path.t_min
    return method.loss("student", batch, Script(uniforms=[((t - low) / (high - low) - 0.001) / 0.999])).total


def pull(method, batch):
    return gradients(loss_of(method, batch), method.student)["denoiser.gain"].abs().max().item()


def settled(start, batch):
    """Where the loss has its minimum: it is quadratic, so its gradient is linear and one Newton step ends there."""

    def slope(flat):
        method = scale(flat.view_as(start))
        return gradients(loss_of(method, batch), method.student)["denoiser.gain"].flatten()

    flat = start.flatten()
    at = slope(flat)
    hessian = torch.stack([slope(flat + step) - at for step in torch.eye(len(flat), dtype=flat.dtype)], 1)
    return (flat - torch.linalg.solve(hessian, at)).view_as(start)


@pytest.mark.parametrize("path", [Straight(), VariancePreserving(), Exploding(sigma_min=0.02, sigma_max=20.0)])
def test_it_rests_at_the_exact_denoiser_of_the_worse_condition(path):
    """The tower property: E[E[x | x_t, y_better] | x_t, y_worse] = E[x | x_t, y_worse]."""
    gain = exact(path).gain(T)
    assert pull(scale(gain, path=path), population()) < 1e-9
    assert pull(scale(1.01 * gain, path=path), population()) > 1e-4


def test_from_a_wrong_student_the_minimum_is_the_exact_denoiser():
    start = torch.randn(SIZE, SIZE + 1, generator=seeded(0), dtype=torch.float64)
    found = settled(start, population())
    assert torch.allclose(found, exact().gain(T), atol=1e-9)


def test_a_worse_picture_that_is_not_made_of_the_better_one_biases_the_student():
    """The broken twin: each with noise of its own. Equal laws of each, another law of both."""
    gain = exact().gain(T)
    assert pull(scale(gain), population(independent=True)) > 1e-3
    found = settled(gain, population(independent=True))
    assert (found - gain).abs().max() > 0.01
    assert pull(scale(gain, better=None), population(independent=True)) < 1e-9, "the clean sample is right for both"


@pytest.mark.parametrize("t", [0.3, 0.6, 1.0])
def test_its_target_spreads_less_than_the_clean_sample(t):
    gain, batch = exact().gain(t), population()
    taught, true = (loss_of(scale(gain, better=better), batch, t).item() for better in ("x2", None))
    cov = MIX @ MIX.T

    def left(seen):  # tr Cov[x | x_t, y]: the cov of x, less what was learned
        coefs = Straight().coefs(t)
        look = torch.cat([float(coefs.alpha) * torch.eye(SIZE, dtype=torch.float64), seen.part])
        return torch.trace(cov - seen.gain(t) @ look @ cov).item() / SIZE

    assert true == pytest.approx(left(exact()), rel=1e-9)
    assert taught == pytest.approx(left(exact()) - left(teacher()), rel=1e-9), (
        "the rest is what the teacher does not know"
    )
    assert taught / true < 0.7


def test_a_teacher_that_sees_the_worse_picture_itself_teaches_nothing_new():
    batch = population()
    gain = exact().gain(T)
    same = Scale(exact(), Student(Learner(gain, Straight()), (SIZE,)), ScaleOptions(better="low"))
    assert loss_of(same, batch).item() < 1e-18
    own = Scale(exact(), Student(Learner(1.1 * gain, Straight()), (SIZE,)), ScaleOptions(better="low"))
    assert pull(own, batch) > 1e-3, "it repeats a teacher of the scale, whatever that one is worth"


def test_both_are_asked_about_one_noisy_sample_and_each_sees_its_own_picture():
    batch = batch_of(8, (SIZE,), dtype=torch.float64)
    low, half = torch.randn(2, 8, 1, generator=seeded(1), dtype=torch.float64)
    batch = Batch(batch.data, {"low": low, "x2": half.expand(8, 2), "text": low}, batch.noise)
    above, below = teacher(), exact()
    Scale(above, Student(below, (SIZE,)), ScaleOptions(better="x2")).loss("student", batch, seeded(0))
    ((x, seen),), ((z, own),) = above.seen, below.seen
    assert torch.equal(x, z)
    assert torch.equal(seen["low"], batch.cond["x2"]) and torch.equal(own["low"], low)
    assert torch.equal(seen["text"], low) and torch.equal(own["text"], low), "the rest of the condition is for both"
    first = exact()
    Scale(None, Student(first, (SIZE,)), ScaleOptions(reads="x4")).loss(
        "student", Batch(batch.data, {"x4": low}, batch.noise), seeded(0)
    )
    assert torch.equal(first.seen[0][1]["low"], low), "the first of a chain reads another part in the same place"


def test_without_a_teacher_it_is_denoising():
    batch = batch_of(16, classes=3)
    options = {"weight": "edm", "data_std": 0.7}
    net = mlp(classes=3)
    t = Script(uniforms=[0.4])
    ours = Scale(None, Student(net, (2,)), ScaleOptions(**options)).loss("student", batch, t).total
    levels = ScaleOptions().levels
    theirs = Denoising(None, Student(net, (2,)), DenoisingOptions(levels=levels, **options))
    wanted = theirs.loss("student", batch, Script(normals=[batch.noise], uniforms=[0.4])).total
    assert torch.allclose(ours, wanted)


def test_what_does_not_fit_is_refused_in_one_line():
    student = Student(mlp(classes=3), (2,))
    with pytest.raises(ValueError, match="better = 'x2' is shown to a teacher, and there is none"):
        Scale(None, student, ScaleOptions(better="x2"))
    labelled = batch_of(4, classes=3)
    with pytest.raises(Refused, match="the condition has no 'x2': it has no named parts"):
        Scale(mlp(classes=3), student, ScaleOptions(better="x2")).loss("student", labelled, seeded(0))
    parts = Batch(labelled.data, {"low": labelled.noise}, labelled.noise)
    with pytest.raises(Refused, match="has no 'x2': its parts are low"):
        Scale(mlp(classes=3), student, ScaleOptions(better="x2")).loss("student", parts, seeded(0))
    assert Scale.student_options(ScaleOptions(steps=(1, 2)), Straight())["steps"] == {1: (1.0,), 2: (1.0, 0.5)}
