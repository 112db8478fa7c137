import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.errors import Failed, Refused
from fewstep.metrics.features import (
    Classifier,
    ClassifierConfig,
    ClassifierFeatures,
    Coordinates,
    RandomConv,
    features_for,
    fingerprint,
    shifted,
    shipped_digits,
    train_classifier,
)
from fewstep.tasks import Split, Task, task_named

ASSETS = Path(__file__).parents[2] / "src" / "fewstep" / "assets"


class Stripes(Task):
    """Two labels: bright rows or bright columns, 6x6."""

    name = "stripes"
    shape = (1, 6, 6)
    value_range = (-1.0, 1.0)

    def __init__(self, count=64, labelled=True):
        self.classes = 2 if labelled else None
        rng = torch.Generator().manual_seed(5)
        label = torch.arange(count) % 2
        line = torch.randint(0, 6, (count,), generator=rng)
        data = -torch.ones(count, 1, 6, 6)
        for i in range(count):
            data[i, 0, line[i]] = 1.0
            if label[i]:
                data[i] = data[i].mT.clone()
        self.whole = Split(data + 0.1 * torch.randn(data.shape, generator=rng), label if labelled else None)

    @property
    def train(self):
        return self.whole

    @property
    def test(self):
        return self.whole


@pytest.fixture(scope="module")
def digits():
    return task_named("digits")


def test_the_shipped_digits_classifier_is_right_as_often_as_it_states(digits):
    features = shipped_digits()
    right = float((features.predict(digits.test.data) == digits.test.cond).double().mean())
    assert right == pytest.approx(features.notes["test_accuracy"], abs=2e-3)
    assert right >= 0.99
    assert f"{100 * features.notes['test_accuracy']:.1f} %" in (ASSETS / "README.md").read_text(encoding="utf-8")


def test_the_shipped_digits_classifier_is_small_and_saw_the_training_half_alone(digits):
    file = ASSETS / "digits_classifier.safetensors"
    assert file.stat().st_size < 2**20
    with safe_open(file, framework="pt") as archive:
        notes = json.loads(archive.metadata()["notes"])
    assert notes["train_hash"] == fingerprint(digits.train.data, digits.train.cond)
    assert notes["train_count"] == 898


def test_features_are_64_wide_in_float64_and_do_not_depend_on_the_batch(digits):
    features = features_for(digits)
    whole = features(digits.test.data[:600])
    assert whole.shape == (600, 64)
    assert whole.dtype == torch.float64
    assert torch.allclose(whole[550:], features(digits.test.data[550:600]), atol=1e-5)


def test_the_network_that_chooses_is_another_one():
    task = Stripes(count=16)
    measure, select = features_for(task), features_for(task, purpose="select")
    assert measure.hash != select.hash
    assert {k: v.shape for k, v in measure.net.state_dict().items()} != {
        k: v.shape for k, v in select.net.state_dict().items()
    }


def test_a_classifier_learns_and_is_the_same_from_the_same_seed():
    task = Stripes()
    nets = [train_classifier(task.train.data, task.train.cond, 2, epochs=12, seed=s) for s in (0, 0, 1)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float((nets[0](task.test.data).argmax(1) == task.test.cond).double().mean()) > 0.95


def test_training_a_classifier_leaves_the_global_generator_alone():
    task = Stripes()
    before = torch.random.get_rng_state()
    train_classifier(task.train.data, task.train.cond, 2, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_classifier_is_kept_by_the_hash_of_its_data(tmp_path):
    first = features_for(Stripes(), tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    written = files[0].stat().st_mtime_ns
    assert features_for(Stripes(), tmp_path).hash == first.hash
    assert files[0].stat().st_mtime_ns == written
    features_for(Stripes(count=66), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_network_in_the_cache_is_one_clear_line(tmp_path):
    features_for(Stripes(), tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(Failed, match="is not a measuring network") as caught:
        features_for(Stripes(), tmp_path)
    assert "\n" not in str(caught.value)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(Failed, match="delete it"):
        ClassifierFeatures.load(file)


def test_pictures_without_labels_are_seen_by_fixed_random_convolutions():
    task = Stripes(labelled=False)
    features = features_for(task)
    assert features.name == "random-conv"
    assert features.hash == RandomConv(task.shape).hash
    assert features.predict(task.test.data) is None
    both = features(task.test.data)
    assert both.shape == (64, 192)
    rows, columns = both[0::2], both[1::2]
    assert (rows.mean(0) - columns.mean(0)).norm() > 3 * (rows[0::2].mean(0) - rows[1::2].mean(0)).norm()


@pytest.mark.parametrize(("shape", "reduce"), [((1, 8, 8), 1), ((1, 28, 28), 2), ((3, 64, 48), 4), ((3, 200, 100), 4)])
@pytest.mark.parametrize("design", ["plain", "wide"])
def test_a_classifier_takes_pictures_of_any_size(shape, reduce, design):
    config = ClassifierConfig.of(shape, 5, design)
    assert config.reduce == reduce
    assert Classifier(config)(torch.zeros(2, *shape)).shape == (2, 5)


def test_blocks_of_pixels_in_channels_are_put_back_before_they_are_seen():
    picture = torch.randn(2, 1, 8, 8)
    moved = torch.nn.functional.pixel_unshuffle(picture, 2)
    plain, blocks = (ClassifierConfig.of(s, 3, patch=p) for s, p in (((1, 8, 8), 1), ((4, 4, 4), 2)))
    net, other = Classifier(plain), Classifier(blocks)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(picture), other(moved))


def test_a_shift_moves_by_at_most_one_pixel():
    picture = torch.zeros(200, 1, 5, 5)
    picture[:, :, 2, 2] = 1
    moved = shifted(picture, 1, 0.0, torch.Generator().manual_seed(0))
    assert (moved[:, :, 1:4, 1:4].sum((1, 2, 3)) == 1).all()
    assert len(moved.flatten(1).argmax(1).unique()) == 9


def test_a_vector_is_its_own_feature_and_a_law_its_own_classifier():
    task = task_named("mixture", {"modes": 4, "classes": 4, "test_count": 200})
    features = features_for(task)
    assert torch.equal(features(task.test.data), task.test.data.double())
    assert (features.predict(task.test.data) == task.test.cond).all()
    assert Coordinates().predict(task.test.data) is None


def test_labels_in_a_law_are_weighed_by_their_share():
    task = task_named(
        "mixture", {"dimension": 1, "modes": 2, "classes": 2, "radius": 0.5, "std": 1.0, "weights": (9, 1)}
    )
    features = features_for(task)
    edge = 2.1972 / 1.0  # where 9 N(x; -.5, 1) = N(x; .5, 1): x = log 9
    assert features.predict(torch.tensor([[edge - 0.01], [edge + 0.01]])).tolist() == [0, 1]


def test_an_unknown_purpose_is_refused():
    with pytest.raises(Refused, match="measure, select"):
        features_for(Stripes(), purpose="train")
