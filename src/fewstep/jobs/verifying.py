"""Hold recipes to the scores that they expect."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

from ..errors import Failed, Refused
from ..train.recipe import load_recipe, shipped
from ..train.trainer import Nobody, Watch
from .training import distill


def scores_of(report: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The figures that a recipe's ``[expect]`` may name, from a report.

    Of the student's first row (of the teacher's full row where there is no student) its columns; besides,
    ``over_floor``: the teacher's full Fréchet distance over the floor; ``best_over_floor``: its best at
    up to 8 calls; against an exact law ``sliced_w2`` and its like; ``over_teacher``, ``over_four_calls``: the
    student over the teacher there;
    ``speedup``: of throughput against the full teacher; ``read_accuracy``, ``read_iou``: of labels read in one step
    from the mean of most noises; ``seconds``: of training, pairs included.
    """
    rows: list[Mapping[str, Any]] = list(report["rows"])
    named = {kind: [r for r in rows if r["model"] == kind] for kind in ("student", "teacher", "real")}
    few = [r for r in rows if str(r["model"]).startswith("teacher:") and r["nfe"] <= 8]
    main = (named["student"] or named["teacher"])[0]
    out = {k: float(v) for k, v in main.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    out.update({k: float(v) for k, v in (main.get("exact") or {}).items()})
    floor = float(named["real"][0]["frechet"]) if named["real"] else float("nan")
    if named["teacher"]:
        full = named["teacher"][0]
        out["over_floor"] = float(full["frechet"]) / floor
        out["over_teacher"] = float(main["frechet"]) / float(full["frechet"])
        if main.get("samples_per_s") and full.get("samples_per_s"):
            out["speedup"] = float(main["samples_per_s"]) / float(full["samples_per_s"])
    if few:
        best = min(few, key=lambda r: r["frechet"])
        out["best_over_floor"] = float(best["frechet"]) / floor
        fours = [float(r["frechet"]) for r in few if r["nfe"] == 4]
        if fours:
            out["over_four_calls"] = float(main["frechet"]) / min(fours)
    quick = [r for r in report.get("readings", ()) if r["steps"] == 1]
    if quick:
        most = max(quick, key=lambda r: r["draws"])
        out["read_accuracy"] = float(most["accuracy"])
        if most.get("iou") is not None:
            out["read_iou"] = float(most["iou"])
    if training:
        out["seconds"] = float(training["seconds"]) + float(training["pairs_seconds"])
    return out


def verify(
    names: Sequence[str], out: File, *, seeds: int | None = None, device: str = "cpu", watch: Watch | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run recipes over their seeds and hold the medians to ``[expect]``; finished runs are not run again."""
    eyes = watch or Nobody()
    chosen = list(names) or [name for name, file in shipped().items() if load_recipe(file).expect]
    rows: list[dict[str, Any]] = []
    for name in chosen:
        recipe = load_recipe(name, overrides)
        if not recipe.expect:
            raise Refused(f"recipe {name!r} expects nothing: give it an [expect] section")
        count = seeds or max(bar.seeds for bar in recipe.expect.values())
        found: list[dict[str, float]] = []
        for k in range(count):
            one = recipe.model_copy(update={"seed": recipe.seed + k})
            place = out / (recipe.name or File(name).stem) / f"seed_{one.seed}"
            file = place / "report" / "report.json"
            same = (place / "recipe.toml").is_file() and load_recipe(place / "recipe.toml").sha256 == one.sha256
            eyes.say(f"{name}, seed {one.seed}: {place}")
            if not (same and file.is_file()):
                if place.exists() and not same:
                    shutil.rmtree(place)
                distill(one, place, resume=same, device=device, watch=watch)
            training = json.loads((place / "training.json").read_text(encoding="utf-8"))
            found.append(scores_of(json.loads(file.read_text(encoding="utf-8")), training))
        for metric, bar in recipe.expect.items():
            values = [scores[metric] for scores in found if metric in scores]
            if not values:
                raise Failed(f"recipe {name!r} expects {metric!r}, which its report does not have")
            middle = statistics.median(values)
            holds = (bar.min is None or middle >= bar.min) and (bar.max is None or middle <= bar.max)
            wanted = " ".join(
                f"{sign} {edge:g}" for sign, edge in ((">=", bar.min), ("<=", bar.max)) if edge is not None
            )
            rows.append(
                {
                    "recipe": name, "metric": metric, "expected": wanted, "median": round(middle, 4),
                    "spread": round(max(values) - min(values), 4), "seeds": len(values), "holds": holds,
                }
            )  # fmt: skip
    return {"rows": rows, "holds": all(row["holds"] for row in rows)}
