"""The proxies of the stage ``score``: short trainings that are watched, or heads on the features of a frozen model."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lotus.config import Config, Recipe
from lotus.events import Event, Said, Step, Wrote
from lotus.files import digest, digest_of
from lotus.stage import TRAIN_FORWARDS
from lotus.stages.context import Context
from lotus.stages.fit import Images, Task, fit
from selection import npz
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.training.distributed import World

T = TypeVar("T")


@dataclass(frozen=True)
class Spent:
    """What a part of the scoring cost, in this sitting or an earlier one."""

    forwards: float = 0.0
    macs: float = 0.0
    earlier: float = 0.0
    """Seconds before this sitting."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.forwards + other.forwards, self.macs + other.macs, self.earlier + other.earlier)


Recording = Generator[Event, None, tuple[dict[str, np.ndarray], Spent]]


def by_training(context: Context, labels: np.ndarray, run_in: np.ndarray | None) -> Recording:
    """Short trainings that are watched, and those on parts of the images."""
    config = context.config
    told: list[dict[str, np.ndarray]] = []
    found: dict[str, np.ndarray] = {}
    total = Spent()
    for number in range(config.score.seeds):
        signals, spent = yield from _train_proxy(context, _proxy_seed(config, number), embed=number == 0)
        found |= {name: signals.pop(name) for name in ("embeddings", "errors") if name in signals}
        told.append(signals)
        total += spent
    found |= {name: np.stack([one[name] for one in told]) for name in told[0]}
    if run_in is not None:
        said = []
        for number, inside in enumerate(run_in):
            seed = _proxy_seed(config, config.score.seeds + number)
            signals, spent = yield from _train_proxy(context, seed, rows=np.flatnonzero(inside))
            said.append(signals["run_p_label"])
            total += spent
        found["run_p_label"] = np.stack(said)
    return found, total


def _proxy_seed(config: Config, number: int) -> int:
    """No proxy starts where the real training starts."""
    return config.seed + 1000 * (number + 1)


def _train_proxy(context: Context, seed: int, *, rows: np.ndarray | None = None, embed: bool = False) -> Recording:
    """One short training: on all images, watched (E, N), with the last layer's (N, D), (N, C) where ``embed``; or on ``rows``,
    and what it says of every image in the end (N,). One that is done is not done again when the stage is taken up."""
    from lotus.training import dynamics

    run, config, manifest, world = context.run, context.config, context.manifest(), context.world
    file, key = run.work("score") / f"{seed}.npz", digest([run.settings("score"), run.made_from("score"), seed])
    known = _recalled(file, key)
    world.barrier()  # nobody writes it before everybody has looked
    if known is not None:
        return known
    began = time.perf_counter()
    model, side = _make_proxy(context, seed)
    every = np.arange(manifest.n)
    _check_batches(model, manifest.n if rows is None else len(rows), config.score, world)
    recorder = None
    if rows is None:
        check_seen(manifest.n, config.score.epochs, world)
        recorder = dynamics.Recorder(
            manifest.n, config.score.epochs, len(manifest.classes), steps=config.score.gradients
        )
    images = Images(every if rows is None else rows, side=side)
    guests = [] if recorder is None else [dynamics.Watched(recorder)]
    task = Task("score", config.score, seed=seed, part=str(seed), evaluate=False)
    fitted, price = yield from fit(context, task, model, images, guests)
    for buffer in model.buffers():  # what batch norms saw, each rank of its own images
        if buffer.is_floating_point():
            world.mean_(buffer)
    found: dict[str, Any] = {} if recorder is None else recorder.signals()
    forwards = TRAIN_FORWARDS * fitted.images_seen
    macs = forwards * price.macs
    if embed or rows is not None:
        model = model.to(world.device)
        with context.images(run.train_beton, None, config.score, model, side=side) as loader:
            if rows is None:
                found |= dynamics.last_layer(model, loader, manifest.n, world, errors=config.score.gradients)
            else:
                correct = config.score.subsets is not None and config.score.subsets.record == "correct"
                found["run_p_label"] = dynamics.label_probability(model, loader, manifest.n, world, correct=correct)
        forwards += manifest.n
        macs += manifest.n * _macs(context, model, side)
    spent = Spent(forwards, macs, time.perf_counter() - began + fitted.earlier_seconds)
    if world.rank == 0:
        _remember(file, key, found, spent)
        shutil.rmtree(run.work("score") / str(seed), ignore_errors=True)
    return found, dataclasses.replace(spent, earlier=fitted.earlier_seconds)


