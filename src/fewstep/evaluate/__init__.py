"""Evaluation: one honest protocol, one table, one page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blind import read_votes
    from .measure import compare, evaluate
    from .noref import evaluate_without_reference
    from .page import table, write_report
    from .protocol import Protocol
    from .rows import Document, Report, Row, Scores, Verdict, read_scores
    from .verdict import judge

WHERE = {
    "compare": "measure",
    "evaluate": "measure",
    "evaluate_without_reference": "noref",
    "read_votes": "blind",
    "table": "page",
    "write_report": "page",
    "Protocol": "protocol",
    "Report": "rows",
    "Row": "rows",
    "Scores": "rows",
    "read_scores": "rows",
    "Document": "rows",
    "Verdict": "rows",
    "judge": "verdict",
}

__all__ = [
    "Document", "Protocol", "Report", "Row", "Scores", "Verdict",
    "compare", "evaluate", "evaluate_without_reference", "judge", "read_scores", "read_votes",
    "table", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Parts are imported when they are first asked for, so that importing this package costs nothing."""
    import importlib

    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)
