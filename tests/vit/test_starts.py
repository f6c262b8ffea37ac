"""The shelf of starts: what they make of a model, in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lotus.config import Model
from lotus.vit import anatomy, starts
from lotus.vit.model import create, proxy
from selection import methods
from selection.errors import Refused

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}


def made(start: object, seed: int = 0, **changed: object) -> Any:
    torch.manual_seed(seed)
    settings = {"name": "vit_tiny_patch16_224", "args": ARGS, "start": start, **changed}
    return create(Model.model_validate(settings), 5)


def weights(attn: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(H, Q, D) of queries, keys and values, and (D, H V)."""
    qkv = attn.qkv.weight.detach().double()  # type: ignore[union-attr,operator]
    q, k, v = qkv.unflatten(0, (3, attn.num_heads, -1))  # type: ignore[arg-type]
    return q, k, v, attn.proj.weight.detach().double()  # type: ignore[union-attr,operator,return-value]


@pytest.mark.parametrize("name", methods.names(starts))
def test_every_start_makes_a_model_that_trains(name: str) -> None:
    model = made(name)
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 5)
    logits.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert torch.equal(made(name).blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight), "the seed decides"  # type: ignore[index,union-attr]


def test_the_default_is_timms() -> None:
    torch.manual_seed(0)
    own = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    for one, other in zip(made("timm").parameters(), own.parameters(), strict=True):
        assert torch.equal(one, other)


def test_xavier_is_of_the_patch_embedding_alone() -> None:
    plain, other = made("timm").state_dict(), made("xavier").state_dict()
    changed = {name for name, value in plain.items() if not torch.equal(value, other[name])}
    assert changed == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not other["patch_embed.proj.bias"].any()
    bound = (6 / (96 + 3 * 8 * 8)) ** 0.5  # Glorot and Bengio 2010, equation 16
    assert 0.98 * bound < other["patch_embed.proj.weight"].abs().max() <= bound
    old = made("timm", patch_embed_init="xavier").state_dict()
    assert all(torch.equal(value, old[name]) for name, value in other.items())


def is_noise_and_identity(product: Tensor, alpha: float, beta: float) -> None:
    """(D, D) = alpha Z + beta I, with Z normal and of variance 1 / D."""
    width = len(product)
    noise = (product - beta * torch.eye(width)) * width**0.5 / alpha
    assert noise.mean().abs() < 5 / width  # five standard errors of D^2 numbers
    assert noise.square().mean().sub(1).abs() < 5 * 2**0.5 / width
    assert noise.diagonal().mean().abs() < 5 / width**0.5
    assert noise.pow(4).mean().sub(3).abs() < 5 * 96**0.5 / width, "the fourth moment of a normal variable"


def test_mimetic_products_are_noise_and_identity() -> None:
    model = made("mimetic", args={**ARGS, "num_heads": 1})
    products = []
    for block in model.blocks:  # type: ignore[union-attr]
        q, k, v, proj = weights(block.attn)  # type: ignore[arg-type,union-attr]
        is_noise_and_identity(q[0].T @ k[0], 0.7, 0.7)
        is_noise_and_identity((proj @ v.flatten(0, 1)).T, 0.4, -0.4)
        products.append(proj @ v.flatten(0, 1))
    assert not torch.allclose(products[0], products[1]), "each block has noise of its own"


def test_mimetic_heads_have_the_largest_part_of_it() -> None:
    """Eckart and Young: the nearest matrix of rank Q has the Q largest singular values. The noise is drawn again here."""
    model = made("mimetic")
    torch.manual_seed(0)
    timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    for block in model.blocks:  # type: ignore[union-attr]
        q, k, v, proj = weights(block.attn)  # type: ignore[arg-type,union-attr]
        for head in range(3):
            whole = (0.7 * torch.randn(96, 96) / 96**0.5 + 0.7 * torch.eye(96)).double()
            product = q[head].T @ k[head]
            assert torch.linalg.matrix_rank(product) == 32
            s = torch.linalg.svdvals(whole)
            assert torch.linalg.norm(whole - product) == pytest.approx(s[32:].norm().item(), rel=1e-4)
            torch.testing.assert_close(q[head] @ q[head].T, k[head] @ k[head].T, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close((q[head] @ q[head].T).diagonal(), s[:32], atol=1e-5, rtol=1e-4)
        whole = (0.4 * torch.randn(96, 96) / 96**0.5 - 0.4 * torch.eye(96)).double()
        torch.testing.assert_close((proj @ v.flatten(0, 1)).T, whole, atol=1e-5, rtol=1e-4)
        is_noise_and_identity((proj @ v.flatten(0, 1)).T, 0.4, -0.4)


def test_mimetic_takes_other_weights_and_leaves_the_rest() -> None:
    model = made({"name": "mimetic", "alpha_qk": 0.0, "alpha_vo": 0.0, "beta_vo": 0.25}, args={**ARGS, "num_heads": 1})
    q, k, v, proj = weights(model.blocks[0].attn)  # type: ignore[arg-type,index,union-attr]
    torch.testing.assert_close(q[0].T @ k[0], 0.7 * torch.eye(96).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(proj @ v[0], -0.25 * torch.eye(96).double(), atol=1e-5, rtol=0)
    plain, other = made("timm").state_dict(), made("mimetic").state_dict()
    changed = {name for name, value in plain.items() if not torch.equal(value, other[name])}
    assert changed == {f"blocks.{b}.attn.{n}.weight" for b in range(2) for n in ("qkv", "proj")}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}),
    ],
)  # fmt: skip
def test_mimetic_knows_the_other_families(name: str, args: dict) -> None:
    model = made("mimetic", name=name, args=args)
    for block in anatomy.blocks(model):
        parts = [linear.weight.detach() for linear in block.projections]
        v = parts[-1][-block.heads * block.head_dim :]
        product = (block.proj.weight.detach() @ v).T
        assert product.trace() / len(product) == pytest.approx(-0.4, abs=0.2)


def test_weights_that_are_given_win(tmp_path) -> None:
    from safetensors.torch import save_file

    given = made("timm", seed=5).state_dict()
    save_file(given, tmp_path / "given.safetensors")
    model = made("mimetic", weights=str(tmp_path / "given.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name])


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(Refused, match=r"model\.start: .*'mimetik'.*'mimetic'\?"):
        made("mimetik")
    with pytest.raises(Refused, match=r"model\.start.*beta_ov.*beta_vo"):
        made({"name": "mimetic", "beta_ov": 1.0})
    with pytest.raises(Refused, match="start, pos_embed_std and patch_embed_init"):
        proxy(Model.model_validate({"name": "resnet18", "start": "xavier"}), 3)
