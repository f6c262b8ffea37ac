"""A setting that is known elsewhere by a name of another spelling is suggested, with its place."""

from __future__ import annotations

import pytest

from lotus.cli.config import settings
from lotus.config import read
from lotus.config.usual import MEANT
from selection.errors import Refused

PLACES = {one.place for one in settings()}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("train.checkpoint_minutes", "train.save_minutes"), ("train.num_epochs", "train.epochs"), ("learning_rate", "train.lr"),
        ("finetune.wd", "finetune.weight_decay"), ("train.batch", "train.batch_size"), ("train.warmup", "train.warmup_epochs"),
        ("epochs", "train.epochs"), ("prune.ratio", "prune.keep"), ("select.ratio", "select.keep"), ("data_dir", "data.path"),
        ("model.img_size", "model.args.img_size"), ("train.callbacks", "train.guests"), ("output_dir", "folder"),
        ("model.normalize", "data.normalize"), ("select.epochs", "train.epochs"),
    ],
)  # fmt: skip
def test_what_is_meant_is_suggested(said: str, meant: str) -> None:
    with pytest.raises(Refused, match=rf"^{said}: no such setting\. Did you mean '{meant}'\?$"):
        read(None, [f"{said}=3"])


def test_every_suggestion_is_a_setting() -> None:
    names = {place.rpartition(".")[2] for place in PLACES}
    for theirs, ours in MEANT.items():
        inside = ours.startswith(("model.args.", "data.options."))
        assert inside or (ours in PLACES if "." in ours else ours in names), f"{theirs}: {ours}"
