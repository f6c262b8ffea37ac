"""Prune a model of your own: a timm ViT that plain PyTorch trained, cut to a third of its operations without a fine-tune.

    python examples/prune_your_model.py

LOTUS never sees the training. It needs the model, and some images to look at.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import lotus
from lotus.config import Prune
from lotus.pruning import study

KEEP = 0.35  # of the multiply-accumulates of an image


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 3, 8, 8) of mean 0 and deviation 1, and labels (N,): to train on, and to test with."""
    digits = load_digits()
    gray = (digits.images / 16).astype(np.float32)[:, None].repeat(3, axis=1)
    parts = train_test_split((gray - gray.mean()) / gray.std(), digits.target, test_size=0.3, random_state=0)
    images, test_images, labels, test_labels = map(torch.from_numpy, parts)
    return images, labels, test_images, test_labels


def trained(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Your own training stands here."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    }
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    nn.init.normal_(
        cast(Tensor, model.pos_embed), std=0.2
    )  # pictures this small want a louder position than timm's 0.02
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 20) -> dict[str, float]:
    images, labels, test_images, test_labels = data()
    model = trained(images, labels, epochs)
    batches = list(zip(images.split(128), labels.split(128)))
    reached = {"dense": accuracy(model, test_images, test_labels)}

    small = lotus.prune(model, batches, keep={"macs": KEEP})
    reached["cut"] = accuracy(small, test_images, test_labels)

    # A folder of spec.json and safetensors: what is loaded computes the same, to the last bit.
    with tempfile.TemporaryDirectory() as folder:
        lotus.save(small, Path(folder) / "small")
        again = lotus.load(Path(folder) / "small")
        assert torch.equal(again(test_images), small(test_images))

    # Measured once, cut to as many budgets as you like: here the plan is read before it is taken.
    request = Prune(keep={"macs": KEEP})
    drawn = study(model, batches, request).draw(request)
    print(drawn.text())
    reached["macs"] = drawn.after["macs"] / drawn.before["macs"]
    print(f"top-1: dense {reached['dense']:.1f} %, cut to {KEEP} of the operations {reached['cut']:.1f} %")
    return reached


if __name__ == "__main__":
    main()
