import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small import FAST, PATH, Heard, flawed, memory, mixture, row, teacher

from fewstep.denoiser import Counted, Denoiser, Guided
from fewstep.errors import Failed, Refused
from fewstep.evaluate import Protocol, compare, evaluate
from fewstep.evaluate.measure import matched_rows, shown_rows, spread_rows
from fewstep.evaluate.rows import Row, with_excess
from fewstep.evaluate.sampling import counted
from fewstep.evaluate.stage import model_hash
from fewstep.metrics.features import features_for
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks import task_named


@pytest.fixture(scope="module")
def task():
    return mixture()


@pytest.fixture(scope="module")
def report(task):
    return evaluate(flawed(task), teacher(task), task, FAST)


# -- which rows there are ---------------------------------------------------------------------


def test_there_is_one_full_teacher_one_best_sampler_a_call_count_and_one_floor(report):
    models = [r.model for r in report.rows]
    assert models.count("teacher") == models.count("student") == models.count("real") == 1
    assert row(report, "teacher").nfe == 9
    assert [r.nfe for r in report.rows if r.model.startswith("teacher:")] == [1, 2, 3]


def test_every_sampler_was_tried_and_the_best_of_each_call_count_was_chosen(report):
    tried = report.scores.scout
    assert {(s.solver, s.nfe) for s in tried} == {
        *(("euler", n) for n in (1, 2, 3)), *(("dpm2m", n) for n in (1, 2, 3)), ("heun", 1), ("heun", 3),
    }  # fmt: skip
    for nfe in (1, 2, 3):
        here = [s for s in tried if s.nfe == nfe]
        (chosen,) = [s for s in here if s.chosen]
        assert chosen.frechet <= min(s.frechet for s in here) * (1 + 1e-5)
        assert row(report, f"teacher:{chosen.solver}", nfe)


def test_a_student_has_a_row_for_each_step_count_that_it_serves(task):
    student = Student(teacher(task), task.shape, steps={1: (20.0,), 2: (20.0, 1.0)})
    found = evaluate(student, None, task, FAST)
    assert [(r.nfe, r.calls) for r in found.rows if r.student] == [(1, 1), (2, 2)]
    assert [r.excess for r in found.rows] == [None] * 3


def test_without_a_student_the_teacher_and_the_floor_remain(task):
    found = evaluate(None, teacher(task), task, FAST)
    assert {r.model.split(":")[0] for r in found.rows} == {"teacher", "real"}
    assert found.as_dict()["verdict"]["grade"] == "unknown"


# -- honesty ----------------------------------------------------------------------------------


def test_every_row_sees_the_same_noise_and_the_labels_of_the_test_split(task):
    heard, student = Heard(teacher(task)), Heard(teacher(task))
    evaluate(Student(student, task.shape), heard, task, FAST.model_copy(update={"timing_rounds": 0}))
    size, draws = len(task.test), FAST.noise_seeds
    mine = torch.cat([x for x, _ in student.first])
    assert mine.shape[0] == draws * size
    assert torch.equal(torch.cat([c for _, c in student.first]), task.test.cond.repeat(draws))
    theirs = torch.cat([x for x, _ in heard.first])
    runs = theirs.split(size)
    reported = runs[-4 * draws :]  # the full sampler and one for each of three call counts, after the scouting
    for i in range(4):
        assert torch.allclose(torch.cat(reported[i * draws : (i + 1) * draws]), mine, atol=1e-6)
    scouted = torch.cat(runs[: -4 * draws])
    assert torch.cdist(scouted, mine).min() > 0
    assert len(mine.unique(dim=0)) == draws * size


def test_calls_are_those_that_happened(report):
    for r in report.rows:
        assert r.calls == r.nfe


def test_guidance_is_seen_to_cost_twice(task):
    guided = Guided(teacher(task), 1.5, negative=lambda cond: torch.full_like(cond, 2))
    found = evaluate(None, guided, task, FAST)
    assert row(found, "teacher").nfe == 9
    assert row(found, "teacher").calls == 18


def test_counting_leaves_the_measured_model_as_it_was(task):
    guided = Guided(teacher(task), 2.0, negative=lambda cond: torch.full_like(cond, 2))
    student = Student(guided, task.shape)
    twin, counter = counted(student)
    noise, cond = torch.randn(4, 2), task.test.cond[:4]
    assert torch.equal(twin.generate(noise, cond), student.generate(noise, cond))
    assert counter.images == 8
    assert student.denoiser is guided
    assert not any(isinstance(m, Counted) for m in student.modules())


def test_excess_is_the_distance_above_the_floor_in_units_of_the_best_few_step_teacher(report):
    floor = row(report, "real").frechet
    best = min(r.frechet for r in report.rows if r.teacher and r.nfe <= 8)
    for r in report.rows:
        assert r.excess == pytest.approx((r.frechet - floor) / (best - floor), rel=1e-9)
    assert min(r.excess for r in report.rows if r.teacher and r.nfe <= 8) == 1
    assert row(report, "real").excess == 0


