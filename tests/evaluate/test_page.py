import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))
from small import FAST, PATH, flawed, mixture, teacher

from fewstep.errors import Refused
from fewstep.evaluate import Document, Row, Scores, evaluate, judge, read_scores, table, write_report
from fewstep.evaluate.plots import curve, training
from fewstep.student import Student

ASKED = {
    "model", "nfe", "frechet", "frechet_spread", "excess", "precision", "recall", "coverage", "copied", "accuracy",
    "samples_per_s", "calls", "count",
}  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'"


@pytest.fixture(scope="module")
def report():
    task = mixture()
    return evaluate(flawed(task), teacher(task), task, FAST)


@pytest.fixture
def run(report, tmp_path):
    report.save(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """Tags and their attributes, words outside style, and tags left open."""

    VOID = frozenset(["meta", "img", "br", "line", "polyline", "link"])

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def scores(rows, **more):
    protocol = {"noise_seeds": 16, "detail_seeds": 4, "solvers": ["euler"], "scout_seeds": 2, "grid": "karras",
                "timing_rounds": 5, "timing_batch": 256}  # fmt: skip
    return Scores(schema="fewstep.scores/1", task="digits", shape=(1, 8, 8), seed=0, rows=rows, protocol=protocol,
                  hashes={"data": "0" * 64}, **more)  # fmt: skip


def made(model, nfe, frechet, excess=None, **more):
    title = {"student": "Student, 1 call", "teacher:dpm2m": f"Teacher, DPM-Solver++ 2M, {nfe} calls"}.get(model, model)
    return Row(model=model, title=title, nfe=nfe, frechet=frechet, excess=excess, count=899, **more)


GOOD = (
    made("teacher", 35, 0.40, 1.3, recall=0.93, coverage=0.94, accuracy=0.98, samples_per_s=200.0),
    made("teacher:dpm2m", 3, 0.78, 4.1, samples_per_s=2000.0),
    made("teacher:dpm2m", 5, 0.37, 1.0, frechet_spread=0.02, samples_per_s=1400.0),
    made("student", 1, 0.38, 1.1, recall=0.92, coverage=0.95, accuracy=0.99, copied=0.03, samples_per_s=7000.0),
    made("real", 0, 0.25, 0.0),
)


def with_student(**changes):
    return tuple(r.model_copy(update=changes) if r.student else r for r in GOOD)


# -- the files --------------------------------------------------------------------------------


def test_the_page_is_one_file_without_network_or_script(run):
    write_report(run)
    text = (run / "report" / "index.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not {"script", "iframe", "object", "embed", "link"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert len([1 for tag, _ in found.tags if tag == "img"]) >= 4


def test_the_page_opens_with_the_verdict_and_shows_pictures_before_the_table(run):
    found = page(run)
    verdict = judge(read_scores(run / "scores.json"))
    assert verdict.headline in found.text[:400]
    tags = [tag for tag, _ in found.tags]
    assert tags.index("img") < tags.index("table")


def test_the_page_follows_light_and_dark_and_fits_a_phone(run):
    text = write_report(run).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text


def test_the_json_has_the_asked_rows_and_its_own_schema(run):
    write_report(run)
    raw = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    assert raw["schema"] == "fewstep.report/1"
    assert all(set(row) >= ASKED for row in raw["rows"])
    assert [r["samples_per_s"] for r in raw["rows"] if r["model"] == "real"] == [None]
    assert {"protocol", "hashes", "verdict"} <= set(raw)
    again = Document.model_validate(raw)
    assert again.as_dict() == raw
    with pytest.raises(ValidationError):
        Document.model_validate({**raw, "schema": "fewstep.report/2"})


def test_the_reports_own_dictionary_is_what_the_file_holds(run, report):
    write_report(run)
    raw = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    assert {**raw, "origin": {}} == json.loads(json.dumps(report.as_dict()))


def test_scores_survive_being_written_and_read(run, report):
    assert read_scores(run / "scores.json") == report.scores


def test_what_else_the_run_folder_knows_is_on_the_page(run):
    (run / "student").mkdir()
    (run / "student" / "fewstep.json").write_text(json.dumps({"method": "regression", "name": "my student"}))
    (run / "recipe.toml").write_text("steps = 1234\n")
    (run / "environment.json").write_text(json.dumps({"python": "3.11.9"}))
    (run / "training.json").write_text(json.dumps({"warnings": ["step 40: samples look alike"]}))
    lines = [json.dumps({"step": 20 * i, "stage": 0, "student/pairs": 1 / (i + 1)}) for i in range(50)]
    (run / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 1000, "stu')
    found = page(run)
    for words in ("regression", "my student", "steps = 1234", "3.11.9", "step 40: samples look alike", "student/pairs"):
        assert words in found.text
    assert len([1 for tag, _ in found.tags if tag == "svg"]) == 2


def test_the_page_shows_how_the_training_stood(run):
    levels = [{"lam": lam, "gap": 0.3, "behind": 0.0, "behind_error": 0.1} for lam in (-1.0, 0.0, 1.0)]
    probe = {"diversity": 0.2, "spread": 1.0, "saturation": 0.0, "grid": 1.0}
    lines = [{"step": k, "stage": 0, "probe": probe, "game": {"levels": levels, "kl": 0.1}} for k in (5, 10)]
    (run / "probes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    text = page(run).text
    assert "How the training stood" in text and "score gap by noise level" in text and "critic lag" in text
    assert "At the end samples look alike" in text
    kept = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))["diagnosis"]
    assert kept["schema"] == "fewstep.diagnosis/1" and [look["step"] for look in kept["looks"]] == [5, 10]


def test_only_scores_are_needed(run):
    for file in (run / "samples").iterdir():
        file.unlink()
    assert "img" not in [tag for tag, _ in page(run).tags]


# -- a folder that means harm, or is broken ---------------------------------------------------


def test_hostile_words_are_shown_and_not_obeyed(run):
    raw = json.loads((run / "scores.json").read_text())
    raw["task"], raw["notes"] = HOSTILE, [HOSTILE]
    raw["rows"][-2]["title"] = HOSTILE
    raw["features"] = {"name": HOSTILE}
    raw["hashes"][HOSTILE] = HOSTILE
    raw["machine"] = {"device": HOSTILE, "threads": HOSTILE, "torch": HOSTILE}
    raw["sheets"][0].update(title=HOSTILE, alt=HOSTILE)
    (run / "scores.json").write_text(json.dumps(raw))
    (run / "student").mkdir()
    (run / "student" / "fewstep.json").write_text(json.dumps({"method": HOSTILE, "name": HOSTILE}))
    (run / "recipe.toml").write_text(HOSTILE)
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "log.jsonl").write_text("\n".join(json.dumps({"step": i, "a/" + HOSTILE: i * i}) for i in range(9)))
    found = page(run)
    assert "script" not in {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(a.get("src", "data:").startswith("data:") for _, a in found.tags)
    assert found.text.count("alert(1)") > 8


def test_no_file_outside_the_runs_samples_is_ever_shown(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("other") / "secret.png"
    outside.write_bytes(next((run / "samples").glob("*.png")).read_bytes())
    (run / "samples" / "link.png").symlink_to(outside)
    (run / "samples" / "words.png").write_text("not a picture")
    raw = json.loads((run / "scores.json").read_text())
    sheet = raw["sheets"][0]
    files = [
        str(outside),
        "samples/../scores.json",
        "samples/link.png",
        "samples/words.png",
        "samples/none.png",
        "a\0b",
    ]
    raw["sheets"] = [{**sheet, "file": file} for file in files]
    (run / "scores.json").write_text(json.dumps(raw))
    assert "img" not in [tag for tag, _ in page(run).tags]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is damaged"),
        ('{"schema": "fewstep.scores/1", "rows"', "is damaged"),
        ("[]", "has schema None"),
        ('{"schema": "fewstep.scores/9"}', "has schema 'fewstep.scores/9'"),
        ('{"schema": "fewstep.scores/1", "rows": []}', "is damaged"),
        ('{"schema": "fewstep.scores/1", "rows": [{"frechet": NaN}]}', "NaN is no JSON number"),
    ],
)
def test_broken_scores_give_one_clear_line_and_no_page(tmp_path, text, complaint):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(Refused, match=complaint) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert "scores.json" in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_a_folder_without_scores_says_what_to_do(tmp_path):
    with pytest.raises(Refused, match="evaluate the run first"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "name", ["student/fewstep.json", "environment.json", "training.json", "log.jsonl", "recipe.toml"]
)
@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"[1, 2]", b'{"warnings": 3, "method": {"name": []}}', b"[" * 100_000]
)
def test_other_broken_files_are_left_out(run, name, data):
    file = run / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    assert page(run).open == []


