"""The searchers on laws known exactly: a plan is better on starts that nothing was chosen on, and never worse."""

import math
import random

import pytest
import torch
from laws import draw, mixture, seeded

from fewstep.denoiser import Counted, Denoiser
from fewstep.grid import grid
from fewstep.path import Exploding, Straight, VariancePreserving
from fewstep.search import Evolution, Journal, evolve
from fewstep.search.contest import Contest, contest
from fewstep.search.continuous import Moves, tune
from fewstep.search.gradient import Fitting, Free, Pairs, differentiable, error, fit
from fewstep.search.objective import Distance, FeatureDistance, FrechetTo, Judge, Objective, Scorer, ends
from fewstep.search.plans import PlanSpace, apart, fixed_samplers, lams, plainly, variants
from fewstep.solvers import SolverPlan, StepPlan, recommended, sample, solver_named
from fewstep.teachers import Mixture


def even_mixture(path):
    """Four equal modes at radius 2, std 0.25."""
    angle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    return Mixture([1.0] * 4, 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.25, path=path)


def exact_pairs(law, count, seed, steps=100):
    x = float(law.path.coefs(law.path.t_max).sigma) * torch.randn(count, 2, generator=seeded(seed), dtype=torch.float64)
    low = law.path.time(torch.tensor(6.0)).item()
    times = grid(law.path, steps, "logsnr", low=max(low, law.path.t_low / 4))
    with torch.no_grad():
        return Pairs(x, None, sample(law, x, times, solver_named("unipc3")))


VP = even_mixture(VariancePreserving())
TRAIN, FRESH = exact_pairs(VP, 256, 0), exact_pairs(VP, 256, 1)


# -- the space ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Straight(), VariancePreserving(), Exploding()], ids=lambda p: p.kind)
def test_children_are_sound_plans_of_the_same_number_of_calls_inside_the_path(path):
    space, rng = PlanSpace(path, 5), random.Random(0)
    made = list(space.seeds())
    for _ in range(300):
        made.append(space.mutate(space.cross(rng.choice(made), rng.choice(made), rng), rng))
    children = [plan for plan in made if space.sound(plan)]
    assert len(children) > 300
    assert len({space.write(plan) for plan in children}) > 250
    for plan in children:
        assert plan.nfe == 5
        assert plan.levels[0] is None
        assert max(lams(path, plan)) <= space.low + 0.005  # where a solver asks twice, it moves so much
        assert len(plan.times(path)) == 6
    assert len({len(space.features(plan)) for plan in children}) == 1
    seen = [step for plan in children[90:] for step in plan.steps]
    for field in ("order", "prediction", "variable", "corrector", "start", "relax"):
        assert len({getattr(step, field) for step in seen}) > 1, f"{field} is never changed"


def test_what_changes_nothing_has_one_name_and_gives_the_same_samples():
    """A polynomial through one guess has no variable, the last step no guess that corrects it."""
    one = StepPlan(order=3, prediction="eps", variable="rho", relax=2.0, corrector="exact")
    short = plainly(SolverPlan(levels=(0.0,), steps=(one,)))
    assert short.steps == (StepPlan(prediction="eps"),)
    rng = random.Random(0)
    for path in (VariancePreserving(), Straight()):
        law, x = mixture(path), draw(mixture(path), 2, path.t_max)
        space = PlanSpace(path, 4)
        for plan in rng.sample(list(fixed_samplers(path, 4).values()), 20):
            odd = space.mutate(plan, rng)
            steps = tuple(step.model_copy(update={"order": rng.randrange(1, 5)}) for step in odd.steps)
            loud = odd.model_copy(update={"steps": steps})
            assert torch.allclose(sample(law, x, plainly(loud)), sample(law, x, loud), atol=1e-9)


def test_levels_that_stand_together_are_no_candidate():
    path = VariancePreserving()
    steps = (StepPlan(), StepPlan(), StepPlan())
    assert not PlanSpace(path, 3).sound(SolverPlan(levels=(None, 0.0, 0.0009), steps=steps))
    assert apart(path, SolverPlan(levels=(None, 0.0, 0.0011), steps=steps))
    assert not PlanSpace(path, 4).sound(SolverPlan(levels=(None, 0.0, 1.0), steps=steps))


