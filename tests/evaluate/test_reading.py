"""Labels that are read are scored: with networks that know, and networks that are wrong in one known way."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small import FAST

from fewstep.denoiser import Denoiser
from fewstep.evaluate import evaluate, read_scores, table, write_report
from fewstep.evaluate.reading import iou, readings
from fewstep.joint import Joint, label_map
from fewstep.path import Straight
from fewstep.tasks import task_named

OPTIONS = {"modes": 3, "classes": 3, "std": 0.1, "test_count": 120, "train_count": 300}


@pytest.fixture(scope="module")
def task():
    return task_named("labelled", {"of": "mixture", "options": OPTIONS, "width": 0.2})


class Knows(Denoiser):
    """The velocity of pairs whose picture tells the label: towards its mode down in time, towards its label up."""

    def __init__(self, law, joint, sign=1.0, turned=False, still=False):
        super().__init__()
        self.law, self.joint, self.path = law, joint, Straight()
        self.sign, self.turned, self.still = sign, turned, still

    def forward(self, x, t, cond=None, want="x0", s=None):
        t = float(t)
        picture, label = x[:, :2], x[:, 2:]
        told = torch.cdist(label, self.joint.book).argmin(1)
        down = 0 * picture if self.still else (picture - self.law.mean.float()[told]) / max(t, 0.2)
        late = 1 - t if self.turned else t  # turned: the label's branch sees the other time
        known = torch.cdist(picture, self.law.mean.float()).argmin(1) if late < 0.8 else told
        up = (self.joint.book[known] - label) / max(1 - late, 0.2)
        flow = torch.cat([down, self.sign * up], 1)
        return self.path.convert(flow, x, max(t, 1e-9), "flow", want)


def of(task, **how):
    return readings(Knows(task.pixels.law, task.joint, still=True, **how), task, task.test.data, task.test.cond, 0)[0]


def test_a_network_that_knows_reads_all_labels_and_one_with_a_wrong_sign_or_clock_none(task):
    assert all(one.accuracy == 1 and one.what == "labels" and one.iou is None for one in of(task))
    assert [(one.steps, one.draws, one.calls) for one in of(task)] == [(1, 1, 1), (1, 4, 4), (8, 4, 32)]
    backwards, turned = of(task, sign=-1.0), of(task, turned=True)
    for wrong in (backwards, turned):  # chance is a third; noises of their own keep it from being less
        assert wrong[0].accuracy < 0.55 and wrong[0].accuracy_spread == pytest.approx(0.045, abs=0.02)


def test_more_noises_are_steadier_where_a_network_passes_its_noise_on(task):
    class Loud(Knows):
        """Leaves the noise in."""

        def forward(self, x, t, cond=None, want="x0", s=None):
            flow = super().forward(x, t, cond, "flow", s)
            known = torch.cdist(x[:, :2], self.law.mean.float()).argmin(1)
            flow[:, 2:] = self.joint.book[known]
            return self.path.convert(flow, x, max(float(t), 1e-9), "flow", want)

    one, four, _ = readings(Loud(task.pixels.law, task.joint), task, task.test.data, task.test.cond, 0)[0]
    assert one.accuracy < four.accuracy - 0.05


def test_the_report_holds_generation_by_label_and_reading(task, tmp_path):
    network = Knows(task.pixels.law, task.joint)
    made = evaluate(None, network, task, FAST, train=task.train)
    full = next(r for r in made.rows if r.model == "teacher")
    assert full.accuracy > 0.95 and full.count == 120  # the labels of the test split were asked for
    assert [one.accuracy for one in made.scores.readings[:2]] == [1.0, 1.0]
    made.save(tmp_path)
    assert read_scores(tmp_path / "scores.json").readings == made.scores.readings
    page = write_report(tmp_path).read_text()
    assert "<h2>Reading</h2>" in page
    kept = json.loads((tmp_path / "report" / "report.json").read_text())
    assert kept["readings"][1]["draws"] == 4 and kept["readings"][1]["accuracy"] == 1.0
    for text in (table(made), table(kept)):
        assert text.splitlines()[-2] == "Labels read in 1 step from the mean of 4 label noises: 100.0% right."
    assert kept["verdict"]["points"][0] == "Labels read in 1 step from one label noise: 100.0% right."


def test_generation_is_given_the_labels_of_the_test_split(task):
    """Points lie at the mode of their label; where the start held other labels they would not."""
    from fewstep.evaluate.measure import Evaluation
    from fewstep.evaluate.sampling import full_teacher
    from fewstep.evaluate.stage import Quiet, measuring
    from fewstep.metrics.features import features_for

    network = Knows(task.pixels.law, task.joint)
    found = Evaluation(task, FAST, features_for(task.pixels), None, 0, Quiet())
    with measuring(network):
        x = found.stage.few(full_teacher(network, FAST), torch.arange(120))
    assert x.shape == (120, 2)
    mode = torch.cdist(x, task.pixels.law.mean.float()).argmin(1)
    assert torch.equal(mode, task.test.cond)


def test_overlap_is_counted_over_all_places_and_the_ground_does_not_count():
    truth = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [0, 2]]])
    assert iou(truth, truth, 3)[0] == 1
    told = torch.tensor([[[0, 1], [0, 2]], [[0, 0], [2, 2]]])
    assert iou(told, truth, 3)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert iou(torch.zeros_like(truth), truth, 3)[0] == 0
    assert iou(told, truth, 3)[1] > 0


def test_masks_are_scored_place_by_place_and_shown_beside_what_is_true(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    pictures = np.zeros((80, 8, 8), np.uint8)
    for picture in pictures:
        row = rng.integers(0, 6)
        picture[row : row + 2] = 255
    np.savez(tmp_path / "lines.npz", images=pictures)
    inner = {"path": str(tmp_path / "lines.npz"), "test_count": 30}
    task = task_named("labelled", {"of": "segments", "options": inner, "code": "level"})

    class Sees(Denoiser):
        """Knows the masks of the test pictures by heart; the first ``wrong`` rows of each it reads upside down."""

        path = Straight()

        def __init__(self, wrong=0):
            super().__init__()
            self.wrong = wrong

        def forward(self, x, t, cond=None, want="x0", s=None):
            split = task.test
            row = torch.cdist(x[:, :1].flatten(1), split.data.flatten(1)).argmin(1)
            mask = label_map(split.cond[row], task.joint.book, x[:, :1])
            mask[:, :, : self.wrong] *= -1
            flow = torch.cat([torch.zeros_like(x[:, :1]), (mask - x[:, 1:]) / (1 - min(float(t), 0.99))], 1)
            return self.path.convert(flow, x, max(float(t), 1e-9), "flow", want)

    split = task.test
    found, told = readings(Sees(), task, split.data, split.cond, 0)
    assert found[0].what == "masks" and found[0].iou == found[1].iou == found[0].accuracy == 1
    assert torch.equal(told, split.cond.long())
    worse, told = readings(Sees(wrong=2), task, split.data, split.cond, 0)
    assert worse[0].accuracy == pytest.approx(0.75)
    assert worse[0].iou == pytest.approx(iou(told, split.cond, 2)[0]) and worse[0].iou < 0.8
    made = evaluate(None, Sees(), task, FAST.model_copy(update={"nfes": (1,), "count": 20}), train=task.train)
    sheet = next(s for s in made.scores.sheets if s.kind == "reading")
    assert made.pictures[sheet.file].startswith(b"\x89PNG") and sheet.columns == 12
    assert "IoU 1.000" in table(made)


def test_a_joint_says_how_many_channels_its_label_has():
    assert Joint(picture=3, classes=7).channels == 7
    assert Joint(picture=3, classes=7, code="level").channels == 1
