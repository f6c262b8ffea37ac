from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lotus.config import Data
from lotus.data import catalog, cifar
from lotus.data.dataset import open_data
from lotus.data.source import Source
from selection import methods
from selection.errors import Notice, Refused


def picture(file: Path, color: tuple[int, int, int] = (10, 20, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), color).save(file)


def folder(root: Path, parts: dict[str, int]) -> Path:
    for name, count in parts.items():
        for i in range(count):
            picture(root / name / f"{i}.png", (i, len(name), 0))
    return root


def test_the_shelf_holds_data_sets_alone() -> None:
    assert methods.names(catalog) == [
        "cifar10",
        "cifar100",
        "digits",
        "filelist",
        "hf",
        "imagefolder",
        "npz",
        "webdataset",
    ]


def test_digits() -> None:
    train, val = open_data(Data(name="digits"))
    assert (len(train), len(val)) == (1438, 359)
    counts = np.bincount(np.concatenate([train.labels, val.labels]))
    assert np.abs(np.bincount(val.labels) / counts - 0.2).max() < 0.01, "a fifth of every class"
    pixels = np.stack([train.read(i) for i in range(50)])
    assert pixels.shape == (50, 8, 8, 3)
    assert pixels.dtype == np.uint8
    assert pixels.max() == 255
    again, _ = open_data(Data(name="digits"))
    other, _ = open_data(Data(name="digits", options={"seed": 1}))
    assert again.fingerprint == train.fingerprint != other.fingerprint
    assert train.name(3) != val.name(3)


def test_refused_names_and_options() -> None:
    with pytest.raises(Refused, match="Did you mean 'digits'"):
        open_data(Data(name="digts"))
    with pytest.raises(Refused, match=r"data\.options\.val_fracton.*'val_fraction'"):
        open_data(Data(name="digits", options={"val_fracton": 0.1}))
    with pytest.raises(Refused, match="between 0 and 1"):
        open_data(Data(name="digits", options={"val_fraction": 1.5}))
    for option, value, says in [
        ("val_fraction", "abc", "a number, not 'abc'"),
        ("val_fraction", True, "a number, not True"),
        ("val_fraction", float("nan"), "a number, not nan"),
        ("seed", "x", "a whole number, not 'x'"),
        ("seed", 1.5, "a whole number, not 1.5"),
        ("seed", -1, "from 0"),
    ]:
        with pytest.raises(Refused, match=rf"data\.options\.{option}: .*{says}"):
            open_data(Data(name="digits", options={option: value}))
    assert len(open_data(Data(name="digits", options={"val_fraction": "5e-1"}))[1]) > 800, "YAML reads 5e-1 as a text"
    with pytest.raises(Refused, match="hf:NAME"):
        open_data(Data(name="gs:bucket"))
    for name in ("imagefolder", "npz", "cifar10"):
        with pytest.raises(Refused, match=r"data\.path"):
            open_data(Data(name=name))
    for name in ("imagefolder", "npz"):
        with pytest.raises(Refused, match="does not exist"):
            open_data(Data(name=name, path="/no/such/place"))


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_train_and_val(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    picture(root / "train/dog/more/deep.JPEG")
    (root / "train/dog/readme.txt").write_text("no picture")
    (root / "train/dog/._hidden.png").write_text("no picture")
    train, val = open_data(Data(path=str(root)))
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.name(5).endswith(os.path.join("train", "dog", "more", "deep.JPEG"))
    assert train.read(1).shape == (5, 6, 3)
    assert val.labels.tolist() == [0, 1]
    before = train.fingerprint
    picture(root / "train/dog/new.png")
    assert open_data(Data(path=str(root)))[0].fingerprint != before


@pytest.mark.parametrize("first", ["train", "Train", "training"])
@pytest.mark.parametrize("name", ["validation", "test", "Val"])
def test_other_names_of_train_and_val(tmp_path: Path, first: str, name: str) -> None:
    root = folder(tmp_path, {f"{first}/a": 2, f"{first}/b": 2, f"{name}/a": 1})
    train, val = open_data(Data(path=str(root)))
    assert train.classes == ("a", "b")
    assert len(val) == 1


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"val/a": 2, "other/a": 2}, "val looks like a part of a data set, not like a class"),
        ({"TEST": 2, "a": 2}, "TEST looks like a part of a data set"),
        ({"train/a": 2, "Training/a": 2}, "Training and train, which mean the same part"),
    ],
)
def test_parts_do_not_become_classes(tmp_path: Path, parts: dict[str, int], says: str) -> None:
    with pytest.raises(Refused, match=says):
        open_data(Data(path=str(folder(tmp_path, parts))))


