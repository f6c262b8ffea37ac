"""Settings that another one leaves without effect: told, not refused, since a config may say them for another choice of its own.

A row is as one of the table (lotus/config/rules.py): it is broken where a setting says something that nothing goes by.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from lotus.config.page import Config
from lotus.config.rule import Rule, changed, of_patches
from lotus.config.rules import broken, join, sections


def _idle(of: str, where: Callable[[Any], bool], says: str, beside: str, *examples: str) -> Iterator[Rule]:
    """A row a setting.

    Args:
        of: the section
        where: it does nothing
        says: why
        beside: what one sets so that it does something
        examples: the setting, last, behind what leaves it without effect
    """
    for example in examples:
        said = example.rpartition(" ")[2]
        name = said.partition("=")[0].rpartition(".")[2]
        yield Rule(
            of, name, lambda it, *, name=name: where(it) and changed(it, name), says, example, f"{said} {beside}"
        )


def _untuned(it: Any) -> bool:
    """Whether no training goes by the fine-tune's recipe: one within a search or another way to prune does."""
    return it.finetune.epochs == 0 and it.prune.search is None and it.prune.method.name == "structured"


IDLE = (
    *_idle("Data", lambda it: it.write == "raw", "raw stores no JPEG", "data.write=jpg", "data.write=raw data.jpeg_quality=80"),
    *_idle("Data", lambda it: it.write != "smart", "it is of {place}.write=smart", "data.write=smart",
           "data.write=raw data.smart_threshold=9999"),
    *_idle("Data", lambda it: it.write != "proportion", "it is of {place}.write=proportion", "data.write=proportion",
           "data.jpeg_share=0.3"),
    *_idle("Model", lambda it: bool(it.weights or it.pretrained), "it is how weights start that are not given, and these are",
           "model.weights=", "model.weights=mine.pth model.start=mimetic", "model.weights=mine.pth model.pos_embed_std=0.2",
           "model.weights=mine.pth model.patch_embed_init=xavier"),
    *_idle("Augment", lambda it: it.crop != "pad", "it is of crop=pad, and crop is {it.crop}", "train.augment.crop=pad",
           "train.augment.pad=2"),
    *_idle("Augment", lambda it: it.crop != "resized", "it is of crop=resized, and crop is {it.crop}",
           "train.augment.crop=resized", "train.augment.scale=[0.5,1]", "train.augment.ratio=[1,2]"),
    *_idle("Augment", lambda it: not it.erase, "erase is 0", "train.augment.erase=0.2", "train.augment.erase_mode=rand",
           "train.augment.erase_count=2"),
    *_idle("Patches", lambda it: it.mode != "input", "{it.mode} asks no score", of_patches("input", ""),
           "train.patches.score=edges"),
    *_idle("Recipe", lambda it: it.optimizer.lower() != "muon", "only muon leaves something to AdamW, and the optimizer is "
           "{it.optimizer}: {place}.lr is its rate", "train.optimizer=muon", "train.adamw_lr=0.001"),
    *_idle("Recipe", lambda it: it.schedule.name in ("linear", "onecycle"), "{it.schedule.name} has an end of its own",
           "train.schedule=wsd", "train.schedule=linear train.min_lr=0.0001"),
    *_idle("Train", lambda it: it.teacher is None and it.distill != "none", "nobody teaches this training", "train.teacher=resnet18",
           "train.distill=hard", "train.temperature=4", "train.teacher_weight=0.5"),
    *_idle("Train", lambda it: it.distill == "none", "distill=none lets nobody teach", "train.distill=soft",
           "train.distill=none train.teacher=resnet18"),
    *_idle("Train", lambda it: it.distill == "none", "distill=none lets nobody teach", "train.teacher=resnet18",
           "train.distill=none train.temperature=4", "train.distill=none train.teacher_weight=0.9"),
    *_idle("Taught", lambda it: it.distill == "hard", "a teacher who decides (distill=hard) is not softened",
           "train.distill=soft train.teacher=resnet18", "train.distill=hard train.teacher=resnet18 train.temperature=4"),
    *_idle("Score", lambda it: it.proxy != "linear_probe", "proxy={it.proxy} has no heads beside the model's own",
           "score.proxy=linear_probe", "score.heads=8"),
    *_idle("Score", lambda it: it.proxy == "linear_probe", "a linear probe has {place}.heads", "score.proxy=training",
           "score.proxy=linear_probe score.seeds=3"),
    *_idle("Score", lambda it: it.proxy == "self", "the training is its own proxy", "score.proxy=training",
           "score.proxy=self train.shrink={} score.epochs=3", "score.proxy=self train.shrink={} score.seeds=3",
           "score.proxy=self train.shrink={} score.side=32", "score.proxy=self train.shrink={} score.lr=0.02",
           "score.proxy=self train.shrink={} score.batch_size=16", "score.proxy=self train.shrink={} score.optimizer=lamb"),
    *_idle("Search", lambda it: it.kind != "ratios", "it is of kind=ratios", "prune.search.kind=ratios",
           "prune.search.kind=blocks prune.search.grid=5"),
    *_idle("Search", lambda it: it.kind != "blocks", "it is of kind=blocks", "prune.search.kind=blocks",
           "prune.search.levels=5"),
    *_idle("Search", lambda it: it.rounds == 1, "it is between rounds, and there is one", "prune.search.rounds=2",
           "prune.search.recovery=100"),
    *_idle("Prune", lambda it: it.keep.latency is None and it.round != "auto", "nothing is timed", "prune.round=auto",
           "prune.latency_batch=8"),
    *(Rule("Config", f"finetune.{name}", lambda it, *, differs=differs: _untuned(it) and differs(it), "finetune.epochs is 0",
           f"finetune.epochs=0 finetune.{said}", f"finetune.epochs=3 finetune.{said}")
      for name, said, differs in (
          ("teacher", "teacher=resnet18", lambda it: changed(it.finetune, "teacher")),
          ("guests", "guests=[late_average]", lambda it: changed(it.finetune, "guests")),
          ("lr", "lr=0.01", lambda it: it.finetune.lr != it.train.lr / 3),
      )),
    *_idle("Export", lambda it: not it.onnx, "no model.onnx is written", "export.onnx=true",
           "export.onnx=false export.onnx_input=uint8"),
)  # fmt: skip

_FROM = {"score.model.": "model.", "score.": "train.", "finetune.": "train."}
"""What a part of the page takes from another where it does not say it."""


def idle(page: Config) -> list[str]:
    """A sentence for each setting that changes nothing beside the others; what was said for another part alone is told there."""
    found = []
    for place, section in sections(page):
        for row in broken(section, IDLE):
            where = join(place, row.place)
            if not _taken(page, where):
                found.append(f"{where} changes nothing: {row.sentence(section, place)}.")
    return found


def _taken(page: Config, where: str) -> bool:
    """Whether a setting is as it is because another part of the page has it so."""
    start = next((start for start in _FROM if where.startswith(start)), "")
    try:
        return bool(start) and _at(page, where) == _at(page, _FROM[start] + where.removeprefix(start))
    except AttributeError:  # a setting of this part alone
        return False


def _at(page: Config, where: str) -> Any:
    return operator.attrgetter(where)(page)
