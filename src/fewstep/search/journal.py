"""What a search has already paid for, in a file of JSON lines: a search that was stopped repeats only its choices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

from ..errors import Failed, Refused


class Journal:
    """Answers by question, kept in memory and, with a ``file``, in JSON lines that survive a kill at any instant.

    A search is a function of its seed and of the scores it sees. So it is resumed by running it again: whatever was
    scored before is read from here, and the first new question goes on where the old run stopped. The first line
    holds ``request``, all that the answers depend on; Refused where the file was begun for another one.

    >>> journal = Journal()
    >>> journal.answer("two", lambda: 2), journal.answer("two", lambda: 3), journal.asked
    (2, 2, 1)
    """

    def __init__(self, file: File | None = None, request: Any = None) -> None:
        self.file, self.answers, self.asked = file, dict[str, Any](), 0
        if file is None:
            return
        head = json.dumps({"request": request}, sort_keys=True)
        try:
            known = file.read_bytes() if file.exists() else b""
            lines = known[: known.rfind(b"\n") + 1]  # the last line may have been cut by a kill
            if lines:
                self._read(lines, head)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                lines = head.encode() + b"\n"
            if lines != known:
                aside = file.with_name(f".{file.name}.{os.getpid()}.part")
                aside.write_bytes(lines)
                os.replace(aside, file)
        except OSError as error:
            raise Failed(f"cannot keep the state of the search in {file}: {error.strerror or error}") from error

    def _read(self, lines: bytes, head: str) -> None:
        try:
            first, *rest = lines.decode("utf-8").splitlines()
            begun = json.loads(first)["request"]
            for line in rest:
                entry = json.loads(line)
                self.answers[entry["question"]] = entry["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(f"{self.file} is not the state of a search: move it away, or name another file") from None
        wanted = json.loads(head)["request"]
        if begun != wanted:
            raise Refused(f"{self.file} was begun for another search ({difference(begun, wanted)}): move it away")

    def answer(self, question: str, work: Callable[[], Any]) -> Any:
        """The answer to a question: known, or worked out now and written before it is used. It is JSON."""
        if question not in self.answers:
            self.asked += 1
            found = work()
            if self.file is not None:
                line = json.dumps({"question": question, "answer": found}) + "\n"
                try:
                    with self.file.open("a", encoding="utf-8") as out:
                        out.write(line)
                except OSError as error:
                    raise Failed(f"cannot write {self.file}: {error.strerror or error}; it is as it was") from error
            self.answers[question] = found
        return self.answers[question]


def difference(begun: Any, wanted: Any) -> str:
    """The first key in which two requests differ, in words."""
    if not (isinstance(begun, dict) and isinstance(wanted, dict)):
        return "another request"
    key = next((k for k in sorted({*begun, *wanted}) if begun.get(k) != wanted.get(k)), "request")
    return f"{key} was {begun.get(key)}, now {wanted.get(key)}"
