"""What a model says of pictures: class and probability. Reads a folder that LOTUS wrote, or a model.onnx with what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data import folders, pictures
from lotus.data.views import CENTER, View
from selection.errors import Refused, reason

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_NO_CLASSES = (
    "{}: has no classifier, and names no class of a picture. Train one on it: lotus finetune FOLDER data.path=PHOTOS."
)


@dataclass(frozen=True)
class Predictor:
    """A model with what it wants of its images."""

    run: Callable[[Bytes], Floats]
    """Pixels (B, S, S, 3) to logits (B, C)."""
    side: int
    crop: float
    """Fraction of the shorter side that is looked at."""
    how: str
    """How that is resized: ``area``, as what LOTUS trained was measured, or a filter of timm's."""
    mode: str
    """timm's ``crop_mode``."""
    classes: tuple[str, ...]
    """Empty where nobody told their names: then their numbers."""


@dataclass(frozen=True)
class Answer:
    """What is said of one picture; ``fault`` where it cannot be read."""

    file: str
    label: str = ""
    probability: float = 0.0
    fault: str = ""


def open_model(path: str | Path) -> Predictor:
    """The model at ``path``: a folder of spec.json, a folder with a model.onnx, or the .onnx itself.

    Raises:
        Refused: there is none, or an .onnx that says nothing of its images.
    """
    path = Path(path)
    if (path / "spec.json").is_file():
        return _of_torch(path)
    file = path / "model.onnx" if path.is_dir() else path
    if file.suffix == ".onnx" and file.is_file():
        return _of_onnx(file)
    if not path.exists():
        raise Refused(f"{path}: there is no such model. Give the folder of a run or of a model, or a model.onnx.")
    raise Refused(
        f"{path}: has no spec.json and no model.onnx. Give the folder of a run or of a model, or a model.onnx."
    )


def _of_torch(folder: Path) -> Predictor:
    import torch

    import lotus.pruning
    from lotus.vit.model import image_size
    from lotus.vit.preprocessing import preprocessing

    about = lotus.pruning.spec.read(folder).get("about")
    model: Any = lotus.pruning.load(folder)
    _check_classifies(model.num_classes, folder)
    wanted = preprocessing(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    mean, std = (np.array(three, np.float32) for three in (wanted.mean, wanted.std))

    def run(pixels: Bytes) -> Floats:
        images = torch.from_numpy(_normalized(pixels, mean, std)).to(device)
        with torch.no_grad():
            return model(images).float().cpu().numpy()

    how = _how(wanted.interpolation, about)
    names = tuple(model.pretrained_cfg.get("label_names", ()))
    return Predictor(run, image_size(model), wanted.crop, how, wanted.mode, names)


def _how(interpolation: str, about: Any) -> str:
    """As evaluation does it, by what lies beside the model; timm's word where that is not by area."""
    from lotus.vit.preprocessing import resizing

    known = about if isinstance(about, Mapping) else {}
    return "area" if resizing({"interpolation": interpolation, **known}) == "area" else interpolation


def _of_onnx(file: Path) -> Predictor:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise Refused(f"{file}: needs the extra onnx: pip install 'lotus-vit[onnx]'.") from None
    from lotus import onnx_file

    try:
        session = onnx_file.opened(file)
    except Exception as error:  # a file from elsewhere may break its parser in any way
        raise Refused(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}). Is it whole?") from None
    about = onnx_file.metadata_of(session)
    _check_classifies(about.get("num_classes"), file)
    try:
        mean, std = (np.array([float(one) for one in about[name]], np.float32).reshape(3) for name in ("mean", "std"))
        side, crop, pixels_in = int(about["side"]), float(about.get("crop", CENTER)), about.get("input") == "uint8"
    except (KeyError, TypeError, ValueError):
        raise Refused(
            f"{file}: says nothing of the images that it wants. Give one that this LOTUS exported: lotus export FOLDER."
        ) from None

    def run(pixels: Bytes) -> Floats:
        given = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if pixels_in else _normalized(pixels, mean, std)
        (logits,) = session.run(None, {"images": given})
        return logits

    how = _how(str(about.get("interpolation", "bilinear")), about)
    mode = "squash" if about.get("crop_mode") == "squash" else "center"
    return Predictor(run, side, crop, how, mode, tuple(str(name) for name in about.get("classes", ())))


def _check_classifies(classes: Any, place: Path) -> None:
    """Refuse a backbone, whose features are no logits."""
    if classes == 0:
        raise Refused(
            f"{place}: has no classifier, and so no word for a picture. Train one: lotus finetune FOLDER data.path=PHOTOS."
        )


def _normalized(pixels: Bytes, mean: Floats, std: Floats) -> Floats:
    return np.ascontiguousarray((((pixels / np.float32(255)) - mean) / std).transpose(0, 3, 1, 2), dtype=np.float32)


def files_of(places: Sequence[str]) -> list[Path]:
    """The pictures at ``places``: files as they are named, and all in a folder, sorted.

    Raises:
        Refused: nothing is at one, or a folder holds no picture.
    """
    files: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise Refused(f"{place}: there is no such picture or folder. Give a picture, or a folder of them.")
        here = [place]
        if place.is_dir():
            here = sorted(file for file in place.rglob("*") if _is_picture(file, place))
        if not here:
            raise Refused(f"{place}: no pictures are in it. {folders.unread(place) or 'Give a folder that has some'}.")
        files += here
    return files


def _is_picture(file: Path, root: Path) -> bool:
    """By its ending; a link to nowhere or a pipe too, which is told of. Hidden files and folders are passed over, as in a data set."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in pictures.SUFFIXES and not hidden and not file.is_dir()


def predict(model: Predictor, files: Sequence[Path], *, batch: int = 64) -> Iterator[Answer]:
    """An answer a file, in order; a picture that cannot be read gets its fault."""
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        seen = [_seen(file, model) for file in part]
        whole = [one for one in seen if not isinstance(one, str)]
        logits = model.run(np.stack(whole)) if whole else np.empty((0, 1), np.float32)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        rows = iter(powers / powers.sum(axis=1, keepdims=True))  # softmax
        for file, one in zip(part, seen, strict=True):
            if isinstance(one, str):
                yield Answer(str(file), fault=one)
                continue
            row = next(rows)
            best = int(row.argmax())
            yield Answer(str(file), model.classes[best] if best < len(model.classes) else str(best), float(row[best]))


def _seen(file: Path, model: Predictor) -> Bytes | str:
    """The middle of a picture at the model's side, as evaluation and timm see it; or why it cannot be read."""
    try:
        pixels = pictures.read(file)
    except Exception as error:  # whatever a damaged picture makes its reader raise
        return reason(error)
    if model.how != "area":
        return pictures.middle(pixels, model.side, model.crop, model.how, model.mode)
    from lotus.data.unpacked import seen

    return seen(pixels, View(size=model.side, crop=model.crop))
