"""``lotus export``: the stage of a run, or a model alone leaves the house."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotus.cli.run import flags_of_a_run, run, run_options
from lotus.cli.shared import Verbs, tell
from selection.errors import Refused

if TYPE_CHECKING:
    import torch

    from lotus.config import Config
    from lotus.data.source import Source

_SETTINGS = ("export.onnx", "export.onnx_input", "export.int8")
_CALIBRATED, _MEASURED = 256, 5000
"""Images that show the ranges of activations, and on which both files are measured, at most."""


def add(verb: Verbs) -> None:
    out = verb(
        "export", "run the stages up to 'export' that are not done yet, or export the model in a folder", _export
    )
    run_options(out, until="export")


def _export(options: argparse.Namespace) -> int:
    """Of a run, or of the folder of a model: then into ``export`` inside of it."""
    folder = Path(options.config)
    is_run, is_model = (folder / "config.yaml").is_file(), (folder / "spec.json").is_file()
    if not folder.exists() or (folder.is_dir() and not is_run and not is_model):
        what = "neither a run nor a model of LOTUS lies there" if folder.exists() else "there is no such file or folder"
        raise Refused(
            f"{folder}: {what}. Give a config, or the folder of a run (runs/NAME) or of a model (RUN/finetune)."
        )
    if is_run or not is_model:
        return run(options)
    seen = [f"--{name}" for name in ("plain", "quiet", "json") if getattr(options, name)]
    if strange := [*flags_of_a_run(options), *seen]:
        raise Refused(f"lotus export {folder}: is a model, not a run, and takes no {strange[0]}. Leave it out.")
    return _alone(folder, options.overrides)


def _alone(folder: Path, overrides: Sequence[str]) -> int:
    """Of the model in ``folder``."""
    from lotus import export, pruning

    config = _asked(folder, overrides)
    sources = _images(config) if config.export.int8 else None
    about = pruning.spec.read(folder).get("about")
    known = about if isinstance(about, dict) else {}
    model, out = pruning.load(folder), folder / "export"
    sent = export.export(
        model, out, onnx=config.export.onnx, onnx_input=config.export.onnx_input, about=known,
        source=folder.resolve().name,
    )  # fmt: skip
    notes = sent["notes"]
    if sources is not None:
        notes = [*notes, _eight_bits(model, out, known, sources, sent["onnx"]["input"])]
    files = [sent[kind]["file"] for kind in ("timm", "onnx") if sent[kind]]
    files += ["model.int8.onnx"] if sources is not None else []
    tell(f"{out}: {', '.join([*files, 'MODEL.md', 'README.md'])}")
    for line in [*notes, *export.lines(sent["timm"], out)]:
        tell(f"  {line}")
    return 0


def _asked(folder: Path, overrides: Sequence[str]) -> Config:
    """The settings that there are for a model alone."""
    from lotus.config import read

    said = {word.partition("=")[0].strip(): word for word in overrides}
    of_images = [word for name, word in said.items() if name.startswith("data.")]
    if strange := [word for name, word in said.items() if name not in _SETTINGS and word not in of_images]:
        raise Refused(f"lotus export {folder}: is a model, not a run, and takes no {strange[0]}. Leave it out.")
    path = said.get("data.path", "").partition("=")[2]
    more = ["data.name=npz"] if path.endswith(".npz") and "data.name" not in said else []
    config = read(None, [*more, *overrides])
    if config.export.int8:
        _check_eight_bits(config, of_images)
    elif of_images:
        raise Refused(f"{of_images[0]}: images are read for 8 bits alone. Set export.int8=true, or leave it out.")
    return config


def _check_eight_bits(config: Config, of_images: Sequence[str]) -> None:
    if not of_images:
        raise Refused("export.int8: needs images that show the ranges. Say where some are: data.path=PHOTOS.")
    if not config.export.onnx:
        raise Refused("export.int8: is made of model.onnx. Set export.onnx=true, or export.int8=false.")
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        raise Refused("export.int8: needs the extra onnx: pip install 'lotus-vit[onnx]'. Or set export.int8=false.")


def _images(config: Config) -> tuple[Source, Source]:
    from lotus.data.dataset import open_data

    return open_data(config.data, learned=False)


def _eight_bits(model: Any, out: Path, about: Mapping[str, Any], sources: tuple[Source, Source], takes: str) -> str:
    """Write model.int8.onnx, and a sentence on what it is beside model.onnx."""
    from lotus import export, onnx_file

    train, val = sources
    whole, small = (out / name for name in ("model.onnx", "model.int8.onnx"))
    onnx_file.quantize(whole, small, (images for images, _ in _shown(model, about, train, _CALIBRATED, takes)))
    size = " and ".join(f"{file.stat().st_size / 1e6:.2f} MB" for file in (whole, small))
    told = f"model.onnx and model.int8.onnx: {size}"
    calibrated, count = min(_CALIBRATED, len(train)), min(_MEASURED, len(val))
    if list(about.get("classes") or ()) != list(val.classes):
        export.add_eight_bits(out, calibrated)
        return f"{told}; not measured, as the classes of {val.where} are not the model's"
    reached = [onnx_file.top1(file, _shown(model, about, val, _MEASURED, takes)) for file in (whole, small)]
    export.add_eight_bits(out, calibrated, reached, count)
    return f"{told}; top-1 {reached[0]:.2f} and {reached[1]:.2f} on {count:,} images of {val.where}"


def _shown(
    model: Any, about: Mapping[str, Any], source: Source, most: int, takes: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """At most so many images of ``source``, drawn, as the ONNX file takes them, and their labels."""
    import numpy as np
    import torch

    from lotus.data import unpacked
    from lotus.data.views import Look
    from lotus.vit.model import image_size
    from lotus.vit.preprocessing import preprocessing, resizing

    wanted = preprocessing(model)
    look = Look(
        size=image_size(model), mean=wanted.mean, std=wanted.std, crop=wanted.crop, crop_mode=wanted.mode,
        interpolation=resizing({"interpolation": wanted.interpolation, **about}),
    )  # fmt: skip
    mean, std = (torch.tensor(three).reshape(3, 1, 1) for three in (wanted.mean, wanted.std))
    rows = np.sort(np.random.default_rng(0).permutation(len(source))[:most])
    for images, labels in unpacked.batches(source, rows, look):
        if takes == "uint8":
            images = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        yield images, labels
