"""What a step is said to hold is what it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.cond import Cond
from fewstep.denoiser import Wrapped
from fewstep.methods.denoising import Denoising
from fewstep.methods.dmd2 import DMD2
from fewstep.path import Straight
from fewstep.student import Student
from fewstep.tasks.base import Split, Task
from fewstep.train.footprint import Footprint, Ledger, footprint, shapes_alone, size
from fewstep.train.recipe import recipe_from

WIDE = 512


class Line(nn.Module):
    """Two layers whose bytes can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False)

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None) -> Tensor:
        return self.two(self.one(x))


class Vectors(Task):
    name, shape = "vectors", (WIDE,)

    def __init__(self) -> None:
        self._split = Split(torch.zeros(8, WIDE), None)

    @property
    def train(self) -> Split:
        return self._split

    @property
    def test(self) -> Split:
        return self._split


def recipe(ema: float = 0.0, **more):
    return recipe_from({
        "steps": 1, "task": {"name": "digits"}, "method": {"name": "denoising"}, "ema": {"decay": ema}, **more
    })  # fmt: skip


def denoiser() -> Wrapped:
    return Wrapped(Line(), Straight(), "x0", "t")


def test_the_ledger_counts_what_lives_and_the_most_that_lived():
    with Ledger() as ledger:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del a
        assert (ledger.now, ledger.peak) == (4000, 8000)
        b.add_(1)
        assert ledger.now == 4000
        del b
        assert ledger.now == 4000, "a view keeps its memory"
        del view
    assert (ledger.now, ledger.peak) == (0, 8000)
    old = torch.zeros(10)
    with Ledger() as ledger:
        old.mul_(2)
    assert ledger.peak == 0, "what was there before does not count"


@pytest.mark.parametrize("fake", [False, True])
def test_gradients_moments_and_averages_are_four_bytes_a_parameter_each(fake):
    weights = 2 * WIDE**2 * 4
    for ema, copies in ((0.0, 3), (0.9, 4)):
        method = Denoising(None, Student(denoiser(), (WIDE,)))
        found = footprint(method, Vectors(), recipe(ema), 1, fake=shapes_alone() if fake else None)
        assert found.peak == pytest.approx(copies * weights, rel=0.03)
    assert found.flops["student"] == pytest.approx(2 * (2 * WIDE**2) * 3, rel=0.2)  # forward, and back through both


@pytest.mark.parametrize("fake", [False, True])
def test_what_is_kept_for_the_way_back_grows_with_the_rows(fake):
    peaks = [
        footprint(
            Denoising(None, Student(denoiser(), (WIDE,))),
            Vectors(),
            recipe(),
            rows,
            fake=shapes_alone() if fake else None,
        )
        for rows in (256, 512, 1024)
    ]
    assert 3 * peaks[1].peak - 2 * peaks[0].peak == pytest.approx(peaks[2].peak, rel=0.02)
    row = (peaks[1].peak - peaks[0].peak) / 256
    assert 4 * WIDE * 4 < row < 12 * WIDE * 4  # a handful of vectors a row


def test_a_network_too_large_for_any_machine_is_counted_without_memory():
    with torch.device("meta"):
        net = nn.Linear(2**17, 2**17, bias=False)  # 64 GiB

    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, time: Tensor, cond: Cond = None) -> Tensor:
            return self.net(x.repeat(1, 2**17 // WIDE))[:, :WIDE]

    mode = shapes_alone()
    with mode:
        net.weight = nn.Parameter(mode.from_tensor(torch.empty(1)).new_empty(2**17, 2**17))
    method = Denoising(None, Student(Wrapped(Huge(), Straight(), "x0", "t"), (WIDE,)))
    assert size(method) == 4 * 2**34
    found = footprint(method, Vectors(), recipe(), 1, fake=mode)
    assert found.peak == pytest.approx(3 * 4 * 2**34, rel=0.01)


def test_all_players_are_counted_and_checkpointing_shows():
    def peak(**precision: bool) -> Footprint:
        torch.manual_seed(0)
        from fewstep.nets import build

        net = build({"kind": "dit", "shape": (1, 8, 8), "width": 16, "depth": 6, "heads": 2})
        teacher = Wrapped(net, Straight(), "x0", "t")

        class Pictures(Vectors):
            shape = (1, 8, 8)

            def __init__(self) -> None:
                self._split = Split(torch.zeros(64, 1, 8, 8), None)

        method = DMD2(teacher, Student.like(teacher, (1, 8, 8)))
        return footprint(method, Pictures(), recipe(precision=precision), 64)

    plain, saved = peak(), peak(checkpointing=True)
    assert set(plain.flops) == {"student", "critic"}
    assert saved.peak < 0.6 * plain.peak
    assert saved.flops["critic"] > plain.flops["critic"]
