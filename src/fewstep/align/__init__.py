"""Bending what a generator makes towards a wish, without training it."""

from .noise import DITTO2, RENO, Found, NoiseOptimiser, NoiseOptions, Reward, norm_penalty, on_shell, target

__all__ = [
    "DITTO2",
    "RENO",
    "Found",
    "NoiseOptimiser",
    "NoiseOptions",
    "Reward",
    "norm_penalty",
    "on_shell",
    "target",
]
