"""The search for blocks that a plan can do without: within its budget, better than chance, on unseen starts."""

import random
import statistics
from dataclasses import replace

import pytest
import torch
from games import play, stream
from laws import mixture, seeded

from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.methods.denoising import Denoising, DenoisingOptions
from fewstep.nets import build
from fewstep.nets.skipping import flops, leaving_out
from fewstep.path import Exploding, NoiseSampler
from fewstep.search import Evolution, Journal
from fewstep.search.contest import Contest
from fewstep.search.gradient import Fitting, Free
from fewstep.search.objective import Distance, solved
from fewstep.search.skipping import MaskSpace, masked, prune
from fewstep.solvers import recommended, sample, start_noise
from fewstep.student import Student

PATH = Exploding(sigma_min=0.02, sigma_max=20.0)


@pytest.fixture(scope="module")
def teacher():
    """A residual MLP of six blocks, trained for a while on a mixture of four."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build({"kind": "mlp", "shape": (2,), "width": 48, "depth": 6})
    denoiser = Wrapped(net, PATH, "edm", "log_sigma/4", scale_input=True, data_std=1.4)
    levels = NoiseSampler(kind="log_normal", std=1.5)
    game = Denoising(None, Student(denoiser, (2,)), DenoisingOptions(levels=levels, data_std=1.4))
    play(game, stream(mixture(path=PATH), 256), 300, rate=3e-3)
    return denoiser.eval().requires_grad_(False)


def starts(model, seed, count):
    return solved(model, start_noise(PATH, PATH.t_max, torch.randn(count, 2, generator=seeded(seed))), None, 64, 512)


def contest_of(model, budget=100, steps=40):
    sets = [starts(model, seed, count) for seed, count in ((1, 256), (2, 128), (3, 512))]
    return Contest(
        model,
        *sets,
        Distance(1.4),
        evolution=Evolution(budget=budget, first=64),
        fitting=Fitting(steps=steps),
        batch=512,
    )


@pytest.mark.slow
def test_a_tenth_of_the_blocks_goes_for_a_twentieth_of_the_metric_and_chance_does_twice_as_badly(teacher):
    contest, plan = contest_of(teacher), recommended(PATH, 5)
    found = prune(plan, contest)
    assert sum(len(step.skip) for step in found.plan.steps) >= 0.1 * 6 * 5
    assert found.flops <= 0.9
    assert found.score <= 1.05 * found.whole
    assert statistics.fmean(found.chance) >= 2 * found.score
    # the FLOPs are those that the calls really have
    one = torch.zeros(1, 2)
    whole = flops(lambda: teacher(one, 1.0))
    spent = 0
    for step in found.plan.steps:
        with leaving_out(teacher, step.skip):
            spent += flops(lambda: teacher(one, 1.0))
    assert spent / (5 * whole) == pytest.approx(found.flops)


@pytest.mark.slow
def test_the_same_seed_finds_the_same_plan_and_a_journal_is_not_asked_twice(teacher):
    contest, plan, journal = contest_of(teacher, budget=30, steps=3), recommended(PATH, 3), Journal()
    first = prune(plan, contest, keep=0.8, journal=journal)
    asked = journal.asked
    heard = []
    again = prune(plan, contest, keep=0.8, journal=journal, tell=lambda *a: heard.append(a))
    assert again == first == prune(plan, contest, keep=0.8)
    assert journal.asked == asked
    assert {stage for stage, *_ in heard} == {"blocks alone", "masks", "gradient"}
    assert all(done <= total for _, done, total, _ in heard)


def space(keep=0.7):
    plan, blocks = recommended(PATH, 3), {"a": 100, "b": 50, "c": 200}
    slots = [(i, name) for i in range(3) for name in blocks]
    return MaskSpace(plan, 400, blocks, keep, {slot: 1.0 + k for k, slot in enumerate(slots)}, seed=0)


def test_every_mask_that_is_made_is_within_the_budget():
    masks, rng = space(), random.Random(0)
    made = [*masks.seeds(), *masks.chance(20, rng)]
    for _ in range(200):
        child = masks.mutate(masks.cross(rng.choice(made), rng.choice(made), rng), rng)
        made.append(child)
    assert all(masks.sound(mask) for mask in made)
    assert len({masks.write(mask) for mask in made}) > 50
    shares = [masks.share(mask) for mask in made]
    assert max(shares) <= 0.7 + 1e-9 and min(shares) > 0.3  # not far below it either
    assert masks.share(frozenset([(0, "a"), (2, "c")])) == pytest.approx(1 - 300 / 1200)


def test_the_first_mask_takes_what_harms_least_for_its_cost():
    masks = space(keep=0.8)
    # harm over cost, in 1/1200: a 0.01, b 0.04, c 0.015 at the first step, more at later ones
    assert masks.seeds()[0] == frozenset([(0, "a"), (0, "c")])


def test_a_mask_takes_the_place_of_an_older_one():
    plan = masked(recommended(PATH, 2), frozenset([(0, "x"), (1, "z"), (1, "y")]))
    assert [step.skip for step in plan.steps] == [("x",), ("y", "z")]
    assert masked(plan, frozenset()) == recommended(PATH, 2)


def test_weights_are_fitted_to_what_is_left_of_the_network(teacher):
    plan = masked(recommended(PATH, 3), frozenset([(0, "blocks.1"), (2, "blocks.4")]))
    free, x = Free(PATH, plan), starts(teacher, 5, 8).x
    assert [step.skip for step in free.plan().steps] == [step.skip for step in plan.steps]
    assert torch.allclose(free.run(teacher, x, None, True).float(), sample(teacher, x, free.plan()), atol=1e-4)
    assert torch.allclose(sample(teacher, x, free.plan()), sample(teacher, x, plan), atol=1e-4)
    assert not torch.allclose(sample(teacher, x, plan), sample(teacher, x, masked(plan, frozenset())), atol=1e-2)


def test_what_cannot_be_left_out_is_told():
    net = build({"kind": "mlp", "shape": (2,), "width": 8, "depth": 1}).requires_grad_(False)
    model = Wrapped(net, PATH, "edm", "log_sigma/4")
    contest = replace(contest_of(model, budget=4, steps=1), objective=Distance(1.0))
    with pytest.raises(Refused, match="between 0 and 1, got 1.5"):
        prune(recommended(PATH, 2), contest, keep=1.5)
    with pytest.raises(Refused, match=r"keep = 0\.1 of the FLOPs, but 0\.\d+ are outside"):
        prune(recommended(PATH, 2), contest, keep=0.1)
    exact = mixture(path=PATH)
    with pytest.raises(Refused, match="no residual blocks"):
        prune(recommended(PATH, 2), replace(contest, model=exact))


@pytest.mark.slow
def test_the_command_writes_a_plan_that_leaves_blocks_out(tmp_path, capsys):
    pytest.importorskip("diffusers")
    import json

    from fewstep.cli import main
    from fewstep.solvers import SolverPlan

    out, how = tmp_path / "plan.json", ["--budget", "2", "--starts", "2", "--how", "evolution"]
    asked = ["search", "digits", "--nfe", "1", "--keep", "0.9", "-o", str(out), *how, "--json", "--threads", "1"]
    assert main(asked) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["flops"] <= 0.9 and result["pruned_score"] > 0
    assert "the whole network 0," in result["line"]  # a plan held to real data is compared with its own samples
    assert [list(step.skip) for step in SolverPlan.load(out).steps] == result["skip"]
    assert main(["search", "digits", "--nfe", "2", "--keep", "0", "-o", str(tmp_path / "other.json")]) == 2
    assert "above 0 and at most 1, got 0" in capsys.readouterr().err
