"""Writing a .beton: what may go wrong is refused by name, and never leaves a file that looks whole."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_data import Make, drawn, source
from PIL import Image

from lotus.config import Data
from lotus.data import beton, encoding, format, manifest, pictures
from lotus.data import loader as loaders
from lotus.data.beton import Manifest
from lotus.data.dataset import open_data
from lotus.data.format import Beton, PlainWriter
from lotus.data.source import Source
from lotus.events import Said, Step, Wrote
from selection.errors import Refused


def failing(n: int, bad: set[int], error: Exception | None = None) -> Source:
    whole = source(n)

    def read(i: int) -> pictures.Pixels:
        if i in bad:
            raise error or OSError("image file is truncated")
        return whole.read(i)

    return replace(whole, read=read)


def left(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir())


@pytest.fixture(params=["ffcv", "torch"])
def writer(request: pytest.FixtureRequest) -> str:
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    return str(request.param)


def test_what_went_in_comes_out(make: Make, writer: str) -> None:
    shapes = lambda i: (9 + i % 3, 14)  # noqa: E731
    file = make(source(30, shapes), write="raw", loader=writer)
    manifest = Manifest.load(file)
    assert (manifest.n, manifest.classes, manifest.size) == (30, ("a", "b", "c"), None)
    assert beton.labels(file).tolist() == [i % 3 for i in range(30)]
    for i in (0, 17, 29):
        assert np.array_equal(beton.image(file, i), drawn(i, *shapes(i)))
    pixels = [drawn(i, *shapes(i)).reshape(-1, 3) / 255 for i in range(30)]
    mean = np.mean([p.mean(0) for p in pixels], axis=0)
    std = np.sqrt(np.mean([(p**2).mean(0) for p in pixels], axis=0) - mean**2)
    assert manifest.mean == pytest.approx(mean, abs=1e-5)
    assert manifest.std == pytest.approx(std, abs=1e-5)
    assert left(file) == ["train.beton", "train.json"]
    with pytest.raises(Refused, match="no image 30"):
        beton.image(file, 30)


def test_both_writers_write_the_same_bytes(make: Make) -> None:
    pytest.importorskip("ffcv")
    what = source(40, lambda i: (10 + i, 700))
    one = make(what, "one", write="proportion", loader="ffcv")
    other = make(what, "other", write="proportion", loader="torch")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("write", ["raw", "jpg", "smart", "proportion"])
def test_modes(make: Make, write: str) -> None:
    opened = Beton(make(source(60, lambda i: (20, 20) if i % 2 else (90, 90)), write=write, loader="torch"))
    small = opened.heights == 20
    share = {"raw": 0.0, "jpg": 1.0, "smart": 0.5, "proportion": 0.5}[write]
    packed = opened.modes == format.JPEG
    assert packed.mean() == pytest.approx(share, abs=0.2)
    if write == "smart":
        assert np.array_equal(packed, ~small), "JPEG above the threshold only"
    for i in range(60):
        difference = np.abs(opened.image(i).astype(int) - drawn(i, *opened.image(i).shape[:2]))
        assert difference.mean() < (12 if packed[i] else 1e-9)


def test_max_side_and_large_images(make: Make) -> None:
    file = make(source(3, lambda i: (60, 30 * (i + 1))), max_side=40, write="raw", loader="torch")
    assert [beton.image(file, i).shape for i in range(3)] == [(40, 20, 3), (40, 40, 3), (27, 40, 3)]
    # Larger than FFCV's usual page of 8 MiB, on which its own writer hangs.
    large = replace(source(2, classes=2), read=lambda i: np.full((1900, 1900, 3), i, np.uint8))
    opened = Beton(make(large, "large", max_side=0, write="raw", loader="auto"))
    assert (opened.image(1) == 1).all()
    assert opened.sizes.tolist() == [3 * 1900**2] * 2


def test_progress_is_told(tmp_path: Path) -> None:
    events = list(beton.prepare(source(2500), tmp_path / "x.beton", Data(loader="torch")))
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.total for step in steps] == [2500] * len(steps)
    assert steps[-1].done == 2500
    assert len(steps) >= 3
    assert isinstance(events[-1], Wrote)


def test_unchanged_is_not_written_again(make: Make, tmp_path: Path) -> None:
    what = source(10)
    file = make(what, loader="torch")
    before = file.stat().st_mtime_ns
    events = list(beton.prepare(what, file, Data(loader="torch")))
    assert [type(event) for event in events] == [Said]
    make(what, loader="torch", jpeg_share=0.1, workers=3, damaged="skip")  # nothing that changes the bytes
    assert file.stat().st_mtime_ns == before
    make(what, loader="torch", max_side=4)
    assert beton.image(file, 0).shape == (4, 4, 3)
    changed = file.stat().st_mtime_ns
    make(replace(what, fingerprint="other"), loader="torch", max_side=4)
    assert file.stat().st_mtime_ns != changed


def test_damage_is_fatal_and_named(tmp_path: Path, writer: str) -> None:
    file = tmp_path / "train.beton"
    with pytest.raises(Refused, match=r"drawn 7: damaged .*truncated.*data\.damaged: skip"):
        list(beton.prepare(failing(20, {7, 9}), file, Data(loader=writer), choose=loaders.writer))
    assert left(file) == []


def test_damage_is_skipped_and_counted(make: Make, writer: str) -> None:
    file = make(failing(20, {7, 9}, ValueError("odd")), damaged="skip", loader=writer, write="raw")
    manifest = Manifest.load(file)
    assert manifest.n == 18
    assert [entry["name"] for entry in manifest.skipped] == ["drawn 7", "drawn 9"]
    assert "odd" in manifest.skipped[0]["reason"]
    assert manifest.fingerprint != manifest.source
    assert np.array_equal(beton.image(file, 7), drawn(8, 8, 8)), "rows close up"
    assert beton.labels(file).tolist() == [i % 3 for i in range(20) if i not in (7, 9)]
    with pytest.raises(Refused, match="drawn 7"):
        make(failing(20, {7, 9}), damaged="fatal", loader=writer)
    told = list(beton.prepare(failing(20, {3}), file, Data(damaged="skip", loader=writer), choose=loaders.writer))
    assert any(isinstance(event, Said) and event.level == "warning" and "drawn 3" in event.text for event in told)


def test_too_much_damage(tmp_path: Path) -> None:
    skip = Data(damaged="skip", loader="torch")
    with pytest.raises(Refused, match="all 4 images are damaged"):
        list(beton.prepare(failing(4, {0, 1, 2, 3}), tmp_path / "x.beton", skip))
    with pytest.raises(Refused, match="class 'b'"):
        list(beton.prepare(failing(6, {1, 4}), tmp_path / "x.beton", skip))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "odd", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8),
            np.zeros((1, 70000, 3), np.uint8), None]
)  # fmt: skip
def test_what_a_source_must_not_give(tmp_path: Path, odd: Any) -> None:
    with pytest.raises(Refused, match="drawn 0: damaged"):
        list(
            beton.prepare(
                replace(source(4), read=lambda i: odd), tmp_path / "x.beton", Data(loader="torch", max_side=0)
            )
        )


def folder_of(root: Path, files: dict[str, bytes]) -> Source:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return open_data(Data(path=str(root)))[0]


def packed(height: int, width: int, shade: int = 0, **more: Any) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height), shade).save(out, "PNG", **more)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_among_the_pictures_is_named_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "photos"
    folder_of(root, {f"{name}/{i}.png": packed(4, 4, i) for name in "ab" for i in range(4)})
    os.mkfifo(root / "a" / "x.png") if kind == "pipe" else (root / "a" / "x.png").symlink_to("/dev/zero")
    what = open_data(Data(path=str(root), options={"val_fraction": 0.01}))[0]
    told = list(beton.prepare(what, tmp_path / "x.beton", Data(damaged="skip", loader="torch")))
    texts = [event.text for event in told if isinstance(event, Said)]
    assert not texts or (
        "x.png" in texts[0] and f"a {'named pipe' if kind == 'pipe' else 'device'}, not a file" in texts[0]
    )
    assert {Manifest.load(tmp_path / "x.beton").n} <= {6, 7}


def test_damaged_exif_is_one_line_that_names_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    entry = b"\x0f\x01\x02\x00\xff\x00\x00\x00\xff\xff\x00\x00"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", exif=exif)
    what = folder_of(tmp_path / "photos", {f"{name}/{i:03}.jpg": out.getvalue() for name in "ab" for i in range(100)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = list(beton.prepare(what, tmp_path / "x.beton", Data(loader="torch", workers=8)))
    texts = [event.text for event in told if isinstance(event, Said)]
    assert len(texts) == 1
    assert re.search(r"their metadata \(EXIF\) are damaged: .*a/\d{3}.jpg, .* and 177 more", texts[0])
    assert capfd.readouterr() == ("", "")


def test_moments_of_a_large_picture_are_those_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 41, 3), dtype=np.uint8)
    flat = pixels.reshape(-1, 3) / 255
    whole = encoding.moments(pixels)
    assert np.array_equal(whole, np.stack([flat.mean(0), (flat * flat).mean(0)]))
    monkeypatch.setattr(encoding, "BLOCK", 100)
    assert encoding.moments(pixels) == pytest.approx(whole, rel=1e-12)


def test_pictures_that_are_decoded_and_not_yet_written_have_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for three at a time, sixteen threads, the largest beyond all room: each is written, in order, and no more are held."""
    monkeypatch.setattr(pictures, "AT_ONCE", 3 * 64)
    what = folder_of(
        tmp_path / "photos",
        {f"{name}/{i:02}.png": packed(8, 8 if i % 7 else 80, 5 * i) for name in "ab" for i in range(40)},
    )
    most = 0
    real = encoding.InTurn.enter

    def enter(self: Any, number: int, pixels: int) -> None:
        nonlocal most
        real(self, number, pixels)
        most = max(most, sum(list(self._held.values())))

    monkeypatch.setattr(encoding.InTurn, "enter", enter)
    file = tmp_path / "x.beton"
    list(beton.prepare(what, file, Data(loader="torch", workers=16, write="raw")))
    assert len(Beton(file)) == len(what)
    for row in (0, 13, len(what) - 1):
        assert np.array_equal(beton.image(file, row), what.read(row))
    assert 64 <= most <= 3 * 64 + 640


