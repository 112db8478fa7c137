"""One iteration of DMD2 and f-distill beside NVIDIA FastGen's, on the same network, batch and threads.

    python benchmarks/fastgen.py --driver fastgen_driver.py --fastgen PATH/TO/FastGen
    python benchmarks/fastgen.py                    # ours alone, in units of a bare step, beside FastGen's kept figures

Both sides play the same game: an adversary on the frozen teacher's features, four turns of the critic and one of the
student in five iterations, clipping and an average; the figure is the mean iteration, student and critic weighed by
how often they come. ``unit`` is one bare step on the same network: forward, squared error, backward, Adam.

``--driver`` is a script that drives FastGen's own classes and defines the network (``PlainUNet``) that both train;
without it ours is measured on a U-Net of this package. With ``--fastgen``, a clone of NVlabs/FastGen, the driver runs
in a process of its own (``--python``: an interpreter that has FastGen's requirements) right after ours, and the bar is
0.8 of its time; where that is not possible a line says why and ours is held to FastGen's figures of February 2026 in
the same units. All times are processor time of one thread; medians over rounds in which all have their turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fewstep.denoiser import Wrapped
from fewstep.method import Method
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.families.score_gap import GanOptions
from fewstep.methods.score_gap import FDistill
from fewstep.nets import build
from fewstep.path import Exploding, NoiseSampler
from fewstep.student import Student
from fewstep.tasks.base import Split, Task
from fewstep.train.average import Average
from fewstep.train.player import Player
from fewstep.train.recipe import Recipe
from fewstep.train.trainer import Trainer

BAR = 0.8
KEPT = {"dmd2": 2.07, "f_distill": 1.96}
"""FastGen's iterations of February 2026 in units of a bare step: plain network, one thread."""
PERIOD = 5


class Pictures(Task):
    """Random pictures with ten labels, and the labels as the network wants them."""

    name = "pictures"
    classes, data_std, value_range = None, 0.5, (-1.0, 1.0)

    def __init__(self, size: int, one_hot: bool) -> None:
        self.shape = (1, size, size)
        rng = torch.Generator().manual_seed(0)
        labels = torch.arange(1024) % 10
        cond = F.one_hot(labels, 10).float() if one_hot else labels
        self._split = Split(torch.rand(1024, *self.shape, generator=rng) * 2 - 1, cond)

    @property
    def train(self) -> Split:
        return self._split

    @property
    def test(self) -> Split:
        return self._split


class Plain(nn.Module):
    """The driver's network under our way to call one."""

    def __init__(self, driver: Any, width: int) -> None:
        super().__init__()
        self.inside = driver.PlainUNet(1, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor) -> Any:
        return self.inside(x, time, None, cond)[0]


class Bench:
    """All contestants of a batch, a picture size and a width."""

    def __init__(self, driver: Any, batch: int, size: int, width: int) -> None:
        self.driver, self.batch, self.size, self.width = driver, batch, size, width
        self.task = Pictures(size, driver is not None)

    def network(self) -> nn.Module:
        if self.driver is not None:
            return Plain(self.driver, self.width)
        shape = (1, self.size, self.size)
        return build({"kind": "unet", "shape": shape, "widths": (self.width, 2 * self.width), "classes": 10})

    def denoiser(self) -> Wrapped:
        path = Exploding(sigma_min=0.002, sigma_max=80.0)
        taps = ("inside.m2",) if self.driver is not None else ()
        return Wrapped(self.network(), path, "edm", "log_sigma/4", scale_input=True, data_std=0.5, taps=taps)

    def unit(self) -> Any:
        net = self.network()
        optimiser = torch.optim.Adam(net.parameters(), 1e-4)
        x, cond, t = self.task.train.data[: self.batch], self.task.train.cond[: self.batch], torch.rand(self.batch)

        def work() -> None:
            F.mse_loss(net(x + torch.randn_like(x), t, cond), x).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return work

    def game(self, cls: type[Method]) -> dict[str, Any]:
        teacher = self.denoiser()
        options = cls.Options(
            data_std=0.5, critic_turns=PERIOD - 1, gan=GanOptions(on="teacher", student=0.001, critic=1.0),
            levels=NoiseSampler(kind="karras"), critic_levels=NoiseSampler(kind="karras"),
        )  # fmt: skip
        method = cls(teacher, Student.like(teacher, self.task.shape), options).train()
        recipe = Recipe.model_validate({
            "steps": 10_000, "batch": self.batch, "task": {"name": "digits"}, "method": {"name": method.name},
            "optim": {"lr": 1e-6, "kind": "adam", "clip": 10.0},
        })  # fmt: skip
        trainer = Trainer(recipe, Path(tempfile.gettempdir()))
        players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
        average, state = Average(method.student, 0.999), {"step": 0}

        def play(name: str) -> Any:
            def work() -> None:
                for other, player in players.items():
                    player.learns(other == name)
                trainer._turn(method, name, state["step"], 0, self.task, None)
                players[name].update(1.0)
                state["step"] += 1
                if name == "student":
                    average.update()

            return work

        return {name: play(name) for name in method.players}


