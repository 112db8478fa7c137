import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from prompts import PATH, QUICK, Equal, Spoken, painter
from small import row

from fewstep.errors import Failed, Refused
from fewstep.evaluate import Protocol, evaluate_without_reference, judge
from fewstep.evaluate.noref import asked_of, lightened, shown_first
from fewstep.path import Straight
from fewstep.student import Student
from fewstep.tasks import Split
from fewstep.teachers import Gaussian


class Counts:
    """A scorer that gives every picture its mean brightness, and hears its words."""

    name, hash = "brightness", "0" * 64

    def __init__(self):
        self.heard = []

    def __call__(self, images, prompts):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.heard += prompts
        return images.double().flatten(1).mean(1)


@pytest.fixture(scope="module")
def scorer():
    return Counts()


@pytest.fixture(scope="module")
def equal(scorer):
    teacher = painter()
    return evaluate_without_reference(Equal(teacher, (3, 8, 8)), teacher, Spoken(), QUICK, scorer=scorer)


@pytest.fixture(scope="module")
def collapsed():
    teacher = painter()
    return evaluate_without_reference(Equal(teacher, (3, 8, 8), collapsed=True), teacher, Spoken(), QUICK)


# -- what mathematics gives exactly -------------------------------------------------------------


def test_a_student_equal_to_the_full_teacher_is_at_distance_nothing_and_on_the_floor(equal):
    student, floor = row(equal, "student"), row(equal, "itself")
    assert (student.rmse, student.feature_distance, student.ssim, student.psnr) == (0, 0, 1, 100)
    assert student.frechet == floor.frechet == row(equal, "teacher").frechet > 0
    assert (student.excess, floor.excess) == (0, 0)
    assert (student.diversity, student.saturation, student.high_frequency) == pytest.approx((1, 1, 1), abs=1e-12)
    assert student.adherence == row(equal, "teacher").adherence


def test_unrelated_pictures_of_one_prompt_are_one_unit_apart_and_few_steps_less(equal):
    assert row(equal, "itself").feature_distance == 1
    assert 0 < row(equal, "teacher:euler", 1).rmse < row(equal, "itself").rmse


def test_a_collapsed_student_has_no_variety_and_is_called_weak(collapsed):
    student = row(collapsed, "student")
    assert student.diversity == pytest.approx(0, abs=1e-6)
    assert student.recall < row(collapsed, "teacher").recall - 0.3
    verdict = judge(collapsed.scores)
    assert verdict.grade in ("fair", "weak")
    assert any(line.startswith("Lost variety: samples of one condition are only 0%") for line in verdict.warnings)


def test_the_distance_of_vectors_that_are_shifted_is_the_shift():
    law = Gaussian([2.0, -1.0], [0.5, 1.5], path=PATH)
    protocol = QUICK.model_copy(update={"count": 300, "noise_seeds": 4, "detail_seeds": 4})

    class Free(Spoken):
        value_range = None

        @property
        def train(self):
            return Split(torch.empty(0, 2), None)

        test = train

    shift = 0.5
    found = evaluate_without_reference(Equal(law, (2,), protocol, shift=shift), law, Free(("any",), (2,)), protocol)
    student, floor = row(found, "student"), row(found, "itself")
    assert student.rmse == pytest.approx(shift, rel=1e-4)
    assert (student.psnr, student.ssim, student.saturation) == (None, None, None)
    assert student.diversity == pytest.approx(1, rel=1e-5)
    # between Gaussians of one covariance the distance is the square of the means' difference; the floor's is 0 + noise
    assert student.frechet - floor.frechet == pytest.approx(2 * shift**2, rel=0.35)
    assert floor.frechet < 0.1
    assert "tiles" not in found.pictures and found.scores.tiles is None


# -- the same for all ---------------------------------------------------------------------------


def test_there_is_no_row_of_real_data_and_the_verdict_says_so(equal):
    assert [r.model for r in equal.rows] == ["teacher", "teacher:euler", "student", "itself"]
    assert "No real data was there" in judge(equal.scores).warnings[0]
    assert equal.scores.reference == "teacher"


def test_calls_are_counted(equal):
    assert [r.calls for r in equal.rows] == [10, 1, 10, 0]  # this student runs the full sampler, and cannot hide it


def test_every_picture_is_scored_for_its_own_prompt(equal, scorer):
    task = Spoken()
    words = asked_of(task, QUICK, None).words
    assert len(scorer.heard) % len(words) == 0
    assert tuple(scorer.heard[: len(words)]) == words
    assert words.count("a blue boat") == 8


