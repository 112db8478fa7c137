"""Search without training: evolution of anything, and of sampler plans."""

from .evolve import Evolution, Score, Scored, Space, evolve, rescored
from .journal import Journal

__all__ = ["Evolution", "Journal", "Score", "Scored", "Space", "evolve", "rescored"]
