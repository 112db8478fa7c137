"""Phased DMD: several networks share the steps, each learns alone, from a law that ends at a noise level."""

import pytest
import torch
from games import Script, batch_of, gradients, mlp, sigma_points
from laws import largest_gradient, seeded, spd

from fewstep import jobs
from fewstep.denoiser import Denoiser, Wrapped
from fewstep.errors import Interrupted, Refused
from fewstep.interop import check_student, load_student
from fewstep.jobs.training import _inherit
from fewstep.method import Batch
from fewstep.methods.families.diagnosis import diagnose
from fewstep.methods.families.matching import experts_of
from fewstep.methods.families.score_gap import Anchor, phase_of, rollout
from fewstep.methods.score_gap import PhasedDMD, PhasedDMDOptions
from fewstep.nets import Experts, ExpertsConfig, MLPConfig
from fewstep.path import Exploding, NoiseSampler, Straight
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks import task_named
from fewstep.teachers import Gaussian
from fewstep.train.build import divided, make_student
from fewstep.train.recipe import recipe_from
from fewstep.train.trainer import Nobody

PATH = Straight()
EYE = torch.eye(2, dtype=torch.float64)
TEACHER = Gaussian([1.0, -0.5], covariance=spd(2, 1), path=PATH)
FIXED = NoiseSampler(kind="uniform", low=0.5, high=0.5)


class Line(torch.nn.Module):
    """The guess ``A x + b`` at every time."""

    def __init__(self, seed):
        super().__init__()
        self.matrix = torch.nn.Parameter(0.5 * spd(2, seed))
        self.offset = torch.nn.Parameter(torch.tensor([0.2, 0.3], dtype=torch.float64))

    def forward(self, x, time, cond=None, span=None):
        return x @ self.matrix.T + self.offset


def lines(times, phases):
    """A student of affine networks: so many steps, so many phases."""
    options = PhasedDMDOptions(steps=len(times), phases=phases, times=times)
    config = ExpertsConfig(net=MLPConfig(shape=(2,)), edges=PhasedDMD.handovers(options, PATH))
    net = Experts(config, [Line(k + 3) for k in range(phases)])
    return Student(Wrapped(net, PATH, "x0", "t"), (2,), **PhasedDMD.student_options(options, PATH))


def end_of(student, phase, z):
    """(mean, covariance, s) where a phase ends, a function of its own network alone; z are sigma points."""
    times = (*student.times(4), 0.0)
    x = z
    for k in range(phase.stop):
        with torch.set_grad_enabled(k >= phase.start):
            x = student(x, times[k], times[k + 1])
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / len(x), times[phase.stop]


class Watching(Denoiser):
    """The exact critic of a student's phase; ``naive``: of one that regresses on x_s as if it were clean."""

    def __init__(self, student, phase, naive=False):
        super().__init__()
        self.watched, self.phase, self.naive, self.path = [student], phase, naive, PATH

    def forward(self, x, t, cond=None, want="x0", s=None):
        (z,) = sigma_points(2)
        with torch.no_grad():
            mean, covariance, s = end_of(self.watched[0], self.phase, z)
        alpha, sigma, _, _ = PATH.coefs(float(t[0]))
        keep = float(alpha) / (1 - s)
        added = float(sigma) ** 2 - keep**2 * s**2
        pull = torch.linalg.solve(keep**2 * covariance + added * EYE, (x - keep * mean).T).T
        if not self.naive:
            return (x - sigma**2 * pull) / alpha
        guess, noise = mean + keep * pull @ covariance, added**0.5 * pull  # E[x_s | x_t], E[eps | x_t]
        return x - sigma * (noise - guess)  # read off the velocity eps - x_s


def away(student, phase):
    """KL of the law at the end of a phase from the teacher's marginal there."""
    (z,) = sigma_points(2)
    mean, ours, s = end_of(student, phase, z)
    theirs = TEACHER.noised_covariance(s)
    gap = mean - (1 - s) * TEACHER.mean[0]
    kl = torch.trace(torch.linalg.solve(theirs, ours)) + gap @ torch.linalg.solve(theirs, gap) - 2
    return (kl + torch.logdet(theirs) - torch.logdet(ours)) / 2


def trained(student, phase, naive=False, steps=250):
    """One phase of training on sigma points: exact gradients, one noise level above the phase's end."""
    options = PhasedDMDOptions(phase=phase, times=student.times(4), levels=FIXED, match_weight="none")
    game = PhasedDMD(TEACHER, student, options, critic=Watching(student, phase_of(4, 2, phase), naive))
    z, eps = sigma_points(2, 2)
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 0.05, (0.8, 0.99))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        optimiser.zero_grad()
        game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5])).total.backward()
        optimiser.step()
    return away(student, phase_of(4, 2, phase)).item()


TIMES = (1.0, 0.8, 0.5, 0.25)


