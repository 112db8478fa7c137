"""What holds for every method there is."""

from dataclasses import replace

import pytest
import torch
from games import batch_of, mlp
from laws import largest_gradient

from fewstep.method import Loss, Method
from fewstep.methods.families.score_gap import GanOptions
from fewstep.path import NoiseSampler
from fewstep.registry import METHODS, Paper
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.train.build import divided

UNIFORM = NoiseSampler(low=0.02, high=0.98)
SETTINGS = {
    "consistency": [
        {"first": 4, "last": 8},
        {"mode": "training", "target_decay": 0.9},
        {"form": "continuous"},
        {"form": "continuous", "mode": "training", "derivative": "difference"},
    ],
    "consistency_trajectory": [{"anchor": False}],
    "denoising": [{"drop": 0.5}],
    "dmd2": [
        {"levels": UNIFORM, "gan": GanOptions(conditional=True, taps=2)},
        {"levels": UNIFORM, "gan": GanOptions(on="teacher", r1=1.0), "divergence": "jensen_shannon"},
        {"levels": UNIFORM, "gap": "fisher"},
        {"guidance": 2.0, "gan": GanOptions(levels=UNIFORM, r1=1.0, r1_kind="difference")},
    ],
    "disback": [{"backtrack": {"states": 2, "every": 1, "interval": 1}}],
    "f_distill": [{"divergence": "forward_kl"}, {"divergence": "neyman", "ratio_bins": 4}],
    "phased_dmd": [{"phase": 2, "gan": GanOptions()}, {"steps": 3, "phases": 3, "phase": 2, "match_weight": "score"}],
    "swiftbrush": [{"guidance": 2.0, "guidance_to": 5.0}],
    "progressive": [{"steps": 2, "finest": 8, "weight": "snr_plus_one"}],
    "reflow": [{"anneal": 0.5, "steps": [1, 4]}, {"look": 0}],
    "regression": [{"guide": 0.5, "guide_along": "teacher"}],
    "meanflow": [
        {"derivative": "difference", "step": 1e-2},
        {"still": 2, "dispersive": {"weight": 0.1}, "steps": (1, 4)},
    ],
    "scale": [{"better": "x2", "weight": "edm", "steps": (1, 2)}],
    "trajectory": [{"distance": "l2", "steps": (1, 4)}],
    "uni_instruct": [{"divergence": "jensen_shannon", "ratio_gradient": "paper"}, {"ratio_gradient": "weight"}],
}
CASES = [(entry, options) for entry in METHODS for options in ({}, *SETTINGS.get(entry.name, []))]
every_case = pytest.mark.parametrize(
    ("entry", "options"), CASES, ids=lambda v: getattr(v, "name", None) or ",".join(map(str, v)) or "plain"
)
every_method = pytest.mark.parametrize("entry", list(METHODS), ids=lambda e: e.name)


def made(entry, options, seed=0):
    """The method with a small network as its teacher, on the straight path, with three labels."""
    beside = {"low": 2} if entry.name == "scale" else {}
    teacher = mlp(classes=3, seed=seed, beside=beside)
    reads_s = entry.thing.flow_map
    net = mlp(classes=3, reads_s=reads_s, prediction="flow" if reads_s else "x0", seed=seed + 1, beside=beside)
    given = entry.thing.Options(**options)
    if edges := entry.thing.handovers(given, net.path):
        net = divided(net, edges)
    student = Student(net, (2,), classes=3, **entry.thing.student_options(given, net.path))
    method = entry.thing(teacher, student, given)
    method.step = 10_000 if entry.name == "disback" else 0  # behind the steps in which its student stands still
    return method


