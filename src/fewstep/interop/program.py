"""A student's sampler as one graph: the network, and a table of numbers.

A few-step sampler is linear but for its network. Every call reads a weighted sum of the first noise, the answers so
far and the noises drawn between steps, and so is the sample. The weights follow from path, prediction, step times and
policy; they are read off here by running the student's own ``generate`` on unit vectors.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from ..denoiser import Wrapped
from ..errors import Refused
from ..rng import Rng
from ..student import Student
from .plain import inner_network, stock_noise, wrapped

SMALL = 1e-14  # of the largest weight: what cancelled


class Draws(Rng):
    """A source that hands out draws made beforehand, in order."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = list(draws)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self.draws.pop(0)


class _Probe(nn.Module):
    """Stands for the network: answers its n-th call with the n-th unit vector, and keeps what it was asked."""

    def __init__(self, reads_s: bool) -> None:
        super().__init__()
        self.reads_s = reads_s
        self.asked: list[tuple[Tensor, float, float | None]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        self.asked.append((x[0], float(time[0]), None if span is None else float(span[0])))
        answer = torch.zeros_like(x)
        answer[:, len(self.asked)] = 1
        return answer


@dataclass(frozen=True)
class Table:
    """A sampler of n calls as numbers.

    Weights stand on (noise, answers 1..n, draws 2..n): ``entries[i]`` make what call i reads, ``sample`` makes the
    sample. ``clocks`` and ``spans`` are what the network is told of the time; ``draws`` counts the noises that are
    drawn between the steps.
    """

    entries: tuple[tuple[float, ...], ...]
    clocks: tuple[float, ...]
    spans: tuple[float | None, ...]
    sample: tuple[float, ...]
    draws: int


def table_of(student: Student, steps: int) -> Table:
    """The table of one step count; Refused for one that the student does not serve.

    One step of a consistency function from sigma = 1, for which ``c_skip = c_out = 1/2`` up to the root:

    >>> from fewstep.path import Exploding
    >>> one = Wrapped(nn.Identity(), Exploding(sigma_max=1.0), "edm", "log_sigma/4")
    >>> [round(w, 6) for w in table_of(Student(one, (2,)), 1).sample]
    [0.5, 0.707107]
    """
    stock_noise(student)
    one = wrapped(student)
    try:
        count = len(student.times(steps))
    except ValueError as error:
        raise Refused(str(error)) from None
    size = 2 * count

    def run(dtype: torch.dtype) -> tuple[_Probe, Tensor, int]:
        probe = _Probe(bool(getattr(one.net, "reads_s", False)))
        around = Wrapped(
            probe,
            one.path,
            one.prediction,
            one.clock,
            scale_input=one.scale_input,
            data_std=one.data_std,
            boundary=one.boundary,
        )
        twin = Student(
            around,
            (size,),
            start=student.start,
            start_scale=student.start_scale,
            steps=student.steps,
            policy=student.policy,
        )
        unit = torch.eye(size, dtype=dtype)
        source = Draws([unit[1 + count + i : 2 + count + i] for i in range(count - 1)])
        sample = twin.generate(unit[:1], None, source, steps)
        return probe, sample[0], count - 1 - len(source.draws)

    exact, sample, draws = run(torch.float64)
    told, _, _ = run(torch.float32)  # the clock as the student itself rounds it
    return Table(
        tuple(_weights(entry) for entry, _, _ in exact.asked),
        tuple(clock for _, clock, _ in told.asked),
        tuple(span for _, _, span in told.asked),
        _weights(sample),
        draws,
    )


def _weights(row: Tensor) -> tuple[float, ...]:
    least = SMALL * float(row.abs().max())
    return tuple(0.0 if abs(w) <= least else w for w in row.tolist())


def _summed(weights: Sequence[float], basis: Sequence[Tensor | None]) -> Tensor:
    terms = [v if w == 1 else w * v for w, v in zip(weights, basis, strict=True) if w != 0 and v is not None]
    return functools.reduce(torch.add, terms) if terms else torch.zeros_like(_first(basis))


def _first(basis: Sequence[Tensor | None]) -> Tensor:
    noise = basis[0]
    assert noise is not None
    return noise


@dataclass(frozen=True)
class Input:
    """One input of a program: ``shape`` is of one row; ``key`` is its name in the condition, None for a noise."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    key: str | None = None


class Program(nn.Module):
    """``program(noise, labels=..., noise_2=...)``: a sample from noise, with nothing left to chance.

    Conditions are inputs by the names of the network's own arguments (``labels`` where they are labels); a student
    that renoises between steps takes its draws as ``noise_2``, ``noise_3``, ... ``decode`` follows the sample.
    """

    def __init__(self, student: Student, steps: int, cond: Cond = None, decode: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.decode = wrapped(student).net, decode
        self.steps, self.table = steps, table_of(student, steps)
        self.single = isinstance(cond, Tensor)
        float32, shape = torch.float32, tuple(student.shape)
        self.inputs = (
            Input("noise", float32, shape),
            *_condition_inputs(self.net, cond),
            *(Input(f"noise_{i + 2}", float32, shape) for i in range(self.table.draws)),
        )
        # torch.export names inputs by the signature, and stumbles over **named
        sample: Any = functools.partial(self.sample)
        kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD, *[inspect.Parameter.KEYWORD_ONLY] * (len(self.inputs) - 1)]
        named = zip(self.inputs, kinds, strict=True)
        sample.__signature__ = inspect.Signature([inspect.Parameter(one.name, kind) for one, kind in named])
        self.forward = sample

    def sample(self, noise: Tensor, **named: Tensor) -> Tensor:
        """What ``forward`` does."""
        table, count = self.table, len(self.table.entries)
        drawn = [named[f"noise_{i + 2}"] for i in range(table.draws)]
        basis: list[Tensor | None] = [noise, *[None] * count, *drawn, *[None] * (count - 1 - len(drawn))]
        conditions = {one.key: named[one.name] for one in self.inputs if one.key is not None}
        cond: Any = None
        if conditions:
            cond = next(iter(conditions.values())) if self.single else conditions
        for i, weights in enumerate(table.entries):
            entry = _summed(weights, basis)
            time = noise.new_full((noise.shape[0],), table.clocks[i])
            span = table.spans[i]
            if span is None:
                basis[1 + i] = self.net(entry, time, cond)
            else:
                basis[1 + i] = self.net(entry, time, cond, noise.new_full((noise.shape[0],), span))
        sample = _summed(table.sample, basis)
        return sample if self.decode is None else self.decode(sample)


def _condition_inputs(net: nn.Module, cond: Cond) -> Iterator[Input]:
    if cond is None:
        return
    if isinstance(cond, Tensor):
        name = next(iter(getattr(net, "conditions", ())), "cond")
        labels = cond.ndim == 1 and not cond.is_floating_point()
        yield Input("labels" if labels else _plain_name(name), cond.dtype, tuple(cond.shape[1:]), name)
        return
    for key, value in cond.items():
        yield Input(_plain_name(key), value.dtype, tuple(value.shape[1:]), key)


def _plain_name(name: str) -> str:
    return re.sub(r"\W", "_", name)


class Decoder(nn.Module):
    """Latents to pixels: ``vae.decode(z / scale + shift)``."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(getattr(vae.config, "scaling_factor", 1.0) or 1.0)
        self.shift = float(getattr(vae.config, "shift_factor", 0.0) or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return pixels


def traced(program: Program, cond: Cond = None) -> torch.export.ExportedProgram:
    """The program as a graph with a free batch. Refused, with the reason, where it cannot be traced.

    ``cond`` are a few rows of a condition, of which the shape and the type count.
    """
    batch = torch.export.Dim("batch", min=1)
    rows = 3  # neither 0 nor 1, which a trace takes for constants
    noise = torch.zeros((rows, *program.inputs[0].shape))
    named: dict[str, Tensor] = {}
    for one in program.inputs[1:]:
        value = torch.zeros((rows, *one.shape), dtype=one.dtype)
        if one.key is not None and cond is not None:
            given = cond if isinstance(cond, Tensor) else cond[one.key]
            value = given[torch.arange(rows) % len(given)].clone()
        named[one.name] = value
    shapes = {one.name: {0: batch} for one in program.inputs}
    try:
        with torch.no_grad(), _free_batch(program):
            return torch.export.export(program, (noise,), named, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever a stranger's network provokes
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")[:200]
        name = type(inner_network(program.net)).__name__
        raise Refused(
            f"{name} cannot be traced as one program ({type(error).__name__}: {line}): keep the student's folder, "
            "or take --to diffusers"
        ) from None


@contextmanager
def _free_batch(program: nn.Module) -> Iterator[None]:
    """Take the branch on the size of the batch out of diffusers' upsampling while a network is traced.

    From 64 rows on it makes its input contiguous, which changes no value; a trace would hold fast to the side
    that it saw, and serve no batch of the other.
    """
    changed: list[nn.Module] = []
    for module in program.modules():
        if type(module).__name__ == "Upsample2D" and type(module).__module__.startswith("diffusers."):
            if module.norm is None and not module.use_conv_transpose and module.interpolate:
                module.forward = functools.partial(_upsample, module)  # type: ignore[assignment]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _upsample(module: Any, hidden_states: Tensor, output_size: Any = None) -> Tensor:
    if output_size is None:
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
    else:
        hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
    if not module.use_conv:
        return hidden_states
    convolved: Tensor = (module.conv if module.name == "conv" else module.Conv2d_0)(hidden_states)
    return convolved
