"""Several processes as one: who this is, what all agree on, what is added up, what is spread out.

The only place of ``torch.distributed``. A launcher (``torchrun``, ``accelerate launch``) starts the same program
several times and says so in the environment; ``joined`` makes them one. With one process nothing here does anything.

Three ways to act together:

- *in step*: every process runs the same lines, and a collective (``agree``, ``gather``, ``add_up``) joins them;
- *alone*: the first process works, the others wait for what it found (``alone``);
- *each its part*: of a list of chunks, of the rows of a batch, of the rows of a weight (``World.rows``, ``Spread``).

An error anywhere ends everybody: who fails first says its line, the others leave without one.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import Failed, Refused

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # of a collective: longer than any work between two of them that is not ``alone``
ENDED, TURN = "fewstep/ended", "fewstep/alone"


class Lost(Failed):
    """Another process of this run ended, so that this one cannot go on."""


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees it.

    >>> World(rank=1, size=2).rows(5)
    (2, 5)
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def rows(self, total: int) -> tuple[int, int]:
        """This process's part of so many rows: as even as it can be. Refused where somebody would have none."""
        if total < self.size:
            raise Refused(f"a batch of {total} cannot be spread over {self.size} processes: take a larger batch")
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, this process's part of a list."""
        return list(items[self.rank :: self.size])


def launched() -> int:
    """How many processes a launcher says there are."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() and "RANK" in os.environ else 1


def again(command: str) -> str:
    """The command line that starts a command in as many processes as there are now.

    >>> again("sample runs/digits")
    'fewstep sample runs/digits'
    """
    size = world().size
    if size == 1:
        return f"fewstep {command}"
    each = os.environ.get("LOCAL_WORLD_SIZE", str(size))
    nodes = "" if each == str(size) else f"--nnodes {size // int(each)} ... "
    return f"torchrun {nodes}--nproc-per-node {each} -m fewstep {command}"


def world(device: torch.device | str = "cpu") -> World:
    """Who this process is, with its device; alone where no group was joined."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return World(device=torch.device(device))
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device))