# -- words ------------------------------------------------------------------------------------


def test_a_good_student_is_praised_against_the_best_few_step_teacher_not_the_slow_one():
    verdict = judge(scores(GOOD))
    assert verdict.grade == "good"
    assert "1.10x its excess" in verdict.headline
    assert "DPM-Solver++ 2M, 5 calls" in verdict.headline
    assert verdict.points[0].startswith("35x faster than the teacher's full 35 calls")
    assert "honest speed-up at equal quality is 5.0x" in verdict.points[1]
    assert verdict.warnings == ()


@pytest.mark.parametrize(
    ("excess", "grade"), [(0.9, "excellent"), (1.0, "excellent"), (1.3, "good"), (1.31, "fair"), (2.5, "weak")]
)
def test_the_grade_follows_the_excess(excess, grade):
    assert judge(scores(with_student(excess=excess))).grade == grade


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"copied": 0.4}, "Copying: 40%"),
        ({"recall": 0.5}, "Lost variety: recall is 0.50, the teacher's is 0.93"),
        ({"accuracy": 0.7}, "accuracy is 0.70"),
        ({"diversity": 0.2}, "only 20% as far apart"),
    ],
)
def test_a_good_figure_does_not_hide_copying_or_lost_variety(changes, warning):
    verdict = judge(scores(with_student(**changes)))
    assert warning in verdict.warnings[0]
    assert verdict.grade == "fair"


