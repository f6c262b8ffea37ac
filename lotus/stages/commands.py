"""What is asked of a run's folder outside of the order of its stages: the ticket of patches, what a model reaches."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lotus import files
from lotus.config import Config, Data, Model, Patches
from lotus.events import Event, Said, Wrote
from lotus.run import Run
from lotus.stages import prepare
from lotus.stages.context import Context
from lotus.stages.order import go
from lotus.stages.patches import as_evaluated, patch_file
from lotus.stages.shelf import run_of
from selection.errors import Refused


def patch_ticket(
    config: Config,
    *,
    score: str = "",
    model: str = "",
    keep: float | None = None,
    prepared: bool = False,
    picture: Path | None = None,
    shown: int = 12,
    shelves: Sequence[ModuleType] = (),
) -> Generator[Event, None, dict[str, Any]]:
    """Make the patches' scores of a run's images, or find them made, and tell what is in them.

    Args:
        config: of the run
        score: instead of that in ``train.patches``, without options
        model: likewise, the folder of the model to ask
        keep: likewise
        prepared: the .beton in ``data.folder`` is all that there is: do not look at what it was made from
        picture: a contact sheet of ``shown`` images goes there
        shelves: modules with scores of the user's own

    Raises:
        Refused: an unknown score; a model that is missing or not asked; no images.
    """
    from lotus.data import patch_maps
    from lotus.vit.token_plan import kept

    request = _wanted(config, score, model, keep, shelves)
    share, ask = request.keep, request.model
    if not prepared:
        yield from go(config, until=prepare.STAGE.name, shelves=shelves)
    context = Context.open(run_of(config, shelves), shelves).alone()
    manifest = context.manifest()
    plain = config.model.model_copy(update={"pretrained": False, "weights": ""})
    # Where no config says which model will train, one is meant that cuts images into patches as the one that is asked does.
    trained = _model(plain, len(manifest.classes), ask if prepared else "")
    if prepared and not ask and config.model == Model():
        yield Said(
            "patches",
            f"no config says which model will train: the images are cut into patches as {plain.name} cuts them. Name another: "
            "model.name=NAME model.args.img_size=SIDE.",
            level="warning",
        )
    file, _, made = yield from patch_file(context, "patches", request, config.train, trained)
    maps, asked = patch_maps.load(file, fingerprint=manifest.fingerprint)
    mass = patch_maps.load_mass(file)
    count = int(trained.patch_embed.num_patches)
    mean = maps.mean(0) / 255
    stays = kept(count, share)
    told = {
        "file": str(file), "made": made, "score": request.score.name, "model": ask, "images": len(maps), "keep": share,
        "kept": stays, "of": count, "cut_as": "" if ask else plain.name, "patch": list(trained.patch_embed.patch_size), "mean_map": mean.round(4).tolist(),
        "mass": None if mass is None else float(mass[kept(len(mass), share) - 1]),
    }  # fmt: skip
    if picture is not None:
        _draw_ticket(context, told, maps, asked, trained, picture, shown)
        yield Wrote("patches", str(picture))
        told["picture"] = str(picture)
    return told


def _model(request: Model, classes: int, folder: str) -> Any:
    """The model in ``folder``; where that is empty a new one."""
    import lotus.pruning
    from lotus.vit.model import create

    return lotus.pruning.load(folder) if folder else create(request, classes)


def _wanted(config: Config, score: str, model: str, keep: float | None, shelves: Sequence[ModuleType]) -> Patches:
    """How patches are to be scored and kept: as ``train.patches`` has it, but for what was said instead.

    Raises:
        Refused: an unknown score; a model that is missing or not asked; a part that is none.
    """
    from lotus.config import Method
    from lotus.vit import saliency

    own = config.train.patches
    request = own if own is not None and own.mode == "input" else Patches(mode="input", keep=own.keep if own else 0.7)
    method = Method(name=score) if score else request.score
    asks = saliency.reads_a_model(method, shelves, place="--score")
    ask = model or (request.model if asks else "")
    if asks and not ask:
        raise Refused(f"--score {method.name}: it reads a model. Name one that LOTUS wrote with --model FOLDER.")
    if not asks and ask:
        raise Refused(f"--model {ask}: {method.name!r} reads the image alone and asks no model. Leave it out.")
    share = request.keep if keep is None else keep
    if not 0 < share <= 1:
        raise Refused(f"--keep: the fraction that stays lies in (0, 1], not {share:g}.")
    return request.model_copy(update={"score": method, "model": ask, "cached": not asks, "keep": share})


def _draw_ticket(
    context: Context, told: Mapping[str, Any], maps: np.ndarray, asked: int, trained: Any, picture: Path, shown: int
) -> None:
    """The contact sheet: images of as many classes as there is room for, as the model that trains will see them unaugmented."""
    import torch

    from lotus.data import beton, patch_maps
    from lotus.data.format import Beton
    from lotus.report import contact
    from lotus.vit.model import image_size
    from lotus.vit.token_ops import top

    run, manifest, size = context.run, context.manifest(), image_size(trained)
    labels, stored = beton.labels(run.train_beton), Beton(run.train_beton)
    rng = np.random.default_rng(context.config.seed)
    mixed = rng.permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)  # how many of its class come before an image
    for label in np.unique(labels):
        mine = mixed[labels[mixed] == label]
        turn[mine] = np.arange(len(mine))
    rows = np.sort(np.lexsort((labels, turn))[:shown])
    held = patch_maps.Tickets(
        patch_maps.Maps(maps, asked), stored.heights, stored.widths, context.look(size, None, 0), tuple(told["patch"])
    )
    scores = held.pooled(held.seen(torch.from_numpy(rows), 0))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top(scores, told["kept"]), True)
    with context.images(run.train_beton, rows, context.config.train, trained) as loader:
        images = torch.cat([context.pixels(batch.images) for batch in loader.epoch(0)]).permute(0, 2, 3, 1).numpy()
    grid = tuple(trained.patch_embed.grid_size)
    by = f"{told['score']} of {told['model']}" if told["model"] else told["score"]
    lines = [
        f"Patches by {by}",
        f"keep {told['keep']:g}: {told['kept']} of {told['of']} patches of {told['patch'][0]} x {told['patch'][1]} pixels",
        f"{told['images']:,} images; the kept part has {100 * told['mass']:.1f} % of the score" if told["mass"] else "",
        "On the left, the mean over all images: the darker, the sooner kept.",
    ]
    names = [f"{manifest.classes[labels[row]]}, row {row}" for row in rows]
    drawn = contact.sheet(
        images, kept.view(-1, *grid).numpy(), names, maps.mean(0) / 255, [line for line in lines if line]
    )
    try:
        with files.whole(picture) as beside:
            drawn.save(beside)
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{picture}: cannot be written ({error}). Give a file like patches.png.") from None


def evaluate_model(config: Config, which: str, shelves: Sequence[ModuleType] = ()) -> dict[str, float]:
    """Measure a model of the run, by the stage that left it, or of any folder on the validation images; one of the
    run dense or sparse as its training was to be evaluated (``patches.evaluate``).

    Where the config's ``data`` is not what the run was prepared from, those images are read for this once and thrown away; they
    are normalized as the run's own, and the run stays as it is.

    Raises:
        Refused: no such model, or no validation images yet; other images of other classes.
    """
    import lotus.pruning
    from lotus.data import beton
    from lotus.training import loop
    from lotus.vit.cost import count

    run = run_of(config, shelves)
    folder = run.models().get(which)
    if folder is None and not Path(which).is_dir():
        raise Refused(f"--model {which}: no such folder. Give {', '.join(run.models())}, or the folder of a model.")
    if folder is not None:
        run.check_whole([which])
    model = lotus.pruning.load(folder or Path(which))
    context = dataclasses.replace(Context.open(run, shelves), as_of=None if folder is not None else Path(which))
    classes = len(context.manifest().classes)
    if model.num_classes != classes:
        raise Refused(f"--model {which}: it tells {model.num_classes} classes apart, and the data has {classes}.")
    _check_names(which, lotus.pruning.spec.read(folder or Path(which)).get("about"), context.manifest().classes)
    patches = run.stages[which].measured_on(config) if folder is not None else None
    model = model.to(context.world.device)
    cost = count(model)
    own = _prepared_data(run)
    if own == config.data:
        beton.verify(run.val_beton)
    with (
        contextlib.nullcontext(run.val_beton) if own == config.data else _asked_images(context) as images,
        context.images(images, None, config.train, model) as loader,
        as_evaluated(model, patches, shelves) as tokens,
    ):
        measured = loop.evaluate(model, loader, context.world)
        macs = cost.macs if tokens is None else tokens.macs(training=False)
    run = run_of(config.model_copy(update={"data": own}), shelves)
    older = which in run.outdated(run.plan())
    return {**measured, "params": cost.params, "macs": macs, "outdated": older, "own_data": own == config.data}


def _check_names(which: str, about: Any, classes: Sequence[str]) -> None:
    """Refuse a model that counts its classes otherwise than the data, where its folder knows their names."""
    names = about.get("classes") if isinstance(about, dict) else None
    for one, other in zip(names or (), classes):
        if one != other:
            raise Refused(
                f"--model {which}: knows other classes than the data, or in another order: {one!r} where the data has {other!r}. "
                "Measure it on images of its own classes."
            )


def _prepared_data(run: Run) -> Data:
    """What the run's images were prepared from; where that is not known, what its config has."""
    record = run.record(prepare.STAGE.name)
    if record is None:
        return run.config.data
    made = {name: record.settings[f"data.{name}"] for name in Data.model_fields if f"data.{name}" in record.settings}
    return Data.model_validate({**run.config.data.model_dump(), **made})


@contextlib.contextmanager
def _asked_images(context: Context) -> Iterator[Path]:
    """The validation images that the config asks for, as a .beton of their own for as long as this is entered."""
    from lotus.data import beton
    from lotus.data.dataset import open_data
    from lotus.data.loader import writer

    folder = context.run.folder / ".evaluate"
    _, val = open_data(context.config.data, context.shelves)
    if val.classes != context.manifest().classes:
        raise Refused(
            f"data: {val.where} has the classes {_few(val.classes)}, and the run {_few(context.manifest().classes)}."
        )
    try:
        if context.world.rank == 0:
            for _ in beton.prepare(val, folder / "val.beton", context.config.data, choose=writer, anew=True):
                pass
        context.world.barrier()  # nobody reads it before it is written
        yield folder / "val.beton"
        context.world.barrier()
    finally:
        if context.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
