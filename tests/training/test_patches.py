"""Token pruning in training: shared out among the images by score, compiled, under every ZeRO stage, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import two_ranks
from safetensors.torch import load_file
from tiny import (
    PARTED,
    PATCHED,
    ROWS,
    Killed,
    Memory,
    Outcome,
    ThatPrunes,
    contrast,
    kill,
    minutes,
    parted,
    patched,
    recipe,
    same,
    vit,
)  # fmt: skip
from torch import Tensor

from lotus.config import Patches
from lotus.data.sample_plan import SamplePlan
from lotus.training.compiled import beyond
from lotus.training.patch_buckets import Joint
from lotus.vit.token_plan import kept
from lotus.vit.tokens import Tokens
from selection.errors import Refused

pytestmark = pytest.mark.slow

FULL = {"ema": 0.9, "accumulate": 2, "mixup": 0.4, "cutmix": 1.0}


class Watching(Memory):
    """Writes down what each batch of an epoch held."""

    def __init__(self, plan: SamplePlan) -> None:
        super().__init__(plan)
        self.seen: list[tuple[int, list[int]]] = []

    def epoch(self, epoch: int, skip: int = 0):
        for batch in super().epoch(epoch, skip):
            self.seen.append((epoch, batch.index.tolist()))
            yield batch


@pytest.mark.parametrize("mode", ["dropout", "input", "evit", "tome"])
@pytest.mark.parametrize("pick", [None, {"name": "rs2", "keep": 0.5}], ids=["ticket", "dynamic"])
def test_a_joint_budget_is_kept_to_the_patch(tmp_path: Path, mode: str, pick: Any) -> None:
    asked = recipe(epochs=4)
    plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=8)
    loader, entered = Watching(plan), list[Any]()
    dynamic = ThatPrunes(pick, 4) if pick else None
    done, tokens, joint = patched(tmp_path, asked, mode, plan=plan, loader=loader, dynamic=dynamic, entered=entered)
    rows = ROWS // 2 if pick else ROWS
    assert len({row for epoch, batch in loader.seen if epoch < 2 for row in batch}) == ROWS
    spent = 0
    for epoch in range(4):
        batches = [batch for at, batch in loader.seen if at == epoch]
        epochs_rows = np.array(sorted(row for batch in batches for row in batch))
        assert len(epochs_rows) == len(set(epochs_rows.tolist())) == rows, "each image once an epoch"
        bucket = dict(zip(epochs_rows.tolist(), joint.groups(epochs_rows).tolist(), strict=True))
        for batch in batches:
            (mine,) = {bucket[row] for row in batch}
            tokens.schedule(1.0, tokens.shares[mine])
            spent += len(batch) * tokens.macs()
        total = sum(round(16 * tokens.shares[one]) for one in bucket.values())
        assert total <= round(0.61 * rows * 16) < total + 5, "the next step up would be above the budget"
        order = np.argsort([SCORES[row] for row in epochs_rows])
        assert (np.diff([bucket[row] for row in epochs_rows[order].tolist()]) >= 0).all(), "easy images get few"
    assert done.fitted.images_seen == 4 * rows
    assert done.fitted.macs == spent
    if mode in ("dropout", "input"):
        sizes = [len(batch) for _, batch in loader.seen]
        assert len(entered) == len(sizes)
        assert {kept(16, share) for share in tokens.shares} == set(entered)


SCORES = np.random.default_rng(3).random(ROWS)


@pytest.mark.parametrize("pick", [None, "infobatch"])
def test_a_joint_budget_goes_on_where_it_was(tmp_path: Path, pick: Any) -> None:
    asked = recipe(epochs=3, save_minutes=0.5, **FULL)

    def run(name: str, **more: Any) -> Outcome:
        dynamic = ThatPrunes(pick, 3) if pick else None
        return patched(tmp_path / name, asked, "dropout", dynamic=dynamic, weighted=True, gated=True, **more)[0]

    whole = run("whole")
    for after in (3, 9):
        with pytest.raises(Killed):
            run("torn", at={after: kill}, clock=minutes())
    torn = run("torn", clock=minutes())
    assert same(whole.fitted.state, torn.fitted.state)
    assert whole.fitted.macs == torn.fitted.macs
    assert whole.fitted.steps == torn.fitted.steps


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """From 1 to 2 and from 2 to 1, where some steps of two ranks have fewer parts than those of one, or no images to share."""
    begun = [parted(tmp_path / f"one-{which}", which, kills=6) for which in range(len(PARTED))]
    two_ranks(Path(__file__).parent / "tiny.py", tmp_path, "parted", timeout=120)
    for which, (keep, least) in enumerate(PARTED):
        ended = parted(tmp_path / f"two-{which}", which)
        ranks = [json.loads((tmp_path / f"{which}-{rank}.json").read_text()) for rank in range(2)]
        one_two, two_one = (
            [one + other[2:] for one, other in zip(*both, strict=True)] for both in zip(*ranks, strict=True)
        )
        plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=8, accumulate=2)
        asked = Patches.model_validate({"mode": "dropout", "keep": keep, "joint": {"least": least}})
        plan.take(plan.rows, Joint(SCORES, asked, patches=16, seed=0).groups(plan.rows))
        steps = {(epoch, step.number): set(step.rows.tolist()) for epoch in range(2) for step in plan.dealt(epoch)}
        for taken in (begun[which] + one_two, two_one + ended):
            numbers = [(epoch, number) for epoch, number, *_ in taken]
            assert len(set(numbers)) == len(numbers), "none is taken twice"
            assert all(len(steps[left]) < 2 for left in steps.keys() - set(numbers)), (
                "none is left out that can be shared"
            )
            for epoch, number, *rows in taken:
                assert set(rows) <= steps[epoch, number], "a step has the images that it has for one"
                assert len(steps[epoch, number]) - len(rows) < 2


def test_what_merging_cannot_reach_is_refused_at_once() -> None:
    with pytest.raises(Refused, match=r"patches\.keep: 0\.3125 .*merging"):
        Tokens(vit(patch=4), Patches.model_validate({"mode": "tome", "keep": 0.6, "joint": {}}))


def fitted(folder: Path, mode: str, **changed: Any) -> dict[str, Tensor]:
    done, _, _ = patched(folder, recipe(**{"epochs": 2, "zero": 0, **changed}), mode, joint=False)
    return done.fitted.state


@pytest.mark.parametrize("mode", ["input", "evit", "tome", "dropout"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_trains_the_same(tmp_path: Path, mode: str, zero: int) -> None:
    plain, other = fitted(tmp_path / "0", mode), fitted(tmp_path / "1", mode, zero=zero)
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["input", "evit", "tome"])
def test_compiled_blocks_train_the_same(tmp_path: Path, mode: str) -> None:
    plain = fitted(tmp_path / "plain", mode)
    compiled = fitted(tmp_path / "compiled", mode, compile=True)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["input", "evit", "tome", "dropout", "cumulative"])
def test_few_graphs_serve_all_compiled_blocks_while_the_keep_falls(mode: str) -> None:
    """Twelve blocks and six keeps: were each a graph, torch would stop compiling at the eighth, and say so in a log only."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = vit(patch=4, depth=12).train()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = Patches.model_validate({"mode": mode, "keep": 0.5})
    with Tokens(model, settings, contrast if mode == "input" else None) as tokens:
        expected = dict[Any, Any]()
        for compiled in (False, True):
            if compiled:
                for block in model.blocks:
                    block.compile(backend="eager")
            for keep in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
                tokens.keep = keep
                torch.manual_seed(1)
                found = model(images)
                found.sum().backward()
                torch.testing.assert_close(found, expected.setdefault(keep, found))
    assert 1 <= counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]
    assert not beyond()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_on_fewer_patches_are_as_one(tmp_path: Path, zero: int) -> None:
    """Two processes over gloo: tickets by score, EViT, and a joint budget, against one process."""
    two_ranks(Path(__file__).parent / "tiny.py", tmp_path, "patches", str(zero), timeout=300)
    for mode, joint, until in PATCHED:
        name = f"{mode}-{joint}-{until}"
        alone, _, _ = patched(tmp_path / f"alone-{name}", recipe(epochs=2), mode, joint=joint, until=until)
        found = load_file(tmp_path / f"{name}.safetensors")
        for name, value in alone.fitted.state.items():
            torch.testing.assert_close(found[f"w/{name}"], value, atol=2e-4, rtol=1e-3)
        assert int(found["v/images"]) == alone.fitted.images_seen == 2 * ROWS
        assert float(found["v/macs"]) == alone.fitted.macs
