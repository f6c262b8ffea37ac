"""Near-duplicates: the same picture again, cropped, mirrored, compressed or resized.

First what could be: each picture, mirrored and slightly cropped too, as a few principal components, against all others. Then
what is: the two laid over each other at the best crop must agree, and so must their fine structure, in which two skies differ.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lotus.inspect.look import SIDE

Floats = npt.NDArray[np.float32]

DIMS = 48
NEAR = 0.90
"""Cosine in the principal components from which on a pair is looked at."""
SAME, FINE = 0.93, 0.60
"""Correlation of the pixels, and of what is left of them without their blur, from which on a pair is the same."""
_BLOCK = 2048
_CROPS = [(0.0, 1.0, 0.0, 1.0)] + [
    (y, y + side, x, x + side)
    for side in (0.88,)
    for y, x in ((0.06, 0.06), (0.0, 0.0), (0.0, 0.12), (0.12, 0.0), (0.12, 0.12))
]
_FINER = [
    (y * (1 - side), y * (1 - side) + side, x * (1 - side), x * (1 - side) + side)
    for side, steps in ((1.0, 1), (0.95, 3), (0.9, 3), (0.85, 5), (0.8, 5))
    for y in (np.linspace(0, 1, steps) if steps > 1 else (0.0,))
    for x in (np.linspace(0, 1, steps) if steps > 1 else (0.0,))
]


def find(small: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], Floats]:
    """Pairs (P, 2), the lower row first, of pictures (N, S, S, 3) that are the same; and how alike each is (P,)."""
    count = len(small)
    if count < 2:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    basis, mean = _basis(small)
    own = _described(small, _CROPS[0], False, mean, basis)
    best: dict[tuple[int, int, bool], None] = {}
    for crop in _CROPS:
        for mirror in (False, True):
            for start in range(0, count, _BLOCK):
                rows = slice(start, start + _BLOCK)
                near = _described(small[rows], crop, mirror, mean, basis) @ own.T  # (B, N)
                first, second = np.nonzero(near > NEAR)
                first += start
                apart = first != second
                best |= dict.fromkeys(
                    (int(a), int(b), mirror) for a, b in zip(first[apart], second[apart], strict=True)
                )
    return _verified(small, np.array(list(best), np.int64).reshape(-1, 3))


def _verified(small: npt.NDArray[np.uint8], asked: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Floats]:
    """Of (a, b, mirrored) those in which a crop of a is b."""
    alike: dict[tuple[int, int], float] = {}
    for start in range(0, len(asked), 512):
        some = asked[start : start + 512]
        mirrored = some[:, 2] == 1
        first = small[some[:, 0]].astype(np.float32)
        first[mirrored] = first[mirrored, :, ::-1]
        second = small[some[:, 1]].astype(np.float32)
        target, fine = _unit(second), _unit(_sharp(second))
        found = np.zeros(len(some), np.float32)
        for crop in _FINER:
            over = _cropped(first, crop)
            same = np.einsum("nk,nk->n", _unit(over), target)
            detail = np.einsum("nk,nk->n", _unit(_sharp(over)), fine)
            found = np.maximum(found, np.where((same >= SAME) & (detail >= FINE), same, 0))
        for (a, b, _), value in zip(some.tolist(), found.tolist(), strict=True):
            if value:
                pair = min(a, b), max(a, b)
                alike[pair] = max(alike.get(pair, 0.0), value)
    pairs = sorted(alike)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array([alike[pair] for pair in pairs], np.float32)


def _basis(small: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """Principal components (K, D) of a sample of pictures of 8 x 8 pixels, and their mean (K,)."""
    sample = np.random.default_rng(0).permutation(len(small))[:20_000]
    flat = _unit(_blurred(small[sample].astype(np.float32)))
    mean = flat.mean(0)
    _, vectors = np.linalg.eigh((flat - mean).T @ (flat - mean))
    return vectors[:, -DIMS:].astype(np.float32), mean.astype(np.float32)


def _described(
    small: npt.NDArray[np.uint8], crop: tuple[float, ...], mirror: bool, mean: Floats, basis: Floats
) -> Floats:
    """(N, D) unit vectors."""
    parts = []
    for start in range(0, len(small), _BLOCK):
        pixels = small[start : start + _BLOCK].astype(np.float32)
        pixels = _cropped(pixels[:, :, ::-1] if mirror else pixels, crop)
        seen = (_unit(_blurred(pixels)) - mean) @ basis
        parts.append(seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-6))
    return np.concatenate(parts)


def _cropped(pixels: Floats, crop: tuple[float, ...]) -> Floats:
    """The part (top, bottom, left, right) of each picture, at full size again, bilinearly."""
    top, bottom, left, right = crop
    if crop == _CROPS[0]:
        return pixels
    down, across = _taps(top, bottom), _taps(left, right)
    return np.einsum("yh,nhwc->nywc", down, np.einsum("xw,nhwc->nhxc", across, pixels, optimize=True), optimize=True)


def _taps(low: float, high: float) -> Floats:
    """(S, S) weights that stretch the part from ``low`` to ``high`` over all."""
    at = np.clip((low + (np.arange(SIDE) + 0.5) / SIDE * (high - low)) * SIDE - 0.5, 0, SIDE - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(SIDE))).astype(np.float32)


def _blurred(pixels: Floats) -> Floats:
    """Means over 4 x 4 pixels."""
    return pixels.reshape(len(pixels), SIDE // 4, 4, SIDE // 4, 4, 3).mean((2, 4))


def _sharp(pixels: Floats) -> Floats:
    """What a blur over 3 x 3 leaves out, of the brightness, smoothed over 2 x 2 against the noise of compression."""
    gray = pixels.mean(3)
    padded = np.pad(gray, ((0, 0), (3, 3), (3, 3)), mode="edge")
    wide = sum(padded[:, y : y + SIDE, x : x + SIDE] for y in (0, 3, 6) for x in (0, 3, 6)) / 9
    near = sum(padded[:, y : y + SIDE, x : x + SIDE] for y in (2, 3, 4) for x in (2, 3, 4)) / 9
    return np.asarray(near - wide, np.float32)


def _unit(pixels: Floats) -> Floats:
    """(N, ...) as (N, K) of mean 0 and length 1."""
    flat = pixels.reshape(len(pixels), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
