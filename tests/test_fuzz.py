"""Mutants of every file that LOTUS reads: whatever is in them is refused, soon, and without taking the memory that they claim.

They are read by a second process, which may take 2 GB beside what it has loaded. Run as a script, this is that process:
``python tests/test_fuzz.py FIRST LAST`` reads the mutants of these numbers; one alone is how a fault is looked at again.
"""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from selection.errors import Refused

Random = np.random.Generator
MOST = 2 << 30
"""Bytes."""
SECONDS = 20
HUGE = (
    2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -1, 0, -(2**63), 1e308, -1e308, float("nan"), float("inf"), 0.5,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    *HUGE, None, True, "", "x", "../../etc/passwd", "\0", "\ud800", [], {}, [[]], ["a"] * 3, {"a": {"b": []}}, "1" * 5000,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- mutants


def flipped(data: bytes, rng: Random) -> bytes:
    made = bytearray(data)
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))):
        made[at] ^= 1 << int(rng.integers(8))
    return bytes(made)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: int(rng.integers(len(data)))]


def grown(data: bytes, rng: Random) -> bytes:
    at = int(rng.integers(len(data) + 1))
    more = rng.bytes(int(rng.integers(1, 64))) if rng.random() < 0.5 else data[at : at + 200] * 3
    return data[:at] + more + data[at:]


def swapped(data: bytes, rng: Random) -> bytes:
    """Two blocks change places."""
    a, b, c, d = sorted(rng.integers(0, len(data) + 1, 4).tolist())
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def overwritten(data: bytes, rng: Random) -> bytes:
    """Numbers of 16 to 64 bits, where a header could have one."""
    size, code = ((2, "<H"), (4, "<I"), (8, "<Q"))[int(rng.integers(3))]
    at = int(rng.integers(max(1, min(len(data), 4096) - size)))
    value = (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)[int(rng.integers(4))]
    return data[:at] + struct.pack(code, value) + data[at + size :]


def inflated(data: bytes, rng: Random) -> bytes:
    """A number that is written in digits becomes another."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return flipped(data, rng)
    one = found[int(rng.integers(len(found)))]
    return data[: one.start()] + str(HUGE[int(rng.integers(len(HUGE)))]).encode() + data[one.end() :]


BLIND = (flipped, cut, grown, swapped, overwritten, inflated)


def blind(data: bytes, rng: Random) -> bytes:
    return BLIND[int(rng.integers(len(BLIND)))](data, rng)


def changed(tree: Any, rng: Random) -> Any:
    """A copy of what JSON holds with one thing in it replaced, taken away, renamed or put very deep."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    copy = json.loads(json.dumps(tree))
    walk(copy)
    if not places or rng.random() < 0.05:
        return ODD[int(rng.integers(len(ODD)))]
    node, key = places[int(rng.integers(len(places)))]
    how = int(rng.integers(5))
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[f"{key}_"] = node.pop(key)
    elif how == 2:
        other, there = places[int(rng.integers(len(places)))]
        node[key] = json.loads(json.dumps(other[there])) if not isinstance(other, list) or there < len(other) else None
    else:
        node[key] = ODD[int(rng.integers(len(ODD)))]
    return copy