def test_the_slow_full_teacher_is_not_the_bar():
    def made(model, nfe, frechet):
        return Row(model=model, nfe=nfe, frechet=frechet, count=9)

    rows = [made("teacher", 35, 1.5), made("teacher:euler", 8, 3.0), made("student", 1, 2.0), made("real", 0, 1.0)]
    assert [r.excess for r in with_excess(rows)] == [0.25, 1.0, 0.5, 0.0]
    short = [made("teacher", 7, 1.5), *rows[1:]]
    assert [r.excess for r in with_excess(short)] == [1.0, 4.0, 2.0, 0.0]


def test_there_is_no_excess_where_the_teacher_is_at_the_floor():
    rows = [Row(model=m, nfe=1, frechet=f, count=9) for m, f in (("teacher", 1.0), ("student", 2.0), ("real", 1.0))]
    assert [r.excess for r in with_excess(rows)] == [None] * 3


def test_the_floor_and_the_teacher_do_not_depend_on_the_student(task, report):
    other = evaluate(flawed(task, 1.0), teacher(task), task, FAST)
    for model in ("teacher", "real"):
        mine, theirs = row(report, model), row(other, model)
        assert mine.model_copy(update={"samples_per_s": None}) == theirs.model_copy(update={"samples_per_s": None})
    assert row(other, "student").frechet > row(report, "student").frechet + 1


def test_an_exact_student_is_as_far_from_real_data_as_real_data(task):
    protocol = FAST.model_copy(update={"noise_seeds": 12, "timing_rounds": 0})
    found = evaluate(flawed(task), None, task, protocol)
    student, floor = row(found, "student"), row(found, "real")
    assert abs(student.frechet - floor.frechet) < 4 * math.hypot(student.frechet_spread, floor.frechet_spread) / 12**0.5
    assert student.exact["sliced_w2"] < 0.1
    assert student.accuracy == 1


def test_a_shifted_student_is_found_out_by_the_square_of_its_shift(task):
    found = evaluate(flawed(task, 0.5), None, task, FAST)
    assert row(found, "student").frechet - row(found, "real").frechet == pytest.approx(2 * 0.5**2, rel=0.3)


def test_a_memorising_teacher_is_seen_to_copy_and_the_floor_is_not():
    task = mixture(dimension=6, std=1.0)
    found = evaluate(None, memory(task), task, FAST.model_copy(update={"full_nfe": 21}))
    assert row(found, "teacher").copied > 0.9
    assert row(found, "real").copied == pytest.approx(0.05, abs=0.01)


def test_samples_that_are_not_finite_stop_the_evaluation_in_one_line(task):
    class Broken(Denoiser):
        def __init__(self):
            super().__init__()
            self.path = PATH

        def forward(self, x, t, cond=None, want="x0", s=None):
            return torch.where(torch.arange(len(x))[:, None] == 3, math.inf, x)

    with pytest.raises(Failed, match=r"Student, 1 call: 9 of 360 samples are not finite"):
        evaluate(Student(Broken(), task.shape), None, task, FAST)


def test_a_network_that_was_training_goes_on_training(task):
    student = flawed(task).train()
    seen = []
    student.register_forward_hook(lambda module, *_: seen.append(module.training))
    evaluate(student, None, task, FAST)
    assert student.training
    assert not any(seen)


# -- the same figures, whatever the machine ---------------------------------------------------


def test_the_same_seed_gives_the_same_figures_on_two_threads(task):
    def figures():
        student = Student(
            teacher(task), task.shape, steps={2: (20.0, 1.0)}, start=20.0, policy="renoise"
        )  # draws noise of its own
        return [r.model_dump(exclude={"samples_per_s"}) for r in evaluate(student, None, task, FAST).rows]

    alone = figures()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = figures()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone, together, strict=True):
        assert one["frechet"] == pytest.approx(other["frechet"], rel=1e-4)
        assert one["calls"] == other["calls"]


def test_another_seed_gives_other_noise(task, report):
    assert row(evaluate(flawed(task), None, task, FAST, seed=1), "student").frechet != row(report, "student").frechet


def test_a_teachers_figures_are_kept_under_all_that_they_depend_on(task, tmp_path):
    quiet = FAST.model_copy(update={"timing_rounds": 0})
    first = evaluate(flawed(task), teacher(task), task, quiet, cache=tmp_path)
    again = evaluate(flawed(task), teacher(task), task, quiet, cache=tmp_path)
    assert again.rows == first.rows
    assert again.scores.scout == first.scores.scout
    assert len(list(tmp_path.glob("teacher-*.json"))) == 1
    evaluate(flawed(task), teacher(task), task, quiet.model_copy(update={"noise_seeds": 2}), cache=tmp_path)
    evaluate(flawed(task), memory(task), task, quiet, cache=tmp_path)
    evaluate(flawed(task), teacher(task), task, quiet, cache=tmp_path, seed=5)
    assert len(list(tmp_path.glob("teacher-*.json"))) == 4


