"""What a setting is about, said once, where it is declared: ``mixup: Annotated[float, Mark.BLURS] = Field(0, ge=0)``.

Rules, inheritance and stages ask for the settings with a mark, and keep no list of names: a new one is known to all of them.
"""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel


class Mark(Enum):
    """What a setting may be about. One of which the rules are told has an example beside its default: ``Field(0, examples=[0.2])``."""

    BLURS = "stands between an image and what the model says of it: off where images are scored"
    ADDS = "what a training is given on top, which a proxy goes without where it is not set there"
    LENGTH = "how long a training is and begins, which each says for itself"
    RATE = "how large its steps are, which a fine-tune says for itself"
    SHARED = "of the ticket's training, and as it is there for a fine-tune too"
    OF_TRAINING = "of what sees an image more than once, as a linear probe does not"
    OF_GATES = "does nothing where no gates learn"
    BY_SCORES = "of a cut by scores, and of no other way to prune"
    OFF_WITHIN = "off, which it is by default, in a short training within another stage: a search, gates that learn"


def marked(section: type[BaseModel], *marks: Mark) -> tuple[str, ...]:
    """The settings of ``section`` with any of these marks, in its order."""
    return tuple(name for name, field in section.model_fields.items() if any(mark in field.metadata for mark in marks))
