"""Small charts as SVG, made of numbers and escaped words; colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

    from .rows import Measured

WIDE, HIGH = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 40


class Frame:
    """A plot area: both axes may be logarithmic."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], high: int = HIGH, logs: str = "xy") -> None:
        self.x, self.y, self.high, self.logs = x, y, high, logs
        self.parts: list[Markup] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = _share(x, self.x, "x" in self.logs)
        up = _share(y, self.y, "y" in self.logs)
        return LEFT + across * (WIDE - LEFT - RIGHT), self.high - BOTTOM - up * (self.high - TOP - BOTTOM)

    def put(self, template: str, *values: object) -> None:
        from markupsafe import Markup

        self.parts.append(Markup(template).format(*values))

    def grid(self, xs: Sequence[float], ys: Sequence[float], x_title: str, y_title: str) -> None:
        for y in ys:
            _, v = self.at(self.x[0], y)
            self.put('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>', LEFT, WIDE - RIGHT, v, v)
            self.put('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>', LEFT - 8, v + 4, _tick(y))
        for x in xs:
            u, _ = self.at(x, self.y[0])
            self.put(
                '<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>',
                u,
                self.high - BOTTOM + 18,
                _tick(x),
            )
        self.put(
            '<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>', (LEFT + WIDE) / 2, self.high - 4, x_title
        )
        self.put('<text class="axis" x="12" y="{}" text-anchor="middle" transform="rotate(-90 12 {})">{}</text>',
                 (self.high - BOTTOM) / 2, (self.high - BOTTOM) / 2, y_title)  # fmt: skip

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        where = " ".join(f"{u:.1f},{v:.1f}" for u, v in (self.at(*p) for p in points))
        self.put('<polyline class="{}" points="{}"/>', kind, where)

    def dot(self, x: float, y: float, kind: str, radius: float, title: str) -> None:
        u, v = self.at(x, y)
        self.put(
            '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>', kind, u, v, radius, title
        )

    def word(self, x: float, y: float, text: str, kind: str, dx: float = 10, dy: float = 4, end: str = "start") -> None:
        u, v = self.at(x, y)
        self.put('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>', kind, u + dx, v + dy, end, text)

    def svg(self, label: str) -> Markup:
        from markupsafe import Markup

        start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDE, self.high, label)
        return start + Markup("").join(self.parts) + Markup("</svg>")


def curve(scores: Measured) -> Markup | None:
    """Fréchet distance over calls: every sampler tried, the best of each, the floor, and each student.

    A student that serves several step counts is a line through them.
    """
    shown = [row for row in scores.rows if row.frechet is not None and not row.floor]
    floor = scores.floor
    values = [row.frechet for row in shown if row.frechet] + ([floor.frechet] if floor and floor.frechet else [])
    if not shown or not values:
        return None
    calls = sorted({row.nfe for row in shown})
    top = max(values) * 1.25
    frame = Frame((min(calls) * 0.9, max(max(calls), 2) * 1.15), (min(values) / 1.5, top))
    frame.grid(_few(calls), decades(min(values) / 1.5, top), "network calls for one sample", "Fréchet distance")
    if floor is not None and floor.frechet:
        frame.line([(frame.x[0], floor.frechet), (frame.x[1], floor.frechet)], "floor")
        words = "real against real" if floor.model == "real" else "teacher against itself"
        frame.word(frame.x[1], floor.frechet, words, "note", -4, 15, "end")
    for tried in scores.scout:
        if tried.frechet is not None and frame.y[0] < tried.frechet < top:
            frame.dot(tried.nfe, tried.frechet, "tried", 3, f"{tried.solver}, {tried.nfe} calls: {tried.frechet:.3g}")
    best = [(row.nfe, row.frechet, row.title) for row in shown if row.teacher and row.frechet is not None]
    best.sort()
    if best:
        frame.line([(n, f) for n, f, _ in best], "teacher")
        for n, f, title in best:
            frame.dot(n, f, "teacher", 4.5, f"{title}: {f:.3g}")
        frame.word(best[-1][0], best[-1][1], "teacher", "name-teacher", 0, -12, "end")
    for model in dict.fromkeys(row.model for row in shown if row.student):
        points = sorted((row.nfe, row.frechet, row.title) for row in shown if row.model == model and row.frechet)
        if not points:
            continue
        if len(points) > 1:  # one student at every step count that it serves
            frame.line([(n, f) for n, f, _ in points], "student")
        for n, f, title in points:
            frame.dot(n, f, "student", 7, f"{title}: {f:.3g}")
        name = "student" if model == "student" else model.partition(":")[2]
        frame.word(points[0][0], points[0][1], name, "name-student", 12, 5)
    return frame.svg("Fréchet distance over the number of network calls")


def training(lines: Sequence[dict[str, object]]) -> list[tuple[str, Markup]]:
    """One small chart for each of a run's first logged losses: (name, SVG)."""
    found: list[tuple[str, Markup]] = []
    steps: list[float] = []
    offset, last, stage = 0.0, 0.0, None
    for line in lines:  # the stages of a run stand one after the other
        if line.get("stage", 0) != stage:
            stage, offset = line.get("stage", 0), last
        step = line.get("step")
        last = offset + (float(step) if isinstance(step, int | float) else 0.0)
        steps.append(last)
    names = list(dict.fromkeys(k for line in lines for k in line if "/" in k and not k.endswith("/norm")))
    for name in names[:4]:
        points = [
            (s, float(v))
            for s, line in zip(steps, lines, strict=True)
            if isinstance(v := line.get(name), int | float) and not isinstance(v, bool) and math.isfinite(v)
        ]
        if len(points) < 3:
            continue
        points = thinned(points, 240)
        low, high = min(p[1] for p in points), max(p[1] for p in points)
        logs = "y" if low > 0 and high / low > 8 else ""
        if high - low < 1e-12 * max(1.0, abs(high)):
            continue
        frame = Frame((points[0][0], points[-1][0]), (low, high), 200, logs)
        marks = decades(low, high) if logs else [low, (low + high) / 2, high]
        frame.grid([points[0][0], points[-1][0]], marks, "step", "")
        frame.line(points, "loss")
        found.append((name, frame.svg(f"{name} over training steps")))
    return found


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Means of even runs of points, at most so many."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    low, high = ends
    if log:
        value, low, high = (math.log(max(v, 1e-300)) for v in (value, low, high))
    return (value - low) / ((high - low) or 1.0)


def decades(low: float, high: float) -> list[float]:
    """Round values between two ends, for a logarithmic axis."""
    found = [
        m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    inside = [v for v in found if low <= v <= high]
    if len(inside) > 6:
        inside = [v for v in inside if f"{v:e}"[0] == "1"] or inside[:6]
    return inside or [low, high]


def _few(calls: list[int]) -> list[int]:
    """Calls to name on the axis: not so near to each other that they overlap."""
    kept: list[int] = []
    for n in calls:
        if not kept or n / kept[-1] >= 1.2:
            kept.append(n)
    return kept


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"
