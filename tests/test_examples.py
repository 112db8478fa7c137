"""Every example runs as a script and prints the number that it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PROMISES = {
    "01_exact_law.py": r"by a factor of ([\d.]+)  \(promised: (at least) 5\)",
    "02_guidance.py": r"recognised by ([\d.]+)  \(promised: (at least) 0\.08\)",
    "03_one_step_on_a_mixture.py": r"is ([\d.]+) times nearer .*\(promised: (at least) 5\)",
    "04_my_method.py": r"real data: ([\d.]+)  \(promised: (at most) 0\.3\)",
    "05_plain_diffusers.py": r"calls of the network: (\d+)  \(promised: (at most )?1\)",
    "06_scheduler.py": r"than Euler by a factor of ([\d.]+)  \(promised: (at least) 3\)",
}


def output_of(name: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROMISES))
def test_an_example_keeps_its_promise(name, tmp_path):
    if name.startswith(("05", "06")):
        pytest.importorskip("diffusers")
        if not (ROOT / "src/fewstep/assets/digits_teacher").is_dir():
            pytest.skip("no packaged digits teacher in this checkout")
    text = output_of(name, tmp_path)
    found = re.search(PROMISES[name], text)
    assert found, text
    value, bound = float(found[1]), float(re.findall(r"[\d.]+", found[0])[-1])
    assert value >= bound if found[2] == "at least" else value <= bound


def test_every_example_has_a_promise_to_keep():
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(PROMISES)


def test_the_example_of_plain_diffusers_imports_nothing_of_this_package():
    text = (EXAMPLES / "05_plain_diffusers.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) fewstep", text, re.MULTILINE)


def test_the_recipe_among_the_examples_is_valid_and_takes_the_method_among_them():
    from fewstep.train.build import method_class
    from fewstep.train.recipe import load_recipe

    recipe = load_recipe(EXAMPLES / "mixture.toml", ["steps=10"])
    assert recipe.steps == 10
    assert method_class(f"{EXAMPLES / '04_my_method.py'}:MyMethod").name == "energy"