def nudge(module):
    """A critic that copies the teacher pulls nowhere; neither do adapters whose second half is still zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def batch(entry, count=8):
    found = batch_of(count, classes=3, pairs=True)
    if entry.name == "trajectory":
        rng = torch.Generator().manual_seed(4)
        return replace(found, states=torch.randn(count, 9, 2, generator=rng), times=torch.linspace(1, 0, 9))
    if entry.name != "scale":
        return found
    low, better = torch.randn(2, count, 2, generator=torch.Generator().manual_seed(3))
    return replace(found, cond={"label": found.cond, "low": low, "x2": better})


@every_method
def test_it_says_what_it_is_and_which_paper_it_is_from(entry):
    assert issubclass(entry.thing, Method)
    assert entry.summary
    assert entry.papers
    assert all(isinstance(p, Paper) and p.arxiv[4] == "." and p.title for p in entry.papers)
    assert entry.thing.name == entry.name


@every_case
def test_its_options_survive_json(entry, options):
    given = entry.thing.Options(**options)
    assert type(given).model_validate_json(given.model_dump_json()) == given


@every_method
def test_it_refuses_an_option_that_it_does_not_know(entry):
    with pytest.raises(ValueError, match="lerning_rate"):
        entry.thing.Options(lerning_rate=1.0)


@every_case
def test_its_players_exist_and_learn_and_the_student_moves_once_a_step(entry, options):
    method = made(entry, options)
    assert method.turns(0).count("student") == 1
    assert set(method.turns(0)) == set(method.players)
    for name in method.players:
        assert any(p.requires_grad for p in getattr(method, name).parameters())
    if method.teacher is not None:
        assert not any(p.requires_grad for p in method.teacher.parameters())


@every_case
def test_every_players_loss_is_one_finite_number_with_a_gradient(entry, options):
    for count in (8, 1):
        for player in made(entry, options).players:
            method = made(entry, options)
            if player == "student" and hasattr(method, "critic"):
                nudge(method.critic)
            loss = method.loss(player, batch(entry, count), Rng(0))
            assert isinstance(loss, Loss)
            assert loss.total.ndim == 0
            assert loss.total.isfinite()
            assert loss.parts
            assert all(v.ndim == 0 and v.isfinite() and not v.requires_grad for v in loss.parts.values())
            loss.total.backward()
            assert largest_gradient(getattr(method, player)) > 0
            assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


@every_case
def test_the_same_seed_gives_the_same_loss_and_another_one_another(entry, options):
    method = made(entry, options)
    for player in method.players:
        nudge(getattr(method, player))
    for player in method.players:
        torch.manual_seed(1)
        first = method.loss(player, batch(entry), Rng(5)).total
        torch.manual_seed(2)  # the global generator has no say
        assert torch.equal(method.loss(player, batch(entry), Rng(5)).total, first)
        if entry.name not in ("regression", "progressive") or options:  # which draw nothing
            assert not torch.equal(method.loss(player, batch(entry), Rng(6)).total, first)


@every_case
def test_a_plain_generator_serves_as_well_as_ours(entry, options):
    method = made(entry, options)
    for player in method.players:
        assert method.loss(player, batch(entry), torch.Generator().manual_seed(0)).total.isfinite()


@every_case
def test_it_is_saved_and_loaded_with_all_that_it_has_learned(entry, options):
    one, other = made(entry, options), made(entry, options, seed=10)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.01)
    other.load_state_dict(one.state_dict())
    for player in one.players:
        assert torch.equal(one.loss(player, batch(entry), Rng(0)).total, other.loss(player, batch(entry), Rng(0)).total)


@every_case
def test_a_teacher_stays_in_evaluation_mode_and_unchanged(entry, options):
    method = made(entry, options).train()
    assert method.student.training
    assert not any(m.training for m in method.teacher.modules())
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    for player in method.players:
        method.loss(player, batch(entry), Rng(0)).total.backward()
    method.settle(0)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert all(p.grad is None for p in method.teacher.parameters())


@every_method
def test_its_students_options_make_a_student(entry):
    net = mlp()
    given = entry.thing.student_options(entry.thing.Options(), net.path)
    student = Student(net, (2,), **given)
    for count in student.steps:
        assert student.generate(torch.zeros(2, 2), rng=Rng(0), steps=count).shape == (2, 2)
