"""`lotus select --features MODEL PHOTOS`: the embeddings are what the head reads, and a ticket of theirs goes into a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lotus
from lotus.cli import main
from lotus.config import Data, Model
from lotus.data.dataset import open_data
from lotus.vit.model import create
from selection import incoming
from selection.subset import Subset

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "imagefolder.yaml"
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
ABOUT = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 2)):
        for name in "ab":
            (base / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / "photos" / part / name / f"{number}.png")
    torch.manual_seed(0)
    model = create(Model(name="vit_tiny_patch16_224", args=ARGS), 2)
    lotus.save(model, base / "model", about=ABOUT)
    torch.save(model.state_dict(), base / "weights.pth")
    return base


def select(base: Path, *words: object) -> int:
    return main(["select", *map(str, words), "--keep", "0.5", "--json"])


def test_embeddings_are_what_the_head_reads(base, tmp_path, capsys):
    out = tmp_path / "e.npz"
    words = ("--features", base / "model", "--embeddings", out, "--pick", "facility_location")
    assert select(base, base / "photos", *words, "--out", tmp_path / "t.npz") == 0
    found = incoming.read(out)
    source = open_data(Data(name="imagefolder", path=str(base / "photos")))[0]
    assert found.names == tuple(str(Path(source.name(row)).relative_to(source.root)) for row in range(14))
    model = lotus.load(base / "model").eval()
    pixels = torch.from_numpy(np.stack([source.read(row) for row in range(14)])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(ABOUT[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        tokens = model.blocks(model._pos_embed(model.patch_embed((pixels - mean) / std)))
        expected = model.fc_norm(model.norm(tokens)[:, 0])
    assert np.allclose(found.signals["embeddings"], expected.numpy(), atol=2e-3)
    assert found.signals["labels"].tolist() == source.labels.tolist()
    assert found.signals.classes == ("a", "b")
    Subset.load(tmp_path / "t.npz").check(source.fingerprint, 14)  # a run takes it
    capsys.readouterr()
    assert select(base, out, "--pick", "facility_location", "--out", tmp_path / "u.npz") == 0
    assert Subset.load(tmp_path / "u.npz").rows.tolist() == Subset.load(tmp_path / "t.npz").rows.tolist()
    assert json.loads(capsys.readouterr().out)["kept"] == 7
    assert select(base, base / "photos", *words) == 2
    assert "is there already. Select from it" in capsys.readouterr().err


def test_damaged_pictures_are_left_out_and_told(base, tmp_path, capsys):
    """As inspect does, and as a run with data.damaged=skip, which takes the ticket."""
    photos = shutil.copytree(base / "photos", tmp_path / "photos")
    broken = photos / "train" / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:50])
    words = ("--features", base / "model", "--embeddings", tmp_path / "e.npz", "--pick", "facility_location")
    assert select(base, photos, *words, "--out", tmp_path / "t.npz") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "of 14 pictures 1 is left out" in told
    assert str(broken) in told
    found = incoming.read(tmp_path / "e.npz")
    assert "a/3.png" not in found.names
    assert len(found.names) == len(found.signals["embeddings"]) == 13
    data = Data(name="imagefolder", path=str(photos), damaged="skip")
    run = ["prepare", str(CONFIG), f"folder={tmp_path / 'run'}", f"data={data.model_dump_json()}"]
    assert main(run) == 0
    manifest = json.loads((tmp_path / "run" / "data" / "train.json").read_text())
    Subset.load(tmp_path / "t.npz").check(manifest["fingerprint"], 13)
    assert main(["inspect", str(photos), "--features", str(tmp_path / "e.npz"), "--out", str(tmp_path / "seen")]) == 0
    assert json.loads((tmp_path / "seen" / "inspect.json").read_text())["damaged"][0]["image"] == str(broken)


def test_a_folder_of_damaged_pictures_alone_is_refused(base, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"no picture")
    words = ("--features", base / "model", "--embeddings", tmp_path / "e.npz", "--pick", "k_center")
    assert select(base, tmp_path / "photos", *words) == 2
    assert "1.png: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "e.npz").exists()


def test_pictures_without_classes(base, tmp_path, capsys):
    words = ("--features", base / "model", "--embeddings", tmp_path / "e.npz", "--pick", "k_center")
    assert select(base, base / "photos" / "train" / "a", *words, "--out", tmp_path / "k.txt") == 0
    assert "no labels" in capsys.readouterr().out
    kept = (tmp_path / "k.txt").read_text().split()
    assert len(kept) == 4
    assert all((base / "photos" / "train" / "a" / name).is_file() for name in kept)


@pytest.mark.parametrize(
    ("model", "photos", "says"),
    [
        ("vit_tinny", "photos", "--features: timm has no model 'vit_tinny'. Did you mean"),
        ("{base}/weights.pth", "photos", "are weights. Say of which model: --features NAME="),
        ("vit_tiny_patch16_224={base}/none.pth", "photos", "none.pth"),
        ("{base}/model", "none", "does not exist. --features wants a folder of pictures"),
        ("{base}/model", "weights.pth", "is a file"),
        ("{base}/photos", "photos", "--features"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_written(base, tmp_path, capsys, model, photos, says):
    words = ("--features", model.format(base=base), "--embeddings", tmp_path / "e.npz", "--pick", "k_center")
    assert select(base, base / photos, *words) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--pick: say one that goes by embeddings"),
        (("--pick", "k_centre"), "no 'k_centre'. Did you mean 'k_center'"),
    ],
)
def test_what_is_asked_is_checked_before_pictures_are_gone_through(base, tmp_path, capsys, words, says):
    where = ("--features", base / "model", "--embeddings", tmp_path / "e.npz")
    assert select(base, base / "photos", *where, *words) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_embeddings_go_is_for_those_that_are_made(base, tmp_path, capsys):
    np.save(tmp_path / "e.npy", np.zeros((4, 2)))
    assert select(base, tmp_path / "e.npy", "--embeddings", "x.npz", "--pick", "k_center") == 2
    assert "Say --features MODEL too" in capsys.readouterr().err
