"""Hold the documentation to its word.

    python scripts/check_docs.py              links, commands and examples in README.md, CONTRIBUTING.md and docs/
    python scripts/check_docs.py --examples   run every file in examples/

Checked: every relative link leads to a file (and to a heading of it); every ``fewstep ...`` command is one that the
command line accepts; every block marked ```python run``` runs, and every ``>>>`` in a Python block answers as shown.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds for one example; they are meant to take less than a minute on an idle machine
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)!?\[[^\]]*\]\(([^()\s]+)\)")
INLINE = re.compile(r"(?<!`)`(fewstep [^`\n]+)`(?!`)")


class Block(NamedTuple):
    language: str
    flags: list[str]
    text: str
    line: int


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        language, *flags = found[2].split() or [""]
        lines = (line.removeprefix(found[1]) for line in found[3].splitlines())
        yield Block(language, flags, "\n".join(lines) + "\n", text[: found.start()].count("\n") + 2)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"link to {target}: there is no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"link to {target}: {file.name} has no such heading"


def commands(text: str) -> Iterator[str]:
    """Every fewstep command shown, in shell blocks and in running text."""
    for block in blocks(text):
        if block.language in ("sh", "bash", "shell", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                bare = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
                if bare.startswith("fewstep "):
                    yield bare
    yield from (found[1] for found in INLINE.finditer(FENCE.sub("", text)) if "[" not in found[1])


def refused(command: str) -> str | None:
    """Why the command line would not take a command; None where it would."""
    import typer

    from fewstep.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name, *arguments = shlex.split(command, comments=True)[1:] or [""]
    if name.startswith("-"):
        return None
    if name not in known:
        return f"no command {name!r}"
    if not arguments or "--help" in arguments or "..." in arguments:
        return None
    try:
        known[name].make_context(name, arguments)
    except typer.BadParameter.__mro__[1] as error:
        return " ".join(error.format_message().split())  # type: ignore[attr-defined]
    return None


def run_block(block: Block) -> str | None:
    """Run a Python block in a folder of its own; what went wrong, if anything did."""
    if ">>>" in block.text:
        case = doctest.DocTestParser().get_doctest(block.text, {}, "block", None, 0)
        flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        said: list[str] = []
        failed = doctest.DocTestRunner(optionflags=flags, verbose=False).run(case, out=said.append).failed
        return "".join(said).strip() if failed else None
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", block.text], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def check_pages() -> int:
    faults, counts = [], {"links": 0, "commands": 0, "examples": 0}
    for page in pages():
        if not page.exists():
            faults.append(f"{page.name}: missing")
            continue
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        counts["links"] += len(LINK.findall(FENCE.sub("", text)))
        faults += [f"{name}: {fault}" for fault in broken_links(page, text)]
        for command in commands(text):
            counts["commands"] += 1
            if why := refused(command):
                faults.append(f"{name}: `{command}`: {why}")
        for block in blocks(text):
            if block.language == "python" and ("run" in block.flags or ">>>" in block.text):
                counts["examples"] += 1
                if why := run_block(block):
                    faults.append(f"{name}:{block.line}: {why}")
    print("docs:", ", ".join(f"{count} {what}" for what, count in counts.items()), f"in {len(pages())} pages")
    return report(faults)


def run_examples() -> int:
    faults = []
    for file in sorted((ROOT / "examples").glob("*.py")):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = subprocess.run(
                    [sys.executable, file], cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE
                )
                failed, last = done.returncode != 0, (done.stderr if done.returncode else done.stdout).strip()
            except subprocess.TimeoutExpired:
                failed, last = True, f"took more than {PATIENCE} s"
        line = last.splitlines()[-1] if last else ""
        print(f"{file.name}: {time.monotonic() - start:.0f} s: {line}", flush=True)
        if failed:
            faults.append(f"{file.name}: {line}")
    return report(faults)


def report(faults: list[str]) -> int:
    for fault in faults:
        print(f"  {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(run_examples() if "--examples" in sys.argv[1:] else check_pages())