def test_every_fixed_sampler_gives_its_own_samples_as_a_plan():
    law, x = VP, TRAIN.x[:4]
    plans = fixed_samplers(law.path, 4)
    assert {"recommended", "euler uniform", "dpm2m karras", "unipc3 logsnr", "dpm2s quadratic"} <= set(plans)
    assert not any("sde" in name or "ancestral" in name for name in plans)
    for name in ("euler uniform", "dpm2m karras", "unipc3 logsnr", "deis quadratic"):
        kind, spacing = name.split()
        there = sample(law, x, grid(law.path, 4, spacing), solver_named(kind))
        assert torch.allclose(sample(law, x, plans[name]), there, atol=1e-8), name


# -- evolution ------------------------------------------------------------------------------------


def searched(nfe, only_levels, budget):
    """(best fixed, best searched), root mean square on starts that the search has not seen."""
    rivals = fixed_samplers(VP.path, nfe)
    rivals.pop("recommended")
    if only_levels:
        ddim = tuple(StepPlan() for _ in range(nfe))
        rivals = {
            k: rivals[k].model_copy(update={"steps": ddim}) for k in ("euler uniform", "euler karras", "euler logsnr")
        }
    score, held = (Judge(VP, pairs, Distance(1.0), 256) for pairs in (TRAIN, FRESH))
    space = PlanSpace(VP.path, nfe, list(rivals.values()), only_levels=only_levels)
    found = evolve(space, score, Evolution(budget=budget, starts=256, first=64))
    return min(map(held, rivals.values())), held(found[0].genome)


def test_evolution_over_all_decisions_beats_every_named_sampler_by_a_fifth_on_fresh_starts():
    fixed, now = searched(4, only_levels=False, budget=200)
    assert now < 0.8 * fixed


def test_evolution_over_times_alone_under_ddim_beats_the_best_of_three_grids_by_15_percent():
    fixed, now = searched(5, only_levels=True, budget=150)
    assert now < 0.85 * fixed


# -- the fit by gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Straight(), VariancePreserving(), Exploding()], ids=lambda p: p.kind)
def test_the_differentiable_sampler_is_the_sampler_of_its_plan(path):
    law, plan = mixture(path), recommended(path, 5)
    free = Free(path, plan)
    free.shares += 0.03 * torch.randn(len(free.shares), generator=seeded(1), dtype=torch.float64)
    free.levels += 0.05 * torch.randn(len(free.levels), generator=seeded(2), dtype=torch.float64)
    x = draw(law, 8, path.t_max)
    for timed in (True, False):
        assert torch.allclose(free.run(law, x, None, timed), sample(law, x, free.plan()), atol=1e-10)


def test_its_gradient_is_the_difference_quotient():
    """Also where autograd does not know the network's rate in time, and a central difference stands for it."""
    path = VariancePreserving()
    law, free = mixture(path), Free(path, recommended(path, 4))
    x = draw(law, 16, path.t_max)

    def loss(timed):
        return free.run(law, x, None, timed).square().mean()

    for timed, close in ((True, 1e-5), (False, 2e-3)):
        for values in free.parameters:
            values.requires_grad_()
        gradients = torch.autograd.grad(loss(timed), free.parameters)
        for values, gradient in zip(free.parameters, gradients, strict=True):
            values.requires_grad_(False)
            for k in (0, len(values) - 1):
                values[k] += 1e-6
                above = loss(True).item()
                values[k] -= 2e-6
                below = loss(True).item()
                values[k] += 1e-6
                assert gradient[k].item() == pytest.approx((above - below) / 2e-6, rel=close, abs=1e-6)


class Opaque(Denoiser):
    """A network whose time is a plain number, so that autograd does not see it."""

    def __init__(self, inner, blind=False):
        super().__init__()
        self.inner, self.path, self.blind = inner, inner.path, blind

    def forward(self, x, t, cond=None, want="x0", s=None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.blind):
            return self.inner(x, float(t), cond, want)


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_it_is_seen_how_far_gradients_flow():
    path = VP.path
    assert differentiable(VP, path, TRAIN) == (True, True)
    assert differentiable(Opaque(VP), path, TRAIN) == (True, False)
    assert differentiable(Opaque(VP, blind=True), path, TRAIN) == (False, False)
    with pytest.raises(ValueError, match="no gradient flows"):
        fit(Opaque(VP, blind=True), recommended(path, 3), TRAIN, FRESH)


