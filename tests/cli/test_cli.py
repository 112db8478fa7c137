"""The command line as a person meets it: exit codes, one-line errors, help that teaches, JSON for programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import one_line

from fewstep import jobs
from fewstep.cli import app
from fewstep.cli.asked import recipe_of
from fewstep.errors import Failed, Interrupted, MissingExtra, Refused

COMMANDS = [
    "list",
    "init",
    "plan",
    "train",
    "distill",
    "search",
    "sample",
    "evaluate",
    "compare",
    "report",
    "verify",
    "export",
    "check",
    "doctor",
]


def test_the_commands_are_those_of_the_design_in_the_order_of_the_work(fewstep):
    help_text = fewstep("--help").out
    assert re.findall(r"^  ([a-z]+)  ", help_text.split("Commands:")[1], re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_teaches_by_an_example_that_it_accepts(fewstep, command):
    answer = fewstep(command, "--help")
    assert answer.code == 0
    examples = re.findall(rf"^    (fewstep {command}.*)$", answer.out, re.MULTILINE)
    assert examples
    for example in examples:
        context = app_context(command)
        parsed = context.command.make_context(command, example.split()[2:], resilient_parsing=False)
        assert parsed.params


def app_context(command: str):
    import typer

    group = typer.main.get_command(app)
    return type("Context", (), {"command": group.commands[command]})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_json_and_can_be_quiet_or_loud(fewstep, command):
    text = fewstep(command, "--help").out
    assert all(option in text for option in ("--json", "--quiet", "--verbose"))


@pytest.mark.parametrize("command", ["plan", "train", "distill", "sample", "evaluate", "compare"])
def test_every_command_that_computes_takes_a_seed_a_device_and_threads(fewstep, command):
    text = fewstep(command, "--help").out
    assert all(option in text for option in ("--seed", "--device", "--threads"))


def test_without_a_command_the_help_is_shown_and_nothing_failed(fewstep):
    answer = fewstep()
    assert answer.code == 0
    assert "Start here" in answer.out


BAD = [
    (["distil", "digits"], "unknown command 'distil': did you mean 'distill'?"),
    (["zzz"], "unknown command 'zzz': one of: "),
    (["list", "recipies"], "unknown kind 'recipies': did you mean 'recipes'?"),
    (["list", "methods", "--jsn"], "unknown option '--jsn': did you mean '--json'?"),
    (["distill"], "missing argument 'TEACHER|RECIPE'; see fewstep distill --help"),
    (["distill", "digist"], "unknown recipe 'digist': did you mean 'digits'?"),
    (["plan", "digits", "stepss=3"], "unknown key 'stepss': did you mean 'steps'?"),
    (["plan", "digits", "optim.lrr=1"], "unknown key 'optim.lrr': did you mean 'lr'?"),
    (["plan", "digits", "steps=0"], "steps: "),
    (["plan", "digits", "steps"], "an override is key.sub=value, got 'steps'"),
    (["plan", "digits", "--method", "dmd3"], "unknown method 'dmd3': did you mean 'dmd2'?"),
    (["distill", "./none.toml"], "no recipe at none.toml"),
    (["distill", "."], "neither a teacher (it has no model_index.json) nor a run (no recipe.toml)"),
    (["init", "dmd3"], "unknown recipe or method 'dmd3': did you mean 'dmd2'?"),
    (["sample", "none"], "none"),
    (["sample", "none", "--count", "0"], "invalid value for '--count'"),
    (["sample", "none", "--count", "many"], "invalid value for '--count'"),
    (["sample", "none", "--labels", "a,b"], "labels are whole numbers with commas between them, got 'a,b'"),
    (["sample", "none", "--device", "gpu"], "unknown device 'gpu': one of auto, cpu, cuda, mps"),
    (["sample", "none", "--device", "cuda:9"], "device 'cuda:9' is not there"),
    (["check", "none"], "there is no none"),
    (["report", "none"], "there is no none"),
    (["verify", "nothing"], "unknown recipe 'nothing'"),
    (["train", "digits_teacher", "--resume"], "nothing to resume: there is no run runs/digits_teacher"),
]


@pytest.mark.parametrize(("arguments", "line"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_bad_request_leaves_with_two_and_one_line_that_names_the_mend(fewstep, arguments, line):
    answer = fewstep(*arguments)
    assert answer.code == 2
    assert line in one_line(answer)
    assert not list(Path().iterdir()), "something was left half-written"


FAULTS = [
    (Refused("grid must descend, got 0.1 then 0.4"), 2, "grid must descend, got 0.1 then 0.4"),
    (ValueError("two\nlines"), 2, "two lines"),
    (MissingExtra("optuna", "search"), 3, "pip install 'fewstep[search]'"),
    (ModuleNotFoundError("No module named 'gradio'", name="gradio"), 3, "pip install 'fewstep[ui]'"),
    (Failed("the loss is not finite at step 7"), 1, "the loss is not finite at step 7"),
    (RuntimeError("broken"), 1, "RuntimeError: broken (-vv shows where)"),
    (Interrupted("fewstep distill runs/x --resume"), 130, "go on with: fewstep distill runs/x --resume"),
    (KeyboardInterrupt(), 130, "interrupted; nothing was kept"),
    (FileNotFoundError(2, "No such file", "a.npz"), 2, "there is no a.npz"),
    (PermissionError(13, "Permission denied", "out"), 2, "out: permission denied"),
]


@pytest.mark.parametrize(("fault", "code", "line"), FAULTS, ids=[type(fault).__name__ for fault, _, _ in FAULTS])
def test_every_kind_of_fault_has_its_exit_code_and_no_traceback(fewstep, monkeypatch, fault, code, line):
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(jobs, "check", fail)
    answer = fewstep("check", ".")
    assert answer.code == code
    assert line in one_line(answer)


def test_a_traceback_is_shown_when_it_is_asked_for(fewstep, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(jobs, "check", fail)
    assert "Traceback" in fewstep("check", ".", "-vv").err
    assert "Traceback" not in fewstep("check", ".", "-v").err


def test_an_interrupted_run_says_how_to_go_on(fewstep, monkeypatch):
    def stop(recipe: object, run: Path, **_: object) -> None:
        run.mkdir(parents=True)
        (run / "recipe.toml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "distill", stop)
    answer = fewstep("distill", "digits", "--out", "my run", "--device", "cpu")
    assert answer.code == 130
    assert "fewstep distill 'my run' --resume" in one_line(answer)


def test_a_second_run_never_writes_over_the_first(fewstep, monkeypatch):
    runs = []
    monkeypatch.setattr(jobs, "distill", lambda recipe, run, **_: runs.append(run) or run.mkdir(parents=True) or {})
    assert fewstep("distill", "digits").code == 0
    assert fewstep("distill", "digits").code == 0
    assert runs == [Path("runs/digits"), Path("runs/digits-2")]
    (runs[0] / "log.jsonl").touch()
    answer = fewstep("distill", "digits", "--out", "runs/digits")
    assert answer.code == 2
    assert "add --resume to go on with it, or take another --out" in one_line(answer)


def test_resume_takes_the_recipe_and_the_folder_of_the_run(fewstep, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        jobs, "distill", lambda recipe, run, resume, **_: seen.update(steps=recipe.steps, run=run, resume=resume) or {}
    )
    assert fewstep("init", "digits", "-o", "mine.toml").code == 0
    run = Path("runs/mine")
    run.mkdir(parents=True)
    Path("mine.toml").rename(run / "recipe.toml")
    assert fewstep("distill", "runs/mine", "--resume", "steps=7").code == 0
    assert seen == {"steps": 7, "run": run, "resume": True}


def test_another_method_drops_the_options_and_stages_of_the_recipe_s_own(fewstep):
    recipe = recipe_of("digits", ["method.options.jumps=0.25"], seed=3, method="meanflow")
    assert recipe.method.name == "meanflow"
    assert recipe.method.options == {"jumps": 0.25}
    assert recipe.stages == ()
    assert recipe.seed == 3


def test_a_diffusers_folder_needs_data_and_a_method_and_becomes_a_recipe(fewstep, tmp_path):
    teacher = tmp_path / "pipeline"
    teacher.mkdir()
    (teacher / "model_index.json").write_text("{}")
    answer = fewstep("distill", "pipeline")
    assert answer.code == 2
    assert "--data ./images --method dmd2" in one_line(answer)
    recipe = recipe_of("pipeline", ["steps=9"], None, Path("images"), "dmd2")
    assert (recipe.steps, recipe.method.name, recipe.name) == (9, "dmd2", "pipeline")
    assert recipe.teacher is not None
    assert recipe.teacher.source == "pipeline"
    assert recipe.task.options == {"path": "images"}


@pytest.mark.parametrize("kind", ["methods", "papers", "recipes", "samplers", "tasks", "metrics"])
def test_every_list_is_a_table_for_people_and_json_for_programs(fewstep, kind):
    rows = json.loads(fewstep("list", kind, "--json").out)
    text = fewstep("list", kind)
    assert text.code == 0
    for row in rows:
        name = row.get("name", row.get("paper"))
        assert name.split()[0] in text.out


def test_methods_are_listed_with_their_tier_and_their_evidence(fewstep):
    rows = {row["name"]: row for row in json.loads(fewstep("list", "methods", "--json").out)}
    assert {"denoising", "regression", "consistency", "meanflow", "dmd2"} <= set(rows)
    assert all(row["tier"] in ("stable", "experimental") for row in rows.values())
    assert all(row["level"] in ("none", "exact", "small", "gpu", "paper") for row in rows.values())
    assert "2405.14867" in rows["dmd2"]["papers"]


def test_init_writes_a_recipe_that_can_be_read_and_never_over_a_file(fewstep):
    from fewstep.train.recipe import load_recipe

    assert fewstep("init", "meanflow").code == 0
    assert load_recipe("meanflow.toml").method.name == "meanflow"
    before = Path("meanflow.toml").read_text()
    assert fewstep("init", "meanflow").code == 2
    assert Path("meanflow.toml").read_text() == before
    assert fewstep("init", "meanflow", "-o", "-").out == before


def test_doctor_names_every_extra_and_measures_threads(fewstep, monkeypatch):
    from fewstep import machine

    monkeypatch.setattr(machine, "measure_threads", lambda counts: dict.fromkeys(counts, 1.0) | {1: 0.5})
    facts = json.loads(fewstep("doctor", "--json").out)
    assert set(facts["extras"]) == set(machine.EXTRAS)
    assert facts["threads"]["best"] == 1
    assert facts["devices"]["cpu"]
    assert "FEWSTEP_THREADS=1" in fewstep("doctor").out


def test_a_reader_who_has_seen_enough_is_no_failure():
    code = "from fewstep.cli import main; import sys; sys.exit(main(['list', 'methods']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        complaint = process.stderr.read()
        assert process.wait() == 0
    assert complaint == b""


def test_python_m_fewstep_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fewstep", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"fewstep \d+\.\d+\.\d+\n", done.stdout)
