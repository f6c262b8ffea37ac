"""The shelf of metrics that a search goes by, and one of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lotus.cli.shared import load_shelves
from lotus.config import read
from lotus.pruning import metrics
from lotus.pruning.judge import measuring
from lotus.stages import check
from selection import methods
from selection.errors import Refused

OWN = """
def margin_lost(logits, labels):
    return (logits.max(1).values - logits[range(len(labels)), labels]).detach()
"""


@pytest.mark.parametrize("name", methods.names(metrics))
def test_each_of_the_shelf_is_of_an_image_and_nothing_for_the_dense_model(name: str) -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    measure = measuring(name)
    assert measure(logits, logits, labels).tolist() == pytest.approx([0] * 6, abs=1e-6)
    worse, alone = measure(-logits, logits, labels), measure(-logits[2:3], logits[2:3], labels[2:3])
    assert worse.shape == (6,)
    torch.testing.assert_close(worse[2:3], alone)  # each image's by itself


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., None]:
    def checked(code: str, name: str) -> None:
        (tmp_path / "mine.py").write_text(code)
        words = ["data.name=digits", f"prune.search={{metric: {name}}}", "train.shrink=null", "prune.keep.macs=0.5"]
        check(read(None, words), load_shelves([str(tmp_path / "mine.py")]))

    return checked


def test_one_of_your_own_is_found_and_a_wrong_one_refused_before_anything_is_done(own: Callable[..., None]) -> None:
    own(OWN, "margin_lost")
    with pytest.raises(Refused, match=r"prune\.search\.metric: .*'margin_lost'"):
        own(OWN, "margin_lst")
    with pytest.raises(Refused, match=r"prune\.search\.metric: 'all' .*Return"):
        own("def all(logits):\n    return logits.mean()\n", "all")