def of_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.4:
        return blind(data, rng)
    if rng.random() < 0.05:
        return b"[" * 100_000
    return json.dumps(changed(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def of_safetensors(data: bytes, rng: Random) -> bytes:
    """Half of them have a header that is JSON and as long as it says."""
    if rng.random() < 0.5:
        return blind(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    head = of_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def of_npz(data: bytes, rng: Random) -> bytes:
    """Half of them are sound archives of members that are not."""
    if rng.random() < 0.4:
        return blind(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = list(members)[int(rng.integers(len(members)))]
    how = int(rng.integers(5))
    if how == 0:
        del members[name]
    elif how == 1:  # another's content under this name
        members[name] = members[list(members)[int(rng.integers(len(members)))]]
    elif how == 2 and "about.npy" in members:
        about = json.loads(str(np.load(io.BytesIO(members["about.npy"]))))
        members["about.npy"] = _npy(np.array(json.dumps(changed(about, rng))))
    elif how == 3:
        array = np.load(io.BytesIO(members[name]))
        kinds = ("<f8", "<i8", "<u2", "<f2", "<U3", "?", "<c16", "<M8[s]")
        shapes = ((), (0,), (3,), (2, 2), array.shape, (*array.shape, 1), array.shape[::-1], (1, 0, 5))
        made = np.zeros(shapes[int(rng.integers(len(shapes)))], kinds[int(rng.integers(len(kinds)))])
        members[name] = _npy(made)
    else:
        members[name] = blind(members[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def of_torch(data: bytes, rng: Random) -> bytes:
    """Half of them are sound archives whose pickle, or numbers, are not."""
    if rng.random() < 0.5:
        return blind(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name, content in members.items() if content]
    pickled = [name for name in names if name.endswith("data.pkl")]
    name = pickled[0] if rng.random() < 0.7 else names[int(rng.integers(len(names)))]
    members[name] = blind(members[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------------- readers


class Kind(NamedTuple):
    file: Path
    """Good as it stands."""
    mutant: Callable[[bytes, Random], bytes]
    read: Callable[[Path], object]


def kinds(folder: Path) -> dict[str, Kind]:
    """Every format, with a small file of it."""
    parts = (_of_selection, _of_incoming, _of_data, _of_models, _of_runs)
    return {name: kind for part in parts for name, kind in part(folder).items()}


def _of_selection(folder: Path) -> dict[str, Kind]:
    from selection import exchange
    from selection.exchange import Images
    from selection.signals import Signals
    from selection.subset import Known, Subset

    labels = np.arange(20) % 2
    images = Images(20, "some", labels, ("a", "b"))
    subset = Subset(
        np.arange(12), total=20, weights=np.ones(12), fingerprint="some", known=Known(labels, ("a", "b"))
    )  # fmt: skip
    subset.save(folder / "ticket.npz")
    said = np.random.default_rng(0).random((1, 3, 20), np.float32)
    Signals(
        {"labels": labels, "p_label": said, "p_other": (1 - said) / 2}, fingerprint="some", classes=("a", "b")
    ).save(folder / "signals.npz")
    np.save(folder / "rows.npy", np.arange(12))
    texts = {
        "ticket.csv": "index,score\n" + "\n".join(f"{i},{i / 20}" for i in range(20)),
        "ticket.txt": "\n".join(str(i) for i in range(12)),
        "ticket.json": json.dumps({"indices": list(range(12))}),
        "scores.json": json.dumps({str(i): i / 20 for i in range(20)}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")

    def foreign(path: Path) -> None:
        exchange.ticket(exchange.read(path, images), images, name=path.name, keep=None)

    def scored(path: Path) -> None:
        exchange.ticket(exchange.read(path, images, kind="scores"), images, name=path.name, keep=0.5)

    return {
        "ticket .npz": Kind(folder / "ticket.npz", of_npz, lambda path: Subset.load(path)),
        "signals .npz": Kind(folder / "signals.npz", of_npz, Signals.load),
        "npy": Kind(folder / "rows.npy", blind, foreign),
        "csv": Kind(folder / "ticket.csv", blind, scored),
        "txt": Kind(folder / "ticket.txt", blind, foreign),
        "json": Kind(folder / "ticket.json", of_json, foreign),
        "json of scores": Kind(folder / "scores.json", of_json, scored),
    }


def _of_incoming(folder: Path) -> dict[str, Kind]:
    """What ``lotus select`` reads of others."""
    from selection import incoming

    rng = np.random.default_rng(0)
    embeddings, names = rng.random((20, 4), np.float32), np.array([f"a/{i}.jpg" for i in range(20)])
    np.save(folder / "embeddings.npy", embeddings)
    np.savez(folder / "embeddings.npz", embeddings=embeddings, labels=np.arange(20) % 2, paths=names)
    np.save(folder / "labels.npy", np.arange(20) % 2)
    rows = [f"{name},{i / 20},{i % 2}" for i, name in enumerate(names)]
    (folder / "scores.csv").write_text("\n".join(["path,score,label", *rows]), encoding="utf-8")
    found = {
        "embeddings .npy": Kind(folder / "embeddings.npy", blind, incoming.read),
        "embeddings .npz": Kind(folder / "embeddings.npz", of_npz, incoming.read),
        "scores .csv": Kind(folder / "scores.csv", blind, incoming.read),
        "labels .npy": Kind(
            folder / "labels.npy", blind, lambda path: incoming.read(folder / "embeddings.npy", labels=path)
        ),
    }
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(
            pa.table({"path": names.tolist(), "score": rng.random(20), "label": [i % 2 for i in range(20)]}),
            folder / "scores.parquet",
        )
        found["scores .parquet"] = Kind(folder / "scores.parquet", blind, incoming.read)
    return found


def _of_data(folder: Path) -> dict[str, Kind]:
    from lotus.config import Data
    from lotus.data import beton, catalog, patch_maps
    from lotus.data.source import Source

    pixels = np.random.default_rng(0).integers(0, 256, (20, 9, 8, 3), np.uint8)
    np.savez(
        folder / "data.npz", x_train=pixels, y_train=np.arange(20) % 2, x_test=pixels[:4], y_test=np.arange(4) % 2
    )  # fmt: skip
    patch_maps.save(folder / "maps.npz", np.zeros((20, 2, 2), np.uint8), size=8, fingerprint="some")
    source = Source(np.arange(20) % 2, ("a", "b"), lambda i: pixels[i], str, "some")
    for name in ("images", "told"):
        asked = Data(loader="torch", write="proportion", jpeg_share=0.5)
        list(beton.prepare(source, folder / f"{name}.beton", asked))

    def stored(path: Path) -> None:
        """With a manifest that speaks of these very bytes, or it would stop at the checksum."""
        manifest = beton.Manifest.path(path)
        about, told = path.stat(), json.loads(manifest.read_text(encoding="utf-8"))
        told |= {"bytes": about.st_size, "modified": about.st_mtime_ns}
        manifest.write_text(json.dumps(told), encoding="utf-8")
        opened = beton.opened(path)
        for row in range(len(opened)):
            opened.image(row)

    def images(path: Path) -> None:
        for part in catalog.npz(str(path)):
            for row in range(len(part)):
                part.read(row)

    (folder / "cifar-10-batches-py").mkdir()
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol=2))

    return {
        "cifar": Kind(
            folder / "cifar-10-batches-py" / "test_batch", blind, lambda path: catalog.cifar10(str(path.parent))
        ),
        "data .npz": Kind(folder / "data.npz", of_npz, images),
        "patch maps": Kind(folder / "maps.npz", of_npz, lambda path: patch_maps.load(path, fingerprint="some")),
        "beton": Kind(folder / "images.beton", blind, stored),
        "manifest": Kind(folder / "told.json", of_json, lambda path: beton.opened(path.with_suffix(".beton"))),
    }


def _of_models(folder: Path) -> dict[str, Kind]:
    import torch

    from lotus import files
    from lotus.config import Model
    from lotus.pruning import spec
    from lotus.vit.model import adopt, create

    args = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    for name in ("described", "weighted"):
        spec.save(create(Model(name="vit_tiny_patch16_224", args=args), 2), folder / name, about={"mean": [0.5] * 3})
    files.write_tensors(folder / "gates.safetensors", {"blocks.0.attn": torch.ones(16)})
    weights = create(Model(name="vit_tiny_patch16_224", args=args), 2).state_dict()
    torch.save(weights, folder / "weights.pt")
    torch.save({"model": weights, "epoch": 3, "arch": "deit"}, folder / "deit.pth")
    start = Model(name="vit_tiny_patch16_224", args=args, weights=str(folder / "weighted"))

    def described(path: Path) -> None:
        spec.load(path.parent)
        spec.images_of(path.parent)
        spec.dense_cost(spec.read(path.parent), str(path))

    def weighted(path: Path) -> None:
        spec.load(path.parent)
        create(start, 2)

    def torchs(path: Path) -> None:
        adopt("vit_tiny_patch16_224", args, str(path))

    return {
        "weights of torch": Kind(folder / "weights.pt", of_torch, torchs),
        "checkpoint of DeiT": Kind(folder / "deit.pth", of_torch, torchs),
        "spec.json": Kind(folder / "described" / "spec.json", of_json, described),
        "safetensors": Kind(folder / "weighted" / "model.safetensors", of_safetensors, weighted),
        "gates": Kind(folder / "gates.safetensors", of_safetensors, lambda path: files.read_tensors(path, "Again.")),
    }


def _of_runs(folder: Path) -> dict[str, Kind]:
    import torch

    from lotus.config import Config, Recipe, read
    from lotus.stages.shelf import run_of
    from lotus.training.checkpoint import Checkpoints
    from lotus.training.deepspeed_config import settings
    from lotus.training.distributed import World
    from lotus.training.spikes import Passed

    page = Path(__file__).resolve().parent.parent / "configs" / "staged.yaml"
    (folder / "page.yaml").write_bytes(page.read_bytes())
    words = folder / "words.txt"
    words.write_text(
        "train.lr=1e-3\nprune.keep.macs=0.5\nmodel.args={depth: 2}\ntrain.sides=[[0,16],[0.5,32]]", "utf-8"
    )
    run = run_of(read(page, [f"folder={folder / 'run'}"]))
    (folder / "run" / "baseline").mkdir(parents=True)
    for output in run.outputs("baseline").values():
        output.parent.mkdir(exist_ok=True)
        output.write_bytes(b"x")
    run.finish("baseline", seconds=1.0, values={"top1": 50.0})

    Checkpoints(folder / "checkpoints", key="k", world=World()).save({"weights": {"w": torch.ones(3)}}, {"step": 1})
    checkpoint = next((folder / "checkpoints").iterdir())
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}', "utf-8")

    Passed(folder / "rewound.json", "k", World()).more(0, 1, 3)

    def deepspeed(path: Path) -> None:
        settings(Recipe(deepspeed=str(path)), World())

    def overrides(path: Path) -> Config:
        return read(page, path.read_text(encoding="utf-8", errors="replace").split("\n"))

    def record(path: Path) -> None:
        run.record("baseline")
        run.why("baseline")
        run.outdated(["baseline", "train"])
        run.made_from("train")

    return {
        "deepspeed": Kind(folder / "zero.json", of_json, deepspeed),
        "checkpoint": Kind(
            checkpoint / "manifest.json",
            of_json,
            lambda _: Checkpoints(checkpoint.parent, key="k", world=World()).latest(),
        ),
        "steps that are passed over": Kind(
            folder / "rewound.json", of_json, lambda path: Passed.of(path.parent, "k", World())
        ),
        "config": Kind(folder / "page.yaml", blind, lambda path: read(path)),
        "overrides": Kind(words, blind, overrides),
        "stage record": Kind(folder / "run" / "stages" / "baseline.json", of_json, record),
    }


# ------------------------------------------------------------------------------------------------------- the reader


class TooLong(BaseException):
    """No reader catches it."""


def _alarm(*_: object) -> None:
    raise TooLong


def limited() -> None:
    """From here on this process may take :data:`MOST` more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST,) * 2)


def faults(first: int, last: int, told: Callable[[str], None]) -> Iterator[str]:
    """What is wrong with how these mutants are read."""
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder:
        found = kinds(Path(folder))
        for kind in found.values():
            kind.read(kind.file)
        limited()
        for number in range(first, last):
            name = list(found)[number % len(found)]
            kind, rng = found[name], np.random.default_rng([7, number])
            whole = kind.file.read_bytes()
            kind.file.write_bytes(kind.mutant(whole, rng))
            told(f"{number}: {name}")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                kind.read(kind.file)
            except Refused as refusal:
                if not str(refusal).strip():
                    yield f"{number}: {name}: refused without a word"
            except TooLong:
                yield f"{number}: {name}: takes more than {SECONDS} s"
            except BaseException:
                yield f"{number}: {name}: {traceback.format_exc(limit=-4)}"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                kind.file.write_bytes(whole)


def check(first: int, last: int) -> None:
    command = [sys.executable, "-W", "ignore", __file__, str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.split() == [str(last - first)], done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_thousand_mutants_are_refused_or_read() -> None:
    check(0, 1200)


if __name__ == "__main__":
    one, end = int(sys.argv[1]), int(sys.argv[2])
    wrong = list(faults(one, end, lambda text: print(text, file=sys.stderr)))
    print(*wrong, sep="\n") if wrong else print(end - one)
    sys.exit(bool(wrong))
