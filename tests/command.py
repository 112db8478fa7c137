"""What a person sees of a command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Answer:
    code: int
    out: str
    err: str


def one_line(answer: Answer) -> str:
    """The one line of an error, which is all there is."""
    assert answer.err.startswith("fewstep: ") and answer.err.count("\n") == 1, answer.err
    assert answer.out == ""
    return answer.err
