"""The base of every option, recipe, path and plan: frozen and strict."""

from __future__ import annotations

import sys
from copy import copy
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, create_model


class Part(BaseModel):
    """A frozen set of named choices; an unknown name is an error, never ignored.

    >>> class Width(Part):
    ...     value: int = 3
    >>> Width(value=4)
    Width(value=4)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


P = TypeVar("P", bound=Part)


def variant(base: type[P], name: str, **defaults: Any) -> type[P]:
    """The same choices with other defaults.

    >>> class Width(Part):
    ...     value: int = 3
    >>> variant(Width, "Wide", value=9)()
    Wide(value=9)
    """
    unknown = sorted(set(defaults) - set(base.model_fields))
    if unknown:
        raise ValueError(f"{base.__name__} has no {', '.join(unknown)}")
    fields: dict[str, Any] = {}
    for key, value in defaults.items():
        field = copy(base.model_fields[key])
        field.default, field.default_factory = value, None
        fields[key] = (field.annotation, field)
    made = create_model(name, __base__=base, __module__=sys._getframe(1).f_globals["__name__"], **fields)
    return made
