"""Token pruning in a training: the model on fewer tokens, what is told of it, and the scores that patches are dropped by."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Recipe
from lotus.events import Event, Step, Wrote
from lotus.files import digest, digest_of
from lotus.stage import named
from lotus.stages.context import Context
from selection import lottery

if TYPE_CHECKING:
    from torch import nn

    from lotus.config import Patches
    from lotus.data.patch_maps import Tickets
    from lotus.training.patch_buckets import Joint
    from lotus.vit.tokens import Tokens


@dataclass(frozen=True)
class PatchScores:
    """What the patches of all training images score, and what it took to know."""

    tickets: Tickets | None = None
    asked: int = 0
    """Images that a model was shown for it now."""
    asked_macs: float = 0.0
    left: tuple[Path, ...] = ()
    """The file that they lie in."""


def fewer_tokens(
    model: nn.Module, patches: Patches, shelves: Sequence[ModuleType], *, place: str = "train.patches"
) -> Tokens:
    """Puts ``model`` on fewer tokens while it is entered."""
    from lotus.vit import saliency
    from lotus.vit.tokens import Tokens

    alone = patches.mode == "input" and not patches.model and not patches.cached
    return Tokens(model, patches, saliency.of_images(patches.score, shelves) if alone else None, place=place)


def as_evaluated(model: nn.Module, patches: Patches | None, shelves: Sequence[ModuleType]) -> Any:
    """``model`` on as few tokens as it is measured on."""
    if patches is None or patches.evaluate == "dense":
        return contextlib.nullcontext()
    return fewer_tokens(model, patches, shelves)


def told_of_patches(
    patches: Any, tokens: Tokens, joint: Joint | None = None, rows: np.ndarray | None = None
) -> dict[str, Any]:
    """What is recorded of a training with token pruning: shares are of the tokens that the average block's MLP sees, before ``until``."""
    early = {}
    if patches.until < 1:
        tokens.keep, early = patches.keep, {"until": patches.until}
    found = {
        "mode": patches.mode,
        "keep": patches.keep,
        **early,
        "share": tokens.share(),
        "evaluated": patches.evaluate,
        "evaluated_share": tokens.share(training=False),
        "evaluated_macs": tokens.macs(training=False),
    }
    if joint is None or rows is None:
        return found
    images = np.bincount(joint.groups(rows), minlength=len(tokens.shares)).tolist()
    seen = []
    for share in tokens.shares:
        tokens.schedule(1.0, share)
        seen.append(tokens.share())
    found["share"] = float(np.average(seen, weights=images))
    found["joint"] = [{"keep": keep, "images": count} for keep, count in zip(tokens.shares, images, strict=True)]
    return found


def share_out(context: Context, patches: Patches, model: nn.Module, seed: int, *, place: str) -> Joint:
    """Shares out the patches by what ``select.score`` says of each image."""
    from lotus.training.patch_buckets import Joint

    settings = context.config.select
    scores = lottery.scored(
        context.signals(),
        score=settings.score,
        seed=context.config.seed,
        shelves=context.shelves,
        max_memory=settings.max_memory,
    )
    count: Any = model.patch_embed.num_patches  # type: ignore[union-attr]
    return Joint(scores, patches, patches=count, seed=seed, place=place)


def joint_line(joint: Joint, rows: np.ndarray) -> str:
    """How many images train on how many patches."""
    found = joint.allot(rows)
    parts = [f"{images:,} images on {count}" for images, count in zip(np.bincount(found.level), found.levels) if images]
    whole = len(rows) * int(found.levels[-1])
    return f"joint budget: {', '.join(parts)} of {found.levels[-1]} patches, {100 * found.total / whole:.2f} % of all"


def patch_scores(
    context: Context, stage: str, patches: Patches, recipe: Recipe, model: nn.Module, seed: int
) -> Generator[Event, None, PatchScores]:
    """The scores of the patches of all training images as ``model`` sees them."""
    from lotus.data import patch_maps
    from lotus.data.format import Beton
    from lotus.vit.cost import count
    from lotus.vit.model import image_size

    file, asked, made = yield from patch_file(context, stage, patches, recipe, model)
    maps, size = patch_maps.load(file, fingerprint=context.manifest().fingerprint)
    stored = Beton(context.run.train_beton)
    patch: Any = model.patch_embed.patch_size  # type: ignore[union-attr]
    found = patch_maps.Tickets(
        patch_maps.Maps(maps, size),
        stored.heights,
        stored.widths,
        context.look(image_size(model), recipe.augment, seed),
        tuple(patch),
    )
    if asked is None or not made:
        return PatchScores(found, left=(file,))
    return PatchScores(found, len(maps), float(len(maps) * count(asked).macs), (file,))


def patch_file(
    context: Context, stage: str, patches: Patches, recipe: Recipe, model: nn.Module
) -> Generator[Event, None, tuple[Path, nn.Module | None, bool]]:
    """The file of the patches' scores, made once and kept beside the .beton; the model that is asked, and whether it was now.

    Where the score reads the image alone, it is cut into patches as ``model`` cuts it.
    """
    import torch

    import lotus.pruning
    from lotus.data import patch_maps
    from lotus.data.views import CENTER
    from lotus.training.evaluation import heard
    from lotus.vit import saliency
    from lotus.vit.model import image_size

    run, manifest = context.run, context.manifest()
    folder = run.of(named(run.stages, "dense")) if patches.asks_baseline else Path(patches.model)
    asked = lotus.pruning.load(folder) if patches.model else None
    looks: Any = model if asked is None else asked
    if asked is not None:
        by = digest_of(folder / "model.safetensors")
    else:
        reads = saliency.reads(patches.score, context.shelves)
        by = digest(
            [image_size(model), list(looks.patch_embed.patch_size), context.config.seed if "rng" in reads else 0]
        )
    text = run.own_text(patches.score.name)
    own, seen = [text] if text else [], context.preprocessing()
    own += [str(seen.crop)] if seen.crop != CENTER else []
    own += [seen.interpolation, seen.mode] if seen.interpolation != "area" else []
    file = run.data / f"patches-{digest([manifest.fingerprint, patches.score.model_dump(), by, *own])}.npz"
    made = bool(context.world.main(not patch_maps.stands(file)))  # nobody makes it before rank 0 has looked
    if context.world.rank == 0 and made:
        side = looks.patch_embed.grid_size
        maps, mass, done = np.zeros((manifest.n, *side), np.uint8), patch_maps.Mass(int(np.prod(side))), 0
        ties = torch.Generator().manual_seed(0)  # not the run's: the file serves all seeds
        with context.alone().images(run.train_beton, None, recipe, looks) as loader:
            batches = heard(loader.epoch(0))
            if asked is not None:
                asked = asked.to(context.world.device)
                scored = saliency.by_model(patches.score, asked, batches, context.shelves)
            else:
                patch = tuple(looks.patch_embed.patch_size)
                scored = saliency.by_images(patches.score, patch, batches, context.shelves, seed=context.config.seed)
            for rows, scores in scored:
                maps[rows.numpy()] = patch_maps.ranks(scores, ties).view(-1, *side).numpy()
                mass.add(scores)
                done += len(rows)
                yield Step(stage, done, manifest.n, unit="images asked for their patches")
        patch_maps.save(file, maps, size=image_size(looks), fingerprint=manifest.fingerprint, mass=mass.curve())
        yield Wrote(stage, str(file))
    context.share()
    return file, asked, made