@pytest.mark.parametrize("model", [VP, Opaque(VP)], ids=["autograd", "difference"])
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_a_fit_halves_the_error_on_fresh_starts_and_stays_a_plan(model):
    start = recommended(VP.path, 4)
    plan, least = fit(model, start, TRAIN, TRAIN, Fitting(steps=80, batch=128, rate=0.03))
    assert error(VP, plan, FRESH) < error(VP, start, FRESH) / 4
    assert error(VP, plan, TRAIN) == pytest.approx(least)
    assert SolverPlan.model_validate_json(plan.model_dump_json()) == plan
    assert all(p.requires_grad for p in model.parameters())


def test_a_fit_that_finds_nothing_gives_back_what_it_began_with():
    start = recommended(VP.path, 3)
    best, _ = fit(VP, start, TRAIN, FRESH, Fitting(steps=60, rate=0.03))
    again, _ = fit(VP, best, TRAIN, FRESH, Fitting(steps=2, rate=3.0, every=1))
    assert error(VP, again, FRESH) <= error(VP, best, FRESH) + 1e-12


def test_levels_stay_inside_the_path_whatever_the_gradient_asks():
    path = VariancePreserving()
    for step in (5.0, -5.0):
        free = Free(path, recommended(path, 5))
        free.levels += step
        free.hold()
        found = lams(path, free.plan())
        assert max(found) <= float(path.lam(path.t_low)) + 1e-9
        assert apart(path, free.plan())


# -- Bayesian search and CMA-ES -------------------------------------------------------------------


def test_no_move_is_the_plan_itself_and_every_move_is_a_sound_plan():
    path = VariancePreserving()
    plan = recommended(path, 5)
    moves = Moves(path, plan)
    assert moves.plan([0.0] * moves.count) == plan
    for seed in range(20):
        numbers = (2 * torch.randn(moves.count, generator=seeded(seed))).clamp(-2, 2).tolist()
        made = moves.plan(numbers)
        assert PlanSpace(path, 5, [plan]).sound(made)
        assert made.steps[2].relax == pytest.approx(math.exp(numbers[6] / 4))


@pytest.mark.parametrize("by", ["tpe", "cma"])
def test_bayes_and_cma_find_better_plans_and_the_same_ones_again(by, tmp_path):
    pytest.importorskip("optuna" if by == "tpe" else "cma")
    start = fixed_samplers(VP.path, 4)["euler logsnr"]
    score = Judge(VP, TRAIN.rows(slice(0, 64)), Distance(1.0), 64)
    one = tune(VP.path, start, score, 60, by=by)
    assert one[0].score < 0.9 * score(start)
    journal = Journal(tmp_path / "state.jsonl", {})

    class Killed(Exception):
        pass

    def until(plan):
        if journal.asked > 25:
            raise Killed
        return score(plan)

    with pytest.raises(Killed):
        tune(VP.path, start, until, 60, by=by, journal=journal)
    assert tune(VP.path, start, score, 60, by=by, journal=Journal(tmp_path / "state.jsonl", {})) == one


# -- objectives -----------------------------------------------------------------------------------


def test_every_batch_size_and_every_number_of_threads_gives_one_score():
    plan, before = recommended(VP.path, 4), torch.get_num_threads()
    one = Judge(VP, TRAIN, Distance(2.0), 256)(plan)
    try:
        torch.set_num_threads(2)
        assert Judge(VP, TRAIN, Distance(2.0), 50)(plan) == pytest.approx(one, rel=1e-12)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    away = (ends(VP, plan, TRAIN) - TRAIN.ends).square().mean().sqrt().item()
    assert one == pytest.approx(away / 2)


def test_the_frechet_distance_of_the_reference_to_itself_is_none_and_of_a_shift_its_square():
    score = FrechetTo(lambda x: x.double(), TRAIN.ends)
    assert score(TRAIN.ends, TRAIN) == pytest.approx(0, abs=1e-9)
    assert score(TRAIN.ends + 2.0, TRAIN) == pytest.approx(8.0)  # two coordinates
    assert score(TRAIN.ends * math.nan, TRAIN) == math.inf


