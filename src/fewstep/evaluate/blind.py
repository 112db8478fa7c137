"""The blind A/B page: which picture do people prefer, when they do not know whose it is; and what their votes mean."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..errors import Refused
from ..part import Part
from ..rng import Rng
from .pictures import address, opened
from .rows import Measured, Preference, Tiles, put

VOTES: Literal["fewstep.votes/1"] = "fewstep.votes/1"
MAX_VOTES = 2**20
"""Bytes of a votes file."""
SEEN = 480
"""Least width in which a small picture is shown, by a whole factor."""
Z95 = 1.959963984540054
"""97.5 % point of the standard normal."""

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one line of tiles: the student on ``side``, ``against`` on the other."""

    row: int
    against: Literal["full", "best"]
    side: Side

    def kinds(self) -> tuple[str, str]:
        return ("student", self.against) if self.side == "left" else (self.against, "student")


@dataclass(frozen=True)
class Ballot:
    """The pairs in the order of the page, their pictures as data addresses, and the hash that votes must name."""

    pairs: tuple[Pair, ...]
    pictures: tuple[tuple[str, str], ...]
    prompts: tuple[str, ...]
    width: int
    hash: str


class Votes(Part):
    """What the page gives back: for every pair, in its order, the side that was preferred; null where none was."""

    kind: Literal["fewstep.votes/1"] = Field(alias="schema")
    page: str = Field(pattern=r"^[0-9a-f]{64}$")
    votes: tuple[Literal["left", "right", "tie"] | None, ...] = Field(max_length=1024)


def pairs_of(tiles: Tiles, seed: int) -> tuple[Pair, ...]:
    """The comparisons in an order that the seed decides; the student is as often left as right.

    Lines take turns between the two opponents, so that no picture comes twice: who saw one again would know whose
    it is.
    """
    against: list[Literal["full", "best"]] = [kind for kind in tiles.kinds if kind != "student"]
    if "student" not in tiles.kinds or not against:
        return ()
    found = []
    for turn, kind in enumerate(against):
        rows = range(turn, len(tiles.prompts), len(against))
        sides = _shuffled(len(rows), seed, "sides", kind)
        odd = turn % 2  # with an odd number of lines the one left over is on another side for each opponent
        found += [
            Pair(row, kind, "left" if (place + odd) % 2 else "right") for row, place in zip(rows, sides, strict=True)
        ]
    return tuple(found[i] for i in _shuffled(len(found), seed, "order"))


def _shuffled(count: int, seed: int, *keys: str) -> list[int]:
    import torch

    order: list[int] = torch.randperm(count, generator=Rng(seed, "blind", *keys).generator).tolist()
    return order


def ballot(run: Path, scores: Measured) -> Ballot | None:
    """The pairs of a run folder, as far as their pictures are there; None without any."""
    from .page import picture_bytes

    if scores.tiles is None:
        return None
    pairs, pictures, width = [], [], 0
    for pair in pairs_of(scores.tiles, scores.seed):
        line: dict[str, str] = dict(zip(scores.tiles.kinds, scores.tiles.files[pair.row], strict=True))
        files = [picture_bytes(run, line[kind]) for kind in pair.kinds()]
        if files[0] is None or files[1] is None:
            continue
        plain = anonymous(files[0], files[1])
        if plain is not None:
            pairs.append(pair)
            pictures.append((plain[0], plain[1]))
            width = max(width, plain[2])
    if not pairs:
        return None
    prompts = tuple(scores.tiles.prompts[pair.row] for pair in pairs)
    about = [VOTES, scores.seed, [(p.row, p.against, p.side) for p in pairs], prompts, pictures]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return Ballot(tuple(pairs), tuple(pictures), prompts, width, digest)


