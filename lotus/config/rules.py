"""What goes with what, in one table: a row is a place, a condition under which it is refused, and one sentence with the cure.

The reader, :func:`lotus.prune` and the command line ask it; docs/settings.md is printed from it, and one test walks it. A row
reads one section of the page, and may read what the page cannot know, by the names of its condition's further parameters:

    ranks     processes that work at this run
    recorded  names of what the score and the picker would read of the proxy; empty where no proxy is asked
    reads     names of what ``prune.criterion`` reads
    asks      whether the score of patches asks a model

Rows that read these are asked once they are known. A file of one's own (``--with``) joins rows as a list ``RULES``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lotus.config.marks import Mark, marked
from lotus.config.rule import ZEROS, changed, of_patches
from lotus.config.rule import Rule as Rule
from lotus.config.rules_shrinking import OF_SHRINKING as OF_SHRINKING
from selection.errors import Refused

LINEAR_OPTIMIZERS = ("adamw", "sgd")
"""Those that move each number by itself, so that heads that are trained at once do not meet."""

_GIVEN = "model.weights=mine.pth"


def _rise(sides: Any) -> bool:
    """Whether the steps of growing pictures are steps, in order."""
    parts = [step[0] for step in sides]
    sane = all(step[1] > 0 and all(0 <= strength <= 1 for strength in step[2:]) for step in sides)
    return sane and parts == sorted(set(parts)) and parts[0] >= 0 and parts[-1] < 1


OF_TRAINING = (
    Rule("Budget", "", lambda it: (it.train is None) == (it.minutes is None),
         "say {place}.train or {place}.minutes, one of the two",
         "budget.train=0.3 budget.minutes=5", "budget.train=0.3"),
    Rule("Budget", "ways", lambda it: not it.ways,
         "say at least one of shrink, small and dense",
         "budget={train: 0.3, ways: []}", "budget={train: 0.3, ways: [shrink]}"),
    Rule("Config", "budget.ways",
         lambda it: it.budget is not None and set(it.budget.ways) == {"small"} and bool(it.model.weights or it.model.pretrained),
         "weights are given, which no smaller model can start from. Allow shrink, or leave the weights out",
         f"budget={{train: 0.3, ways: [small]}} {_GIVEN}", "budget={train: 0.3, ways: [small]}"),
    Rule("Augment", "scale", lambda it: not 0 < it.scale[0] <= it.scale[1] <= 1,
         "two numbers with 0 < low <= high <= 1",
         "train.augment.scale=[0.5,0.4]", "train.augment.scale=[0.4,0.5]"),
    Rule("Augment", "ratio", lambda it: not 0 < it.ratio[0] <= it.ratio[1],
         "two numbers with 0 < low <= high",
         "train.augment.ratio=[2,1]", "train.augment.ratio=[1,2]"),
    Rule("Augment", "color_jitter", lambda it: len(it.color_jitter) not in (3, 4) or it.jitter[3] > 0.5,
         "a number, or three, or four of which the last is at most 0.5",
         "train.augment.color_jitter=[0.1,0.2]", "train.augment.color_jitter=[0.1,0.2,0.3]"),
    Rule("Auto", "", lambda it: bool(it.alien),
         "{it.alien} is a setting of rand, not of {it.name}. Leave it out",
         "train.augment.auto={name: trivial, m: 5}", "train.augment.auto={name: rand, m: 5}"),
    Rule("Auto", "n", lambda it: it.t in ("3aw", "weights") and it.n > 14,
         "a weighted set has no 15 operations, and takes none twice. Take 14 or fewer",
         "train.augment.auto={name: rand, t: weights, n: 15}", "train.augment.auto={name: rand, t: weights, n: 14}"),
    Rule("Recipe", "patches",
         lambda it: it.patches is not None and bool(it.patches.model or it.patches.cached)
         and it.augment.auto is not None and it.augment.auto.moves,
         "scores of stored images (model, cached) follow crops and mirroring, not augment.auto's rotations. Remove it, or take "
         "augment.auto=3a",
         of_patches("input", "train.patches.cached=true train.augment.auto=trivial"),
         of_patches("input", "train.patches.cached=true train.augment.auto=3a")),
    Rule("Recipe", "warmup_ratio", lambda it: (it.warmup_epochs is None) == (it.warmup_ratio is None),
         "is said by it or by warmup_epochs, one of the two. Set the other to null",
         "train.warmup_ratio=0.1 train.warmup_epochs=1", "train.warmup_ratio=0.1"),
    Rule("Train", "sparsity.gates",
         lambda it: not it.sparsity.gates
         and any(changed(it.sparsity, name) for name in marked(type(it.sparsity), Mark.OF_GATES)),
         "are off, and nothing else there does anything. Set {place}.sparsity.gates=true, or {place}.sparsity={{}}",
         "train.sparsity.in_channels=true", "train.sparsity.in_channels=true train.sparsity.gates=true"),
    Rule("Train", "sides", lambda it: bool(it.sides) and not _rise(it.sides),
         "[fraction of the training, side in pixels, and if wanted a strength from 0 to 1], the parts rising from 0 to below 1",
         "train.sides=[[0.5,16],[0.2,32]]", "train.sides=[[0,16],[0.5,32,0.7]]"),
    Rule("Train", "sides", lambda it: bool(it.sides) and it.patches is not None,
         "how many patches stay is counted at one side. Leave out {place}.sides or {place}.patches",
         "train.sides=[[0,16]] train.patches={keep: 0.5}", "train.sides=[[0,16]]"),
    Rule("Taught", "teacher", lambda it: it.teacher is not None and not (it.teacher.name or it.teacher.weights),
         "nobody is named. Say {place}.teacher=NAME, a timm model, or FOLDER, or none",
         "train.teacher={args: {depth: 2}}", "train.teacher=resnet18"),
    Rule("Taught", "teacher", lambda it: it.teacher is not None and it.teacher.is_uncut and it.teacher.says_more,
         "uncut is the run's own model, which has weights and arguments already. Leave them out, or name a timm model",
         "train.teacher={name: uncut, weights: mine.pth}", "train.teacher={name: resnet18, weights: mine.pth}"),
    Rule("Train", "teacher", lambda it: it.teacher is not None and it.teacher.is_uncut and it.shrink is None,
         "uncut is the model before the cut, and this training has none. Set {place}.shrink, or name another teacher",
         "train.teacher=uncut", "train.teacher=uncut train.shrink={} prune.keep.macs=0.35"),
    Rule("Train", "probe_epochs", lambda it: it.probe_epochs >= it.epochs,
         "the head would learn alone to the end. Lower it, or set {place}.freeze=[patch_embed, 'blocks.*', norm]",
         f"train.probe_epochs=9 train.epochs=9 {_GIVEN}", f"train.probe_epochs=2 train.epochs=9 {_GIVEN}"),
    Rule("Train", "probe_epochs", lambda it: bool(it.probe_epochs) and it.optimizer.lower() == "muon",
         "muon moves matrices and leaves the head to AdamW, and the head would learn alone. Set {place}.optimizer=adamw",
         f"train.probe_epochs=2 train.optimizer=muon {_GIVEN}", f"train.freeze=[blocks.0] train.optimizer=muon {_GIVEN}"),
    Rule("Train", "sparsity.gates", lambda it: it.holds_still and it.sparsity.gates,
         "gates learn in every block, in frozen ones too. Set {place}.sparsity.gates=false, or leave out freeze and probe_epochs",
         "train.freeze=[blocks.0] model.weights=mine.pth train.sparsity.gates=true", f"train.freeze=[blocks.0] {_GIVEN}"),
    Rule("Config", "train", lambda it: it.train.holds_still and not (it.model.weights or it.model.pretrained),
         "freeze and probe_epochs keep weights that are given. Set model.pretrained=true or model.weights=FILE, or leave them out",
         "train.probe_epochs=1", f"train.probe_epochs=1 {_GIVEN}"),
    Rule("Recipe", "ema", lambda it: bool(it.ema) and any(guest.name == "late_average" for guest in getattr(it, "guests", ())),
         "and late_average are two averages, of which one would be measured and the other kept. Leave one out",
         "train.ema=0.9 train.guests=[late_average]", "train.ema=0.9"),
    Rule("Recipe", "guests", lambda it, ranks: ranks > 1 and any(guest.name == "hardest" for guest in getattr(it, "guests", ())),
         "hardest: its proxy is one process's. Train with one, or leave it out",
         "train.guests=[hardest]", "train.guests=[late_average]", {"ranks": 2}),
    Rule("Patches", "evaluate", lambda it: it.mode == "dropout" and it.evaluate == "sparse",
         "dropout drops patches in training alone. Set evaluate: dense",
         of_patches("dropout", "train.patches.evaluate=sparse"), of_patches("evit", "train.patches.evaluate=sparse")),
    Rule("Patches", "ramp", lambda it: it.warmup + it.ramp > 1,
         "warmup and ramp are fractions of the training, together at most 1",
         "train.patches.warmup=0.5 train.patches.ramp=0.6", "train.patches.warmup=0.5 train.patches.ramp=0.5"),
    Rule("Patches", "until", lambda it: it.until < 1 and (it.warmup + it.ramp > it.until + 1e-9 or it.warmup >= it.until),
         "all patches are back before warmup and ramp are over. Set it later than both together",
         "train.patches.warmup=0.5 train.patches.until=0.5", "train.patches.warmup=0.3 train.patches.ramp=0.2 train.patches.until=0.5"),
    Rule("Patches", "until", lambda it: it.until < 1 and (it.evaluate == "sparse" or it.joint is not None),
         "ends on all patches, which sparse evaluation and a joint budget do without. Evaluate dense and leave joint out, or set it to 1",
         "train.patches.evaluate=sparse train.patches.until=0.7", of_patches("dropout", "train.patches.until=0.7")),
    Rule("Patches", "mode", lambda it: it.mode != "evit" and bool(it.at or not it.fuse),
         "at and fuse are settings of evit, not of {it.mode}. Leave them out",
         of_patches("tome", "train.patches.at=[1]"), of_patches("evit", "train.patches.at=[1]")),
    Rule("Patches", "mode", lambda it: it.mode != "input" and bool(it.model or it.cached),
         "model and cached are settings of input, not of {it.mode}. Leave them out",
         of_patches("evit", "train.patches.cached=true"), of_patches("input", "train.patches.cached=true")),
    Rule("Patches", "joint", lambda it: it.joint is not None and it.keep == 1,
         "shares out what is left at a keep below 1. Set {place}.keep, or leave it out",
         "train.patches.joint={} train.patches.keep=1", "train.patches.joint={} train.patches.keep=0.5"),
    Rule("Patches", "joint.least", lambda it: it.joint is not None and (it.joint.least or 0) >= it.keep,
         "lies below {place}.keep, the mean, which is {it.keep:g}",
         "train.patches.joint.least=0.7 train.patches.keep=0.5", "train.patches.joint.least=0.3 train.patches.keep=0.5"),
    Rule("Patches", "score", lambda it, asks: it.mode == "input" and asks and not it.model,
         "{it.score.name!r} reads a model. Give {place}.model, a folder written by LOTUS, or take contrast",
         of_patches("input", "train.patches.score=gradient"), of_patches("input", "train.patches.score=gradient train.patches.model=there"),
         {"asks": True}),
    Rule("Patches", "model", lambda it, asks: it.mode == "input" and not asks and bool(it.model),
         "{it.score.name!r} reads the image alone and asks no model. Remove one of the two",
         of_patches("input", "train.patches.model=there"), of_patches("input", ""), {"asks": False}),
    Rule("Patches", "evaluate",
         lambda it, asks: it.mode == "input" and (asks or it.cached) and it.evaluate == "sparse",
         "sparse: {it.score.name!r} is known of the training images alone. Evaluate dense, or take contrast",
         of_patches("input", "train.patches.cached=true train.patches.evaluate=sparse"),
         of_patches("input", "train.patches.evaluate=sparse"), {"asks": False}),
    Rule("Subsets", "runs", lambda it: it.runs < it.least,
         "{it.runs} runs on {it.fraction:g} leave images that are in all or in none; {it.least} do not",
         "score.subsets.runs=3", "score.subsets.runs=4"),
    Rule("Score", "{name}", lambda it, *, name: it.proxy != "linear_probe" and bool(getattr(it, name)),
         "an image is scored by what is said of it as it is. Remove it",
         "score.{name}={value}", "train.{name}={value}", each=Mark.BLURS),
    Rule("Score", "optimizer", lambda it: it.proxy == "linear_probe" and it.optimizer not in LINEAR_OPTIMIZERS,
         f"the heads of a linear probe take optimizer {' or '.join(LINEAR_OPTIMIZERS)}",
         "score.proxy=linear_probe score.optimizer=lamb", "score.proxy=linear_probe score.optimizer=sgd"),
    Rule("Score", "{name}", lambda it, *, name: it.proxy == "linear_probe" and changed(it, name),
         "a setting of a training; a linear probe sees each image once. Remove it",
         "score.proxy=linear_probe score.{name}={value}", "score.proxy=linear_probe train.{name}={value}",
         each=Mark.OF_TRAINING),
    Rule("Select", "floor", lambda it: it.floor is not None and it.balance,
         "floor is for classes that are not balanced: set {place}.balance=false, or leave floor out",
         "select.floor=0.5", "select.floor=0.5 select.balance=false"),
    Rule("Train", "balance", lambda it: it.balance != "none" and it.dynamic is not None,
         "train.dynamic draws each epoch's images already. Leave one of them out",
         "train.balance=equal train.dynamic=rs2", "train.balance=equal"),
    Rule("Config", "score.patches.joint", lambda it: it.score.patches is not None and it.score.patches.joint is not None,
         "what the images score is known only after this training. Set it in train.patches alone",
         "score.patches.joint={}", "train.patches.joint={}"),
    Rule("Config", "score.patches.model",
         lambda it: it.score.patches is not None and it.score.patches.asks_baseline,
         "the proxy comes before the baseline. Give a folder written by LOTUS, or take contrast",
         "score.patches.mode=input score.patches.model=baseline", of_patches("input", "train.patches.model=baseline")),
    Rule("Config", "baseline.name",
         lambda it: it.baseline is not None and it.baseline.name == "small" and it.prune.keep.macs is None,
         "small is a model of prune.keep.macs, which is not set. Set it, or take best",
         "baseline=small prune.keep={params: 0.5}", "baseline=small prune.keep={macs: 0.5}"),
    Rule("Config", "baseline.name",
         lambda it: it.baseline is not None and it.baseline.name == "small" and any(
             one.patches is not None and one.patches.asks_baseline for one in (it.train, it.finetune)),
         "a small model comes after the training, which asks the baseline which patches matter. Take best",
         "baseline=small train.patches={mode: input, score: attention, model: baseline}",
         "baseline=best train.patches={mode: input, score: attention, model: baseline}"),
    Rule("Config", "score.subsets",
         lambda it, recorded: it.score.subsets is None and bool(recorded & {"run_in", "run_p_label"}),
         "what runs on random parts of the images said would be read (run_in, run_p_label). Set score.subsets.runs=10 (nearly "
         "free with score.proxy=linear_probe), or take another score",
         "select.score=memorization", "select.score=memorization score.subsets.runs=10", {"recorded": {"run_in", "labels"}}),
    Rule("Config", "select", lambda it, recorded: not it.select.ticket and "given" in recorded,
         "given would be read, and no proxy records it: it comes from elsewhere. Take another score, or draw the ticket from "
         "signals of your own: lotus select",
         "select.score=given", "select.score=given select.ticket=mine.npz", {"recorded": {"given"}}),
    Rule("Config", "score.gradients",
         lambda it, recorded: not it.score.gradients and bool(recorded & {"errors", "kl_step"}),
         "errors or kl_step would be read, which are recorded with them. Turn it on, or take another method",
         "score.gradients=false", "score.gradients=true", {"recorded": {"kl_step"}}),
    Rule("Config", "train.sparsity.early_bird",
         lambda it: it.train.sparsity.early_bird is not None
         and not (it.train.sparsity.gates and (it.prune.keep.macs or it.prune.keep.gates)),
         "draws masks of gates at a budget of MACs or gates. Turn gates on and set prune.keep.macs, or leave it out",
         "train.sparsity.early_bird={}", "train.sparsity.early_bird={} train.sparsity.gates=true"),
)  # fmt: skip

LATENCY = lambda it: (  # noqa: E731 - a condition like the others, too long for its row
    it.keep.latency is not None
    and (
        it.in_channels
        or it.decouple_qk
        or bool(it.sublayers)
        or it.scope != "global"
        or it.embed_dim not in (None, "auto", 1)
    )
)


def _ways(it: Any) -> list[str]:
    """The settings of a way to choose what stays that are set."""
    return [name for name in ("search", "sizes") if getattr(it, name)]


def _elsewise(it: Any) -> bool:
    """Whether another way than by scores is named: what is unknown of it is its own to refuse."""
    return bool(it.method.name != "structured")


def _fixed(it: Any) -> bool:
    """Whether an embedding dimension is asked for: a fraction, or to be searched for."""
    return it.embed_dim not in (None, "auto")


_GATE = "prune.criterion=gate train.sparsity.gates=true"
_IN_CHANNELS = f"{_GATE} prune.in_channels=true train.sparsity.in_channels=true"

OF_PRUNING = (
    Rule("Keep", "", lambda it: not it.asked,
         "say macs, params or latency, or several, e.g. {place}.macs=0.5",
         "prune.keep={}", "prune.keep.params=0.5"),
    Rule("Prune", "method", lambda it: not _elsewise(it) and bool(it.method.options),
         "structured has no settings of its own: they stand in {place}. Leave them out",
         "prune.method={name: structured, strength: 1}", "prune.method=structured"),
    Rule("Prune", "keep.weights", lambda it: not _elsewise(it) and it.keep.weights is not None,
         "is the budget of ways that cut no dimension. Set {place}.method, or another budget, e.g. {place}.keep.macs=0.5",
         "prune.keep.weights=0.7", ZEROS),
    Rule("Prune", "keep.gates", lambda it: it.keep.gates is not None and it.scope != "threshold",
         "a fraction of all units is what one threshold leaves. Set {place}.scope=threshold, or keep macs or params",
         "prune.keep.gates=0.6", "prune.keep.gates=0.6 prune.scope=threshold"),
    Rule("Prune", "keep.latency", LATENCY,
         "is predicted for heads, their dimensions and MLP units alone: it goes with {place}.scope=global, and without "
         "{place}.decouple_qk, in_channels, sublayers and embed_dim. Leave those out, or keep macs or params",
         "prune.keep.latency=0.5 prune.decouple_qk=true", "prune.keep.latency=0.5"),
    Rule("Prune", "sizes", lambda it: len(_ways(it)) > 1,
         "are drawn by scores alone. Leave out search, or the sizes",
         "prune.sizes=[0.3] prune.search={kind: ratios}", "prune.sizes=[0.3]"),
    Rule("Prune", "method", lambda it: bool(it.by_scores) and _elsewise(it),
         "{it.method.name} is another way than by scores, which {it.by_scores} asks for. Set {place}.method=structured, or leave "
         "it out",
         f"{ZEROS} prune.sizes=[0.3]", ZEROS),
    Rule("Prune", "scope", lambda it: bool(_ways(it)) and it.scope != "global",
         "search and sizes go with scope=global. Leave scope out, or those",
         "prune.sizes=[0.3] prune.scope=per_type", "prune.sizes=[0.3]"),
    Rule("Prune", "search.drop",
         lambda it: it.search is not None and it.search.drop is not None and set(it.keep.asked.values()) != {1},
         "is a target of its own beside {place}.keep. Set {place}.keep.macs=1 (or leave keep out), or {place}.search.drop=null",
         "prune.search.drop=0.1 prune.keep.macs=0.5", "prune.search.drop=0.1"),
    Rule("Prune", "embed_dim",
         lambda it: bool(_ways(it)) and it.embed_dim == "search",
         "search is a search of its own, beside search and sizes. Give embed_dim a number, or leave those out "
         "(null; sizes: [])",
         "prune.sizes=[0.3] prune.embed_dim=search", "prune.sizes=[0.3] prune.embed_dim=0.75"),
    *(Rule("Prune", name, lambda it, *, name=name: it.search is not None and bool(getattr(it, name)),
           "search chooses among heads, their dimensions and MLP units. Leave it out, or search",
           f"prune.{name}=true prune.search={{kind: ratios}}", f"prune.{name}=true") for name in ("in_channels", "sublayers")),
    Rule("Prune", "embed_dim", lambda it, reads: _fixed(it) and it.embed_dim != 1 and it.in_channels and "gates" in reads,
         "turns the residual stream, and learned gates of in_channels belong to its channels. Leave one out",
         f"prune.embed_dim=0.5 {_IN_CHANNELS}",
         f"prune.embed_dim=1.0 {_IN_CHANNELS}", {"reads": {"gates"}}),
    Rule("Prune", "search.rounds",
         lambda it, reads: it.search is not None and it.search.rounds > 1 and "gates" in reads,
         "{it.criterion.name!r} reads learned gates, which know the first round alone. Take one round, or fisher",
         f"prune.search.rounds=2 {_GATE}", f"prune.search.rounds=1 {_GATE}",
         {"reads": {"gates"}}),
    Rule("Config", "prune.criterion", lambda it, reads: "gates" in reads and not it.train.sparsity.gates,
         "{it.prune.criterion.name!r} reads gates, and train.sparsity.gates is off. Turn it on, or use fisher",
         "prune.criterion=gate", _GATE, {"reads": {"gates"}}),
    Rule("Config", "prune.in_channels",
         lambda it, reads: "gates" in reads and it.prune.in_channels and not it.train.sparsity.in_channels,
         "{it.prune.criterion.name!r} would read gates of in_channels, and train.sparsity.in_channels is off. Turn it on, or use fisher",
         f"{_GATE} prune.in_channels=true", _IN_CHANNELS,
         {"reads": {"gates"}}),
    Rule("Config", "prune.search.recovery",
         lambda it, ranks: ranks > 1 and it.prune.search is not None
         and bool(it.prune.search.recovery) and it.prune.search.rounds > 1,
         "trains inside of the prune stage, which one process does. Run `lotus prune` as one process, then go on with all",
         "prune.search.recovery=9 prune.search.rounds=2", "prune.search.rounds=2", {"ranks": 2}),
)  # fmt: skip


ROWS = (*OF_TRAINING, *OF_PRUNING, *OF_SHRINKING)
"""What the page is asked."""

_OF_A_RUN = "is done by a run. Leave it out, or say it in a config: lotus prune CONFIG"

WITHOUT_A_RUN = (
    Rule("Prune", "method", _elsewise, "{it.method.name} " + _OF_A_RUN, ZEROS, ""),
    *(Rule("Prune", name, lambda it, *, name=name: bool(getattr(it, name)), _OF_A_RUN, bad, "")
      for name, bad in (
          ("search", "prune.search={kind: ratios}"),
          ("sizes", "prune.sizes=[0.3]"),
      )),
    *(Rule("Model", name, lambda it, *, name=name: getattr(it, name) != type(it).model_fields[name].default,
           "is how a model starts that is trained here. Leave it out", bad, "")
      for name, bad in (("pos_embed_std", "model.pos_embed_std=0.2"), ("patch_embed_init", "model.patch_embed_init=xavier"))),
)  # fmt: skip
"""What is asked beside that of a model that LOTUS never trained: at ``lotus prune --model`` and :func:`lotus.prune`."""

CALLED = (
    Rule("Prune", "calibration", lambda it: it.calibration is not None,
         "the images are those of the batches that are given. Give fewer, or more", "prune.calibration=9", ""),
)  # fmt: skip
"""What is asked beside both where batches are given."""


UNASKED = {"rules": "not asked"}
"""Pydantic's context of a page that may break rows, so that it can be looked at."""


