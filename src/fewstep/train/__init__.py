"""Training: recipes, the trainer, run folders."""

from .recipe import Recipe, load_recipe
from .trainer import Trainer

__all__ = ["Recipe", "Trainer", "load_recipe"]