def anonymous(first: bytes, second: bytes) -> tuple[str, str, int] | None:
    """Two PNG files as data addresses that tell nothing but what is seen, and their width on the page.

    Metadata is gone and both are as long. None where one is no picture of ours, or their sizes differ.
    """
    one, two = opened(first), opened(second)
    if one is None or two is None or one.size != two.size or one.mode != two.mode:
        return None
    left, right = address([one, two])
    return left, right, one.size[0] * max(1, -(-SEEN // one.size[0]))


# -- the page -----------------------------------------------------------------------------------


def write_ballot(run: Path, scores: Measured, found: Ballot) -> Path:
    """Write ``report/ab.html``: one file, no network; its one script is named by its hash, and no other may run."""
    from .page import template

    script = _part("ab.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert scores.tiles is not None
    titles = dict(zip(scores.tiles.kinds, scores.tiles.titles, strict=True))
    page = template("ab.html").render(
        doc=scores, ballot=found, lines=list(zip(found.pairs, found.pictures, found.prompts, strict=True)),
        titles=titles, script=script, allowed=allowed, schema=VOTES,
    )  # fmt: skip
    return put(run / "report" / "ab.html", page.encode("utf-8", errors="replace"))


def _part(name: str) -> str:
    from importlib.resources import files

    return (files(__package__) / name).read_text(encoding="utf-8")


# -- the votes ----------------------------------------------------------------------------------


def read_votes(file: Path, found: Ballot) -> Votes:
    """One person's votes; Refused, in one line, for what is no such file or belongs to another page."""
    try:
        if file.stat().st_size > MAX_VOTES:
            raise Refused(f"{file} is too large for a votes file ({file.stat().st_size:,} bytes)")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refused(f"there is no {file}: download it from report/ab.html") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {str(error).splitlines()[0][:200]}") from None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(f"{file} is no JSON: download it again from report/ab.html") from None
    known = raw.get("schema") if isinstance(raw, dict) else None
    if known != VOTES:
        shown = f"schema {str(known)[:40]!r}" if known is not None else "no schema"
        raise Refused(f"{file} has {shown}, a votes file has {VOTES!r}")
    try:
        votes = Votes.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(".".join(str(part)[:40] for part in first["loc"]).split())
        raise Refused(f"{file} is no votes file ({where}: {first['msg'].lower()[:120]})") from None
    if votes.page != found.hash:
        raise Refused(f"{file} belongs to another page: vote on this run's report/ab.html")
    if len(votes.votes) != len(found.pairs):
        raise Refused(f"{file} has {len(votes.votes)} votes, the page has {len(found.pairs)} pairs")
    return votes


def keep_votes(run: Path, files: list[Path], found: Ballot | None) -> None:
    """Take votes into the run folder: all of them, or none where one is refused. The same file counts once."""
    if files and found is None:
        raise Refused(f"{run} has no blind comparison to vote on: it was measured against data, or shows no pictures")
    assert found is not None or not files
    read = [read_votes(file, found) for file in files] if found is not None else []
    for votes in read:
        text = json.dumps(votes.model_dump(mode="json", by_alias=True), sort_keys=True)
        put(run / "votes" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json", text.encode())


def preferences(run: Path, scores: Measured, found: Ballot) -> tuple[Preference, ...]:
    """What the votes in a run folder say, for each opponent; votes of another page are left out."""
    ballots = []
    for file in sorted((run / "votes").glob("*.json")):
        try:
            ballots.append(read_votes(file, found))
        except Refused:
            continue
    return tally(found, ballots, scores.tiles) if ballots and scores.tiles is not None else ()


def tally(found: Ballot, ballots: list[Votes], tiles: Tiles) -> tuple[Preference, ...]:
    """Wins, losses and ties of the student, and its share of the decided votes with Wilson's interval."""
    titles = dict(zip(tiles.kinds, tiles.titles, strict=True))
    said = []
    for kind in ("full", "best"):
        cast: list[str] = []
        for votes in ballots:
            for pair, vote in zip(found.pairs, votes.votes, strict=True):
                if pair.against == kind and vote is not None:
                    cast.append("tie" if vote == "tie" else "win" if vote == pair.side else "loss")
        if not cast:
            continue
        wins, losses = cast.count("win"), cast.count("loss")
        figures: dict[str, Any] = {}
        if wins + losses:
            low, high = wilson(wins, wins + losses)
            figures = {"share": wins / (wins + losses), "low": low, "high": high}
        said.append(
            Preference(against=kind, title=titles[kind], wins=wins, losses=losses, ties=cast.count("tie"), **figures)  # type: ignore[arg-type]
        )
    return tuple(said)


def wilson(wins: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a binomial share: where ``|p - wins/total| <= z sqrt(p (1 - p) / total)``.

    >>> [round(end, 4) for end in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= wins <= total or total < 1:
        raise Refused(f"{wins} wins of {total} votes are no share")
    share, square = wins / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, middle - half), min(1.0, middle + half)
