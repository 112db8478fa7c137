"""What this package does on this machine's GPU, in at most ten minutes and without a network.

    python benchmarks/gpu_check.py                     # everything; gpu_check.json and gpu_check.md are written
    python benchmarks/gpu_check.py --only matrix       # sections whose name begins like this
    python benchmarks/gpu_check.py --smoke             # tiny shapes on a CPU: does the script itself run?

Sections: the card's measured matrix rate; every method's loss and gradient in bfloat16, compiled and with fused
attention; exact against central-difference derivatives; full-shape networks with random weights (SDXL, Flux, Wan 1.3B)
for five LoRA-DMD2 iterations each, against the plan; one-step and four-step sampling, eager and compiled, as a share of
the matrix rate. Each section has a time budget; a section that fails or runs late keeps the rows that it has, says
why, and the next one starts. It needs torch >= 2.6; without diffusers the parts that need it are skipped by name.
The exit code is 1 where a section failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fewstep
from fewstep.cond import Cond, rows
from fewstep.denoiser import Denoiser, Wrapped
from fewstep.method import Batch
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.meanflow import MeanFlow, MeanFlowOptions
from fewstep.nets import build
from fewstep.path import Straight, VariancePreserving
from fewstep.registry import METHODS
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.tasks.base import Split, Task
from fewstep.train.build import divided
from fewstep.train.recipe import Recipe
from fewstep.train.trainer import Player

Row = dict[str, Any]
ITERATIONS = 5
GB = 2**30


class Skipped(Exception):
    """A part that this machine cannot run, and why."""


class Late(BaseException):
    """A section's time is up. No Exception, so that nothing on the way takes it for its own trouble."""


@dataclass
class Machine:
    """Where it runs, at which size, and what was measured so far."""

    device: torch.device
    smoke: bool
    rates: dict[str, float] = field(default_factory=dict)  # by dtype, operations a second

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """Of torch.compile: a smoke run only traces."""
        return "eager" if self.smoke else "inductor"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], rounds: int = 3) -> float:
        """The median time of a piece of work, after one that warms up."""
        work()
        self.wait()
        taken = []
        for _ in range(1 if self.smoke else rounds):
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def fresh(self) -> None:
        """Give memory and compiled code of the last part back."""
        gc.collect()
        torch.compiler.reset()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.cuda else None

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    def bfloat16(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)


def facts(machine: Machine) -> Row:
    found: Row = {
        "fewstep": fewstep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
    }
    with contextlib.suppress(ImportError):
        import diffusers

        found["diffusers"] = diffusers.__version__
    if machine.cuda:
        card = torch.cuda.get_device_properties(machine.device)
        found |= {
            "device": card.name,
            "memory_gb": round(card.total_memory / GB, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
        }
    return found


# -- the card ---------------------------------------------------------------------------------------


def matrix(machine: Machine) -> Iterator[Row]:
    """Square matrix products: the rate that shares are of."""
    size = 128 if machine.smoke else 8192 if machine.cuda else 1024
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        if tf32 and not machine.cuda:
            continue
        a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        repeats = 2 if machine.smoke else 20
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32

        def work(a: Tensor = a, b: Tensor = b, repeats: int = repeats) -> None:
            for _ in range(repeats):
                a @ b

        try:
            spent = machine.seconds(work, rounds=5) / repeats
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        machine.rates[name] = 2 * size**3 / spent
        yield {"dtype": name, "size": size, "tflops": machine.rates[name] / 1e12}


# -- methods ----------------------------------------------------------------------------------------


def transformer(machine: Machine, reads_s: bool = False, seed: int = 0, width: int = 64) -> nn.Module:
    """A small transformer with labels whose every weight is at work: attention can be fused."""
    rng = torch.Generator().manual_seed(seed)
    description = {
        "kind": "dit", "shape": (4, 8, 8), "width": width, "heads": 4, "classes": 10, "reads_s": reads_s,
        "depth": 1 if machine.smoke else 2,
    }  # fmt: skip
    net = build(description)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=rng))
    return net.to(machine.device)


