"""How long a user waits before anything happens: ``import fewstep`` and ``fewstep --help``.

    python benchmarks/startup.py                   # table; --json FILE writes it, --quick is a smoke run

Each is a fresh process; the median counts. ``--help`` has a bar of 0.5 s, and importing the package must not
import what only some commands need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BAR = 0.5
HEAVY = ("torch", "diffusers", "transformers", "sklearn", "scipy", "matplotlib", "torchmetrics", "PIL", "jinja2")
COMMANDS = {
    "python": ["-c", "pass"],
    "import fewstep": ["-c", "import fewstep"],
    "fewstep --help": ["-m", "fewstep", "--help"],
    "import torch": ["-c", "import torch"],
}
LOADED = "import sys, fewstep; print(' '.join(m for m in sys.argv[1:] if m in sys.modules))"


def seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="once each: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(1 if options.quick else options.rounds):
        for name, arguments in COMMANDS.items():
            taken[name].append(seconds(arguments))
    rows = [{"name": name, "seconds": statistics.median(t), "least": min(t)} for name, t in taken.items()]
    print(f"{'':16}{'median':>9}{'least':>9}")
    for row in rows:
        print(f"{row['name']:16}{row['seconds']:7.3f} s{row['least']:7.3f} s")
    answer = subprocess.run([sys.executable, "-c", LOADED, *HEAVY], check=True, capture_output=True, text=True)
    loaded = answer.stdout.split()
    print(f"import fewstep brings along: {', '.join(loaded) or 'none'} of {', '.join(HEAVY)}")
    if options.json:
        options.json.write_text(
            json.dumps({"schema": 1, "rows": rows, "loaded": loaded}, indent=1) + "\n", encoding="utf-8"
        )
    help_seconds = next(row["least"] for row in rows if row["name"] == "fewstep --help")
    if (help_seconds > BAR and not options.quick) or loaded:
        print(
            f"fewstep --help took {help_seconds:.2f} s, the bar is {BAR} s" if not loaded else "the import is not light"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