def test_the_cache_saves_the_teachers_calls(task, tmp_path):
    quiet = FAST.model_copy(update={"timing_rounds": 0})
    calls = []
    for _ in range(2):
        heard = Heard(teacher(task))
        evaluate(None, heard, task, quiet, cache=tmp_path)
        calls.append(heard.calls)
    assert calls[1] < calls[0] / 10  # what is left draws the pictures


def test_a_damaged_cache_is_measured_again(task, tmp_path):
    quiet = FAST.model_copy(update={"timing_rounds": 0})
    first = evaluate(None, teacher(task), task, quiet, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"rows": [{"model": 3}]}')
    assert evaluate(None, teacher(task), task, quiet, cache=tmp_path).rows == first.rows


def test_a_models_hash_knows_its_weights_and_its_path(task):
    law = teacher(task)
    assert model_hash(law) == model_hash(teacher(mixture()))
    assert model_hash(law) != model_hash(task.law)
    assert model_hash(law) != model_hash(teacher(mixture(std=0.2)))
    assert model_hash(Student(law, (2,))) != model_hash(Student(law, (2,), start=10.0))


# -- several students, other requests ---------------------------------------------------------


def test_compared_students_stand_in_one_table_and_score_as_they_do_alone(task, report):
    found = compare({"exact": flawed(task), "off": flawed(task, 1.0)}, teacher(task), task, FAST)
    assert row(found, "student:exact").frechet == row(report, "student").frechet
    assert row(found, "student:exact").excess < row(found, "student:off").excess
    assert len([r for r in found.rows if r.model == "teacher"]) == 1


def test_real_data_of_equal_count_and_labels_makes_the_floor():
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 5)
    wanted = torch.tensor([0] * 6 + [1] * 3 + [2] * 1)
    pick = matched_rows(labels, wanted, 105, 10, Rng(0))
    assert len(pick.unique()) == 10
    assert torch.bincount(labels[pick]).tolist() == [6, 3, 1]
    assert not torch.equal(pick, matched_rows(labels, wanted, 105, 10, Rng(1)))


def test_a_part_of_the_test_split_has_its_labels_in_proportion():
    labels = torch.arange(100) % 5
    pick = spread_rows(labels, 100, 20, Rng(0))
    assert torch.bincount(labels[pick]).tolist() == [4] * 5
    assert len(pick.unique()) == 20


def test_with_few_classes_each_column_of_pictures_is_one():
    labels = torch.arange(40) % 4
    assert (labels[shown_rows(labels, 4, 40)].reshape(-1, 4) == torch.arange(4)).all()
    assert shown_rows(None, None, 7).tolist() == list(range(7))


def test_a_count_above_the_test_split_is_refused(task):
    with pytest.raises(Refused, match="count = 500 but the test split has 120"):
        evaluate(flawed(task), None, task, Protocol(count=500))


def test_a_full_sampler_that_cannot_take_so_many_calls_is_refused(task):
    with pytest.raises(Refused, match="heun cannot take exactly 34 calls: pass 33 or 35"):
        evaluate(None, teacher(task), task, FAST.model_copy(update={"full_nfe": 34}))


def test_nothing_to_evaluate_is_refused(task):
    with pytest.raises(Refused, match="pass a student"):
        evaluate(None, None, task)
    with pytest.raises(Refused, match="at least one student"):
        compare({}, None, task)


def test_progress_ends_at_what_was_announced(task):
    class Ears:
        def __init__(self):
            self.totals, self.done = {}, {}

        def start(self, label, total):
            self.totals[label] = total

        def advance(self, label, done, note=""):
            assert done >= self.done.get(label, 0)
            self.done[label] = done

        def say(self, line): ...

        def finish(self, label): ...

    ears = Ears()
    evaluate(flawed(task), teacher(task), task, FAST, watch=ears)
    assert set(ears.totals) == {"evaluate", "timing"}
    assert ears.done == ears.totals


def test_digits_are_measured_by_the_shipped_classifier_and_drawn(tmp_path):
    task = task_named("digits")
    protocol = Protocol(noise_seeds=1, scout_seeds=1, detail_seeds=1, nfes=(2,), full_nfe=9, timing_rounds=0, count=200)
    found = evaluate(Student(memory(task), task.shape), memory(task), task, protocol, features_for(task))
    assert found.scores.features["test_accuracy"] >= 0.99
    assert row(found, "teacher").copied > 0.9
    assert row(found, "student").recall < 0.2
    assert row(found, "real").accuracy > 0.97
    found.save(tmp_path)
    assert {"student_1.png", "teacher_full.png", "teacher_best.png", "real.png", "nearest.png"} == {
        f.name for f in (tmp_path / "samples").iterdir()
    }
    from PIL import Image

    picture = Image.open(tmp_path / "samples" / "student_1.png")
    assert picture.info["Software"] == "fewstep"
    assert picture.info["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert "DigitalSourceType" not in Image.open(tmp_path / "samples" / "real.png").info
