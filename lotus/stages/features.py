"""``lotus select --features MODEL PHOTOS``: embeddings of pictures, by any timm model or one of LOTUS, to select by.

Letters: N pictures, D width of an embedding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lotus.config import Model
from lotus.data import folders, pictures
from lotus.data.source import Source, digest, without
from lotus.events import Began, Event, Said, Wrote, watched
from selection import atomic_files
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.views import Look

PLACE = "--features"


class Job(NamedTuple):
    """Whose features of what, and where they go."""

    model: str
    """A timm name (with its published weights), a folder of LOTUS or of the hub, or ``NAME=FILE`` with weights of one's own."""
    photos: str
    """A folder of class folders, with ``train`` in it or not, or of pictures alone."""
    out: str
    """A .npz: ``embeddings``, ``paths``, ``fingerprint``, and ``labels`` with ``classes`` where there are folders of classes."""
    batch: int = 64


def check(job: Job) -> None:
    """Before the work: whether it can be written.

    Raises:
        Refused: it cannot, or there is something already, which may have taken hours.
    """
    atomic_files.check(job.out)
    if not job.out.endswith(".npz"):
        raise Refused(f"--embeddings {job.out}: embeddings are written as .npz. Give such a name.")
    if Path(job.out).exists():
        raise Refused(
            f"--embeddings {job.out}: is there already. Select from it (lotus select {job.out} ...), or give another name."
        )


def make(job: Job) -> Iterator[Event]:
    """Go through all pictures once; yields what happens. Those that cannot be read are left out, as ``data.damaged: skip`` does.

    Raises:
        Refused: what the user can mend: a name, weights that do not fit, pictures of which none can be read.
    """
    check(job)
    source, labeled = pictures_of(Path(job.photos))
    yield Began("features", f"{len(source):,} pictures by {job.model}")
    model, look = _opened(job.model)
    if source.note:
        yield Said("features", source.note)
    damaged: dict[int, str] = {}
    found = yield from watched(
        "features", len(source), lambda progress: _embedded(model, source, look, job.batch, progress, damaged)
    )
    gone = sorted(damaged)
    if gone:
        yield Said("features", _damaged_told(source, gone[0], damaged), level="warning")
    stay = np.setdiff1d(np.arange(len(source)), gone)
    arrays: dict[str, Any] = {
        "embeddings": found,
        "paths": np.array([os.path.relpath(source.name(row), source.root) for row in stay.tolist()]),
        "fingerprint": np.array(without(source.fingerprint, [source.name(row) for row in gone])),
    }
    if labeled:
        arrays |= {"labels": source.labels[stay], "classes": np.array(source.classes)}
    with atomic_files.opened(job.out) as file:
        np.savez(file, **arrays)
    yield Wrote("features", job.out)


def _damaged_told(source: Source, first: int, damaged: Mapping[int, str]) -> str:
    """That pictures are left out.

    Raises:
        Refused: all of them are.
    """
    what = f"{source.name(first)}: cannot be read ({damaged[first]})"
    if len(damaged) == len(source):
        raise Refused(f"{what}, and no other picture can. Give a folder of pictures.")
    return (
        f"{what}: of {len(source):,} pictures {len(damaged):,} {'is' if len(damaged) == 1 else 'are'} left out, as a run does with "
        "data.damaged=skip; lotus inspect lists them"
    )


def pictures_of(root: Path) -> tuple[Source, bool]:
    """All pictures of a folder, or of its ``train`` folder, and whether folders of classes label them.

    Raises:
        Refused: it is no folder, or no picture is in it.
    """
    if not root.is_dir():
        raise Refused(
            f"{root}: {'is a file' if root.exists() else 'does not exist'}. {PLACE} wants a folder of pictures."
        )
    home = folders.part(root, folders.TRAIN) or root
    loose = sorted(
        entry.path for entry in os.scandir(home)
        if entry.is_file() and not entry.name.startswith(".")
        and os.path.splitext(entry.name)[1].lower() in pictures.SUFFIXES
    )  # fmt: skip
    if loose:
        return _flat(home, loose), False
    return folders.folder(home), True


