"""Small games for methods: scripted draws, tiny networks, and a bare training loop."""

import math

import torch

from fewstep.denoiser import Denoiser, Wrapped
from fewstep.method import Batch
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import Gaussian


class Script(Rng):
    """A source whose draws are written down beforehand and handed out in order."""

    def __init__(self, normals=(), uniforms=()):
        super().__init__("script")
        self.normals, self.uniforms = list(normals), list(uniforms)

    def normal(self, shape, dtype=None):
        draw = self.normals.pop(0)
        assert tuple(draw.shape) == tuple(shape)
        return draw.to(dtype)

    def uniform(self, count, dtype=None):
        return torch.as_tensor(self.uniforms.pop(0), dtype=dtype).expand(count)


def sigma_points(*sizes):
    """Equally weighted points of independent N(0, I) blocks: means of quadratics over them are exact."""
    n = sum(sizes)
    eye = torch.eye(n, dtype=torch.float64)
    return (math.sqrt(n) * torch.cat([eye, -eye])).split(sizes, 1)


class Affine(Denoiser):
    """The guess ``A x / scale + b`` at every time: as a one-step student, x0 = A z + b."""

    def __init__(self, matrix, offset, path, scale=1.0):
        super().__init__()
        self.matrix, self.offset = torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(offset.clone())
        self.path, self.scale = path, scale

    def forward(self, x, t, cond=None, want="x0", s=None):
        guess = (x / self.scale) @ self.matrix.T.to(x) + self.offset.to(x)
        return self.path.convert(guess, x, t, "x0", want)

    def law(self):
        """The exact law of its samples."""
        matrix, offset = self.matrix.detach(), self.offset.detach()
        return Gaussian(offset, covariance=matrix @ matrix.T, path=self.path)


def affine_student(matrix, offset, path):
    scale = float(path.coefs(path.t_max).sigma)
    return Student(Affine(matrix, offset, path, scale), tuple(offset.shape), start_scale=scale)


class Nudged(Denoiser):
    """Another denoiser plus an affine term in one of its predictions, zero at first: directions to be wrong in."""

    def __init__(self, inner, space="x0", size=None):
        super().__init__()
        size = inner.law.shape[0] if size is None and hasattr(inner, "law") else size or inner.shape[0]
        self.inner, self.path, self.space = inner, inner.path, space
        self.matrix = torch.nn.Parameter(torch.zeros(size, size, dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x, t, cond=None, want="x0", s=None):
        value = self.inner(x, t, cond, self.space, s) + x @ self.matrix.T + self.offset
        return self.path.convert(value, x, t, self.space, want)


class Lines(Denoiser):
    """The flow whose ways are the lines from z to ``A z + b``: straight, and exact in one step."""

    def __init__(self, matrix, offset):
        super().__init__()
        self.path = Straight()
        self.matrix, self.offset = torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(offset.clone())
        self.shape = tuple(offset.shape)

    def forward(self, x, t, cond=None, want="x0", s=None):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x)).view(-1, 1)
        eye = torch.eye(len(self.offset), dtype=x.dtype)
        between = (1 - t)[..., None] * self.matrix + t[..., None] * eye  # x_t = between z + (1 - t) b
        z = torch.linalg.solve(between, (x - (1 - t) * self.offset)[..., None])[..., 0]
        return self.path.convert(z @ self.matrix.T + self.offset, x, t[:, 0], "x0", want)


def mlp(
    path=None, shape=(2,), *, width=32, depth=2, classes=None, reads_s=False, prediction="x0", seed=0, dtype=None,
    beside=None,
):  # fmt: skip
    """A small network as a denoiser, with weights of its own seed."""
    path = path or Straight()
    torch.manual_seed(seed)
    net = build({
        "kind": "mlp", "shape": shape, "width": width, "depth": depth, "classes": classes, "reads_s": reads_s,
        "beside": beside or {},
    })  # fmt: skip
    clock = "250 log_sigma" if path.kind == "exploding" else "t" if reads_s else "1000t"
    denoiser = Wrapped(net, path, prediction, clock, scale_input=path.kind == "exploding")
    return denoiser if dtype is None else denoiser.to(dtype)


def batch_of(count, shape=(2,), seed=0, *, classes=None, pairs=False, dtype=torch.float32):
    """Random data, noise and, where asked for, labels and targets."""
    rng = torch.Generator().manual_seed(seed)
    data, noise, target = (torch.randn(count, *shape, generator=rng, dtype=dtype) for _ in range(3))
    cond = None if classes is None else torch.randint(classes, (count,), generator=rng)
    return Batch(data, cond, noise, target if pairs else None)


def gradients(loss, module):
    """The gradient of a loss in every parameter, by name."""
    names, values = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def play(method, draw, steps, rate=1e-3, betas=(0.9, 0.99), average=0.98):
    """Train for some student updates, rates falling to zero like a cosine; gives the student's average.

    ``draw(step, turn)`` gives a batch.
    """
    players = {
        name: torch.optim.Adam([p for p in getattr(method, name).parameters() if p.requires_grad], rate, betas)
        for name in method.players
    }
    mean = [p.detach().clone() for p in method.student.parameters()]
    for step in range(steps):
        method.step = step
        for turn, player in enumerate(method.turns(step)):
            for group in players[player].param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            method.zero_grad()
            method.loss(player, draw(step, turn), Rng(1, step, turn)).total.backward()
            players[player].step()
        method.settle(step)
        torch._foreach_lerp_(mean, [p.detach() for p in method.student.parameters()], 1 - average)
    with torch.no_grad():
        for p, m in zip(method.student.parameters(), mean, strict=True):
            p.copy_(m)
    return method.student


def stream(law, size, dtype=torch.float32):
    """Batches drawn from a law, a pure function of step and turn."""

    def draw(step, turn):
        rng = Rng(7, step, turn)
        data = law.sample(size, rng, dtype=dtype)
        return Batch(data, None, rng.normal(tuple(data.shape), dtype))

    return draw


def sliced_distance(a, b, directions=64):
    """Sliced Wasserstein-2 between two samples of one size."""
    angle = math.pi * (torch.arange(directions, dtype=a.dtype) + 0.5) / directions
    lines = torch.stack([angle.cos(), angle.sin()])
    return ((a @ lines).sort(0).values - (b @ lines).sort(0).values).square().mean().sqrt().item()