def game(machine: Machine, entry: Any, net: Callable[..., nn.Module]) -> Any:
    """A method with a teacher and a student of its own, on the straight path."""

    def denoiser(reads_s: bool, seed: int, prediction: str) -> Denoiser:
        return Wrapped(net(machine, reads_s, seed), Straight(), prediction, "t")

    kind = entry.thing
    flow = kind.flow_map
    teacher = denoiser(False, 0, "x0")
    options = kind.Options()
    made = kind.student_options(options, teacher.path)
    own = denoiser(flow, 1, "flow" if flow else "x0")
    if edges := kind.handovers(options, own.path):
        own = divided(own, edges)
    student = Student(own, (4, 8, 8), classes=10, **made)
    method = kind(teacher, student, options).to(machine.device).train()
    if getattr(options, "backtrack", None) is not None:
        method.step = 10_000  # behind the steps in which its student stands still
    with torch.no_grad():
        for player in method.players:  # copies of the teacher pull nowhere
            for value in getattr(method, player).parameters():
                value.add_(0.02)
    return method


def gradient(machine: Machine, method: Any, player: str, batch: Batch) -> tuple[float, Tensor]:
    """A player's loss and its whole gradient, from the same draws every time."""
    for name in method.players:
        getattr(method, name).requires_grad_(name == player)
    method.zero_grad()
    torch.manual_seed(0)
    loss = method.loss(player, batch, Rng(0, device=machine.device))
    loss.total.backward()
    learned = [p for p in getattr(method, player).parameters()]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    return float(loss.total.detach()), torch.cat([g.flatten().double() for g in found])


def methods(machine: Machine) -> Iterator[Row]:
    """Every method's loss and gradient against float32, eager: in bfloat16, compiled, and both.

    ``along`` is the cosine between the gradients: at least 0.9 in bfloat16, 0.999 compiled.
    """
    rng = torch.Generator().manual_seed(0)
    count = 4 if machine.smoke else 64
    draw = [torch.randn(count, 4, 8, 8, generator=rng) for _ in range(3)]
    batch = Batch(draw[0], torch.arange(count) % 10, draw[1], draw[2]).to(machine.device)
    ways = {"both": (True, True, 0.9)}
    if not machine.smoke:
        ways = {"bfloat16": (True, False, 0.9), "compiled": (False, True, 0.999), **ways}
    for entry in METHODS:
        if not entry.thing.__module__.startswith("fewstep."):
            continue
        method = game(machine, entry, transformer)
        for player in method.players:
            plain, wanted = gradient(machine, method, player, batch)
            for way, (low, compiled, bar) in ways.items():
                row: Row = {"method": entry.name, "player": player, "way": way, "loss": plain}
                try:
                    other = copy.deepcopy(method)
                    if compiled:
                        for module in other.modules():
                            if isinstance(module, Wrapped):
                                module.net.compile(backend=machine.backend)
                    with machine.bfloat16() if low else contextlib.nullcontext():
                        loss, got = gradient(machine, other, player, batch)
                    along = float(got @ wanted / (got.norm() * wanted.norm()).clamp(min=1e-30))
                    row |= {"loss": loss, "float32": plain, "along": along}
                    row["ok"] = bool(math.isfinite(loss) and got.isfinite().all() and along >= bar)
                except Exception as error:
                    row |= {"ok": False, "error": line(error)}
                yield row
            machine.fresh()


