"""Progress and results: a bar for people at a terminal, lines for logs, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep import screen as screens
from fewstep.screen import Screen, lines_of, report_text, table


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand."""
    now = [0.0]
    monkeypatch.setattr(screens.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_line_every_ten_seconds_with_rate_time_left_and_note(capsys, clock):
    with Screen(quiet=False, verbose=0, json=False) as screen:
        screen.start("student", 1000)
        for done in range(1, 31):
            clock[0] = done
            screen.advance("student", 10 * done, "loss 0.25")
        screen.finish("student")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "student 100/1000, 10/s, 90 s left, loss 0.25"
    assert len(lines) == 4
    assert lines[-1] == "student done in 30.0 s"
    assert out == ""


def test_the_rate_of_a_resumed_job_counts_only_what_was_done_now(capsys, clock):
    with Screen(quiet=False, verbose=0, json=False) as screen:
        screen.start("student", 1000)
        screen.advance("student", 500)
        clock[0] = 20
        screen.advance("student", 600)
    assert capsys.readouterr().err == "student 600/1000, 5/s, 80 s left\n"


def test_quiet_says_nothing(capsys, clock):
    with Screen(quiet=True, verbose=0, json=False) as screen:
        screen.start("student", 2)
        clock[0] = 60
        screen.advance("student", 1)
        screen.say("a probe")
        screen.finish("student")
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_progress_is_a_bar_with_the_last_note(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with Screen(quiet=False, verbose=0, json=False) as screen:
        screen.start("student", 4)
        screen.advance("student", 2, "loss 0.25")
        screen.say("[probe] the samples are spread")
        screen.advance("student", 4)
        screen.finish("student")
    text = capsys.readouterr().err
    assert "4/4" in text
    assert "[probe] the samples are spread" in text


def test_json_results_hold_no_number_that_json_lacks(capsys):
    Screen(quiet=False, verbose=0, json=True).result({"a": float("nan"), "b": (1, float("inf")), "c": None}, "text")
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "c": None}


def test_a_table_is_never_cut_where_there_is_no_terminal():
    long = "word " * 30
    assert long.strip() in table(["name", "what"], [["x", long]])


def test_facts_are_indented_below_their_name():
    assert lines_of({"a": 1, "b": {"c": 2.0}}).splitlines() == [f"{'a':<24} 1", "b", f"  {'c':<22} 2.000"]


def test_the_terminal_ends_with_the_verdict_of_the_page():
    row = {"model": "student", "nfe": 1, "frechet": 0.2, "excess": 0.9}
    verdict = {"headline": "The student is nearer.", "points": ["32x faster."]}
    text = report_text({"rows": [row], "verdict": verdict}, Path("report/index.html"))
    assert text.splitlines()[-3:] == ["The student is nearer.", "32x faster.", "report: report/index.html"]
    assert "nearer" not in report_text({"rows": [row]})