def test_the_same_seed_gives_the_same_figures_and_another_one_does_not(equal):
    teacher = painter()
    student = Student(teacher, (3, 8, 8))
    one, two, other = (
        evaluate_without_reference(student, teacher, Spoken(), QUICK, seed=seed).rows for seed in (0, 0, 1)
    )
    assert one == two
    assert other[0].frechet != one[0].frechet


def test_the_cache_saves_the_teachers_calls_and_changes_no_figure(tmp_path):
    class Heard(type(painter())):
        calls = 0

        def forward(self, *args, **options):
            Heard.calls += 1
            return super().forward(*args, **options)

    teacher = painter()
    teacher.__class__ = Heard
    student = Equal(painter(), (3, 8, 8))
    first = evaluate_without_reference(student, teacher, Spoken(), QUICK, cache=tmp_path)
    before = Heard.calls
    again = evaluate_without_reference(student, teacher, Spoken(), QUICK, cache=tmp_path)
    assert again.rows == first.rows and again.pictures == first.pictures
    assert Heard.calls - before < before / 4  # what is left draws the best few steps' pictures
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert evaluate_without_reference(student, teacher, Spoken(), QUICK, cache=tmp_path).rows == first.rows


def test_pictures_are_decoded_before_they_are_compared():
    teacher = painter(shape=(2, 4, 4))
    seen = []

    def decode(z):
        seen.append(len(z))
        return torch.cat([z, z[:, :1]], 1).repeat_interleave(2, 2).repeat_interleave(2, 3)

    found = evaluate_without_reference(
        Equal(teacher, (2, 4, 4)), teacher, Spoken(shape=(2, 4, 4)), QUICK, decode=decode
    )
    assert seen and row(found, "student").ssim == 1
    assert found.scores.tiles is not None
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(next(iter(found.pictures.values()))))
    assert picture.size == (8, 8) and picture.mode == "RGB"
    # decoded blocks of 2x2 equal pixels have no fine detail, and a ratio to none is not given
    assert row(found, "student").high_frequency is None and row(found, "student").saturation == 1


# -- which conditions ---------------------------------------------------------------------------


def test_every_condition_has_two_samples_at_least_and_too_many_are_thinned_evenly():
    task = Spoken([f"prompt {i}" for i in range(100)])
    asked = asked_of(task, Protocol(count=40), None)
    assert torch.bincount(asked.labels).tolist() == [2] * 20
    assert asked.words[::2] == tuple(f"prompt {i}" for i in range(2, 100, 5))
    assert torch.equal(asked.cond, torch.arange(2, 100, 5).repeat_interleave(2))
    assert len(asked_of(Spoken(), Protocol(), None).labels) == 64


def test_pictures_show_every_condition_before_they_show_one_twice():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert shown_first(labels, 5).tolist() == [0, 3, 5, 1, 4]


def test_an_open_protocol_is_light_and_a_set_one_is_kept():
    straight = Gaussian([0.0], [1.0], path=Straight())
    assert lightened(Protocol(), straight).grid == "uniform"
    assert lightened(Protocol(), painter()).grid == "karras"
    assert lightened(Protocol(), painter()).noise_seeds == 4
    assert lightened(Protocol(noise_seeds=16, grid="trailing"), straight).noise_seeds == 16


# -- bad requests -------------------------------------------------------------------------------


def test_bad_requests_are_refused_in_one_line():
    teacher = painter()
    with pytest.raises(Refused, match="2 prompts but 3 conditions"):
        evaluate_without_reference(None, teacher, Spoken(), QUICK, prompts=["a", "b"])
    with pytest.raises(Refused, match="too few for 30 neighbours"):
        evaluate_without_reference(None, teacher, Spoken(), QUICK.model_copy(update={"neighbours": 30}))

    class Dumb(Spoken):
        def __init__(self):
            self.shape = (3, 8, 8)

        @property
        def train(self):
            return Split(torch.empty(0, *self.shape), torch.arange(3))

        test = train

    with pytest.raises(Refused, match="brightness needs pictures and prompts in words"):
        evaluate_without_reference(None, teacher, Dumb(), QUICK, scorer=Counts())


def test_samples_that_are_not_finite_stop_it():
    teacher = painter()
    with pytest.raises(Failed, match="Student, 1 call: 48 of 48 samples are not finite"):
        evaluate_without_reference(Equal(teacher, (3, 8, 8), shift=float("nan")), teacher, Spoken(), QUICK)


def test_a_teacher_alone_is_measured_against_itself():
    found = evaluate_without_reference(None, painter(), Spoken(), QUICK)
    assert {r.model.split(":")[0] for r in found.rows} == {"teacher", "itself"}
    assert found.as_dict()["verdict"]["grade"] == "unknown"
