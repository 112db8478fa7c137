"""The package as a user's shell and another program meet it: what an import costs, what ships, what is promised."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import fewstep
from fewstep.machine import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_command_line_loads_neither_torch_nor_rich_nor_an_extra():
    assert not loaded_by("import fewstep.cli") & {"torch", "numpy", "diffusers", "rich", "sklearn"}


def test_importing_fewstep_loads_no_library_at_all():
    assert not loaded_by("import fewstep") & {"torch", "diffusers", "sklearn", "matplotlib", "scipy", "transformers"}


def test_the_mathematics_and_the_recipes_load_no_extra():
    loaded = loaded_by(
        "from fewstep import nets, solvers, tasks, teachers; import fewstep.methods.dmd2, fewstep.train.recipe"
    )
    assert "torch" in loaded
    assert not loaded & {"diffusers", "sklearn", "matplotlib", "scipy", "transformers", "torchmetrics", "PIL"}


def test_the_light_core_trains_checks_and_samples_without_one_extra(tmp_path):
    absent = [module for modules in EXTRAS.values() for module in modules]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import torch
from fewstep import cli, solvers
from fewstep.path import Exploding
from fewstep.tasks import task_named
law = task_named("mixture").law
times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
assert solvers.sample(law, torch.randn(4, 2), times, solvers.Euler()).isfinite().all()
for line in ("train mixture_flow steps=2 -o run --device cpu", "check run", "sample run -n 2 --steps 2 --device cpu",
             "check {ROOT / "src/fewstep/assets/digits_teacher"}"):
    assert cli.main([*line.split(), "-q"]) == 0, line
sys.exit(cli.main(["plan", "digits", "-q"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert len(list((tmp_path / "samples").glob("*.safetensors"))) == 2, done.stderr
    assert done.returncode == 3
    assert done.stderr == "fewstep: this needs sklearn: pip install 'fewstep[evaluate]'\n"


def test_every_pin_of_the_constraints_is_a_thing_that_is_asked_for_or_kept_out():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+(==[0-9][0-9a-z.]*|<0)", pin) for pin in pins)
    assert {"torchvision<0", "torchaudio<0"} <= set(pins)
    asked = [*PROJECT["dependencies"], *(need for extra in PROJECT["optional-dependencies"].values() for need in extra)]
    pinned = {normal(pin) for pin in pins}
    assert {normal(need) for need in asked} - {"fewstep"} <= pinned


def normal(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_-]", requirement)[0].lower().replace("_", "-")


def test_the_core_asks_for_seven_light_packages_and_no_more():
    asked = {normal(need) for need in PROJECT["dependencies"]}
    assert asked == {"torch", "numpy", "safetensors", "pydantic", "tomlkit", "typer", "rich"}


def test_doctor_knows_every_extra_that_can_be_installed():
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"standard", "dev"}
    for extra, modules in EXTRAS.items():
        assert len(modules) == len(PROJECT["optional-dependencies"][extra])


def test_the_package_carries_its_type_marker_and_one_version():
    assert resources.files("fewstep").joinpath("py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", fewstep.__version__)
    assert f"## {fewstep.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_target_that_the_makefile_promises_is_there():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "verify", "lint", "bench", "docs", "clean", "help"):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target
