"""What an exported model says of itself: timm's config.json, MODEL.md, and the card of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lotus.report.numbers import accuracy
from lotus.vit import anatomy, zoo
from lotus.vit import model as door
from lotus.vit.cost import count
from lotus.vit.preprocessing import Preprocessing
from selection.shown import shown


def config(
    model: nn.Module, held: Mapping[str, Any], wanted: Preprocessing, about: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json as timm's loader of the hub and of ``local-dir:`` reads it.

    Args:
        model: of which classes and features are told
        held: ``name`` and ``args`` by which timm builds the model
        wanted: the images that it wants
        about: ``classes`` and ``license``, where they are known
    """
    classes: Any = model.num_classes
    known = zoo.published(held["name"], "model")  # which layers begin anew for other classes, or other channels
    side: Any = wanted.side
    images = {
        "mean": list(wanted.mean), "std": list(wanted.std), "interpolation": wanted.interpolation,
        "crop_pct": wanted.crop, "crop_mode": wanted.mode, "input_size": [3, side, side], "fixed_input_size": True,
        "pool_size": None, "first_conv": known.get("first_conv") or "patch_embed.proj",
        "classifier": known.get("classifier") or "head", "num_classes": classes,
    }  # fmt: skip
    if license_ := about.get("license"):
        images["license"] = license_
    names = {"label_names": list(about["classes"])} if about.get("classes") else {}
    args = {name: value for name, value in held["args"].items() if name != "num_classes"}
    features: Any = model.num_features
    return {
        "architecture": held["name"], "num_classes": classes, "num_features": features, **names, "model_args": args,
        "pretrained_cfg": images,
    }  # fmt: skip


def images_told(wanted: Preprocessing) -> str:
    """In a sentence, by numbers."""
    three = ["[" + ", ".join(f"{number:.6g}" for number in numbers) + "]" for numbers in (wanted.mean, wanted.std)]
    side = f"{wanted.side} x {wanted.side} pixels" if wanted.side else "any size"
    part = f"of the middle square {wanted.crop:.6g} of the shorter side"
    if wanted.mode == "squash":
        part = f"of the middle {wanted.crop:.6g} of both sides, made square"
    return (
        f"Images are RGB of {side}: {part}, resized ({wanted.interpolation}); "
        f"then pixels in 0 to 1, less the mean {three[0]} and over the standard deviation {three[1]}."
    )


def page(
    model: nn.Module, wanted: Preprocessing, sent: Mapping[str, Any], source: str, lines: Sequence[str], why_not: str
) -> str:
    """MODEL.md: what lies here and the lines that load it.

    Args:
        model: as it is sent
        wanted: the images that it wants
        sent: what :func:`lotus.export.export` returns
        source: the model's own folder
        lines: those that load it by timm
        why_not: what timm's constructor cannot say of it; empty where it can all
    """
    cost, made = count(model), door.origin(model)
    cut = ", cut" if cost.macs < count(door.build(made["name"], made["args"], meta=True)).macs else ""
    widths = ["| block | heads | head dimension | MLP units |", "|---|---|---|---|"]
    widths += [
        f"| {place} | {f'convolution of {block.kernel} x {block.kernel}' if block.kernel else block.heads} | "
        f"{block.head_dim} | {block.hidden} |"
        for place, block in enumerate(anatomy.blocks(model, convolved=True))
    ]
    parts = [
        "# The model",
        f"{made['name']}{cut}: {cost.params:,} parameters, {cost.macs:,} multiply-accumulates an image of "
        f"{wanted.side} x {wanted.side} pixels.",
        images_told(wanted),
        "\n".join(widths),
    ]
    if lines:
        parts += ["## With timm alone", "\n".join(["```python", *lines, "```"])]
        parts.append(
            '`timm.create_model("local-dir:FOLDER", pretrained=True)` makes the same of this FOLDER, and knows its images: '
            "`timm.data.create_transform(**timm.data.resolve_model_data_config(model))`."
        )
    else:
        parts += [
            "## With LOTUS",
            f"Here {why_not}, which timm's constructor cannot say.",
            f'```python\nimport lotus\nmodel = lotus.load("{source}")  # the folder of spec.json and model.safetensors\n```',
        ]
    if sent["onnx"]:
        parts += _onnx(sent["onnx"], wanted, "batch, classes" if model.num_classes else "batch, features")
    return "\n\n".join(parts) + "\n"


def _onnx(sent: Mapping[str, Any], wanted: Preprocessing, gives: str) -> list[str]:
    pixels = sent["input"] == "uint8"
    takes = "uint8, pixels of 0 to 255 (mean and deviation are inside)" if pixels else "float32, normalized"
    return [
        "## With ONNX",
        f"Input `images` (batch, 3, {wanted.side}, {wanted.side}) {takes}; output `logits` ({gives}). Checked against torch "
        f"at batches of 1, 2 and 7: they differ by {sent['max_abs_diff']:.1e} at most. The numbers above and the names of the "
        "classes lie in the file's metadata, as JSON.",
        "```python\nimport onnxruntime\n"
        f"session = onnxruntime.InferenceSession({sent['file']!r})\n"
        '(logits,) = session.run(None, {"images": images})\n```',
    ]


def eight_bits(calibrated_on: int, top1: Sequence[float] = (), images: int | None = None) -> str:
    """What :func:`page` has to say of model.int8.onnx, once that is written.

    Args:
        calibrated_on: images
        top1: of model.onnx and of it, in %, where both were measured
        images: on how many
    """
    said = [
        "## In 8 bits",
        "`model.int8.onnx` is `model.onnx` with its weights, and what they are multiplied by, in 8 bits, calibrated on "
        f"{calibrated_on:,} images. It takes and gives the same, and has the same metadata.",
    ]
    if top1:
        whole, small = (accuracy(one, images) for one in top1)
        said.append(f"Top-1 {small}; of `model.onnx` {whole}.")
    return "\n\n".join(said) + "\n"


def hub(model: nn.Module, about: Mapping[str, Any], page: str, *, timm: bool) -> str:
    """README.md as the Hugging Face hub shows it: a YAML header, then :func:`page`. Nothing is uploaded.

    Args:
        model: as it is sent
        about: ``classes`` and ``license``, where they are known
        page: as :func:`page` gives it
        timm: whether timm alone can load it, which the hub's pages then say how to do
    """
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    header = [
        "---",
        *(["library_name: timm"] if timm else []),
        f"pipeline_tag: {task}",
        f"tags: [{task}, {'timm, ' if timm else ''}lotus]",
    ]
    if license_ := about.get("license"):
        header.append(f"license: {json.dumps(license_)}")
    top1, images = about.get("top1"), about.get("measured_on")
    reached = [] if top1 is None else [f"Top-1 {accuracy(top1, images)} on the validation images it was measured on."]
    classes = [shown(name).replace("<", "&lt;") for name in about.get("classes") or ()]
    named = (
        [f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}."] if classes else []
    )
    return "\n\n".join(["\n".join([*header, "---"]), page.rstrip(), *reached, *named]) + "\n"
