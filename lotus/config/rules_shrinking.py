"""What goes with a training that shrinks, and with one that is its own proxy: rows of the table (lotus/config/rules.py)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

from lotus.config.rule import ZEROS, Rule, of_patches


def _falling(it: Any) -> bool:
    """Whether the cuts of a training keep less each time, the last of them more than ``prune.keep``, all in its measures."""
    kept = [one.keep.asked for one in it.train.shrink.cuts[:-1] if one.keep is not None] + [it.prune.keep.asked]
    return all(
        one.keys() == other.keys() and all(one[what] > other[what] for what in one)
        for one, other in itertools.pairwise(kept)
    )


def _shrinks(it: Any) -> bool:
    return it.train.shrink is not None


_STEPS = "train.shrink.steps=[{at: 0.1, keep: {macs: 0.7}}, {at: 0.2}]"

OF_ITSELF: tuple[tuple[Callable[[Any], bool], str, str, str], ...] = (
    (lambda it: it.train.shrink is None,
     "self draws the ticket at the cut of a training that shrinks. Set train.shrink, or take training", "", ""),
    (lambda it: it.train.dynamic is not None,
     "self says who trains, and so does train.dynamic. Leave one of the two out", "train.shrink={} train.dynamic=rs2", ""),
    (lambda it: bool(it.train.mixup or it.train.cutmix),
     "self scores an image by what is said of it as it is. Set train.mixup=0 and train.cutmix=0, or take training",
     "train.shrink={} train.mixup=0.2", ""),
    (lambda it: any(one.patches is not None and one.patches.joint is not None for one in (it.train, it.finetune)),
     "a joint budget of patches is shared out before the training, by what a proxy said. Leave it out, or take training",
     "train.shrink={} train.patches.joint={}", "train.patches={}"),
)  # fmt: skip
"""What does not go with a training that is its own proxy."""

OF_SHRINKING = (
    *(Rule("Config", "score.proxy", lambda it, *, breaks=breaks: it.score.proxy == "self" and breaks(it), says,
           f"score.proxy=self {bad}", f"score.proxy=self train.shrink={{}} {good}".strip())
      for breaks, says, bad, good in OF_ITSELF),
    Rule("Shrink", "steps", lambda it: bool(it.steps) and (it.at is not None or it.until_stable is not None),
         "say when by themselves. Set {place}.at=null and {place}.until_stable=null, or leave out steps",
         f"{_STEPS} train.shrink.at=0.3", _STEPS),
    Rule("Shrink", "steps", lambda it: any(one.at >= other.at for one, other in itertools.pairwise(it.steps)),
         "are cuts one after the other, so `at` rises from each to the next",
         "train.shrink.steps=[{at: 0.2, keep: {macs: 0.7}}, {at: 0.1}]", _STEPS),
    Rule("Shrink", "steps", lambda it: bool(it.steps) and (it.steps[-1].keep is not None
                                                           or any(one.keep is None for one in it.steps[:-1])),
         "the last goes to prune.keep, and each before it to a keep of its own: [{{at: 0.05, keep: {{macs: 0.6}}}}, {{at: 0.12}}]",
         "train.shrink.steps=[{at: 0.1}, {at: 0.2}]", _STEPS),
    Rule("Config", "train.shrink.steps", lambda it: _shrinks(it) and not _falling(it),
         "each cut keeps less than the one before, the last of them prune.keep, in the measures of prune.keep",
         "train.shrink.steps=[{at: 0.1, keep: {macs: 0.4}}, {at: 0.2}]", _STEPS),
    Rule("Config", "train.shrink",
         lambda it: _shrinks(it) and it.prune.keeps_all and it.budget is None,  # the planner's ways are not all a cut
         "cuts to prune.keep, which keeps everything. Say how much stays, e.g. prune.keep.macs=0.35",
         "train.shrink={} prune.keep.macs=1", "train.shrink={} prune.keep.macs=0.35"),
    Rule("Config", "train.shrink", lambda it: _shrinks(it) and it.prune.method.name != "structured",
         "cuts by scores, and {it.prune.method.name} is another way to prune. Set prune.method=structured, or train.shrink=null",
         f"train.shrink={{}} {ZEROS}", "train.shrink={} prune.keep.macs=0.35"),
    *(Rule("Config", name, lambda it, *, name=name: _shrinks(it) and bool(operator.attrgetter(name)(it)),
           "works on a model that is cut after its training. Leave it out, or set train.shrink=null",
           f"train.shrink={{}} {bad}", f"train.shrink=null {good}".strip())
      for name, bad, good in (
          ("train.sparsity.gates", "train.sparsity.gates=true", "train.sparsity.gates=true"),
          ("prune.search", "prune.search={kind: ratios}", "prune.search={kind: ratios}"),
          ("prune.sizes", "prune.sizes=[0.3]", "prune.sizes=[0.3]"),
      )),
    Rule("Config", "prune.embed_dim", lambda it: _shrinks(it) and it.prune.embed_dim == "search",
         "search would train on while it tries. Give embed_dim a number beside train.shrink, or null",
         "train.shrink={} prune.embed_dim=search", "train.shrink={} prune.embed_dim=0.75"),
    Rule("Config", "prune.sublayers",
         lambda it: _shrinks(it) and bool(it.prune.sublayers)
         and it.train.patches is not None and it.train.patches.mode in ("evit", "tome", "cumulative"),
         "takes sublayers out, between which {it.train.patches.mode} lets patches go. Leave one of the two out",
         of_patches("tome", "train.shrink={} prune.sublayers=true"), of_patches("dropout", "train.shrink={} prune.sublayers=true")),
    Rule("Config", "finetune.distill",
         lambda it: _shrinks(it) and it.finetune.epochs > 0 and it.finetune.taught_by is not None
         and it.finetune.taught_by.is_uncut,
         "the model before the cut was trained no further, and teaches nobody. Set finetune.distill=none, another "
         "finetune.teacher, or finetune.epochs=0",
         "train.shrink={} finetune.epochs=1 finetune.distill=soft", "train.shrink={} finetune.epochs=1"),
)  # fmt: skip
