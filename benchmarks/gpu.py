"""What LOTUS does on a GPU, in one command of at most eight minutes, the most important first:

    python benchmarks/gpu.py --out gpu.json                      # again: what has no figures yet, or failed, runs
    python benchmarks/gpu.py --out gpu.json --cifar CIFAR10.npz  # also top-1 over cost, as far as the time goes
    python benchmarks/gpu.py --out gpu.json --device cpu --tiny  # minutes; only shows that it works

Each part is a program of its own (another benchmark, or a run of LOTUS), in a process of its own with a limit: one that
fails or hangs costs the others nothing, and its last lines stand in the file. Parts:

    run       the digits from images to report on the device: does every stage work there?
    step      images a second of ViT-S/16 at 224 px in bf16: a bare loop, the engine, the engine after a cut to half; MFU
    adamw     the same by AdamW
    latency   of cut models, at batch 256 and 1, beside the dense one
    loader    images a second of the loader alone, 224 px and 32 px
    ranks     a rank of its own by torchrun, with NCCL
    cifar     top-1 over cost of the dense training and of LOTUS

MFU is what the multiply-accumulates of the model ask for, three forwards a step, over what the GPU promises in dense
bf16 (``lotus/training/peak.py``). To be reached: the engine at 0.97 of the bare loop, MFU of 50 %, and a cut that is as much faster as
(MACs saved)^0.9.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from selection import atomic_files

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """A program and what it may take."""

    words: list[str]
    """After ``python``; OUT becomes a folder of its own."""
    limit: int
    """Seconds."""
    prints: bool = True
    """Its figures are JSON on its last line of output; else only that it ended well counts."""


def main() -> int:
    """Run what has no figures; 1 where a part failed."""
    options = _parse()
    out = Path(options.out).resolve()
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    done["machine"] = _machine(options.device)
    ends = time.monotonic() + options.minutes * 60
    for name, part in _parts(options).items():
        left = ends - time.monotonic()
        if "figures" in done.get(name, {}) or (options.parts and name not in options.parts):
            continue
        if left < 10:
            print(f"{name}: no time left; the same command goes on with it", flush=True)
            continue
        done[name] = _run(part, min(part.limit, left))
        _tell(name, done)
        atomic_files.write_json(out, done)
    return int(any("failed" in one for one in done.values()))


def _parts(options: argparse.Namespace) -> dict[str, Part]:
    device, tiny = options.device, ["--tiny"] if options.tiny else []
    vit = [] if tiny else ["--side", "224", "--patch", "16", "--width", "384", "--depth", "12", "--heads", "6", "--batch", "256",
                           "--images", "1024", "--blocks", "7", "--workers", "12"]  # fmt: skip
    step = [
        "benchmarks/train_step.py",
        "--json",
        "--device",
        device,
        "--precision",
        "bf16",
        "--cut",
        "0.5",
        *vit,
        *tiny,
    ]
    digits = ["-m", "lotus", "run", "configs/digits.yaml", "folder=OUT/run", f"device={device}"]
    short = ["train.epochs=2", "train.warmup_epochs=0.2"]
    parts = {
        "run": Part([*digits, *short], 120, prints=False),
        "step": Part([*step, "--optimizer", "muon"], 120),
        "adamw": Part([*step, "--optimizer", "adamw"], 90),
        "latency": Part(["benchmarks/latency.py", "--json", "--device", device, "--batch", "256", *tiny], 90),
        "loader": Part(["benchmarks/loader.py", "--workers", "12", "--turns", "3", "--json", "OUT/told.json",
                        *(["--images", "48", "--small-images", "256", "--batch", "16"] if tiny else [])], 90),
        "ranks": Part(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "tools/train.py", *digits[3:],
                       *short], 90, prints=False),
    }  # fmt: skip
    if options.cifar:
        cheaper = [
            "benchmarks/cheaper.py",
            options.cifar,
            "--out",
            str(Path(options.out).resolve().parent / "cheaper"),
            "--seeds",
            "0",
        ]
        more = ["--budgets", "0.33", "1", "--arms", "lotus", "dense", "--set", f"device={device}", *tiny]
        parts["cifar"] = Part([*cheaper, *more], 300, prints=False)
    return parts


def _run(part: Part, limit: float) -> dict[str, Any]:
    """Of a part its figures, or the last lines of what it said, and how long it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *(word.replace("OUT", folder, 1) if word.startswith(("OUT", "folder=OUT")) else word
                                   for word in part.words)]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        code, said, errors = _ended(words, environment, Path(folder), limit)
        seconds = {"seconds": round(time.monotonic() - began, 1)}
        told = Path(folder) / "told.json"
        if code == 0 and told.exists():
            return {"figures": json.loads(told.read_text()), **seconds}
    try:
        if code == 0:
            return {"figures": json.loads(said.splitlines()[-1]) if part.prints else said.splitlines()[-20:], **seconds}
    except (ValueError, IndexError):
        errors += "\nits last line is no JSON"
    return {"failed": f"{said}{errors}"[-4000:].splitlines()[-40:], **seconds}


