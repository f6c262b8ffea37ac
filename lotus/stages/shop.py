"""Older names of what stands in :mod:`lotus.stages.context` and :mod:`lotus.stage`, for modules that still say them."""

from lotus.stage import TRAIN_FORWARDS, Outcome
from lotus.stage import Work as Making
from lotus.stages.context import CALIBRATION, HELD_OUT, PARTS
from lotus.stages.context import Context as Shop

__all__ = ["CALIBRATION", "HELD_OUT", "PARTS", "TRAIN_FORWARDS", "Making", "Outcome", "Shop"]
