"""``--method auto``: which method, divergence and critic, from the teacher, the data and the budget, and why."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any

from .. import machine
from ..errors import Refused
from ..path import Exploding
from ..tasks.prompts import Prompts
from ..train.processes import agree, alone
from ..train.recipe import Recipe, recipe_from
from .planning import least, rehearsed_setting, weighed
from .setting import Setting

GIB = 2**30
SMALL_SIDE = 16
"""Pictures of at most this side are learnt best from pairs; one regression step blurs those of 28 (docs/choose.md)."""
HUGE = 50_000_000
"""Parameters from which on the activations of the distance of scores are not worth a try before the cheaper game."""
FEW = 200
"""Steps below which a game of student and critic has no time to play out."""
PAIRS, LEAST_PAIRS, PAIR_CALLS = 12_000, 512, 8
RANK = 32
TURNS, SHARE = 4, 0.3
"""Behind the pairs: critic turns of the game that ends it, and its updates beside theirs (recipe digits_match)."""
USABLE = 0.8  # of a time budget: the rest is loading and the evaluation

Changes = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A method with its options, in words."""

    name: str
    words: str
    why: str
    options: Changes
    full: bool = True  # a critic as a whole copy
    student_lora: bool = False
    then: bool = False  # a game goes on from it, where there is room


def choose(
    base: Recipe,
    overrides: Sequence[str] = (),
    *,
    device: str = "cpu",
    memory: float | None = None,
    minutes: float | None = None,
) -> tuple[Recipe, str]:
    """The recipe that auto stands for, and the line that says why.

    ``base`` names task, teacher and student; its method counts only where auto comes to the same. ``memory`` in GiB and
    ``minutes`` of training are the budget; without them the device's own memory and the recipe's steps. ``overrides``
    have the last word. The recipe names the method: a run of it needs no auto. Refused where nothing fits.
    """
    if base.teacher is None:
        raise Refused(f"--method auto chooses how to distil a teacher, and recipe {base.name!r} names none")
    limit = machine.memory(device) if memory is None else round(memory * GIB)
    before = [text for text in overrides if not text.startswith("method.")]
    plain = base.model_dump(mode="json", exclude_none=True)
    first = recipe_from({**plain, "stages": []}, before, where=base.name or "recipe")
    with contextlib.ExitStack() as left:
        scratch = alone(lambda: left.enter_context(tempfile.TemporaryDirectory()))  # a teacher may be trained into it
        setting = rehearsed_setting(first, File(scratch), device)
        found = decide(first, setting, device, limit, minutes)
        recipe, line = alone(lambda: found)  # memory and clocks of the first of several processes
        agree(True)  # nobody clears away what another still reads
    plain = recipe.model_dump(mode="json", exclude_none=True)
    return recipe_from(plain, overrides, where=base.name or "recipe"), line


def decide(
    first: Recipe, setting: Setting, device: str, limit: int, minutes: float | None = None
) -> tuple[Recipe, str]:
    """The first candidate that stays within ``limit`` bytes and has time enough, as a recipe, and the line."""
    tried: list[tuple[Candidate, int]] = []
    for one in _candidates(first, setting):
        recipe = _with(first, one, setting)
        need, each = _cost(recipe, setting, device, limit)
        if need > limit:
            tried.append((one, need))
            continue
        steps = recipe.steps if minutes is None else int(USABLE * 60 * minutes / each)
        if steps < min(FEW, recipe.steps) and one.name != "regression" and setting.task.has_data:
            short = f"{minutes:g} min are {steps} steps of {one.name}, too few for a game; pairs cannot collapse"
            one = _regression(setting, short)
            recipe = _with(first, one, setting)
            need, each = _cost(recipe, setting, device, limit)
        ended = _ended(first, recipe, setting, device, limit, each, minutes) if one.then else None
        if ended is not None:
            recipe, most, spent = ended
            return recipe, _line(one, tried, max(need, most), limit, spent, then=True)
        recipe, spent = _in_time(recipe, each, minutes)
        return recipe, _line(one, tried, need, limit, spent)
    smallest, need = min(tried, key=lambda found: found[1])
    raise Refused(
        f"--method auto found nothing for {_size(limit)}: {smallest.name} ({smallest.words}) is the least and "
        f"takes about {_size(need)}; take a smaller batch (batch={max(1, first.batch // 4)}) or more memory"
    )