def attention(machine: Machine) -> Iterator[Row]:
    """The transformer's answer and gradient under each kernel of attention, against the plain one in float32."""
    net = transformer(machine, width=256)
    x = torch.randn(4 if machine.smoke else 256, 4, 8, 8, device=machine.device)
    time_, labels = torch.rand(len(x), device=machine.device), torch.arange(len(x), device=machine.device) % 10

    def run() -> Tensor:
        entry = x.clone().requires_grad_(True)
        answer = net(entry, time_, labels)
        (slope,) = torch.autograd.grad(answer.square().mean(), entry)
        return torch.cat([answer.detach().float().flatten(), slope.float().flatten() * len(x)])

    with sdpa_kernel(SDPBackend.MATH):
        wanted = run()
    kernels = {
        "plain": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if hasattr(SDPBackend, "CUDNN_ATTENTION"):
        kernels["cudnn"] = SDPBackend.CUDNN_ATTENTION
    for name, kernel in kernels.items():
        row: Row = {"kernel": name, "dtype": "bfloat16"}
        try:
            with sdpa_kernel(kernel), machine.bfloat16():
                got = run()
                row["ms"] = 1e3 * machine.seconds(run)
            row["error"] = float((got - wanted).norm() / wanted.norm())
            row["ok"] = row["error"] <= 0.05
        except RuntimeError as error:  # this card, or this build, has no such kernel
            row |= {"error": None, "note": line(error)}
        yield row


# -- derivatives ------------------------------------------------------------------------------------


def derivatives(machine: Machine) -> Iterator[Row]:
    """MeanFlow's total derivative, exact (forward mode) and by central differences, against exact in float64."""
    net = transformer(machine, reads_s=True, width=64 if machine.smoke else 256)
    method = MeanFlow(None, Student(Wrapped(net, Straight(), "flow", "t"), (4, 8, 8)), MeanFlowOptions())
    count = 4 if machine.smoke else 64
    rng = torch.Generator().manual_seed(0)
    x, v = (torch.randn(count, 4, 8, 8, generator=rng).to(machine.device) for _ in range(2))
    t = torch.linspace(0.4, 0.9, count, device=machine.device)
    s, labels = t / 2, torch.arange(count, device=machine.device) % 10
    wide = copy.deepcopy(method).double()
    truth = wide.derivative(x.double(), t.double(), s.double(), v.double(), labels)
    ways = [("exact", None), *(("difference", step) for step in (5e-2, 2e-2, 5e-3, 1e-3, 1e-4))]
    best = math.inf
    for dtype in ("float32", "bfloat16"):
        for way, step in ways:
            options = {"derivative": way} | ({} if step is None else {"step": step})
            method.options = MeanFlowOptions(**options)

            def work() -> Tensor:
                return method.derivative(x, t, s, v, labels)

            row: Row = {"derivative": way, "step": step, "dtype": dtype}
            with machine.bfloat16() if dtype == "bfloat16" else contextlib.nullcontext():
                got = work()
                row["ms"] = 1e3 * machine.seconds(work)
            row["error"] = float((got.double() - truth).norm() / truth.norm())
            if dtype == "float32" and way == "exact":
                row["ok"] = row["error"] <= 1e-3
            elif dtype == "float32":
                best = min(best, row["error"])
            elif way == "exact":
                row["ok"] = row["error"] <= 0.2
            yield row
    yield {"derivative": "difference", "step": "best", "dtype": "float32", "error": best, "ok": best <= 1e-2}


# -- full-shape networks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A published network by its configuration, with random weights.

    ``full`` and ``tiny``: (configuration, shape of a sample, conditions by name without the batch). ``call``: the
    arguments of the network; ``mend``: what stands in buffers, which a network without memory does not have.
    """

    name: str
    kind: str
    full: tuple[dict[str, Any], tuple[int, ...], dict[str, tuple[int, ...]]]
    tiny: tuple[dict[str, Any], tuple[int, ...], dict[str, tuple[int, ...]]]
    call: Callable[[Tensor, Tensor, dict[str, Tensor]], dict[str, Any]]
    around: Callable[[nn.Module], Wrapped]
    mend: Callable[[Any], None] = lambda net: None


class Asked(nn.Module):
    """A network of diffusers with our signature: ``net(x, time, cond, span) -> like x``."""

    def __init__(self, net: nn.Module, call: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, span: Tensor | None = None) -> Tensor:
        assert isinstance(cond, dict)
        dtype = next(p.dtype for p in self.net.parameters() if p.is_floating_point())
        arguments = self.call(x.to(dtype), time, {k: v.to(dtype) for k, v in cond.items()})
        answer: Tensor = self.net(**arguments, return_dict=False)[0]
        return answer.to(x.dtype)


def _sdxl(x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    text = cond["encoder_hidden_states"]
    return {"sample": x, "timestep": time, "encoder_hidden_states": text, "added_cond_kwargs": added}


def _flux(x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
    side = math.isqrt(x.shape[1])
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    ids = torch.cat([torch.zeros(side * side, 1, dtype=torch.long), grid], 1).to(x)
    text = cond["encoder_hidden_states"]
    return {
        "hidden_states": x, "timestep": time.to(x.dtype), "encoder_hidden_states": text, "img_ids": ids,
        "pooled_projections": cond["pooled_projections"], "txt_ids": ids.new_zeros(text.shape[1], 3),
        "guidance": x.new_full((len(x),), 3.5),
    }  # fmt: skip


def _wan(x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": time, "encoder_hidden_states": cond["encoder_hidden_states"]}


def _mend_wan(net: Any) -> None:
    rope = net.rope
    net.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)


def _unet(widths: tuple[int, ...], blocks: tuple[int, ...], head: int, groups: int, text: int, pooled: int) -> Any:
    cross, plain = "CrossAttn", ""
    kinds = [plain, *[cross] * (len(widths) - 1)]
    return {
        "in_channels": 4, "out_channels": 4, "block_out_channels": widths, "layers_per_block": 2 if pooled > 64 else 1,
        "down_block_types": tuple(f"{k}DownBlock2D" for k in kinds),
        "up_block_types": tuple(f"{k}UpBlock2D" for k in reversed(kinds)),
        "transformer_layers_per_block": blocks, "attention_head_dim": tuple(w // head for w in widths),
        "cross_attention_dim": text, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256 if pooled > 64 else 8, "norm_num_groups": groups,
        "projection_class_embeddings_input_dim": pooled + 6 * (256 if pooled > 64 else 8),
    }  # fmt: skip


SHAPES = (
    Shape(
        "SDXL", "UNet2DConditionModel",
        (
            _unet((320, 640, 1280), (1, 2, 10), 64, 32, 2048, 1280), (4, 128, 128),
            {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        ),
        (
            _unet((8, 16), (1, 1), 8, 4, 16, 16), (4, 8, 8),
            {"encoder_hidden_states": (5, 16), "text_embeds": (16,), "time_ids": (6,)},
        ),
        _sdxl, lambda net: Wrapped(net, VariancePreserving(schedule="scaled_linear"), "eps", "999t"),
    ),
    Shape(
        "Flux", "FluxTransformer2DModel",
        (
            {"guidance_embeds": True}, (4096, 64),
            {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)},
        ),
        (
            {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
             "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16,
             "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
            (16, 4), {"encoder_hidden_states": (5, 16), "pooled_projections": (16,)},
        ),
        _flux, lambda net: Wrapped(net, Straight(), "velocity", "t"),
    ),
    Shape(
        "Wan 1.3B", "WanTransformer3DModel",
        (
            {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
            (16, 21, 60, 104), {"encoder_hidden_states": (512, 4096)},
        ),
        (
            {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "in_channels": 4,
             "out_channels": 4, "text_dim": 16, "freq_dim": 8, "rope_max_seq_len": 32},
            (4, 2, 4, 4), {"encoder_hidden_states": (5, 16)},
        ),
        _wan, lambda net: Wrapped(net, Straight(), "velocity", "1000t"), _mend_wan,
    ),
)  # fmt: skip


class Random(Task):
    """Noise for data, and random conditions: what a step costs does not depend on them."""

    name = "random"

    def __init__(self, shape: tuple[int, ...], cond: dict[str, tuple[int, ...]]) -> None:
        rng = torch.Generator().manual_seed(0)
        self.shape = shape
        self._cond = {name: torch.randn(4, *size, generator=rng) for name, size in cond.items()}

    @property
    def train(self) -> Split:
        return Split(torch.zeros(4, *self.shape), self._cond)

    @property
    def test(self) -> Split:
        return self.train

    def batch(self, size: int, seed: int, step: int, turn: int = 0) -> Batch:
        noise = torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(1000 * step + turn))
        return Batch(torch.zeros_like(noise), rows(self._cond, torch.arange(size) % 4), noise)


def materialised(machine: Machine, shape: Shape) -> nn.Module:
    """The network with random weights: built without memory, then filled on the device, in bfloat16 on a GPU."""
    try:
        import diffusers
    except ImportError:
        raise Skipped("diffusers is not installed") from None
    kind = getattr(diffusers, shape.kind, None)
    if kind is None:
        raise Skipped(f"diffusers {diffusers.__version__} has no {shape.kind}")
    with torch.device("meta"):
        net = kind(**(shape.tiny if machine.smoke else shape.full)[0])
    net = halved(net).to_empty(device=machine.device)
    shape.mend(net)
    net.to(machine.device)
    rng = torch.Generator(machine.device).manual_seed(0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("bias"):
                value.zero_()
            elif value.ndim == 1:
                value.fill_(1.0)
            else:
                value.normal_(std=1 / math.sqrt(value[0].numel()), generator=rng)
    for name, value in net.named_buffers():
        if not value.isfinite().all():
            raise Skipped(f"buffer {name} of {shape.kind} is not set up by this script")
    net.enable_gradient_checkpointing()
    return net.eval().requires_grad_(False)


def lora_game(shape: Shape, net: nn.Module, size: tuple[int, ...], steps: int, rank: int) -> DMD2:
    """Teacher, student and critic on one set of weights, with adapters for the two that learn."""
    try:
        from fewstep.adapters import LoraOptions, adapted
    except ImportError:
        raise Skipped("this version of fewstep has no adapters") from None
    teacher = shape.around(Asked(net, shape.call))
    options = DMD2Options(critic_turns=1, steps=steps)
    fields = DMD2.student_options(options, teacher.path)
    return DMD2(teacher, Student(adapted(teacher, LoraOptions(rank=rank)), size, **fields), options)


def planned(machine: Machine, shape: Shape, size: tuple[int, ...], task: Task, rank: int, batch: int) -> Row:
    """What the package itself predicts for such a run, without computing anything."""
    try:
        from fewstep.jobs.planning import SHARE  # of the matrix rate, which a training step reaches
        from fewstep.train.footprint import footprint, shapes_alone
        from fewstep.train.footprint import size as bytes_of
    except ImportError:
        return {"plan": "this version predicts no memory for networks that are not in a folder"}
    import diffusers

    with torch.device("meta"):
        net = getattr(diffusers, shape.kind)(**(shape.tiny if machine.smoke else shape.full)[0])
    net = halved(net).to_empty(device="cpu")  # pages that nobody touches cost nothing
    shape.mend(net)
    net.enable_gradient_checkpointing()
    method = lora_game(shape, net.eval().requires_grad_(False), size, 1, rank)
    weights = bytes_of(method)
    recipe = recipe_of(batch)
    found = footprint(method, task, recipe, batch, fake=shapes_alone())
    rate = machine.rates.get("bfloat16")
    out: Row = {"plan_gb": (weights + found.peak) / GB, "step_tflop": sum(found.flops.values()) / 1e12}
    if rate:
        out["plan_s"] = sum(found.flops.values()) / (SHARE * rate)
    return out


def recipe_of(batch: int) -> Recipe:
    return Recipe.model_validate({
        "steps": ITERATIONS, "batch": batch, "task": {"name": "digits"}, "method": {"name": "dmd2"},
        "optim": {"lr": 1e-5}, "ema": {"decay": 0.0}, "precision": {"dtype": "bfloat16"},
    })  # fmt: skip


def large(machine: Machine) -> Iterator[Row]:
    """Five LoRA-DMD2 iterations of each network: parameters, peak memory and seconds, beside the plan's."""
    for shape in SHAPES:
        machine.fresh()
        _, size, cond = shape.tiny if machine.smoke else shape.full
        rank = 4 if machine.smoke else 32
        row: Row = {"network": shape.name, "batch": 1, "rank": rank, "shape": "x".join(map(str, size))}
        try:
            for found in trained(machine, shape, size, cond, rank):
                row |= found
            machine.fresh()
            row |= planned(machine, shape, size, Random(size, cond), rank, 1)
            if row.get("peak_gb") and row.get("plan_gb"):
                row["memory_over_plan"] = row["peak_gb"] / row["plan_gb"]
            if row.get("plan_s"):
                row["time_over_plan"] = row["step_s"] / row["plan_s"]
        except Late:
            yield {**row, "ok": False, "error": "the section's time was up"}
            raise
        except Skipped as error:
            row["note"] = f"skipped: {error}"
        except Exception as error:
            row |= {"ok": False, "error": line(error)}
        yield row


def trained(
    machine: Machine, shape: Shape, size: tuple[int, ...], cond: dict[str, tuple[int, ...]], rank: int
) -> Iterator[Row]:
    """What is known of a network as it is built and trained; nothing of it is held afterwards."""
    began = time.perf_counter()
    net = materialised(machine, shape)
    count = sum(p.numel() for p in net.parameters())
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    say(f"  {shape.name}: {count / 1e9:.2f} B parameters, {weights / GB:.1f} GB")
    yield {"parameters_b": count / 1e9, "weights_gb": weights / GB}
    method = lora_game(shape, net, size, 1, rank).to(machine.device).train()
    learning = sum(p.numel() for p in method.parameters() if p.requires_grad)
    yield {"learning_m": learning / 1e6, "build_s": time.perf_counter() - began}
    yield iterate(machine, method, Random(size, cond), recipe_of(1))


def iterate(machine: Machine, method: DMD2, task: Task, recipe: Recipe) -> Row:
    """The trainer's turns: peak memory, and the median of the steps after the first."""
    players = {name: Player(getattr(method, name), recipe.optim_of(name)) for name in method.players}
    spent, losses = [], []
    for step in range(ITERATIONS):
        began = time.perf_counter()
        for turn, name in enumerate(method.turns(step)):
            for other, player in players.items():
                player.learns(other == name)
            batch = task.batch(recipe.batch, 0, step, turn).to(machine.device)
            with machine.bfloat16():
                loss = method.loss(name, batch, Rng("gpu_check", step, turn, device=machine.device))
            loss.total.backward()
            players[name].update(1.0)
            losses.append(float(loss.total.detach()))
        machine.wait()
        spent.append(time.perf_counter() - began)
        say(f"    step {step + 1}/{ITERATIONS}: {spent[-1]:.2f} s")
    moved = any(bool(p.detach().any()) for n, p in method.student.named_parameters() if n.endswith("lora_up"))
    row: Row = {"step_s": statistics.median(spent[1:]), "ok": all(map(math.isfinite, losses)) and moved}
    peak = machine.peak()
    return row if peak is None else {**row, "peak_gb": peak / GB}


def halved(net: Any) -> Any:
    """Weights in bfloat16, tables in buffers as they are; diffusers' own ``to`` would warn of what it keeps wide."""
    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.to(torch.bfloat16), requires_grad=False)
    return net


