"""What one training iteration costs beside the network passes that it cannot do without.

    python benchmarks/iteration_cost.py            # table; --json FILE writes it, --quick is a smoke run

The left side is the trainer's own iteration: batch, random draws, loss, backward, clipping, fused optimiser step,
average. The right side is bare calls of the same networks on ready tensors: forward, backward and
``torch.optim.AdamW(fused=True)``, plus the forward passes and directional derivatives that the method needs.
Both are timed in turns inside one run, in processor time on one thread, and compared round by round: the ratio
is the median over rounds. ``least`` compares the fastest of each side: on a busy machine it is what the code
costs, where the median is also what its neighbours do. A median above 1.1 is a failure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.adapters import LoraOptions, adapted
from fewstep.denoiser import Denoiser, Reframed, Wrapped
from fewstep.method import Batch, Method
from fewstep.methods.consistency import Consistency, ConsistencyOptions
from fewstep.methods.denoising import Denoising, FlowMatching
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.families.score_gap import Adversary
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.regression import Regression
from fewstep.methods.score_gap import SIM, TDM, DisBack, FDistill, SiD, SwiftBrush, UniInstruct
from fewstep.nets import build
from fewstep.path import Exploding, Straight
from fewstep.rng import Rng, mix
from fewstep.student import Student
from fewstep.tasks.base import Split, Task
from fewstep.train.average import Average
from fewstep.train.player import Player
from fewstep.train.recipe import Recipe, factor
from fewstep.train.trainer import Trainer

BAR = 1.1
Work = Callable[[], None]


class Ready(Task):
    """Random pictures with ten labels, of the size of the digits."""

    name = "ready"
    shape, classes, data_std, value_range = (1, 8, 8), 10, 0.75, (-1.0, 1.0)

    def __init__(self, pairs: bool) -> None:
        rng = torch.Generator().manual_seed(0)
        self._split = Split(torch.rand(898, 1, 8, 8, generator=rng) * 2 - 1, torch.arange(898) % 10)
        self.pairs = pairs

    @property
    def train(self) -> Split:
        return self._split

    @property
    def test(self) -> Split:
        return self._split

    def batch(self, size: int, seed: int, step: int, turn: int = 0) -> Batch:
        batch = super().batch(size, seed, step, turn)
        return Batch(batch.data, batch.cond, batch.noise, batch.data) if self.pairs else batch


def network(width: int, reads_s: bool = False) -> torch.nn.Module:
    return build({
        "kind": "unet", "shape": (1, 8, 8), "widths": (width, 32), "classes": 10, "reads_s": reads_s
    })  # fmt: skip


def denoiser(width: int, reads_s: bool = False) -> Denoiser:
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    net = network(width, reads_s)
    return Wrapped(net, path, "cm", "250 log_sigma", scale_input=True, data_std=0.75, boundary=0.002)


def net_of(model: Any) -> torch.nn.Module:
    while not hasattr(model, "net"):
        model = model.inner if hasattr(model, "inner") else model.denoiser
    net: torch.nn.Module = model.net
    return net


class Bare:
    """Passes of networks on tensors that are ready: nothing but the network is paid for."""

    def __init__(self, batch: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(2 * batch, 1, 8, 8, generator=rng)
        self.time = 100 * torch.randn(2 * batch, generator=rng)
        self.cond = torch.arange(2 * batch) % 10
        self.count = batch

    def inputs(self, net: Any, rows: int) -> tuple[Tensor, ...]:
        given = (self.x[:rows], self.time[:rows], self.cond[:rows])
        return (*given, torch.full((rows,), 0.5)) if net.reads_s else given

    def learn(self, net: torch.nn.Module) -> Work:
        """Forward, backward and a fused optimiser step of what learns."""
        optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-9, fused=True)
        given = self.inputs(net, self.count)

        def work() -> None:
            net(*given).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

        return work

    def look(self, net: torch.nn.Module, times: int = 1) -> Work:
        """A forward pass of ``times`` batches in one call, without a gradient."""
        given = self.inputs(net, times * self.count)

        def work() -> None:
            with torch.no_grad():
                net(*given)

        return work

    def through(self, net: torch.nn.Module) -> Work:
        """Forward, and backward to the input alone."""
        net.requires_grad_(False)
        x, *rest = self.inputs(net, self.count)
        x = x.clone().requires_grad_()

        def work() -> None:
            net(x, *rest).square().mean().backward()
            x.grad = None

        return work

    def features(self, model: Denoiser, times: int = 1, learning: bool = True, whole: bool = False) -> Work:
        """Forward to the last tap (``whole``: all of it) and backward from there: to the weights, or to the input."""
        Adversary.choose(model, (1, 8, 8), 1)
        rows = times * self.count
        x, t, cond = self.x[:rows].clone().requires_grad_(not learning), torch.full((rows,), 1.0), self.cond[:rows]
        model.requires_grad_(learning)

        def work() -> None:
            found = model(x, t, cond, "both" if whole else "features")
            sum(f.square().mean() for f in (found[1] if whole else found)).backward()
            model.zero_grad()
            x.grad = None

        return work

    def slope(self, net: torch.nn.Module, rows: int) -> Work:
        """A forward-mode derivative on some rows."""
        x, clock, *rest = self.inputs(net, rows)

        def work() -> None:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                moving = (forward_ad.make_dual(v, torch.ones_like(v)) for v in (x, clock))
                forward_ad.unpack_dual(net(*moving, *rest))

        return work


class Game:
    """A method under the trainer, turn by turn: the body of its loop."""

    def __init__(self, method: Method, batch: int, pairs: bool = False) -> None:
        recipe = Recipe.model_validate({
            "steps": 1000, "batch": batch, "task": {"name": "digits"}, "method": {"name": method.name},
            "optim": {"lr": 1e-9},
        })  # fmt: skip
        self.method, self.recipe, self.task = method.train(), recipe, Ready(pairs)
        self.trainer = Trainer(recipe, Path(tempfile.gettempdir()))
        self.players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
        self.average = Average(method.student, 0.999)
        self.step, self.moves = 0, True

    def play(self, name: str) -> Work:
        """One turn of a player; the student's ends the step."""

        def work() -> None:
            for other, player in self.players.items():
                player.learns(other == name)
            self.trainer._turn(self.method, name, self.step, 0, self.task, None)
            self.players[name].update(factor(self.recipe.schedule_of(name), self.step, 1000))
            if name == "student":
                self.method.settle(self.step)
                self.average.update()
                self.step += self.moves

        return work


