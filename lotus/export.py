"""What leaves the house: timm-native weights where timm can hold the shapes, ONNX, and a page that says how to load them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotus import files
from lotus.vit import anatomy, likeness
from lotus.vit import model as door
from lotus.vit.cost import count
from lotus.vit.parts import gone

TOLERANCE = 1e-4
"""Largest difference of a logit between torch and onnxruntime, absolute below 1 and relative above."""
_TIMM, _ONNX, _PAGE = "timm.safetensors", "model.onnx", "MODEL.md"


class Mismatch(RuntimeError):
    """The exported file computes something else than the model: a fault of ours or of the exporter."""


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    onnx: bool = True,
    image_size: int | None = None,
    example: Tensor | None = None,
    source: str = "final",
) -> dict[str, Any]:
    """Write ``model`` into ``folder`` in forms that need no LOTUS.

    Args:
        onnx: write ``model.onnx`` too, with any batch size, where the extra ``onnx`` is installed
        image_size: side in pixels; None asks the model
        example: (B, 3, S, S) normalized images on which both sides must agree; None draws some
        source: the model's own folder, as the page names it where LOTUS alone can load it

    Returns:
        timm: ``{"file", "name", "args"}``, or None where timm's classes cannot hold the widths
        onnx: ``{"file", "opset", "max_abs_diff"}``, or None
        notes: sentences for the user on what was not written, and why

    Raises:
        Mismatch: ONNX and torch disagree; the file is not kept.
        Refused: the folder cannot be written.
    """
    folder = Path(folder)
    size = image_size or door.image_size(model)
    model = model.eval()
    notes: list[str] = []
    held, exported = native(model), None
    with files.refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (_TIMM, _ONNX, _PAGE):
            (folder / stale).unlink(missing_ok=True)
        if held is None:
            notes.append(f"{why_not(model)}, which timm's constructor cannot say: load the model by lotus.load")
        else:
            with files.beside(folder / _TIMM) as beside:
                files.put_tensors(model.state_dict(), beside)
            held = {"file": _TIMM, **held}
        if onnx and any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
            notes.append("no model.onnx, as the extra onnx is not installed: pip install 'lotus-vit[onnx]'")
        elif onnx:
            exported = _to_onnx(model, folder / _ONNX, size, example)
        sent = {"timm": held, "onnx": exported, "notes": notes}
        with files.beside(folder / _PAGE) as beside:
            beside.write_text(_page(model, size, sent, source), encoding="utf-8")
    return sent


def lines(held: Mapping[str, Any] | None, folder: Path | None = None) -> list[str]:
    """The three lines that load the weights without LOTUS; none where timm cannot hold them.

    Args:
        held: ``name`` and ``args``, as :func:`native` gives them, and ``file``.
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
    found = anatomy.blocks(model, convolved=True)
    first, stages = found[0], len(getattr(model, "layers", (0,)))
    if any(block.kernel for block in found):
        return "some blocks convolve"
    if not all(block.has_attn and block.has_mlp for block in found):
        return "some blocks lost a sublayer"
    if any(block.dims.qk_dim != block.dims.v_dim for block in found):
        return "query/key and value dimensions differ in number"
    if any(block.reads(sublayer) is not None for block in found for sublayer in ("attn", "mlp")):
        return "some blocks read a part of the residual stream"
    if stages > 1 or len({block.dims for block in found}) > 1:
        return "the blocks' widths differ"
    if first.heads * first.head_dim != first.width:
        return f"{first.heads} heads of {first.head_dim} dimensions do not fill the {first.width} channels"
    return "the weights have other shapes"


