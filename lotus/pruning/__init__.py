"""Pruning: score the units of a ViT, keep what a budget allows, cut the rest and fold what it carried into what stays.

small = lotus.prune(model, batches, keep={"macs": 0.5})
"""

from lotus.pruning.check import Verified, verify
from lotus.pruning.plan import Plan
from lotus.pruning.spec import load, save
from lotus.pruning.streams import lottery, prune
from lotus.pruning.study import Given, Pruned, Study, study
from lotus.pruning.wrapping import Batches

__all__ = [
    "Batches",
    "Given",
    "Plan",
    "Pruned",
    "Study",
    "Verified",
    "load",
    "lottery",
    "prune",
    "save",
    "study",
    "verify",
]
