import pytest
import torch
from games import batch_of, gradients, mlp, play
from laws import gaussian, seeded

from fewstep.denoiser import Denoiser
from fewstep.joint import codes, joined, label_map, nearest
from fewstep.losses import squared_error
from fewstep.methods.denoising import FlowMatching, FlowMatchingOptions
from fewstep.methods.symmflow import SymmFlow, SymmFlowOptions, generate, read
from fewstep.path import NoiseSampler, Straight
from fewstep.rng import Rng
from fewstep.student import Student

CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
BOOK = codes(3, "one_hot")


def labelled(count, rng):
    """Three clouds in the plane and their labels."""
    labels = rng.integers(3, count)
    return CENTRES[labels] + 0.25 * rng.normal((count, 2)), labels


def pairs(step, turn):
    rng = Rng(5, step, turn)
    x, labels = labelled(128, rng)
    return joined(x, labels, rng.normal((128, 2)), BOOK, rng, 0.2)


def trained(draw):
    student = Student(mlp(shape=(5,), width=64, depth=2, prediction="velocity"), (5,))
    return play(SymmFlow(None, student, SymmFlowOptions(picture=2)), draw, 400, rate=4e-3)


def scores(student):
    """One-step accuracy of reading, and how often a generated point lies in its label's cloud."""
    rng = Rng(11)
    x, labels = labelled(1000, rng)
    told = nearest(read(student, x, 3, rng, draws=4), BOOK)
    made = generate(student, rng.normal((1000, 2)), labels, BOOK, steps=10)
    near = torch.cdist(made, CENTRES).argmin(1)
    return (told == labels).double().mean().item(), (near == labels).double().mean().item()


def test_one_network_generates_and_classifies_and_a_branch_on_the_wrong_clock_does_not():
    """The broken twin exchanges the ends of the label's flow: what is read is noise."""
    told, made = scores(trained(pairs))
    assert told >= 0.95
    assert made >= 0.9

    def turned(step, turn):
        batch = pairs(step, turn)
        data, noise = batch.data.clone(), batch.noise.clone()
        data[:, 2:], noise[:, 2:] = batch.noise[:, 2:], batch.data[:, 2:]
        return type(batch)(data, None, noise)

    told, _ = scores(trained(turned))
    assert told < 0.6


def test_label_noise_that_knows_the_label_teaches_nothing_of_pictures():
    """The broken twin's noise leans to the label: the network reads it there, and not from the picture."""

    def leaning(step, turn):
        batch = pairs(step, turn)
        data = batch.data.clone()
        data[:, 2:] += 4 * batch.noise[:, 2:]
        return type(batch)(data, None, batch.noise)

    told, _ = scores(trained(leaning))
    assert told < 0.8


def test_it_is_flow_matching_of_pairs_with_a_weight_for_each_half():
    student, batch = Student(mlp(shape=(3,), prediction="flow"), (3,)), batch_of(16, (3,))
    level = NoiseSampler(low=0.4, high=0.4)
    ours = SymmFlow(None, student, SymmFlowOptions(levels=level, picture=2, label_weight=0.5))
    flow = FlowMatching(None, student, FlowMatchingOptions(levels=level)).loss("student", batch, Rng(0)).total
    parts = ours.loss("student", batch, Rng(0))
    assert parts.total.item() == pytest.approx((parts.parts["picture"] + 0.5 * parts.parts["label"]).item(), rel=1e-6)
    assert flow.item() == pytest.approx((2 * parts.parts["picture"] + parts.parts["label"]).item() / 3, rel=1e-6)
    t = torch.full((16,), 0.4)
    z = 0.6 * batch.data + 0.4 * batch.noise
    guess = student(z, t, 0.0, None, "velocity")
    wanted = batch.noise - batch.data
    total = squared_error(guess[:, :2], wanted[:, :2]) + 0.5 * squared_error(guess[:, 2:], wanted[:, 2:])
    found, by_hand = gradients(parts.total, student), gradients(total.mean(), student)
    assert all(torch.allclose(found[k], by_hand[k], rtol=1e-4, atol=1e-7) for k in found)


class Pair(Denoiser):
    """The exact velocity of independent Gaussian halves, both seen from their own end of time."""

    def __init__(self, picture, label):
        super().__init__()
        self.picture, self.label, self.path = picture, label, Straight()

    def forward(self, x, t, cond=None, want="x0", s=None):
        down = self.picture(x[:, :2], max(t, 1e-4), None, "flow")
        up = -self.label(x[:, 2:], max(1 - t, 1e-4), None, "flow")  # its data is at the other end
        return self.path.convert(torch.cat([down, up], 1), x, t, "flow", want)


def test_down_the_clock_it_makes_pictures_and_up_the_clock_labels_with_exact_velocities():
    picture, label = gaussian(mean=(1.0, -1.0), std=(0.5, 0.8)), gaussian(mean=(0.4, 0.7), std=(0.3, 0.2))
    student = Student(Pair(picture, label), (4,))
    eps = torch.randn(500, 2, generator=seeded(0), dtype=torch.float64)
    book = label.sample(3, seeded(1))
    made = generate(student, eps, torch.arange(500) % 3, book, steps=400)
    assert torch.allclose(made, picture.flow_map(eps, 1.0, 0.0), atol=0.02)
    rng = seeded(2)
    told = read(student, made, 2, rng, steps=400)
    start = torch.randn(500, 2, generator=seeded(2), dtype=torch.float64)
    assert torch.allclose(told, label.flow_map(start, 1.0, 0.0), atol=0.02)


def test_labels_are_maps_that_are_read_back_for_a_picture_or_for_each_place():
    x = torch.zeros(4, 1, 6, 6)
    for book in (codes(10), codes(10, "one_hot")):
        labels = torch.tensor([0, 3, 9, 5])
        chart = label_map(labels, book, x, Rng(0), 0.2)
        assert chart.shape == (4, book.shape[1], 6, 6)
        assert torch.equal(nearest(chart, book), labels)
        mask = torch.randint(10, (4, 6, 6), generator=seeded(0))
        assert torch.equal(nearest(label_map(mask, book, x, Rng(0), 0.2), book, places=True), mask)
    blurred = label_map(labels, codes(10), x, Rng(0), 0.2) - label_map(labels, codes(10), x)
    assert blurred.abs().max() <= 0.1
    assert blurred.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.15)


@pytest.mark.parametrize("width", [0.0, 0.4])
def test_generation_starts_from_labels_as_blurred_as_they_were_in_training(width):
    """Uniform noise ``width`` wide around the code: its standard deviation is width / sqrt(12)."""
    seen = []

    class Watching(Denoiser):
        path = Straight()

        def forward(self, x, t, cond=None, want="x0", s=None):
            seen.append(x)
            return torch.zeros_like(x)

    labels = torch.arange(3000) % 3
    generate(Student(Watching(), (5,)), torch.zeros(3000, 2), labels, BOOK, rng=Rng(0), width=width)
    off = seen[0][:, 2:] - BOOK[labels]
    assert off.abs().max() <= width / 2
    assert off.std().item() == pytest.approx(width / 12**0.5, rel=0.05)
    assert off.mean().abs() < 0.01
