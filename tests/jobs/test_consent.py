"""A teacher whose licence forbids something is distilled by nobody who did not say yes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fewstep import cli, jobs
from fewstep.errors import Refused
from fewstep.interop import packaged
from fewstep.jobs.consent import consent, inherited, question
from fewstep.train.recipe import load_recipe

QUICK = ["steps=2", "method.options.pairs.count=64", "evaluate.enabled=false"]


def licensed(folder: Path, licence: str) -> Path:
    """The packaged digits teacher with a model card that names another licence."""
    shutil.copytree(packaged()["digits"], folder)
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    return folder


def of(source: object):
    return load_recipe("digits", [f"teacher.source={source}", *QUICK])


def test_a_student_inherits_the_licence_of_its_teachers_card_and_a_law_brings_none(tmp_path):
    teacher = licensed(tmp_path / "teacher", "cc-by-nc-4.0")
    assert {k: v.name for k, v in inherited(of(teacher)).items()} == {str(teacher): "cc-by-nc-4.0"}
    assert not inherited(of("digits"))["digits"].asks
    assert inherited(load_recipe("mixture_dmd2")) == {}
    assert question(of("digits")) is None


@pytest.mark.slow
def test_a_non_commercial_teacher_is_refused_before_anything_is_made_and_made_once_accepted(tmp_path):
    recipe, run = of(licensed(tmp_path / "teacher", "cc-by-nc-4.0")), tmp_path / "run"
    with pytest.raises(Refused, match=r"cc-by-nc-4.0.*no commercial use.*--accept-licence"):
        jobs.train(recipe, run)
    assert not run.exists()
    with pytest.raises(Refused, match="--accept-licence"):
        jobs.distill(recipe, run)
    jobs.train(recipe, run, accept_licence=True)
    contract = json.loads((run / "student" / "fewstep.json").read_text())
    assert contract["licence"] == "cc-by-nc-4.0"
    assert consent(recipe, run, accepted=False, resume=True) == ["cc-by-nc-4.0"]  # asked when it began


def test_what_was_accepted_for_one_teacher_is_not_accepted_for_another(tmp_path):
    recipe, run = of(licensed(tmp_path / "one", "cc-by-nc-4.0")), tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text(json.dumps({"accepted_licences": ["cc-by-nc-4.0"]}))
    other = of(licensed(tmp_path / "two", "flux-1-dev-non-commercial-license"))
    assert consent(recipe, run, accepted=False, resume=True)
    with pytest.raises(Refused):
        consent(other, run, accepted=False, resume=True)
    (run / "environment.json").write_text("[")
    with pytest.raises(Refused):
        consent(recipe, run, accepted=False, resume=True)


@pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 2)])
def test_a_person_at_a_terminal_is_asked(tmp_path, monkeypatch, capsys, answer, code):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text) or answer)
    monkeypatch.setattr(
        jobs, "distill", lambda recipe, run, accept_licence, **_: consent(recipe, run, accept_licence) and {}
    )
    teacher = licensed(tmp_path / "teacher", "cc-by-nc-4.0")
    assert cli.main(["distill", "digits", f"teacher.source={teacher}", "--device", "cpu", "-q"]) == code
    assert len(asked) == 1 and "cc-by-nc-4.0" in asked[0]
    capsys.readouterr()


def test_a_script_is_not_asked_and_says_it_by_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: pytest.fail("nobody is there to answer"))
    monkeypatch.setattr(
        jobs, "distill", lambda recipe, run, accept_licence, **_: consent(recipe, run, accept_licence) and {}
    )
    teacher = licensed(tmp_path / "teacher", "cc-by-nc-4.0")
    line = ["distill", "digits", f"teacher.source={teacher}", "--device", "cpu"]
    assert cli.main(line) == 2
    assert cli.main([*line, "--accept-licence"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