# -- what may be taken, best first --------------------------------------------------------------


def _candidates(recipe: Recipe, setting: Setting) -> Iterator[Candidate]:
    count = sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0
    pictures = len(setting.shape) > 1
    prompts = isinstance(setting.task, Prompts) or not setting.task.has_data
    if not prompts and (not pictures or max(setting.shape[1:]) <= SMALL_SIDE):
        what = "pictures this small" if pictures else "vectors"
        known = "digits: excess 1.2, 0.95 with a game behind, 1.6 to 2.3 by a game alone"
        yield replace(_regression(setting, f"{what} are learnt best from pairs ({known})"), then=pictures)
    game = {**_game(setting), **_guidance(setting)}
    why = "one regression step blurs pictures of this size; this keeps more modes (MNIST: excess 0.6 in four stages)"
    score = Candidate("sim", "distance of the scores", why, game)
    why = "real pictures give a density ratio; on digits level with the other games (excess 1.9)"
    ratio = Candidate("f_distill", "Jensen-Shannon by an adversary's ratio", why, game)
    why = "prompts alone, and this game asks for no pictures"
    if not prompts:
        why = "it keeps the activations of neither critic nor teacher"
    reverse = Candidate("dmd2", "reverse KL, no adversary", why, game)
    games = [reverse] if prompts or count >= HUGE else [score, ratio, reverse]
    yield from games
    if count and recipe.student.net is None and recipe.student.lora is None:
        for one in games:
            yield replace(one, options={**one.options, "critic_lora": {"rank": RANK}}, full=False)
        yield replace(reverse, options={**reverse.options, "critic_lora": "student"}, full=False, student_lora=True)


def _regression(setting: Setting, why: str) -> Candidate:
    pairs = {"count": PAIRS, "solver": "dpm2m", "nfe": PAIR_CALLS}
    options = {"pairs": pairs, "huber_c": round(0.03 * math.prod(setting.shape) ** 0.5, 4), **_start(setting)}
    return Candidate("regression", "pairs of the teacher", why, options)


def _game(setting: Setting) -> Changes:
    """One critic turn a step (more lose at a fixed budget); levels in the middle, where there is something to say."""
    if setting.raw is None or not isinstance(setting.raw.path, Exploding):
        return {"critic_turns": 1}
    levels = {"kind": "log_normal", "mean": 0.0, "std": 1.2}
    return {"critic_turns": 1, "levels": levels, "critic_levels": levels, **_start(setting)}


def _start(setting: Setting) -> Changes:
    """On an exploding path the single step begins where the noise drowns the data, not at the path's end."""
    if setting.raw is None or not isinstance(setting.raw.path, Exploding):
        return {}
    return {"start": round(min(2.5 / 0.75 * setting.task.data_std, setting.raw.path.t_max), 3)}


def _guidance(setting: Setting) -> Changes:
    """What the teacher is used with."""
    guidance = getattr(setting.teacher, "guidance", None)
    return {} if guidance in (None, 1, 1.0) else {"guidance": float(guidance)}


# -- a candidate as a recipe --------------------------------------------------------------------

OPTIM: Mapping[str, Changes] = {
    "regression": {"kind": "adam", "betas": [0.9, 0.99], "clip": 1.0},
    "game": {"kind": "adam", "betas": [0.0, 0.99], "clip": 10.0},
}
RATES: Mapping[str, float] = {"regression": 1.5e-3, "game": 5e-4}
"""Of networks below ``TINY`` parameters; larger ones keep the rate of the recipe they came with."""
TINY = 5_000_000


