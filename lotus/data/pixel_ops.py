"""What may be done to the pixels of many images at once, each by its own amount: Pillow's results, to the last bit.

Every function takes ``images`` (n, 3, S, S) uint8 on any device and returns new ones. Amounts (n,) lie on the host, where
everything that decides a rounding is computed; on the device there are integers and single operations of IEEE floats, so
that an image comes out the same in whatever batch and on whatever device. Nothing waits for the device.

Letters: n images, S their side, R how many pixels to either side a blur looks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

NEAREST, BILINEAR, BICUBIC = range(3)
"""How :func:`warp` reads between pixels."""

BAND = 1 << 15
"""Values that a CPU interpolates at a time, so that its cache holds them."""

_PASSES = 3  # of a box, which make Pillow's Gaussian


def invert(images: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Floats) -> Tensor:
    """The highest ``bits`` (0 to 8) of each value stay."""
    return images & _each(images, 256 - 2 ** (8 - bits), torch.int32).to(torch.uint8)


def solarize(images: Tensor, threshold: Floats) -> Tensor:
    """What is not below ``threshold`` (0 to 256) is inverted."""
    return (
        images ^ (images >= _each(images, threshold, torch.int16)).to(torch.uint8) * 255
    )  # a CPU's where is ten times slower


def solarize_add(images: Tensor, add: Floats) -> Tensor:
    """``add`` (0 to 128) is added to what is below 128."""
    return images + (images < 128).to(torch.uint8) * _each(images, add, torch.uint8)


def brightness(images: Tensor, factor: Floats) -> Tensor:
    """0: black, 1: as it is."""
    return (images * _each(images, factor, torch.float32)).clamp_(0, 255).to(torch.uint8)


def contrast(images: Tensor, factor: Floats) -> Tensor:
    """0: the mean gray, 1: as it is."""
    total = gray(images).sum(dim=(1, 2, 3), dtype=torch.int64, keepdim=True)
    mean = (_over(total.to(torch.float64), images[0, 0].numel()) + 0.5).to(torch.uint8)
    return _blended(mean, images, factor)


def color(images: Tensor, factor: Floats) -> Tensor:
    """0: without color, 1: as it is."""
    return _blended(gray(images), images, factor)


def sharpness(images: Tensor, factor: Floats) -> Tensor:
    """0: smoothed, 1: as it is. The outermost pixels, which have no neighbors, stay."""
    side, smooth = images.shape[-1], images.clone()
    if side > 2:
        whole = images.to(torch.int16)
        across = whole[..., :-2] + whole[..., 1:-1] + whole[..., 2:]
        around = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
        twice = (2 * (around + 4 * whole[..., 1:-1, 1:-1]) + 13).to(torch.int32)
        smooth[..., 1:-1, 1:-1] = ((twice * 20165) >> 19).to(torch.uint8)  # twice // 26: a CPU divides one by one
    return _blended(smooth, images, factor)


def auto_contrast(images: Tensor) -> Tensor:
    """Each channel is stretched until it reaches from 0 to 255."""
    low = images.amin(dim=(2, 3)).to(torch.float64)[..., None]
    high = images.amax(dim=(2, 3)).to(torch.float64)[..., None]
    values = torch.arange(256, dtype=torch.float64, device=images.device).expand(len(images), 3, 256)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    stretched = (values * scale + -low * scale).to(torch.int64).clamp(0, 255)
    return _looked_up(torch.where(high > low, stretched, values.to(torch.int64)), images)


def equalize(images: Tensor) -> Tensor:
    """Each channel's values become about equally frequent."""
    n, device = len(images), images.device
    flat = images.reshape(3 * n, -1).long()
    counts = torch.zeros((3 * n, 256), dtype=torch.int32, device=device)
    counts.scatter_add_(1, flat, torch.ones((1, 1), dtype=torch.int32, device=device).expand_as(flat))
    counts = counts.long()
    values = torch.arange(256, device=device)
    last = counts.gather(1, ((counts > 0) * values).amax(dim=1, keepdim=True))
    step = (flat.shape[1] - last) // 255
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _looked_up(torch.where(step > 0, table, values).reshape(n, 3, 256), images)


def gaussian_blur(images: Tensor, radius: Floats) -> Tensor:
    """A Gaussian of ``radius`` (its standard deviation, in pixels), as three boxes whose edges count in part.

    Gwosdek, Grewenig, Bruhn, Weickert, "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", SSVM
    2011, equations 7, 11 and 14, in Pillow's single precision and fixed point.
    """
    found = _box_weights(radius)
    weights = _each(images, found.T, torch.int32)  # (R + 1, n, 1, 1, 1)
    # Values from -128 to 127, so that a sum fits into 32 bits; where weights miss 2^24 by one, that is put right.
    left = (1 << 24) - 2 * found.sum(axis=1) + found[:, 0]
    half = _each(images, (1 << 23) - 128 * left, torch.int32)
    seen = images.to(torch.int32).sub_(128)
    for axis in (3, 2):
        for _ in range(_PASSES):
            seen = _boxed(seen, weights, half, axis)
    return seen.add_(128).to(torch.uint8)


