"""This machine: devices, threads, versions, and what ``fewstep doctor`` has to say about them.

Heavy imports are inside the functions, so that the command line can import this file for nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import Refused

DEVICES = ("auto", "cpu", "cuda", "mps")

# what an extra brings: the module that tells whether it is there
EXTRAS: dict[str, tuple[str, ...]] = {
    "diffusers": ("diffusers", "accelerate"),
    "evaluate": ("torchmetrics", "scipy", "sklearn", "PIL", "jinja2", "matplotlib"),
    "text": ("transformers", "peft"),
    "data": ("pyarrow",),
    "search": ("optuna", "cma"),
    "serve": ("fastapi", "uvicorn", "multipart", "prometheus_client"),
    "ui": ("gradio",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "audio": ("soundfile",),
    "rl": ("gymnasium", "mujoco"),
    "track": ("tensorboard",),
    "quant": ("torchao",),
}

# two packages that do each other harm, and the mend
PAIRS: tuple[tuple[str, str, str], ...] = (
    (
        "torchao",
        "diffusers",
        "diffusers prints failed imports beside torchao; where you do not quantise: pip uninstall torchao",
    ),
    (
        "torchvision",
        "torch",
        "a torchvision built for another torch breaks imports of transformers; fewstep needs none: "
        "pip uninstall torchvision",
    ),
)


def pick_device(name: str) -> str:
    """The device to work on; Refused, with the mend, where it is not there.

    >>> pick_device("cpu")
    'cpu'
    >>> pick_device("gpu")
    Traceback (most recent call last):
    fewstep.errors.Refused: unknown device 'gpu': one of auto, cpu, cuda, mps
    """
    kind, _, number = name.partition(":")
    if kind not in DEVICES or (number and not number.isdigit()):
        raise Refused(f"unknown device {name!r}: one of {', '.join(DEVICES)}")
    if kind == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    if kind in ("auto", "cuda") and count and not number and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        mine = int(os.environ.get("LOCAL_RANK", "0"))  # a launcher started several processes: each has its card
        if mine >= count:
            raise Refused(
                f"process {mine} of this machine has no card, there are {count}: start {count}, or --device cpu"
            )
        return f"cuda:{mine}"
    if kind == "auto":
        return "cuda" if count else "mps" if apple else "cpu"
    if kind == "mps" and not apple:
        raise Refused("device 'mps' is not there (it needs an Apple GPU): take --device cpu or auto")
    if kind == "cuda" and not count:
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA card"
        raise Refused(f"device {name!r} is not there ({why}): take --device cpu or auto")
    if kind == "cuda" and number and int(number) >= count:
        raise Refused(f"device {name!r} is not there: this machine has cuda:0 to cuda:{count - 1}")
    return name


def physical_cores() -> int:
    """Cores that this process may use: hyperthreads count once, container limits count.

    >>> 1 <= physical_cores() <= os.cpu_count()
    True
    """
    logical = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return max(1, logical // 2) if platform.machine() == "x86_64" else logical
    mine = os.sched_getaffinity(0)
    siblings = set()
    for cpu in mine:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    cores = len(siblings)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no limit
    return cores


def set_threads(count: int | None = None) -> int:
    """Give torch its threads: ``count``, else OMP_NUM_THREADS, else one per physical core, shared with siblings."""
    import torch

    siblings = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count is None and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return torch.get_num_threads()
    torch.set_num_threads(count or max(1, physical_cores() // siblings))
    return torch.get_num_threads()


def memory(device: str) -> int:
    """Bytes that a job may take on a device: all of a GPU's, what is free of the host's, within container limits.

    >>> memory("cpu") > 2**20
    True
    """
    kind, _, number = device.partition(":")
    if kind in ("cuda", "mps"):
        import torch

        if kind == "cuda":
            return int(torch.cuda.get_device_properties(int(number or 0)).total_memory)
        return int(torch.mps.recommended_max_memory())
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            free = min(free, max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        pass  # no limit
    return free


def matrix_rate(device: str, dtype: str = "float32") -> float:
    """Floating point operations a second of a large matrix product: the best of five."""
    import torch

    size = 768 if device == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not there."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """Each extra and the modules of it that are missing here; an empty list means that it is installed."""
    return {
        name: [module for module in modules if importlib.util.find_spec(module) is None]
        for name, modules in EXTRAS.items()
    }


def bad_pairs() -> list[str]:
    return [f"{a} {version(a)} beside {b} {version(b)}: {mend}" for a, b, mend in PAIRS if version(a) and version(b)]


def _conv_step() -> Callable[[], None]:
    """One training step of a small convolutional network, the size of the digits U-Net."""
    import torch
    from torch import nn

    body = nn.Sequential(
        nn.Conv2d(1, 48, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(48, 1, 3, padding=1),
    )
    descend = torch.optim.Adam(body.parameters(), fused=True)
    x = torch.randn(128, 1, 8, 8)

    def step() -> None:
        descend.zero_grad()
        (body(x) - x).square().mean().backward()
        descend.step()

    return step


def measure_threads(counts: tuple[int, ...], rounds: int = 5, steps: int = 8) -> dict[int, float]:
    """Milliseconds of a small training step with each number of threads: medians of interleaved rounds."""
    from statistics import median

    import torch

    before = torch.get_num_threads()
    step, taken = _conv_step(), {count: list[float]() for count in counts}
    try:
        for _ in range(rounds):
            for count in counts:
                torch.set_num_threads(count)
                step()
                start = time.perf_counter()
                for _ in range(steps):
                    step()
                taken[count].append((time.perf_counter() - start) / steps * 1e3)
    finally:
        torch.set_num_threads(before)
    return {count: median(times) for count, times in taken.items()}


def examine() -> dict[str, Any]:
    """Everything that ``fewstep doctor`` reports, as plain values."""
    import torch

    from . import __version__

    cores = physical_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    times = measure_threads(tuple(sorted({1, 2, cores})) if cores > 1 else (1,))
    best = min(times, key=times.__getitem__)
    advice = f"{best} thread{'s' if best > 1 else ''}: FEWSTEP_THREADS={best}"
    loaded = load > 0.5 * cores
    if loaded:
        advice += f" (the machine is loaded, {load:.1f} waiting for {cores} cores: measure again when it is idle)"
    devices = {"cpu": f"{cores} cores, {platform.machine()}"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    packages = (
        "torch",
        "numpy",
        "safetensors",
        "pydantic",
        "diffusers",
        "transformers",
        "torchmetrics",
        "scikit-learn",
    )
    return {
        "fewstep": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "versions": {name: found for name in packages if (found := version(name))},
        "extras": extras(),
        "devices": devices,
        "threads": {
            "cores": cores,
            "ms_per_step": {str(count): round(value, 3) for count, value in times.items()},
            "best": best,
            "load": round(load, 2),
            "loaded": loaded,
            "advice": advice,
        },
        "warnings": bad_pairs(),
    }
