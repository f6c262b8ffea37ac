"""Is this machine fit, and if not, what is to be done? Each answer is one sentence, also where a run is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# What the tests run on; pyproject.toml says the same to pip.
PYTHON = ((3, 11), (3, 14))
REPORTED = ("lotus-vit", "torch", "torchvision", "timm", "deepspeed", "ffcv", "numba", "numpy", "scikit-learn")
"""Whose versions a run writes down."""
LEAST = {"torch": (2, 10), "timm": (1, 0, 20), "deepspeed": (0, 18), "numpy": (2, 0)}
SHM_BYTES = 512 << 20  # Docker's default of 64 MiB is too small for NCCL's buffers between the GPUs of a host


@dataclass(frozen=True)
class Check:
    """One question to the machine."""

    name: str
    found: str
    cure: str = ""
    """What to do; empty when all is well."""
    fatal: bool = False
    """A run that needs this cannot work."""


def checks() -> Iterator[Check]:
    """All questions, cheapest first. Nothing heavy is imported here; the last two ask another process, for seconds."""
    for ask in (*QUICK, _compiler, _shm, _ffcv, _gpu):
        yield from ask()


def refusals() -> list[str]:
    """The sentences for which a run has to be refused; empty on a fit machine."""
    asked = (check for ask in QUICK for check in ask())
    return [f"{check.name}: {check.found}. {check.cure}" for check in asked if check.fatal and check.cure]


def versions() -> str:
    """What this runs on, a line each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"python {platform.python_version()}",
        f"system {platform.system()} {platform.machine()}",
        f"processors {cores}",
        *(f"{name} {version}" for name in REPORTED if (version := _version(name)) is not None),
    ]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _python() -> Iterator[Check]:
    now = sys.version_info[:2]
    fits = PYTHON[0] <= now < PYTHON[1]
    cure = f"Use Python {_dots(PYTHON[0])} to {PYTHON[1][0]}.{PYTHON[1][1] - 1}."
    yield Check("python", platform.python_version(), "" if fits else cure, fatal=True)


def _versions() -> Iterator[Check]:
    for name, least in LEAST.items():
        version = _version(name)
        if version is None:
            yield Check(name, "not installed", "Run: make setup (or pip install . -c constraints.txt).", fatal=True)
        elif _numbers(version) < least:
            yield Check(name, version, f"LOTUS needs {name} >= {_dots(least)}. Run: pip install -U {name}.", fatal=True)
        else:
            yield Check(name, version)


def pair(
    version: Callable[[str], str | None] = _version,
    requires: Callable[[str], list[str] | None] = importlib.metadata.requires,
) -> Iterator[Check]:
    """torchvision is compiled against one torch; beside another, ``import timm`` dies deep inside."""
    torch, vision = version("torch"), version("torchvision")
    if torch is None or vision is None:
        if torch is not None:
            yield Check("torchvision", "not installed", "timm imports it. Run: pip install torchvision.", fatal=True)
        return
    wanted = next((line for line in requires("torchvision") or [] if re.match(r"torch\b(?!vision)", line)), "")
    exact = re.search(r"==\s*([\w.]+)", wanted)
    cure = (
        f"torchvision {vision} was built for torch {exact.group(1) if exact else 'of its own release'}"
        f", not for {torch}: they are no pair. Install both from one place: "
        "pip install --force-reinstall torch torchvision -c constraints.txt."
    )
    build = {name: found.partition("+")[2] for name, found in (("torch", torch), ("torchvision", vision))}
    torn = exact is not None and exact.group(1) != torch.split("+")[0]
    torn |= "cpu" in build.values() and build["torch"] != build["torchvision"]
    yield Check("torch and torchvision", f"{torch} and {vision}", cure if torn else "", fatal=True)


def _compiler() -> Iterator[Check]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    yield Check(
        "C++ compiler",
        compiler or "none",
        "" if compiler else "FFCV is built with it, and train.compile needs it. Run: apt install g++.",
    )


def _shm() -> Iterator[Check]:
    if not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free
    cure = "Several GPUs of one host exchange gradients through it, and may hang. In Docker: --shm-size=1g."
    yield Check("/dev/shm", f"{free >> 20} MiB free", cure if free < SHM_BYTES else "")


def _ffcv() -> Iterator[Check]:
    version = _version("ffcv")
    if version is None:
        cure = (
            "The plain torch loader stands in, several times slower. Run: "
            "apt install libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install '.[ffcv]' -c constraints.txt."
        )
        yield Check("ffcv", "not installed", cure)
        return
    # Its compiled half links OpenCV: only importing tells, and that must not happen in this process (it changes
    # torch's threads and takes seconds).
    tried = subprocess.run([sys.executable, "-c", "import ffcv"], capture_output=True, text=True, check=False)
    last = tried.stderr.strip().splitlines()[-1] if tried.returncode and tried.stderr.strip() else ""
    cure = f"It does not load ({last}); the plain torch loader stands in. Run: pip install --force-reinstall --no-cache-dir ffcv."
    yield Check("ffcv", version, cure if tried.returncode else "")


def _gpu() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'none: training runs on the CPU')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = (asked.stdout or asked.stderr).strip().splitlines()
    yield Check(
        "GPU",
        last[-1] if last else "no answer",
        "" if asked.returncode == 0 else "torch does not load. Run: make setup.",
        fatal=asked.returncode != 0,
    )


QUICK: tuple[Callable[[], Iterator[Check]], ...] = (_python, _versions, pair)
"""What decides whether a run can work at all."""
