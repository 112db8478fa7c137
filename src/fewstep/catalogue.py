"""What there is: methods, papers, recipes, samplers, tasks and metrics, as rows for ``fewstep list``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any, get_args

from . import registry
from .errors import Refused
from .train.recipe import shipped

REGISTRIES = {
    "methods": registry.METHODS,
    "tasks": registry.TASKS,
    "samplers": registry.SOLVERS,
    "metrics": registry.METRICS,
}


def _entry_rows(kind: str) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "tier": entry.tier,
            "level": entry.level,
            "papers": [paper.arxiv for paper in entry.papers],
            "summary": entry.summary,
        }
        for entry in REGISTRIES[kind]
    ]


def _recipe_rows() -> list[dict[str, Any]]:
    rows = []
    for name, file in shipped().items():
        text = file.read_text(encoding="utf-8")
        table = tomllib.loads(text)
        rows.append(
            {
                "name": name,
                "method": table.get("method", {}).get("name", ""),
                "task": table.get("task", {}).get("name", ""),
                "papers": table.get("papers", []),
                "expect": [f"{metric} {_bar(bar)}" for metric, bar in table.get("expect", {}).items()],
                "summary": text.split("\n")[0].lstrip("# ") if text.startswith("#") else "",
                "file": str(file),
            }
        )
    return rows


def _bar(bar: Any) -> str:
    if not isinstance(bar, dict):
        return str(bar)
    return " ".join(f"{sign} {bar[key]}" for key, sign in (("max", "<="), ("min", ">=")) if key in bar)


def _paper_rows() -> list[dict[str, Any]]:
    papers: dict[str, dict[str, Any]] = {}
    recipes = _recipe_rows()
    for kind, entries in REGISTRIES.items():
        for entry in entries:
            for paper in entry.papers:
                row = papers.setdefault(
                    paper.arxiv,
                    {
                        "paper": paper.row or paper.title,
                        "arxiv": paper.arxiv,
                        "lives in": [],
                        "recipes": [],
                        "expect": [],
                    },
                )
                row["lives in"].append(f"{kind}:{entry.name}")
                row["level"] = max(row.get("level", "none"), entry.level, key=get_args(registry.Level).index)
                for recipe in recipes:
                    named = paper.row in recipe["papers"] or paper.arxiv in recipe["papers"]
                    if named and recipe["name"] not in row["recipes"]:
                        row["recipes"].append(recipe["name"])
                        row["expect"] += recipe["expect"]
    return sorted(papers.values(), key=lambda row: str(row["arxiv"]))


KINDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "methods": lambda: _entry_rows("methods"),
    "papers": _paper_rows,
    "recipes": _recipe_rows,
    "samplers": lambda: _entry_rows("samplers"),
    "tasks": lambda: _entry_rows("tasks"),
    "metrics": lambda: _entry_rows("metrics"),
}


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Every thing of a kind, in order.

    >>> [row["name"] for row in rows_of("samplers") if row["name"].startswith("unipc3")]
    ['unipc3', 'unipc3_bh1']
    """
    if kind not in KINDS:
        raise Refused(f"unknown kind {kind!r}: {registry.nearest(kind, list(KINDS))}")
    return KINDS[kind]()
