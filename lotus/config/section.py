"""What every part of the page is: typed, strict, unchangeable, and asked for what goes with what as it is made."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lotus.config import rules

# A fraction that stays, in (0, 1]: the one word for every budget.
Fraction = Annotated[float, Field(gt=0, le=1)]
# A fraction of a training, neither its start nor its end.
Inside = Annotated[float, Field(gt=0, lt=1)]

MOST = 2**31 - 1
"""The largest whole number of a config."""
LARGEST = 1e30
"""The largest other one: its products with what is usual are numbers in single precision."""


def is_number(annotation: Any) -> bool:
    """Whether numbers, and no truth values, go into a setting."""
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return all(type(value) is int for value in inside)
    return annotation in (int, float) or (
        typing.get_origin(annotation) is not dict and any(is_number(part) for part in inside)
    )


class Section(BaseModel):
    """A part of the page: typed, strict, unchangeable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _before(cls, value: Any, info: ValidationInfo) -> Any:
        """A truth value is no number, and options without a name are for the default method."""
        field = cls.model_fields[str(info.field_name)]
        members = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(member, bool) for member in members) and is_number(field.annotation):
            raise ValueError("expected a number")
        if isinstance(field.default, Method) and isinstance(value, Mapping) and "name" not in value:
            return {"name": field.default.name, **value}
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        """No number is beyond what tensors, files and clocks can hold."""
        for member in value if isinstance(value, tuple) else (value,):
            if type(member) is int and abs(member) > MOST:
                raise ValueError(f"a whole number of at most {MOST}")
            if type(member) is float and abs(member) > LARGEST:
                raise ValueError(f"a number of at most {LARGEST:g}")
        return value

    @model_validator(mode="after")
    def _rules(self, info: ValidationInfo) -> Self:
        """Refuse settings that do not go together (lotus/config/rules.py); not where the table itself is looked at."""
        row = next(rules.broken(self), None)
        if row is not None and info.context is not rules.UNASKED:
            place = type(self).__name__
            told = f"{rules.join(place, row.place)}: {row.sentence(self, place)}"
            raise PydanticCustomError("rule", "{told}", {"told": told, "row": row, "value": self})
        return self


class Method(Section):
    """A method of a shelf by name, with its options: ``ccs`` or ``{name: ccs, bins: 20}``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    """Of a function on the shelf, or in a file of your own; its settings stand beside it."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


MethodOf = Annotated[Method, BeforeValidator(by_name)]


def _brief(method: Method) -> Any:
    """As it is written: a name alone where nothing is set."""
    return method.model_dump(mode="json") if method.options else method.name


BriefMethod = Annotated[Method, BeforeValidator(by_name), PlainSerializer(_brief)]
