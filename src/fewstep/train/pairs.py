"""Noise-image pairs, and the way between: where a teacher's sampler takes each noise, made once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from ..cond import Cond
from ..cond import rows as rows_of
from ..denoiser import Counted, Denoiser
from ..errors import Failed
from ..grid import grid
from ..method import Batch, PairOptions
from ..rng import Rng, mix
from ..solvers import sample, solver_named, start_noise, steps_of
from ..tasks.base import Picked, Task, epoch_rows
from ..tasks.shards import Shards, tensors_hash
from .processes import gather, world

SHARD = 2048
"""Rows of a shard of small samples: what a kill loses at most."""

NUMBERS = 2**20
"""Numbers of one sample kind in a shard; larger samples have fewer rows a shard."""

FORMAT = 2
"""Counted up when the same facts give other pairs."""


class Pairs:
    """Pairs on disk, mapped; shards that are missing are made.

    They stand in the cache that latents have as well (``tasks.shards``), named by the hash of all that a pair
    depends on: the teacher's weights and what is wrapped around them, the sampler with its times, the conditions,
    the seed. So a changed teacher, guidance or plan never meets old pairs, every method and run that wants the same
    ones finds them, and a run that was stopped goes on at the first missing shard. How many are wanted is no part of
    the name: more pairs go on from fewer. Several processes share the work, and the folder.

    With ``states`` the sampler's samples on the way are kept as well, in a folder of their own (``trajectories-``):
    pairs that are asked for later are read from there.

    ``teacher_hash`` is of the teacher's weights and of whatever else changes its answers and does not show in the
    denoiser (a pipeline's arguments). ``seconds`` is what making them took, now or when they were made.
    """

    def __init__(
        self,
        teacher: Denoiser,
        task: Task,
        options: PairOptions,
        folder: File | None,
        *,
        teacher_hash: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        states: bool = False,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        solver = solver_named(options.solver)
        self.times = times = grid(teacher.path, steps_of(solver, options.nfe), options.grid)
        self.path, self.states = teacher.path, states
        size = SHARD
        while size > 32 and size * torch.Size(task.shape).numel() > NUMBERS:
            size //= 2

        def make(rows: range, states: bool = False) -> dict[str, Tensor]:
            own = mix(seed, "pairs", rows.start // size)
            return made(teacher, task, solver, times, len(rows), own, device, states)

        facts = {
            "format": FORMAT,
            "teacher": teacher_hash,
            "around": around(teacher, task),
            "options": options.model_dump(mode="json", exclude={"count"}),
            "times": times.tolist(),
            "conditions": conditions_hash(task),
            "seed": seed,
            "shape": list(task.shape),
            "size": size,
            "device": torch.device(device).type,  # others round otherwise
        }
        whole = Shards(
            "trajectories", facts, options.count, partial(make, states=True), folder=folder, size=size, batch=size
        )
        ends = Shards("pairs", facts, options.count, make, folder=folder, size=size, batch=size)
        held = states or (folder is not None and all(whole.found(n) is not None for n in range(whole.number)))
        self.shards = whole if held else ends
        every = range(self.shards.number)
        for number in world().mine(every):
            self.shards.shard(number)
            if watch is not None:
                watch(min((number + 1) * size, options.count))
        gather(None)  # whoever is done waits for the others
        for number in every:
            if self.shards.found(number) is None:
                raise Failed(f"{self.shards.folder} lacks pairs of another process: all need one folder to share")
        self.seconds = self.shards.seconds

    def __len__(self) -> int:
        return len(self.shards)

    def batch(self, size: int, seed: int, step: int, rows: tuple[int, int] | None = None) -> Batch:
        """The pairs of a step: a pure function of (seed, step); with ``rows`` (start, stop) a part of them."""
        index = epoch_rows(len(self), size, mix(seed, "pairs"), step)
        if rows is not None:
            index = index[slice(*rows)]
        return self.rows(index)

    def rows(self, index: Tensor) -> Batch:
        """Some of the pairs, by number."""
        found = self.shards[index]
        cond: Cond = {k[5:]: v for k, v in found.items() if k.startswith("cond.")} or found.get("cond")
        pairs = Batch(found["target"], cond, found["noise"], found["target"])
        if not self.states:
            return pairs
        start = start_noise(self.path, float(self.times[0]), pairs.noise)
        way = [start[:, None], *([found["states"]] if "states" in found else []), found["target"][:, None]]
        return replace(pairs, states=torch.cat(way, 1), times=self.times)


@torch.inference_mode()
def made(
    teacher: Denoiser,
    task: Task,
    solver: Any,
    times: Tensor,
    count: int,
    seed: int,
    device: torch.device | str,
    states: bool = False,
) -> dict[str, Tensor]:
    """The rows of one shard: noise, where the sampler took it, under which condition; and its samples in between."""
    rng = Rng(seed, device=device)
    noise = rng.normal((count, *task.shape))
    index = torch.randint(len(task.train), (count,), generator=rng.shared)
    held = task.train.held_cond
    cond = rows_of(held, index) if held is None or isinstance(held, Tensor | dict) else held[index]
    ends, between = [], []
    for part in torch.arange(count).split(512):
        x = start_noise(teacher.path, float(times[0]), noise[part])
        way: list[Tensor] = []
        watch = (lambda i, x, way=way: way.append(x.cpu())) if states else None
        ends.append(sample(teacher, x, times, solver, cond=rows_of(cond, part), rng=rng.generator, watch=watch))
        between.append(way[:-1])
    found = {"noise": noise.cpu(), "target": torch.cat(ends).cpu()}
    if states and len(times) > 2:
        found["states"] = torch.cat([torch.stack(way, 1) for way in between])
    if isinstance(cond, dict):
        found.update({f"cond.{k}": v.cpu() for k, v in cond.items()})
    elif cond is not None:
        found["cond"] = cond.cpu()
    return found


def around(denoiser: Any, task: Task) -> list[str]:
    """What turns a teacher's weights into its guesses: wrappers with their settings, and what guidance is against."""
    found: list[str] = []
    first = torch.zeros(1, dtype=torch.long)
    while isinstance(denoiser, nn.Module):
        if not isinstance(denoiser, Counted):
            plain = {k: v for k, v in vars(denoiser).items() if isinstance(v, str | int | float | tuple | None)}
            settings = sorted((k, v) for k, v in plain.items() if k[:1] != "_" and k != "training")
            path = getattr(denoiser, "path", None)
            found.append(f"{type(denoiser).__name__} {settings} {'' if path is None else path.model_dump_json()}")
            negative = getattr(denoiser, "negative", None)
            if callable(negative):
                cond = negative(task.train.rows(first).cond)
                found.append(tensors_hash(cond if isinstance(cond, dict) else {} if cond is None else {"": cond}))
        denoiser = getattr(denoiser, "inner", None)
    return found


def conditions_hash(task: Task) -> str | None:
    """SHA-256 of the conditions that pairs draw from, without making those that are made when they are asked for."""
    held = task.train.held_cond
    if held is None:
        return None
    if isinstance(held, Picked) and isinstance(held.source, Shards):
        return tensors_hash({"index": held.index}, held.source.key)
    whole = held if isinstance(held, Tensor | dict) else held[:]
    return tensors_hash(whole if isinstance(whole, dict) else {"": whole})
