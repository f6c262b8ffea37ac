"""Settings of a method that is found by name: as typed as those of the page, by its own signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from lotus.config.faults import sentence
from lotus.config.section import Section
from selection import methods
from selection.errors import Refused


class _Options(Section):
    model_config = ConfigDict(use_attribute_docstrings=False, arbitrary_types_allowed=True, protected_namespaces=())


def options(
    method: Callable[..., Any], given: Mapping[str, Any], *, place: str, name: str | None = None
) -> dict[str, Any]:
    """All settings of ``method``: what is ``given``, and the defaults of the others.

    Args:
        place: where they stand, for a refusal to name
        name: what a config calls the method; None: as the function is called

    Raises:
        Refused: it has no such setting, or a value is not of the kind that the parameter is annotated with.
    """
    methods.check_settings(method, given, place=place, name=name)
    defaults, hints = methods.settings(method), methods.kinds(method)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if value is methods.REQUIRED else value) for name, value in defaults.items()
    }
    try:
        made = create_model("Options", __base__=_Options, **fields).model_validate(dict(given))
    except ValidationError as error:
        raise Refused("\n".join(dict.fromkeys(_sentence(fault, place) for fault in error.errors()))) from None
    return {name: getattr(made, name) for name in fields}


def _sentence(fault: Mapping[str, Any], place: str) -> str:
    return sentence(fault, ".".join((place, *map(str, fault["loc"]))))
