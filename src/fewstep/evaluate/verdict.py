"""What the figures mean, in plain words."""

from __future__ import annotations

from .rows import Grade, Measured, Row, Scores, Verdict

GRADES: tuple[tuple[float, Grade], ...] = ((1.0, "excellent"), (1.3, "good"), (2.0, "fair"))
"""Highest excess of each grade; above the last it is weak."""
COPIED = 0.10
LOST = 0.10
"""How far recall, coverage or accuracy may lie below the teacher's before it is said."""


def judge(scores: Scores) -> Verdict:
    """Read the rows as a careful person would: against the teacher's best few calls, not its slowest run."""
    if scores.reference == "teacher":
        from .imitation import judge_imitation

        return judge_imitation(scores)
    students = sorted(scores.students, key=lambda row: (row.nfe, row.frechet or 0.0))
    if not students:
        return _teacher_only(scores)
    student = students[0]
    grade, headline = _headline(student, scores)
    serious, notes = _warnings(student, scores)
    if serious:  # a Fréchet distance can look fine while samples repeat themselves
        if grade in ("excellent", "good"):
            headline += " But see the warning below."
        grade = "weak" if len(serious) > 2 or grade == "weak" else "fair"
    points = [*speed_points(student, scores), *_others(students[1:])]
    return Verdict(grade=grade, headline=headline, points=tuple(points), warnings=(*serious, *notes, *scores.notes))


def _headline(student: Row, scores: Scores) -> tuple[Grade, str]:
    name = who(student)
    best, floor = scores.best, scores.floor
    if student.excess is None or best is None:
        if best is not None and floor is not None and student.frechet is not None and best.frechet is not None:
            side = (
                "no farther from real data than" if student.frechet <= best.frechet else "farther from real data than"
            )
            return "unknown", f"{name} is {side} the teacher's best few-step sampler, which is already at the floor."
        if student.frechet is None or floor is None or not floor.frechet:
            return "unknown", f"{name} was measured, but there is nothing to hold it against."
        ratio = student.frechet / floor.frechet
        return "unknown", f"{name} is {ratio:.1f} times as far from real data as real data is from itself."
    grade: Grade = next((grade for most, grade in GRADES if student.excess <= most), "weak")
    against = f"the teacher's best sampler at up to {scores.few} calls ({short_name(best)})"
    match grade:
        case "excellent":
            text = f"{name} comes closer to real data than {against}: {times(student.excess)} its excess."
        case "good":
            text = f"{name} is nearly as close to real data as {against}: {times(student.excess)} its excess."
        case "fair":
            text = f"{name} is somewhat farther from real data than {against}: {times(student.excess)} its excess."
        case _:
            text = f"{name} is clearly farther from real data than {against}: {times(student.excess)} its excess."
    return grade, text


def speed_points(student: Row, scores: Measured) -> list[str]:
    """Against the full run, and against the cheapest sampler that is as good: the honest figure."""
    points = []
    full = scores.full
    if full is not None and full.samples_per_s and student.samples_per_s:
        points.append(
            f"{student.samples_per_s / full.samples_per_s:.0f}x faster than the teacher's full {full.nfe} calls, "
            "timed side by side."
        )
    if student.frechet is None:
        return points
    teachers = sorted((r for r in scores.rows if r.teacher and r.frechet is not None), key=lambda r: r.nfe)
    equal = next((r for r in teachers if (r.frechet or 0.0) <= student.frechet), None)
    if teachers and equal is None:
        points.append("No sampler of the teacher that was tried here is as good, at any number of calls.")
    elif equal is not None and equal.nfe <= student.nfe:
        points.append(
            f"The teacher itself is as good with {equal.nfe} call{'s' * (equal.nfe > 1)} ({short_name(equal)})."
        )
    elif equal is not None:
        if student.samples_per_s and equal.samples_per_s:
            factor = f"{student.samples_per_s / equal.samples_per_s:.1f}x"
        else:
            factor = f"{equal.nfe / student.nfe:.0f}x by calls"
        points.append(f"The honest speed-up at equal quality is {factor}: against {short_name(equal)}.")
    return points


def _others(more: list[Row]) -> list[str]:
    return [f"{who(row)}: {times(row.excess)} the excess." for row in more if row.excess is not None]


def _warnings(student: Row, scores: Scores) -> tuple[list[str], list[str]]:
    """(serious, worth knowing)."""
    serious, notes = [], []
    full, floor, best = scores.full, scores.floor, scores.best
    if student.copied is not None and student.copied > COPIED:
        serious.append(
            f"Copying: {student.copied:.0%} of the samples lie nearer to a training sample than all but the nearest "
            "5% of real unseen ones do. The student may repeat its training data."
        )
    named = (("recall", "variety"), ("coverage", "variety"), ("accuracy", "obedience to the condition"))
    for name, meaning in named:
        mine = getattr(student, name)
        theirs = None if full is None else getattr(full, name)
        if mine is not None and theirs is not None and mine < theirs - LOST:
            serious.append(f"Lost {meaning}: {name} is {mine:.2f}, the teacher's is {theirs:.2f}.")
    if student.diversity is not None and student.diversity < 0.8:
        serious.append(f"Samples of one condition are only {student.diversity:.0%} as far apart as real ones.")
    if best is not None and floor is not None and best.frechet is not None and floor.frechet is not None:
        gap, spread = best.frechet - floor.frechet, best.frechet_spread or 0.0
        if gap <= 0:
            notes.append("The teacher's best few-step sampler is already at the floor, so no excess can be given.")
        elif gap < 2 * spread:
            notes.append(
                "The teacher's best few-step sampler is so near the floor that the excess is mostly noise: "
                "read the Fréchet distances themselves."
            )
    if (
        full is not None
        and floor is not None
        and full.frechet is not None
        and floor.frechet is not None
        and full.frechet > 3 * floor.frechet
    ):
        ratio = full.frechet / floor.frechet
        notes.append(
            f"The teacher itself is {ratio:.1f} times as far from real data as real data is from itself: "
            "a better teacher would help the student most."
        )
    if student.exact:
        notes.append(
            "In few dimensions a Fréchet distance sees no more than the mean and the covariance: "
            "read the table against the exact law."
        )
    if student.count < 500:
        notes.append(
            f"Only {student.count} samples were compared: Fréchet distances at such counts are large and rough."
        )
    return serious, notes


def _teacher_only(scores: Scores) -> Verdict:
    full, floor = scores.full or scores.best, scores.floor
    if full is None or floor is None or not full.frechet or not floor.frechet:
        return Verdict(grade="unknown", headline="Nothing was measured but real data.", warnings=scores.notes)
    text = f"The teacher is {full.frechet / floor.frechet:.1f} times as far from real data as real data is from itself."
    points = tuple(reading.line for reading in scores.readings)
    return Verdict(grade="unknown", headline=text, points=points, warnings=scores.notes)


def who(row: Row) -> str:
    name = "The student" if row.model == "student" else row.model.partition(":")[2]
    return f"{name} with {row.nfe} call{'s' if row.nfe > 1 else ''}"


def short_name(row: Row) -> str:
    return row.title.removeprefix("Teacher, ") or f"{row.model}, {row.nfe} calls"


def times(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}x"
