"""What leaves the house: timm-native weights where timm can hold the shapes, ONNX, and a page that says how to load them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotus import card, files, onnx_file
from lotus.onnx_file import Input, Mismatch
from lotus.vit import anatomy, likeness
from lotus.vit import model as door
from lotus.vit.parts import gone
from lotus.vit.preprocessing import Preprocessing, preprocessing

__all__ = ["Mismatch", "export", "lines", "native", "why_not"]
_TIMM, _ONNX, _PAGE, _CARD, _CONFIG = "model.safetensors", "model.onnx", "MODEL.md", "README.md", "config.json"
_INT8, _OLDER = "model.int8.onnx", "timm.safetensors"
FILES = (_TIMM, _ONNX, _PAGE, _CARD, _CONFIG, _INT8, _OLDER)
"""All that :func:`export` writes, or wrote once."""


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    onnx: bool = True,
    onnx_input: Input = "float32",
    example: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    source: str = "finetune",
) -> dict[str, Any]:
    """Write ``model`` into ``folder`` in forms that need no LOTUS.

    Args:
        onnx: write ``model.onnx`` too, with any batch size, where the extra ``onnx`` is installed
        onnx_input: what it takes: normalized images, or ``uint8`` pixels, the preprocessing being inside
        example: (B, 3, S, S) normalized images on which both sides must agree; None draws some
        about: what is known beside the weights: ``classes``, ``license``, ``top1`` and the images it was ``measured_on``, ``resize``
        source: the model's own folder, as the page names it where LOTUS alone can load it

    Returns:
        timm: ``{"file", "name", "args"}``, or None where timm's classes cannot hold the widths
        onnx: ``{"file", "opset", "input", "max_abs_diff"}``, or None
        notes: sentences for the user on what was not written, and why

    Raises:
        Mismatch: ONNX and torch disagree; the file is not kept.
        Refused: the folder cannot be written.
    """
    folder, about = Path(folder), about or {}
    model = model.eval()
    wanted = preprocessing(model)._replace(side=door.image_size(model))
    notes: list[str] = []
    held, exported = native(model), None
    with files.refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in FILES:
            (folder / stale).unlink(missing_ok=True)
        if held is None:
            notes.append(f"{why_not(model)}, which timm's constructor cannot say: load the model by lotus.load")
        else:
            with files.beside(folder / _TIMM) as beside:
                files.put_tensors(model.state_dict(), beside)
            held = {"file": _TIMM, **held}
            files.write_text(folder / _CONFIG, json.dumps(card.config(model, held, wanted, about), indent=1) + "\n")
        if onnx and any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
            notes.append("no model.onnx, as the extra onnx is not installed: pip install 'lotus-vit[onnx]'")
        elif onnx:
            given = _example(model, wanted, example)
            exported = onnx_file.write(model, folder / _ONNX, wanted, example=given, takes=onnx_input, about=about)
        sent = {"timm": held, "onnx": exported, "notes": notes}
        page = card.page(model, wanted, sent, source, lines(held), why_not(model) if held is None else "")
        files.write_text(folder / _PAGE, page)
        files.write_text(folder / _CARD, card.hub(model, about, page, timm=held is not None))
    return sent


def add_eight_bits(folder: Path, calibrated_on: int, top1: Sequence[float] = (), images: int | None = None) -> None:
    """Let the pages that :func:`export` wrote into ``folder`` tell of model.int8.onnx too; see :func:`lotus.card.eight_bits`."""
    for page in (folder / _PAGE, folder / _CARD):
        told = page.read_text(encoding="utf-8")
        files.write_text(page, f"{told}\n{card.eight_bits(calibrated_on, top1, images)}")


def _example(model: nn.Module, wanted: Preprocessing, given: Tensor | None) -> Tensor:
    """Images (B, 3, S, S) where the model is; drawn where none are ``given``."""
    if given is None:
        draw = torch.Generator().manual_seed(0)
        channels: Any = model.patch_embed.proj.in_channels  # type: ignore[union-attr]
        side = wanted.side or 224
        given = torch.randn(7, channels, side, side, generator=draw)
    return given.to(next(model.parameters()))


def lines(held: Mapping[str, Any] | None, folder: Path | None = None) -> list[str]:
    """The three lines that load the weights without LOTUS; none where timm cannot hold them.

    Args:
        held: ``name`` and ``args``, as :func:`native` gives them, and ``file``.
        folder: the weights' folder, which their path then begins with; None: none
    """
    if held is None:
        return []
    arguments = "".join(f", {name}={value!r}" for name, value in held["args"].items())
    file = held["file"] if folder is None else str(folder / held["file"])
    return [
        "import timm, safetensors.torch",
        f"model = timm.create_model({held['name']!r}{arguments})",
        f"model.load_state_dict(safetensors.torch.load_file({file!r}))",
    ]


def native(model: nn.Module) -> dict[str, Any] | None:
    """Name and arguments by which timm alone builds ``model``; None where it cannot."""
    made = door.origin(model)
    if any(block.kernel for block in anatomy.blocks(model, convolved=True)):
        return None
    told = likeness.widths(model)
    if not told or any(
        block.width % block.heads for block in anatomy.blocks(model)
    ):  # timm's heads share out the width
        return None
    args = {**made["args"], **told}
    if gone(model):
        args["depth"] = len(anatomy.blocks(model))
    twin = door.build(made["name"], args, meta=True)
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    same = own == {name: tensor.shape for name, tensor in twin.state_dict().items()}
    same &= likeness.pool_heads(model) == likeness.pool_heads(twin)
    same &= all(a.dims == b.dims for a, b in zip(anatomy.blocks(model), anatomy.blocks(twin), strict=True))
    return {"name": made["name"], "args": args} if same else None


def why_not(model: nn.Module) -> str:
    """What of a model for which :func:`native` is None timm's constructor cannot say."""
    blocks = anatomy.blocks(model, convolved=True)
    first, stages = blocks[0], len(getattr(model, "layers", (0,)))
    if any(block.kernel for block in blocks):
        return "some blocks convolve"
    if not all(block.has_attn and block.has_mlp for block in blocks):
        return "some blocks lost a sublayer"
    if any(block.dims.qk_dim != block.dims.v_dim for block in blocks):
        return "query/key and value dimensions differ in number"
    if any(block.reads(sublayer) is not None for block in blocks for sublayer in ("attn", "mlp")):
        return "some blocks read a part of the residual stream"
    if stages > 1 or len({block.dims for block in blocks}) > 1:
        return "the blocks' widths differ"
    if first.heads * first.head_dim != first.width:
        return f"{first.heads} heads of {first.head_dim} dimensions do not fill the {first.width} channels"
    return "the weights have other shapes"
