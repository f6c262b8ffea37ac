"""Near-duplicates: the same picture again, cropped, mirrored, compressed or resized.

Three sieves, each finer and on fewer pairs. What could be: each picture, mirrored and slightly cropped too, among its nearest in
a few principal components, looked for in the cells next to it. What has the same structure at 16 x 16 pixels, in which two skies
differ. What is: one laid over the other, its crop found by Gauss and Newton's steps (Lucas and Kanade, IJCAI 1981), agrees in
pixels and in fine structure.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lotus.inspect import near
from lotus.inspect.near import BLOCK
from lotus.inspect.thumbnails import SIDE

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Small = npt.NDArray[np.uint8]

DIMS = 48
NEAR, NEIGHBORS = 0.8, 4
"""Of how many nearest, and from which cosine in the principal components on, a pair is looked at."""
ALIKE = 0.3
"""Correlation of the structure at 16 x 16 pixels from which on a pair is laid over each other."""
SAME, FINE = 0.93, 0.70
"""Correlation of the pixels, and of their fine structure, from which on a pair is the same."""
SMALLEST = 0.76
"""A crop's side, as a fraction, below which nothing is taken for one."""
_CROPS = [(0.0, 1.0, 0.0, 1.0)] + [
    (y, y + 0.88, x, x + 0.88) for y, x in ((0.06, 0.06), (0, 0), (0, 0.12), (0.12, 0), (0.12, 0.12))
]


def find(small: Small) -> tuple[Rows, Floats]:
    """Pairs (P, 2), the lower row first, of pictures (N, S, S, 3) that are the same; and how alike each is (P,)."""
    if len(small) < 2:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    best: dict[tuple[int, int], float] = {}
    for first, second, mirror, crop in _candidates(small):
        for at in range(0, len(first), 512):
            a, b = first[at : at + 512], second[at : at + 512]
            alike = _laid_over(small[a][:, :, ::-1] if mirror else small[a], small[b], crop)
            for one, other, value in zip(a.tolist(), b.tolist(), alike.tolist(), strict=True):
                if value:
                    pair = min(one, other), max(one, other)
                    best[pair] = max(best.get(pair, 0.0), value)
    pairs = sorted(best)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array([best[pair] for pair in pairs], np.float32)


def _candidates(small: Small) -> Iterator[tuple[Rows, Rows, bool, tuple[float, ...]]]:
    """Rows a and b of pairs in which that crop of a, mirrored or not, could be b."""
    basis, mean = _basis(small)
    parts = [_described(small[at : at + BLOCK], mean, basis) for at in range(0, len(small), BLOCK)]
    own, fine = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
    cells = near.Cells.of(own)
    for mirror in (False, True):
        for crop in _CROPS:
            for at in range(0, len(small), BLOCK):
                pixels = small[at : at + BLOCK]
                seen, detail = _described(pixels[:, :, ::-1] if mirror else pixels, mean, basis, crop)
                first, second, _ = cells.nearest(seen, NEIGHBORS + 1, NEAR)  # itself among them
                stays = (first + at != second) & (np.einsum("pk,pk->p", detail[first], fine[second]) > ALIKE)
                yield first[stays] + at, second[stays], mirror, crop


def _laid_over(first: Small, second: Small, crop: tuple[float, ...]) -> Floats:
    """(P,) how alike a crop of each of ``first`` is to each of ``second`` where it is the same; 0 where none is."""
    pixels, target = first.astype(np.float32), second.astype(np.float32)
    gray, wanted = pixels.mean(3), _unit(target.mean(3))
    boxes = np.tile(np.array(crop, np.float32), (len(first), 1))
    for _ in range(5):
        boxes += _step(_warped(gray[..., None], boxes)[..., 0], wanted)
        boxes = np.clip(boxes, [0, SMALLEST - 0.05, 0, SMALLEST - 0.05], [0.3, 1, 0.3, 1]).astype(np.float32)
    sides = boxes[:, 1::2] - boxes[:, ::2]
    over = _warped(pixels, boxes)
    same = np.einsum("pk,pk->p", _unit(over), _unit(target))
    detail = np.einsum("pk,pk->p", _unit(_fine(over)), _unit(_fine(target)))
    return np.where((same >= SAME) & (detail >= FINE) & (sides >= SMALLEST).all(1), same, 0).astype(np.float32)


