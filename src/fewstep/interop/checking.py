"""Golden samples: some noises and what a model must make of them, in this process and in a fresh one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from ..cond import Cond
from ..errors import MissingExtra, Refused
from ..student import Student
from .contract import Contract
from .files import components, read_tensors, scan
from .recorder import Recording, first_call
from .teacher import own_network

GOLDEN = "golden.safetensors"
TOLERANCE = 1e-4  # of the largest value, or of 1: between two implementations in float32
COUNT = 4
PROMPTS = ("a photo of a red boat", "two dogs on a lake")  # of the golden sample of a text pipeline
SCRIPT = File(__file__).with_name("golden.py")
COND = "cond."  # before the names of conditions in the file


@dataclass(frozen=True)
class Check:
    """The outcome of a golden run: the largest error over the step counts that were run."""

    ok: bool
    max_error: float
    steps: tuple[int, ...]
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Golden:
    """A golden sample: where a run starts, on which conditions, and where each step count must end.

    ``drawn``: the noise is what a CPU generator with the seed draws first. Otherwise it was read from the pipeline's
    own run, and ``state`` is where its generator stood then. ``prompts`` and ``pictures`` are the run's arguments.
    """

    noise: Tensor
    outputs: dict[int, Tensor]
    cond: Cond
    seed: int
    state: Tensor | None = None
    prompts: tuple[str, ...] = ()
    pictures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def drawn(self) -> bool:
        return self.state is None

    def source(self) -> tuple[Tensor, torch.Generator]:
        """The noise, and the generator of what is drawn after it."""
        rng = torch.Generator().manual_seed(self.seed)
        if self.state is None:
            return torch.randn(self.noise.shape, generator=rng), rng
        try:
            rng.set_state(self.state)
        except (RuntimeError, TypeError) as error:
            raise Refused(f"the golden sample's generator state is malformed: {str(error).splitlines()[0]}") from None
        return self.noise, rng


@torch.no_grad()
def drawn_golden(student: Student, cond: Cond, seed: int) -> Golden:
    """The same draws as a stock pipeline makes from a CPU generator with this seed."""
    outputs: dict[int, Tensor] = {}
    noise = torch.zeros(0)
    for count in sorted(student.steps):
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randn((COUNT, *student.shape), generator=rng)
        outputs[count] = student.generate(noise, cond, rng, count).contiguous()
    return _finite(Golden(noise, outputs, cond, seed))


@torch.no_grad()
def run_golden(student: Student, pipe: Any, recording: Recording, call: Mapping[str, Any], seed: int) -> Golden:
    """The start of a run of the written pipeline itself, with what its encoders made of some prompts.

    The run is stopped as it enters the network; the student then goes on from there.
    """
    pictures = {k: v for k, v in recording.call.items() if k in ("image", "mask_image") and isinstance(v, Tensor)}
    prompts = PROMPTS if isinstance(recording.call.get("prompt"), list) else ()
    rng = torch.Generator().manual_seed(seed)
    given = {**call, **pictures, "generator": rng, **({"prompt": list(prompts)} if prompts else {})}
    torch.manual_seed(seed)
    state, cond, passed = first_call(pipe, recording, given)
    source = rng if passed else torch.default_generator
    noise = (state.float() / student.start_scale).contiguous()
    if getattr(student.denoiser, "scale_input", False):
        around: Any = student.denoiser
        noise = noise * float((student.start**2 + around.data_std**2) ** 0.5)
    generator, outputs = source.get_state(), {}
    for count in sorted(student.steps):
        again = torch.Generator()
        again.set_state(generator)
        outputs[count] = student.generate(noise, cond, again, count).contiguous()
    return _finite(Golden(noise, outputs, cond, seed, generator, prompts, pictures))


def _finite(golden: Golden) -> Golden:
    made = {f"output_{n}": v for n, v in golden.outputs.items()}
    for name, value in {"noise": golden.noise, **made}.items():
        if not torch.isfinite(value).all():
            raise Refused(f"this student's golden sample ({name}) holds a NaN or an infinity")
    return golden


def write_golden(
    folder: File, golden: Golden, calls: Mapping[int, dict[str, Any] | None], pipeline: str | None
) -> None:
    """``golden.safetensors``: tensors, and in its header the facts that a run needs."""
    from safetensors.torch import save_file

    facts = {
        "seed": golden.seed,
        "calls": {str(n): c for n, c in sorted(calls.items())},
        "pipeline": pipeline,
        "prompts": list(golden.prompts),
    }
    tensors = {"noise": golden.noise, **{f"output_{n}": v for n, v in golden.outputs.items()}, **golden.pictures}
    if golden.state is not None:
        tensors["generator"] = golden.state
    if isinstance(golden.cond, dict):
        tensors |= {COND + name: value for name, value in golden.cond.items()}
    elif golden.cond is not None:
        tensors["labels" if golden.drawn else COND] = golden.cond
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, str(folder / GOLDEN), metadata={"golden": json.dumps(facts)})


def read_golden(folder: File) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The golden tensors and facts of a folder; Refused where they are malformed."""
    tensors, metadata = read_tensors(folder / GOLDEN)
    try:
        facts = json.loads(metadata["golden"])
        calls = {int(n): c for n, c in facts["calls"].items()}
        prompts = list(facts.get("prompts", []))
        if not isinstance(facts["seed"], int) or not all(c is None or isinstance(c, dict) for c in calls.values()):
            raise ValueError
        if not all(isinstance(p, str) for p in prompts):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise Refused(f"{folder / GOLDEN} has no valid golden facts in its header") from None
    if "noise" not in tensors or any(f"output_{n}" not in tensors for n in calls):
        raise Refused(f"{folder / GOLDEN} lacks the noise or an output")
    return tensors, {**facts, "calls": calls, "prompts": prompts}