@pytest.mark.parametrize("below", ["", "train/"])
def test_one_folder_is_split_by_a_seed(tmp_path: Path, below: str) -> None:
    root = folder(tmp_path, {f"{below}a": 10, f"{below}b": 20})
    train, val = open_data(Data(path=str(root), options={"val_fraction": 0.2}))
    assert np.bincount(val.labels).tolist() == [2, 4]
    names = {s.name(i) for s in (train, val) for i in range(len(s))}
    assert len(names) == 30
    assert {val.name(i) for i in range(6)} == {
        open_data(Data(path=str(root), options={"val_fraction": 0.2}))[1].name(i) for i in range(6)
    }


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({}, "no class folders"),
        ({"a": 3}, "one class"),
        ({"a": 3, "b": 1}, "one image"),
        (
            {"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1},
            "val: 1 of its 2 classes are none of train's: c",
        ),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1, "val/c": 1}, "1 of its 3 classes are none of train's: c"),
        (
            {"train/cats": 2, "train/dogs": 2, "val/cat": 1, "val/dog": 1},
            "2 of its 2 classes are none of train's: cat, dog. Did you mean 'cats'",
        ),
        ({"train/a": 2}, "one class"),
    ],
)
def test_folders_that_cannot_train(tmp_path: Path, parts: dict[str, int], says: str) -> None:
    with pytest.raises(Refused, match=says):
        open_data(Data(path=str(folder(tmp_path, parts))))


def test_classes_of_a_validation_folder_go_by_name(tmp_path: Path) -> None:
    """Not by place: val has the classes at other places among its folders than train."""
    root = folder(tmp_path, {"train/1": 2, "train/10": 2, "train/2": 2, "val/10": 3, "val/2": 1})
    train, val = open_data(Data(path=str(root)))
    assert train.classes == val.classes == ("1", "10", "2")
    for row in range(len(val)):
        assert Path(val.name(row)).parent.name == val.classes[val.labels[row]]
    assert "val has no pictures of 1 of train's classes, which are not measured: 1" in val.note
    assert train.note == ""


@pytest.mark.parametrize(("name", "said"), [("test", True), ("Test", True), ("val", False), ("valid", False)])
def test_a_test_folder_that_validates_is_announced(tmp_path: Path, name: str, said: bool) -> None:
    root = folder(tmp_path, {"train/a": 2, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1})
    val = open_data(Data(path=str(root)))[1]
    assert ("makes it no test any more" in val.note) == said
    assert val.where.endswith(name)


def test_an_empty_class_and_no_images_at_all(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "c").mkdir()
    with pytest.raises(Refused, match="class 'c' is empty"):
        open_data(Data(path=str(tmp_path)))
    for file in [*tmp_path.rglob("*.png")]:
        file.unlink()
    with pytest.raises(Refused, match="no images"):
        open_data(Data(path=str(tmp_path)))
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(Refused, match="is a file"):
        open_data(Data(path=str(file)))


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 2, "b": 2})
    (root / "a" / "again").symlink_to(root / "a")
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    train, val = open_data(Data(path=str(root)))
    assert len(train) + len(val) == 5, "the link to nowhere counts, and is named as damaged when it is read"


@pytest.mark.parametrize("to", [".", "..", "b", "b/deep"])
def test_links_do_not_pull_other_classes_in(tmp_path: Path, to: str) -> None:
    root = folder(tmp_path / "root", {"a": 2, "b": 3, "b/deep": 1})
    folder(tmp_path / "apart", {"more": 4})
    (root / "a" / "link").symlink_to(root / to)
    (root / "a" / "apart").symlink_to(tmp_path / "apart")
    train, val = open_data(Data(path=str(root)))
    counts = np.bincount(np.concatenate([train.labels, val.labels]))
    assert counts.tolist() == [6, 4], "a link to pictures apart is followed"


# ---------------------------------------------------------------------------------------------------------- .npz


def arrays(n: int = 12, shape: tuple[int, ...] = (4, 4, 3)) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return {"x_train": x, "y_train": np.arange(n) % 3, "x_test": x[:5], "y_test": np.arange(5) % 3}


def saved(folder_: Path, **changes: Any) -> Data:
    file = folder_ / "data.npz"
    content = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
    np.savez(file, **content)
    return Data(name="npz", path=str(file))