@pytest.mark.slow
def test_pictures_of_a_hundred_megapixels_take_bounded_memory(tmp_path: Path) -> None:
    small = {f"{name}/{i}.png": packed(4, 4) for name in "ab" for i in range(2)}
    large = packed(10_000, 10_000, 9)
    folder_of(tmp_path / "photos", small | {f"a/large{i}.png": large for i in range(4)})
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from lotus.config import Data\n"
        "from lotus.data import beton\n"
        "from lotus.data.dataset import open_data\n"
        "source = open_data(Data(path=sys.argv[1]))[0]\n"
        "list(beton.prepare(source, Path(sys.argv[2]), Data(loader='torch', workers=16)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "photos"), str(tmp_path / "x.beton")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2, "GB, of which 0.5 are the program and 1 is a picture; without bound they take 7"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 5 MB: as a full disk, the write fails when it is under way."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("n", [6, 12, 40])
@pytest.mark.usefixtures("small_disk")
def test_a_full_disk(tmp_path: Path, writer: str, n: int) -> None:
    noise = replace(source(n), read=lambda i: np.full((400, 400, 3), i, np.uint8))
    with pytest.raises(Refused, match="no space left"):
        list(
            beton.prepare(
                noise, tmp_path / "x.beton", Data(loader=writer, write="raw", max_side=0), choose=loaders.writer
            )
        )
    assert list(tmp_path.iterdir()) == []


