import math

import pytest
from pydantic import Field, ValidationError

from fewstep.part import Part


class Width(Part):
    value: int = Field(3, ge=1)
    limit: float = math.inf


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValidationError, match="widht"):
        Width(widht=4)


def test_a_part_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Width().value = 4


def test_a_value_outside_its_range_is_an_error():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Width(value=0)


def test_json_keeps_every_value_even_infinity():
    part = Width(value=7, limit=-math.inf)
    assert Width.model_validate_json(part.model_dump_json()) == part


def test_equal_parts_share_a_hash():
    assert len({Width(value=2), Width(value=2), Width(value=3)}) == 2