def test_npz(tmp_path: Path) -> None:
    train, val = open_data(saved(tmp_path, classes=np.array(["x", "y", "z"]), y_train=(np.arange(12) % 3)[:, None]))
    assert train.classes == ("x", "y", "z")
    assert np.array_equal(train.read(3), arrays()["x_train"][3])
    assert len(val) == 5
    gray, _ = open_data(saved(tmp_path, x_train=np.zeros((12, 4, 4), np.uint16), x_test=np.zeros((5, 4, 4), np.uint8)))
    assert gray.read(0).shape == (4, 4, 3)
    train, val = open_data(saved(tmp_path, x_test=None, y_test=None))
    assert (len(train), len(val)) == (9, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y_train": None}, "has no y_train"),
        ({"y_train": np.arange(11) % 3}, "12 images but 11 labels"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(5, int)}, "one class"),
        ({"y_train": np.array([0, 2] * 6)}, "class '1' is empty"),
        ({"y_train": np.linspace(0, 2, 12)}, "whole numbers"),
        ({"y_test": np.full(5, 7)}, "labels from 7 to 7, but 3 classes"),
        ({"y_train": np.arange(12) % 3 - 1}, "labels from -1"),
        ({"x_train": np.zeros((12, 3, 5, 5), np.uint8)}, "channels come last"),
        ({"x_train": np.zeros((12, 4, 4, 3), np.float32)}, "uint8"),
        ({"x_train": np.array([object()] * 12)}, "could run code"),
        ({"classes": np.array(["x", "y"])}, "but 2 classes"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        open_data(saved(tmp_path, **changes))


def test_npz_that_claims_a_hundred_gigabytes(tmp_path: Path) -> None:
    """Packed zeros of four images, of which the head says that they are very many."""
    data = saved(tmp_path)
    with zipfile.ZipFile(data.path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    head = members["x_train.npy"]
    members["x_train.npy"] = head.replace(b"(12, 4, 4, 3), }        ", b"(2083333333, 4, 4, 3), }")
    assert members["x_train.npy"] != head
    with zipfile.ZipFile(data.path, "w", zipfile.ZIP_DEFLATED) as changed:
        for name, content in members.items():
            changed.writestr(name, content)
    with pytest.raises(Refused, match=r"'x_train' claims \d{11} bytes"):
        open_data(data)


def test_npz_that_is_cut_off(tmp_path: Path) -> None:
    data = saved(tmp_path)
    whole = Path(data.path).read_bytes()
    for content, says in ((whole[: len(whole) // 2], "cannot be read"), (b"", "it is none"), (b"text", "it is none")):
        Path(data.path).write_bytes(content)
        with pytest.raises(Refused, match=says):
            open_data(data)
    with pytest.raises(Refused, match="between 0 and 1"):  # though it has a test part and nothing is held out
        open_data(saved(tmp_path).model_copy(update={"options": {"val_fraction": 7}}))


# --------------------------------------------------------------------------------------------------------- CIFAR


def batches(root: Path, which: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A little CIFAR in an official layout; returns the training images and labels that it holds."""
    known = cifar.KINDS[which]
    name, train, test = known[kind]
    (root / name).mkdir(parents=True)
    classes = 10 if which == "CIFAR10" else 100
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (len(train), classes, 3072), dtype=np.uint8)
    y = np.tile(np.arange(classes), (len(train), 1))
    for i, file in enumerate([*train, *test]):
        data, labels = x[i % len(train)], y[0]
        if kind == "python":
            (root / name / file).write_bytes(pickle.dumps({"data": data, known["labels"]: labels.tolist()}, protocol=2))
        else:
            before = np.zeros((classes, known["bytes"]), np.uint8)
            before[:, -1] = labels
            np.concatenate([before, data], axis=1).tofile(root / name / file)
    if kind == "python":
        meta = {known["names"][1]: [f"class {i}" for i in range(classes)]}
        (root / name / known["names"][0]).write_bytes(pickle.dumps(meta, protocol=2))
    return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y.reshape(-1)


@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("which", ["CIFAR10", "CIFAR100"])
def test_cifar_layouts(tmp_path: Path, which: str, kind: str) -> None:
    x, y = batches(tmp_path, which, kind)
    train, val = open_data(Data(name=which.lower(), path=str(tmp_path)))
    assert np.array_equal(np.stack([train.read(i) for i in range(len(train))]), x)
    assert np.array_equal(train.labels, y)
    assert len(val) == len(train.classes)
    assert train.classes[1] == ("class 1" if kind == "python" else "1")
    inside = open_data(Data(name=which.lower(), path=str(tmp_path / cifar.KINDS[which][kind][0])))[0]
    assert inside.fingerprint == train.fingerprint


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    batches(tmp_path, "CIFAR10", "python")
    canary = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(canary),)

    bad = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(Refused, match=r"data_batch_3.*mkdir"):
        open_data(Data(name="cifar10", path=str(tmp_path)))
    assert not canary.exists()
    bad.write_bytes(b"\x80\x02garbage")
    with pytest.raises(Refused, match="not read"):
        open_data(Data(name="cifar10", path=str(tmp_path)))


def test_a_pickle_cannot_reach_memory(tmp_path: Path) -> None:
    """numpy would take the bytes of an array of objects for addresses; so it is asked in a process of its own."""
    batches(tmp_path, "CIFAR10", "python")
    objects = b"c__builtin__\nset\n((cnumpy\nndarray\n((I1\ntVO\nC\x08AAAAAAAAtRtltR."
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x03" + objects)
    code = "import sys; from lotus.config import Data; from lotus.data.dataset import open_data; "
    code += "open_data(Data(name='cifar10', path=sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Refused" in done.stderr.splitlines()[-1]


def test_cifar_from_npz_or_folders_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(tmp_path)
    assert len(open_data(Data(name="cifar10", path=data.path))[0]) == 12
    root = folder(tmp_path / "folders", {"train/a": 2, "train/b": 2, "test/a": 1})
    assert len(open_data(Data(name="cifar10", path=str(root)))[0]) == 4
    asked: list[Path] = []

    def download(where: Path, which: str) -> None:
        asked.append(where)
        batches(where, which, "python")

    monkeypatch.setattr(cifar, "download", download)
    assert len(open_data(Data(name="cifar10", path=str(tmp_path / "new")))[0]) == 50
    assert asked == [tmp_path / "new"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "file.txt").write_text("x")
    with pytest.raises(Refused, match="cifar-10-batches-py"):
        open_data(Data(name="cifar10", path=str(other)))


def test_a_download_without_a_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_utils = pytest.importorskip("torchvision.datasets.utils")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision_utils, "download_and_extract_archive", unreachable)
    with pytest.raises(Refused, match=r"cannot be downloaded.*no route"):
        open_data(Data(name="cifar10", path=str(tmp_path / "empty")))


# ------------------------------------------------------------------------------------------------------------ hub


def hub(root: Path, parts: dict[str, int], **columns: Any) -> Path:
    """A data set as it lies on the hub: parquet files with features."""
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"]), **columns}
    (root / "data").mkdir(parents=True)
    for part, n in parts.items():
        rows = {
            "image": [Image.new("L", (7, 6), 10 * i) for i in range(n)],
            "label": [i % 2 for i in range(n)],
            **{name: [0] * n for name in columns},
        }
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        made.to_parquet(str(root / "data" / f"{part}-00000-of-00001.parquet"))
    return root


def test_hugging_face(tmp_path: Path) -> None:
    root = hub(tmp_path / "set", {"train": 8, "test": 4})
    train, val = open_data(Data(name=f"hf:{root}", path=str(tmp_path / "cache")))
    assert train.classes == ("no", "yes")
    assert train.labels.tolist() == [0, 1] * 4
    assert train.read(3).tolist() == np.full((6, 7, 3), 30).tolist()
    assert len(val) == 4
    with pytest.raises(Refused, match=r"'dev'.*train, test"):
        open_data(Data(name=f"hf:{root}", path=str(tmp_path / "cache"), options={"val": "dev"}))
    with pytest.raises(Refused, match="no column 'target'"):
        open_data(Data(name=f"hf:{root}", path=str(tmp_path / "cache"), options={"label": "target"}))


def test_hugging_face_with_two_label_columns_asks_which(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = hub(tmp_path / "set", {"train": 8}, coarse=datasets.ClassLabel(names=["one", "two"]))
    data = Data(name=f"hf:{root}", path=str(tmp_path / "cache"))
    with pytest.raises(Refused, match=r"data.options.label.*label, coarse"):
        open_data(data)
    train, val = open_data(data.model_copy(update={"options": {"label": "label", "val_fraction": 0.25}}))
    assert (len(train), len(val)) == (6, 2)


def test_hugging_face_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused, match=r"pip install 'lotus-vit\[hub\]'"):
        open_data(Data(name="hf:someone/something"))


# ------------------------------------------------------------------------------------------------- one law, for all


def test_every_data_set_keeps_the_law(tmp_path: Path) -> None:
    batches(tmp_path / "c10", "CIFAR10", "python")
    batches(tmp_path / "c100", "CIFAR100", "binary")
    at = {
        "digits": "",
        "cifar10": str(tmp_path / "c10"),
        "cifar100": str(tmp_path / "c100"),
        "npz": saved(tmp_path).path,
        "imagefolder": str(folder(tmp_path / "f", {"a": 4, "b": 4})),
        "filelist": str(tmp_path / "f.csv"),
        "webdataset": str(tmp_path / "f.tar"),
    }
    with tarfile.open(at["webdataset"], "w") as tar:
        for i, file in enumerate(sorted((tmp_path / "f").rglob("*.png"))):
            with open(at["filelist"], "a") as table:
                table.write(f"{file},{file.parent.name}\n")
            tar.add(file, f"{i}.png")
            about = tarfile.TarInfo(f"{i}.cls")
            about.size = 1
            tar.addfile(about, io.BytesIO(file.parent.name.encode()))
    assert sorted([*at, "hf"]) == methods.names(catalog)
    for name, path in at.items():
        for source in open_data(Data(name=name, path=path)):
            assert isinstance(source, Source)
            assert source.labels.dtype == np.int64
            pixels = source.read(len(source) - 1)
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            assert len({source.name(i) for i in range(len(source))}) == len(source)
            assert (
                source.fingerprint
                == open_data(Data(name=name, path=path))[
                    0 if source.where.endswith(("train", "(train)")) else 1
                ].fingerprint
            )


def test_a_shelf_of_ones_own_joins() -> None:
    import types

    def mine(path: str) -> tuple[Source, Source]:
        return catalog.digits(path)

    shelf = types.ModuleType("mine_shelf")
    mine.__module__ = "mine_shelf"
    shelf.mine = mine  # type: ignore[attr-defined]
    assert len(open_data(Data(name="mine"), [shelf])[0]) == 1438


@pytest.mark.skipif("LOTUS_TEST_DATA" not in os.environ, reason="LOTUS_TEST_DATA names no folder with real data")
def test_real_data() -> None:
    root = Path(os.environ["LOTUS_TEST_DATA"])
    if (root / "cifar10.npz").exists():
        train, val = open_data(Data(name="cifar10", path=str(root / "cifar10.npz")))
        assert (len(train), len(val)) == (50_000, 10_000)
    if (root / "imagenette224").exists():
        train, val = open_data(Data(name="imagefolder", path=str(root / "imagenette224")))
        assert len(train.classes) == 10
        assert train.read(0).shape == (224, 224, 3)


def test_classes_of_a_split_of_the_hub_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="of the extra hub")

    def split(names: list[str], labels: list[int]) -> object:
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        pictures = [Image.fromarray(np.full((4, 4, 3), 40 * number, np.uint8)) for number in range(len(labels))]
        return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=kinds)

    def opened(names: list[str], labels: list[int], held: str) -> tuple[Source, Source]:
        parts = {"train": split(["ant", "bee"], [0, 1, 0, 1]), held: split(names, labels)}
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: parts)
        return open_data(Data(name="hf:some/thing"))

    train, val = opened(["bee", "ant"], [0, 0, 1], "validation")
    assert [val.classes[label] for label in val.labels] == ["bee", "bee", "ant"]
    assert train.classes == val.classes == ("ant", "bee")
    assert val.note == ""
    assert "makes it no test any more" in opened(["ant", "bee"], [0, 1], "test")[1].note
    with pytest.raises(Refused, match="'cat' is not among"):
        opened(["bee", "cat"], [0, 1], "validation")


def test_classes_that_differ_are_named() -> None:
    from types import ModuleType

    def odd(path: str) -> tuple[Source, Source]:
        """Of two lists of classes."""
        made = [
            Source(np.arange(2), names, lambda i: np.zeros((4, 4, 3), np.uint8), str, "x", where="odd")
            for names in (("a", "b"), ("a", "c"))
        ]
        return made[0], made[1]

    shelf = ModuleType("shelf")
    odd.__module__ = "shelf"
    shelf.odd = odd  # type: ignore[attr-defined]
    with pytest.raises(Refused, match=r"Only train has b\. Only val has c\."):
        open_data(Data(name="odd"), [shelf])


def test_a_folder_that_digits_do_not_look_at_is_told_of() -> None:
    """`lotus run configs/digits.yaml data.path=PHOTOS` would train on digits without a word."""
    with pytest.warns(Notice, match=r"^data\.path: photos .*data\.name=imagefolder"):
        catalog.digits("photos")
