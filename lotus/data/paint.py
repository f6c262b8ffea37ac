"""What is compiled of a loader: an image, as it lies in the file, into a batch, as the table of augmentations says.

All in one file, since numba keeps what it compiled until this file changes, and asks no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lotus.data.format import JPEG
from lotus.data.views import DOWN, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH


def _c_call(result: Any, arguments: tuple[Any, ...]) -> Any:
    """A compiled call of a C function by its address.

    numba can call a ctypes function by itself, but then refuses to keep what it compiled on disk, since an address does
    not outlive the process; so the address is passed in, as a number.
    """

    @intrinsic
    def call(context: Any, address: Any, given: Any) -> Any:
        signature = result(types.int64, given)

        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kinds = [context.get_value_type(kind) for kind in arguments]
            function = ir.FunctionType(context.get_value_type(result), kinds)
            pointer = builder.inttoptr(values[0], function.as_pointer())
            found = [builder.extract_value(values[1], i) for i in range(len(arguments))]
            cast = [
                context.cast(builder, value, source, kind)
                for value, source, kind in zip(found, signature.args[1].types, arguments)
            ]
            return builder.call(pointer, cast)

        return signature, build

    return call


_u32, _u64, _i64 = types.uint32, types.uint64, types.int64
# int imdecode(source, bytes, height, width, destination, crop height, crop width, x, y, scale, of, crop?, mirror?)
_imdecode = _c_call(types.int32, (_u64, _u64, _u32, _u32, _u64, _u32, _u32, _u32, _u32, _u32, _u32, _u32, _u32))
# void resize(unused, source, height, width, from row, to row, from column, to column, destination, height, width)
_resize = _c_call(types.none, (_i64,) * 11)


def _kept(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, and kept on disk where there is a place for it.

    numba compiles anew when this file has changed, not when a constant did that it takes from another.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


@_kept
def _taps(length, resized, begin, size, cubic):  # type: ignore[no-untyped-def]
    """First input (S,) and weights (S, taps) of the S outputs from ``begin`` on, of a line that is resized: a triangle, or Keys' cubic
    at a = -1/2 (IEEE ASSP 29, 1981, eq. 4), stretched by how much is shrunk, as Pillow and timm have it."""
    scale = length / resized
    wide = max(scale, 1.0)
    reach = (2.0 if cubic else 1.0) * wide
    taps = int(np.ceil(2 * reach)) + 1
    first, weights = np.zeros(size, np.int64), np.zeros((size, taps), np.float32)
    for i in range(size):
        middle = (begin + i + 0.5) * scale
        start = max(0, int(np.floor(middle - reach)))
        first[i] = start
        total = 0.0
        exact = np.zeros(taps)
        for k in range(min(taps, length - start)):
            off = abs((start + k + 0.5 - middle) / wide)
            if not cubic:
                exact[k] = max(0.0, 1 - off)
            elif off < 1:
                exact[k] = (1.5 * off - 2.5) * off * off + 1
            elif off < 2:
                exact[k] = ((-0.5 * off + 2.5) * off - 4) * off + 2
            total += exact[k]
        for k in range(taps):
            weights[i, k] = exact[k] / total
    return first, weights


@_kept
def _smooth(source, height, width, square, side, crop, squash, cubic):  # type: ignore[no-untyped-def]
    """An image, flat, as :func:`lotus.data.pictures.middle` sees it, into ``square`` (S, S, 3), flat: columns first, whole levels
    between."""
    short, shorter = int(np.floor(side / crop)), min(height, width)
    high = short if squash or height == shorter else int(short * height / shorter)
    across = short if squash or width == shorter else int(short * width / shorter)
    rows, by_row = _taps(height, high, int(np.rint((high - side) / 2)), side, cubic)
    columns, by_column = _taps(width, across, int(np.rint((across - side) / 2)), side, cubic)
    top, bottom = rows[0], min(height, rows[side - 1] + by_row.shape[1])
    between, line = np.empty((bottom - top, 3 * side), np.float32), np.empty(3 * side, np.float32)
    for y in range(top, bottom):
        for x in range(side):
            at = 3 * (y * width + columns[x])
            for c in range(3):
                value = np.float32(0)
                for k in range(by_column.shape[1]):
                    if by_column[x, k] != 0:
                        value += by_column[x, k] * source[at + 3 * k + c]
                between[y - top, 3 * x + c] = min(np.float32(255), max(np.float32(0), np.rint(value)))
    for y in range(side):
        line[:] = 0
        for k in range(by_row.shape[1]):
            if by_row[y, k] != 0:
                line += by_row[y, k] * between[rows[y] - top + k]
        for x in range(3 * side):
            square[3 * y * side + x] = min(np.float32(255), max(np.float32(0), np.rint(line[x])))


_READY: set[tuple[Any, ...]] = set()
_COMPILING = threading.Lock()


def paint(planes: Any, rows: Any, data: Any, columns: Any, kept: Any, colors: Any, desk: Any, calls: Any) -> int:
    """Images ``rows`` into ``planes`` (n, 3, S, S). Returns the first row whose JPEG is damaged, or -1.

    ``data`` is the file, ``columns`` what it and the table of augmentations tell of all its images, ``kept`` where decoded ones
    stay (:class:`lotus.data.kept.Kept`); ``colors`` are the levels and the color beyond the border. On the ``desk`` lie a decoded
    JPEG and a resized image (S, S, 3), both flat and scratch. ``calls`` are the addresses of the decoder and of what resizes by
    area, and how to resize: 0 so, 1 by a triangle, 2 by a cubic; these two with ``crop`` and whether to squash.

    The first call of its kind has the compiler alone: of two threads that compile the same, one can fail in numba.
    """
    given = (planes, rows, data, columns, kept, colors, desk, calls)
    kinds = tuple(map(numba.typeof, given))
    if kinds in _READY:
        return int(painted(*given))
    with _COMPILING:
        found = int(painted(*given))
        _READY.add(kinds)
    return found


@_kept
def painted(planes, rows, data, columns, kept, colors, desk, calls):  # type: ignore[no-untyped-def]
    """What :func:`paint` does, compiled."""
    modes, heights, widths, pointers, sizes, table = columns
    pool, begins, there = kept
    levels, fill = colors
    room, square = desk
    imdecode, resize, how, crop, squash = calls
    side = planes.shape[2]
    first = np.int64(data.ctypes.data)  # signed, since numba adds signed to unsigned as floats
    scratch, small = np.int64(room.ctypes.data), np.int64(square.ctypes.data)
    for i in range(len(rows)):
        row = rows[i]
        line, out = table[row], planes[i]
        height, width = heights[row], widths[row]
        source, origin, address, stride = data, pointers[row], first + pointers[row], width
        if modes[row] == JPEG:
            source, origin, decoded, known = room, np.int64(0), scratch, False
            if len(begins) > 0:
                source, origin, decoded, known = pool, begins[row], np.int64(pool.ctypes.data) + begins[row], there[row]
            if not known:
                if _imdecode(imdecode, (address, sizes[row], height, width, decoded, height, width, 0, 0, 1, 1, 0, 0)):
                    return row
                if len(begins) > 0:
                    there[row] = True
            address = decoded
        top, left, tall, wide = line[TOP], line[LEFT], line[HEIGHT], line[WIDTH]
        if how:
            _smooth(source[origin : origin + 3 * height * width], height, width, square, side, crop, squash, how == 2)
            source, origin, stride = square, 0, side
        elif tall == side and wide == side:
            origin += 3 * (top * width + left)
        else:
            _resize(resize, (0, address, height, width, top, top + tall, left, left + wide, small, side, side))
            source, origin, stride = square, 0, side
        down, right = line[DOWN], line[RIGHT]
        # Where the picture begins and ends in a line of the output, and from where and in which direction it is read.
        if line[FLIP]:
            begin, end, start, step = max(0, right), min(side, side + right), side - 1 + right, -1
        else:
            begin, end, start, step = max(0, -right), min(side, side - right), right, 1
        for y in range(side):
            inside = 0 <= y + down < side
            at = origin + 3 * ((y + down) * stride + start)
            for x in range(side):
                if inside and begin <= x < end:
                    for c in range(3):
                        out[c, y, x] = levels[c, source[at + 3 * step * x + c]]
                else:
                    for c in range(3):
                        out[c, y, x] = levels[c, fill[c]]
    return -1
