"""Every knob of a run on one page, what goes with what, and the strict reader: a face of names.

A config is YAML; ``key=value`` on the command line overrides it (``train.lr=3e-4 select.pick=ccs``). A name that is not
here is refused with its place and the nearest right one. A config may come from elsewhere: it can only choose among
methods by name, never run code.
"""

from lotus.config.augment import Augment, Auto
from lotus.config.marks import that_count, that_name_files
from lotus.config.options import options
from lotus.config.page import Baseline, Config, Data, Export, Model, OneCut, Score, Select, Subsets
from lotus.config.reader import as_request, check, one_cut, read, shipped
from lotus.config.recipes import (
    Dynamic,
    EarlyBird,
    Finetune,
    Joint,
    Patches,
    Recipe,
    Shrink,
    ShrinkStep,
    Sparsity,
    Stable,
    Taught,
    Teacher,
    Train,
)
from lotus.config.request import Keep, Prune, Search
from lotus.config.rule import Rule
from lotus.config.rules import LINEAR_OPTIMIZERS
from lotus.config.section import Fraction, Method, Section

__all__ = [
    "LINEAR_OPTIMIZERS",
    "Augment",
    "Auto",
    "Baseline",
    "Config",
    "Data",
    "Dynamic",
    "EarlyBird",
    "Export",
    "Finetune",
    "Fraction",
    "Joint",
    "Keep",
    "Method",
    "Model",
    "OneCut",
    "Patches",
    "Prune",
    "Recipe",
    "Rule",
    "Score",
    "Search",
    "Section",
    "Select",
    "Shrink",
    "ShrinkStep",
    "Sparsity",
    "Stable",
    "Subsets",
    "Taught",
    "Teacher",
    "Train",
    "as_request",
    "check",
    "one_cut",
    "options",
    "read",
    "shipped",
    "that_count",
    "that_name_files",
]  # fmt: skip
