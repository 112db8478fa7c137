"""Named things and the papers behind them. A decorator is the whole registration."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Tier = Literal["stable", "experimental"]
Level = Literal["none", "exact", "small", "gpu", "paper"]


@dataclass(frozen=True)
class Paper:
    """An arXiv number and a title; ``row`` is the short name that people use."""

    arxiv: str
    title: str
    row: str = ""


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    ``tier``: stable or experimental. ``level`` is the highest evidence there is: ``exact`` (proven on a
    law known in closed form), ``small`` (a recipe on small real images within its bar), ``gpu`` (run at
    scale), ``paper`` (a published figure reproduced), ``none``.
    """

    kind: str
    name: str
    thing: Any
    papers: tuple[Paper, ...] = ()
    tier: Tier = "experimental"
    level: Level = "none"

    @property
    def summary(self) -> str:
        return (self.thing.__doc__ or "").strip().split("\n")[0]


class UnknownName(ValueError):
    """A name that is not registered; the message has the nearest valid one."""


def nearest(name: str, names: list[str]) -> str:
    """The end of an error line: the nearest name, or all of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(sorted(names))}"


@dataclass
class Registry:
    """All things of one kind; the package's modules are imported when a name is first asked for."""

    kind: str
    package: str
    group: str | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    _loaded: bool = False

    def add(self, entry: Entry) -> None:
        old = self.entries.get(entry.name)
        if old is not None and old.thing.__qualname__ != entry.thing.__qualname__:
            raise ValueError(f"{self.kind} {entry.name!r} is already taken by {old.thing.__module__}")
        self.entries[entry.name] = entry

    def load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group) if self.group else ():
            point.load()

    def get(self, name: str) -> Entry:
        self.load()
        if name not in self.entries:
            raise UnknownName(f"unknown {self.kind} {name!r}: {nearest(name, list(self.entries))}")
        return self.entries[name]

    def __iter__(self) -> Iterator[Entry]:
        self.load()
        return iter(sorted(self.entries.values(), key=lambda entry: entry.name))


METHODS = Registry("method", "fewstep.methods", group="fewstep.methods")
TASKS = Registry("task", "fewstep.tasks", group="fewstep.tasks")
SOLVERS = Registry("sampler", "fewstep.solvers")
METRICS = Registry("metric", "fewstep.metrics")


def _decorator(registry: Registry, name: str, papers: tuple[Paper, ...], tier: Tier, level: Level) -> Callable[[T], T]:
    def register(thing: T) -> T:
        registry.add(Entry(registry.kind, name, thing, papers, tier, level))
        thing.name = name  # type: ignore[attr-defined]
        return thing

    return register


def method(name: str, *papers: Paper, tier: Tier = "experimental", level: Level = "none") -> Callable[[T], T]:
    """Register a training method under a name."""
    return _decorator(METHODS, name, papers, tier, level)


def task(name: str, *papers: Paper) -> Callable[[T], T]:
    """Register a task under a name."""
    return _decorator(TASKS, name, papers, "stable", "none")


def solver(name: str, *papers: Paper, level: Level = "exact") -> Callable[[T], T]:
    """Register a sampler under a name."""
    return _decorator(SOLVERS, name, papers, "stable", level)


def metric(name: str, *papers: Paper) -> Callable[[T], T]:
    """Register a metric under a name."""
    return _decorator(METRICS, name, papers, "stable", "none")