def _flat(root: Path, found: list[str]) -> Source:
    sizes = np.array([os.stat(file).st_size for file in found])
    names = [os.path.relpath(file, root) for file in found]
    return Source(
        labels=np.zeros(len(found), np.int64), classes=("all",), read=lambda i: pictures.read(found[i]),
        name=lambda i: found[i], fingerprint=digest(names, sizes), where=str(root), root=str(root),
        note=f"{root} holds pictures beside its folders, or none: they have no labels, and only they are looked at",
    )  # fmt: skip


def _opened(asked: str) -> tuple[Any, Look]:
    """The model in eval mode on its device, and how it looks at images."""
    import torch

    from lotus.data.views import Look
    from lotus.pruning import spec
    from lotus.vit.model import image_size
    from lotus.vit.preprocessing import preprocessing, resizing

    try:
        model = _model(asked)
    except Refused as error:
        told = str(error).replace(f"{PLACE}.weights=FILE", f"{PLACE} NAME=FILE").replace(f"{PLACE}.name", PLACE)
        told = told.replace(f"{PLACE}.pretrained=false ", "")
        raise Refused(told.replace(f"{PLACE}.weights", PLACE)) from None
    for part in ("forward_features", "forward_head"):
        if not hasattr(model, part):
            raise Refused(f"{PLACE} {asked}: has no {part}, as timm's models have. Take one of timm or of LOTUS.")
    wanted = preprocessing(model)
    ours = spec.read(asked).get("about") if (Path(asked) / spec.SPEC).is_file() else None
    about = ours if isinstance(ours, dict) else {"resize": wanted.interpolation}
    look = Look(
        size=wanted.side or image_size(model), mean=wanted.mean, std=wanted.std, crop=wanted.crop, crop_mode=wanted.mode,
        interpolation=resizing({"interpolation": wanted.interpolation, **about}),
    )  # fmt: skip
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), look


def _model(asked: str) -> Any:
    from lotus.vit import model as door
    from lotus.vit import zoo

    name, _, file = asked.partition("=")
    if not file and Path(asked).is_file():
        raise Refused(f"{PLACE} {asked}: are weights. Say of which model: {PLACE} NAME={asked}.")
    if not file and (Path(asked) / "spec.json").is_file():
        import lotus.pruning

        return lotus.pruning.load(asked)
    if file and zoo.other_kind(zoo.architecture(name, PLACE, any_kind=True)):
        with warnings.catch_warnings(action="ignore"):  # of a head that starts anew, which nobody asks
            return door.proxy(Model(name=name, weights=file), 2, place=PLACE)
    if file or Path(asked).is_dir():
        return door.adopt(name if file else Model().name, {}, file or asked, place=PLACE)[0]
    return door.proxy(Model(name=name, pretrained=True), 2, place=PLACE)


def _embedded(
    model: Any, source: Source, look: Look, batch: int, progress: Callable[[int], None], damaged: dict[int, str]
) -> np.ndarray:
    """(N, D) float16: what the head reads of each picture, seen as in evaluation; of those that are not ``damaged``, which is told
    here."""
    import torch

    from lotus.data import unpacked

    device = next(model.parameters()).device
    rows, found, done = np.arange(len(source)), [], 0
    most = float(np.finfo(np.float16).max)
    for images, _ in unpacked.batches(source, rows, look, batch=batch, damaged=damaged):
        with torch.no_grad():
            tokens = model.forward_features(images.to(device))
            features = model.forward_head(tokens, pre_logits=True).flatten(1).float()  # (B, D)
        found.append(features.clamp(-most, most).half().cpu().numpy())
        done += len(images)
        progress(done + len(damaged))
    return np.concatenate(found) if found else np.zeros((0, 0), np.float16)
