"""The one training loop: several players take turns, and nothing is lost when it stops."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import Failed, Interrupted
from ..method import Batch, Method
from ..rng import Rng, mix
from ..student import Student
from ..tasks.base import Task
from .average import Average
from .pairs import Pairs
from .player import Player
from .precision import Prepared
from .probe import Prober
from .recipe import Recipe, factor
from .store import load_state, save_state

SKIPS_IN_A_ROW = 20
PROBES = 10


class Watch(Protocol):
    """Who looks on: a progress bar, a web page, nobody."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, label: str, done: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...
    def finish(self, label: str) -> None: ...


class Nobody:
    """A ``Watch`` that does not look."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, label: str, done: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...
    def finish(self, label: str) -> None: ...


class Trainer:
    """Trains a method by a recipe inside a run folder.

    Every batch and every random
    draw is a pure function of (seed, stage, step, turn), so that a stopped run that goes on ends with the very
    weights of one that was not stopped.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: File,
        *,
        stage: int = 0,
        device: torch.device | str = "cpu",
        watch: Watch | None = None,
        resume_line: str = "",
    ) -> None:
        self.recipe, self.run, self.stage = recipe.stage(stage), run, stage
        self.device = torch.device(device)
        self.watch: Watch = watch or Nobody()
        self.resume_line = resume_line
        self.label = "train" if not recipe.stages else f"stage {stage + 1}/{len(recipe.stages) + 1}"
        self.seconds = 0.0
        self.warnings: list[str] = []
        self._stop = threading.Event()

    # -- one run --------------------------------------------------------------------------------

    def fit(self, method: Method, task: Task, pairs: Pairs | None = None, *, resume: bool = False) -> Student:
        """Train; returns the student with its averaged weights, in evaluation mode.

        Raises Failed after twenty updates in a row that were not finite, Interrupted on SIGINT or SIGTERM
        after a checkpoint was written.
        """
        recipe, steps = self.recipe, self.recipe.steps
        method.to(self.device)
        prepared = Prepared(method, recipe.precision, self.device)
        players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
        average = Average(method.student, recipe.ema.decay, recipe.ema.warmup) if recipe.ema.decay > 0 else None
        prober = Prober(task, mix(recipe.seed, "probe"), method.makes)
        every = recipe.checkpoint.every or max(steps // 10, 1)
        probe_every = recipe.log.probe or max(steps // PROBES, 1)
        if not resume:
            for old in (self.run / "checkpoints").glob(f"stage_{self.stage}_*"):
                shutil.rmtree(old, ignore_errors=True)
        first = self._load(method, players, average) if resume else 0
        skipped = torch.zeros((), device=self.device)
        in_a_row = torch.zeros((), device=self.device)
        self.watch.start(self.label, steps)
        method.train()
        note, began = "", time.perf_counter()
        log = self._open_log(first)
        with self._signals(), log:
            for step in range(first, steps):
                lines: dict[str, Any] = {}
                for turn, name in enumerate(method.turns(step)):
                    player = players[name]
                    for other_name, other in players.items():
                        other.learns(other_name == name)
                    parts = self._turn(method, name, step, turn, task, pairs)
                    rounding = mix(recipe.seed, "stage", self.stage, "rounding", step, turn)
                    norm, bad = player.update(factor(recipe.schedule_of(name), step, steps), key=rounding)
                    prepared.rest()
                    skipped += bad
                    in_a_row = (in_a_row + 1) * bad
                    lines.update({f"{name}/{k}": v for k, v in parts.items()})
                    lines[f"{name}/norm"] = norm
                gone = {p.data_ptr() for p in method.settle(step)}
                if gone:
                    for player in players.values():
                        player.forget(gone)
                if average is not None:
                    if gone:
                        average.forget(gone)
                    average.update()
                done = step + 1
                if done % probe_every == 0 or done == steps:
                    note = self._look(method, average, prober, task, done)
                if done % recipe.log.every == 0 or done == steps:
                    values = {k: float(v) for k, v in lines.items()}
                    seconds = self.seconds + time.perf_counter() - began
                    line = {"step": done, "stage": self.stage, "seconds": round(seconds, 3), **values}
                    line["skipped"] = int(skipped)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    self.watch.advance(self.label, done, note or _brief(values))
                    self._check(int(in_a_row), done)
                if self._stop.is_set() or (done % every == 0 and done < steps):
                    self.seconds += time.perf_counter() - began
                    began = time.perf_counter()
                    if not int(in_a_row):  # a state that cannot go on is not worth keeping
                        self._keep(method, players, average, done)
                    if self._stop.is_set():
                        raise Interrupted(self.resume_line)
        self.seconds += time.perf_counter() - began
        for player in players.values():
            player.learns(True)
        prepared.finish()
        if average is not None:
            average.apply()
        self.watch.finish(self.label)
        return method.student.eval()

    def _turn(
        self, method: Method, name: str, step: int, turn: int, task: Task, pairs: Pairs | None
    ) -> dict[str, Tensor]:
        recipe, parts = self.recipe, {}
        seed = mix(recipe.seed, "stage", self.stage)
        self._seed(mix(seed, step, turn))
        method.step = step
        accumulate = recipe.parallel.accumulate
        for part in range(accumulate):
            position = step * accumulate + part
            batch = self._batch(name, seed, position, turn, task, pairs)
            rng = Rng(seed, "loss", step, turn, part, device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision.dtype == "bfloat16"):
                loss = method.loss(name, batch, rng)
            (loss.total / accumulate).backward()
            parts = loss.parts
        return parts

    def _seed(self, seed: int) -> None:
        """Seed what dropout draws from. ``torch.manual_seed`` would format a stack trace for every kind of
        device that is not in use, a twentieth of an iteration."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type != "cpu":
            torch.manual_seed(seed)

    def _batch(self, name: str, seed: int, position: int, turn: int, task: Task, pairs: Pairs | None) -> Batch:
        size = self.recipe.batch
        if pairs is not None and name == "student":
            batch = pairs.batch(size, seed, position)
        else:
            batch = task.batch(size, seed, position, turn)
        return batch if self.device.type == "cpu" else batch.to(self.device)

    # -- looking, logging, stopping ------------------------------------------------------------

    def _look(self, method: Method, average: Average | None, prober: Prober, task: Task, done: int) -> str:
        with average.applied() if average is not None else contextlib.nullcontext():
            probe, samples = prober(method.student)
        warning = probe.warning()
        if warning is not None:
            line = f"step {done}: {warning}"
            self.warnings.append(line)
            self.watch.say(line)
        pictures = task.pictures(samples)
        if pictures is not None:
            self._picture(pictures, done)
        return f"diversity {probe.diversity:.2f}, spread {probe.spread:.2f}"

    def _picture(self, pictures: Tensor, done: int) -> None:
        """A grid of samples, where pillow is installed."""
        try:
            from PIL import Image
        except ModuleNotFoundError:
            return
        side = int(math.sqrt(len(pictures)))
        grid = pictures[: side * side].unflatten(0, (side, side)).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
        folder = self.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(grid.squeeze(2).numpy())
        scale = max(1, 320 // image.width)
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(
            folder / f"step_{self.stage}_{done:06d}.png"
        )

    def _check(self, in_a_row: int, done: int) -> None:
        if in_a_row >= SKIPS_IN_A_ROW:
            good = newest(self.run / "checkpoints")
            where = f"; the last good checkpoint is {good}" if good else ""
            raise Failed(f"{in_a_row} updates in a row were not finite at step {done}: lower optim.lr{where}")

    def _open_log(self, first: int) -> Any:
        """The log, without lines beyond where a resumed run goes on."""
        file = self.run / "log.jsonl"
        self.run.mkdir(parents=True, exist_ok=True)
        kept = []
        if file.exists():
            for text in file.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if line.get("stage", 0) < self.stage or (line.get("stage", 0) == self.stage and line["step"] <= first):
                    kept.append(text)
        file.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
        return file.open("a", encoding="utf-8")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint and an orderly end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {}

        def ask(number: int, frame: Any) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    # -- checkpoints ----------------------------------------------------------------------------

    def _state(self, method: Method, players: dict[str, Player], average: Average | None) -> dict[str, Tensor]:
        out = {f"method/{k}": v for k, v in learned(method).items()}
        for name, player in players.items():
            out.update({f"optim/{name}/{k}": v for k, v in player.state().items()})
        if average is not None:
            out.update({f"ema/{k}": v for k, v in average.state().items()})
        return out

    def _keep(self, method: Method, players: dict[str, Player], average: Average | None, done: int) -> None:
        folder = self.run / "checkpoints"
        target = folder / f"stage_{self.stage}_step_{done:08d}"
        facts = {
            "stage": self.stage,
            "step": done,
            "seconds": self.seconds,
            "updates": average.updates if average else 0,
            "recipe": self.recipe.sha256,
        }
        save_state(target, self._state(method, players, average), facts)
        for old in sorted(folder.glob("stage_*"))[: -self.recipe.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _load(self, method: Method, players: dict[str, Player], average: Average | None) -> int:
        """The newest whole checkpoint of this stage; returns the step to go on at."""
        for folder in sorted((self.run / "checkpoints").glob(f"stage_{self.stage}_*"), reverse=True):
            found = load_state(folder)
            if found is None:
                self.watch.say(f"{folder.name} is damaged: taking the one before")
                continue
            tensors, facts = found
            if facts["recipe"] != self.recipe.sha256:
                raise Failed(
                    f"the recipe changed since {folder}: resume with the recipe of the run, or take a new --out"
                )
            own = learned(method)
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(tensors[f"method/{key}"])
            for name, player in players.items():
                head = f"optim/{name}/"
                player.load({k[len(head) :]: v for k, v in tensors.items() if k.startswith(head)})
            if average is not None:
                average.load({k[4:]: v for k, v in tensors.items() if k.startswith("ema/")}, facts["updates"])
            self.seconds = facts["seconds"]
            return int(facts["step"])
        return 0


def learned(method: Method) -> dict[str, Tensor]:
    """All tensors of a method but its teacher's, each once."""
    teacher = method.teacher
    frozen_ones = set() if teacher is None else {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    seen: set[int] = set()
    out = {}
    for name, value in method.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in frozen_ones and id(value) not in seen:
            seen.add(id(value))
            out[name] = value
    return out


def newest(folder: File) -> File | None:
    """The newest whole checkpoint, or None."""
    for candidate in sorted(folder.glob("stage_*"), reverse=True):
        if load_state(candidate) is not None:
            return candidate
    return None


def _brief(values: dict[str, float]) -> str:
    shown = [f"{k} {v:.3g}" for k, v in values.items() if not k.endswith("/norm")]
    return ", ".join(shown[:3])