def cases(batch: int, width: int) -> dict[str, tuple[Work, list[Work], str]]:
    """For every method: its iteration, the bare passes that it needs, and these in words."""
    bare = Bare(batch)
    out: dict[str, tuple[Work, list[Work], str]] = {}

    def student_of(teacher: Denoiser) -> Student:
        return Student.like(teacher, (1, 8, 8), classes=10)

    def add(
        name: str, method: Method, passes: list[Work], words: str, player: str = "student", pairs: bool = False
    ) -> None:
        out[name] = (Game(method, batch, pairs).play(player), passes, words)

    for name, cls in (("denoising", Denoising), ("flow_matching", FlowMatching)):
        add(name, cls(None, Student(denoiser(width), (1, 8, 8))), [bare.learn(network(width))], "learn")
    teacher = denoiser(width)
    net = net_of(teacher)
    regression = Regression(teacher, student_of(teacher))
    add("regression", regression, [bare.learn(network(width))], "learn", pairs=True)
    training = ConsistencyOptions(mode="training")
    add(
        "consistency, training", Consistency(None, student_of(teacher), training),
        [bare.learn(network(width)), bare.look(net)], "learn + forward",
    )  # fmt: skip
    add(
        "consistency, distillation", Consistency(teacher, student_of(teacher)),
        [bare.learn(network(width)), bare.look(net), bare.look(net), bare.look(net)], "learn + 3 forward",
    )  # fmt: skip
    straight = Reframed(denoiser(width, reads_s=True), Straight(end=0.95))
    flow = MeanFlow(None, Student(straight, (1, 8, 8)))
    jumps = round(flow.options.jumps * batch)  # rows with s < t, on average
    add(
        "meanflow", flow, [bare.learn(network(width, True)), bare.slope(network(width, True), jumps)],
        f"learn + derivative of {jumps} rows",
    )  # fmt: skip
    for scale, looks in ((1.0, 1), (2.0, 2)):
        words = f"learn + forward + {'forward of 2 batches' if looks == 2 else 'forward'}"
        options = DMD2Options(guidance=scale, data_std=0.75)
        game = DMD2(teacher, student_of(teacher), options)
        passes = [bare.learn(network(width)), bare.look(net), bare.look(net, looks)]
        suffix = ", guided" if looks == 2 else ""
        add(f"dmd2 student{suffix}", game, passes, words)
        if looks == 1:
            critic = DMD2(teacher, student_of(teacher), options)
            add("dmd2 critic", critic, [bare.learn(network(width)), bare.look(net)], "learn + forward", "critic")
    matching(bare, out, teacher, batch, width)
    return out