def _ended(words: list[str], environment: Mapping[str, str], folder: Path, limit: float) -> tuple[int, str, str]:
    """Exit code and what was said. Of what takes longer nothing is left, the ranks of a launcher among it, to slow down what comes next."""
    with open(folder / "said", "wb") as said, open(folder / "errors", "wb") as errors:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=errors
        )
        try:
            code, late = process.wait(limit), ""
        except BaseException as fault:
            for pid in (process.pid, *_below(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code, late = process.wait(), f"\nlonger than {limit:.0f} s"
            if not isinstance(fault, subprocess.TimeoutExpired):
                raise
    told = [(folder / name).read_text(errors="replace").strip() for name in ("said", "errors")]
    return code, told[0], f"\n{told[1]}{late}"


def _below(pid: int) -> list[int]:
    """The processes that ``pid`` has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    found = list(children.get(pid, []))
    for one in found:  # which grows
        found += children.get(one, [])
    return found


def _machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "device": device}
    if device != "cpu" and torch.cuda.is_available():
        from lotus.training.peak import peak

        found |= {"gpu": torch.cuda.get_device_name(0), "peak": peak(torch.device("cuda", 0)) / 1e12 or None}
    with contextlib.suppress(ImportError):
        import deepspeed

        found["deepspeed"] = deepspeed.__version__
    return found


def _tell(name: str, done: dict[str, Any]) -> None:
    one, peak = done[name], done["machine"].get("peak")
    if "failed" in one:
        print(
            f"{name}: failed after {one['seconds']} s: {one['failed'][-1] if one['failed'] else 'without a word'}",
            flush=True,
        )
        return
    print(f"{name}: {one['seconds']} s", flush=True)
    figures = one["figures"]
    if "teraflops" in figures:
        for arm, speed in figures["images_per_second"].items():
            used = f", MFU {figures['teraflops'][arm] / peak:.1%}" if peak else ""
            print(f"  {arm:10}{speed:10.0f} images/s, {figures['teraflops'][arm]:.2f} TFLOP/s{used}", flush=True)
        print(f"  engine / bare {figures['ratio']:.3f}, stall {figures['stall']:.1%}", flush=True)
        if "cut" in figures["macs"]:
            speed, macs = figures["images_per_second"], figures["macs"]
            power = math.log(speed["cut"] / speed["no gates"]) / math.log(macs["no gates"] / macs["cut"])
            print(f"  the cut model is (MACs saved)^{power:.2f} times as fast", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON of the figures; a second run goes on there")
    parser.add_argument("--cifar", default="", help="an .npz of CIFAR-10, or of a part of it")
    parser.add_argument("--parts", nargs="+", default=[], help="only these")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small settings; only shows that it works")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
