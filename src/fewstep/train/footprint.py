"""What a training step holds and computes, counted tensor by tensor; and what this process holds."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cond import Cond
from ..method import Batch, Method
from ..rng import Rng
from ..tasks.base import Task
from .average import Average
from .player import Player
from .precision import Prepared, networks
from .recipe import Recipe


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on: how many live now, and at most.

    What was there before does not count. A view costs nothing; memory that a library takes inside one
    operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._meet(given, new=False)
        answer = func(*args, **(kwargs or {}))
        for made in tree_leaves(answer):
            if isinstance(made, Tensor):
                self._meet(made, new=True)
        return answer

    def _meet(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if new else 0
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Footprint:
    """A training step of ``rows`` rows: the most bytes that it holds beyond weights, data and libraries (so
    gradients, moments, averages, activations), and the floating point operations of each player's turn."""

    rows: int
    peak: int
    flops: dict[str, int]


def footprint(
    method: Method, task: Task, recipe: Recipe, rows: int, device: str = "cpu", fake: Any = None
) -> Footprint:
    """Run every player's turn twice on a small batch and count.

    The second turn meets the moments that the first made. With ``fake``, a ``shapes_alone()``, nothing is computed
    and no memory is taken: tensors have a shape alone, so that a network of any size can be counted; the method's
    weights are gone afterwards. The method learns nothing (the rate is 0) but is otherwise used up.
    """
    from torch.utils.flop_counter import FlopCounterMode

    precision = recipe.precision.model_copy(update={"compile": False})
    batch = _batch(method, task, recipe, rows)
    if fake:
        without_weights(method, fake)
        if precision.weights == "bfloat16":
            for name in method.players:
                _narrowed(getattr(method, name))
            precision = precision.model_copy(update={"weights": "float32"})  # as far as casting goes
    method.train()
    prepared = Prepared(method, precision, device)
    batch = batch if device == "cpu" or fake else batch.to(device)
    if fake:  # what meets a tensor without values has none; the rest, a grid of times say, is computed
        parts = (batch.data, batch.cond, batch.noise, batch.target)
        batch = Batch(*(map_of(part, fake.from_tensor) for part in parts))
    kind, home = ("cpu", "cpu") if fake else (torch.device(device).type, device)
    learning = {name: [p for p in getattr(method, name).parameters() if p.requires_grad] for name in method.players}
    ledger, flops = Ledger(), {}
    with ledger:
        players, average, moments = {}, None, []
        if fake:  # an update computes with values; its moments have a shape
            moments = [torch.zeros_like(p, dtype=torch.float32) for every in learning.values() for p in every * 2]
            if recipe.ema.decay > 0:
                moments += [torch.zeros_like(p, dtype=torch.float32) for p in learning["student"]]  # the average
        else:
            players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
            average = Average(method.student, 0.9) if recipe.ema.decay > 0 else None
        for counting in (True, False):
            ledger.peak = ledger.now  # the counter of operations keeps tensors for itself
            for name in dict.fromkeys(method.turns(0)):
                for other, parameters in learning.items():
                    for parameter in parameters:
                        parameter.requires_grad_(other == name)
                with FlopCounterMode(display=False) if counting else nullcontext() as counter:
                    for part in range(min(2, recipe.parallel.accumulate)):
                        rng = Rng("plan", part, device=home)
                        with torch.autocast(kind, torch.bfloat16, enabled=precision.dtype == "bfloat16"):
                            loss = method.loss(name, batch, rng)
                        loss.total.backward()  # type: ignore[no-untyped-call]
                        del loss
                if counter is not None:
                    flops[name] = counter.get_total_flops() // min(2, recipe.parallel.accumulate)
                if fake:
                    for parameter in learning[name]:
                        parameter.grad = None
                else:
                    players[name].update(0.0)
                prepared.rest()
                if average is not None:
                    average.update()
    prepared.finish()
    for parameters in learning.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    del moments
    return Footprint(rows, ledger.peak, flops)


def _narrowed(module: nn.Module) -> None:
    """The parameters of a module's networks in bfloat16, where they have no values."""
    for net in networks(module):
        for part in net.modules():
            for name, value in part._parameters.items():
                if value is not None and value.dtype == torch.float32:
                    part._parameters[name] = nn.Parameter(value.detach().bfloat16(), requires_grad=value.requires_grad)


def kept(method: Method, task: Task, recipe: Recipe, rows: int) -> int:
    """Bytes that the turns of a small batch keep for their way back, at most: a first guess that costs little."""
    batch, weights, most = _batch(method, task, recipe, rows), {id(p) for p in method.parameters()}, 0
    device = next((p.device for p in method.student.parameters()), torch.device("cpu"))
    for name in dict.fromkeys(method.turns(0)):
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if id(x) not in weights and (x._base is None or id(x._base) not in weights):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            method.loss(name, batch.to(device), Rng("plan", device=device))
        most = max(most, sum(sizes.values()))
    return most


def _batch(method: Method, task: Task, recipe: Recipe, rows: int) -> Batch:
    batch = task.batch(rows, recipe.seed, 0)
    return batch if method.pairs() is None else Batch(batch.data, batch.cond, batch.noise, batch.data)


def map_of(value: Cond, change: Any) -> Any:
    """A tensor, a dictionary of them, or nothing, changed."""
    if isinstance(value, dict):
        return {name: change(one) for name, one in value.items()}
    return value if value is None else change(value)


def shapes_alone() -> Any:
    """A mode in which tensors have a shape and no values; tensors with values that come in lose them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def without_weights(module: nn.Module, mode: Any) -> None:
    """Every parameter and buffer by one of the same shape that holds nothing; what was shared stays shared."""
    from torch._subclasses.fake_tensor import FakeTensor

    made: dict[int, Any] = {}
    for part in module.modules():
        if not any(True for _ in part.parameters()):
            continue  # an exact law: small, and its values decide what it computes
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None and not isinstance(value, FakeTensor):
                    table[name] = made.setdefault(id(value), mode.from_tensor(value))  # type: ignore[index]


def size(value: Any) -> int:
    """Bytes of a module's weights and buffers, each once; of a tensor, a condition, or nothing."""
    if isinstance(value, nn.Module):
        found = {id(t): t for t in (*value.parameters(), *value.buffers())}
        return sum(t.numel() * t.element_size() for t in found.values())
    if isinstance(value, dict):
        return sum(size(v) for v in value.values())
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def size_of_rows(shape: tuple[int, ...], cond: Cond) -> int:
    """Bytes of one float32 sample with its condition."""
    count = len(next(iter(cond.values()))) if isinstance(cond, dict) else 1 if cond is None else len(cond)
    return 4 * int(torch.Size(shape).numel()) + size(cond) // max(count, 1)


class Meter:
    """Memory of this process: resident on a CPU, allocated on an NVIDIA GPU; ``peak`` since the last ``reset``."""

    def __init__(self, device: str) -> None:
        self.cuda = device if torch.device(device).type == "cuda" else None

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.cuda) if self.cuda else _resident("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.cuda) if self.cuda else _resident("VmHWM")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            return
        try:
            File("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # then a peak is since the beginning, which is too much rather than too little


def _resident(what: str) -> int:
    try:
        for line in File("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