# -- sampling ---------------------------------------------------------------------------------------


def sampling(machine: Machine) -> Iterator[Row]:
    """Samples a second in one and in four steps, eager and compiled; ``share`` is of the measured matrix rate."""
    width, depth, heads = (32, 1, 2) if machine.smoke else (1152, 28, 16)
    shape = (4, 8, 8) if machine.smoke else (4, 32, 32)
    description = {
        "kind": "dit", "shape": shape, "width": width, "depth": depth, "heads": heads, "classes": 1000, "patch": 2
    }  # fmt: skip
    net = halved(build(description)).to(machine.device).eval()
    cases: list[tuple[str, Any, tuple[int, ...], Any, int]] = [
        (
            "DiT-XL/2" if not machine.smoke else "tiny DiT", Wrapped(net, Straight(), "velocity", "t"), shape,
            lambda n: torch.arange(n, device=machine.device) % 1000, 4 if machine.smoke else 32,
        )
    ]  # fmt: skip
    for case in cases:
        yield from throughput(machine, *case)
    del net, cases
    machine.fresh()
    sdxl = SHAPES[0]
    try:
        one = sdxl.around(Asked(materialised(machine, sdxl), sdxl.call))
    except Skipped as error:
        yield {"network": sdxl.name, "note": f"skipped: {error}"}
        return
    _, shape, cond = sdxl.tiny if machine.smoke else sdxl.full
    held = Random(shape, cond).train.cond
    assert isinstance(held, dict)
    given = {k: v.to(machine.device) for k, v in held.items()}
    yield from throughput(
        machine, sdxl.name, one, shape, lambda n: rows(given, torch.arange(n, device=machine.device) % 4), 4
    )


