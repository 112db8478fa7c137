"""What a person asked for: a recipe and its changes, the folder of a run, lists of numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import Refused

if TYPE_CHECKING:
    from ..train.recipe import Recipe


def recipe_of(
    what: str,
    overrides: Sequence[str] | None,
    seed: int | None,
    data: Path | None = None,
    method: str | None = None,
    lora: int | None = None,
    prompts: Path | None = None,
) -> Recipe:
    """A recipe by name, from a file or from a run; or made for a diffusers folder."""
    from ..template import recipe_for_folder
    from ..train.recipe import load_recipe, recipe_from, shipped

    changes = [*(overrides or ()), *([f"seed={seed}"] if seed is not None else [])]
    if lora is not None:
        changes.append(f"student.lora.rank={lora}")
    folder = Path(what) if what not in shipped() and Path(what).is_dir() else None
    if folder and (folder / "model_index.json").exists():
        if prompts is not None:
            if data is not None:
                raise Refused("--data and --prompts are two sources: captions of images belong beside them, in --data")
            return recipe_from(recipe_for_folder(folder, None, method or "dmd2", prompts), changes, where=what)
        if data is None or method is None:
            raise Refused(
                f"{what} is a teacher: say on what and how, --data ./images --method dmd2, or --prompts prompts.txt"
            )
        return recipe_from(recipe_for_folder(folder, data, method), changes, where=what)
    if folder and not (folder / "recipe.toml").exists():
        raise Refused(f"{what} is neither a teacher (it has no model_index.json) nor a run (no recipe.toml)")
    source = folder / "recipe.toml" if folder else what
    if data is None and method is None and prompts is None:
        return load_recipe(source, changes)
    plain = load_recipe(source).model_dump(mode="json", exclude_none=True)
    if data is not None:
        plain["task"] = {"name": "images", "options": {"path": str(data)}}
    if prompts is not None:
        plain["task"] = {"name": "prompts", "options": {"path": str(prompts)}}
    if method is not None and method != plain["method"]["name"]:
        plain.update(method={"name": method}, stages=[])  # options and later stages belong to the other method
    return recipe_from({**plain, "expect": {}}, changes, where=str(source))


def chosen_recipe(
    what: str,
    overrides: Sequence[str] | None,
    seed: int | None,
    data: Path | None,
    method: str | None,
    lora: int | None,
    prompts: Path | None,
    device: str,
    budget: dict[str, float | None],
) -> tuple[Recipe, str | None]:
    """The recipe that is asked for; with ``--method auto`` the one that was chosen, and the line that says why."""
    if method != "auto":
        for name, value in budget.items():
            if value is not None:
                raise Refused(f"--{name} {value:g} is a budget to choose by: add --method auto")
        return recipe_of(what, overrides, seed, data, method, lora, prompts), None
    if lora is not None:
        raise Refused(f"--lora {lora} and --method auto both choose what learns: leave one of them out")
    base = recipe_of(what, None, seed, data, "dmd2" if data or prompts else None, None, prompts)
    from .. import jobs

    changes = [*(overrides or ()), *([f"seed={seed}"] if seed is not None else [])]

    return jobs.choose(base, changes, device=device, memory=budget["memory"], minutes=budget["minutes"])


def run_folder(what: str, out: Path | None, resume: bool) -> Path:
    """The run to write: a new folder, or with ``resume`` the one that is there."""
    source = Path(what)
    if out is None and resume and (source / "recipe.toml").exists():
        return source
    name = source.resolve().name if source.is_dir() else source.stem
    runs = [Path("runs") / (name if k == 1 else f"{name}-{k}") for k in range(1, 1000)]
    if resume:
        there = out or next((run for run in reversed(runs) if run.exists()), None)
        if there is None or not there.exists():
            raise Refused(f"nothing to resume: there is no run {there or runs[0]}; leave out --resume to start one")
        return there
    if out is None:
        return next(run for run in runs if not run.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is already there: add --resume to go on with it, or take another --out")
    return out


def licence_accepted(recipe: Recipe, run: Path, given: bool, resume: bool) -> bool:
    """Whether a restrictive licence was accepted: by the option, or by a person at a terminal who is asked."""
    from ..jobs.consent import question

    line = None if given or (resume and (run / "recipe.toml").exists()) else question(recipe)
    if line is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return given
    return typer.confirm(f"{line}. Go on?", err=True)


def existing(path: Path) -> Path:
    if not path.exists():
        raise Refused(f"there is no {path}")
    return path


def labels_of(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise Refused(f"labels are whole numbers with commas between them, got {text!r}")
    return [int(part) for part in parts]


def sizes_of(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise Refused(f"numbers of rows are whole numbers from 1 to 4096 with commas between them, got {text!r}")
    return [int(part) for part in parts]
