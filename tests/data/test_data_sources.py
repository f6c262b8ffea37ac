"""Shards, streams and lists: what they give, and what of them is refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lotus.config import Data
from lotus.data import beton, hub_datasets, tar_shards
from lotus.data.dataset import open_data
from lotus.data.source import Source
from lotus.stages.prepare import lies
from selection.errors import Refused


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (color, 20, 30)).save(file, "PNG")
    return file.getvalue()


def sample(i: int, **more: Any) -> dict[str, bytes]:
    return {f"{i:04d}.png": png(i), f"{i:04d}.cls": str(i % 3).encode(), **more}


def shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file


def whole(folder: Path, count: int = 12, each: int = 4) -> str:
    for number in range(count // each):
        rows = range(number * each, (number + 1) * each)
        shard(folder / f"train-{number:03d}.tar", {k: v for i in rows for k, v in sample(i).items()})
    return str(folder / f"train-{{000..{count // each - 1:03d}}}.tar")


def pixels(source: Source) -> list[int]:
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


def opened(path: str | Path, name: str = "webdataset", **options: Any) -> tuple[Source, Source]:
    return open_data(Data(name=name, path=str(path), options=options))


def test_shards_by_pattern_folder_and_name(tmp_path: Path) -> None:
    pattern = whole(tmp_path / "s")
    shard(tmp_path / "s" / "set-val-0.tar", {k: v for i in (20, 21) for k, v in sample(i).items()})
    train, val = opened(tmp_path / "s")
    assert train.labels.tolist() == [i % 3 for i in range(12)]
    assert pixels(train) == list(range(12))
    assert train.name(5).endswith("train-001.tar:0005")
    assert pixels(val) == [20, 21]
    for path in (pattern, str(tmp_path / "s" / "train-*.tar")):
        assert opened(path, val=str(tmp_path / "s" / "set-val-0.tar"))[0].fingerprint == train.fingerprint
        assert sorted(pixels(opened(path)[0]) + pixels(opened(path)[1])) == list(range(12)), "a part is held out"
    with pytest.raises(Refused, match=r"tar set data\.name=webdataset"):
        opened(tmp_path / "s" / "train-000.tar", "imagefolder")
    with pytest.raises(Refused, match=r"but shards. Set data\.name=webdataset"):
        opened(tmp_path / "s", "imagefolder")


def test_labels_of_shards_by_name_and_in_json(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("owl\nant\n")
    told = [
        {"a.b.jpg": png(i), f"{i}.jpg": png(i), f"{i}.json": json.dumps({"kind": ["ant", "owl"][i % 2]}).encode()}
        for i in range(6)
    ]
    members = {k: v for one in told for k, v in one.items() if k != "a.b.jpg"}
    file = shard(tmp_path / "a.tar", members)
    assert opened(file, label="json.kind")[0].classes == ("ant", "owl")
    train, _ = opened(file, label="json.kind", classes=str(names), val_fraction=0.4)
    assert train.classes == ("owl", "ant")
    assert [train.classes[label] for label in train.labels] == [["ant", "owl"][row % 2] for row in pixels(train)]
    names.write_text("owl\nants\n")
    with pytest.raises(Refused, match="'ant' is none of the 2 classes"):
        opened(file, label="json.kind", classes=str(names))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"0007.png": png(1)}, r"0007 has no label \.cls"),
        ({"0007.cls": b"1"}, "0007 has no picture"),
        ({"0007.cls": b"1", "0007.png": png(1), "0007.jpg": png(1)}, "0007 has several pictures"),
        ({"0007.cls": b"-1", "0007.png": png(1)}, "label '-1' is none of the"),
        ({"0007.cls": b"2000000", "0007.png": png(1)}, "0007: label 2000000 in 7 images"),
        ({"0007.cls": b"\xff", "0007.png": png(1)}, "says no label"),
        ({"0007.cls": b"", "0007.png": png(1)}, "label '' is none"),
        ({"0007.cls": b"1", "0007.png": png(1), "0007.pyd": pickle.dumps(1)}, "is a pickle, which could run code"),
        ({"../0007.cls": b"1", "../0007.png": png(1)}, "leads out of the shard"),
        ({"/etc/0007.png": png(1)}, "leads out of the shard"),
        ({"0001.png": png(1), "0001.cls": b"1", "0001.PNG": png(1)}, "is there twice"),
    ],
)
def test_samples_that_are_refused(tmp_path: Path, more: dict[str, bytes], says: str) -> None:
    members = {k: v for i in range(6) for k, v in sample(10 + i).items()}
    with pytest.raises(Refused, match=says):
        opened(shard(tmp_path / "a.tar", {**members, **more}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_in_shards_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    file = shard(tmp_path / "a.tar", sample(0))
    with tarfile.open(file, "a") as tar:
        about = tarfile.TarInfo("0001.png")
        about.type, about.linkname = kind, "/etc/passwd"
        tar.addfile(about)
    with pytest.raises(Refused, match="not followed"):
        opened(file)


def test_torn_shards(tmp_path: Path) -> None:
    """Cut at every block, the tar is refused, or so short that nothing but its end is gone."""
    file = shard(tmp_path / "a.tar", {k: v for i in range(6) for k, v in sample(i).items()})
    content, last = file.read_bytes(), 12 * 1024
    torn = tmp_path / "torn.tar"
    for size in [*range(0, last + 1, 512), 700, last - 3]:
        torn.write_bytes(content[:size])
        with pytest.raises(Refused, match=r"cut off|no tar that is whole|damaged header"):
            opened(torn)
    broken = bytearray(content)
    broken[4 * 1024 + 10] ^= 0xFF  # in the header of a member
    torn.write_bytes(broken)
    with pytest.raises(Refused, match="damaged header"):
        opened(torn)
    torn.write_bytes(content + content)
    with pytest.raises(Refused, match="another tar after its end"):
        opened(torn)
    train, _ = opened(file)
    file.write_bytes(content[:1000])
    with pytest.raises(OSError, match="cut off"):
        train.read(len(train) - 1)


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    whole(tmp_path)
    with pytest.raises(Refused, match=r"train-003\.tar: No such file"):
        opened(tmp_path / "train-{000..003}.tar")
    for path, says in (
        ("", "no .tar"),
        (tmp_path / "none", "no .tar"),
        ("x-{9..1}.tar", "no range"),
        ("x{0..99999999}.tar", "no range"),
    ):
        with pytest.raises(Refused, match=says):
            opened(path)
    assert tar_shards.files("a{08..10}b{1..2}.tar") == [f"a{i:02d}b{j}.tar" for i in (8, 9, 10) for j in (1, 2)]
    for path in ("pipe:cat x.tar", "https://host/x.tar"):
        with pytest.raises(Refused, match="files of this machine"):
            opened(path)
    with pytest.raises(Refused, match="all 1 shards validate"):
        opened(shard(tmp_path / "v" / "val.tar", sample(0)).parent)


def test_a_changed_shard_is_prepared_again(tmp_path: Path) -> None:
    pattern = whole(tmp_path)
    before = lies(pattern), lies(str(tmp_path))
    assert all(before)
    assert before == (lies(pattern), lies(str(tmp_path)))
    shard(tmp_path / "train-001.tar", sample(5))
    assert lies(pattern) != before[0]
    assert lies(str(tmp_path)) != before[1]


# ------------------------------------------------------------------------------------------------------------ a list


def listed(folder: Path, text: str, name: str = "list.csv") -> Path:
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_text(text)
    return folder / name


def test_a_list_of_paths(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "ab"[i % 2]) for i in range(6)]
    table = listed(tmp_path, "path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    text = listed(tmp_path, "".join(f"{path} {label}\n" for path, label in rows), "list.txt")
    for file in (table, text):
        train, val = opened(file, "filelist", val=str(table))
        assert train.classes == ("a", "b")
        assert (pixels(train), pixels(val)) == (list(range(6)), list(range(6)))
        assert train.root == str(tmp_path)
    held = opened(table, "filelist")
    assert sorted(pixels(held[0]) + pixels(held[1])) == list(range(6))
    elsewhere = tmp_path / "deep"
    elsewhere.mkdir()
    file = elsewhere / "l.csv"
    file.write_text(table.read_text())
    assert opened(file, "filelist", root=str(tmp_path), val=str(table))[0].fingerprint == train.fingerprint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.png,a\n9.png,b\n", r"line 2: .*9\.png: No such file.*data\.options\.root"),
        ("0.png,a\n1.png\n", "line 2: '1.png' is no path and label"),
        ("0.png,a\n1.png,\n", "line 2: .* is no path and label"),
        ("0.png,a,1\n", "line 1: .* is no path and label"),
        ("0.png,0\n1.png,-1\n", "line 2: label '-1'"),
        ("0.png,0\n1.png,77\n", "line 2: label 77 in 2 images"),
        ("path,label\n", "lists no images"),
        ('"0.png,a\n', "cannot be read"),
        (".,a\n", "a folder, not a file"),
        ("0.png\0,a\n", "line 1|cannot be read"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        opened(listed(tmp_path, text), "filelist")


def test_a_list_without_lines_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    file = listed(tmp_path, "0.png,a\n").with_suffix(".txt")
    with file.open("wb") as holes:
        holes.truncate(1 << 27)
    tracemalloc.start()
    with pytest.raises(Refused, match=r"line 1: .* is no path and label"):
        opened(file, "filelist")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


# ------------------------------------------------------------------------------------------------------------ a stream


def test_a_stream_of_the_hub_gives_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="of the extra hub")
    monkeypatch.setattr(hub_datasets.Stream, "KEPT", 3)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"image": [Image.new("L", (7, 6), 10 * i) for i in range(20)], "label": [i % 2 for i in range(20)]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    streamed, plain = (
        opened(tmp_path / "cache", f"hf:{tmp_path / 'set'}", streaming=streaming) for streaming in (True, False)
    )
    for stream, held in zip(streamed, plain, strict=True):
        assert stream.streamed
        assert not held.streamed
        assert stream.labels.tolist() == held.labels.tolist()
        for i in [0, 5, 4, 5, 0, len(held) - 1, 1]:
            j = i % len(held)
            assert np.array_equal(stream.read(j), held.read(j)), "backwards, too"
    list(beton.prepare(streamed[0], tmp_path / "a.beton", Data(workers=3)))
    assert np.array_equal(beton.Beton(tmp_path / "a.beton").labels, plain[0].labels)


def test_a_stream_that_breaks_off_is_no_damaged_picture(tmp_path: Path) -> None:
    class Torn:
        def __iter__(self) -> Any:
            yield {"image": {"bytes": png(0)}}
            raise ConnectionError("reset by peer")

    from lotus.data import pictures

    stream = hub_datasets.Stream(Torn(), "a set")
    torn = Source(
        np.array([0, 1]), ("a", "b"), lambda i: pictures.read(stream[i]["image"]["bytes"]), str, "torn", streamed=True
    )
    with pytest.raises(Refused, match="after 1 images: ConnectionError: reset by peer"):
        list(beton.prepare(torn, tmp_path / "a.beton", Data(damaged="skip")))


def test_a_test_shard_that_validates_is_announced(tmp_path: Path) -> None:
    whole(tmp_path)
    shard(tmp_path / "test-0.tar", sample(0))
    assert "no test any more" in opened(tmp_path)[1].note
