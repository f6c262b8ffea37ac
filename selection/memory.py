"""Memory that a method may take: estimated before it is spent."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selection.errors import Refused

GB = 1e9

BLOCKS = 0.2
"""GB that blocks of similarities take at most, with what is computed of them; see :data:`selection.neighbors.BLOCK`."""

_CONTAINER = Path("/sys/fs/cgroup")

_UNITS = {
    "": 1.0,
    "gb": 1.0,
    "g": 1.0,
    "kb": 1e-6,
    "k": 1e-6,
    "mb": 1e-3,
    "m": 1e-3,
    "tb": 1e3,
    "gib": 2**30 / GB,
    "kib": 2**10 / GB,
    "mib": 2**20 / GB,
    "tib": 2**40 / GB,
}


def gigabytes(value: Any, place: str = "max_memory") -> float:
    """``4``, ``"4GB"``, ``"500 MB"``, ``"4GiB"`` as GB.

    Raises:
        Refused: it is no such thing.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match and not isinstance(value, bool) and match[2].lower() in _UNITS:
        try:
            amount = float(match[1]) * _UNITS[match[2].lower()]
        except ValueError:
            amount = math.nan
        if 0 < amount < math.inf:
            return amount
    raise Refused(f"{place}: {value!r} is no amount of memory. Say 4GB or 500MB.")


def available() -> float:
    """GB that this process may still take, as far as the system says; infinite where it does not."""
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [float(line.split()[1]) * 1024 / GB for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, IndexError):  # a container's limit; "max" is none
        most, taken = (
            float((_CONTAINER / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current")
        )
        told = (_CONTAINER / "memory.stat").read_text(encoding="ascii").split()
        limits.append(max(0.0, most - taken + float(told[told.index("inactive_file") + 1])) / GB)  # files give way
    return min(limits)


def size(count: int) -> float:
    """GB that ``count`` bytes are; infinite for a number that no float holds, as a file may claim it."""
    try:
        return count / GB
    except OverflowError:
        return math.inf


def there(needed: float, what: str, cure: str) -> None:
    """Hold ``needed`` GB, which a file asks for, to what the machine has, before it is taken.

    Raises:
        Refused: it is more; says how much, and the cure.
    """
    if needed > (free := available()):
        raise Refused(f"{what}: takes {needed:.3g} GB of memory, and {free:.3g} GB are free. {cure}")


class Left(float):
    """GB that a limit leaves once ``taken`` of it are spoken for. A refusal names the whole limit."""

    taken: float
    enough: float
    """GB in all with which every call of the picker gets through: one class may need more than the one that is refused."""
    name: str
    """What the user calls the limit."""

    def __new__(cls, limit: float, taken: float, enough: float = 0.0, name: str = "max_memory") -> Left:
        left = super().__new__(cls, max(0.0, limit - taken))
        left.taken, left.enough, left.name = taken, enough, name
        return left


def within(
    max_memory: float, needed: float, what: str, cure: str, *, enough: float = 0.0, name: str = "max_memory"
) -> None:
    """Hold what is about to be allocated to the limit.

    Args:
        max_memory: GB, the limit.
        needed: GB that are about to be allocated.
        what: for.
        cure: what else makes it less, a sentence without its end.
        enough: GB that what comes after it will need in all, where that is known: the figure to name.
        name: what the user calls the limit, where it does not say itself.

    Raises:
        Refused: it is more; says how much, and the cure.
    """
    if needed > max_memory:
        if isinstance(max_memory, Left):
            enough, taken, name = max(enough, max_memory.enough), max_memory.taken, max_memory.name
            needed, max_memory = needed + taken, max_memory + taken
        enough = max(enough, needed)
        digits = 10.0 ** (1 - math.floor(math.log10(enough)))  # two of them, rounded up
        enough = math.ceil(enough * digits) / digits
        raise Refused(
            f"{what}: {needed:.3g} GB are needed, and {name} is {max_memory:g} GB. {cure}, or set {name}={enough:g}."
        )


def working(n: int, widths: Sequence[int], *, blocks: bool) -> float:
    """GB that a picker or a score takes for n images beside matrices of its own: of each signal ``width`` numbers an image are cut out, and twice
    copied to single precision; ``blocks`` of at most n by n similarities; a few numbers an image."""
    return (12 * n * sum(widths) + 100 * n) / GB + (min(BLOCKS, 24 * n * n / GB) if blocks else 0.0)


def parts(n: int, widths: Sequence[int]) -> float:
    """GB that going through n images in parts takes: three copies in double precision of a block of what is read of them."""
    return min(BLOCKS, 24 * n * max(widths, default=0) / GB)
