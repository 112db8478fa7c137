"""The documentation says what the code does: its tables are generated, and nothing is missing from them.

    python tests/test_docs.py      writes the generated tables again

A generated table stands between ``<!-- options MODULE.CLASS -->`` (or ``changed MODULE.CLASS``, ``command NAME``,
``methods``, ``samplers``, ``metrics``) and ``<!-- end -->``. Links, commands and Python blocks are checked by
``scripts/check_docs.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fewstep.path import NoiseSampler
from fewstep.registry import METHODS, METRICS, SOLVERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MADE = re.compile(
    r"<!-- (options|changed|command|methods|samplers|metrics)(?: ([\w.]+))?( flat)? -->\n(.*?)<!-- end -->", re.DOTALL
)
EVERYWHERE = {"--json", "--quiet", "--verbose", "--device", "--threads", "--help"}  # said once, for all commands


def checker() -> Any:
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / "scripts" / "check_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- generated tables ---------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A default, as a recipe would say it."""
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {plain(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(plain, value))}]"
    return json.dumps(value)


def values_of(annotation: Any, metadata: list[Any]) -> str:
    """What a field may be: its words, or its kind and its bounds."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind is not type(None)]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return ", ".join(f"`{plain(word)}`" for word in words)
    signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
    bounds = [
        f"{signs[type(m).__name__]} {getattr(m, type(m).__name__.lower()):g}"
        for m in metadata
        if type(m).__name__ in signs
    ]
    names = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", dict: "table"}
    found = next((names[k] for k in kinds if k in names), None)
    if any(get_origin(kind) in (tuple, list) for kind in kinds):
        found = "list"
    if any(get_origin(kind) is dict for kind in kinds) and not any(get_origin(kind) is tuple for kind in kinds):
        found = "table"
    if part_in(annotation) is NoiseSampler:
        found = "[noise levels](NOISE)"
    elif part_in(annotation) is not None:
        found = "table"
    return ", ".join([found or "", *bounds]).strip(", ") if found != "number" or not bounds else ", ".join(bounds)


def part_in(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *get_args(annotation)]
    return next((k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)), None)


def option_rows(kind: type[BaseModel], flat: bool, head: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        part = part_in(field.annotation)
        default = field.get_default(call_default_factory=True)
        about = (field.description or "").replace("|", "\\|")
        yield f"| `{head}{name}` | {shown(default)} | {values_of(field.annotation, field.metadata)} | {about} |"
        if part is not None and part is not NoiseSampler and not flat:
            yield from option_rows(part, flat, f"{head}{name}.")


def changed(kind: type[BaseModel]) -> set[str]:
    """The options whose default is not that of the choices that a row varies."""
    base = kind.__bases__[0]
    return {k for k, field in kind.model_fields.items() if field.default != base.model_fields[k].default}


def made(what: str, about: str | None, flat: bool, page: Path) -> str:
    if what in ("options", "changed"):
        place, _, cls = (about or "").rpartition(".")
        kind = getattr(importlib.import_module(place), cls)
        rows = option_rows(kind, flat)
        if what == "changed":
            rows = (row for row in option_rows(kind, True) if row.split("`")[1] in changed(kind))
        lines = ["| option | default | values | what it is |", "|---|---|---|---|", *rows]
        up = "../" * (len(page.relative_to(DOCS).parts) - 1) if page.is_relative_to(DOCS) else "docs/"
        return "\n".join(lines).replace("(NOISE)", f"({up}recipes.md#noise-levels)") + "\n"
    if what == "command":
        return (
            "\n".join(["| argument or option | default | what it is |", "|---|---|---|", *command_rows(about or "")])
            + "\n"
        )
    registry = {"methods": METHODS, "samplers": SOLVERS, "metrics": METRICS}[what]
    own = [entry for entry in registry if entry.thing.__module__.startswith("fewstep.")]
    link = "" if page.is_relative_to(DOCS) else "docs/"
    lines = {
        "methods": ["| method | makes a | needs | tier | evidence | paper |", "|---|---|---|---|---|---|"],
        "samplers": ["| name | order | paper | what it is |", "|---|---|---|---|"],
        "metrics": ["| name | better | paper | what it is |", "|---|---|---|---|"],
    }[what]
    for entry in own:
        papers = ", ".join(f"[{p.row or p.arxiv}](https://arxiv.org/abs/{p.arxiv})" for p in entry.papers)
        thing = entry.thing
        if what == "methods":
            needs = " and ".join(n for n, yes in (("teacher", thing.needs_teacher), ("data", thing.needs_data)) if yes)
            name = f"[{entry.name}]({link}methods/{entry.name}.md)"
            lines.append(f"| {name} | {thing.makes} | {needs or 'nothing'} | {entry.tier} | {entry.level} | {papers} |")
        elif what == "samplers":
            lines.append(f"| `{entry.name}` | {thing.order} | {papers} | {entry.summary} |")
        else:
            lines.append(f"| `{entry.name}` | {thing.better} | {papers} | {entry.summary} |")
    return "\n".join(lines) + "\n"


def commands() -> dict[str, Any]:
    import typer

    from fewstep.cli import app

    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


def command_rows(name: str) -> Iterator[str]:
    for parameter in commands()[name].params:
        options = [f"`{option}`" for option in parameter.opts]
        if EVERYWHERE & set(parameter.opts):
            continue
        about = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        if parameter.param_type_name == "argument":
            options = [f"`{(parameter.metavar or parameter.name.upper())}`".replace("|", "\\|")]
        default = (
            "required"
            if parameter.required
            else shown(None if callable(parameter.default) else value(parameter.default))
        )
        yield f"| {', '.join(options)} | {'' if default == 'none' else default} | {about} |"


def value(default: Any) -> Any:
    return str(default) if isinstance(default, Path) else default


def remade(page: Path, text: str) -> str:
    def table(found: re.Match[str]) -> str:
        head = found[0][: found[0].index("\n") + 1]
        return f"{head}{made(found[1], found[2], bool(found[3]), page)}<!-- end -->"

    return MADE.sub(table, text)


# -- what must be there -------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_a_page_are_what_the_code_says(page):
    text = page.read_text(encoding="utf-8")
    assert text == remade(page, text), "write them again: python tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    assert not list(checker().broken_links(page, page.read_text(encoding="utf-8")))


def own_methods() -> list[Any]:
    return [entry for entry in METHODS if entry.thing.__module__.startswith("fewstep.methods")]


@pytest.mark.parametrize("entry", own_methods(), ids=lambda entry: entry.name)
def test_a_method_has_a_page_with_its_options_its_evidence_and_its_papers(entry):
    text = (DOCS / "methods" / f"{entry.name}.md").read_text(encoding="utf-8")
    row = "<!-- changed " in text  # a choice of another method's options: that page has them all
    assert not row or "(dmd2.md)" in text
    for name, field in entry.thing.Options.model_fields.items():
        if row and name not in changed(entry.thing.Options):
            continue
        assert f"| `{name}` | {shown(field.get_default(call_default_factory=True))} |" in text
    assert f"Tier: {entry.tier}. Evidence: {entry.level}." in text
    for paper in entry.papers:
        assert f"https://arxiv.org/abs/{paper.arxiv}" in text
    for head in ("What it is", "When to choose it", "Options", "Measured", "Limits", "Citation"):
        assert f"\n## {head}\n" in text
    assert f"<!-- measured:{entry.name} -->" in text


def test_every_page_about_a_method_is_about_one_that_exists():
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == {entry.name for entry in own_methods()}


@pytest.mark.parametrize("name", ["dmd2", "meanflow"])
def test_a_page_says_where_the_authors_code_may_not_be_used_commercially(name):
    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert "CC BY-NC-SA 4.0" in text and "equations" in text


def test_every_command_has_a_section_with_an_example_and_all_its_options():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name in commands():
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"no section {name!r}"
        assert f"fewstep {name}" in section[1]
        assert f"<!-- command {name} -->" in section[1]


def test_every_sampler_and_every_metric_is_described():
    solvers = (DOCS / "solvers.md").read_text(encoding="utf-8")
    assert all(f"`{entry.name}`" in solvers for entry in SOLVERS)
    metrics = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{entry.name}`" in metrics for entry in METRICS)


def test_every_section_of_a_recipe_is_described():
    from fewstep.train.recipe import Recipe

    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for name in Recipe.model_fields:
        assert f"`{name}`" in text or f"## [{name}]" in text, name


def test_every_column_of_the_table_is_explained():
    from fewstep.evaluate.rows import Row

    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    for name in Row.model_fields:
        assert f"`{name}`" in text, name


def test_the_index_links_every_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name == "index.md" or f"({name})" in text, name


def test_the_exit_codes_that_are_documented_are_those_of_the_command_line(capsys):
    from fewstep.cli import main

    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\| {code} \|", text, re.MULTILINE) for code in (0, 1, 2, 3, 130))
    assert main(["list", "methods", "--json"]) == 0
    assert main(["list", "nothing"]) == 2
    capsys.readouterr()


if __name__ == "__main__":
    for place in PAGES:
        before = place.read_text(encoding="utf-8")
        place.write_text(remade(place, before), encoding="utf-8")