def matching(
    bare: Bare, out: dict[str, tuple[Work, list[Work], str]], teacher: Denoiser, batch: int, width: int
) -> None:
    """The rows of distribution matching; a critic's turn where it is another one than dmd2's."""
    net = net_of(teacher)
    look, twice = bare.look(net), bare.look(net, 2)

    def learn() -> Work:
        return bare.learn(network(width))

    def game(cls: Any, **options: Any) -> Game:
        given = cls.Options(data_std=0.75, **options)
        made = cls.student_options(given, teacher.path)
        return Game(cls(teacher, Student.like(teacher, (1, 8, 8), classes=10, **made), given), batch)

    for cls in (SIM, SiD):
        passes = [learn(), bare.through(network(width)), bare.through(network(width))]
        out[f"{cls.name} student"] = (game(cls).play("student"), passes, "learn + 2 through to the input")
    out["sim critic"] = (game(SIM).play("critic"), [learn(), look], "learn + forward")
    passes = [learn(), bare.through(network(width)), bare.through(network(width))]
    out["uni_instruct student"] = (game(UniInstruct).play("student"), passes, "learn + 2 through to the input")
    tell = bare.features(denoiser(width), 2)
    out["uni_instruct critic"] = (
        game(UniInstruct).play("critic"), [learn(), look, tell], "learn + forward + features of 2 batches and back",
    )  # fmt: skip
    half = bare.features(denoiser(width), learning=False, whole=True)
    out["f_distill student"] = (
        game(FDistill).play("student"), [learn(), look, half], "learn + forward + forward and back from the features",
    )  # fmt: skip
    out["f_distill critic"] = (
        game(FDistill).play("critic"), [learn(), look, tell], "learn + forward + features of 2 batches and back",
    )  # fmt: skip
    brush = game(SwiftBrush)
    lora = LoraOptions(rank=64, alpha=108, targets="all")
    out["swiftbrush student"] = (
        brush.play("student"), [learn(), twice, bare.look(net_of(adapted(denoiser(width), lora)), 2)],
        "learn + 2 forward of 2 batches, one with adapters",
    )  # fmt: skip
    small = bare.learn(net_of(adapted(denoiser(width), lora)))
    out["swiftbrush critic"] = (game(SwiftBrush).play("critic"), [small, look], "learn of adapters + forward")
    steps = game(TDM)
    steps.moves = False
    third = next(k for k in range(99) if shared_draw(steps.recipe, k, 4) == 2)
    steps.step = third
    out["tdm student, third of 4"] = (steps.play("student"), [learn(), look, look, look, look], "learn + 4 forward")
    back = game(DisBack)
    back.step = 10_000
    out["disback student"] = (back.play("student"), [learn(), look, look], "learn + 2 forward")


def shared_draw(recipe: Recipe, step: int, count: int) -> int:
    """The step of a roll-out that a turn at ``step`` draws, as the trainer seeds it."""
    rng = Rng(mix(recipe.seed, "stage", 0), "loss", step, 0, 0)
    return int(torch.randint(count, (1,), generator=rng.shared))


def seconds(work: Work, repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - begin) / repeats


def measure(ours: Work, passes: list[Work], rounds: int, repeats: int) -> dict[str, float]:
    """Medians over rounds; in each, both sides are timed one right after the other."""

    def bare() -> None:
        for one in passes:
            one()

    for work in (ours, bare):
        seconds(work, 2)
    pairs = []
    for i in range(rounds):
        if i % 2:
            needed = seconds(bare, repeats)
            pairs.append((seconds(ours, repeats), needed))
        else:
            spent = seconds(ours, repeats)
            pairs.append((spent, seconds(bare, repeats)))
    return {
        "iteration_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "passes_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "least": min(a for a, _ in pairs) / min(b for _, b in pairs),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=1, help="iterations in a round")
    parser.add_argument("--only", default="", help="methods whose name begins like this")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.repeats, options.batch = 1, 1, 8
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print(f"U-Net {options.width}/32 on 8x8, batch {options.batch}; processor time, one thread")
    print(f"{'':28}{'iteration':>12}{'its passes':>12}{'ratio':>8}{'least':>8}   passes")
    for name, (ours, passes, words) in cases(options.batch, options.width).items():
        if not name.startswith(options.only):
            continue
        row = measure(ours, passes, options.rounds, options.repeats)
        rows.append({"name": name, "passes": words, **row})
        print(
            f"{name:28}{row['iteration_ms']:9.2f} ms{row['passes_ms']:9.2f} ms"
            f"{row['ratio']:8.3f}{row['least']:8.3f}   {words}",
            flush=True,
        )
    if options.json:
        facts = {"schema": 1, "batch": options.batch, "width": options.width, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    late = [row["name"] for row in rows if row["ratio"] > BAR]
    if late and not options.quick:
        print(f"above {BAR}: {', '.join(late)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