def test_real_data_is_a_judge_that_knows_where_the_fine_solution_errs():
    """A teacher that is off by 1 in each coordinate: its fine solution is 2 from the data, the corrected samples 0.
    What finishes samples is not done to the data, and to the fine solution itself the corrected ones are far."""
    data = TRAIN.ends
    pairs = Pairs(TRAIN.x, None, data + 1)
    real = FrechetTo(lambda x: x.double(), data, finish=lambda x: x / 3)
    assert real(3 * pairs.ends, pairs) == pytest.approx(2.0)
    assert real(3 * data, pairs) == pytest.approx(0.0, abs=1e-9)
    assert FrechetTo(lambda x: x.double(), pairs.ends)(data, pairs) == pytest.approx(2.0)
    assert real.law and not Distance(1.0).law


def test_a_plan_that_is_judged_on_more_starts_is_asked_for_the_rest_alone():
    counted = Counted(VP)
    judge = Judge(counted, TRAIN, Distance(1.0), 64)
    plan, other = recommended(VP.path, 3), recommended(VP.path, 4)
    judge(plan, 128)
    assert judge(plan) == Judge(VP, TRAIN, Distance(1.0), 64)(plan)
    assert counted.images == 3 * 256
    judge(other, 100)  # no whole batches: what is known of them is of no use
    assert judge(other) == Judge(VP, TRAIN, Distance(1.0), 64)(other)
    assert counted.images == 3 * 256 + 4 * 356
    assert judge(plan, 64) == Judge(VP, TRAIN, Distance(1.0), 64)(plan, 64)


def test_a_scorer_of_ones_own_sees_finished_samples_and_their_condition():
    pairs = Pairs(TRAIN.x, torch.arange(256), TRAIN.ends)
    scorer = Scorer(lambda x, cond: x[:, 0] + cond, "mine", lambda x: x.clamp(0, 0))
    assert scorer(pairs.ends, pairs) == pytest.approx(127.5)
    with pytest.raises(ValueError, match=r"mine gave shape \[3\]"):
        Scorer(lambda x, cond: torch.zeros(3), "mine", lambda x: x)(pairs.ends, pairs)


def test_the_distance_of_features_is_none_at_the_ends_and_grows_away_from_them_with_a_gradient():
    from fewstep.interop import load_teacher

    teacher = load_teacher("digits").denoiser.requires_grad_(False)
    teacher.taps = ("mid_block.resnets.0", "mid_block.resnets.1")
    rng = seeded(0)
    pairs = Pairs(
        torch.randn(70, 1, 8, 8, generator=rng), torch.arange(70) % 10, torch.rand(70, 1, 8, 8, generator=rng)
    )
    score = FeatureDistance(teacher, pairs)
    assert score(pairs.ends, pairs) == 0
    noise = torch.randn(70, 1, 8, 8, generator=rng)
    near, far = (score(pairs.ends + 0.1 * k * noise, score.marked(pairs)) for k in (1, 4))
    assert 0 < near < far
    assert near == pytest.approx(score(pairs.ends + 0.1 * noise, pairs), rel=1e-6)  # marked or not
    with torch.no_grad():
        there = teacher(pairs.ends, score.t, pairs.cond, "features")  # this path keeps the signal whole
        here = teacher(pairs.ends.roll(10, 0), score.t, pairs.cond, "features")
    parts = [float((a - b).square().mean() / b.flatten(1).var(0).mean()) for a, b in zip(here, there, strict=True)]
    assert score(pairs.ends.roll(10, 0), pairs) == pytest.approx(math.sqrt(sum(parts) / 2), rel=1e-4)
    x = (pairs.ends + noise).requires_grad_()
    assert torch.autograd.grad(score.squares(x, pairs).sum(), x)[0].abs().amax((1, 2, 3)).min() > 0
    teacher.taps = ()
    with pytest.raises(ValueError, match="no taps"):
        FeatureDistance(teacher, pairs)


# -- the whole contest ----------------------------------------------------------------------------

SHORT = {"evolution": Evolution(budget=100, first=64), "fitting": Fitting(steps=40, batch=64), "batch": 256}