def test_each_phase_brings_its_end_to_the_teachers_law_and_leaves_the_networks_before_it_as_they_were():
    student = lines(TIMES, 2)
    first, second = experts_of(student.denoiser)
    assert away(student, phase_of(4, 2, 1)) > 0.05
    assert trained(student, 1) < 2e-3
    before = [p.detach().clone() for p in first.parameters()]
    assert trained(student, 2) < 2e-3
    assert all(torch.equal(p, b) for p, b in zip(first.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())


def test_a_critic_that_takes_the_noisy_sample_for_a_clean_one_leads_the_phase_astray():
    assert trained(lines(TIMES, 2), 1, naive=True) > 0.02


@pytest.mark.parametrize("phase", [1, 2])
def test_what_a_phase_says_of_itself_is_of_its_own_end(phase):
    student = lines(TIMES, 2)
    options = PhasedDMDOptions(phase=phase, times=TIMES)
    game = PhasedDMD(TEACHER, student, options, critic=Watching(student, phase_of(4, 2, phase)))
    noise = torch.randn(4096, 2, generator=seeded(0), dtype=torch.float64)
    lams = PATH.lam(torch.tensor([0.95, 0.8, 0.65], dtype=torch.float64))
    for level in diagnose(game, Batch(noise, None, noise), Rng(0), lams=lams)["levels"]:
        assert abs(level["behind"]) < 4 * level["behind_error"] < 0.4  # this critic knows the law at that end


@pytest.mark.parametrize("phase", [1, 2])
def test_a_phases_match_has_the_gradient_of_the_divergence_through_all_of_its_steps(phase, monkeypatch):
    student = lines(TIMES, 2)
    steps, level = phase_of(4, 2, phase), 0.75
    z, eps = sigma_points(2, 2)
    options = PhasedDMDOptions(
        steps=4, phases=2, phase=phase, times=TIMES, levels=FIXED, match_weight="score"
    )  # the drawn level is brought above the phase's end: held here
    monkeypatch.setattr(Anchor, "above", lambda self, path, t: torch.full((8,), level, dtype=torch.float64))
    game = PhasedDMD(TEACHER, student, options, critic=Watching(student, steps))
    net = experts_of(student.denoiser)[phase - 1]
    found = gradients(game.loss("student", Batch(z, None, z), Script(normals=[eps], uniforms=[0.5])).total, net)
    mean, covariance, s = end_of(student, steps, z)
    alpha, sigma, _, _ = PATH.coefs(level)
    keep = float(alpha) / (1 - s)
    ours = keep**2 * covariance + (float(sigma) ** 2 - keep**2 * s**2) * EYE
    theirs = TEACHER.noised_covariance(level)
    gap = keep * mean - float(alpha) * TEACHER.mean[0]
    kl = torch.trace(torch.linalg.solve(theirs, ours)) + gap @ torch.linalg.solve(theirs, gap) - torch.logdet(ours)
    wanted = gradients(kl / 2, net)
    for name in wanted:  # the loss is a mean over the two elements of a row
        assert torch.allclose(2 * found[name], wanted[name], rtol=1e-9, atol=1e-11)


# -- networks that share the times -------------------------------------------------------------------------


def test_rows_at_times_of_several_networks_get_each_its_own_networks_answer():
    denoiser = divided(mlp(classes=3), (0.7, 0.3))
    experts = experts_of(denoiser)
    with torch.no_grad():
        for k, expert in enumerate(experts):
            expert.out.bias.add_(k)
    batch, t = batch_of(6, classes=3), torch.tensor([0.2, 0.9, 0.5, 0.3, 0.7, 0.71])
    found = denoiser(batch.data, t, batch.cond)
    for row, k in enumerate([2, 0, 1, 2, 1, 0]):  # an edge itself belongs to the cleaner side
        alone = Wrapped(experts[k], PATH, "x0", "1000t")
        one = slice(row, row + 1)
        assert torch.allclose(found[one], alone(batch.data[one], t[one], batch.cond[one]), atol=1e-6)
    found[0].sum().backward()
    assert largest_gradient(experts[2]) > 0
    assert largest_gradient(experts[0]) == largest_gradient(experts[1]) == 0


def test_one_time_for_all_rows_is_one_call_of_one_network():
    denoiser, calls = divided(mlp(), (0.5,)), []
    for k, expert in enumerate(experts_of(denoiser)):
        expert.register_forward_hook(lambda *_, k=k: calls.append(k))
    denoiser(torch.zeros(3, 2), 0.8)
    denoiser(torch.zeros(3, 2), torch.full((3,), 0.1))
    assert calls == [0, 1]


@pytest.mark.parametrize("phases", [1, 2, 3])
@pytest.mark.parametrize("path", [Straight(), Exploding(sigma_max=10.0)], ids=lambda p: p.kind)
def test_every_step_asks_the_network_of_its_phase_and_that_one_alone_learns(path, phases):
    for phase in range(1, phases + 1):
        options = PhasedDMDOptions(steps=4, phases=phases, phase=phase)
        net = mlp(path)
        edges = PhasedDMD.handovers(options, path)
        student = Student(divided(net, edges) if edges else net, (2,), **PhasedDMD.student_options(options, path))
        game = PhasedDMD(Gaussian([0.0, 1.0], [1.0, 1.0], path=path), student, options)
        with torch.no_grad():
            next(game.critic.parameters()).add_(0.1)
        game.loss("student", batch_of(8), Rng(0)).total.backward()
        moved = [largest_gradient(expert) > 0 for expert in experts_of(student.denoiser) or [student]]
        assert moved == [k == phase - 1 for k in range(phases)]
        assert not experts_of(game.critic.denoiser)  # one network watches a phase
        game.loss("critic", batch_of(8), Rng(0)).total.backward()
        assert largest_gradient(game.critic) > 0


def test_the_phases_roll_out_stops_where_the_next_network_takes_over():
    student = lines(TIMES, 2)
    noise = torch.randn(5, 2, generator=seeded(0), dtype=torch.float64)
    middle = rollout(student, noise, None, Rng(0), True, 4, phase=phase_of(4, 2, 1))
    assert middle.s == 0.5
    assert torch.allclose(middle.x, student(student(noise, 1.0, 0.8), 0.8, 0.5))
    end = rollout(student, noise, None, Rng(0), True, 4, phase=phase_of(4, 2, 2))
    assert end.s == 0
    assert torch.allclose(end.x, student.generate(noise, steps=4))


def test_what_does_not_fit_phases_is_refused():
    options = PhasedDMDOptions()
    one = Student(mlp(), (2,), **PhasedDMD.student_options(options, PATH))
    with pytest.raises(ValueError, match="2 phases in 4 steps.*one network"):
        PhasedDMD(mlp(), one, options)
    with pytest.raises(ValueError, match="phase 3 of 2"):
        PhasedDMDOptions(phase=3)
    with pytest.raises(ValueError, match="gan to the last"):
        PhasedDMD(mlp(), one, PhasedDMDOptions(gan={}))
    with pytest.raises(Refused, match="a pipeline holds one Linear"):
        divided(Wrapped(torch.nn.Linear(2, 2), PATH), (0.5,))


# -- runs --------------------------------------------------------------------------------------------------


def recipe(**changes):
    later = {"steps": 4, "method": {"name": "phased_dmd", "options": {"critic_turns": 1, "phase": 2}}}
    return recipe_from({
        "name": "toy", "steps": 4, "batch": 8,
        "task": {"name": "mixture", "options": {"modes": 4, "train_count": 60, "test_count": 40}},
        "teacher": {"source": "law"},
        "student": {"net": {"kind": "mlp", "width": 8, "depth": 1}},
        "method": {"name": "phased_dmd", "options": {"critic_turns": 1}},
        "ema": {"decay": 0.9}, "checkpoint": {"every": 2}, "evaluate": {"enabled": False}, "stages": [later],
        **changes,
    })  # fmt: skip


class Stop(Nobody):
    """Ends a run in its second stage, as a signal would."""

    def advance(self, label, done, note=""):
        if label == "stage 2/2" and done >= 2:
            raise KeyboardInterrupt


def test_a_run_phase_by_phase_resumes_saves_and_loads_with_all_its_networks(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    jobs.train(recipe(log={"every": 1}), whole)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        jobs.train(recipe(log={"every": 1}), stopped, watch=Stop())
    jobs.train(recipe(log={"every": 1}), stopped, resume=True)
    one, other = (load_student(run / "student").student for run in (whole, stopped))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    assert len(experts_of(one.denoiser)) == 2
    first = jobs.train(recipe(stages=[]), tmp_path / "first")
    alone = experts_of(load_student(first["model"]).student.denoiser)
    both = experts_of(one.denoiser)
    same = [all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
            for a, b in zip(alone, both, strict=True)]  # fmt: skip
    assert same == [True, False]  # the second stage moved the second network and no other
    check = check_student(whole / "student")
    assert check.ok and check.steps == (4,)
    card = (whole / "student" / "README.md").read_text()
    assert "plain diffusers cannot run it" in card


def test_phases_go_on_from_one_network_that_another_method_trained():
    one, several = Student(mlp(), (2,)), Student(divided(mlp(seed=1), (0.5,)), (2,))
    _inherit(several, one)
    first, second = experts_of(several.denoiser)
    for expert in (first, second):
        assert all(torch.equal(v, one.denoiser.net.state_dict()[k]) for k, v in expert.state_dict().items())
    with pytest.raises(Refused, match="none of its weights fits"):
        _inherit(one, several)


def test_adapters_of_several_networks_stand_on_one_set_of_weights():
    made = recipe(student={"lora": {"rank": 2, "targets": "all"}}, teacher={"source": "digits"},
                  task={"name": "digits"}, stages=[])  # fmt: skip
    teacher = mlp(width=8)
    student = make_student(made, task_named("mixture"), teacher, (2,))
    first, second = experts_of(student.denoiser)
    assert first.out.weight is second.out.weight is teacher.net.out.weight
    assert first.out.lora_up is not second.out.lora_up
    PhasedDMD(teacher, student, PhasedDMDOptions(phase=2))
    assert {name.split(".")[3] for name, p in student.named_parameters() if p.requires_grad} == {"1"}
    assert not teacher.net.out.weight.requires_grad
