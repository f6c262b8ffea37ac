"""What the model is asked for: the labels, smoothed and mixed, and how far it is from them.

Legend: B batch, C classes, S side of an image in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lotus.config import Recipe
from lotus.training.distributed import World


class Objective:
    """Label smoothing, mixup, CutMix and cross-entropy, one number an image.

    Where mixup and CutMix are both on, a batch gets the one or the other with probability 1/2, one lambda for the
    batch: timm's defaults. Each image is mixed with its mirror place in the batch, as timm does it, or in a batch of an odd number,
    whose middle image would meet itself, with the one before it. An image that is alone in its batch stays as it is. A batch is that
    of all ranks, which send each other what meets. Everything random follows from (seed, epoch, step), so that a run which is taken
    up again, by however many ranks, mixes as it would have.
    """

    def __init__(self, recipe: Recipe, classes: int, seed: int) -> None:
        self.classes = classes
        self.smoothing = recipe.smoothing
        self.mixup = recipe.mixup
        self.cutmix = recipe.cutmix
        self.seed = seed

    def mix(
        self, images: Tensor, labels: Tensor, *, epoch: int, step: int, world: World = World()
    ) -> tuple[Tensor, Tensor]:
        """Images to show and targets to ask for; the images given are left as they are.

        Args:
            images: (B, 3, S, S)
            labels: (B,) int64
            epoch: from 0
            step: number of this (micro-)batch in the epoch
            world: all its ranks call, each with its B of the batch, in the order of the ranks

        Returns:
            (B, 3, S, S), the same tensor where nothing is mixed, and (B, C) float32, each row of sum 1.
        """
        targets = soft_targets(labels, self.classes, self.smoothing)
        if len(labels) * world.size < 2 or not (self.mixup or self.cutmix):
            return images, targets
        # The last numbers keep this stream apart from any other that is keyed by the same three.
        rng = np.random.default_rng([self.seed, epoch, step, 0, 0x313])
        cut = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if cut:
            height, width = images.shape[-2:]
            box = cut_box(height, width, share, int(rng.integers(height)), int(rng.integers(width)))
            images, share = cutmix(images, box, world)
        else:
            images = torch.lerp(partners(images, world), images, share)  # mixup: 1710.09412, eq. 1
        theirs = soft_targets(partners(labels, world), self.classes, self.smoothing)
        return images, torch.lerp(theirs, targets, share)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each image in nats, in float32 whatever the logits are in.

        Args:
            logits: (B, C)
            targets: (B, C) float32

        Returns:
            (B,) float32
        """
        return F.cross_entropy(logits.float(), targets, reduction="none")


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) int64 -> (B, C) float32: 1 - s + s/C at the label, s/C elsewhere (Szegedy et al., 1512.00567, section 7)."""
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def partners(batch: Tensor, world: World = World()) -> Tensor:
    """(B, ...) what each of a rank's part of the batch is mixed with: no one with itself, for a batch of at least 2."""
    if len(batch) * world.size % 2 == 0:
        return world.passed(batch, world.size - 1 - world.rank, world.size - 1 - world.rank).flip(0)
    before = world.passed(batch[-1:], (world.rank + 1) % world.size, (world.rank - 1) % world.size)
    return torch.cat([before, batch[:-1]])


def cut_box(height: int, width: int, share: float, row: int, column: int) -> tuple[int, int, int, int]:
    """A box round (row, column) that covers 1 - ``share`` of the image, less what lies outside (1905.04899, eq. 2).

    Returns:
        top, bottom, left, right; bottom and right are the first outside.
    """
    side = math.sqrt(1 - share)
    tall, wide = int(height * side), int(width * side)
    top, bottom = max(row - tall // 2, 0), min(row + (tall + 1) // 2, height)
    left, right = max(column - wide // 2, 0), min(column + (wide + 1) // 2, width)
    return top, bottom, left, right


def cutmix(images: Tensor, box: tuple[int, int, int, int], world: World = World()) -> tuple[Tensor, float]:
    """Each image with ``box`` taken from its partner in the batch, and the share that is still its own."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = partners(images[..., top:bottom, left:right], world)
    return mixed, 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
