import pytest
import torch

from fewstep.cond import count, join, move, rows

LABELS = torch.arange(4)
TEXT = {"ids": torch.arange(8).view(4, 2), "mask": torch.ones(4, 2)}


def test_joining_the_halves_gives_the_whole_back():
    for cond in (LABELS, TEXT, None):
        both = join(rows(cond, slice(0, 2)), rows(cond, slice(2, 4)))
        if cond is None:
            assert both is None
        elif isinstance(cond, dict):
            assert both.keys() == cond.keys()
            assert all(torch.equal(both[k], cond[k]) for k in cond)
        else:
            assert torch.equal(both, cond)


def test_rows_may_be_picked_by_number():
    assert rows(LABELS, torch.tensor([3, 0])).tolist() == [3, 0]
    assert rows(TEXT, torch.tensor([3, 0]))["ids"].tolist() == [[6, 7], [0, 1]]


@pytest.mark.parametrize("other", [None, TEXT, {"ids": TEXT["ids"]}])
def test_conditions_of_different_kinds_do_not_join(other):
    with pytest.raises(ValueError, match="cannot be joined"):
        join(LABELS if other is not None and len(other) == 2 else TEXT, other)


def test_a_condition_knows_its_rows():
    assert (count(None), count(LABELS), count(TEXT)) == (None, 4, 4)


def test_moving_keeps_every_part():
    moved = move(TEXT, "meta")
    assert {key: value.device.type for key, value in moved.items()} == {"ids": "meta", "mask": "meta"}
    assert move(None, "meta") is None
    assert move(LABELS, "meta").device.type == "meta"
