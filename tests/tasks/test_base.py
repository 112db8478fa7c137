import pytest
import torch

from fewstep.errors import Refused
from fewstep.registry import UnknownName
from fewstep.rng import Rng
from fewstep.tasks import Split, Task, epoch_rows, task_named
from fewstep.tasks.split import data_hash, stratified


class Tiny(Task):
    """Ten numbered samples."""

    shape, classes, value_range = (1, 2, 2), 3, (-1.0, 1.0)

    def __init__(self, shape=(1, 2, 2)):
        self.shape = shape
        self._train = Split(torch.arange(10.0).view(10, *[1] * len(shape)).expand(10, *shape), torch.arange(10) % 3)

    @property
    def train(self):
        return self._train

    @property
    def test(self):
        return self._train


def test_an_epoch_shows_every_row_once_even_when_batches_straddle_it():
    for size in (1, 3, 4, 10):
        seen = torch.cat([epoch_rows(10, size, 0, step) for step in range(60 // size)])
        for epoch in seen[: len(seen) // 10 * 10].view(-1, 10):
            assert sorted(epoch.tolist()) == list(range(10))


def test_a_batch_larger_than_the_data_goes_round():
    rows = epoch_rows(4, 10, 0, 0)
    assert sorted(rows[:4].tolist()) == sorted(rows[4:8].tolist()) == [0, 1, 2, 3]


def test_epochs_have_orders_of_their_own():
    orders = {tuple(epoch_rows(10, 10, 0, epoch).tolist()) for epoch in range(5)}
    assert len(orders) == 5


def test_a_batch_is_a_pure_function_of_seed_step_and_turn():
    task = Tiny()
    first, again = task.batch(4, 1, 7, 2), task.batch(4, 1, 7, 2)
    assert torch.equal(first.data, again.data)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.cond, again.cond)
    for other in (task.batch(4, 2, 7, 2), task.batch(4, 1, 8, 2), task.batch(4, 1, 7, 3)):
        assert not torch.equal(first.noise, other.noise)


def test_labels_stay_with_their_samples():
    batch = Tiny().batch(10, 0, 0)
    assert torch.equal(batch.data[:, 0, 0, 0].long() % 3, batch.cond)


def test_noise_is_standard_normal():
    noise = torch.cat([Tiny().batch(10, 0, step).noise for step in range(500)])
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.02


def test_no_condition_is_the_label_past_the_last():
    task = Tiny()
    assert task.null(torch.tensor([0, 2])).tolist() == [3, 3]
    assert task.null(None) is None


def test_samples_are_delivered_inside_their_range():
    assert Tiny().finish(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1.0, 0.5, 1.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_run_from_black_to_white(channels):
    x = torch.tensor([-1.0, 0.0, 1.0, 9.0])[:, None, None, None].expand(4, channels, 2, 2)
    pictures = Tiny((channels, 2, 2)).pictures(x)
    assert pictures.shape == (4, 2, 2, channels)
    assert pictures[:, 0, 0, 0].tolist() == [0, 128, 255, 255]


def test_what_is_no_picture_has_none():
    assert Tiny((2,)).pictures(torch.zeros(1, 2)) is None
    assert Tiny((5, 2, 2)).pictures(torch.zeros(1, 5, 2, 2)) is None


def test_samples_vary_only_where_a_task_says_how():
    x = torch.randn(3, 1, 2, 2)
    assert torch.equal(Tiny().augment(x, Rng(0)), x)


# -- by name -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("mixture", {"mode": 4}, "task 'mixture': unknown option 'mode': did you mean 'modes'?"),
        ("images", {}, "task 'images': option 'path' is required"),
        ("mixture", {"modes": "many"}, "task 'mixture': option 'modes': input should be a valid integer"),
        ("mixture", {"std": -1.0}, "option 'std': input should be greater than 0, got -1.0"),
    ],
)
def test_an_option_that_will_not_do_is_answered_in_one_line(name, options, complaint):
    with pytest.raises(Refused) as caught:
        task_named(name, options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="unknown task 'mixtures': did you mean 'mixture'"):
        task_named("mixtures")


# -- splitting and hashing ---------------------------------------------------------------------


def test_a_stratified_split_gives_every_class_its_share():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    kept, held = stratified(labels, 100, 20, seed=0)
    assert labels[held].bincount().tolist() == [12, 6, 2]
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(100))


@pytest.mark.parametrize("count", [0, 1, 7, 19])
def test_a_split_is_as_large_as_asked_for_whatever_rounding_says(count):
    labels = torch.tensor([0] * 7 + [1] * 7 + [3] * 6)
    for given in (labels, None):
        kept, held = stratified(given, 20, count, seed=1)
        assert (len(kept), len(held)) == (20 - count, count)
        assert not set(kept.tolist()) & set(held.tolist())


def test_a_split_depends_on_its_seed_alone():
    first, again, other = (stratified(None, 50, 10, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("count", [-1, 20, 21])
def test_holding_out_everything_is_refused(count):
    with pytest.raises(Refused, match="from 0 to 19"):
        stratified(None, 20, count, 0)


def test_a_hash_tells_values_shapes_and_types_apart():
    x = torch.arange(6)
    variants = [x, x + 1, x.view(2, 3), x.int(), x.float(), {"a": x}, {"b": x}, None, "x"]
    assert len({data_hash(v) for v in variants}) == len(variants)
    assert data_hash(x) == data_hash(x.clone())
    assert data_hash(x.view(2, 3).T) == data_hash(x.view(2, 3).T.contiguous())