def test_the_contest_ends_with_a_plan_that_beats_every_fixed_sampler_on_unseen_starts():
    held = exact_pairs(VP, 256, 2)
    heard = []
    found = contest(
        4,
        Contest(VP, TRAIN, FRESH, held, Distance(1.0), **SHORT),
        tell=lambda stage, done, total, best: heard.append((stage, done, total)),
    )
    assert found.gain > 1.2
    assert found.score == pytest.approx(Judge(VP, held, Distance(1.0), 256)(found.plan))
    assert found.fixed == dict(sorted(found.fixed.items(), key=lambda item: item[1]))
    assert set(found.fixed) == set(fixed_samplers(VP.path, 4))
    assert [stage for stage, done, total in heard if done == total] == ["evolution", "gradient", "unseen starts"]


def test_laws_are_compared_by_evolution_alone_from_the_recommended_levels_under_other_rules():
    """A fit makes the distance sample by sample small, and blurs; evolution is given more to begin with instead."""
    heard, held = [], exact_pairs(VP, 256, 2)
    found = contest(
        4,
        Contest(VP, TRAIN, FRESH, held, FrechetTo(lambda x: x.double(), held.ends), **SHORT),
        tell=lambda stage, done, total, best: heard.append(stage),
    )
    assert set(heard) == {"evolution", "unseen starts"}
    assert found.gain >= 1
    others = variants(VP.path, 4)
    texts = {plan.model_dump_json() for plan in (*others, *map(plainly, fixed_samplers(VP.path, 4).values()))}
    assert len(texts) == len(others) + len({plainly(p).model_dump_json() for p in fixed_samplers(VP.path, 4).values()})
    assert {plan.levels for plan in others} == {recommended(VP.path, 4).levels}
    space = PlanSpace(VP.path, 4, others)
    assert all(space.sound(plan) for plan in space.seeds())


class Contrary(Objective):
    """An objective that likes on the held-out starts what it dislikes elsewhere."""

    name = "contrary"

    def __init__(self, held):
        self.held = held

    def __call__(self, samples, pairs):
        away = float((samples - pairs.ends).square().mean())
        return away if pairs.x is self.held.x else 1 / (1e-9 + away)


def test_a_plan_that_is_worse_on_unseen_starts_is_not_given_out():
    held = exact_pairs(VP, 64, 2)
    few = Contest(
        VP, TRAIN.rows(slice(0, 32)), FRESH.rows(slice(0, 32)), held, Contrary(held), how="evolution", **SHORT
    )
    found = contest(3, few)
    assert found.how == "fixed"
    assert found.gain == 1
    assert found.plan == fixed_samplers(VP.path, 3)[found.best_fixed]


class ContraryLaw(Contrary):
    law = True


def test_of_a_noisy_distance_a_fixed_sampler_has_to_be_better_on_two_sets_of_starts():
    held = exact_pairs(VP, 64, 2)
    few = Contest(
        VP, TRAIN.rows(slice(0, 32)), FRESH.rows(slice(0, 32)), held, ContraryLaw(held), how="evolution", **SHORT
    )
    found = contest(3, few)  # on the held-out starts everything is the other way round, on the validation starts not
    assert found.how == "evolution" and found.gain < 1


@pytest.mark.slow
def test_a_contest_killed_at_any_moment_ends_with_the_very_same_plan(tmp_path):
    def options(model=VP):
        return Contest(
            model, TRAIN.rows(slice(0, 64)), FRESH.rows(slice(0, 32)), FRESH.rows(slice(32, 64)), Distance(1.0), **SHORT
        )

    whole, kills = contest(3, options()), 0
    for turn in range(1, 30):
        journal = Journal(tmp_path / "state.jsonl", {"nfe": 3})
        ask = journal.answer

        def killed(question, work, ask=ask, journal=journal, turn=turn):
            if journal.asked == 23 * turn:
                raise KeyboardInterrupt
            return ask(question, work)

        journal.answer = killed
        try:
            found = contest(3, options(), journal=journal)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 2
    assert found == whole


def test_a_contest_of_no_calls_or_without_starts_is_refused():
    with pytest.raises(ValueError, match="at least 1 call, got 0"):
        contest(0, Contest(VP, TRAIN, FRESH, FRESH, Distance(1.0)))
    with pytest.raises(ValueError, match="each at least one"):
        contest(2, Contest(VP, TRAIN, FRESH.rows(slice(0, 0)), FRESH, Distance(1.0)))
