"""Whose licences a student inherits, and the question that comes before some of them."""

from __future__ import annotations

import json
from pathlib import Path as File

from ..errors import Refused
from ..licences import Licence, licence_facts
from ..train.recipe import Recipe


def inherited(recipe: Recipe) -> dict[str, Licence]:
    """The licences that a recipe's student inherits, by the source that each comes from; no network is loaded.

    A law, and a teacher that the run itself trains, bring none.
    """
    found = {}
    if recipe.teacher is not None and recipe.teacher.source != "law":
        source = recipe.teacher.source
        if not source.startswith("recipe:"):
            found[source] = _of(source, "teacher")
    if recipe.student.init is not None:
        found[recipe.student.init] = _of(recipe.student.init, "student")
    return found


def _of(source: str, part: str) -> Licence:
    """Of a packaged teacher, a model folder or a run: its model card's, else its contract's."""
    from ..interop import CONTRACT, packaged
    from ..interop.files import licence_of

    folder = packaged().get(source) or File(source).expanduser()
    if (folder / part / CONTRACT).is_file():
        folder = folder / part
    if not folder.is_dir():
        return licence_facts("unknown")  # loading it will say what is wrong
    name = licence_of(folder)
    contract = folder / CONTRACT
    if name == "unknown" and contract.is_file() and contract.stat().st_size < 2**22:
        try:
            said = json.loads(contract.read_text(encoding="utf-8")).get("licence")
        except (ValueError, AttributeError):
            said = None
        name = said if isinstance(said, str) and said else name
    return licence_facts(name)


def question(recipe: Recipe) -> str | None:
    """What must be accepted before this recipe makes a student, in one line; None where nothing must."""
    asked = [
        f"{source} ({licence.name}): {licence.about}" for source, licence in inherited(recipe).items() if licence.asks
    ]
    return f"the student inherits the licence of {'; and of '.join(asked)}" if asked else None


def consent(recipe: Recipe, run: File, accepted: bool, resume: bool = False) -> list[str]:
    """The names of the restrictive licences that were accepted; Refused, with the mend, where one was not.

    A run that is resumed was asked when it began.
    """
    names = [licence.name for licence in inherited(recipe).values() if licence.asks]
    line = question(recipe)
    if line is None or accepted:
        return names
    if resume:
        try:
            before = json.loads((run / "environment.json").read_text(encoding="utf-8")).get("accepted_licences", [])
        except (OSError, ValueError, AttributeError):
            before = []
        if set(names) <= set(before):
            return names
    raise Refused(f"{line}; add --accept-licence to go on, or take another teacher")
