"""Who judges the labels: a small convolutional network, trained on the folder itself for a minute or two.

A label that is wrong is learned late or never, so its margin stays low while the network learns (AUM, Pleiss et al., NeurIPS 2020).
The network is of the kind that learns CIFAR-10 fastest (Jordan, arXiv:2404.00498): a fixed first layer of whitened patches, then
few convolutions, trained by SGD with momentum on mirrored and shifted pictures.

Of a few thousand pictures it remembers what it should learn. There two networks are asked, and a kernel regression of the label
on the pixels, which tells of each picture by all others: it counts by the odds at which it is right (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lotus.data import unpacked
from lotus.data.source import Source
from lotus.data.views import Look
from selection.errors import Refused

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

PATCH, STEM = 4, 32
"""Side of the first layer's patches, and how many of their principal components it keeps."""
WIDTHS = (24, 64, 96)
SEEN, EPOCHS = 80_000, (4, 40)
"""Pictures that are looked at in training at least, and how often each is, at least and at most."""
LR, MOMENTUM, DECAY, SMOOTHING = 0.1, 0.9, 5e-4, 0.1
PIXELS = 4000
"""Pictures up to which their pixels are asked too: what that takes rises with the third power."""
RIDGES = (1e-2, 1e-1, 1.0)
WARM = 0.2
"""Fraction of the training in which the rate rises; then it falls to nothing."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What the network says of N pictures."""

    probabilities: Floats
    """(N, C) after the training."""
    margins: Floats
    """(N,) logit of the label less the highest other one, of its mean in training and the end's the mean; low is bad. Up to
    :data:`PIXELS` pictures that by its spread and what their pixels say by its own, added."""
    features: Floats
    """(N, D) of its last layer but one."""


def judge(
    small: npt.NDArray[np.uint8],
    labels: Rows,
    classes: int,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda *_: None,
) -> Judged:
    """What is believed of pictures (N, S, S, 3) with labels (N,), by networks that are trained on them and, where they are few, by
    their pixels.

    Args:
        small: uint8
        classes: C
        seed: of the first network; a second one has the next
        say: is told when an epoch begins.
    """
    if len(small) > PIXELS:
        return one(small, labels, classes, seed=seed, say=say)
    first, second = (one(small, labels, classes, seed=number, say=say) for number in (seed, seed + 1))
    target, told = torch.from_numpy(labels), by_pixels(small, labels, classes)
    right = float((told.argmax(1) == target).float().mean())
    over = max(0.0, (right - 1 / classes) / (1 - 1 / classes))  # chance
    odds = over / max(1 - over, 0.05)
    margins, pixels = torch.from_numpy(first.margins + second.margins), _margins(told, target)
    clipped = told.clamp(min=1e-6).numpy()
    shares = clipped / clipped.sum(1, keepdims=True)
    probabilities = (first.probabilities + second.probabilities + 2 * odds * shares) / (2 + 2 * odds)
    return Judged(
        probabilities.astype(np.float32), (_by_spread(margins) + odds * _by_spread(pixels)).numpy(), first.features
    )


def _by_spread(margins: Tensor) -> Tensor:
    return margins / margins.std().clamp(min=1e-6)


