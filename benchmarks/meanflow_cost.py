"""What one MeanFlow iteration costs in units of a bare step on the same network, by the share of rows that jump.

    python benchmarks/meanflow_cost.py            # table; --json FILE writes it, --quick is a smoke run
    python benchmarks/meanflow_cost.py --net FILE.py:CLASS     # on a network of yours: net(x, time, span, label)

A unit is forward, mean squared error, backward and Adam on the bare network with ready tensors. The iteration is the
trainer's own: batch, draws, both passes, derivative, clipping, optimiser, average. Units and iterations take turns,
round by round, one thread; the figure is the median over rounds of the ratio. The bars are 0.75 (a quarter of the rows
with s < t) and 0.85 (three quarters) of the 3.03 units that NVIDIA's FastGen (February 2026) spends on the same
network, a two-level U-Net of width 32 on 16x16 pictures, batch 16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from iteration_cost import Game, Ready, seconds
from torch import Tensor, nn

from fewstep.denoiser import Wrapped
from fewstep.methods.meanflow import MeanFlow, MeanFlowOptions
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.student import Student
from fewstep.tasks.base import Split

PEER = 3.03
BARS = {0.25: 0.75, 0.75: 0.85}


class Ready16(Ready):
    """Random pictures of 16x16 with ten labels."""

    shape = (1, 16, 16)

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self._split = Split(torch.rand(898, *self.shape, generator=rng) * 2 - 1, torch.arange(898) % 10)
        self.pairs = False


class Foreign(nn.Module):
    """``net(x, time, span, one-hot label) -> (picture, features)`` as a network of ours."""

    reads_s = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, cond: Any, span: Tensor) -> Tensor:
        answer = self.net(x, time, span, nn.functional.one_hot(cond, 10).to(x))
        picture: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return picture


def network(name: str | None) -> nn.Module:
    torch.manual_seed(0)
    if name is None:
        return build({"kind": "unet", "shape": (1, 16, 16), "widths": (32, 64), "classes": 10, "reads_s": True})
    file, _, cls = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("foreign", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["foreign"] = module
    spec.loader.exec_module(module)
    return Foreign(getattr(module, cls)(second_time=True))


def bare(net: nn.Module, batch: int) -> Any:
    """One unit of work."""
    optimiser = torch.optim.Adam(net.parameters(), 1e-9)
    x, cond = torch.randn(batch, 1, 16, 16), torch.arange(batch) % 10
    time, span = torch.rand(batch), torch.rand(batch)

    def work() -> None:
        nn.functional.mse_loss(net(x, time, cond, span), x).backward()
        optimiser.step()
        optimiser.zero_grad()

    return work


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--net", help="FILE.py:CLASS of another network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=2, help="iterations in a round")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.repeats = 1, 1
    torch.set_num_threads(1)
    contestants: dict[str, Any] = {"unit": bare(network(options.net), options.batch)}
    for kind in ("exact", "difference"):
        for share in BARS:
            denoiser = Wrapped(network(options.net), Straight(), "velocity", "t")
            given = MeanFlowOptions(jumps=share, derivative=kind)
            game = Game(MeanFlow(None, Student(denoiser, (1, 16, 16), classes=10), given), options.batch)
            game.task = Ready16()
            contestants[f"{kind}, {share:.0%}"] = game.play("student")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for work in contestants.values():
        seconds(work, 2)
    for _ in range(options.rounds):
        for name, work in contestants.items():
            times[name].append(seconds(work, options.repeats))
    rows, late = [], []
    print(f"unit {1e3 * statistics.median(times['unit']):.1f} ms; batch {options.batch}, one thread, processor time")
    for name in list(contestants)[1:]:
        units = statistics.median(a / b for a, b in zip(times[name], times["unit"], strict=True))
        least = min(times[name]) / min(times["unit"])
        bar = PEER * BARS[0.25 if "25%" in name else 0.75]
        rows.append({"name": name, "units": units, "least": least, "of_peer": units / PEER, "bar": bar})
        print(f"{name:18}{units:7.2f} units (fastest {least:.2f}), {units / PEER:.2f} of the peer's; bar {bar:.2f}")
        if name.startswith("exact") and units > bar:
            late.append(name)
    if options.json:
        options.json.write_text(json.dumps({"schema": 1, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    if late and not options.quick:
        print(f"above the bar: {', '.join(late)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