# Joining and leaving


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Be one of the processes that a launcher started; alone without one.

    Inside, the first process alone is heard: the output of the others goes nowhere. An exception that leaves
    here ends the run everywhere; it carries ``told = True`` where another process has already said why.
    """
    if launched() == 1 or torch.distributed.is_initialized():
        yield world()
        return
    dist = torch.distributed
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise Failed(f"the {launched()} processes of this run did not meet: {_line(error)}") from error
    here = world()
    try:
        with contextlib.ExitStack() as quiet:
            if not here.first:
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            yield here
            dist.barrier()
    except BaseException as error:
        raise _last_words(error) from error.__cause__
    dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, which is the number of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def _last_words(error: BaseException) -> BaseException:
    """The error to leave with: marked as told where somebody ended before."""
    if isinstance(error, RuntimeError) and not isinstance(error, Failed) and _is_lost(error):
        error = Lost("another process of this run ended, or did not answer")
    try:
        before = int(_store().add(ENDED, 1)) > 1
    except RuntimeError:  # the first process kept the books, and is gone: it spoke unless it was killed
        before = world().rank > 0 and not isinstance(error, Lost)
    error.told = before  # type: ignore[attr-defined]
    return error


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because of its other end."""
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    text = str(error).lower()
    return isinstance(error, kinds) or any(word in text for word in ("gloo", "nccl", "closed by peer", "timed out"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


# Acting together


_turn = 0


def alone(work: Callable[[], T]) -> T:
    """The first process works, the others wait as long as it takes; all get what it found.

    What it raises ends everybody. The result crosses between processes of one run, pickled: keep it small.
    """
    global _turn
    here = world()
    if here.size == 1:
        return work()
    _turn += 1
    key = f"{TURN}/{_turn}"
    store = _store()
    if here.first:
        found = work()
        store.set(key, pickle.dumps(found))
        return found
    pause = 0.001
    while not store.check([key]):
        if int(store.add(ENDED, 0)) > 0 and not store.check([key]):
            raise Lost("another process of this run ended")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    result: T = pickle.loads(store.get(key))
    return result


def after_first(work: Callable[[], T]) -> T:
    """All do the same work, the others once the first is done: they find in a cache what it left there."""
    here = world()
    found = work() if here.first else None
    alone(lambda: None)
    return work() if found is None else found


def agree(flag: bool) -> bool:
    """Whether any process says yes; the same answer everywhere."""
    if world().size == 1:
        return flag
    value = torch.tensor([flag], dtype=torch.uint8)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value)


def gather(item: T) -> list[T]:
    """What every process has, in order; the same list everywhere."""
    size = world().size
    if size == 1:
        return [item]
    found: list[Any] = [None] * size
    torch.distributed.all_gather_object(found, item)
    return found


def in_turn(parts: Sequence[Sequence[T]]) -> list[T]:
    """The list of which every process had its part (``World.mine``).

    >>> in_turn([[0, 2, 4], [1, 3]])
    [0, 1, 2, 3, 4]
    """
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def add_up(value: Tensor) -> Tensor:
    """The sum over processes, in place of the value."""
    if world().size > 1:
        torch.distributed.all_reduce(value)
    return value


class _WeightedMean(torch.autograd.Function):
    """``sum of share x mean`` over processes; its derivative is right once gradients are averaged over processes
    whose losses counted for ``size x share``."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, share: float) -> Tensor:
        ctx.share = share
        return add_up(mean.detach() * share)

    @staticmethod
    def backward(ctx: Any, *slope: Tensor) -> tuple[Tensor, None]:
        return add_up(slope[0].clone()) * ctx.share, None


def mean_over(share: float) -> Callable[[Tensor], Tensor]:
    """The reduction for ``losses.set_reduction``: this process's mean counts for its share of the rows."""

    def reduce(mean: Tensor) -> Tensor:
        found: Tensor = _WeightedMean.apply(mean, share)  # type: ignore[no-untyped-call]
        return found

    return reduce


def mean_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its mean over processes, in one flat buffer of each type.

    A gradient that this process has not counts as 0; one that no process has stays away, so that an optimiser
    treats it as it would alone. All processes name the same parameters.
    """
    size = world().size
    if size == 1 or not parameters:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
    groups: dict[torch.dtype, list[Tensor]] = {}
    for parameter, yes in zip(parameters, there.tolist(), strict=True):
        if yes:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = add_up(torch.cat([g.flatten() for g in gradients])).div_(size)
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def begin_alike(tensors: Mapping[str, Tensor]) -> None:
    """Give every process the first one's values. Failed, everywhere, where names or shapes differ: it would hang."""
    if world().size == 1:
        return
    if len({repr(said) for said in gather([(k, tuple(v.shape), str(v.dtype)) for k, v in tensors.items()])}) > 1:
        raise Failed("the processes of this run hold different networks: give all of them the same files and versions")
    with torch.no_grad():
        for value in tensors.values():
            torch.distributed.broadcast(local(value), 0)


# Sharding


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; a whole tensor is its own part."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part.detach()


def first_row(tensor: Tensor) -> int | None:
    """Where this process's part of a sharded tensor begins; None for a whole one."""
    if not hasattr(tensor, "to_local"):
        return None
    here, total = world(), tensor.shape[0]
    return min(here.rank * -(-total // here.size), total)  # as torch.chunk cuts


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()
    return full.detach()


class Spread:
    """The networks inside modules, each sharded over all processes (FSDP2), until they are made whole again.

    A network is what a module holds as ``net``: the raw one, never our wrapper around it. Its blocks are those
    that its class names in ``_no_split_modules``, as diffusers' models do; without such names it is one block.
    Networks of several owners are sharded once.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world().size,))
        self.owners: dict[nn.Module, list[nn.Module]] = {}
        for owner in module.modules():
            net = getattr(owner, "net", None)
            if isinstance(net, nn.Module) and any(True for _ in net.parameters()):
                self.owners.setdefault(net, []).append(owner)
        self.plain: dict[nn.Module, nn.Module] = {}
        for net in self.owners:
            for parameter in net.parameters():
                if not parameter.is_contiguous():
                    raise Refused("parallel.shard needs plain weights: leave precision.channels_last off")
            self.plain[net] = _outline(net)
            scalars = {p for p in net.parameters() if p.ndim == 0}  # have no rows to share out
            left_out: dict[str, Any] = {"ignored_params": scalars} if scalars else {}
            for block in _blocks(net):
                fully_shard(block, mesh=mesh, reshard_after_forward=True, **left_out)

    def rest(self) -> None:
        """Keep no more than the own parts: after a turn, whose passes may have left networks whole."""
        for net in self.owners:
            net.reshard()  # type: ignore[operator]

    def restore(self, module: nn.Module) -> None:
        """Give back plain, whole networks to the owners inside a module, on the device of the parts."""
        wanted = {owner for owner in module.modules()}
        for net, owners in self.owners.items():
            mine = [owner for owner in owners if owner in wanted]
            if mine:
                state = {name: whole(value) for name, value in net.state_dict(keep_vars=True).items()}
                plain = self.plain[net]
                plain.load_state_dict(state, assign=True)
                plain.train(net.training)
                device = next(iter(state.values())).device
                for owner in mine:
                    owner.net = plain.to(device)


def _outline(net: nn.Module) -> nn.Module:
    """A copy of a network whose parameters have shapes and no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in net.parameters()
    }
    return copy.deepcopy(net, memo)


def _blocks(net: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: inner blocks first, the network itself last."""
    names = {name for m in net.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    inner = [
        m for m in net.modules() if m is not net and type(m).__name__ in names and any(True for _ in m.parameters())
    ]
    return [*reversed(inner), net]
