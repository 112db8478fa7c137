"""What is known of licences."""

from __future__ import annotations

import pytest

from fewstep.licences import KNOWN, licence_facts


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("apache-2.0", "permissive"),
        ("MIT", "permissive"),
        ("creativeml-openrail-m", "use-restricted"),
        ("openrail++", "use-restricted"),
        ("stabilityai-community", "use-restricted"),
        ("cc-by-sa-4.0", "use-restricted"),
        ("flux-1-dev-non-commercial-license", "non-commercial"),
        ("FLUX 1 dev non commercial license", "non-commercial"),
        ("cc-by-nc-4.0", "non-commercial"),
        ("cc-by-nd-4.0", "non-commercial"),
        ("unknown", "unknown"),
        ("other", "unknown"),
        ("", "unknown"),
        ("a-house-licence", "unknown"),
    ],
)
def test_a_licence_that_people_meet_is_of_the_kind_that_its_text_says(name, kind):
    assert licence_facts(name).kind == kind


@pytest.mark.parametrize("name", ["acme-nc-1.0", "lab-research-only", "our_non_commercial_licence", "cc-by-nd-9.9"])
def test_a_restrictive_name_that_is_in_no_table_asks_all_the_same(name):
    assert licence_facts(name).asks


@pytest.mark.parametrize("name", ["francium", "nvidia-open-model-license", "andromeda-1.0", "incense"])
def test_letters_inside_a_word_are_no_restriction(name):
    assert not licence_facts(name).asks


def test_only_what_forbids_is_asked_about():
    assert {licence_facts(name).kind for name in KNOWN if licence_facts(name).asks} == {"non-commercial"}