def throughput(
    machine: Machine, name: str, one: Wrapped, shape: tuple[int, ...], cond: Callable[[int], Cond], batch: int
) -> Iterator[Row]:
    top = one.path.t_max
    steps = {n: tuple(top * (1 - k / n) for k in range(n)) for n in (1, 4)}
    student = Student(one, shape, steps=steps).eval()
    noise, some = torch.randn(batch, *shape, device=machine.device), cond(batch)
    rate = machine.rates.get("bfloat16")
    with torch.no_grad(), machine.bfloat16():
        with FlopCounterMode(display=False) as counter:
            student.generate(noise, some, None, 1)
        flops = counter.get_total_flops()
        for way in ("eager", "compiled"):
            if way == "compiled":
                one.net.compile(backend=machine.backend)
            for count in (1, 4):
                row: Row = {"network": name, "way": way, "steps": count, "batch": batch}
                try:
                    spent = machine.seconds(lambda c=count: student.generate(noise, some, None, c))
                except Exception as error:
                    yield {**row, "ok": False, "error": line(error)}
                    continue
                row |= {"samples_per_s": batch / spent, "tflop_per_sample": count * flops / batch / 1e12}
                if rate:
                    row["share"] = count * flops / spent / rate
                row["ok"] = True
                yield row


# -- running it -------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[Machine], Iterator[Row]], int]] = {  # with the seconds that each may take
    "matrix": (matrix, 30),
    "attention": (attention, 30),
    "derivatives": (derivatives, 40),
    "large": (large, 260),
    "sampling": (sampling, 120),
    "methods": (methods, 110),
}