def test_a_student_that_lost_all_variety_is_weak_whatever_its_distance():
    lost = {"recall": 0.0, "coverage": 0.1, "diversity": 0.05}
    for excess in (0.9, None):
        assert judge(scores(with_student(excess=excess, **lost))).grade == "weak"


def test_a_student_that_no_sampler_matches_and_one_that_a_cheap_one_does():
    best = judge(scores(with_student(frechet=0.3, excess=0.4)))
    assert "No sampler of the teacher" in best.points[1]
    equal = (made("teacher:dpm2m", 1, 0.1, 1.0), *with_student(frechet=0.38, excess=2.4))
    assert "The teacher itself is as good with 1 call" in judge(scores(equal)).points[1]


def test_an_excess_made_of_noise_is_called_that():
    near = (*GOOD[:2], GOOD[2].model_copy(update={"frechet": 0.26, "frechet_spread": 0.03}), *GOOD[3:])
    assert any("mostly noise" in line for line in judge(scores(near)).warnings)


def test_the_terminal_table_has_a_line_for_every_row_and_takes_the_files_content(run, report):
    write_report(run)
    raw = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    text = table(report)
    assert table(raw) == table(report.scores) == text
    lines = text.splitlines()
    assert len(lines) == len(report.rows) + 2
    assert lines[0].split() == ["model", "calls", "Fréchet", "excess", "precision", "recall", "coverage", "copied",
                                "accuracy", "samples/s"]  # fmt: skip
    assert lines[-1].startswith("Real data against real data")
    assert table(scores(GOOD)).splitlines()[5].split()[:4] == ["Student", "1", "0.380", "1.10x"]


def test_a_student_of_several_step_counts_has_a_row_for_each_and_is_a_line_over_them():
    task = mixture()
    student = flawed(task)
    times = {1: (PATH.t_max,), 2: (PATH.t_max, 1.0), 4: (PATH.t_max, 3.0, 1.0, 0.3)}
    serving = Student(student.denoiser, task.shape, steps=times)
    found = evaluate(serving, teacher(task), task, FAST)
    mine = [r for r in found.rows if r.student]
    assert [(r.nfe, r.calls) for r in mine] == [(1, 1), (2, 2), (4, 4)]
    chart = str(curve(found.scores))
    (points,) = re.findall(r'<polyline class="student" points="([^"]+)"', chart)
    where = [tuple(map(float, p.split(","))) for p in points.split()]
    dots = re.findall(r'<circle class="student" cx="([^"]+)" cy="([^"]+)"', chart)
    assert where == [tuple(map(float, dot)) for dot in dots]
    assert len(where) == 3 and [x for x, _ in where] == sorted({x for x, _ in where})
    assert len(re.findall('class="name-student"', chart)) == 1


def test_students_that_are_compared_have_a_line_each_and_one_call_has_none():
    rows = (*GOOD[:3], *(made(f"student:{n}", k, f) for n, k, f in [("a", 1, 0.9), ("b", 1, 0.8), ("a", 4, 0.5)]))
    chart = str(curve(scores(rows)))
    (points,) = re.findall(r'<polyline class="student" points="([^"]+)"', chart)
    (left, high), (right, low) = (tuple(map(float, p.split(","))) for p in points.split())
    assert left < right and high < low  # more calls, a smaller distance: the page counts downwards
    assert len(re.findall(r'<circle class="student"', chart)) == 3
    assert re.findall(r'class="name-student"[^>]*>([^<]+)<', chart) == ["a", "b"]


def test_training_curves_join_the_stages_of_a_run():
    lines = [{"step": s, "stage": stage, "student/loss": 1.0 + s + stage} for stage in (0, 1) for s in (10, 20, 30)]
    ((name, chart),) = training(lines)
    assert name == "student/loss"
    across = [float(p.split(",")[0]) for p in re.search(r'points="([^"]+)"', chart).group(1).split()]
    assert across == sorted(across)
    assert len(across) == 6
