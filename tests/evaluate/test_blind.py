import base64
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from prompts import QUICK, Equal, Spoken, painter
from test_page import HOSTILE, Page

from fewstep import jobs
from fewstep.errors import Refused
from fewstep.evaluate import evaluate_without_reference, read_scores, write_report
from fewstep.evaluate.blind import Votes, anonymous, ballot, pairs_of, tally, wilson
from fewstep.evaluate.pictures import png
from fewstep.evaluate.rows import Tiles

PROMPTS = ("a red boat", f"{HOSTILE}</script><script>document.title='x'</script>", "a green boat")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    teacher = painter()
    found = evaluate_without_reference(Equal(teacher, (3, 8, 8)), teacher, Spoken(PROMPTS), QUICK)
    run = tmp_path_factory.mktemp("blind")
    found.save(run)
    return found, run


@pytest.fixture
def run(made, tmp_path):
    made[0].save(tmp_path)
    return tmp_path


def tiles(lines=32, kinds=("full", "best", "student")):
    names = tuple(tuple(f"samples/tiles/{i:03d}_{kind}.png" for kind in kinds) for i in range(lines))
    return Tiles(kinds=kinds, titles=tuple(kinds), prompts=("words",) * lines, files=names)


def votes_for(run, choose):
    found = ballot(run, read_scores(run / "scores.json"))
    cast = [choose(pair) for pair in found.pairs]
    return {"schema": "fewstep.votes/1", "page": found.hash, "votes": cast}, found


# -- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_student_is_as_often_left_as_right_for_each_opponent_and_no_picture_comes_twice(seed):
    pairs = pairs_of(tiles(), seed)
    for kind in ("full", "best"):
        sides = [p.side for p in pairs if p.against == kind]
        assert (sides.count("left"), sides.count("right")) == (8, 8)
    assert sorted(p.row for p in pairs) == list(range(32))


def test_the_seed_decides_the_order_and_nothing_else():
    assert pairs_of(tiles(), 3) == pairs_of(tiles(), 3) != pairs_of(tiles(), 4)
    orders = [tuple(p.row for p in pairs_of(tiles(), seed)) for seed in range(20)]
    assert len(set(orders)) == 20
    left = [pairs_of(tiles(), seed)[0].side == "left" for seed in range(60)]
    assert 15 < sum(left) < 45
    assert pairs_of(tiles(4, ("full", "best")), 0) == ()


def test_the_same_run_gives_the_same_bytes(run):
    first = (write_report(run).read_bytes(), (run / "report" / "ab.html").read_bytes())
    assert (write_report(run).read_bytes(), (run / "report" / "ab.html").read_bytes()) == first


# -- what the page tells, and what not -----------------------------------------------------------


def test_nothing_before_the_key_tells_whose_a_picture_is(run):
    write_report(run)
    text = (run / "report" / "ab.html").read_text(encoding="utf-8")
    pairs, key = text[text.index('<section class="pair"') :].split('<section id="key">')
    shown = re.sub(r"data:image/png;base64,[\w+/=]+", "", pairs.split('<section class="only-done">')[0])
    for word in ("student", "teacher", "full", "best", "samples/", ".png", "Heun", "Euler"):
        assert word.lower() not in shown.lower()
    assert "student" in key.lower()
    for left, right in zip(*[iter(re.findall(r'src="data:image/png;base64,([\w+/=]+)"', pairs))] * 2, strict=True):
        assert len(left) == len(right)
        assert all(b"tEXt" not in base64.b64decode(one) for one in (left, right))
    assert set(re.findall(r'alt="([^"]*)"', pairs)) == {"left picture", "right picture"}


def test_a_picture_loses_its_metadata_and_nothing_else():
    from PIL import Image

    flat, busy = torch.full((8, 8, 3), 9, dtype=torch.uint8), torch.randint(0, 255, (8, 8, 3)).to(torch.uint8)
    files = [png(x, {"model": "ff" * 32, "steps": "1", "made": True}) for x in (flat, busy)]
    assert b"ffff" in files[0]
    *plain, width = anonymous(*files)
    assert len(plain[0]) == len(plain[1]) and width == 480
    for address, pixels in zip(plain, (flat, busy), strict=True):
        data = base64.b64decode(address.partition(",")[2])
        assert b"ffff" not in data
        image = Image.open(io.BytesIO(data))
        assert image.tobytes() == bytes(pixels.flatten().tolist())
        assert not image.info
    assert anonymous(files[0], b"\x89PNG\r\n\x1a\n nonsense") is None
    assert anonymous(files[0], png(flat[:4], {"made": False})) is None