def broken(section: Any, rows: Iterable[Rule] = ROWS, **facts: Any) -> Iterator[Rule]:
    """The rows that ``section`` breaks, in order; those that read more than ``facts`` are passed over."""
    kinds = {kind.__name__ for kind in type(section).__mro__}
    mine = (row for many in rows if many.of in kinds for row in many.rows(type(section)))
    for row in mine:
        needs = row.needs
        if set(needs) <= set(facts) and row.broken(section, *(facts[name] for name in needs)):
            yield row


def refuse(section: Any, rows: Iterable[Rule] = ROWS, *, place: str, **facts: Any) -> None:
    """Refuse what a row refuses.

    Args:
        section: A part of the page, or the page.
        rows: What is asked of it.
        place: Where it stands, e.g. ``train.patches``; empty: the page.
        facts: What the page cannot know, by the names that rows read.

    Raises:
        Refused: by the first row that it breaks.
    """
    for row in broken(section, rows, **facts):
        raise Refused(f"{join(place, row.place)}: {row.sentence(section, place)}.")


def of(shelves: Iterable[Any]) -> tuple[Rule, ...]:
    """The table with the rows that the user's own modules add."""
    return (*ROWS, *(row for shelf in shelves for row in getattr(shelf, "RULES", ())))


def sections(section: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """``section`` and all that are inside of it, each with its place."""
    yield place, section
    for name in type(section).model_fields:
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from sections(value, join(place, name))


def join(place: str, name: str) -> str:
    return ".".join(part for part in (place, name) if part)
