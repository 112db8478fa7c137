"""How a run went, from its probes: variety and saturation, the score gap by noise level, the critic, the adversary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ..part import Part
from ..train.probe import Probe
from .plots import Frame, decades

if TYPE_CHECKING:
    from markupsafe import Markup

DIAGNOSIS: Literal["fewstep.diagnosis/1"] = "fewstep.diagnosis/1"
MOST = 1000
FADED = 0.8
"""Diversity at the end over its highest before, from which on modes are said to be lost."""
FALSE = 0.5
"""Share of the gap that may be the critic's own error."""
TOLD = 0.95
CLIPPED = 0.5
Maybe = float | None


class Level(Part):
    """A noise level of ``fewstep.methods.families.diagnosis.diagnose``, which says what each figure is."""

    lam: float
    gap: Maybe = None
    behind: Maybe = None
    behind_error: Maybe = None
    lag: Maybe = None


class Ratio(Part):
    quantiles: dict[str, Maybe] = Field(max_length=32)
    clipped: Maybe = None
    told: Maybe = None
    weights_spread: Maybe = None


class Game(Part):
    levels: tuple[Level, ...] = Field(max_length=256)
    kl: Maybe = None
    ratio: Ratio | None = None


class Glance(Part):
    diversity: Maybe = None
    spread: Maybe = None
    saturation: Maybe = None
    grid: Maybe = None


class Look(Part):
    """One probe of a run; ``game`` where the method was asked too."""

    step: int
    stage: int = 0
    probe: Glance
    game: Game | None = None


class Diagnosis(Part):
    """``diagnosis`` of ``report.json``: the run's probes, and what they warn of in plain words."""

    kind: Literal["fewstep.diagnosis/1"] = Field(DIAGNOSIS, alias="schema")
    looks: tuple[Look, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"schema": DIAGNOSIS, **self.model_dump(mode="json", exclude={"kind"})}


def read_diagnosis(run: Path) -> Diagnosis | None:
    """From a run's ``probes.jsonl``; None where there is none. Lines that are not understood are left out."""
    try:
        with (run / "probes.jsonl").open(encoding="utf-8", errors="replace") as file:
            lines = [line for line, _ in zip(file, range(MOST), strict=False)]
    except OSError:
        return None
    looks = tuple(_looks(lines))
    return Diagnosis(schema=DIAGNOSIS, looks=looks, warnings=tuple(_warnings(looks))) if looks else None


def _looks(lines: Iterable[str]) -> Iterable[Look]:
    for line in lines:
        try:
            found = json.loads(line, parse_constant=lambda _: None)
            if isinstance(found, dict) and not _readable(found.get("game")):
                found["game"] = None  # a method of one's own may say other things
            yield Look.model_validate(found)
        except (ValueError, RecursionError):
            continue


def _readable(game: Any) -> bool:
    try:
        Game.model_validate(game)
    except ValidationError:
        return False
    return True


# -- plain words --------------------------------------------------------------------------------


def _warnings(looks: tuple[Look, ...]) -> Iterable[str]:
    """What the last look, and the way to it, warn of."""
    stage = looks[-1].stage
    own = [look for look in looks if look.stage == stage]
    glance = own[-1].probe
    said = Probe(*(math.nan if v is None else v for v in glance.model_dump().values())).warning()
    if said is not None:
        yield f"At the end {said}."
    seen = [look.probe.diversity for look in own if look.probe.diversity is not None]
    if said is None and len(seen) > 1 and seen[-1] < FADED * min(max(seen), 1.0):
        yield (
            f"Variety fell from {max(seen):.2f} to {seen[-1]:.2f} of the data's while it trained: "
            "modes are being lost. Look at recall, stop earlier or lower the student's rate."
        )
    game = next((look.game for look in reversed(own) if look.game is not None), None)
    if game is not None:
        yield from _of_the_game(game)


def _of_the_game(game: Game) -> Iterable[str]:
    sure = [v for v in game.levels if v.behind is not None and v.behind_error is not None]
    false = [
        v for v in sure if abs(v.behind or 0.0) > FALSE and abs(v.behind or 0.0) > FALSE + 2 * (v.behind_error or 0.0)
    ]
    if len(false) > len(sure) / 2:
        yield (
            f"The critic is behind the student: at {len(false)} of {len(sure)} noise levels its own error is more than "
            f"{FALSE:.0%} of the gap that the student follows. Give it more turns (critic_turns) or a higher rate."
        )
    ratio = game.ratio
    if ratio is None:
        return
    low, high = ratio.quantiles.get("0.05"), ratio.quantiles.get("0.95")
    if ratio.told is not None and ratio.told > TOLD:
        yield (
            f"The adversary tells {ratio.told:.0%} of the samples right: the laws hardly overlap for it and its "
            "density ratio says little. Lower its weight or its rate, or show it more noise."
        )
    elif ratio.clipped is not None and ratio.clipped > CLIPPED:
        yield f"{ratio.clipped:.0%} of the density ratios lie outside ratio_range: the weights are those of its ends."
    elif low is not None and high is not None and 0.98 < low <= high < 1.02:
        yield "The adversary gives every sample the same density ratio: every divergence is the reverse KL for now."


# -- small pictures -----------------------------------------------------------------------------


def charts(found: Diagnosis) -> list[tuple[str, str, Markup]]:
    """(title, what it shows, SVG) of every figure that there is."""
    stage = found.looks[-1].stage
    own = [look for look in found.looks if look.stage == stage]
    games = [(look.step, look.game) for look in own if look.game is not None]
    made = [_variety(own), _gaps(games), _critic(games), _ratios(games)]
    return [chart for chart in made if chart is not None]


