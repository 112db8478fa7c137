"""The script for a machine with a GPU, as far as a CPU can try it."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cpu(script):
    return script.Machine(torch.device("cpu"), smoke=True)


@pytest.mark.slow
def test_a_smoke_run_goes_through_every_section_and_writes_both_tables(script, tmp_path, capsys):
    files = ["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]
    assert script.main(["--smoke", "--scale", "5", *files]) == 0
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["smoke"] is True
    assert set(report["sections"]) == set(script.SECTIONS)
    for name, section in report["sections"].items():
        assert section["status"] == "done", (name, section.get("reason"))
        assert section["rows"]
        assert all(row.get("ok", True) for row in section["rows"])
    methods = {(row["method"], row["player"]) for row in report["sections"]["methods"]["rows"]}
    assert {("dmd2", "student"), ("dmd2", "critic"), ("meanflow", "student")} <= methods
    large = report["sections"]["large"]["rows"]
    assert [row["network"] for row in large] == ["SDXL", "Flux", "Wan 1.3B"]
    assert all("step_s" in row or "skipped" in row["note"] for row in large)
    text = (tmp_path / "t.md").read_text()
    assert all(f"## {name}" in text for name in script.SECTIONS)
    assert text in capsys.readouterr().out


def test_exact_derivatives_are_near_float64_and_differences_err_on_both_sides_of_their_best_step(script, cpu):
    rows = list(script.derivatives(cpu))
    exact = next(row for row in rows if row["derivative"] == "exact" and row["dtype"] == "float32")
    by_step = {
        row["step"]: row["error"] for row in rows if row["dtype"] == "float32" and isinstance(row["step"], float)
    }
    assert exact["error"] < 1e-5 < min(by_step.values())
    assert by_step[5e-2] > by_step[5e-3] < by_step[1e-4]


def test_a_late_section_keeps_its_rows_and_a_broken_one_says_why_and_the_next_one_runs(script, cpu, monkeypatch):
    def slow(machine):
        yield {"row": 1}
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("nothing on the way may swallow the end of the time")
        yield {"row": 2}

    def broken(machine):
        yield {"row": 1, "ok": True}
        raise RuntimeError("no luck today")

    def missed(machine):
        yield {"row": 1, "ok": False}

    sections = {"slow": (slow, 1), "broken": (broken, 9), "missed": (missed, 9), "fine": (lambda m: iter([{}]), 9)}
    monkeypatch.setattr(script, "SECTIONS", sections)
    if not hasattr(signal, "SIGALRM"):
        pytest.skip("this system has no alarm")
    found = script.run(cpu, scale=0.2)
    assert [s["status"] for s in found.values()] == ["late", "failed", "failed", "done"]
    assert found["slow"]["rows"] == [{"row": 1}]
    assert found["broken"]["reason"] == "RuntimeError: no luck today"
    assert script.main(["--smoke", "--only", "missed"]) == 1


def test_without_a_gpu_it_says_so_and_checks_nothing(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 0
    assert script.main(["--device", "cuda:1"]) == 2
    assert "no GPU here, nothing was checked" in capsys.readouterr().err


def test_the_budgets_fit_in_ten_minutes(script):
    assert sum(limit for _, limit in script.SECTIONS.values()) <= 595
