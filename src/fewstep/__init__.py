"""fewstep: turn a slow multi-step generator into one that answers in one step, or a few."""

__version__ = "0.1.0"
