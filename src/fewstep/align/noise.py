"""The initial noise as what is optimised: rewards and targets through a generator of one step or a few.

ReNO (Eyring et al. 2024, https://arxiv.org/abs/2406.04312) and DITTO-2 (Novack et al. 2024,
https://arxiv.org/abs/2405.20289) are one loop that differs in its loss, its prior on the noise and its decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cond import Cond, rows
from ..errors import Failed, Refused
from ..part import Part
from ..rng import Rng
from ..student import Student

Generator = Callable[[Tensor, Cond], Tensor]
RENO_SIZE = 4 * 64 * 64
"""Numbers in the latents for which ReNO's learning rate of 5 was chosen."""


def norm_penalty(noise: Tensor) -> Tensor:
    """``||z||^2 / 2 - (d - 1) log ||z||`` of each row: [batch], at least float32 (ReNO, eq. 4).

    The negative log-density, up to a constant, of the length of d independent standard normals; its minimum is at
    ``||z|| = sqrt(d - 1)``. That length is about ``sqrt(d - 1/2)`` with a standard deviation of ``1 / sqrt(2)``,
    whatever d is.
    """
    length = _length(noise)
    return length.square() / 2 - (noise[0].numel() - 1) * length.log()


def on_shell(noise: Tensor) -> Tensor:
    """Each row rescaled to ``||z|| = sqrt(d)``.

    >>> on_shell(torch.tensor([[3.0, -3.0]]))
    tensor([[ 1., -1.]])
    """
    scale = math.sqrt(noise[0].numel()) / _length(noise)
    return (noise * scale.view(-1, *[1] * (noise.ndim - 1))).to(noise.dtype)


def _length(noise: Tensor) -> Tensor:
    """The norm of each row; in float16 its square would overflow from 65 thousand numbers on."""
    return torch.linalg.vector_norm(noise.flatten(1), dim=1, dtype=torch.promote_types(noise.dtype, torch.float32))


@dataclass(frozen=True)
class Reward:
    """What is wanted of a sample: ``of(x, cond) -> [batch]``, higher is better, and how much it counts."""

    of: Callable[[Tensor, Cond], Tensor]
    weight: float = 1.0


def target(feature: Callable[[Tensor], Tensor], wanted: Tensor, weight: float = 1.0) -> Reward:
    """A reward that is 0 at the target: ``-||wanted - feature(x)||`` of each row (DITTO-2).

    ``feature`` is anything differentiable: a mask (in- and outpainting), a smoothed loudness curve, a chroma.
    ``wanted`` is like ``feature(x)``, with one row for all or one for each.
    """

    def of(x: Tensor, cond: Cond) -> Tensor:
        return -torch.linalg.vector_norm((wanted.to(x.device) - feature(x)).flatten(1), dim=1)

    return Reward(of, weight)


class NoiseOptions(Part):
    """How the noise moves. The defaults are ReNO's; ``DITTO2`` are the other paper's."""

    iterations: int = Field(50, ge=1, description="looks at the reward; the last one is not followed by a step")
    optimiser: Literal["nesterov", "adam"] = Field("nesterov", description="how gradients become steps")
    rate: float | None = Field(
        None, gt=0, allow_inf_nan=False,
        description="learning rate; none: 5 sqrt(d / 16384), which makes a clipped step the same share of the norm",
    )  # fmt: skip
    momentum: float = Field(0.9, ge=0, lt=1, description="of nesterov")
    clip: float | None = Field(0.1, gt=0, description="largest gradient norm of a row; none: no limit")
    prior: Literal["norm", "sphere", "none"] = Field(
        "norm", description="norm: the penalty on each row's length; sphere: length sqrt(d) after every step"
    )
    gamma: float = Field(0.01, ge=0, allow_inf_nan=False, description="weight of the penalty")
    stop: float | None = Field(None, description="a row whose reward has reached this is finished")
    chunk: int | None = Field(None, ge=1, description="rows at a time, which bounds the memory; none: all")
    seed: int = Field(0, ge=0, description="of what the generator draws: the same in every iteration")


RENO = NoiseOptions()
DITTO2 = NoiseOptions(iterations=100, optimiser="adam", rate=5e-3, clip=None, prior="none")