def test_ffcv_s_shared_memory_is_given_back(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    from lotus.data.ffcv import FfcvWriter

    writer = FfcvWriter(tmp_path / "x", 10, format.SMALLEST_PAGE)
    name = writer.theirs.metadata_sm.name
    assert name in os.listdir("/dev/shm")
    writer.abandon()
    writer.abandon()
    assert name not in os.listdir("/dev/shm")


def test_no_room_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda where: known(where)._replace(free=1000))
    with pytest.raises(Refused, match=r"needs about 12\.6 kB, and 1 kB are free"):
        list(beton.prepare(source(50), tmp_path / "x.beton", Data(loader="torch")))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match=r"cannot be made .*\. Give another place with data\.folder"):
        list(beton.prepare(source(5), tmp_path / "file" / "x.beton", Data(loader="torch")))


def test_given_up_half_way(tmp_path: Path, writer: str) -> None:
    file = tmp_path / "train.beton"
    events = beton.prepare(source(5000), file, Data(loader=writer), choose=loaders.writer)
    next(events)
    assert list(tmp_path.glob(".train.beton.*.part/train.beton"))
    events.close()  # type: ignore[attr-defined]
    assert left(file) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lotus-prepare")]


def test_killed_half_way(tmp_path: Path) -> None:
    """kill -9 while writing over an old file: the old one stands, and the next run writes the new one."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal
from pathlib import Path
from drawn_data import source
from lotus.config import Data
from lotus.data import beton
for event in beton.prepare(source(3000), Path({str(tmp_path / "train.beton")!r}), Data(loader="torch")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    file = tmp_path / "train.beton"
    list(beton.prepare(source(10), file, Data(loader="torch")))
    killed = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    (half,) = tmp_path.glob(".train.beton.*.part/train.beton")
    assert Manifest.load(file).n == 10
    with pytest.raises(Refused, match="half-written"):
        Manifest.load(half)
    list(beton.prepare(source(3000), file, Data(loader="torch")))
    assert Manifest.load(file).n == 3000
    assert left(file) == ["train.beton", "train.json"]


def test_two_at_once_take_turns(tmp_path: Path) -> None:
    file, events = tmp_path / "train.beton", {}

    def run(who: int) -> None:
        events[who] = list(beton.prepare(source(1500), file, Data(loader="torch")))

    both = [threading.Thread(target=run, args=(who,)) for who in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    wrote = [any(isinstance(event, Wrote) for event in told) for told in events.values()]
    assert sorted(wrote) == [False, True]
    assert Manifest.load(file).n == 1500


# ------------------------------------------------------------------------------------- files that must not be read


def spoiled(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        del content[-5000:]
    elif how == "longer":
        content += b"more"
    elif how == "pixels":
        content[int(Beton(file).pointers[3]) + 5] ^= 1
    elif how == "text":
        content[:] = b"hello"
    elif how == "empty":
        content.clear()
    elif how == "header alone":
        content[format.START :] = bytes(len(content) - format.START)
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "longer", "pixels", "text", "empty", "header alone"])
def test_spoiled_files_are_refused(make: Make, how: str) -> None:
    file = make(source(20), loader="torch", write="raw")
    spoiled(file, how)
    for ask in (Manifest.load, beton.labels, lambda f: beton.image(f, 0)):
        with pytest.raises(Refused, match=r"(cut off|changed|manifest).*[Rr]un prepare"):
            ask(file)


@pytest.mark.parametrize("how", ["truncated", "longer", "text", "empty", "header alone"])
def test_the_file_alone_shows_most_of_it(make: Make, how: str) -> None:
    file = make(source(20), loader="torch", write="raw")
    spoiled(file, how)
    with pytest.raises(Refused, match="run prepare"):
        Beton(file)


Spoil = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def rewritten(file: Path, spoil: Spoil) -> Path:
    """The file with its header, metadata or table changed; its manifest goes with it."""
    content = bytearray(file.read_bytes())
    header = np.frombuffer(content, format.HEADER, 1)
    images, table = int(header["images"][0]), int(header["table"][0])
    meta = np.frombuffer(content, format.META, images, format.START)
    places = np.frombuffer(content, format.PLACE, images, table)
    spoil(header, meta, places)
    del header, meta, places
    file.write_bytes(content)
    vouched(file)
    return file


def vouched(file: Path) -> None:
    """A manifest that says that the file is as it should be: whoever spoils the one may write the other."""
    about = file.stat()
    known = json.loads(Manifest.path(file).read_text())
    known |= {"bytes": about.st_size, "modified": about.st_mtime_ns, "checksum": beton.checksum(file)}
    Manifest.path(file).write_text(json.dumps(known))


def at(column: str, value: int, row: int = 11) -> Spoil:
    """Change one number of one image's metadata."""

    def spoil(_: np.ndarray, meta: np.ndarray, places: np.ndarray) -> None:
        where = places if column == "size" else meta["image"] if column in format.PICTURE.names else meta  # type: ignore[operator]
        where[column][row] = value

    return spoil


