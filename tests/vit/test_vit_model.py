"""The door to timm: what is made, what is refused, and how a model is made again."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lotus import config
from lotus.vit import model as door
from lotus.vit.preprocessing import preprocessing
from lotus.vit.unmade import without_memory
from selection.errors import Refused

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
NAME = "vit_tiny_patch16_224"


def make(classes: int = 5, **settings) -> Any:
    return door.create(config.Model(**{"name": NAME, "args": TINY, **settings}), classes)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_the_small_start_for_digits():
    args = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
    torch.manual_seed(0)
    model = make(10, args=args, pos_embed_std=0.2, patch_embed_init="xavier")
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert door.image_size(model) == 8
    assert 0.17 < model.pos_embed.std() < 0.23
    bound = (6 / (64 + 12)) ** 0.5  # Glorot & Bengio 2010, equation 16
    weight = model.patch_embed.proj.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert not model.patch_embed.proj.bias.any()
    assert door.origin(model) == {"name": NAME, "args": {**args, "num_classes": 10}}


def test_the_same_seed_gives_the_same_start():
    torch.manual_seed(3)
    first = make()
    torch.manual_seed(3)
    second = make()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_tiny_patch16_242"}, "Did you mean 'vit_tiny_patch16_224'"),
        ({"name": "vit_tinny"}, "Did you mean 'vit_tiny_patch16_224'"),
        ({"name": "quux"}, "LOTUS takes timm's"),
        ({"name": "deit_tiny_patch16_224.nothing"}, "nothing"),
        ({"name": "hf-hub:someone/something"}, "no model"),
        ({"name": "resnet18", "args": {}}, "ResNet: is of no family that can be cut.*Supported"),
        ({"name": "resnet18"}, "ResNet: is of no family that can be cut.*Supported"),
        ({"name": "swinv2_tiny_window8_256", "args": {}}, "SwinTransformerV2: is of no family"),
        ({"name": "swin_tiny_patch4_window7_224"}, "Did you mean 'depths'"),
        ({"name": "eva02_tiny_patch14_224", "args": {"reg_tokens": 1}}, "Did you mean 'num_reg_tokens'"),
        ({"args": {"embed_dims": 64}}, "Did you mean 'embed_dim'"),
        ({"args": {**TINY, "embed_dim": 50}}, "divisible"),
        ({"args": {**TINY, "depth": 0}}, "no blocks"),
        ({"args": {**TINY, "depth": 1_000_000}}, "args.depth: .* beyond any model"),
        ({"name": "swin_tiny_patch4_window7_224", "args": {"depths": [1] * 1001}}, "args.depths: .* beyond any model"),
        ({"args": {**TINY, "embed_dim": 1 << 40}}, "args.embed_dim: .* beyond any model"),
        ({"args": {**TINY, "embed_dim": 3 << 18}}, "takes .* GB of memory"),
        ({"args": {**TINY, "img_size": "large"}}, "TypeError"),
        ({"args": {**TINY, "block_fn": "os.system"}}, "no such argument"),
        ({"args": {**TINY, "checkpoint_path": "x.pth"}}, "no such argument"),
        ({"args": {**TINY, "norm_layer": {"a": 1}}}, "must be a number"),
        ({"args": {**TINY, "num_classes": 3}}, "the data set says"),
        ({"args": {**TINY, "global_pool": ""}}, "unpooled"),
        ({"name": "vit_base_patch16_xp_224", "args": {}}, "ParallelScalingBlock"),
        ({"args": {**TINY, "pos_embed": "none"}, "pos_embed_std": 0.2}, "no position embeddings"),
    ],
)
def test_what_cannot_be_made_is_refused(settings, message):
    with pytest.raises(Refused, match=f"(?s){message}"):
        make(**settings)


def test_weights_from_a_file(tmp_path):
    source = make()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    loaded = make(weights=str(tmp_path / "a.safetensors"), pos_embed_std=0.2)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("theirs", "cure"),
    [
        ({"img_size": 48, "patch_size": 16}, r"say model\.args\.img_size=48\.$"),
        ({"img_size": 16, "patch_size": 4}, r"say model\.args\.img_size=16 model\.args\.patch_size=4\.$"),
    ],
)
def test_weights_for_other_images_are_refused_with_the_argument_that_fits(tmp_path, theirs, cure):
    save_file(make(args={**TINY, **theirs}).state_dict(), tmp_path / "a.safetensors")
    silent = {name: value for name, value in TINY.items() if name not in ("img_size", "patch_size")}
    with pytest.raises(Refused, match=cure) as told:
        make(args=silent, weights=str(tmp_path / "a.safetensors"))
    asked = dict(word.split("=") for word in re.findall(r"args\.(\w+=\d+)", str(told.value)))
    args = {**silent, **{name: int(value) for name, value in asked.items()}}
    make(args=args, weights=str(tmp_path / "a.safetensors"))  # it does


@pytest.mark.parametrize("theirs", [{"img_size": 48}, {"img_size": 48, "patch_size": 16}])
def test_positions_and_patches_are_resampled_to_the_side_that_is_asked_for(tmp_path, theirs):
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    given = make(args={**TINY, **theirs})
    save_file(given.state_dict(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="were resampled"):
        found = make(weights=str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(found.pos_embed, resample_abs_pos_embed(given.pos_embed, new_size=[4, 4]))
    kernel = given.patch_embed.proj.weight.detach()
    wanted = kernel if kernel.shape[-1] == 8 else resample_patch_embed(kernel, [8, 8])
    torch.testing.assert_close(found.patch_embed.proj.weight.detach(), wanted)


def test_weights_of_another_model_are_refused_with_the_model_that_they_are_of(tmp_path):
    for theirs, cure in (
        (
            {"img_size": 48, "embed_dim": 24},
            r"2 blocks, 24 wide.* say model\.args\.embed_dim=24 model\.args\.img_size=48 and model\.args\.num_heads=N, .*\.$",
        ),
        ({"depth": 3}, r"3 blocks, 48 wide.* say model\.args\.depth=3\.$"),
    ):
        save_file(make(args={**TINY, **theirs}).state_dict(), tmp_path / "a.safetensors")
        with pytest.raises(Refused, match=cure):
            make(weights=str(tmp_path / "a.safetensors"))
    save_file(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(Refused, match="not the weights of a ViT"):
        make(weights=str(tmp_path / "a.safetensors"))


def _forms(state):
    """How others save weights: by name, what is saved."""
    import argparse
    from pathlib import Path

    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    args = argparse.Namespace(lr=0.1, output=Path("out"), nested=argparse.Namespace(a=[1]))
    return {
        "alone": state,
        "state_dict": {"state_dict": state},
        "model": {"model": state, "optimizer": {"state": {}, "param_groups": []}},
        "ddp": {"state_dict": wrapped},
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "timm": {
            "epoch": 3,
            "arch": NAME,
            "state_dict": other,
            "args": args,
            "version": 2,
            "state_dict_ema": state,
            "metric": 7.5,
        },
        "deit": {"model": other, "model_ema": wrapped, "epoch": 1, "scaler": {}, "args": args},
    }


@pytest.mark.parametrize("form", ["alone", "state_dict", "model", "ddp", "compiled", "timm", "deit"])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_in_every_form_that_others_save_them_in(tmp_path, form, zipped):
    source = make()
    torch.save(_forms(source.state_dict())[form], tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    loaded = make(weights=str(tmp_path / "a.pth"))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_as_the_hub_lays_it_out_says_what_it_is(tmp_path, weights):
    source = make(classes=7)
    images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.95,
              "input_size": [3, 32, 32], "crop_mode": "squash"}  # fmt: skip
    told = {"architecture": NAME, "num_classes": 7, "model_args": TINY, "pretrained_cfg": images}
    (tmp_path / "config.json").write_text(json.dumps(told))
    if weights.endswith("bin"):
        torch.save(source.state_dict(), tmp_path / weights)
    else:
        save_file(source.state_dict(), tmp_path / weights)
    with pytest.warns(UserWarning, match="head starts anew"):
        found = door.create(config.Model(weights=str(tmp_path)), 5)
    assert torch.equal(found.pos_embed, source.pos_embed)
    assert preprocessing(found) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.95, 32, "squash")
    with pytest.warns(UserWarning, match="resampled"):
        smaller = door.create(config.Model(weights=str(tmp_path), args={"img_size": 16}), 7)
    assert preprocessing(smaller).side == 16
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match=r"config\.json cannot be read"):
        door.create(config.Model(weights=str(tmp_path)), 5)


def test_weights_of_other_classes_keep_a_new_head(tmp_path):
    source = make(classes=7)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="7 classes.* 5"):
        loaded = make(classes=5, weights=str(tmp_path / "a.safetensors"))
    assert loaded.head.weight.shape == (5, 48)
    assert torch.equal(loaded.pos_embed, source.pos_embed)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file(make(args={**TINY, "embed_dim": 96}).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(Refused, match=r"does not fit.* not \(1, 1, 48\)"):
        make(weights=str(tmp_path / "wide.safetensors"))
    save_file(make(args={**TINY, "depth": 3}).state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises(Refused, match=r"blocks\.2.*does not belong"):
        make(weights=str(tmp_path / "deep.safetensors"))
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "deep.safetensors").read_bytes()[:5000])
    with pytest.raises(Refused, match="cannot be read"):
        make(weights=str(tmp_path / "half.safetensors"))
    with pytest.raises(Refused, match="cannot be read"):
        make(weights=str(tmp_path / "absent.safetensors"))
    (tmp_path / "pickle.pth").write_bytes(b"")
    with pytest.raises(Refused, match=r"holds no state dict|no state dict of tensors"):
        make(weights=str(tmp_path / "pickle.pth"))
    (tmp_path / "zeros.pth").write_bytes(bytes(600))  # torch takes it for its oldest format
    with pytest.raises(Refused, match=r"damaged, or more than tensors") as told:
        make(weights=str(tmp_path / "zeros.pth"))
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (NAME, TINY),
        (NAME, {**TINY, "mlp_ratio": 3.3, "qkv_bias": False, "in_chans": 1}),
        (NAME, {**TINY, "init_values": 0.1, "reg_tokens": 2, "no_embed_class": True}),
        (NAME, {**TINY, "global_pool": "avg", "class_token": False}),
        (NAME, {**TINY, "img_size": (32, 16), "pre_norm": True, "final_norm": False}),
        ("deit_tiny_distilled_patch16_224", TINY),
        ("deit3_small_patch16_224", {**TINY, "init_values": 0}),
        ("vit_base_patch16_clip_quickgelu_224", TINY),
        ("vit_small_patch14_reg4_dinov2", {**TINY, "img_size": 64}),
    ],
)
def test_a_model_made_by_timm_tells_how_to_make_it_again(name, args):
    model: Any = timm.create_model(name, num_classes=5, **args)
    told = door.origin(model)
    json.dumps(told)  # it goes into a spec
    again = timm.create_model(told["name"], **told["args"])
    assert type(again) is type(model)
    assert shapes(again) == shapes(model)
    again.load_state_dict(model.state_dict())
    embed: Any = model.patch_embed
    images = torch.randn(2, embed.proj.in_channels, *embed.img_size)
    assert torch.equal(model.eval()(images), again.eval()(images))


def test_a_model_that_timm_would_make_otherwise_is_refused():
    model: Any = timm.create_model(NAME, **TINY)
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(Refused, match=r"blocks\.0\.mlp is ReLU"):
        door.origin(model)
    other = timm.create_model(NAME, **TINY)
    other.head = nn.Sequential(nn.Linear(48, 9), nn.Linear(9, 5))
    with pytest.raises(Refused, match=r"head\.0\.weight"):
        door.origin(other)
    unnamed = timm.models.vision_transformer.VisionTransformer(**TINY)
    with pytest.raises(Refused, match="does not say which timm model"):
        door.origin(unnamed)


def test_a_remembered_origin_is_verified():
    model = make(5)
    model.reset_classifier(7)
    with pytest.raises(Refused, match=r"head\.weight"):
        door.origin(model)


def test_the_tag_of_published_weights_may_bring_a_size_of_its_own():
    model = door.build("vit_base_patch32_clip_224.openai", {}, meta=True)
    assert door.origin(model)["name"] == "vit_base_patch32_clip_224"


def test_image_size_refuses_what_is_not_square():
    with pytest.raises(Refused, match=r"\(32, 16\)"):
        door.image_size(timm.create_model(NAME, **{**TINY, "img_size": (32, 16)}))


def test_drop_path_rises_to_the_last_block():
    model = make(args={**TINY, "depth": 3})
    door.set_drop_path(model, 0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks]
    assert rates == [0, 0.1, 0.2]
    door.set_drop_path(model, 0)
    assert all(isinstance(block.drop_path2, nn.Identity) for block in model.blocks)


# ------------------------------------------------------------------------------------------------------ models to be proxies


def test_any_timm_model_can_be_a_proxy() -> None:
    torch.manual_seed(0)
    net = door.proxy(config.Model(name="resnet10t", args={"in_chans": 3}), 7)
    net.eval()
    images = torch.randn(2, 3, 24, 24)
    features = net.forward_head(net.forward_features(images), pre_logits=True)
    torch.testing.assert_close(net.get_classifier()(features), net(images))
    assert net(images).shape == (2, 7)
    assert door.side(net, 24) == 24
    vit = door.proxy(config.Model(name=NAME, args=TINY), 7)
    assert door.origin(vit)["name"] == NAME, "made as any ViT of ours"
    assert door.side(vit, 24) == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet81"}, r"score\.model\.name: .*'resnet81'.*'resnet"),
        ({"name": "local-dir:/tmp"}, "timm has no model"),
        (
            {"name": "resnet10t", "args": {"img_sizes": 3}},
            r"score\.model\.args\.img_sizes: resnet10t takes no such",
        ),
        ({"name": "resnet10t", "args": {"checkpoint_path": "x.pth"}}, "takes no such argument"),
        ({"name": "resnet10t", "args": {"pretrained_cfg_overlay": {"file": "x.pth"}}}, "takes no such argument"),
        ({"name": "resnet10t", "args": {"num_classes": 4}}, "takes no such argument"),
        ({"name": "resnet10t", "args": {"stem_width": {"a": 1}}}, "must be a number, text"),
        ({"name": "resnet10t", "pos_embed_std": 0.2}, "are of plain ViTs"),
        ({"name": NAME, "args": {"img_sizes": 3}}, r"score\.model\.args\.img_sizes"),
        ({"name": "resnet10t", "weights": "no.safetensors"}, r"score\.model\.weights: no\.safetensors cannot be read"),
    ],
)
def test_what_cannot_be_a_proxy_is_refused(settings, message) -> None:
    with pytest.raises(Refused, match=message):
        door.proxy(config.Model(**settings), 5, place="score.model")


def test_a_proxy_model_takes_weights_from_a_file(tmp_path) -> None:
    request = {"name": "resnet10t"}
    given = door.proxy(config.Model(**request), 3)
    file = tmp_path / "net.safetensors"
    save_file(given.state_dict(), file)
    with pytest.warns(UserWarning, match="fc starts anew"):
        found = door.proxy(config.Model(**request, weights=str(file)), 5)
    assert all(
        torch.equal(value, given.state_dict()[name]) for name, value in found.state_dict().items() if "fc" not in name
    )
    assert found.get_classifier().out_features == 5


def test_without_memory_nothing_is_drawn_and_what_lies_elsewhere_is():
    with without_memory():
        made = torch.empty(3).uniform_()
        kept = torch.zeros(3, device="cpu").fill_(2).mul_(3)
        model = timm.create_model(NAME, **TINY)
    assert made.is_meta
    assert made.shape == (3,)
    assert kept.tolist() == [6, 6, 6]
    assert all(weight.is_meta for weight in model.parameters())
    assert shapes(model) == shapes(timm.create_model(NAME, **TINY))
