"""Devices and threads of this machine."""

from __future__ import annotations

import os

import pytest
import torch

from fewstep import machine
from fewstep.errors import Refused


def test_auto_is_a_device_on_which_a_tensor_can_be_made():
    assert torch.ones(1, device=machine.pick_device("auto")).sum() == 1


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_refused_with_the_mend(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(Refused, match=f"device '{name}' is not there .*: take --device cpu or auto"):
        machine.pick_device(name)


def test_a_card_past_the_last_is_refused_by_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.pick_device("auto") == "cuda"
    assert machine.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(Refused, match="this machine has cuda:0 to cuda:1"):
        machine.pick_device("cuda:2")


def test_threads_are_as_asked_else_as_the_environment_says_else_one_per_core(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert machine.set_threads(2) == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert machine.set_threads() == 2, "what the environment gave torch is left alone"
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert machine.set_threads() == machine.physical_cores()
    finally:
        torch.set_num_threads(before)


def test_measuring_threads_leaves_their_number_as_it_was():
    before = torch.get_num_threads()
    times = machine.measure_threads((1, 2), rounds=1, steps=1)
    assert set(times) == {1, 2}
    assert min(times.values()) > 0
    assert torch.get_num_threads() == before


def test_a_loaded_machine_is_told_to_measure_again(monkeypatch):
    monkeypatch.setattr(machine, "measure_threads", lambda counts: dict.fromkeys(counts, 1.0))
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    assert "measure again when it is idle" in machine.examine()["threads"]["advice"]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "measure again" not in machine.examine()["threads"]["advice"]


def test_packages_that_harm_each_other_are_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(machine, "version", {"torchao": "0.18", "diffusers": "0.42"}.get)
    assert machine.bad_pairs() == [
        "torchao 0.18 beside diffusers 0.42: diffusers prints failed imports beside torchao; "
        "where you do not quantise: pip uninstall torchao"
    ]