def check_seen(images: int, epochs: int, world: World) -> None:
    """Refuse a proxy of one epoch that some image would sit out, since ranks share a step evenly."""
    if epochs == 1 and (rest := images % world.size):
        raise Refused(
            f"score.epochs: of {images:,} images {rest} would be in no epoch, since {world.size} ranks share a step evenly, and nothing "
            "known of them. Take 2."
        )


def _check_batches(model: nn.Module, images: int, recipe: Recipe, world: World) -> None:
    """Refuse a batch of one image where the model has batch norms, which know no variance of it."""
    from lotus.training.precision import has_batch_norms

    if not has_batch_norms(model):
        return
    parts = world.size * recipe.accumulate
    micro, tail = recipe.batch_size // parts, images % recipe.batch_size // world.size
    if 1 in (micro, tail % max(micro, 1)):
        raise Refused(
            f"score.batch_size: {recipe.batch_size} leaves a batch of one image, of which a batch norm knows no variance. "
            "Take another."
        )


def by_heads(context: Context, labels: np.ndarray, run_in: np.ndarray | None) -> Recording:
    """Heads on frozen features, watched, and those on parts of the images. Rank 0 trains them: it takes seconds."""
    import torch

    from lotus.training import linear_probe
    from lotus.training.distributed import StopFlag

    settings, classes, device = context.config.score, len(context.manifest().classes), context.world.device
    embeddings, spent = yield from _features(context)
    found: dict[str, Any] = {"embeddings": linear_probe.standardized(embeddings)}
    images, width = embeddings.shape
    trained = settings.heads * images + (0 if run_in is None else int(run_in.sum()))
    spent += Spent(macs=linear_probe.macs(trained, settings.epochs, width, classes))
    if context.world.rank:
        return found, spent
    features, own = torch.from_numpy(found["embeddings"]).to(device), torch.from_numpy(labels).to(device)
    with StopFlag() as stop:
        seeds = [_proxy_seed(context.config, number) for number in range(settings.heads)]
        found |= yield from linear_probe.watched(
            features, own, classes, settings, seeds=seeds, gradients=settings.gradients, stop=stop
        )
        if run_in is not None and settings.subsets is not None:
            seeds = [_proxy_seed(context.config, settings.heads + number) for number in range(len(run_in))]
            correct = settings.subsets.record == "correct"
            found["run_p_label"] = yield from linear_probe.on_parts(
                features, own, classes, settings, run_in=run_in, seeds=seeds, correct=correct, stop=stop
            )
    return found, spent