def load_golden(folder: File) -> Golden:
    """The golden sample of a folder."""
    tensors, facts = read_golden(folder)
    outputs = {int(k[7:]): v for k, v in tensors.items() if k.startswith("output_") and k[7:].isdigit()}
    named = {k[len(COND) :]: v for k, v in tensors.items() if k.startswith(COND)}
    cond: Cond = named.get("", named) if named else tensors.get("labels")
    pictures = {k: v for k, v in tensors.items() if k in ("image", "mask_image")}
    prompts = tuple(facts["prompts"])
    return Golden(tensors["noise"], outputs, cond, facts["seed"], tensors.get("generator"), prompts, pictures)


@torch.no_grad()
def errors_of(student: Student, golden: Golden) -> dict[int, float]:
    """The largest error of every step count, as a share of the largest value (at least 1)."""
    errors = {}
    for count in student.steps:
        wanted = golden.outputs.get(count)
        if wanted is None:
            continue
        noise, rng = golden.source()
        if tuple(noise.shape[1:]) != student.shape:
            raise Refused(f"the golden noise has shape {list(noise.shape)}, the model takes {list(student.shape)}")
        got = student.generate(noise, golden.cond, rng, count)
        if got.shape != wanted.shape:
            raise Refused(f"the golden sample has shape {list(wanted.shape)}, the model gives {list(got.shape)}")
        errors[count] = float((got - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    return errors


# -- checking ---------------------------------------------------------------------------------------


def check_student(folder: File | str, *, run_program: bool = False, timeout: float = 900) -> Check:
    """Run a model folder's golden sample in a fresh process that never imports this package.

    Folders of networks that no stock pipeline runs are compared in this process, from their safetensors, and so are
    stock ones of a network that the contract describes where diffusers is not installed; an
    exported program can hold code, so it runs only with ``run_program``, for folders that you made yourself.
    Refused where the folder or its contract is malformed; a sample that differs is a Check that is not ok.
    """
    place = File(folder)
    contract = Contract.load(place)
    if contract.pipeline is not None:
        kind, _ = components(place)
        if kind != contract.pipeline:
            raise Refused(f"{place}: model_index.json says {kind}, fewstep.json says {contract.pipeline}")
        stock = importlib.util.find_spec("diffusers") is not None
        if not stock and contract.network is None:
            need_diffusers()
    else:
        scan(place)
        stock = False
    _, facts = read_golden(place)
    if facts["pipeline"] != contract.pipeline:
        raise Refused(f"{place}: the golden sample is of {facts['pipeline']}, the contract of {contract.pipeline}")
    for one in contract.steps:
        if contract.pipeline is not None and facts["calls"].get(one.count, one.call) != one.call:
            raise Refused(f"{place}: golden sample and contract disagree about the call for {one.count} steps")
    errors: dict[int, float] = {}
    messages: list[str] = []
    if not stock:
        net, _ = own_network(place, contract)
        student = contract.student(net) if contract.role == "student" else _one_step(contract, net)
        errors |= errors_of(student, load_golden(place))
        if contract.pipeline is not None:
            messages.append("diffusers is not installed: the network was run by fewstep, not by the stock pipeline")
        elif facts["calls"] and not run_program:
            messages.append("the exported program was not run: it can hold code, ask for it for folders of your own")
    if stock or (contract.pipeline is None and facts["calls"] and run_program):
        found, message = _fresh_process(place, timeout)
        if message:
            return Check(False, float("inf"), (), (message,))
        for count, error in found.items():
            errors[count] = max(errors.get(count, 0.0), error)
    if not errors:
        return Check(False, float("inf"), (), ("no step count of this folder could be run",))
    worst = max(errors.values())
    for count, error in errors.items():
        if not error <= TOLERANCE:
            messages.insert(0, f"{count} step(s) differ from the golden sample by {error:.2e}, allowed {TOLERANCE:g}")
    return Check(all(e <= TOLERANCE for e in errors.values()), worst, tuple(sorted(errors)), tuple(messages))


def need_diffusers() -> None:
    """Say what is missing before any work, without the seconds that an import takes."""
    if importlib.util.find_spec("diffusers") is None:
        raise MissingExtra("diffusers", "diffusers")


def _one_step(contract: Contract, net: nn.Module) -> Student:
    return Student(contract.denoiser(net), contract.shape, start=contract.start, start_scale=contract.start_scale)


def _fresh_process(folder: File, timeout: float) -> tuple[dict[int, float], str]:
    """(errors by step count, "") or ({}, what went wrong)."""
    return fresh_processes([folder], timeout)[0]


def fresh_processes(folders: Sequence[File], timeout: float) -> list[tuple[dict[int, float], str]]:
    """The golden samples of several folders in one fresh process: an import costs more than a small model."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), *map(str, folders)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [({}, f"the fresh process took more than {timeout:g} s")] * len(folders)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        return [({}, f"the fresh process failed: {lines[-1].strip()[:300]}")] * len(folders)
    answers = [json.loads(line) for line in done.stdout.strip().splitlines()[-len(folders) :]]
    return [({int(n): float(e) for n, e in answer["errors"].items()}, "") for answer in answers]