@pytest.mark.parametrize(
    ("column", "value"),
    [("mode", 7), ("width", 9), ("height", 0), ("index", 12), ("size", 0), ("size", 1), ("pointer", 0),
     ("pointer", format.START + 5), *[("pointer", v) for v in (1 << 40, (1 << 63) - 1, (1 << 63) - 100, 1 << 63, (1 << 64) - 1)],
     *[("size", v) for v in ((1 << 63) - 1, 1 << 63, (1 << 64) - 192)]],
)  # fmt: skip
@pytest.mark.parametrize("write", ["raw", "jpg"])
def test_metadata_that_point_elsewhere(make: Make, column: str, value: int, write: str) -> None:
    """Nothing that is added or multiplied may come round to a place inside of the file."""
    if write == "jpg" and (column, value) in (("width", 9), ("size", 1)):
        return  # decoding tells
    file = make(source(20), loader="torch", write=write)
    with pytest.raises(Refused, match=r"wrong places.*run prepare"):
        Beton(rewritten(file, at(column, value)))


@pytest.mark.parametrize("rows", [(1 << 63, 0), (1 << 64, -1), (20, 0), (5, 6)])
def test_a_table_that_names_others(make: Make, rows: tuple[int, int]) -> None:
    def spoil(_: np.ndarray, __: np.ndarray, places: np.ndarray) -> None:
        places["row"][rows[1]] = min(rows[0], (1 << 64) - 1)

    with pytest.raises(Refused, match=r"each image once.*run prepare"):
        Beton(rewritten(make(source(20), loader="torch"), spoil))


