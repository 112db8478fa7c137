"""Who is measured, and drawing many samples from it with every call counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cond import Cond, move, rows
from ..denoiser import Counted, Denoiser
from ..errors import Refused
from ..grid import grid
from ..rng import Rng
from ..solvers import sample, solver_named, start_noise
from ..student import Student
from ..train.processes import World, gather, in_turn, world
from .protocol import Protocol

SOLVER_TITLES = {"euler": "Euler (DDIM)", "heun": "Heun", "dpm2m": "DPM-Solver++ 2M"}


@dataclass(frozen=True)
class Candidate:
    """A network and the way to draw from it: a row of the table."""

    model: str
    title: str
    nfe: int
    network: nn.Module
    draw: Callable[[Any, Tensor, Cond, Rng], Tensor]
    solver: str | None = None

    @property
    def device(self) -> torch.device:
        first = next((p for p in (*self.network.parameters(), *self.network.buffers())), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())


def of_student(student: Student, steps: int, name: str | None = None) -> Candidate:
    """A student at one of its step counts."""
    calls = "1 call" if steps == 1 else f"{steps} calls"
    return Candidate(
        "student" if name is None else f"student:{name}",
        f"{'Student' if name is None else name}, {calls}",
        len(student.times(steps)),
        student,
        lambda network, noise, cond, rng: network.generate(noise, cond, rng, steps),
    )


def of_teacher(teacher: Denoiser, solver: str, nfe: int, protocol: Protocol, full: bool = False) -> Candidate | None:
    """A teacher under a sampler with exactly ``nfe`` calls; None where no number of steps makes so many."""
    rule = solver_named(solver)
    steps = rule.steps_for(nfe)
    if steps is None:
        return None
    times = tuple(grid(teacher.path, steps, protocol.grid).tolist())

    def draw(network: Any, noise: Tensor, cond: Cond, rng: Rng) -> Tensor:
        return sample(network, start_noise(network.path, times[0], noise), times, rule, cond=cond, rng=rng)

    name = SOLVER_TITLES.get(solver, solver)
    title = f"Teacher, {name}, {nfe} call{'s' if nfe > 1 else ''}"
    return Candidate("teacher" if full else f"teacher:{solver}", title, nfe, teacher, draw, solver)


def full_teacher(teacher: Denoiser, protocol: Protocol) -> Candidate:
    """The teacher's own sampler at its full number of calls."""
    found = of_teacher(teacher, protocol.full_solver, protocol.full_nfe, protocol, full=True)
    if found is None:
        asked = f"{protocol.full_solver} cannot take exactly {protocol.full_nfe} calls"
        raise Refused(f"{asked}: pass {protocol.full_nfe - 1} or {protocol.full_nfe + 1}")
    return found


def counted(network: Any) -> tuple[Any, Counted]:
    """A shallow copy of a student or a denoiser whose innermost denoiser counts; the original is not touched.

    The counter sits inside every wrapper, so that guidance is seen to cost what it costs.
    """
    name = "denoiser" if isinstance(network, Student) else "inner"
    inner = getattr(network, name, None)
    if not isinstance(inner, Denoiser):
        counter = Counted(network)
        return counter, counter
    twin = copy.copy(network)
    twin.__dict__["_modules"] = dict(network._modules)
    changed, counter = counted(inner)
    setattr(twin, name, changed)
    return twin, counter


@dataclass(frozen=True)
class Chunk:
    """Rows of one draw: its noise and condition, and the keys of what else is random in it."""

    noise: Tensor
    cond: Cond
    keys: tuple[int | str, ...]


@dataclass(frozen=True)
class Drawn:
    """Samples of a chunk on the CPU, the calls that each of them cost, and what was read off them."""

    samples: Tensor
    calls: float
    features: Tensor | None = None
    seen: Tensor | None = None


def draws(
    candidate: Candidate,
    chunks: list[Chunk],
    read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]] | None = None,
    told: Callable[[int], None] | None = None,
    *,
    shared: bool = True,
) -> Iterator[Drawn]:
    """Draw each chunk, in order; ``read`` finishes samples and takes their features, beside the drawing.

    On a CPU the chunks are spread over as many workers as torch has threads, one thread each: several small
    batches side by side are faster than one whose every layer is split, above all on a busy machine.

    Several processes call together with the same chunks; each draws its own and all get everything, the same as
    one process would have drawn. ``shared=False``: each draws all of them, to be timed.
    """
    device = candidate.device
    here = world() if shared else World()

    def run(chunk: Chunk) -> Drawn:
        with torch.inference_mode():
            network, counter = counted(candidate.network)
            rng = Rng(*chunk.keys, device=device)
            x = candidate.draw(network, chunk.noise.to(device), move(chunk.cond, device), rng)
            x, calls = x.float().cpu(), counter.images / len(chunk.noise)
            if read is None:
                return Drawn(x, calls)
            finished, features, seen = read(x)
            return Drawn(finished, calls, features, seen)

    def tell(found: Drawn) -> Drawn:
        if told is not None:
            told(round(found.calls * len(found.samples)))
        return found

    threads = torch.get_num_threads()
    side_by_side = device.type == "cpu" and threads > 1 and len(chunks) > 1  # of all chunks: each is drawn alike
    drawn = _side_by_side(run, here.mine(chunks), threads) if side_by_side else map(run, here.mine(chunks))
    if here.size == 1:
        yield from map(tell, drawn)
        return
    for found in in_turn(gather(list(drawn))):
        yield tell(found)


def _side_by_side(run: Callable[[Chunk], Drawn], chunks: list[Chunk], threads: int) -> Iterator[Drawn]:
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(run, chunks)
    finally:
        torch.set_num_threads(threads)


def chunks_of(noise: Tensor, cond: Cond, batch: int, *keys: int | str) -> list[Chunk]:
    """Noise [n, *shape] and its condition, cut into batches; each has its own source of further draws."""
    return [
        Chunk(noise[start : start + batch], rows(cond, slice(start, start + batch)), (*keys, start))
        for start in range(0, len(noise), batch)
    ]
