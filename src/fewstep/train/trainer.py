"""The one training loop: several players take turns, and nothing is lost when it stops."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path as File
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import Failed, Interrupted, Refused
from ..losses import set_reduction
from ..method import Batch, Method
from ..rng import Rng, mix
from ..student import Student
from ..tasks.base import Task
from .average import Average
from .best import Best
from .pairs import Pairs
from .player import Player
from .precision import Prepared
from .probe import Prober
from .processes import (
    Spread,
    add_up,
    agree,
    alone,
    begin_alike,
    first_row,
    local,
    mean_gradients,
    mean_over,
    world,
)
from .recipe import Recipe, factor
from .store import State, finite, open_state, save_state, write_text

SKIPS_IN_A_ROW = 20
PROBES = 10
DEEP = 5
"""One probe in so many, the first and the last among them, also asks the method how its game stands."""
DEEP_ROWS = 256
ECHO = 5.0
"""Seconds in which a second signal is the first one's echo, where a launcher stands between."""


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

    Every batch and every random draw is a pure function of (seed, stage, step, turn), so that a stopped run that
    goes on ends with the very weights of one that was not stopped. Several processes (``processes.joined``) share
    each batch, and after each backward pass the gradients of the player; the first one writes.

    ``made_of`` are hashes of what the run depends on beside its recipe (the teacher's weights): a checkpoint keeps
    them, and is not taken up where they differ.
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
        made_of: Mapping[str, str] | None = None,
    ) -> None:
        self.recipe, self.run, self.stage = recipe.stage(stage), run, stage
        self.world = world(device)
        self.device = self.world.device
        self.watch: Watch = watch if watch is not None and self.world.first else Nobody()
        self.resume_line, self.made_of = resume_line, dict(made_of or {})
        self.label = "train" if not recipe.stages else f"stage {stage + 1}/{len(recipe.stages) + 1}"
        self.seconds = 0.0
        self.warnings: list[str] = []
        self.best: Best | None = None
        self.rows = self.world.rows(self.recipe.batch) if self.world.size > 1 else None
        self.spread: Spread | None = None
        self._stop = threading.Event()
        self._asked = 0.0

    # -- one run --------------------------------------------------------------------------------

    def fit(self, method: Method, task: Task, pairs: Pairs | None = None, *, resume: bool = False) -> Student:
        """Train; returns the student with its averaged weights, in evaluation mode.

        Raises Failed after twenty updates in a row that were not finite, or where a file cannot be written;
        Interrupted on SIGINT or SIGTERM after a checkpoint was written.
        """
        try:
            if self.rows is not None:
                set_reduction(mean_over(self._weight() / self.world.size))
            return self._fit(method, task, pairs, resume)
        except OSError as error:
            raise Failed(self._can_go_on(f"could not write into {self.run}: {error.strerror or error}")) from error
        finally:
            set_reduction(None)

    def _fit(self, method: Method, task: Task, pairs: Pairs | None, resume: bool) -> Student:
        recipe, steps = self.recipe, self.recipe.steps
        prepared = self._prepare(method)
        players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
        average = Average(method.student, recipe.ema.decay, recipe.ema.warmup) if recipe.ema.decay > 0 else None
        prober = Prober(task, mix(recipe.seed, "probe"), method.makes)
        every = recipe.checkpoint.every or max(steps // 10, 1)
        probe_every = recipe.log.probe or max(steps // PROBES, 1)
        if not resume and self.world.first:
            for name in (f"stage_{self.stage}_*", f"best_{self.stage}"):
                for old in (self.run / "checkpoints").glob(name):
                    shutil.rmtree(old, ignore_errors=True)
        first = self._load(method, players, average) if resume else 0
        if recipe.checkpoint.best:
            self.best = Best(self.run / "checkpoints" / f"best_{self.stage}", resume)
        skipped = torch.zeros((), device=self.device)
        in_a_row = torch.zeros((), device=self.device)
        self.watch.start(self.label, steps)
        method.train()
        note, began = "", time.perf_counter()
        log, looks = self._open_log("log.jsonl", first), self._open_log("probes.jsonl", first)
        with self._signals(), log, looks:
            for step in range(first, steps):
                lines: dict[str, Any] = {}
                for turn, name in enumerate(method.turns(step)):
                    player = players[name]
                    for other_name, other in players.items():
                        other.learns(other_name == name)
                    parts = self._turn(method, name, step, turn, task, pairs)
                    rounding = mix(recipe.seed, "stage", self.stage, "rounding", step, turn)
                    share = factor(recipe.schedule_of(name), step, steps)
                    norm, bad = player.update(share, self._join(player), key=rounding)
                    prepared.rest()
                    skipped += bad
                    in_a_row = (in_a_row + 1) * bad
                    lines.update({f"{name}/{k}": v for k, v in parts.items()})
                    lines[f"{name}/norm"] = norm
                gone = {local(p).data_ptr() for p in method.settle(step)}
                if gone:
                    for player in players.values():
                        player.forget(gone)
                if average is not None:
                    if gone:
                        average.forget(gone)
                    average.update()
                done = step + 1
                if done % probe_every == 0 or done == steps:
                    deep = done // probe_every % DEEP == 1 or done == steps
                    note = self._look(method, average, prober, task, done, looks, deep)
                if done % recipe.log.every == 0 or done == steps:
                    values = self._values(lines)
                    seconds = self.seconds + time.perf_counter() - began
                    line = {"step": done, "stage": self.stage, "seconds": round(seconds, 3), **values}
                    line["skipped"] = int(skipped)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    self.watch.advance(self.label, done, note or _brief(values))
                    if self._lost(int(in_a_row), done):
                        break
                stop = agree(self._stop.is_set())
                if stop or (done % every == 0 and done < steps):
                    self.seconds += time.perf_counter() - began
                    began = time.perf_counter()
                    if not int(in_a_row):  # a state that cannot go on is not worth keeping
                        self._keep(method, players, average, done)
                    if stop:
                        agree(True)  # nobody leaves while another still writes
                        raise Interrupted(self.resume_line)
        self.seconds += time.perf_counter() - began
        for player in players.values():
            player.learns(True)
        prepared.finish()
        if average is not None:
            average.apply()
        if self.best is not None:
            said = self.best.back(method.student)
            if said is not None:
                self._warn(said)
        if self.spread is not None:
            self.spread.restore(method.student)
            if isinstance(method.teacher, nn.Module):
                self.spread.restore(method.teacher)
        self.watch.finish(self.label)
        return method.student.eval()

    def _turn(
        self, method: Method, name: str, step: int, turn: int, task: Task, pairs: Pairs | None
    ) -> dict[str, Tensor]:
        recipe, parts = self.recipe, {}
        seed = mix(recipe.seed, "stage", self.stage)
        keys = (step, turn) if self.world.first else (step, turn, self.world.rank)
        self._seed(mix(seed, *keys))
        method.step = step
        accumulate = recipe.parallel.accumulate
        for part in range(accumulate):
            position = step * accumulate + part
            batch = self._batch(name, seed, position, turn, task, pairs)
            own = None if self.rows is None else (*self.rows, recipe.batch)
            rng = Rng(seed, "loss", step, turn, part, rows=own, device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision.dtype == "bfloat16"):
                loss = method.loss(name, batch, rng)
            weight = self._weight() / accumulate
            (loss.total if weight == 1 else loss.total * weight).backward()
            parts = loss.parts
        if self.spread is not None:
            self.spread.rest()
        return parts

    def _weight(self) -> float:
        """What this process's loss counts for in the mean over processes: 1 where all have as many rows."""
        if self.rows is None:
            return 1.0
        return self.world.size * (self.rows[1] - self.rows[0]) / self.recipe.batch

    def _join(self, player: Player) -> Tensor | None:
        """Give a player the gradients of all processes; their norm, where it is in parts."""
        if self.rows is None:
            return None
        mean_gradients([leaf for leaf, own in zip(player.leaves, player.parameters, strict=True) if leaf is own])
        if self.spread is None:
            return None
        sums = torch.zeros(2, device=self.device)  # of squares: of whole gradients, of parts
        for leaf, own in zip(player.leaves, player.parameters, strict=True):
            if leaf is not own:
                own.grad, leaf.grad = None if leaf.grad is None else local(leaf.grad), None
            if own.grad is not None and own.numel():
                sums[int(leaf is not own)] += own.grad.float().square().sum()
        everywhere = add_up(sums[1:].clone())
        return torch.sqrt(sums[0] + everywhere[0])

    def _values(self, lines: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a line of the log, over all processes."""
        if self.rows is None:
            return {k: float(v) for k, v in lines.items()}
        share = self._weight() / self.world.size
        own = {k: torch.as_tensor(v, device=self.device).float().reshape(()) for k, v in lines.items()}
        shares = torch.tensor([1 / self.world.size if k.endswith("/norm") else share for k in own], device=self.device)
        return dict(zip(own, add_up(torch.stack(list(own.values())) * shares).tolist(), strict=True))

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
            batch = pairs.batch(size, seed, position, self.rows)
        elif self.rows is None:
            batch = task.batch(size, seed, position, turn)
        else:
            batch = task.batch(size, seed, position, turn, rows=self.rows)
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def _prepare(self, method: Method) -> Prepared:
        """Networks as the recipe wants them held: spread or alike on all processes, in their precision."""
        precision, several = self.recipe.precision, self.world.size > 1
        if several and self.recipe.parallel.shard:
            for name in ("channels_last", "offload_teacher"):
                if getattr(precision, name):
                    raise Refused(f"parallel.shard does not go with precision.{name}: leave one of them out")
            if self.recipe.checkpoint.best:
                raise Refused("parallel.shard does not go with checkpoint.best: leave one of them out")
            if self.recipe.student.lora is not None:
                raise Refused("parallel.shard does not go with student.lora (shared weights): leave one of them out")
            self.spread = Spread(method, self.device)
        method.to(self.device)
        if several:
            begin_alike({k: v for k, v in learned(method).items() if first_row(v) is None})
        return Prepared(method, precision, self.device)

    # -- looking, logging, stopping ------------------------------------------------------------

    def _look(
        self, method: Method, average: Average | None, prober: Prober, task: Task, done: int, looks: Any, deep: bool
    ) -> str:
        if method.makes == "start":
            return ""
        with average.applied() if average is not None else contextlib.nullcontext():
            probe, samples = prober(method.student)
            if self.spread is not None:
                self.spread.rest()
            if self.best is not None:
                self.best.see(probe, method.student, done)
        found = self._diagnosis(method, task, done) if deep else None
        if not self.world.first:
            return ""
        line = {"step": done, "stage": self.stage, "probe": asdict(probe), "game": found}
        looks.write(json.dumps(finite(line)) + "\n")
        looks.flush()
        warning = probe.warning()
        if warning is not None:
            self._warn(f"step {done}: {warning}")
        pictures = task.pictures(samples)
        if pictures is not None:
            self._picture(pictures, done)
        return f"diversity {probe.diversity:.2f}, spread {probe.spread:.2f}"

    def _diagnosis(self, method: Method, task: Task, done: int) -> dict[str, Any] | None:
        """What a method says of its game, on one batch that is not trained on here."""
        batch = task.batch(min(self.recipe.batch, DEEP_ROWS), mix(self.recipe.seed, "diagnosis", self.stage), 0)
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        rng = Rng(self.recipe.seed, "diagnosis", self.stage, done, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision.dtype == "bfloat16"):
            found = method.diagnose(batch, rng)
        if self.spread is not None:
            self.spread.rest()
        return found

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

    def _lost(self, in_a_row: int, done: int) -> bool:
        """Whether updates are finite no more; Failed where no earlier student is kept to end with."""
        if in_a_row >= SKIPS_IN_A_ROW:
            if self.best is not None and self.best.kept():
                self.best.last = None
                self._warn(f"step {done}: {in_a_row} updates in a row were not finite")
                return True
            good = newest(self.run / "checkpoints")
            where = f"; the last good checkpoint is {good}" if good else ""
            raise Failed(f"{in_a_row} updates in a row were not finite at step {done}: lower optim.lr{where}")
        return False

    def _warn(self, line: str) -> None:
        if self.world.first:
            self.warnings.append(line)
            self.watch.say(line)

    def _can_go_on(self, problem: str) -> str:
        """A problem in one line, with what is left of the run and how it goes on."""
        good = newest(self.run / "checkpoints")
        if good is None:
            return f"{problem}; no checkpoint was written yet"
        return f"{problem}; {good.name} is whole: make room, then {self.resume_line or 'resume'}"

    def _open_log(self, name: str, first: int) -> Any:
        """A log, without lines beyond where a resumed run goes on; only the first process writes one."""
        if not self.world.first:
            return open(os.devnull, "w")
        file = self.run / name
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
        write_text(file, "".join(text + "\n" for text in kept))
        return file.open("a", encoding="utf-8")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint and an orderly end; the second time they do not ask.

        A launcher repeats to its processes what the terminal has sent them already: that is one time.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {}

        def ask(number: int, frame: Any) -> None:
            now = time.monotonic()
            if self._stop.is_set() and (self.world.size == 1 or now - self._asked > ECHO):
                raise KeyboardInterrupt
            self._asked = now
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    # -- checkpoints ----------------------------------------------------------------------------

    def _state(
        self, method: Method, players: dict[str, Player], average: Average | None
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that a run is, as this process has it; and the first row of those tensors that are parts."""
        out: dict[str, Tensor] = {}
        rows: dict[str, int] = {}

        def put(name: str, value: Tensor, like: Tensor) -> None:
            out[name], start = local(value), first_row(like)
            if start is not None:
                rows[name] = start

        for name, value in learned(method).items():
            put(f"method/{name}", value, value)
        for name, player in players.items():
            for key, value in player.state().items():
                leaf, own = (of[int(key.split("/")[0])] for of in (player.leaves, player.parameters))
                put(f"optim/{name}/{key}", value, leaf if value.shape == own.shape else value)
        if average is not None:
            weights = dict(method.student.named_parameters())
            for name, value in average.state().items():
                put(f"ema/{name}", value, weights[name])
        return out, rows

    def _keep(self, method: Method, players: dict[str, Player], average: Average | None, done: int) -> None:
        folder = self.run / "checkpoints"
        target = folder / f"stage_{self.stage}_step_{done:08d}"
        facts = {
            "stage": self.stage,
            "step": done,
            "seconds": self.seconds,
            "updates": average.updates if average else 0,
            "recipe": self.recipe.sha256,
            **self.made_of,
        }
        if self.spread is None and not self.world.first:
            return
        tensors, rows = self._state(method, players, average)
        try:
            save_state(target, tensors, facts, None if self.spread is None else rows)
        except Failed as error:
            raise Failed(self._can_go_on(str(error))) from error
        if self.world.first:
            for old in sorted(folder.glob("stage_*"))[: -self.recipe.checkpoint.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def _load(self, method: Method, players: dict[str, Player], average: Average | None) -> int:
        """Take up the newest whole checkpoint of this stage, of any number of processes; the step to go on at."""
        place = alone(self._find)
        state = None if place is None else open_state(File(place))
        if state is None:
            return 0
        facts = state.facts
        if facts["recipe"] != self.recipe.sha256:
            raise Refused(f"the recipe changed since {place}: resume with the recipe of the run, or take a new --out")
        for name, digest in self.made_of.items():
            if facts.get(name, digest) != digest:
                raise Refused(
                    f"the {name} changed since {place}: resume with the {name} of the run, or take a new --out"
                )
        with torch.no_grad():
            for name, value in learned(method).items():
                _fill(local(value), state, f"method/{name}", first_row(value))
            for name, player in players.items():
                head = f"optim/{name}/"
                found = {k: k.removeprefix(head).split("/") for k in state.names() if k.startswith(head)}
                held = {}
                for key, (index, what) in found.items():
                    leaf, own = player.leaves[int(index)], player.parameters[int(index)]
                    start = None if what == "step" else first_row(leaf)
                    held[f"{index}/{what}"] = (
                        state.read(key) if start is None else state.read(key, start, start + own.shape[0])
                    )
                player.load(held)
            if average is not None:
                average.updates = facts["updates"]
                weights = dict(method.student.named_parameters())
                for name, value in average.state().items():
                    _fill(value, state, f"ema/{name}", first_row(weights[name]))
        self.seconds = facts["seconds"]
        return int(facts["step"])

    def _find(self) -> str | None:
        """Where the newest whole checkpoint of this stage is; those that are not whole go."""
        for folder in sorted((self.run / "checkpoints").glob(f"stage_{self.stage}_*"), reverse=True):
            if open_state(folder) is not None:
                return str(folder)
            self.watch.say(f"{folder.name} is damaged: taking the one before")
            shutil.rmtree(folder, ignore_errors=True)
        return None


def _fill(value: Tensor, state: State, name: str, start: int | None) -> None:
    """Copy a tensor, or its rows from ``start``, out of a checkpoint."""
    value.copy_(state.read(name) if start is None else state.read(name, start, start + value.shape[0]))


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
        if open_state(candidate) is not None:
            return candidate
    return None


def _brief(values: dict[str, float]) -> str:
    shown = [f"{k} {v:.3g}" for k, v in values.items() if not k.endswith("/norm")]
    return ", ".join(shown[:3])
