"""Modes that a student starts without, from exact scores and ratios: what a divergence finds, and what it does not."""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "modes.py"


@pytest.fixture(scope="module")
def modes():
    spec = importlib.util.spec_from_file_location("modes", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emptiest(modes, options):
    """(the least share of a mode over its weight, total variation) of particles that began in one mode."""
    points = modes.moved(options)
    return (modes.shares(points) / torch.tensor(modes.WEIGHTS)).min().item(), modes.apart(points)


def test_forward_kl_jeffreys_and_their_second_order_find_all_four_modes_from_one_and_reverse_kl_does_not(modes):
    """Measured over two seeds: .03-.10 of reverse KL, .23-.30 of Jeffreys, .57 and .43-.47 of forward KL."""
    found = {name: emptiest(modes, modes.ROWS[name]) for name in
             ("reverse KL", "Jeffreys", "forward KL", "Fisher, forward KL")}  # fmt: skip
    assert found["reverse KL"][0] < 0.15
    assert found["Jeffreys"][0] > 0.15
    assert found["forward KL"][0] > 0.4 and found["Fisher, forward KL"][0] > 0.4
    assert found["forward KL"][1] < 0.15 < found["Jeffreys"][1] < 0.27 < found["reverse KL"][1]


def test_a_ratio_turned_upside_down_finds_no_more_modes_than_reverse_kl(modes):
    """Fake taken for real: the weight of forward KL becomes 1 / r, and pulls where the student is already."""
    assert emptiest(modes, {"divergence": "neyman"})[0] < 0.15