def spent(work: Any) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def ours(bench: Bench, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    works = {"unit": bench.unit()}
    for cls in (DMD2, FDistill):
        works.update({f"{cls.name} {player}": work for player, work in bench.game(cls).items()})
    for work in works.values():
        work(), work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(spent(work))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, Any] = {"unit_ms": 1e3 * medians["unit"]}
    for name in KEPT:
        student, critic = (medians[f"{name} {player}"] / medians["unit"] for player in ("student", "critic"))
        rows[name] = {"units": (student + (PERIOD - 1) * critic) / PERIOD, "student": student, "critic": critic}
    return rows


def theirs(chosen: argparse.Namespace) -> dict[str, float] | str:
    """FastGen's figures in the same units, or why there are none."""
    if chosen.fastgen is None or chosen.driver is None:
        return "no --fastgen and --driver were given"
    if not (chosen.fastgen / "fastgen").is_dir():
        return f"{chosen.fastgen} holds no clone of FastGen"
    command = [
        chosen.python, str(chosen.driver), "--fastgen", str(chosen.fastgen), "--methods", ",".join(KEPT),
        "--data", "random", "--batch", str(chosen.batch), "--size", str(chosen.size), "--width", str(chosen.width),
        "--rounds", str(max(2, chosen.rounds // 10)), "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return f"the driver ended with {done.returncode}: {last}"
    found = json.loads(done.stdout)
    return {name: row["x_unit"] for name, row in found["methods"].items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastgen", type=Path, help="a clone of NVlabs/FastGen")
    parser.add_argument("--driver", type=Path, help="the script that drives it")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with FastGen's requirements")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.rounds, chosen.batch, chosen.width = 1, 2, 8
    torch.set_num_threads(1)
    driver = None
    if chosen.driver is not None:
        spec = importlib.util.spec_from_file_location("fastgen_driver", chosen.driver)
        assert spec is not None and spec.loader is not None
        driver = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(driver)
    mine = ours(Bench(driver, chosen.batch, chosen.size, chosen.width), chosen.rounds)
    other = theirs(chosen)
    if isinstance(other, str):
        print(f"FastGen was not run: {other}; beside it stand its kept figures")
    against = KEPT if isinstance(other, str) else other
    print(f"batch {chosen.batch}, {chosen.size}x{chosen.size}, width {chosen.width}; unit {mine['unit_ms']:.1f} ms")
    print(f"{'':12}{'ours':>8}{'student':>9}{'critic':>8}{'FastGen':>9}{'ratio':>7}   in units of a bare step")
    late = []
    for name in KEPT:
        row, ratio = mine[name], mine[name]["units"] / against[name]
        late += [name] if ratio > BAR else []
        print(f"{name:12}{row['units']:8.2f}{row['student']:9.2f}{row['critic']:8.2f}{against[name]:9.2f}{ratio:7.2f}")
    if chosen.json:
        facts = {
            "schema": 1, "batch": chosen.batch, "size": chosen.size, "width": chosen.width, "torch": torch.__version__,
            "ours": mine, "fastgen": against, "run": not isinstance(other, str),
        }  # fmt: skip
        chosen.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if late and not chosen.quick:
        print(f"above {BAR}: {', '.join(late)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