def _to_onnx(model: nn.Module, file: Path, size: int, example: Tensor | None) -> dict[str, Any]:
    """Trace, write, run both, compare; only then does the file get its name."""
    where = next(model.parameters())
    if example is None:
        draw = torch.Generator().manual_seed(0)
        example = torch.randn(3, model.patch_embed.proj.in_channels, size, size, generator=draw)  # type: ignore[union-attr, arg-type]
    example = example.to(where)
    with files.beside(file) as beside:
        opset = _trace(model, example[:2], beside)
        # A batch of one and one that was not traced: a size that got baked in would show.
        worst = max(_difference(model, beside, batch) for batch in (example, example[:1]))
        if not worst <= TOLERANCE:
            raise Mismatch(
                f"{file.name}: differs from the model by {worst:.2g}, more than {TOLERANCE:g}; it was not kept."
            )
    return {"file": file.name, "opset": opset, "max_abs_diff": worst}


def _trace(model: nn.Module, images: Tensor, file: Path) -> int:
    """Write ONNX with an open batch size; returns the opset.

    torch's tracing exporter takes a tenth of the time of the one on torch.export and has fewer parts that can fail; a plain
    ViT has no control flow that it could miss. It is on its way out of torch, so the other one follows where it is gone.
    """
    opset = 18
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "opset_version": opset}
    with _hush(), torch.no_grad():
        try:
            torch.onnx.export(
                model, (images,), str(file), dynamo=False, dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, **names
            )  # fmt: skip
        except (TypeError, AttributeError, ImportError, NotImplementedError, torch.onnx.errors.OnnxExporterError):
            batch = torch.export.Dim("batch")
            torch.onnx.export(
                model, (images,), str(file), dynamo=True, dynamic_shapes={"x": {0: batch}}, external_data=False, **names
            )  # fmt: skip
    return opset


def _difference(model: nn.Module, file: Path, images: Tensor) -> float:
    """Largest difference of the logits, absolute below 1 and relative above; infinite where one is not a number."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.float().cpu().numpy()})
    with torch.no_grad():
        expected = model(images).float().cpu()
    gap = ((torch.from_numpy(found) - expected).abs() / expected.abs().clamp(min=1)).max()
    return float(gap) if torch.isfinite(gap) else math.inf


def _page(model: nn.Module, size: int, sent: dict[str, Any], source: str) -> str:
    """MODEL.md: what lies here and the lines that load it."""
    cost = count(model)
    widths = ["| block | heads | head dimension | MLP units |", "|---|---|---|---|"]
    widths += [
        f"| {place} | {f'convolution of {block.kernel} x {block.kernel}' if block.kernel else block.heads} | "
        f"{block.head_dim} | {block.hidden} |"
        for place, block in enumerate(anatomy.blocks(model, convolved=True))
    ]
    parts = [
        "# The model",
        f"{door.origin(model)['name']}, cut: {cost.params:,} parameters, {cost.macs:,} multiply-accumulates an image of "
        f"{size} x {size} pixels. Images are RGB in 0..1, less the mean and over the standard deviation of its training data.",
        "\n".join(widths),
    ]
    if sent["timm"]:
        parts += ["## With timm alone", "\n".join(["```python", *lines(sent["timm"]), "```"])]
    else:
        parts += [
            "## With LOTUS",
            f"Here {why_not(model)}, which timm's constructor cannot say.",
            f'```python\nimport lotus\nmodel = lotus.load("{source}")  # the folder of spec.json and model.safetensors\n```',
        ]
    if sent["onnx"]:
        parts += [
            "## With ONNX",
            f"Input `images` (batch, 3, {size}, {size}) float32, output `logits` (batch, classes). Checked against torch: they "
            f"differ by {sent['onnx']['max_abs_diff']:.1e} at most.",
            "```python\nimport onnxruntime\n"
            f"session = onnxruntime.InferenceSession({_ONNX!r})\n"
            '(logits,) = session.run(None, {"images": images})\n```',
        ]
    return "\n\n".join(parts) + "\n"


@contextlib.contextmanager
def _hush() -> Iterator[None]:
    """The exporters' chatter says nothing to our users: parity is checked."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)
