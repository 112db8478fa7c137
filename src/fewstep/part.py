"""The base of every option, recipe, path and plan: frozen and strict."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen set of named choices; an unknown name is an error, never ignored.

    >>> class Width(Part):
    ...     value: int = 3
    >>> Width(value=4)
    Width(value=4)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