def _step(gray: Floats, wanted: Floats) -> Floats:
    """How the edges (P, 4) top, bottom, left, right of crops that look like ``gray`` (P, S, S) are to move toward ``wanted``."""
    at = ((np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)
    down, across = np.gradient(gray, axis=1) * SIDE, np.gradient(gray, axis=2) * SIDE
    slopes = [down * (1 - at)[:, None], down * at[:, None], across * (1 - at), across * at]
    slope = np.stack([part.reshape(len(gray), -1) for part in slopes], 1)  # (P, 4, S * S)
    slope -= slope.mean(2, keepdims=True)
    flat = gray.reshape(len(gray), -1)
    flat = flat - flat.mean(1, keepdims=True)
    size = np.maximum(np.linalg.norm(flat, axis=1), 1e-6)[:, None]
    # Brightness and contrast are free: the target is scaled onto what is there.
    missing = wanted * np.einsum("pk,pk->p", flat, wanted)[:, None] - flat
    slope, missing = slope / size[..., None], missing / size
    square = slope @ slope.transpose(0, 2, 1) + 1e-2 * np.eye(4, dtype=np.float32)
    return np.clip(np.linalg.solve(square, (slope @ missing[..., None]))[..., 0], -0.06, 0.06)


def _warped(pixels: Floats, boxes: Floats) -> Floats:
    """Of each picture (P, S, S, K) its own part (P, 4), at full size again, bilinearly."""
    down, across = _taps(boxes[:, 0], boxes[:, 1]), _taps(boxes[:, 2], boxes[:, 3])
    count, _, _, depth = pixels.shape
    tall = (down @ pixels.reshape(count, SIDE, -1)).reshape(count, SIDE, SIDE, depth)
    return across[:, None] @ tall


def _basis(small: Small) -> tuple[Floats, Floats]:
    """Principal components (K, D) of a sample of pictures of 8 x 8 pixels, half whitened, and their mean (K,)."""
    sample = np.random.default_rng(0).permutation(len(small))[:20_000]
    flat = _unit(_shrunk(small[sample].astype(np.float32), 4))
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    scaled = vectors[:, -DIMS:] * np.maximum(values[-DIMS:], 1e-4) ** -0.25
    return scaled.astype(np.float32), mean.astype(np.float32)


def _described(small: Small, mean: Floats, basis: Floats, crop: tuple[float, ...] = _CROPS[0]) -> tuple[Floats, Floats]:
    """Unit vectors of a crop of each picture: (N, D) in principal components, and (N, 256) of its structure."""
    pixels = small.astype(np.float32)
    if crop != _CROPS[0]:
        top, bottom, left, right = (np.array([edge], np.float32) for edge in crop)
        down, across = _taps(top, bottom)[0], _taps(left, right)[0]
        pixels = np.einsum(
            "yh,nhwc->nywc", down, np.einsum("xw,nhwc->nhxc", across, pixels, optimize=True), optimize=True
        )
    seen = ((_unit(_shrunk(pixels, 4)) - mean) @ basis).astype(np.float32, copy=False)
    structure = _sharp(pixels.mean(3))[..., None]
    return near.unit(np.asarray(seen, np.float32)), _unit(_shrunk(structure, 2))


def _taps(low: Floats, high: Floats) -> Floats:
    """(P, S, S) weights that stretch the part from ``low`` to ``high`` (P,) over all."""
    at = (low[:, None] + (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * (high - low)[:, None]) * SIDE - 0.5
    at = np.clip(at, 0, SIDE - 1)
    return np.maximum(0, 1 - np.abs(at[..., None] - np.arange(SIDE, dtype=np.float32)))


def _shrunk(pixels: Floats, by: int) -> Floats:
    """Means over ``by`` x ``by`` pixels."""
    return pixels.reshape(len(pixels), SIDE // by, by, SIDE // by, by, -1).mean((2, 4))


def _sharp(gray: Floats) -> Floats:
    """What a blur over 7 x 7 leaves out, smoothed over 3 x 3 against the noise of compression; (N, S, S)."""
    padded = np.pad(gray, ((0, 0), (3, 3), (3, 3)), mode="edge")
    wide = sum(padded[:, y : y + SIDE, x : x + SIDE] for y in (0, 3, 6) for x in (0, 3, 6)) / 9
    near = sum(padded[:, y : y + SIDE, x : x + SIDE] for y in (2, 3, 4) for x in (2, 3, 4)) / 9
    return np.asarray(near - wide, np.float32)


def _fine(pixels: Floats) -> Floats:
    """What is sharp (P, S, S) in pictures (P, S, S, 3), less what a whole line or column shares: two seas have a horizon each."""
    sharp = _sharp(pixels.mean(3))
    return sharp - sharp.mean(1, keepdims=True) - sharp.mean(2, keepdims=True)


def _unit(pixels: Floats) -> Floats:
    """(N, ...) as (N, K) of mean 0 and length 1."""
    flat = pixels.reshape(len(pixels), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
