"""Noise-image pairs: where a teacher's sampler takes each noise, made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from ..cond import Cond
from ..cond import rows as rows_of
from ..denoiser import Denoiser
from ..errors import Failed
from ..grid import grid
from ..method import Batch, PairOptions
from ..rng import Rng, mix
from ..solvers import sample, solver_named, start_noise, steps_of
from ..tasks.base import Task, epoch_rows
from .processes import gather, world
from .store import load_state, save_state

SHARD = 2048


class Pairs:
    """Pairs in memory, read from shards that are made where they are missing.

    The folder's name is the hash of all that the pairs depend on, so a changed teacher or plan never meets
    old pairs; a run that was stopped goes on at the first missing shard. Several processes share the work, and the
    folder.
    """

    def __init__(
        self,
        teacher: Denoiser,
        task: Task,
        options: PairOptions,
        folder: File,
        *,
        teacher_hash: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        watch: Callable[[int], None] | None = None,
    ) -> None:
        solver = solver_named(options.solver)
        times = grid(teacher.path, steps_of(solver, options.nfe), options.grid)
        facts = {
            "teacher": teacher_hash,
            "options": options.model_dump(),
            "times": times.tolist(),
            "seed": seed,
            "shape": list(task.shape),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / f"pairs-{digest}"
        held: dict[int, dict[str, Tensor]] = {}
        shards = list(enumerate(range(0, options.count, SHARD)))
        for shard, begin in world().mine(shards):
            count = min(SHARD, options.count - begin)
            place = self.folder / f"{shard:05d}"
            found = load_state(place)
            if found is None:
                held[shard] = self._make(teacher, task, solver, times, count, mix(seed, "pairs", shard), device)
                save_state(place, held[shard], facts)
            else:
                held[shard] = found[0]
            if watch is not None:
                watch(begin + count)
        gather(None)  # whoever is done waits for the others
        for shard, _ in shards:
            if shard not in held:
                found = load_state(self.folder / f"{shard:05d}")
                if found is None:
                    raise Failed(f"{self.folder} lacks pairs of another process: all need one folder to share")
                held[shard] = found[0]
        parts = [held[shard] for shard, _ in shards]
        self.noise, self.target = (torch.cat([p[k] for p in parts]) for k in ("noise", "target"))
        keys = [k for k in parts[0] if k.startswith("cond")]
        joined = {k: torch.cat([p[k] for p in parts]) for k in keys}
        self.cond: Cond = None
        if keys:
            self.cond = joined["cond"] if keys == ["cond"] else {k[5:]: v for k, v in joined.items()}

    @staticmethod
    @torch.inference_mode()
    def _make(
        teacher: Denoiser, task: Task, solver: Any, times: Tensor, count: int, seed: int, device: torch.device | str
    ) -> dict[str, Tensor]:
        rng = Rng(seed, device=device)
        noise = rng.normal((count, *task.shape))
        index = torch.randint(len(task.train), (count,), generator=rng.shared)
        cond = rows_of(task.train.cond, index)
        ends = []
        for part in torch.arange(count).split(512):
            x = start_noise(teacher.path, float(times[0]), noise[part])
            ends.append(sample(teacher, x, times, solver, cond=rows_of(cond, part), rng=rng.generator))
        made = {"noise": noise.cpu(), "target": torch.cat(ends).cpu()}
        if isinstance(cond, dict):
            made.update({f"cond.{k}": v.cpu() for k, v in cond.items()})
        elif cond is not None:
            made["cond"] = cond.cpu()
        return made

    def __len__(self) -> int:
        return len(self.noise)

    def batch(self, size: int, seed: int, step: int, rows: tuple[int, int] | None = None) -> Batch:
        """The pairs of a step: a pure function of (seed, step); with ``rows`` (start, stop) a part of them."""
        index = epoch_rows(len(self), size, mix(seed, "pairs"), step)
        if rows is not None:
            index = index[slice(*rows)]
        target = self.target[index]
        return Batch(target, rows_of(self.cond, index), self.noise[index], target)
