"""Metrics: how near generated samples are to real ones, on features that nothing else may use."""

from __future__ import annotations

from .base import Metric, Sample, Score

__all__ = ["Metric", "Sample", "Score", "metric_named"]


def metric_named(name: str) -> Metric:
    """The metric with this name; UnknownName, with the nearest name, for another.

    >>> metric_named("recall").better
    'higher'
    """
    from ..registry import METRICS

    made: Metric = METRICS.get(name).thing()
    return made
