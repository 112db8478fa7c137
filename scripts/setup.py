"""Make .venv: a virtual environment with this project and the extras named, at the versions of constraints.txt.

    python scripts/setup.py .venv standard [dev ...]

The Makefile calls it; only the standard library is used. Where the machine has no NVIDIA card, torch comes
from PyTorch's CPU index (``TORCH_INDEX``), because the plain Linux package brings gigabytes of CUDA.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE = 3.0  # seconds for the index to answer
PIP = ("-m", "pip", "install", *([] if sys.stdout.isatty() else ["--quiet"]))


def run(*command: str | Path) -> int:
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode


def pinned(package: str) -> str:
    """The requirement in constraints.txt, e.g. "torch==2.13.0"; the bare name where there is none."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next((line.strip() for line in lines if line.startswith(f"{package}==")), package)


def nvidia() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def reached(index: str) -> bool:
    """Whether a package index answers within seconds; a thread, because looking up a name knows no time limit."""
    answers: list[int] = []

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            answers.append(urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=PATIENCE).status)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE + 1)
    return answers == [200]


def install_torch(python: Path) -> int:
    """Put torch there first, without CUDA where there is no card to use it."""
    there = f"import torch, sys; sys.exit(torch.__version__.split('+')[0] != {pinned('torch').split('==')[-1]!r})"
    if subprocess.run([python, "-c", there], check=False, stderr=subprocess.DEVNULL).returncode == 0:
        return 0
    wanted, index = pinned("torch"), os.environ.get("TORCH_INDEX", CPU_INDEX)
    if sys.platform != "darwin" and not nvidia() and index:
        if reached(index):
            print(f"no NVIDIA card: torch from {index}", flush=True)
            if run(python, *PIP, "--no-deps", "--index-url", index, wanted) == 0:
                return 0
        print(f"{index} does not answer or lacks {wanted}: taking the plain package", flush=True)
    return run(python, *PIP, "-c", "constraints.txt", wanted)


def main(folder: str, *extras: str) -> int:
    start, home = time.monotonic(), ROOT / folder
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"setting up {folder} with Python {sys.version.split()[0]} (some minutes, once)", flush=True)
        venv.create(home, with_pip=True, clear=home.exists())
    if install_torch(python) != 0:
        return 1
    wanted = f".[{','.join(extras)}]" if extras else "."
    if run(python, *PIP, "-c", "constraints.txt", "-e", wanted) != 0:
        return 1
    print(f"{folder} is ready: {wanted} in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
