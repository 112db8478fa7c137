"""Search without training: evolution of anything, and of sampler plans."""

from .contest import Contest, Verdict, contest
from .evolve import Evolution, Score, Scored, Space, evolve, rescored
from .gradient import Fitting, Pairs, fit
from .journal import Journal
from .objective import Distance, FeatureDistance, FrechetTo, Judge, Objective, Scorer, solved
from .plans import PlanSpace, fixed_samplers
from .skipping import Pruned, prune

__all__ = [
    "Contest",
    "Distance",
    "Evolution",
    "FeatureDistance",
    "Fitting",
    "FrechetTo",
    "Journal",
    "Judge",
    "Objective",
    "Pairs",
    "PlanSpace",
    "Pruned",
    "Score",
    "Scored",
    "Scorer",
    "Space",
    "Verdict",
    "contest",
    "evolve",
    "fit",
    "fixed_samplers",
    "prune",
    "rescored",
    "solved",
]