@pytest.mark.parametrize("label", [-1, -(1 << 63), 3, (1 << 31) - 1, 1 << 31, (1 << 63) - 1])
def test_a_label_of_no_class(make: Make, label: int) -> None:
    file = rewritten(make(source(20), loader="torch"), at("label", label))
    with pytest.raises(Refused, match=r"label.*un prepare"):
        beton.labels(file)


@pytest.mark.parametrize(("images", "table"), [(1 << 60, 0), (1 << 63, 1 << 63), ((1 << 64) - 1, 24), (21, 0), (19, 0)])
def test_a_header_that_counts_others(make: Make, images: int, table: int) -> None:
    def spoil(header: np.ndarray, _: np.ndarray, __: np.ndarray) -> None:
        header["images"], header["table"] = images, table or header["table"]

    with pytest.raises(Refused, match=r"cut off or half-written.*run prepare"):
        Beton(rewritten(make(source(20), loader="torch"), spoil))


def test_pages_that_begin_inside_the_metadata(make: Make) -> None:
    """A file in which all else is as it should be."""
    file = make(source(20), loader="torch", write="raw")

    def spoil(header: np.ndarray, meta: np.ndarray, _: np.ndarray) -> None:
        meta["image"]["pointer"] = format.START

    with pytest.raises(Refused, match="wrong places"):
        Beton(rewritten(file, spoil))


def test_a_file_of_holes_claims_a_billion_images(make: Make) -> None:
    """It has the size of what it claims and takes no room on the disk; nor does it take any in memory."""
    file = make(source(20), loader="torch")
    images = 10**9
    pages = format.START + images * format.META.itemsize
    header, fields = format.head(format.USUAL_PAGE, images, pages)
    file.write_bytes(header.tobytes() + fields.tobytes())
    os.truncate(file, pages + images * format.PLACE.itemsize)
    code = (
        "import resource, sys\n"
        "from lotus.data.format import Beton\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 29),) * 2)\n"
        "Beton(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "Refused" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "change",
    [{"n": "20"}, {"n": -1}, {"n": 21}, {"classes": []}, {"classes": [1, 2, 3]}, {"mean": [0.5]}, {"std": [0, 0, 0]},
     {"std": ["a", "b", "c"]}, {"mean": [float("nan")] * 3}, {"size": [8, "x"]}, {"modified": 1e300}, {"checksum": 5},
     {"skipped": [5]}, {"settings": 5}],
)  # fmt: skip
def test_manifests_of_another_kind(make: Make, change: dict[str, Any]) -> None:
    file = make(source(20), loader="torch")
    path = Manifest.path(file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Refused, match="un prepare"):
        beton.labels(file)


def test_manifests_that_are_missing_or_no_manifests(make: Make) -> None:
    file = make(source(10), loader="torch")
    path = Manifest.path(file)
    whole = path.read_text()
    for content in ("", "{", "[]", '{"format": 1}', json.dumps({**json.loads(whole), "more": 1})):
        path.write_text(content)
        with pytest.raises(Refused, match="not a manifest"):
            Manifest.load(file)
    path.write_text(json.dumps({**json.loads(whole), "format": 99}))
    with pytest.raises(Refused, match="another version"):
        Manifest.load(file)
    path.unlink()
    with pytest.raises(Refused, match=r"no train.json beside it"):
        Manifest.load(file)
    file.unlink()
    with pytest.raises(Refused, match="does not exist"):
        Manifest.load(file)


