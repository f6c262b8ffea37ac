"""The hardest of each batch: which images are shown on, what they cost, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CLASSES, ROWS, pictures, recipe, train, vit
from torch.nn import functional

from lotus.config import Method
from lotus.data.base import Batch
from lotus.training import named
from lotus.training.hardest import Hardest, proxy_of
from lotus.vit import cost
from selection.errors import Refused


def test_those_of_the_highest_loss_are_shown_in_their_order() -> None:
    proxy = proxy_of(vit(patch=4), CLASSES, 0.3, seed=1)
    images, labels = pictures()
    batch = Batch(images[:9], labels[:9], torch.arange(9))
    with torch.no_grad():
        losses = functional.cross_entropy(proxy(batch.images), batch.labels, reduction="none")
    guest: Any = Hardest(proxy, 0.5, 1e-3)
    shown = guest.show(batch, None)
    wanted = sorted(losses.argsort(descending=True)[:4].tolist())  # round(4.5) is 4
    assert shown.index.tolist() == wanted
    assert torch.equal(shown.images, batch.images[wanted])
    assert torch.equal(shown.labels, batch.labels[wanted])


def test_the_proxy_goes_through_all_and_is_billed_by_what_is_shown(tmp_path: Path) -> None:
    model = vit(patch=4)
    proxy = proxy_of(model, CLASSES, 0.3, seed=1)
    small = cost.count(proxy).macs
    assert small <= 0.3 * cost.count(model).macs
    before = {name: value.clone() for name, value in proxy.state_dict().items()}
    guest = Hardest(proxy, 0.5, 1e-2)
    done = train(tmp_path, recipe(epochs=1), model=model, guests=[guest])
    assert done.fitted.images_seen == ROWS // 2
    assert guest.own_macs() == pytest.approx(2 * small)
    assert any(not torch.equal(value, before[name]) for name, value in proxy.state_dict().items())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(Refused, match=r"hardest: keep 1\.5 is a fraction"):
        Hardest(proxy_of(vit(patch=4), CLASSES, 0.3, seed=1), 1.5, 1e-3)
    guest = Hardest(proxy_of(vit(patch=4), CLASSES, 0.3, seed=1), 0.5, 1e-3)
    two: Any = SimpleNamespace(world=SimpleNamespace(size=2), place="train")
    with pytest.raises(Refused, match=r"train\.guests: hardest: .*one process"):
        guest.attach(two)
    with pytest.raises(Refused, match=r"train\.guests\.hardest"):
        named.check([Method.model_validate({"name": "hardest", "kep": 0.5})], (), place="train.guests")
