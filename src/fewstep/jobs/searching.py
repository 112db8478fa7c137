"""Searching a sampler plan for a teacher: no training, and a verdict on starts that nothing was chosen on."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from ..cond import Cond, move
from ..cond import rows as rows_of
from ..denoiser import Denoiser, Guided, choose_taps
from ..errors import Refused
from ..metrics.features import Coordinates, RandomConv, features_for
from ..rng import mix
from ..search import (
    Contest,
    Distance,
    Evolution,
    FeatureDistance,
    Fitting,
    FrechetTo,
    Journal,
    Objective,
    Pairs,
    Pruned,
    Scorer,
    Verdict,
    contest,
    prune,
    solved,
)
from ..search.contest import HOWS, How
from ..search.objective import FINE
from ..solvers import SolverPlan, start_noise
from ..solvers import sample as sampled
from ..tasks import Task, task_named
from ..train.build import own_module
from ..train.trainer import Nobody, Watch
from .setting import size_text
from .using import reference_task

OBJECTIVES = ("auto", "features", "distance", "frechet")
TAPS = 3
"""Layers of the teacher that look at samples."""
GRAPH = 2**16
"""Numbers of a state that go through the differentiable sampler at once."""
REAL = 20_000
"""Real samples that features are taken of."""
FEW = 2**13
"""Numbers of a state that are too few for a batch of ``CHUNK`` starts to be quick."""
CHUNK = 64
"""Starts that are solved finely at a time, and kept."""


def search(
    model: str, nfe: int, *, out: File = File("plan.json"), objective: str = "auto", how: str = "auto",
    budget: int = 300, starts: int = 256, guidance: float = 1.0, prompts: File | None = None, seed: int = 0,
    reference: str | File | None = None, keep: float = 1.0, resume: bool = False, device: str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the best plan of ``nfe`` calls for a teacher; the result says what it gains over each fixed sampler.

    ``reference``: real data, the training split of a task's name, of a folder or of an .npz; None: that of the
    packaged teacher's own task, or none. ``objective``: frechet (features of samples against those of the reference,
    or of the fine solution where there is none), features (distance to the fine solution from the same start, as the
    teacher's own layers see it), distance (the same in the sample itself), auto (frechet where there is a reference,
    else features where there are layers to look at, else distance), or FILE.py:FUNCTION or MODULE:FUNCTION of one's
    own. ``budget`` candidates see up to ``starts`` starts. ``keep`` below 1: its calls leave out blocks until that
    share of the network's FLOPs is left. The state is kept in the folder ``OUT.search`` until the plan is written.
    """
    watch, began = watch or Nobody(), time.perf_counter()
    _sane(nfe, how, budget, starts, seed, out)
    if not 0 < keep <= 1:
        raise Refused(f"keep is the share of the FLOPs that is left, above 0 and at most 1, got {keep:g}")
    scored = _own(objective)
    if reference is not None and objective not in ("auto", "frechet"):
        raise Refused(f"a reference is read by the objective frechet, and {objective!r} was asked for: leave out one")
    teacher = _teacher(model)
    state = out.with_name(f"{out.name}.search")
    if state.exists() and not resume:
        raise Refused(f"{state} holds a search that was not finished: add --resume, or remove that folder")
    if resume and not state.exists():
        raise Refused(f"nothing to resume: there is no {state}; leave out --resume to start")
    teacher.denoiser.to(device).requires_grad_(False)
    denoiser: Denoiser = teacher.denoiser if guidance == 1 else Guided(teacher.denoiser, guidance, teacher.null)
    conditions = _conditions(teacher, prompts)
    data = _data(reference, model, teacher) if objective in ("auto", "frechet") else None
    law = objective == "frechet" or objective == "auto" and data is not None
    state.mkdir(parents=True, exist_ok=True)
    journal = Journal(state / "journal.jsonl", {
        "teacher": teacher.sha256 or model, "nfe": nfe, "objective": objective, "how": how, "budget": budget,
        "starts": starts, "guidance": guidance, "prompts": None if prompts is None else prompts.read_text("utf-8"),
        "seed": seed, "device": torch.device(device).type, "fine": FINE, "keep": keep,
        "reference": None if data is None else str(reference or data.name),
    })  # fmt: skip
    counts = {"train": starts, "valid": starts if law else max(32, starts // 2), "held": starts}
    watch.start("fine solution", sum(counts.values()))
    sets, done = dict[str, Pairs](), 0
    for name, count in counts.items():
        sets[name] = _pairs(denoiser, teacher.shape, conditions, name, count, seed, device, state, watch, done)
        done += count
    watch.finish("fine solution")
    wanted = _objective(objective, scored, teacher, denoiser, sets, data, watch)
    if isinstance(wanted, FeatureDistance):
        sets = {name: wanted.marked(pairs) for name, pairs in sets.items()}
    options = Contest(
        denoiser, sets["train"], sets["valid"], sets["held"], wanted, _how(how),
        Evolution(budget=budget, first=min(max(64, starts // 2) if wanted.law else 64, starts), seed=seed),
        Fitting(200, min(64, starts), max(1, min(64, GRAPH // math.prod(teacher.shape))), seed=seed),
        max(CHUNK, min(2 * CHUNK, FEW // math.prod(teacher.shape))),
    )  # fmt: skip
    verdict = contest(nfe, options, journal=journal, tell=_teller(watch))
    pruned, few = None, options
    if keep < 1:
        if wanted.law:
            fitting = replace(options.fitting, steps=300)
            few = replace(_held_to(verdict.plan, options, teacher), fitting=fitting)
        few = replace(few, evolution=replace(few.evolution, budget=budget if wanted.law else max(30, budget // 5)))
        pruned = prune(verdict.plan, few, keep=keep, journal=journal, tell=_teller(watch))
    (verdict.plan if pruned is None else pruned.plan).save(out)
    shutil.rmtree(state, ignore_errors=True)
    result = _result(verdict, model, out, nfe, wanted.name, starts, time.perf_counter() - began)
    return result if pruned is None else _with_blocks_left_out(result, pruned, few.objective.name)


def _held_to(plan: SolverPlan, options: Contest, teacher: Any) -> Contest:
    """The same contest with the plan's own samples for the fine solution.

    A distance of laws on a few hundred starts cannot tell one mask from another; a distance of pairs can.
    """

    def made(pairs: Pairs) -> Pairs:
        with torch.no_grad():
            return Pairs(pairs.x, pairs.cond, sampled(options.model, pairs.x, plan, cond=pairs.cond))

    train, valid, held = made(options.train), made(options.valid), made(options.held)
    try:
        features = FeatureDistance(_tapped(teacher.denoiser, options.model, train), train)
    except ValueError:  # a network that shows none is compared in the sample itself
        distance = Distance(float(train.ends.double().std()))
        return replace(options, objective=distance, train=train, valid=valid, held=held)
    train, valid, held = (features.marked(pairs) for pairs in (train, valid, held))
    return replace(options, objective=features, train=train, valid=valid, held=held)


def _sane(nfe: int, how: str, budget: int, starts: int, seed: int, out: File) -> None:
    if not 1 <= nfe <= 1000:
        raise Refused(f"nfe must lie between 1 and 1000 calls, got {nfe}")
    if how not in HOWS:
        raise Refused(f"unknown search {how!r}: one of {', '.join(HOWS)}")
    if budget < 1:
        raise Refused(f"budget must be at least 1 candidate, got {budget}")
    if starts < 2:
        raise Refused(f"starts must be at least 2, got {starts}")
    if not 0 <= seed < 2**62:
        raise Refused(f"seed must lie between 0 and {2**62 - 1}, got {seed}")
    if how in ("cma", "tpe"):
        from ..errors import need

        need("cma" if how == "cma" else "optuna", "search")
    if out.exists():
        raise Refused(f"{out} is already there: take another --out")
    if not out.parent.is_dir():
        raise Refused(f"there is no folder {out.parent}")


def _how(text: str) -> How:
    return next(how for how in ("auto", "evolution", "gradient", "cma", "tpe") if how == text)  # type: ignore[return-value]


def _teacher(model: str) -> Any:
    from ..interop import load_teacher

    folder = File(model)
    inside = folder / "teacher"
    return load_teacher(inside if (inside / "fewstep.json").is_file() else model)


def _own(objective: str) -> Callable[..., Any] | None:
    """The function of ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``; None for an objective of ours."""
    if objective in OBJECTIVES:
        return None
    place, _, name = objective.rpartition(":")
    if not place:
        from ..registry import nearest

        raise Refused(
            f"unknown objective {objective!r}: {nearest(objective, list(OBJECTIVES))} (or FILE.py:FUNCTION of your own)"
        )
    if place.endswith(".py"):
        if not File(place).is_file():
            raise Refused(f"there is no {place}: an objective is FILE.py:FUNCTION, or one of {', '.join(OBJECTIVES)}")
        module = own_module(File(place))
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise Refused(f"objective {objective!r}: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise Refused(f"{place} has no function {name!r}: scorer(samples, cond) -> a number, lower is better")
    made: Callable[..., Any] = found
    return made


def _conditions(teacher: Any, prompts: File | None) -> Callable[[int], Cond]:
    """(count) -> the conditions of that many starts: labels or prompts in turn."""
    if prompts is not None:
        try:
            lines = [line.strip() for line in prompts.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise Refused(f"{prompts} is not text in UTF-8") from None
        if not lines:
            raise Refused(f"{prompts} holds no prompt: write one a line")
        known = teacher.embed(lines)
        return lambda count: rows_of(known, torch.arange(count) % len(lines))
    if teacher.recording is not None and teacher.classes is None and teacher.recording.negative is not None:
        raise Refused(f"{teacher.name} takes prompts: give --prompts, a text file with one a line")
    if teacher.classes:
        return lambda count: torch.arange(count) % teacher.classes
    return lambda count: None


def _pairs(
    model: Denoiser, shape: tuple[int, ...], conditions: Callable[[int], Cond], name: str, count: int, seed: int,
    device: str, state: File, watch: Watch, done: int,
) -> Pairs:  # fmt: skip
    """Starts and their fine solution; every chunk is kept once it is whole."""
    from safetensors.torch import load_file, save_file

    rng = torch.Generator().manual_seed(mix(seed, "starts", name))
    noise = torch.randn((count, *shape), generator=rng)
    x, cond = start_noise(model.path, model.path.t_max, noise).to(device), move(conditions(count), device)
    found = []
    for at in range(0, count, CHUNK):
        part, file = slice(at, at + CHUNK), state / f"fine-{name}-{at}.safetensors"
        if not file.is_file():
            ends = solved(model, x[part], rows_of(cond, part), batch=CHUNK // 2).ends
            aside = file.with_name(f".{file.name}.{os.getpid()}.part")
            save_file({"ends": ends.cpu().contiguous()}, aside)
            aside.replace(file)
        found.append(load_file(file)["ends"].to(device))
        watch.advance("fine solution", done + min(at + CHUNK, count))
    ends = torch.cat(found)
    if not ends.isfinite().all():
        raise Refused("the fine solution of this teacher is not finite: nothing can be searched on it")
    return Pairs(x, cond, ends)


def _data(reference: str | File | None, model: str, teacher: Any) -> Task | None:
    """The task of real data that samples are held to; None where nothing is known of it."""
    from ..interop import packaged

    own = teacher.contract.task if model in packaged() and teacher.contract is not None else None
    if reference is not None:
        task = reference_task(reference, teacher.shape)
    elif own is not None:
        task = task_named(own)
    else:
        return None
    if not task.has_data:
        raise Refused(f"reference {str(reference)!r} holds no samples to compare with")
    with torch.no_grad():
        made = tuple(teacher.decode(torch.zeros(1, *teacher.shape)).shape[1:])
    if made != tuple(task.shape):
        raise Refused(f"the teacher makes {size_text(made)}, the reference is {size_text(task.shape)}")
    return task


def _against_data(task: Task, finish: Callable[[Tensor], Tensor], watch: Watch) -> Objective:
    """The Fréchet distance to real data, by a network that chooses and is not the one that measures."""
    running: list[int] = []

    def tell(done: int, total: int) -> None:
        if not running:
            running.append(total)
            watch.start("features of the data", total)
        watch.advance("features of the data", done)

    features = features_for(task, purpose="select", tell=tell)
    if running:
        watch.finish("features of the data")
    count = min(len(task.train), REAL)
    pick = torch.linspace(0, len(task.train) - 1, count).long()
    return FrechetTo(features, task.train.rows(pick).data, finish)


def _objective(
    text: str, own: Callable[..., Any] | None, teacher: Any, denoiser: Denoiser, sets: dict[str, Pairs],
    data: Task | None, watch: Watch,
) -> Objective:  # fmt: skip
    ends = sets["train"].ends
    low, high = teacher.value_range or (-1.0, 1.0)

    def finish(x: Tensor) -> Tensor:
        with torch.no_grad():
            done: Tensor = teacher.decode(x.float().cpu()).clamp(low, high)
            return done

    if own is not None:
        return Scorer(own, text, finish)
    if data is not None:
        return _against_data(data, finish, watch)
    if text in ("auto", "features"):
        try:
            return FeatureDistance(_tapped(teacher.denoiser, denoiser, sets["train"]), sets["train"])
        except ValueError as error:
            if text == "features":
                raise Refused(f"this teacher shows no features ({error}): take --objective distance") from None
    if text in ("auto", "distance"):
        return Distance(float(ends.double().std()))
    features = RandomConv(tuple(teacher.shape), seed=1) if len(teacher.shape) == 3 else Coordinates()
    return FrechetTo(lambda x: features(x.float().cpu()), torch.cat([pairs.ends for pairs in sets.values()]))


def _tapped(inner: Any, denoiser: Denoiser, pairs: Pairs) -> Denoiser:
    """The denoiser with layers chosen to look at, where none are; ValueError where there are none to choose."""
    net = getattr(inner, "net", None)
    if net is None:
        raise ValueError("it is no network of layers")
    if not inner.taps:
        few = pairs.rows(slice(0, 2))
        inner.taps = choose_taps(net, lambda: denoiser(few.x, denoiser.path.t_max, few.cond), TAPS)
    return denoiser


def _teller(watch: Watch) -> Callable[[str, int, int, float], None]:
    """Stages as bars, one after the other."""
    running: list[str] = []

    def tell(stage: str, done: int, total: int, best: float) -> None:
        if stage not in running:
            watch.start(stage, total)
            running.append(stage)
        watch.advance(stage, done, f"best {best:.4g}")
        if done >= total:
            watch.finish(stage)

    return tell


def _with_blocks_left_out(result: dict[str, Any], pruned: Pruned, name: str) -> dict[str, Any]:
    chance = sum(pruned.chance) / len(pruned.chance)
    line = (
        f"with blocks left out: {100 * pruned.flops:.0f} % of the FLOPs, {name} {pruned.score:.4g} on the same "
        f"starts (the whole network {pruned.whole:.4g}, random blocks of that cost {chance:.4g})"
    )
    skip = [list(step.skip) for step in pruned.plan.steps]
    return {
        **result, "flops": pruned.flops, "pruned_score": pruned.score, "skip": skip, "line": f"{result['line']}\n{line}"
    }  # fmt: skip


def _result(
    verdict: Verdict, model: str, out: File, nfe: int, wanted: str, starts: int, seconds: float
) -> dict[str, Any]:
    rows = [
        {"sampler": name.split()[0], "grid": (name.split() + [None])[1], "score": score, "gain": score / verdict.score}
        for name, score in verdict.fixed.items()
    ]
    if verdict.how == "fixed":
        name = next(name for name, score in verdict.fixed.items() if score == verdict.score)
        line = f"{out}: no candidate beat a fixed sampler, {name}: the plan is that one"
    else:
        beside = f"{verdict.gain:.2f} times below" if verdict.gain >= 1 else f"{1 / verdict.gain:.2f} times above"
        line = (
            f"{out}: {verdict.score:.4g} on {starts} unseen starts, {beside} the best fixed sampler "
            f"({verdict.best_fixed}), found by {verdict.how}"
        )
    return {
        "plan": str(out), "model": model, "nfe": nfe, "objective": wanted, "found_by": verdict.how,
        "score": verdict.score, "best_fixed": verdict.best_fixed, "gain": verdict.gain, "unseen_starts": starts,
        "seconds": round(seconds, 1), "fixed": rows, "line": line,
    }  # fmt: skip


def table_of(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for people: the plan, then every fixed sampler on its best grid."""
    best: dict[str, dict[str, Any]] = {}
    for row in result["fixed"]:
        best.setdefault(row["sampler"], row)
    rows: list[list[Any]] = [["the plan", None, result["score"], 1.0]]
    rows += [[row["sampler"], row["grid"], row["score"], row["gain"]] for row in best.values()]
    return ["sampler", "grid", result["objective"], "times the plan's"], rows


__all__ = ["OBJECTIVES", "search", "table_of"]
