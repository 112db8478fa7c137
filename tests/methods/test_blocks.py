"""Matching block by block: the integral KL of each block's conditional law, the blocks before it clean and given."""

import math

import pytest
import torch
from games import Script, batch_of, gradients, mlp, sigma_points
from laws import seeded, spd

from fewstep.denoiser import Denoiser
from fewstep.method import Batch
from fewstep.methods.families.blocks import ALL, BEFORE, WHICH, by_block, free_running, given, rng_of_blocks
from fewstep.methods.families.diagnosis import diagnose
from fewstep.methods.score_gap import IKL, IKLOptions
from fewstep.path import NoiseSampler, Straight, column
from fewstep.rng import Rng
from fewstep.student import Student

PATH = Straight()
FIXED = NoiseSampler(kind="uniform", low=0.6, high=0.6)
COUNT, SIZE = 3, 2
JOINT, CENTRE = spd(6, 2), torch.linspace(-1, 1, 6, dtype=torch.float64)


class BlockMap(Denoiser):
    """Block k of a one-step student: ``A_k z + W_k before + c_k``."""

    def __init__(self, seed=0):
        super().__init__()
        rng = seeded(seed)
        self.path = PATH
        self.root = torch.nn.Parameter(torch.stack([spd(SIZE, k + seed) for k in range(COUNT)]))
        self.weight = torch.nn.Parameter(0.3 * torch.randn(COUNT, SIZE, 6, generator=rng, dtype=torch.float64))
        self.offset = torch.nn.Parameter(0.3 * torch.randn(COUNT, SIZE, generator=rng, dtype=torch.float64))

    def centre(self, cond):
        which = cond[WHICH]
        past = cond[BEFORE].flatten(1)
        return torch.einsum("bij,bj->bi", self.weight[which], past) + self.offset[which]

    def forward(self, x, t, cond=None, want="x0", s=None):
        guess = torch.einsum("bij,bj->bi", self.root[cond[WHICH]], x.flatten(1)) + self.centre(cond)
        return self.path.convert(guess.view_as(x), x, t, "x0", want)


class BlockLaw(Denoiser):
    """The denoiser of Gaussian blocks, given those before: ``centre(cond)`` and covariances [COUNT, SIZE, SIZE]."""

    def __init__(self, centre, covariance):
        super().__init__()
        self.path, self.centre, self.covariance = PATH, centre, covariance

    def forward(self, x, t, cond=None, want="x0", s=None):
        alpha, sigma, _, _ = PATH.coefs(float(t[0]))
        centre, inside = self.centre(cond), self.covariance[cond[WHICH]]
        spread = alpha**2 * inside + sigma**2 * torch.eye(SIZE, dtype=torch.float64)
        away = x.flatten(1) - alpha * centre
        return (centre + alpha * torch.einsum("bij,bj->bi", inside @ torch.linalg.inv(spread), away)).view_as(x)


def conditionals():
    """(centre of a block given its past, covariances) of the joint Gaussian, by Schur complements."""
    weights, offsets, inside = [], [], []
    for k in range(COUNT):
        past, now = slice(0, k * SIZE), slice(k * SIZE, (k + 1) * SIZE)
        weight = torch.zeros(SIZE, 6, dtype=torch.float64)
        weight[:, past] = JOINT[now, past] @ torch.linalg.inv(JOINT[past, past])
        weights.append(weight)
        offsets.append(CENTRE[now] - weight[:, past] @ CENTRE[past])
        inside.append(JOINT[now, now] - weight[:, past] @ JOINT[past, now])
    weights, offsets = torch.stack(weights), torch.stack(offsets)

    def centre(cond):
        return torch.einsum("bij,bj->bi", weights[cond[WHICH]], cond[BEFORE].flatten(1)) + offsets[cond[WHICH]]

    return centre, torch.stack(inside)


def sequences():
    """Sigma points of (data, noise, noise of the match): means of quadratics over them are exact."""
    data, noise, eps = sigma_points(6, 6, 6)
    data = CENTRE + data @ torch.linalg.cholesky(JOINT).T
    return tuple(v.reshape(-1, COUNT, SIZE) for v in (data, noise, eps))