def _features(context: Context) -> Generator[Event, None, tuple[np.ndarray, Spent]]:
    """What the head of the frozen model reads of every image (N, D), computed once and kept in the run's folder."""
    from lotus.training import dynamics
    from lotus.training.distributed import StopFlag
    from lotus.training.precision import settled
    from lotus.vit.attention import unfuse

    run, config, manifest, world = context.run, context.config, context.manifest(), context.world
    settings = config.score.model or config.model
    key = digest([
        manifest.fingerprint, settings.model_dump(), _weights_hash(settings), config.score.side, config.model.model_dump(),
        config.score.precision, config.seed,
    ])  # fmt: skip
    known = _recalled(run.features, key)
    world.barrier()  # nobody writes it before everybody has looked
    if known is not None:
        return known[0]["embeddings"], known[1]
    began = time.perf_counter()
    model, side = _make_proxy(context, _proxy_seed(config, 0))
    model = model.to(world.device)
    if world.rank == 0 and not settings.pretrained and not settings.weights:
        cure = "Give score.model.weights or score.model.pretrained for better ones, or take score.proxy=training."
        yield Said("score", f"the features are of a model that has not learned anything yet. {cure}", "warning")
    with StopFlag() as stop, context.images(run.train_beton, None, config.score, model, side=side) as loader:
        half = settled(config.score, model, world.device, world).precision == "bf16"
        if half and world.device.type == "cpu":
            unfuse(model)
        reading = dynamics.features(model, loader, manifest.n, world, bf16=half)
        embeddings = yield from _steps(reading, -(-manifest.n // world.size), world, stop)
    spent = Spent(manifest.n, float(manifest.n) * _macs(context, model, side), time.perf_counter() - began)
    if world.rank == 0:
        _remember(run.features, key, {"embeddings": embeddings}, spent)
        yield Wrote("score", str(run.features))
    return embeddings, dataclasses.replace(spent, earlier=0.0)


def _steps(reading: Generator[int, None, T], total: int, world: World, stop: Any) -> Generator[Event, None, T]:
    """What ``reading`` returns; on the way its progress, and a wish to stop is heard."""
    from lotus.training.loop import Stopped

    while True:
        try:
            done = next(reading)
        except StopIteration as end:
            result: T = end.value
            return result
        if stop:
            raise Stopped(
                f"score: stopped ({stop.reason}) after {done:,} images. The same command begins this pass again."
            )
        if world.rank == 0:
            yield Step("score", done, total, unit="images")


def _weights_hash(settings: Any) -> str:
    """Of the file from which a model's weights come; empty where there is none."""
    if not settings.weights:
        return ""
    path = Path(settings.weights)
    try:
        return digest_of(path / "model.safetensors" if path.is_dir() else path, size=64)
    except OSError:
        return ""  # refused with its reason where it is loaded


_KEPT = "what the score stage keeps"


def _remember(file: Path, key: str, arrays: Mapping[str, np.ndarray], spent: Spent) -> None:
    npz.write(file, arrays, {"key": key, "spent": dataclasses.asdict(spent)}, kind=_KEPT, version=1)


def _recalled(file: Path, key: str) -> tuple[dict[str, np.ndarray], Spent] | None:
    """What :func:`_remember` wrote with the same key; None where nothing, something else or half of it stands."""
    try:
        arrays, about = npz.read(file, kind=_KEPT, version=1, cure="")
        return (arrays, Spent(**about["spent"])) if about["key"] == key else None
    except (Refused, KeyError, TypeError):
        return None


def _make_proxy(context: Context, seed: int) -> tuple[nn.Module, int]:
    """The proxy, the same start for the same seed, and the side of the images that it reads."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return proxy_model(context.config, len(context.manifest().classes))


def proxy_model(config: Config, classes: int, *, loaded: bool = True) -> tuple[nn.Module, int]:
    """The model of the proxy and the side of the images that it reads; without ``loaded``, only its shape is right."""
    from lotus.vit import model as door
    from lotus.vit.unmade import without_memory

    settings, place = (config.model, "model") if config.score.model is None else (config.score.model, "score.model")
    if not loaded:
        settings = settings.model_copy(update={"pretrained": False, "weights": ""})
    made = door.proxy(settings, classes, place=place)
    own = config.model.model_copy(update={"pretrained": False, "weights": ""})
    with without_memory():
        asked = config.score.side or door.side(made, 0) or door.image_size(door.create(own, classes))
    side = door.side(made, asked)
    if config.score.side and config.score.side != side:
        raise Refused(
            f"score.side: {config.score.side}, but this model reads images of {side} pixels alone. Remove it, and set "
            f"{place}.args.img_size where the model takes it."
        )
    return made, side


def _macs(context: Context, model: nn.Module, side: int) -> int:
    from lotus.vit.cost import macs

    return macs(model, side, place="model" if context.config.score.model is None else "score.model")
