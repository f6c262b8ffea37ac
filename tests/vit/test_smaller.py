import pytest

from lotus.config import Model
from lotus.vit.cost import count
from lotus.vit.model import create
from lotus.vit.smaller import narrower
from selection.errors import Refused

TINY = Model(
    name="vit_tiny_patch16_224", args={"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
)


@pytest.mark.parametrize("keep", [0.12, 0.26, 0.36, 0.5, 0.75])
def test_the_nearest_width_within_the_budget(keep):
    small = narrower(TINY, keep)
    dense, macs = count(create(TINY, 10)).macs, count(create(small, 10)).macs
    assert 0.85 * keep * dense < macs <= keep * dense
    width, heads = small.args["embed_dim"], small.args["num_heads"]
    assert width % heads == 0
    assert small.args["depth"] == 6
    wider = {**small.args, "embed_dim": width + (width // heads if heads < 4 else 4), "num_heads": heads + (heads < 4)}
    assert count(create(TINY.model_copy(update={"args": wider}), 10)).macs > keep * dense


def test_heads_keep_their_dimensions_where_that_comes_near():
    small = narrower(TINY, 0.265)  # 64 wide: 0.26
    assert (small.args["embed_dim"], small.args["num_heads"]) == (64, 2)
    assert narrower(TINY, 0.36).args["num_heads"] == 4  # between 64 and 96


def test_all_of_it_is_the_model_itself_from_scratch():
    small = narrower(TINY.model_copy(update={"weights": "there.safetensors"}), 1)
    assert small.args == TINY.args
    assert not small.weights


def test_a_budget_below_any_width_is_refused_with_the_least():
    with pytest.raises(Refused, match=r"here: .*0\.0001.*least is 0\.00"):
        narrower(TINY, 0.0001, place="here")


def test_a_model_without_one_width_is_refused():
    with pytest.raises(Refused, match=r"model\.name: swin_tiny"):
        narrower(Model(name="swin_tiny_patch4_window7_224"), 0.5)