def test_a_match_block_by_block_has_the_gradient_of_the_sum_of_conditional_divergences():
    net = BlockMap()
    student = Student(net, (1, SIZE))
    centre, inside = conditionals()
    frozen = BlockMap()
    critic = BlockLaw(frozen.centre, (frozen.root @ frozen.root.mT).detach())
    data, noise, eps = sequences()
    options = IKLOptions(blocks=COUNT, levels=FIXED, match_weight="score")
    game = IKL(BlockLaw(centre, inside), student, options, critic=critic)
    draws = Script(normals=[eps.reshape(-1, 1, SIZE)], uniforms=[0.5])
    found = gradients(game.loss("student", Batch(data, None, noise), draws).total, net)
    alpha, sigma, _, _ = PATH.coefs(0.6)
    rows = by_block(Batch(data, None, noise), COUNT)
    total = 0.0
    for k in range(COUNT):
        cond = {key: value[rows.cond[WHICH] == k] for key, value in rows.cond.items()}
        noised = [alpha**2 * c + sigma**2 * torch.eye(SIZE, dtype=torch.float64)
                  for c in (net.root[k] @ net.root[k].T, inside[k])]  # fmt: skip
        ours, theirs = noised
        away = alpha * (net.centre(cond) - centre(cond))
        total = total + (away * torch.linalg.solve(theirs, away.T).T).sum(1).mean() / 2
        total = total + (torch.trace(torch.linalg.solve(theirs, ours)) - torch.logdet(ours)) / 2
    wanted = gradients(total, net)
    for name in wanted:  # the loss is a mean over rows (blocks) and elements
        assert torch.allclose(COUNT * SIZE * found[name], wanted[name], rtol=1e-9, atol=1e-11)


