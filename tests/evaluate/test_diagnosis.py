"""The report says how the training stood: figures for programs, pictures and plain warnings for people."""

from __future__ import annotations

import json

import pytest

from fewstep.evaluate.diagnosis import charts, read_diagnosis

WELL = {"diversity": 0.97, "spread": 1.0, "saturation": 0.01, "grid": 1.0}
RATIO = {"quantiles": {"0.05": 0.5, "0.25": 0.8, "0.5": 1.0, "0.75": 1.3, "0.95": 2.0}, "clipped": 0.0, "told": 0.6}


def game(behind=0.0, error=0.05, **ratio):
    levels = [
        {"lam": lam, "gap": 0.2 + 0.1 * abs(lam), "behind": behind, "behind_error": error} for lam in (-2.0, 0.0, 2.0)
    ]
    return {"levels": levels, "kl": 0.3, "ratio": {**RATIO, **ratio}}


def run_of(folder, *looks):
    lines = [json.dumps({"step": 10 * (k + 1), "stage": 0, **look}) for k, look in enumerate(looks)]
    (folder / "probes.jsonl").write_text("\n".join(lines) + "\n")
    return read_diagnosis(folder)


def test_a_healthy_run_has_its_pictures_and_no_warning(tmp_path):
    found = run_of(tmp_path, {"probe": WELL, "game": game()}, {"probe": WELL}, {"probe": WELL, "game": game()})
    assert found.warnings == ()
    assert [name for name, _, _ in charts(found)] == [
        "variety and saturation", "score gap by noise level", "critic lag", "density ratio"
    ]  # fmt: skip
    assert all(str(chart).startswith("<svg") for _, _, chart in charts(found))
    assert "KL(student, teacher) = 0.3 nats" in charts(found)[1][1]
    plain = found.as_dict()
    assert plain["schema"] == "fewstep.diagnosis/1" and json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    ("last", "warning"),
    [
        ({"probe": {**WELL, "diversity": 0.2}}, "At the end samples look alike"),
        ({"probe": {**WELL, "saturation": 0.6}}, "samples are burnt"),
        ({"probe": {**WELL, "diversity": None}}, "samples are not finite"),
        ({"probe": {**WELL, "diversity": 0.7}}, "Variety fell from 0.97 to 0.70"),
        ({"probe": WELL, "game": game(-1.5)}, "The critic is behind the student: at 3 of 3 noise levels"),
        ({"probe": WELL, "game": game(0.9)}, "The critic is behind the student"),
        ({"probe": WELL, "game": game(told=0.99)}, "The adversary tells 99% of the samples right"),
        ({"probe": WELL, "game": game(clipped=0.7)}, "70% of the density ratios lie outside ratio_range"),
        ({"probe": WELL, "game": game(quantiles={"0.05": 0.995, "0.95": 1.005})}, "the same density ratio"),
    ],
)
def test_what_says_collapse_is_said_in_plain_words(tmp_path, last, warning):
    found = run_of(tmp_path, {"probe": WELL, "game": game()}, {"probe": WELL}, last)
    assert len(found.warnings) == 1 and warning in found.warnings[0]


def test_a_critic_that_may_as_well_keep_up_is_not_accused(tmp_path):
    assert run_of(tmp_path, {"probe": WELL, "game": game(-1.5, error=1.0)}).warnings == ()


@pytest.mark.parametrize(
    "text", ["", "{", '{"step": 1}\n[1]\n"x"\n', '{"step": 1, "probe": {"diversity": NaN, "x": 2}}\n']
)
def test_lines_that_are_not_understood_are_left_out(tmp_path, text):
    assert read_diagnosis(tmp_path) is None
    (tmp_path / "probes.jsonl").write_text(text)
    assert read_diagnosis(tmp_path) is None
    (tmp_path / "probes.jsonl").write_text(text + "\n" + json.dumps({"step": 5, "probe": WELL, "game": {"own": 1}}))
    (look,) = read_diagnosis(tmp_path).looks
    assert look.game is None and look.step == 5
