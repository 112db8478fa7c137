"""The engine of multistep solvers: decisions for each step become plain weights once, then one fused pass a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from ..cond import Cond
from ..path import Path
from ..rng import Source, normal
from .base import Solver, Stage, State
from .weights import PREDICTION, Form, Level, Variable, Weights, constant, convert, integrate, silent

Corrector = Literal["none", "exact", "bh1", "bh2"]


@dataclass(frozen=True)
class Decision:
    """How one step is taken.

    ``order`` guesses are interpolated in ``variable``; ``back`` starts the step that many levels earlier (0: a
    multistep rule, 1: the second half of a two-call single step). ``corrector`` takes the step once more when the
    guess at its end is known, at no further call: ``exact`` with the new guess among the nodes, ``bh1`` and ``bh2``
    with UniPC's h and e^h - 1 where the order is 2 or less. ``relax`` and ``churn``: see ``integrate``. ``shares``
    replace the polynomial's weights: each is a fraction of the weight that a constant guess would have.
    """

    form: Form = "data"
    variable: Variable = "lam"
    order: int = 1
    back: int = 0
    corrector: Corrector = "none"
    relax: float = 1.0
    churn: float = 0.0
    shares: tuple[float, ...] | None = None


Term = tuple[float, Literal["x", "value"], int]


@dataclass(frozen=True)
class Blend:
    """``keep base + sum of weight * (sample or value seen at level k) + noise z``."""

    base: int
    keep: float
    terms: tuple[Term, ...]
    noise: float = 0.0


@dataclass(frozen=True)
class Rule:
    """One step: what to ask, the correction of the step before, the step, and the oldest levels needed after it."""

    want: str
    correct: Blend | None
    advance: Blend
    since: int
    base_since: int
    keeps_samples: bool


@dataclass
class Course(State):
    """A solver's state: rules, the samples where values were asked (corrected: ``bases``), the values, last noise."""

    rules: tuple[Rule, ...] = ()
    values: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)
    bases: dict[int, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None
    inner: tuple[Stage, ...] = ()
    """the stages that the rules are of"""


class Engine(Solver):
    """A solver that is a list of decisions, one call a step."""

    @abstractmethod
    def decide(self, path: Path, stages: tuple[Stage, ...]) -> tuple[Decision, ...]: ...

    def init(self, path: Path, times: tuple[float, ...]) -> Course:
        plain = super().init(path, times)
        rules = compiled(path, plain.stages, self.decide(path, plain.stages))
        return Course(path, plain.times, plain.stages, rules=rules, inner=plain.stages)

    def step(self, model: Any, x: Tensor, i: int, state: State, cond: Cond, rng: Source | None) -> tuple[Tensor, State]:
        assert isinstance(state, Course)
        rule = state.rules[i]
        state.values[i] = model(x, state.inner[i].t, cond, rule.want)
        state.samples[i] = state.bases[i] = x
        if rule.correct is not None:
            state.bases[i] = blend(rule.correct, state, state.noise)
        noise = None
        if rule.advance.noise:
            if rng is None:
                raise ValueError(f"{self.name} draws noise: pass rng")
            noise = normal(x, rng)
        ends = blend(rule.advance, state, noise)
        state.noise = noise
        for seen in (state.values, state.samples, state.bases):
            since = rule.base_since if seen is state.bases else rule.since
            for k in [k for k in seen if k < since or seen is state.samples and not rule.keeps_samples]:
                del seen[k]
        return ends, state

    @classmethod
    def steps_for(cls, nfe: int) -> int | None:
        return nfe


def blend(rule: Blend, state: Course, noise: Tensor | None) -> Tensor:
    """One pass over what is remembered; half precision is summed in float32."""
    base = state.bases[rule.base]
    total = (base if base.dtype.itemsize > 2 else base.float()) * rule.keep
    for weight, kind, k in rule.terms:
        total.add_(state.values[k] if kind == "value" else state.samples[k], alpha=weight)
    if noise is not None and rule.noise:
        total.add_(noise, alpha=rule.noise)
    return total.to(base.dtype)


def levels_of(stages: tuple[Stage, ...]) -> tuple[Level, ...]:
    """The noise levels of a grid, ends included."""
    last = stages[-1]
    return (
        *(Level(s.t, s.alpha_t, s.sigma_t, s.lam_t) for s in stages),
        Level(last.s, last.alpha_s, last.sigma_s, last.lam_s),
    )


@lru_cache(maxsize=64)
def compiled(path: Path, stages: tuple[Stage, ...], decisions: tuple[Decision, ...]) -> tuple[Rule, ...]:
    """All coefficients of a grid as plain floats, once."""
    levels = levels_of(stages)
    decisions = tuple(_possible(d, i, levels) for i, d in enumerate(decisions))
    wants = tuple(PREDICTION[d.form] for d in decisions)
    advances = [_advance(path, levels, d, i, wants) for i, d in enumerate(decisions)]
    corrects = [None, *(_correct(path, levels, d, i, wants) for i, d in enumerate(decisions[:-1]))]
    rules = []
    for i in range(len(decisions)):
        later = [b for b in (*advances[i + 1 :], *corrects[i + 1 :]) if b is not None]
        used, bases = [term[2] for b in later for term in b.terms], [b.base for b in later]
        samples = any(term[1] == "x" for b in (advances[i], *later) for term in b.terms)
        rules.append(Rule(wants[i], corrects[i], advances[i], min([*used, i + 1]), min([*bases, i + 1]), samples))
    return tuple(rules)


def _possible(d: Decision, i: int, levels: tuple[Level, ...]) -> Decision:
    """In the noise form a step out of (nearly) pure noise has no signal to keep: there it is DDIM."""
    if not 0 <= d.back <= i:
        raise ValueError(f"step {i} cannot start {d.back} levels back")
    if d.form == "noise" and silent(levels[i - d.back].alpha, levels[i - d.back].sigma):
        return replace(d, form="data", order=1, shares=None)
    return d


def _advance(path: Path, levels: tuple[Level, ...], d: Decision, i: int, wants: tuple[str, ...]) -> Blend:
    """The step from level ``i - back`` to i + 1 through the newest guesses."""
    start, nodes = i - d.back, tuple(range(i, i - min(d.order, i + 1), -1))
    here, there = levels[start], levels[i + 1]
    weights = None
    if d.corrector in ("bh1", "bh2") and len(nodes) == 2:
        at = (levels[nodes[1]].lam - here.lam) / (there.lam - here.lam)
        if at and math.isfinite(at):
            weights = _half(d, here, there, at)
    if d.shares is not None:
        if len(d.shares) != len(nodes):
            raise ValueError(f"step {i} has {len(d.shares)} shares for {len(nodes)} guesses")
        weights = _integrated(path, levels, d, start, i + 1, nodes[:1])  # of a guess that does not change
        weights = weights._replace(values=tuple(share * weights.values[0] for share in d.shares))
    elif weights is None:
        weights = _integrated(path, levels, d, start, i + 1, nodes)
    return _blend(weights, levels, d, start, nodes, wants)


def _correct(path: Path, levels: tuple[Level, ...], d: Decision, i: int, wants: tuple[str, ...]) -> Blend | None:
    """The step i once more, with the guess at its end, i + 1, among the nodes."""
    if d.corrector == "none":
        return None
    start, nodes = i - d.back, (i + 1, *range(i, i - min(d.order, i + 1), -1))
    here, there = levels[start], levels[i + 1]
    if d.corrector in ("bh1", "bh2") and nodes == (i + 1, start) and math.isfinite(here.lam):
        near, far = (weights := _half(d, here, there, 1.0)).values
        weights = weights._replace(values=(far, near))
    else:
        weights = _integrated(path, levels, d, start, i + 1, nodes)
    return _blend(weights, levels, d, start, nodes, wants)


def _integrated(
    path: Path, levels: tuple[Level, ...], d: Decision, start: int, end: int, nodes: tuple[int, ...]
) -> Weights:
    seen = tuple(levels[k] for k in nodes)
    return integrate(path, d.form, d.variable, levels[start], levels[end], seen, relax=d.relax, churn=d.churn)


def _half(d: Decision, here: Level, there: Level, at: float) -> Weights:
    """UniPC's second-order rule: ``B(h) / 2`` times the slope to the node that stands ``at`` steps from ``here``.

    B is h or e^h - 1 for the form's signed h (Zhao et al. 2023, after eq. 6). Values: at ``here``, then at the node.
    """
    if d.churn or d.form == "flow":
        raise ValueError(f"corrector {d.corrector!r} is for the data and noise forms, without churn")
    keep, whole = constant(d.form, here, there)
    h = there.lam - here.lam
    if d.form == "data":
        size = there.alpha * (h if d.corrector == "bh1" else -math.expm1(-h))
    else:
        size = -there.sigma * (h if d.corrector == "bh1" else math.expm1(h))
    far = size / 2 / at
    return Weights(keep, (whole - far, far))


def _blend(
    weights: Weights, levels: tuple[Level, ...], d: Decision, base: int, nodes: tuple[int, ...], wants: tuple[str, ...]
) -> Blend:
    """Weights of the form's values as weights of what was seen: values asked in another form need their samples."""
    terms: list[Term] = []
    for weight, k in zip(weights.values, nodes, strict=True):
        a, b = convert(levels[k], wants[k], PREDICTION[d.form])
        if a:
            terms.append((weight * a, "x", k))
        terms.append((weight * b, "value", k))
    return Blend(base, weights.keep, tuple(term for term in terms if term[0]), weights.noise)