def test_a_copy_is_read_through_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(source(10), loader="torch")
    os.utime(file, ns=(1, 1))
    reads: list[Path] = []
    real = manifest.checksum

    def checksum(file: Path) -> Any:
        reads.append(file)
        return real(file)

    monkeypatch.setattr(manifest, "checksum", checksum)
    Manifest.load(file)
    Manifest.load(file)
    assert reads == [file]


def test_a_damaged_jpeg_is_named(make: Make) -> None:
    file = make(source(5, lambda i: (32, 32)), write="jpg", loader="torch")
    opened = Beton(file)
    start = int(opened.pointers[2])
    about = file.stat()
    with file.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"\0" * 40)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # a failing disk changes no time
    with pytest.raises(Refused, match=r"train.beton: image 2 is damaged"):
        beton.image(file, 2)


def test_small_data_make_small_files(make: Make) -> None:
    assert make(source(10), loader="torch").stat().st_size < 5e6


def test_the_plain_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    plain = PlainWriter(tmp_path / "x", 1, format.SMALLEST_PAGE)
    with pytest.raises(format.TooLarge):
        plain.add(format.Stored(format.RAW, 1000, 1000, bytes(3_000_000)), 0)
    plain.abandon()
    plain.abandon()
    assert format.page_for(9 << 20) == 16 << 20
    with pytest.raises(Refused, match="max_side"):
        format.page_for(3 << 30)


# ------------------------------------------------------------------------------------- a checksum an image, and the rest


def flip(file: Path, at: int) -> None:
    """One bit, under the old size and time."""
    about = file.stat()
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_a_large_file_is_held_to_its_sums_image_by_image_and_all_else_at_once(
    make: Make, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever byte flips: either the file is refused before it is opened, or the image when it is first read."""
    monkeypatch.setattr(manifest, "LARGE", 0)
    file = make(source(12), write="proportion", loader=writer)
    assert beton.verify(file, through=False).frame
    sound = Beton(file)
    assert sound.sums is not None
    first, last = sound.pixels
    places = {
        0,
        8,
        40,
        format.START + 5,
        last - 1,
        last,
        last + 3,
        last + len(format.SUMS) + 2,
        file.stat().st_size - 9,
    }
    for at in sorted(places - {last - 1}):
        flip(file, at)
        with pytest.raises(Refused, match=r"train\.beton: .*Delete it and run prepare"):
            beton.verify(file, through=False)
        flip(file, at)
    for row in range(12):
        for at in (int(sound.pointers[row]), int(sound.pointers[row] + sound.sizes[row]) - 1):
            flip(file, at)
            assert beton.verify(file, through=False)
            with pytest.raises(Refused, match=rf"train\.beton: image {row} .*run prepare"):
                Beton(file).image(row)
            Beton(file).hold([one for one in range(12) if one != row])
            flip(file, at)
    Beton(file).hold(range(12))
    flip(file, int(sound.pointers[3]))
    with pytest.raises(Refused, match="its bytes have changed"):
        beton.verify(file)
    assert first <= int(sound.pointers.min())


def test_a_file_without_sums_is_read_through(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older LOTUS left it."""
    with monkeypatch.context() as patch:
        patch.setattr(format, "seal", lambda file, sums: None)
        file = make(source(5), write="raw", loader="torch")
    monkeypatch.setattr(manifest, "LARGE", 0)
    assert Beton(file).sums is None
    assert beton.verify(file, through=False).frame == ""
    assert np.array_equal(beton.image(file, 4), drawn(4, 8, 8))
    flip(file, int(Beton(file).pointers[2]))
    with pytest.raises(Refused, match="its bytes have changed"):
        beton.verify(file, through=False)


def test_a_part_has_sums_of_its_own(make: Make, tmp_path: Path) -> None:
    file = make(source(20), write="raw", loader="torch")
    beton.part(file, np.arange(3, 9), tmp_path / "part.beton")
    part, whole = Beton(tmp_path / "part.beton"), Beton(file)
    assert part.sums is not None
    assert whole.sums is not None
    assert part.sums.tolist() == whole.sums[3:9].tolist()
    assert beton.verify(tmp_path / "part.beton").frame
