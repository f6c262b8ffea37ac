"""What every stage has at hand: the run, the other ranks, the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config, Recipe
from lotus.run import Run
from lotus.shelves import known

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lotus.config import Augment
    from lotus.data.beton import Manifest
    from lotus.data.loader import Loader
    from lotus.data.sample_plan import SamplePlan
    from lotus.data.views import Look
    from lotus.stages.hosts import Hosts
    from lotus.training.distributed import World
    from lotus.vit.preprocessing import Preprocessing
    from selection.signals import Signals

CALIBRATION = 7
"""Stream of chance for the choice of calibration images: no other draw shares it."""

PARTS = 8
"""Likewise for the parts of the images that ``score.subsets`` trains on."""

HELD_OUT = 11
"""Stream of chance for the images that a search is judged by."""


@dataclass
class Context:
    """What every stage has at hand."""

    run: Run
    world: World
    shelves: Sequence[ModuleType]
    """Beside LOTUS' own: those that are installed, and the user's files."""
    anew: bool = False
    """The data too is to be written again, whatever stands."""
    hosts: Hosts | None = None
    """The hosts of several ranks; None: one process, or nobody has looked yet."""
    as_of: Path | None = None
    """Folder of a model from elsewhere that is looked at: images are normalized as it wants them."""

    @classmethod
    def open(cls, run: Run, shelves: Sequence[ModuleType]) -> Context:
        """Joins the other ranks, on the device of the config."""
        from lotus.training.distributed import start

        return cls(run, start(run.config.device), known(shelves))

    @property
    def config(self) -> Config:
        return self.run.config

    def share(self) -> None:
        """Wait for all ranks; what rank 0 has written is then seen by all hosts."""
        if self.hosts is not None:
            self.hosts.share()
        else:
            self.world.barrier()

    def alone(self) -> Context:
        """For a stage that one rank does while the others wait."""
        return dataclasses.replace(self, world=dataclasses.replace(self.world, rank=0, size=1))

    def manifest(self) -> Manifest:
        from lotus.data.beton import Manifest

        return Manifest.load(self.run.train_beton)

    def signals(self) -> Signals:
        """What the proxy left; labels alone where nothing else is read."""
        from lotus.data import beton
        from selection.signals import Signals

        if self.run.needs_proxy:
            return Signals.load(self.run.signals, only=self.run.reads(self.shelves))
        manifest = self.manifest()
        known = {"labels": beton.labels(self.run.train_beton)}
        return Signals(known, classes=manifest.classes, fingerprint=manifest.fingerprint)

    def images(
        self,
        file: Path,
        rows: np.ndarray | None,
        recipe: Recipe,
        model: nn.Module,
        *,
        side: int | None = None,
        keep: bool = False,
    ) -> Any:
        """A loader that goes through ``rows`` (all, for None) in order, without augmentation; ``keep`` is of one that does so often."""
        from lotus.data import beton
        from lotus.data.sample_plan import SamplePlan
        from lotus.vit.model import image_size

        if rows is None:
            rows = np.arange(beton.Manifest.load(file).n)
        order = SamplePlan.evaluation(rows, batch_size=recipe.batch_size, world=self.world.size, rank=self.world.rank)
        return self.loader(
            file,
            order,
            size=image_size(model) if side is None else side,
            augment=None,
            seed=self.config.seed,
            keep=keep,
        )

    def loader(
        self, file: Path, order: SamplePlan, *, size: int, augment: Augment | None, seed: int, keep: bool = False
    ) -> Loader:
        """``file`` in an order, normalized as the training images are; decoded images stay, where that is to be kept and they may."""
        from lotus.data.loader import open_loader

        look, data = self.look(size, augment, seed), self.config.data
        keep = keep and data.keep_decoded
        return open_loader(
            file, order, look, device=self.world.device, kind=data.loader, workers=data.workers, keep=keep
        )

    def look(self, size: int, augment: Augment | None, seed: int) -> Look:
        """How a model of that size sees the images."""
        from lotus.data.views import Look

        pixels = self.preprocessing()
        return Look(
            size=size, augment=augment, seed=seed, mean=pixels.mean, std=pixels.std,
            crop=pixels.crop, interpolation=pixels.interpolation, crop_mode=pixels.mode,
        )  # fmt: skip

    def pixels(self, images: Tensor) -> Tensor:
        """Bytes of normalized images (B, 3, S, S), as :meth:`loader` gives them, on the CPU."""
        import torch

        how = self.preprocessing()
        mean, std = (torch.tensor(three, dtype=torch.float32).reshape(3, 1, 1) for three in (how.mean, how.std))
        return ((images.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def new_model(self) -> nn.Module:
        """The dense ViT of the config, the same start for the same seed."""
        import torch

        from lotus.stages.given import model_of

        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            names = self.manifest().classes
            return model_of(self.config.model, len(names), names=names)

    def preprocessing(self) -> Preprocessing:
        """How images are normalized, and looked at in evaluation, as ``data.normalize``, ``crop`` and ``interpolation`` say: as the
        weights want it where there are some, else by the data, 7/8 of it, by area."""
        from lotus.data.views import CENTER
        from lotus.pruning.spec import images_of
        from lotus.stages.given import preprocessing_of
        from lotus.vit.preprocessing import Preprocessing

        data, model, asked = self.config.data, self.config.model, self.config.data.normalize
        if self.as_of is not None and {"mean", "std"} <= images_of(self.as_of).keys():
            asked, model = "weights", model.model_copy(update={"weights": str(self.as_of), "pretrained": False})
        known = preprocessing_of(model) if model.weights or model.pretrained else None
        if isinstance(asked, tuple):
            mean, std = asked
        elif asked == "weights" and known is not None:
            mean, std = known.mean, known.std
        else:
            mean, std = self.manifest().mean, self.manifest().std
        made = (known or Preprocessing(mean, std, "area", CENTER))._replace(mean=mean, std=std)
        crop, how = data.crop, data.interpolation
        return made._replace(
            crop=made.crop if isinstance(crop, str) else crop,
            interpolation=made.interpolation if how == "weights" else how,
        )