def test_a_hostile_prompt_is_read_and_not_run(run):
    index = Page(write_report(run).read_text(encoding="utf-8"))
    text = (run / "report" / "ab.html").read_text(encoding="utf-8")
    blind = Page(text)
    assert blind.open == [] and index.open == []
    assert "script" not in {tag for tag, _ in index.tags}
    assert [tag for tag, _ in blind.tags].count("script") == 1
    for page in (index, blind):
        assert "alert(1)" in page.text
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert all(a.get("src", "data:").startswith("data:") for _, a in page.tags)
        assert {a["href"] for _, a in page.tags if "href" in a} <= {"ab.html"}
    policy = next(a["content"] for tag, a in blind.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = text.split("<script>")[-1].split("</script>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe-inline'; script" in policy
    assert not re.search(r"https?:|fetch\(|innerHTML|eval\(", script)


def test_without_scripts_all_pairs_and_the_key_are_there(run):
    write_report(run)
    page = Page((run / "report" / "ab.html").read_text(encoding="utf-8"))
    pairs = len(ballot(run, read_scores(run / "scores.json")).pairs)
    assert [a.get("class") for tag, a in page.tags if tag == "section"].count("pair") == pairs > 0
    assert [tag for tag, _ in page.tags].count("img") == 2 * pairs
    assert "Answer key" in page.text


def test_the_report_has_a_line_for_each_prompt_and_says_that_no_data_was_there(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.text.count("a red boat") == 3  # with three prompts, eight lines
    assert "No real data was there" in page.text
    assert "unseen real data" not in page.text
    assert [tag for tag, _ in page.tags].count("img") == 24


# -- votes --------------------------------------------------------------------------------------


def test_votes_become_a_preference_in_the_json_and_on_the_page(run, tmp_path_factory):
    votes, found = votes_for(run, lambda pair: pair.side if pair.against == "full" else None)
    file = tmp_path_factory.mktemp("votes") / "votes.json"
    file.write_text(json.dumps(votes))
    for _ in range(2):  # the same file counts once
        jobs.report(run, [file])
    raw = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    ((said),) = raw["preference"]
    wins = sum(pair.against == "full" for pair in found.pairs)
    assert (said["against"], said["wins"], said["losses"], said["ties"]) == ("full", wins, 0, 0)
    assert (said["share"], said["high"]) == (1, 1)
    assert said["low"] == pytest.approx(wins / (wins + 1.959963984540054**2))
    page = Page((run / "report" / "index.html").read_text(encoding="utf-8"))
    assert "100% prefer the student" in page.text
    assert len(list((run / "votes").iterdir())) == 1


def test_several_voters_are_added_up_and_ties_are_not_decided(run):
    votes, found = votes_for(run, lambda pair: pair.side)
    other = {"left": "right", "right": "left"}
    against = {**votes, "votes": ["tie", *(other[v] for v in votes["votes"][1:])]}
    said = tally(found, [Votes(**votes), Votes(**against)], read_scores(run / "scores.json").tiles)
    assert sum(p.wins for p in said) == len(found.pairs)
    assert sum(p.losses for p in said) == len(found.pairs) - 1
    assert sum(p.ties for p in said) == 1


def test_votes_of_another_seeds_page_count_for_nothing(run):
    votes, _ = votes_for(run, lambda pair: "left")
    (run / "votes").mkdir()
    (run / "votes" / "a.json").write_text(json.dumps({**votes, "page": "0" * 64}))
    write_report(run)
    assert json.loads((run / "report" / "report.json").read_text())["preference"] == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: "[" * 100_000, "is no JSON"),
        (lambda v: "\0", "is no JSON"),
        (lambda v: "[]", "has no schema"),
        (lambda v: json.dumps({**v, "schema": "fewstep.votes/9"}), "has schema 'fewstep.votes/9'"),
        (lambda v: json.dumps({**v, "page": "../../x"}), "is no votes file"),
        (lambda v: json.dumps({**v, "page": "0" * 64}), "belongs to another page"),
        (lambda v: json.dumps({**v, "votes": v["votes"][:-1]}), "votes, the page has"),
        (lambda v: json.dumps({**v, "votes": ["<script>"]}), "is no votes file"),
        (lambda v: json.dumps({**v, "votes": None}), "is no votes file"),
        (lambda v: json.dumps({**v, "more\nlines": 1}), "is no votes file"),
        (lambda v: " " * 2**21, "too large"),
        (lambda v: None, "there is no"),
    ],
)
def test_a_hostile_votes_file_is_refused_in_one_line_and_changes_nothing(made, tmp_path, change, complaint):
    run = made[1]
    votes, _ = votes_for(run, lambda pair: "left")
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(votes))
    text = change(votes)
    if text is not None:
        bad.write_text(text)
    with pytest.raises(Refused, match=complaint) as caught:
        jobs.report(run, [good, bad])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (run / "votes").exists()


def test_votes_for_a_run_without_pictures_are_refused(run, tmp_path_factory):
    raw = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps({**raw, "tiles": None}))
    with pytest.raises(Refused, match="no blind comparison"):
        jobs.report(run, [tmp_path_factory.mktemp("x") / "votes.json"])
    write_report(run)
    assert not (run / "report" / "ab.html").exists()


@pytest.mark.parametrize(("wins", "total"), [(0, 10), (10, 10), (8, 10), (37, 61), (1, 1)])
def test_the_interval_is_wilsons(wins, total):
    from scipy.stats import binomtest

    known = binomtest(wins, total).proportion_ci(0.95, method="wilson")
    assert wilson(wins, total) == pytest.approx((known.low, known.high), abs=1e-12)


@pytest.mark.parametrize("ends", [[(-1, 3)], [(4, 3)], [(0, 0)]])
def test_a_share_of_nothing_is_refused(ends):
    with pytest.raises(Refused):
        wilson(*ends[0])
