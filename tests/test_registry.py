import pytest

from fewstep.registry import METHODS, METRICS, SOLVERS, TASKS, Entry, Paper, Registry, UnknownName, nearest


class Thing:
    """A thing to name.

    More about it.
    """


class Other:
    """Another."""


def shelf(*names):
    registry = Registry("thing", "fewstep.tasks", _loaded=True)
    for name in names:
        registry.add(Entry("thing", name, Thing))
    return registry


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="unknown thing 'digit': did you mean 'digits'"):
        shelf("digits", "mixture").get("digit")


def test_a_name_near_to_none_is_answered_with_all():
    with pytest.raises(UnknownName, match="one of: digits, mixture"):
        shelf("mixture", "digits").get("xyz")


def test_the_nearest_name_of_nothing_does_not_fail():
    assert nearest("x", []) == "one of: "


def test_a_taken_name_is_refused_but_the_same_thing_may_come_again():
    registry = shelf("one")
    registry.add(Entry("thing", "one", Thing))
    with pytest.raises(ValueError, match="'one' is already taken"):
        registry.add(Entry("thing", "one", Other))


def test_entries_come_in_the_order_of_their_names():
    assert [entry.name for entry in shelf("b", "a", "c")] == ["a", "b", "c"]


def test_a_summary_is_the_first_line_of_the_docstring():
    assert Entry("thing", "x", Thing).summary == "A thing to name."


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (METHODS, {"dmd2", "meanflow", "consistency", "regression"}),
        (TASKS, {"digits", "mixture", "images", "lowres", "prompts"}),
        (SOLVERS, {"euler", "heun", "dpm2m"}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_the_package_finds_its_own_files(registry, names):
    assert names <= {entry.name for entry in registry}


@pytest.mark.parametrize("registry", [METHODS, TASKS, SOLVERS, METRICS], ids=lambda r: r.kind)
def test_everything_registered_says_what_it_is(registry):
    for entry in registry:
        assert entry.summary.endswith((".", ":", ")")), entry.name
        assert entry.thing.name == entry.name
        assert all(isinstance(paper, Paper) and paper.title for paper in entry.papers)
