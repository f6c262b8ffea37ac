"""Choosing: which images are worth training on. Arrays in, arrays out; needs neither torch nor lotus.

>>> signals = selection.Signals({"labels": labels, "error_norm": error_norm}, fingerprint="my data")
>>> ticket = selection.select(signals, score="el2n", pick="ccs", keep=0.3).subset
>>> ticket.rows, ticket.weights
"""

from selection.errors import Refused
from selection.lottery import Lottery, choose, select
from selection.signals import Signals
from selection.subset import Known, Subset

__all__ = ["Known", "Lottery", "Refused", "Signals", "Subset", "choose", "select"]