def _with(base: Recipe, one: Candidate, setting: Setting) -> Recipe:
    """The base recipe with a candidate's method; its own settings where it has that method already."""
    plain = base.model_dump(mode="json", exclude_none=True)
    kind = "regression" if one.name == "regression" else "game"
    count = sum(p.numel() for p in setting.raw.parameters()) if setting.raw is not None else 0
    rate = RATES[kind] if count < TINY else base.optim.lr
    same = base.method.name == one.name
    plain["method"] = {"name": one.name, "options": {**one.options, **(base.method.options if same else {})}}
    if not one.full:
        plain["method"]["options"]["critic_lora"] = one.options["critic_lora"]
    if one.student_lora:
        plain["student"] = {**plain.get("student", {}), "lora": {"rank": RANK}}
    if not same:
        plain["optim"] = {**OPTIM[kind], "lr": rate}
        if kind == "game":
            plain["optim"]["players"] = {"critic": {**OPTIM[kind], "lr": 2 * rate}}
        plain["schedule"] = {"flat": 0.3 if kind == "regression" else 0.5}
        if count < TINY:
            plain["ema"] = {"decay": 0.99}
    plain["checkpoint"] = {**plain.get("checkpoint", {}), "best": True}
    return recipe_from({**plain, "stages": [], "expect": {}}, where="auto")


def _cost(recipe: Recipe, setting: Setting, device: str, limit: int) -> tuple[int, float]:
    """Bytes that a recipe takes at the peak, and seconds of a step; a whole copy that cannot fit is not built."""
    at_least = least(recipe, setting)
    if at_least > limit:
        return at_least, 0.0
    found = weighed(recipe, setting, device)
    return int(found["guess"]), float(found["each"])


def _in_time(recipe: Recipe, each: float, minutes: float | None) -> tuple[Recipe, str]:
    """As many steps, and pairs, as the budget has room for, up to the recipe's own."""
    if minutes is None:
        return recipe, f"{recipe.steps} steps"
    room, options = USABLE * 60 * minutes, dict(recipe.method.options)
    if recipe.method.name == "regression":
        one = PAIR_CALLS * each / (3 * recipe.batch)  # a call is a third of a row's share of a step
        count = max(LEAST_PAIRS, min(int(options["pairs"]["count"]), int(room / 3 / one)))
        options["pairs"] = {**options["pairs"], "count": count}
        room -= count * one
    steps = max(1, min(recipe.steps, int(room / each)))
    method = recipe.method.model_copy(update={"options": options})
    return recipe.model_copy(update={"steps": steps, "method": method}), f"{steps} steps in {minutes:g} min"


def _ended(
    first: Recipe, pairs: Recipe, setting: Setting, device: str, limit: int, each: float, minutes: float | None
) -> tuple[Recipe, int, str] | None:
    """The pairs, then the distance of scores under a critic that keeps up, each in half of the time; what the game
    takes, and the words of its length. None where memory or time do not hold it, or nothing like it was measured."""
    if setting.raw is None or not isinstance(setting.raw.path, Exploding) or pairs.student.lora is not None:
        return None
    options = {**_game(setting), **_guidance(setting), "critic_turns": TURNS}
    game = _with(first, Candidate("sim", "", "", options), setting)
    need, later = _cost(game, setting, device, limit)
    if need > limit:
        return None
    recipe, spent = _in_time(pairs, each, None if minutes is None else minutes / 2)
    count = round(SHARE * recipe.steps)
    if minutes is not None:
        count = min(count, int(USABLE * 30 * minutes / later))
    if count < FEW:
        return None
    plain, second = (made.model_dump(mode="json", exclude_none=True) for made in (recipe, game))
    optim = {**second["optim"], "lr": 0.4 * game.optim.lr}  # the student has little way left, its critic has not
    stage = {"steps": count, "method": second["method"], "optim": optim, "schedule": second["schedule"]}
    return recipe_from({**plain, "stages": [stage]}, where="auto"), need, f"{spent}, then {count}"


def _line(
    one: Candidate, tried: list[tuple[Candidate, int]], need: int, limit: int, spent: str, then: bool = False
) -> str:
    critic = "" if one.name == "regression" else ", critic a full copy" if one.full else f", critic LoRA {RANK}"
    both = ", student too" if one.student_lora else ""
    larger = ""
    if tried:
        other, much = tried[0]
        larger = f" ({other.name} with full copies would take {_size(much)})"
    room = f"about {_size(need)} of {_size(limit)}{larger}"
    after = f", then sim (distance of the scores, critic a full copy, {TURNS} turns)" if then else ""
    return f"auto: {one.name} ({one.words}{critic}{both}){after}: {one.why}; {room}, {spent}"


def _size(count: int) -> str:
    """Bytes as people say them.

    >>> _size(3 * 2**29), _size(5 * 2**20)
    ('1.5 GiB', '5 MiB')
    """
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{max(1, round(count / 2**20))} MiB"
