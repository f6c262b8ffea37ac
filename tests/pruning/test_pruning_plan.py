"""A Plan is a value that cannot be wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vits import random_plan, tiny

from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit.anatomy import Dims
from selection.errors import Refused

DIMS = Dims(heads=3, qk_dim=4, v_dim=4, hidden=6)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_json_and_back(seed, decouple_qk):
    plan = random_plan([DIMS, DIMS], seed, decouple_qk=decouple_qk)
    assert Plan.from_json(plan.to_json()) == plan


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_kept_outputs_never_cross_heads(seed):
    (plan,) = random_plan([DIMS], seed).blocks
    outputs, per_head = plan.outputs, plan.dims.v_dim
    for place, head in enumerate(plan.heads):
        mine = outputs[place * per_head : (place + 1) * per_head]
        assert {index // DIMS.v_dim for index in mine} == {head}
    assert [index // DIMS.qk_dim for index in plan.queries] == [h for h in plan.heads for _ in range(per_head)]


def test_full_keeps_everything():
    model = tiny()
    plan = Plan.full(model)
    plan.check(model)
    assert plan.dims == (Dims(3, 16, 16, 192),) * 2
    assert plan.cost(model).params == sum(weight.numel() for weight in model.parameters())
    assert plan.summary()[0]["heads"] == plan.summary()[0]["of_heads"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": ()}, "for 2 heads, but 0"),
        ({"heads": (0, 3)}, "from 0 to 2"),
        ({"heads": (1, 0)}, "must rise"),
        ({"heads": (0, 0)}, "must rise"),
        ({"heads": (0, 2.0)}, "integers"),
        ({"units": (0, 6)}, "MLP units"),
        ({"v": ((0,),)}, "for 1 heads, but 2"),
        ({"v": ((0,), (0, 1))}, "equally many"),
        ({"qk": ((0,), (-1,))}, "head 2"),
    ],
)
def test_what_contradicts_itself_is_refused(change, message):
    good = {"of": DIMS, "heads": (0, 2), "qk": ((0,), (1,)), "v": ((0, 1), (2, 3)), "units": (0, 5)}
    BlockPlan(**good)
    with pytest.raises(Refused, match=message):
        BlockPlan(**{**good, **change})


def test_foreign_and_newer_files_are_refused():
    for text in ("", "[]", "{}", '{"format": 1, "blocks": [{}]}', '{"format": 1, "blocks": [{"of": [1]}]}'):
        with pytest.raises(Refused, match="no plan"):
            Plan.from_json(text)
    newer = {**json.loads(Plan.full([DIMS]).to_json()), "format": 3}
    with pytest.raises(Refused, match="newer"):
        Plan.from_json(json.dumps(newer))


def test_a_plan_for_another_model_is_refused():
    plan = Plan.full(tiny())
    with pytest.raises(Refused, match="2 blocks, the model has 3"):
        plan.check(tiny(depth=3))
    with pytest.raises(Refused, match=r"blocks\.0: the plan is for"):
        plan.check(tiny(num_heads=4))