def _finite(pairs: Iterable[tuple[float, Maybe]], positive: bool = False) -> list[tuple[float, float]]:
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y) and (y > 0 or not positive)]


def _variety(looks: list[Look]) -> tuple[str, str, Markup] | None:
    lines = {
        name: _finite((float(look.step), getattr(look.probe, name)) for look in looks)
        for name in ("diversity", "spread", "saturation")
    }
    if max(map(len, lines.values())) < 2:
        return None
    steps = [look.step for look in looks]
    top = max(1.2, *(y for points in lines.values() for _, y in points))
    frame = Frame((steps[0], steps[-1]), (0.0, min(top, 5.0)), 200, "")
    frame.grid([steps[0], steps[-1]], [0.0, 0.5, 1.0], "step", "")
    frame.line([(steps[0], 1.0), (steps[-1], 1.0)], "floor")
    for name, kind in (("diversity", "student"), ("spread", "loss"), ("saturation", "tried")):
        points = [(x, min(y, 5.0)) for x, y in lines[name]]
        if len(points) > 1:
            frame.line(points, kind)
            frame.word(*points[-1], name, "note", -4, -6, "end")
    about = (
        "of the probe's samples: diversity and spread over the data's (1 is like it), and the share beyond its range"
    )
    return "variety and saturation", about, frame.svg("diversity, spread and saturation over training steps")


def _gaps(games: list[tuple[int, Game]]) -> tuple[str, str, Markup] | None:
    lines = [(step, _finite(((v.lam, v.gap) for v in game.levels), True)) for step, game in games]
    lines = [(step, sorted(points)) for step, points in lines if len(points) > 1]
    if not lines:
        return None
    shown = [lines[0], lines[-1]] if len(lines) > 1 else lines
    values = [y for _, points in shown for _, y in points]
    ends = (min(x for _, p in shown for x, _ in p), max(x for _, p in shown for x, _ in p))
    low, high = min(values) / 1.3, max(values) * 1.5
    frame = Frame(ends, (low, high), 200, "y")
    frame.grid(list(ends), decades(low, high), "half log-SNR: noisy to clean", "")
    for (step, points), kind in zip(shown, ("tried", "student") if len(shown) > 1 else ("student",), strict=True):
        frame.line(points, kind)
        frame.word(*points[0], f"step {step}", "note", 4, -6)
    last = games[-1][1].kl
    area = "" if last is None else f"; the area under its square says KL(student, teacher) = {last:.3g} nats"
    about = "difference of the noises that critic and teacher predict at the student's samples, root mean square" + area
    return "score gap by noise level", about, frame.svg("score gap over noise levels")


def _critic(games: list[tuple[int, Game]]) -> tuple[str, str, Markup] | None:
    if not games:
        return None
    step, game = games[-1]
    points = sorted(_finite((v.lam, v.behind) for v in game.levels))
    if len(points) < 2:
        return None
    errors = {v.lam: v.behind_error or 0.0 for v in game.levels}
    frame = Frame((points[0][0], points[-1][0]), (-2.0, 2.0), 200, "")
    frame.grid([points[0][0], points[-1][0]], [-2.0, -1.0, 0.0, 1.0, 2.0], "half log-SNR: noisy to clean", "")
    frame.line([(points[0][0], 0.0), (points[-1][0], 0.0)], "floor")
    held = [(x, max(-2.0, min(2.0, y))) for x, y in points]
    for (x, y), (_, whole) in zip(held, points, strict=True):
        reach = [max(-2.0, min(2.0, whole + sign * errors[x])) for sign in (-1, 1)]
        frame.line([(x, reach[0]), (x, reach[1])], "tried")
        frame.dot(x, y, "student", 4, f"{whole:.2f} ± {errors[x]:.2f}")
    about = f"share of the gap that is the critic's own error, at step {step}; 0 is a critic that keeps up"
    lags = [v.lag for v in game.levels if v.lag is not None]
    if lags:
        about += f"; against the optimal critic, in predicted noise: {min(lags):.2g} to {max(lags):.2g}"
    return "critic lag", about, frame.svg("the critic's own share of the gap over noise levels")


def _ratios(games: list[tuple[int, Game]]) -> tuple[str, str, Markup] | None:
    known = [(float(step), game.ratio) for step, game in games if game.ratio is not None]
    names = [name for name in ("0.05", "0.25", "0.5", "0.75", "0.95") if all(name in r.quantiles for _, r in known)]
    lines = {name: _finite(((step, ratio.quantiles[name]) for step, ratio in known), True) for name in names}
    values = [y for points in lines.values() for _, y in points]
    if not values:
        return None
    ends = (known[0][0], max(known[-1][0], known[0][0] + 1))
    low, high = min(min(values), 0.8) / 1.2, max(max(values), 1.25) * 1.2
    frame = Frame(ends, (low, high), 200, "y")
    frame.grid(list(ends), decades(low, high), "step", "")
    frame.line([(ends[0], 1.0), (ends[1], 1.0)], "floor")
    for name, points in lines.items():
        if len(points) > 1:
            frame.line(points, "student" if name == "0.5" else "tried")
        for x, y in points:
            frame.dot(x, y, "teacher" if name == "0.5" else "tried", 3, f"{float(name):.0%}: {y:.3g}")
    told = known[-1][1].told
    right = "" if told is None else f"; the adversary tells {told:.0%} of the samples right"
    return (
        "density ratio",
        f"quantiles (5 to 95 %) at the student's samples{right}",
        frame.svg("density ratio over steps"),
    )