def _box_weights(radius: Floats) -> npt.NDArray[np.int64]:
    """(n, R + 1): what the pixel at a distance of 0 to R counts, of 2^24 in all."""
    single = np.float32
    variance = np.asarray(radius, single) * np.asarray(radius, single) / single(_PASSES)
    whole = np.floor((np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(single) - 1.0) / 2.0).astype(single)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = (part / (6 * (variance - (whole + 1) * (whole + 1)))).astype(single)
    reach = (whole + part).astype(single)
    inside = (single(1 << 24) / (reach * single(2) + single(1))).astype(np.int64)
    edge = ((1 << 24) - (2 * reach.astype(np.int64) + 1) * inside) // 2
    distance = np.arange(int(reach.max(initial=0)) + 2)[None]
    within = reach.astype(np.int64)[:, None]
    return np.where(distance <= within, inside[:, None], np.where(distance == within + 1, edge[:, None], 0))


def _boxed(seen: Tensor, weights: Tensor, half: Tensor, axis: int) -> Tensor:
    """One box along an axis; beyond the border the outermost pixel goes on."""
    side, reach = seen.shape[axis], len(weights) - 1
    ends = [seen.narrow(axis, place, 1).expand_as(seen.narrow(axis, 0, 1)) for place in (0, side - 1)]
    longer = torch.cat([ends[0]] * reach + [seen] + [ends[1]] * reach, dim=axis)
    total = torch.addcmul(half, seen, weights[0])
    for distance in range(1, reach + 1):
        pair = longer.narrow(axis, reach - distance, side) + longer.narrow(axis, reach + distance, side)
        total.addcmul_(pair, weights[distance])
    return total.bitwise_right_shift_(24)


def hue(images: Tensor, turn: Floats) -> Tensor:
    """Hues are turned by ``turn`` (-0.5 to 0.5 of the circle), through Pillow's HSV of bytes."""
    red, green, blue = images.to(torch.float32).unbind(1)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    span = (high - low).clamp(min=1)
    r, g, b = (((high - channel) / span).to(torch.float64) for channel in (red, green, blue))  # a float, then doubles
    angle = torch.where(red == high, b - g, torch.where(green == high, 2.0 + r - b, 4.0 + g - r)).to(torch.float32)
    circle = torch.remainder(_over(angle.to(torch.float64), 6.0) + 1.0, 1.0).to(torch.float32)
    around = torch.where(high > low, (circle.to(torch.float64) * 255.0).to(torch.int32), 0)
    strong = ((high - low) / high.clamp(min=1)).to(torch.float64)
    around = (around + _each(images, np.trunc(turn * 255), torch.int32)[:, 0]) % 256
    return _from_hsv(around, (strong * 255.0).to(torch.int32), high)


def _from_hsv(around: Tensor, strong: Tensor, value: Tensor) -> Tensor:
    """(n, S, S) each, in bytes -> (n, 3, S, S) uint8."""
    sixth = _over(around.to(torch.float32) * 6.0, 255.0)
    corner = sixth.floor()
    past, part = sixth - corner, _over(strong.to(torch.float32), 255.0)
    p, q, t = (
        (value * (1.0 - part * weight) + 0.5).floor().clamp(0, 255)  # C's round, of what is not negative
        for weight in (torch.ones_like(past), past, 1.0 - past)
    )
    which = (corner % 6).long()[:, None]
    table = ((value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q))
    channels = [torch.stack(column, dim=1).gather(1, which)[:, 0] for column in table]
    turned = torch.stack(channels, dim=1)
    return torch.where(strong[:, None] > 0, turned, value[:, None]).to(torch.uint8)


