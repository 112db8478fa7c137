"""Bending what a generator makes towards a wish, without training it."""

from .boundary import Start, StartOptions, choose_start
from .noise import DITTO2, RENO, Found, NoiseOptimiser, NoiseOptions, Reward, norm_penalty, on_shell, target

__all__ = [
    "DITTO2",
    "RENO",
    "Found",
    "NoiseOptimiser",
    "NoiseOptions",
    "Reward",
    "Start",
    "StartOptions",
    "choose_start",
    "norm_penalty",
    "on_shell",
    "target",
]