def one(
    small: npt.NDArray[np.uint8],
    labels: Rows,
    classes: int,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda *_: None,
) -> Judged:
    """Train a network on pictures (N, S, S, 3) with labels (N,), and say what it believes of each.

    Args:
        small: uint8
        classes: C
        seed: of the weights and the order
        say: is told when an epoch begins.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pixels, target = torch.from_numpy(small), torch.from_numpy(labels)
        some = pixels[torch.randperm(len(pixels))[:3000]].float().to(device)
        mean, std = some.mean((0, 1, 2)), some.std((0, 1, 2)) + 1e-3

        def ready(rows: Tensor) -> Tensor:
            """(B, 3, S, S), channels last in memory, as they lie."""
            return ((pixels[rows].to(device).float() - mean) / std).permute(0, 3, 1, 2)

        net = (
            _network(ready(torch.randperm(len(pixels))[:3000]), classes)
            .to(device)
            .to(memory_format=torch.channels_last)
        )
        watched = _trained(net, ready, target, say)
        logits, features = _said(net, ready, len(pixels))
    final = _margins(logits, target)
    return Judged(logits.softmax(1).numpy(), ((watched + final) / 2).numpy(), features.numpy())


def by_pixels(small: npt.NDArray[np.uint8], labels: Rows, classes: int) -> Tensor:
    """(N, C) how far each picture (N, S, S, 3) is of each class, by a kernel ridge regression of one-hot labels on all *other*
    pictures: y - [G^-1 y]_i / [G^-1]_ii with G = K + lambda (Rasmussen and Williams 2006, equation 5.12). K is Gaussian in the
    distance of pictures of mean 0 and length 1, as wide as half of its median; lambda is the one of the least squared error."""
    flat = torch.from_numpy(small).reshape(len(small), -1).double()
    flat = functional.normalize(flat - flat.mean(1, keepdim=True), dim=1, eps=1e-6)
    apart = (2 - 2 * flat @ flat.T).clamp(min=0)
    kernel = torch.exp(-2 * apart / apart.median().clamp(min=1e-6))
    target = functional.one_hot(torch.from_numpy(labels), classes).double() - 1 / classes
    best, least = target, float("inf")
    for ridge in RIDGES:
        inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype))
        off = (inverse @ target) / inverse.diagonal()[:, None]
        if (error := float(off.square().mean())) < least:
            best, least = target - off, error
    return (best + 1 / classes).float()


def _trained(
    net: nn.Sequential, ready: Callable[[Tensor], Tensor], target: Tensor, say: Callable[[str], None]
) -> Tensor:
    """Train; the mean margin of each picture over the epochs (N,)."""
    count = len(target)
    epochs, turns, batch = _length(count)
    free = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(free, lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    steps, done = epochs * turns, 0
    watched, seen = torch.zeros(count), torch.zeros(count)
    for epoch in range(epochs):
        if epoch % -(-epochs // 4) == 0:
            say(f"a small network looks at their labels, {epoch + 1} of {epochs}")
        net.train()
        order = torch.randperm(count)
        for rows in order[: turns * batch].split(batch):
            for group in optimizer.param_groups:
                group["lr"] = LR * min((done + 1) / (WARM * steps), (steps - done) / ((1 - WARM) * steps))
            logits = net(_shifted(ready(rows)))
            loss = functional.cross_entropy(logits, target[rows].to(logits.device), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            watched[rows] += _margins(logits.detach().cpu(), target[rows])
            seen[rows] += 1
    return watched / seen.clamp(min=1)


def _length(count: int) -> tuple[int, int, int]:
    """Epochs, steps in each, and pictures in a step, of a training on so many."""
    batch = min(count, 256 if count >= 20_000 else 64)
    return min(max(round(SEEN / count), EPOCHS[0]), EPOCHS[1]), count // batch, batch


def cost(count: int, classes: int) -> tuple[float, float]:
    """Image-forwards and multiply-accumulates of :func:`judge` on so many pictures. Training one counts three forwards, telling of one
    two, it and its mirror image; pixels are asked by a product of all with all, and an inverse for each ridge."""
    with torch.random.fork_rng(devices=[]):
        net = _network(torch.rand(2, 3, 32, 32), classes)
    spent = 0

    def add(layer: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal spent
        spent += out.numel() * layer.weight[0].numel()  # type: ignore[index, operator, union-attr]

    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(add)
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 32, 32))
    epochs, turns, batch = _length(count)
    few = count <= PIXELS
    forwards = (2 if few else 1) * (3.0 * epochs * turns * batch + 2 * count)
    pixels = count**2 * 3 * 32**2 + len(RIDGES) * count**2 * (count + classes) if few else 0
    return forwards, forwards * spent + pixels


def _network(images: Tensor, classes: int) -> nn.Sequential:
    """(B, 3, 32, 32) to (B, C); its first layer is fixed by what the patches of ``images`` are."""
    patches = images.unfold(2, PATCH, 3).unfold(3, PATCH, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH**2)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    white = (vectors / torch.sqrt(values.clamp(min=0) + 1e-2)).T.flip(0)[:STEM].reshape(-1, 3, PATCH, PATCH)
    stem = nn.Conv2d(3, 2 * STEM, PATCH, stride=2, padding=1, bias=False)
    stem.weight = nn.Parameter(torch.cat([white, -white]).cpu(), requires_grad=False)
    first, second, third = WIDTHS
    return nn.Sequential(
        stem, nn.GELU(),
        *_convolved(2 * STEM, first, side=1),
        *_convolved(first, second, pool=True), *_convolved(second, second),
        *_convolved(second, third, pool=True), *_convolved(third, third),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(third, classes),
    )  # fmt: skip


def _convolved(before: int, after: int, *, side: int = 3, pool: bool = False) -> list[nn.Module]:
    pooled: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    made = nn.Conv2d(before, after, side, padding=side // 2, bias=False)
    return [made, *pooled, nn.BatchNorm2d(after, momentum=0.4), nn.GELU()]


def _shifted(images: Tensor) -> Tensor:
    """Half of a batch mirrored, all of it moved by up to two pixels."""
    down, right = (int(by) for by in torch.randint(0, 5, (2,)))
    side = images.shape[2]
    moved = functional.pad(images, (2, 2, 2, 2), mode="reflect")[:, :, down : down + side, right : right + side]
    mirrored = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    return torch.where(mirrored, moved.flip(3), moved).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _said(net: nn.Sequential, ready: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Logits (N, C), of each picture and its mirror image the mean, and features (N, D)."""
    net.eval()
    logits, features = [], []
    for rows in torch.arange(count).split(256):
        images = ready(rows)
        seen = (net[:-1](images) + net[:-1](images.flip(3))) / 2
        features.append(seen.cpu())
        logits.append(net[-1](seen).cpu())
    return torch.cat(logits), torch.cat(features)


def _margins(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) logit of the label less the highest other one."""
    own = logits.gather(1, target[:, None])[:, 0]
    return own - logits.scatter(1, target[:, None], -torch.inf).max(1).values


@torch.no_grad()
def embedded(folder: str, source: Source, rows: Rows) -> Floats:
    """(N, D) features of the images ``rows`` by the model in ``folder``: what its head reads.

    Raises:
        Refused: there is no such model, or one of another kind than timm's, or an image that cannot be read.
    """
    import lotus.pruning
    from lotus.vit.model import image_size
    from lotus.vit.preprocessing import preprocessing

    model: Any = lotus.pruning.load(folder)
    if not hasattr(model, "forward_head"):
        raise Refused(f"--model {folder}: has no features to read. Give the folder of a ViT that LOTUS wrote.")
    wanted = preprocessing(model)
    look = Look(size=image_size(model), mean=wanted.mean, std=wanted.std)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    seen = [
        model.forward_head(model.forward_features(images.to(device)), pre_logits=True).flatten(1).float().cpu()
        for images, _ in unpacked.batches(source, rows, look)
    ]
    return torch.cat(seen).numpy()