@dataclass(frozen=True)
class Found:
    """The best noise of each row, by the reward without the prior, and what it gives.

    ``noise`` [batch, ...]; ``sample`` what it decodes to; ``reward``, ``first`` the weighted sum of the rewards at it
    and at the start, through the generator that was optimised; ``decoded`` the same of ``sample``; ``rewards``,
    ``held_out`` each reward of ``sample`` by name; ``best`` the iteration at which each row's was found; ``history``
    [iterations, batch], a row's last value repeated once it has finished; ``calls`` of the generator for a row, those
    of decoding included.
    """

    noise: Tensor
    sample: Tensor
    reward: Tensor
    first: Tensor
    decoded: Tensor
    rewards: dict[str, Tensor]
    held_out: dict[str, Tensor]
    best: Tensor
    history: Tensor
    calls: int

    @property
    def gap(self) -> Tensor:
        """The surrogate gap: by how much decoding lost reward against the generator that was optimised."""
        return self.reward - self.decoded

    @property
    def shell(self) -> Tensor:
        """Where each row's length stands among those of standard normals, in their standard deviations."""
        return (_length(self.noise) - math.sqrt(self.noise[0].numel() - 0.5)) * math.sqrt(2)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to beware of."""
        found = []
        if len(self.rewards) == 1 and not self.held_out:
            found.append("one reward and none held out: a rise may be an exploit of it")
        if float(self.shell.abs().max()) > 3:
            found.append(f"a noise is {float(self.shell.abs().max()):.1f} standard deviations off the shell")
        return tuple(found)


class NoiseOptimiser:
    """Finds, for each row, the noise from which a generator makes what is wanted.

        minimise over z  -sum_j weight_j reward_j(G(z, cond), cond) + gamma prior(z)

    by gradient through the generator, whose weights stay as they are. Every row has its own gradient, clipped by its
    own norm, its own best iterate and its own end: a batch gives what its rows alone would give.

    Parameters
    ----------
    generator: a ``Student``, asked for ``steps`` steps, or any differentiable ``(noise, cond) -> x``.
    rewards: by name; a plain function counts as a ``Reward`` of weight 1.
    options: ``RENO``, ``DITTO2``, or others.
    held_out: rewards that are reported and never optimised. One reward alone gets exploited.
    decode: how the noise found becomes the sample: a student's number of steps, or a function like the generator;
        None: the generator itself. Several steps follow the flow: a student that renoises between steps would lose what
        was found, and is refused.
    watch: hears every iteration's number and its rewards [rows].

    A student is frozen and in evaluation mode while it is asked. Raises Refused for a reward of another shape than
    [batch] or without a gradient; Failed where a row's reward is never finite.

    >>> ones = NoiseOptimiser(lambda noise, cond: noise, {"mean": lambda x, cond: x.mean(1)})
    >>> found = ones(torch.zeros(2, 3) + 0.1)
    >>> bool((found.reward > found.first).all()), found.history.shape, found.calls
    (True, torch.Size([50, 2]), 50)
    """

    def __init__(
        self,
        generator: Student | Generator,
        rewards: Mapping[str, Reward | Callable[[Tensor, Cond], Tensor]],
        options: NoiseOptions = RENO,
        *,
        held_out: Mapping[str, Callable[[Tensor, Cond], Tensor]] | None = None,
        steps: int = 1,
        decode: int | Generator | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        if not rewards:
            raise Refused("nothing to optimise: give at least one reward")
        self.rewards = {name: r if isinstance(r, Reward) else Reward(r) for name, r in rewards.items()}
        self.held_out = {name: Reward(of) for name, of in (held_out or {}).items()}
        self.options, self.watch = options, watch
        self.student = generator if isinstance(generator, Student) else None
        self.generate, self.cost = self._asked(generator, steps)
        self.decode: Generator | None = None
        self.decode_cost = 0
        if callable(decode):
            self.decode, self.decode_cost = decode, 1
        elif decode is not None and not (self.student is not None and decode == steps):
            if self.student is None:
                raise Refused(f"decode = {decode} steps needs a student: give a function that decodes")
            if self.student.policy == "renoise" and decode > 1:
                raise Refused(
                    f"decoding in {decode} steps would renoise what was found: a student of policy 'ode', or steps = "
                    f"{decode} as well"
                )
            self.decode, self.decode_cost = self._asked(self.student, decode)

    def _asked(self, generator: Student | Generator, steps: int) -> tuple[Generator, int]:
        if not isinstance(generator, Student):
            return generator, 1
        student, seed = generator, self.options.seed
        student.times(steps)

        def generate(noise: Tensor, cond: Cond) -> Tensor:
            rng = Rng(seed, "noise optimiser", device=noise.device) if student.policy == "renoise" else None
            return student.generate(noise, cond, rng, steps)

        return generate, steps

    def __call__(self, noise: Tensor, cond: Cond = None) -> Found:
        """The best noise near ``noise`` [batch, ...], standard normal, for the conditions."""
        size = self.options.chunk or len(noise)
        parts = []
        with self._still():
            for start in range(0, len(noise), size):
                part = slice(start, start + size)
                parts.append(self._found(noise[part], rows(cond, part)))
        return _joined(parts)

    def _found(self, noise: Tensor, cond: Cond) -> Found:
        o = self.options
        wide = torch.promote_types(noise.dtype, torch.float32)
        z = noise.detach().to(wide, copy=True)
        if o.prior == "sphere":
            z = on_shell(z)
        z.requires_grad_(True)
        optimiser = self._optimiser(z)
        count, device = len(z), z.device
        best = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        found = torch.zeros(count, dtype=torch.long, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        kept, made = z.detach().clone(), torch.empty(0)
        history: list[Tensor] = []
        for i in range(o.iterations):
            x = self._draw(self.generate, z.to(noise.dtype), cond)
            reward = self._total(x, cond)
            if not reward.requires_grad:
                raise Refused("no gradient reaches the noise: rewards and generator must be differentiable")
            now = reward.detach().double()
            with torch.no_grad():
                # of equal rewards the later one, which has moved towards the prior
                better = (now >= best) & ~done
                best, found = torch.where(better, now, best), torch.where(better, i, found)
                kept = torch.where(_rows_of(better, z), z, kept)
                made = x.detach().clone() if i == 0 else torch.where(_rows_of(better, x), x, made)
            history.append(torch.where(done, history[-1], now) if history else now)
            if self.watch is not None:
                self.watch(i, history[-1])
            if o.stop is not None:
                done = done | (now >= o.stop)
                if bool(done.all()):
                    break
            if i == o.iterations - 1:
                break
            loss = -reward.to(wide)
            if o.prior == "norm":
                loss = loss + o.gamma * norm_penalty(z)
            (slope,) = torch.autograd.grad(loss.sum(), z)
            z.grad = self._clipped(slope)
            optimiser.step()
            if o.prior == "sphere":
                with torch.no_grad():
                    z.copy_(on_shell(z))
        if not bool(best.isfinite().all()):
            row = int((~best.isfinite()).nonzero()[0])
            raise Failed(f"the reward of row {row} is not finite at any of {len(history)} iterations")
        return self._report(kept.to(noise.dtype), made, cond, best, history, found)

    @torch.no_grad()
    def _report(
        self, noise: Tensor, made: Tensor, cond: Cond, best: Tensor, history: list[Tensor], found: Tensor
    ) -> Found:
        sample = made if self.decode is None else self._draw(self.decode, noise, cond)
        rewards = {name: self._one(name, r, sample, cond) for name, r in self.rewards.items()}
        return Found(
            noise=noise,
            sample=sample,
            reward=best,
            first=history[0],
            decoded=torch.stack([self.rewards[name].weight * v.double() for name, v in rewards.items()]).sum(0),
            rewards=rewards,
            held_out={name: self._one(name, r, sample, cond) for name, r in self.held_out.items()},
            best=found,
            history=torch.stack(history),
            calls=len(history) * self.cost + self.decode_cost,
        )

    def _optimiser(self, z: Tensor) -> torch.optim.Optimizer:
        o = self.options
        rate = 5 * math.sqrt(z[0].numel() / RENO_SIZE) if o.rate is None else o.rate
        if o.optimiser == "adam":
            return torch.optim.Adam([z], rate)
        return torch.optim.SGD([z], rate, momentum=o.momentum, nesterov=o.momentum > 0)

    def _total(self, x: Tensor, cond: Cond) -> Tensor:
        return torch.stack([r.weight * self._one(name, r, x, cond) for name, r in self.rewards.items()]).sum(0)

    @staticmethod
    def _one(name: str, reward: Reward, x: Tensor, cond: Cond) -> Tensor:
        value = reward.of(x, cond)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Refused(f"reward {name!r} must give one number a row, [{len(x)}], got {given}")
        return value

    def _clipped(self, slope: Tensor) -> Tensor:
        """Each row's gradient, its norm held; a row whose gradient is not finite stands still."""
        flat = slope.flatten(1)
        fine = flat.isfinite().all(1)
        slope = torch.where(_rows_of(fine, slope), slope, 0.0)
        if self.options.clip is None:
            return slope
        scale = (self.options.clip / _length(slope).clamp(min=1e-30)).clamp(max=1)
        return slope * _rows_of(scale, slope)

    def _draw(self, generate: Generator, noise: Tensor, cond: Cond) -> Tensor:
        """The generator's answer, with the same draws each time it is asked."""
        devices = [noise.device] if noise.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.options.seed)
            return generate(noise, cond)

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Freeze the student meanwhile: gradients go to the noise alone, and no dropout draws."""
        student: nn.Module = self.student if self.student is not None else nn.Module()
        learning = [p for p in student.parameters() if p.requires_grad]
        modes = [(module, module.training) for module in student.modules()]
        try:
            student.eval()
            for p in learning:
                p.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for p in learning:
                p.requires_grad_(True)
            for module, mode in modes:
                module.training = mode


def _rows_of(flag: Tensor, like: Tensor) -> Tensor:
    return flag.view(-1, *[1] * (like.ndim - 1))


def _joined(parts: list[Found]) -> Found:
    if len(parts) == 1:
        return parts[0]
    longest = max(len(part.history) for part in parts)
    histories = [torch.cat([p.history, p.history[-1:].expand(longest - len(p.history), -1)]) for p in parts]
    whole: dict[str, object] = {"history": torch.cat(histories, 1), "calls": max(p.calls for p in parts)}
    for name in (f.name for f in fields(Found) if f.name not in whole):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], dict):
            whole[name] = {key: torch.cat([v[key] for v in values]) for key in values[0]}
        else:
            whole[name] = torch.cat(values)
    return Found(**whole)  # type: ignore[arg-type]
