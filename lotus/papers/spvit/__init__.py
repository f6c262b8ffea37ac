"""SPViT (He et al., 2111.11802): attention that may become convolution, chosen by gates that train: ``prune.method: convolve``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lotus.config import Rule
from lotus.stage import TRAIN_FORWARDS
from lotus.way import Options, Way

if TYPE_CHECKING:
    from lotus.stages.ahead import Ahead
    from lotus.stages.cut import Cutting, Uncut

Positive = Annotated[float, Field(gt=0)]


def _make(
    uncut: Uncut,
    *,
    epochs: Annotated[int, Field(ge=1)] = 10,
    lr: Positive = 5e-5,
    gate_lr: Positive = 1e-3,
    strength: Positive = 30.0,
) -> Cutting:
    """
    Args:
        epochs: of the search, from the trained model; its weights are thrown away afterwards
        lr: peak learning rate of the weights in the search
        gate_lr: learning rate of the gates (Adam, no weight decay)
        strength: lambda of lambda (prune.keep.macs - open MACs)^2, MACs as parts of the dense model's. The paper tunes it until
            this is a little above the cross-entropy at the start
    """
    from lotus.papers.spvit.convolve import Search, convolve

    return (yield from convolve(uncut, Search(epochs, lr, gate_lr, strength)))


def _check(ahead: Ahead, options: Options) -> None:
    from lotus.papers.spvit import project
    from lotus.vit.cost import outline

    request = ahead.config.prune
    multiple = 8 if request.round == "auto" else request.multiple
    project.refuse(ahead.shape)
    project.check_reach(outline(ahead.shape), request.keep.macs or 1, round=multiple)


WAY = Way(
    "convolve",
    "let attention become convolution, cut MLP units",
    _make,
    check=_check,
    forecast=lambda ahead, options: float(1.5 * TRAIN_FORWARDS * options["epochs"] * ahead.kept),
)


def _is(request: Any) -> bool:
    return bool(request.method.name == "convolve")


_BAD = "prune.method={name: convolve, epochs: 1}"

RULES = (
    Rule("Prune", "keep", lambda it: _is(it) and set(it.keep.asked) != {"macs"},
         "convolve aims at a budget in macs. Set {place}.keep.macs, and nothing else",
         f"{_BAD} prune.keep.params=0.5", _BAD),
    Rule("Prune", "embed_dim", lambda it: _is(it) and it.embed_dim not in (None, "auto"),
         "convolve keeps the embedding dimension. Leave one of the two out",
         f"{_BAD} prune.embed_dim=0.5", f"{_BAD} prune.embed_dim=null"),
    Rule("Prune", "scope", lambda it: _is(it) and it.scope != "global",
         "convolve scores nothing: its gates choose. Leave it out",
         f"{_BAD} prune.scope=per_type", _BAD),
    *(Rule("Prune", name, lambda it, *, name=name: _is(it) and bool(getattr(it, name)),
           "convolve cuts MLP units alone. Leave one of the two out",
           f"{_BAD} prune.{name}=true", f"prune.{name}=true") for name in ("in_channels", "sublayers", "decouple_qk")),
    Rule("Config", "prune.method", lambda it, ranks: ranks > 1 and _is(it.prune),
         "trains inside of the prune stage, which one process does. Run `lotus prune` as one process, then go on with all",
         _BAD, "", {"ranks": 2}),
    Rule("Config", "train.sparsity.gates", lambda it: _is(it.prune) and it.train.sparsity.gates,
         "are not read by convolve, which has gates of its own. Turn them off",
         f"{_BAD} train.sparsity.gates=true", _BAD),
    Rule("Config", "finetune.patches", lambda it: _is(it.prune) and it.finetune.patches is not None,
         "cannot be left out of convolutions. Turn them off",
         f"{_BAD} finetune.patches={{keep: 0.5}}",
         f"{_BAD} train.patches={{keep: 0.5}} finetune.patches=null"),
    Rule("Config", "train.patches.evaluate",
         lambda it: _is(it.prune) and it.train.patches is not None and it.train.patches.evaluate == "sparse",
         "sparse leaves patches out, and convolutions need all in their places. Evaluate dense",
         f"{_BAD} train.patches.evaluate=sparse finetune.patches=null",
         f"{_BAD} train.patches.evaluate=dense finetune.patches=null"),
)  # fmt: skip