def warp(images: Tensor, matrix: Floats, fill: npt.NDArray[np.uint8], between: int, axes: str = "xy") -> Tensor:
    """The pixel whose middle is (x, y) shows what lies at (a x + b y + c, d x + e y + f); ``fill`` (3,) beyond the border.

    Args:
        images: (n, 3, S, S) uint8.
        matrix: (n, 6): a to f.
        between: ``NEAREST``, ``BILINEAR``, or ``BICUBIC`` (a = -1).
        axes: ``x`` or ``y`` where only this one is moved along: less work, the same result.
    """
    side = images.shape[-1]
    if between == NEAREST:
        x, y, inside = _nearest(images, matrix)
        seen = _at(images, y * side + x)
    else:
        middle = torch.arange(side, dtype=torch.float64, device=images.device) + 0.5
        numbers = _each(images, np.asarray(matrix).T, torch.float64)[:, :, 0]  # (6, n, 1, 1)
        x, y = middle[None, None, :], middle[None, :, None]
        moved = [p * x + q * y + r for axis, (p, q, r) in zip("xy", (numbers[:3], numbers[3:])) if axis in axes]
        inside = torch.stack([(place >= 0) & (place < side) for place in moved]).all(0)
        x, y = (moved.pop(0) if axis in axes else place for axis, place in (("x", x), ("y", y)))
        shape, whole = (len(images), side, side), images.to(torch.int16)
        rows = side if images.is_cuda else max(1, BAND // (3 * len(images) * side))
        bands = zip((y - 0.5).expand(shape).split(rows, 1), (x - 0.5).expand(shape).split(rows, 1))
        seen = torch.cat([_interpolated(whole, *band, between, axes) for band in bands], dim=2)
    color = sent(torch.from_numpy(np.array(fill, np.uint8)), images.device).view(1, 3, 1, 1)
    shown = inside[:, None].to(torch.uint8)
    return (seen * shown).add_((1 - shown) * color)


def _nearest(images: Tensor, matrix: Floats) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, rows and what is inside, (n, S, S) each, in Pillow's fixed point of 16 bits."""
    side, found = images.shape[-1], []
    step = torch.arange(side, device=images.device)
    for a, b, c in (matrix[:, :3].T, matrix[:, 3:].T):
        fixed = np.floor(np.stack([a, b, c + a * 0.5 + b * 0.5]) * 65536.0 + 0.5)
        p, q, r = _each(images, fixed, torch.int64)[:, :, 0]
        found.append((p * step[None, None, :] + q * step[None, :, None] + r) >> 16)
    x, y = found
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    return x.clamp(0, side - 1), y.clamp(0, side - 1), inside


def _interpolated(whole: Tensor, y: Tensor, x: Tensor, between: int, axes: str) -> Tensor:
    """Values at the places (y, x) (n, some rows, S), where a pixel's middle is a whole number, out of ``whole`` in 16 bits."""
    side = whole.shape[-1]
    offsets = (0, 1) if between == BILINEAR else (-1, 0, 1, 2)
    along = _linear if between == BILINEAR else _cubic

    def taps(place: Tensor, axis: str) -> tuple[list[Tensor], Tensor]:
        """The pixels to read from along an axis, and how far beyond the first of the middle two the place lies."""
        first = place.floor()
        part, first = (place - first)[:, None], first.long()
        return [(first + o).clamp_(0, side - 1) for o in (offsets if axis in axes else (0,))], part

    (rows, down), (columns, across) = taps(y, "y"), taps(x, "x")
    lines = []
    for row in rows:
        line = [_at(whole, row * side + column) for column in columns]
        lines.append(along(line, across) if len(line) > 1 else line[0])
    value = along(lines, down) if len(lines) > 1 else lines[0]
    return value.clamp_(0, 255).to(torch.uint8)


def _linear(v: list[Tensor], part: Tensor) -> Tensor:
    return ((v[1] - v[0]) * part).add_(v[0])


def _cubic(v: list[Tensor], part: Tensor) -> Tensor:
    """v1 + part (v2 - v0 + part (second + part third)), where v are whole numbers of 16 bits or doubles."""
    second, third = 2 * (v[0] - v[1]) + v[2] - v[3], -v[0] + v[1] - v[2] + v[3]
    return (third * part).add_(second).mul_(part).add_(v[2] - v[0]).mul_(part).add_(v[1])


def _at(images: Tensor, place: Tensor) -> Tensor:
    """Pixels at whole places (n, some rows, S), counted line by line: (n, 3, some rows, S)."""
    n = len(images)
    found = images.reshape(n, 3, -1).gather(2, place.reshape(n, 1, -1).expand(n, 3, -1))
    return found.view(n, 3, *place.shape[1:])


def gray(images: Tensor) -> Tensor:
    """(n, 1, S, S) uint8: ITU-R 601-2 luma, in Pillow's 16 bits."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def _blended(plain: Tensor, images: Tensor, factor: Floats) -> Tensor:
    """From ``plain`` at 0 over ``images`` at 1 and beyond; cut off, not rounded."""
    low = plain.to(torch.float32)
    mixed = images.to(torch.float32).sub_(low).mul_(_each(images, factor, torch.float32)).add_(low)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _looked_up(table: Tensor, images: Tensor) -> Tensor:
    """``table`` (n, 3, 256): what becomes of each value."""
    n = len(images)
    return table.to(torch.uint8).view(3 * n, 256).gather(1, images.reshape(3 * n, -1).long()).view(images.shape)


def _over(values: Tensor, number: float) -> Tensor:
    """Division, as IEEE has it: by a plain number a GPU multiplies by the inverse, and so does a CPU where it is divided."""
    return values / torch.full_like(values, number)


def _each(images: Tensor, numbers: npt.ArrayLike, dtype: torch.dtype) -> Tensor:
    """Numbers (..., n) to stand beside images: (..., n, 1, 1, 1)."""
    held = torch.from_numpy(np.array(numbers, dtype=np.float64)).to(dtype)
    return sent(held, images.device)[..., None, None, None]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """What lies on the host, on ``device``. Plain ``to`` would wait until a GPU has done all that was asked of it before."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # else CUDA may wait all the same
    return tensor.to(device, non_blocking=True)