def test_what_a_game_of_blocks_says_of_itself_is_of_blocks():
    net, rng = BlockMap(), seeded(3)
    centre, inside = conditionals()
    critic = BlockLaw(net.centre, (net.root @ net.root.mT).detach())
    game = IKL(BlockLaw(centre, inside), Student(net, (1, SIZE)), IKLOptions(blocks=COUNT), critic=critic)
    data, noise = (torch.randn(2000, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    data = CENTRE + data @ torch.linalg.cholesky(JOINT).T
    batch = Batch(data.view(-1, COUNT, SIZE), None, noise.view(-1, COUNT, SIZE))
    lams = PATH.lam(torch.tensor([0.8, 0.5], dtype=torch.float64))
    for level in diagnose(game, batch, Rng(0), lams=lams)["levels"]:
        assert abs(level["behind"]) < 4 * level["behind_error"] < 0.4  # the critic is exact


def test_a_context_that_shows_the_block_itself_would_be_noticed():
    data, noise, _ = sequences()
    cond = by_block(Batch(data, None, noise), COUNT).cond
    for k in range(COUNT):
        rows = cond[BEFORE][cond[WHICH] == k].flatten(2)
        assert torch.equal(rows[:, :k], data[:, :k])
        assert not rows[:, k:].any()


def test_blocks_keep_the_condition_that_there_was_and_divide_the_sample():
    data = torch.arange(24.0).view(2, 4, 3)
    label = torch.tensor([5, 7])
    rows = by_block(Batch(data, label, -data), 2)
    assert rows.data.shape == (4, 2, 3)
    assert torch.equal(rows.data.view(2, 4, 3), data)
    assert torch.equal(rows.noise, -rows.data)
    assert rows.cond[ALL].tolist() == [5, 5, 7, 7]
    assert rows.cond[WHICH].tolist() == [0, 1, 0, 1]
    kept = by_block(Batch(data, {"text": label}, data), 4).cond
    assert kept["text"].tolist() == [5] * 4 + [7] * 4
    with pytest.raises(ValueError, match="4 along its first axis is not 3 blocks"):
        by_block(Batch(data, None, data), 3)


def test_every_block_has_a_noise_level_of_its_own_and_two_processes_draw_what_one_would():
    whole = Rng(3)
    parts = [rng_of_blocks(Rng(3, rows=(k, k + 1, 2)), 4) for k in range(2)]
    draw = rng_of_blocks(whole, 4).uniform(8)
    assert len(set(draw.tolist())) == 8
    assert torch.equal(torch.cat([part.uniform(4) for part in parts]), draw)


def test_pairs_and_blocks_do_not_go_together_and_blocks_read_data():
    with pytest.raises(ValueError, match="leave pairs out"):
        IKL(mlp(), Student(mlp(seed=1), (2,)), IKLOptions(blocks=2, pairs={}))
    assert IKL.reads_data(IKLOptions(blocks=2))
    assert not IKL.reads_data(IKLOptions())
    plain = IKL(mlp(), Student(mlp(seed=1), (2,)), IKLOptions()).loss("critic", batch_of(4), Rng(0))
    assert plain.total.isfinite()


# -- a process in time -------------------------------------------------------------------------------------

RHO = 0.8


class Step(Denoiser):
    """``y = a z + b (the block before)``, of unit variance at the first."""

    def __init__(self, scale=0.9, follow=0.1):
        super().__init__()
        self.path = PATH
        self.scale, self.follow, self.first = (
            torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, follow, 0.7)
        )

    def parts(self, cond):
        """(centre, spread) of each row's block."""
        which, before = cond[WHICH], cond[BEFORE].flatten(1)
        last = before.gather(1, (which - 1).clamp(min=0)[:, None])
        later = (which > 0).to(last)[:, None]
        return later * self.follow * last, later * self.scale + (1 - later) * self.first

    def forward(self, x, t, cond=None, want="x0", s=None):
        centre, spread = self.parts(cond)
        return self.path.convert((centre + spread * x.flatten(1)).view_as(x), x, t, "x0", want)


class StepLaw(Denoiser):
    """The exact denoiser of ``Step`` as it is now; ``blind``: of its blocks, whatever came before."""

    def __init__(self, watched, blind=False):
        super().__init__()
        self.watched, self.blind, self.path = [watched], blind, PATH

    def forward(self, x, t, cond=None, want="x0", s=None):
        with torch.no_grad():
            centre, spread = self.watched[0].parts(cond)
            variance = spread**2
            if self.blind:
                later = (cond[WHICH] > 0).to(spread)[:, None]
                variance, centre = variance + later * self.watched[0].follow ** 2, 0 * centre
        alpha, sigma, _, _ = (column(c, centre) for c in PATH.coefs(t))
        guess = centre + alpha * variance / (alpha**2 * variance + sigma**2) * (x.flatten(1) - alpha * centre)
        return guess.view_as(x)


def process(count, length, seed):
    """A stationary autoregressive process of unit variance: [count, length, 1]."""
    draws = torch.randn(count, length, generator=seeded(seed), dtype=torch.float64)
    y = [draws[:, 0]]
    for k in range(1, length):
        y.append(RHO * y[-1] + math.sqrt(1 - RHO**2) * draws[:, k])
    return torch.stack(y, 1)[..., None]


def learned(blind, steps=220):
    net, truth = Step(), Step(math.sqrt(1 - RHO**2), RHO)
    with torch.no_grad():
        truth.first.fill_(1.0)
    student = Student(net, (1, 1))
    game = IKL(StepLaw(truth), student, IKLOptions(blocks=4), critic=StepLaw(net, blind))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.03, betas=(0.8, 0.99))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        data = process(128, 4, step)
        noise = torch.randn(128, 4, 1, generator=seeded(-step - 1), dtype=torch.float64)
        optimiser.zero_grad()
        game.loss("student", Batch(data, None, noise), Rng(step)).total.backward()
        optimiser.step()
    return student


def test_free_running_a_student_of_one_step_a_block_keeps_the_correlation_and_the_variance_of_the_process():
    student = learned(blind=False)
    noise = torch.randn(400, 200, 1, 1, generator=seeded(9), dtype=torch.float64)
    made = free_running(student, noise)[:, 20:, 0, 0]
    lag = (made[:, 1:] * made[:, :-1]).mean() / made.square().mean()
    assert lag.item() == pytest.approx(RHO, abs=0.02)
    assert made.var().item() == pytest.approx(1, abs=0.03)


def test_a_critic_blind_to_the_blocks_before_gives_the_wrong_conditional_spread():
    net = learned(blind=True).denoiser
    assert abs(net.scale.item() ** 2 - (1 - RHO**2)) > 0.1


def test_free_running_gives_every_block_the_students_own_past():
    net = Step(0.5, 2.0)
    noise = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    made = free_running(Student(net, (1, 1)), noise).flatten()
    assert made.tolist() == pytest.approx([0.7, 0.5 + 1.4, 0.5 + 3.8, 0.5 + 8.6])
    assert set(given(noise[:, :, 0], torch.zeros(1, dtype=torch.long))) == {BEFORE, WHICH}
