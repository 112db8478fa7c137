"""What the figures mean where no data was there: how well a student imitates its teacher, and nothing more."""

from __future__ import annotations

from .rows import Grade, Measured, Row, Verdict
from .verdict import GRADES, LOST, short_name, speed_points, times, who

UNRELATED = 0.9
"""Pair distance from which a student's picture has little to do with the teacher's of the same noise."""
ALIKE = 0.8
DRIFT = 1.25
"""Factor of saturation, up or down, that is said."""
FINE = 1.5
"""The same for fine detail."""
CAVEAT = (
    "No real data was there. These figures say how near the student comes to its teacher; "
    "whether the teacher is any good they cannot say."
)


def judge_imitation(scores: Measured) -> Verdict:
    """The verdict of a comparison with the teacher alone."""
    students = sorted(scores.students, key=lambda row: (row.nfe, row.frechet or 0.0))
    if not students:
        best = scores.best
        headline = "Only the teacher was measured, against itself: nothing can be said of its quality without data."
        if best is not None and best.feature_distance is not None:
            headline += f" Its best few steps ({short_name(best)}) lie {best.feature_distance:.2f} from its full run."
        return Verdict(grade="unknown", headline=headline, warnings=scores.notes)
    student = students[0]
    grade, headline = _headline(student, scores)
    serious, notes = _warnings(student, scores)
    if serious:  # sets can lie near each other while every prompt gives one picture
        if grade in ("excellent", "good"):
            headline += " But see the warning below."
        grade = "weak" if len(serious) > 2 or grade == "weak" else "fair"
    points = [*_pairs(student, scores), *speed_points(student, scores)]
    points += [f"{who(row)}: {times(row.excess)} the excess." for row in students[1:] if row.excess is not None]
    return Verdict(
        grade=grade, headline=headline, points=tuple(points), warnings=(CAVEAT, *serious, *notes, *scores.notes)
    )


def _headline(student: Row, scores: Measured) -> tuple[Grade, str]:
    best = scores.best
    name = who(student)
    if student.excess is None or best is None:
        return "unknown", (
            f"{name} was compared with its teacher; the teacher's best few-step sampler already gives what its full "
            "length gives, so there is no excess."
        )
    against = f"the teacher's best sampler at up to {scores.few} calls ({short_name(best)})"
    grade: Grade = next((grade for most, grade in GRADES if student.excess <= most), "weak")
    how = {
        "excellent": "imitates the full-length teacher better than",
        "good": "imitates the full-length teacher nearly as well as",
        "fair": "imitates the full-length teacher somewhat worse than",
        "weak": "imitates the full-length teacher clearly worse than",
    }[grade]
    return grade, f"{name} {how} {against}: {times(student.excess)} its excess."


def _pairs(student: Row, scores: Measured) -> list[str]:
    best = scores.best
    if student.feature_distance is None or best is None or best.feature_distance is None:
        return []
    return [
        f"From the same noise its samples lie {student.feature_distance:.2f} from the full-length teacher's "
        f"(0 is equal, 1 unrelated); the teacher's best few steps lie {best.feature_distance:.2f}."
    ]


def _warnings(student: Row, scores: Measured) -> tuple[list[str], list[str]]:
    """(serious, worth knowing)."""
    serious, notes = [], []
    full, best, floor = scores.full, scores.best, scores.floor
    if student.diversity is not None and student.diversity < ALIKE:
        serious.append(
            f"Lost variety: samples of one condition are only {student.diversity:.0%} as far apart as the teacher's."
        )
    for name in ("recall", "coverage"):
        mine, theirs = getattr(student, name), None if full is None else getattr(full, name)
        if mine is not None and theirs is not None and mine < theirs - LOST:
            serious.append(f"Lost variety: {name} of the teacher's samples is {mine:.2f}, its own is {theirs:.2f}.")
            break
    if full is not None and student.adherence is not None and full.adherence is not None:
        noise = (student.spreads.get("adherence", 0.0) ** 2 + full.spreads.get("adherence", 0.0) ** 2) ** 0.5
        if student.adherence < full.adherence - max(3 * noise, 0.02 * abs(full.adherence)):
            serious.append(
                f"Lost obedience to the prompts: their score is {student.adherence:.2f}, the teacher's is "
                f"{full.adherence:.2f}."
            )
    for name, factor, more, less in (
        ("saturation", DRIFT, "more colourful", "paler"),
        ("high_frequency", FINE, "sharper or noisier", "more blurred"),
    ):
        ratio = getattr(student, name)
        if ratio is not None and not 1 / factor <= ratio <= factor:
            word = more if ratio > 1 else less
            notes.append(f"Its pictures are {word} than the teacher's: {name.replace('_', ' ')} is {ratio:.2f} times.")
    if student.feature_distance is not None and student.feature_distance > UNRELATED:
        notes.append(
            "The student does not follow the teacher's noise, as methods that match distributions need not: "
            "read the distances of sets, not those of pairs."
        )
    if best is not None and floor is not None and best.frechet is not None and floor.frechet is not None:
        gap, spread = best.frechet - floor.frechet, best.frechet_spread or 0.0
        if 0 < gap < 2 * spread:
            notes.append(
                "The teacher's best few-step sampler is so near the floor that the excess is mostly noise: "
                "read the Fréchet distances themselves."
            )
    if student.count < 500:
        notes.append(
            f"Only {student.count} samples were compared in a draw: distances of sets are rough at such counts."
        )
    return serious, notes