def line(error: BaseException) -> str:
    text = next((t.strip() for t in str(error).splitlines() if t.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise Late inside when the time is up (where signals reach: the main thread of a Unix process)."""

    def ring(number: int, frame: Any) -> None:
        raise Late

    try:
        before = signal.signal(signal.SIGALRM, ring)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, should it be lost in a destructor
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(machine: Machine, only: str = "", scale: float = 1.0) -> dict[str, Row]:
    """Every section in turn: status (done, failed, late, skipped), seconds, rows."""
    found: dict[str, Row] = {}
    for name, (section, limit) in SECTIONS.items():
        if not name.startswith(only) and name != "matrix":
            continue
        say(f"{name} (at most {limit * scale:.0f} s)")
        began, held = time.perf_counter(), list[Row]()
        state: Row = {"about": (section.__doc__ or "").split("\n")[0], "status": "done"}
        try:
            with budget(limit * scale):
                for row in section(machine):
                    held.append(row)
                    say("  " + ", ".join(f"{k} {cell(v)}" for k, v in row.items()))
        except Late:
            state |= {"status": "late", "reason": f"more than {limit * scale:.0f} s"}
        except Skipped as error:
            state |= {"status": "skipped", "reason": str(error)}
        except Exception as error:
            state |= {"status": "failed", "reason": line(error)}
            say("".join(traceback.format_exception(error)))
        if state["status"] == "done" and any(row.get("ok") is False for row in held):
            state |= {"status": "failed", "reason": f"{sum(row.get('ok') is False for row in held)} row(s) missed"}
        found[name] = {**state, "seconds": round(time.perf_counter() - began, 1), "rows": held}
        machine.fresh()
    return found


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "\\|")


def markdown(report: dict[str, Any]) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    lines = ["# GPU check", "", f"{machine}; {report['seconds']:.0f} s in all."]
    for name, section in report["sections"].items():
        reason = f": {section['reason']}" if "reason" in section else ""
        lines += ["", f"## {name}", "", section["about"], "", f"{section['status']}{reason} ({section['seconds']} s)"]
        heads = list(dict.fromkeys(key for row in section["rows"] for key in row))
        if heads:
            lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            lines += ["| " + " | ".join(cell(row.get(h)) for h in heads) + " |" for row in section["rows"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", "--quick", action="store_true", help="tiny shapes on a CPU: does it run?")
    parser.add_argument("--only", default="", help="sections whose name begins like this (and the matrix rate)")
    parser.add_argument("--device", help="the GPU, e.g. cuda:1 [default: the first, where there is one]")
    parser.add_argument("--scale", type=float, default=1.0, help="of every section's time budget")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="the table")
    parser.add_argument("--markdown", type=Path, default=Path("gpu_check.md"), help="the table, to read")
    options = parser.parse_args(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("gpu_check: no GPU here, nothing was checked; --smoke tries the script on a CPU", file=sys.stderr)
        return 2 if options.device else 0
    if options.smoke:  # nothing that somebody would take for a result
        scratch = Path(tempfile.mkdtemp(prefix="gpu_check_smoke_"))
        for name in ("json", "markdown"):
            if getattr(options, name) == parser.get_default(name):
                setattr(options, name, scratch / getattr(options, name).name)
    torch.manual_seed(0)
    machine = Machine(torch.device("cpu" if options.smoke else options.device or "cuda"), options.smoke)
    began = time.perf_counter()
    sections = run(machine, options.only, options.scale)
    report = {
        "schema": 1,
        "smoke": options.smoke,
        "machine": facts(machine),
        "seconds": round(time.perf_counter() - began, 1),
        "sections": sections,
    }
    options.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    options.markdown.write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    print(f"{options.json}, {options.markdown}", file=sys.stderr)
    return 1 if any(section["status"] == "failed" for section in sections.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
