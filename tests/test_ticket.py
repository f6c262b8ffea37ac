"""`lotus ticket` as a user meets it: on data sets with and without files, with images held out and damaged. No torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotus import ticket
from lotus.cli import main
from lotus.config import Config
from lotus.data import beton, dataset
from lotus.run import Run
from selection.errors import Refused
from selection.signals import Signals
from selection.subset import Known, Subset

CLASSES = ("apple", "pear/..", "plum")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder over 36 pictures in three classes, of which one is damaged and a sixth held out; no proxy was trained."""
    base = tmp_path_factory.mktemp("ticket")
    rng = np.random.default_rng(0)
    for name in ("apple", "pear", "plum"):
        (base / "photos" / name / "more").mkdir(parents=True)
        for number in range(12):
            inside = "more" if number % 5 == 0 else "."
            file = base / "photos" / name / inside / f"{name}_{number:02d}.png"
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(file)
    settings = Config.model_validate(
        {
            "folder": str(base / "run"),
            "data": {
                "name": "imagefolder", "path": str(base / "photos"), "options": {"val_fraction": 0.17},
                "damaged": "skip", "loader": "torch", "write": "raw", "max_side": 0,
            },
        }
    )  # fmt: skip
    run = Run(settings)
    train = dataset.open_data(settings.data)[0]
    Path(train.name(4)).write_bytes(b"no picture")
    train = dataset.open_data(settings.data)[0]
    for _ in beton.prepare(train, run.train_beton, settings.data):
        pass
    run.settle()
    manifest = beton.Manifest.load(run.train_beton)
    assert len(manifest.skipped) == 1
    signals = Signals(
        {
            "labels": beton.labels(run.train_beton),
            "error_norm": rng.random((1, 2, manifest.n)),
            "embeddings": rng.normal(size=(manifest.n, 6)),
        },
        fingerprint=manifest.fingerprint,
        classes=manifest.classes,
    )
    signals.save(run.signals)
    assert (
        main(
            [
                "select",
                str(run.signals),
                "--score",
                "el2n",
                "--pick",
                "ccs",
                "--keep",
                "0.4",
                "--out",
                str(run.ticket),
                "--json",
            ]
        )
        == 0
    )
    return run.folder


def told(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main(["ticket", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main(["ticket", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["t.npy", "t.json", "t.txt", "t.csv"])
@pytest.mark.parametrize("index", ["", "row", "source"])
def test_there_and_back(run, capsys, name, index, tmp_path):
    more = ["--index", index] if index else []
    told(capsys, "export", run, tmp_path / name, *more)
    told(capsys, "import", tmp_path / name, "--data", run, "--out", tmp_path / "back.npz", *more)
    before, after = Subset.load(run / "subset.npz"), Subset.load(tmp_path / "back.npz")
    assert np.array_equal(before.rows, after.rows)
    assert before.fingerprint == after.fingerprint
    pairs = told(capsys, "compare", run, tmp_path / "back.npz")["pairs"]
    assert pairs[0]["jaccard"] == 1


def test_indices_of_the_source_are_those_of_its_files(run, capsys, tmp_path):
    """What `Dataset.select` and `torch.utils.data.Subset` take: images held out and damaged count there, too."""
    subset = Subset.load(run / "subset.npz")
    files = sorted(
        (run.parent / "photos").rglob("*.png"),
        key=lambda file: (file.parts[len(run.parts)], os.path.dirname(file), file.name),
    )
    told(capsys, "export", run, tmp_path / "t.npy")
    told(capsys, "export", run, tmp_path / "t.txt", "--paths")
    taken = [str(files[number].relative_to(run.parent / "photos")) for number in np.load(tmp_path / "t.npy")]
    assert taken == (tmp_path / "t.txt").read_text().splitlines()
    rows = [beton.image(run / "data" / "train.beton", row) for row in subset.rows.tolist()]
    for name, pixels in zip(taken, rows, strict=True):
        assert np.array_equal(np.asarray(Image.open(run.parent / "photos" / name)), pixels)
    assert not np.array_equal(np.load(tmp_path / "t.npy"), subset.rows)


def test_a_pickle_of_addresses_is_refused(run, tmp_path):
    """In a process of its own, which it would end."""
    objects = b"c__builtin__\nset\n((cnumpy\nndarray\n((I1\ntVO\nC\x08AAAAAAAAtRtltR."
    (tmp_path / "t.pickle").write_bytes(b"\x80\x03" + objects)
    words = ["ticket", "import", tmp_path / "t.pickle", "--data", run, "--out", tmp_path / "t.npz"]
    done = subprocess.run(
        [sys.executable, "-m", "lotus", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    assert "by hand" in done.stderr
    assert not (tmp_path / "t.npz").exists()


@pytest.mark.parametrize("name", ["t.npy", "t.json", "t.txt", "t.csv"])
def test_rows_of_ours_are_not_taken_for_indices_of_the_source(run, capsys, name, tmp_path):
    """A ticket alone does not know what was held out; the run does, and would find other images under its rows."""
    before = Subset.load(run / "subset.npz")
    before.save(tmp_path / "bare.npz")
    file, back = tmp_path / name, tmp_path / "back.npz"
    assert "--index row" in refused(capsys, "export", tmp_path / "bare.npz", file)
    assert not file.exists()
    told(capsys, "export", tmp_path / "bare.npz", file, "--index", "row")
    words = ("import", file, "--data", run, "--out", back)
    assert "Say --index row if it does" in refused(capsys, *words)
    assert not back.exists()
    told(capsys, *words, "--index", "row")
    assert np.array_equal(Subset.load(back).rows, before.rows)
    if name != "t.csv":  # whose labels say that it is not so
        assert "held out for validation" in str(told(capsys, *words, "--index", "source"))


def test_paths_and_labels(run, capsys, tmp_path):
    told(capsys, "export", run, tmp_path / "t.txt", "--labels")
    lines = (tmp_path / "t.txt").read_text().splitlines()
    assert all(line.split("/")[0] == ("apple", "pear", "plum")[int(line.split()[1])] for line in lines)
    told(capsys, "import", tmp_path / "t.txt", "--data", run, "--out", tmp_path / "back.npz")
    assert np.array_equal(Subset.load(tmp_path / "back.npz").rows, Subset.load(run / "subset.npz").rows)


def test_a_beton_of_the_subset_is_those_images_byte_for_byte(run, capsys, tmp_path):
    told(capsys, "export", run, tmp_path / "part.beton")
    whole, part = beton.opened(run / "data" / "train.beton"), beton.opened(tmp_path / "part.beton")
    rows = Subset.load(run / "subset.npz").rows
    assert len(part) == len(rows)
    assert np.array_equal(part.labels, whole.labels[rows])
    for at, row in enumerate(rows.tolist()):
        assert part.payload(at).tobytes() == whole.payload(row).tobytes()
    assert (
        beton.Manifest.load(tmp_path / "part.beton").fingerprint
        != beton.Manifest.load(run / "data" / "train.beton").fingerprint
    )
    (tmp_path / "other.json").write_text("[]")
    assert "stands where the manifest" in refused(capsys, "export", run, tmp_path / "other.beton")
    assert (tmp_path / "other.json").read_text() == "[]"


def test_a_broken_write_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    subset, data = ticket.opened(run)
    for name in ("part.beton", "folder"):
        with pytest.raises(Refused):
            ticket.export(subset, data, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["links", "hard links", "copies", "copy"])
def test_a_folder_by_class(run, capsys, way, tmp_path, monkeypatch):
    def no(*_, **__):
        raise OSError(1, "Operation not permitted")

    if way in ("hard links", "copies"):
        monkeypatch.setattr(Path, "symlink_to", no)
    if way == "copies":
        monkeypatch.setattr(os, "link", no)
    words = told(capsys, "export", run, tmp_path / "out", *(["--copy"] if way == "copy" else []))["told"]
    assert words[-1].endswith("copies" if way == "copy" else f" {way}")
    files = sorted((tmp_path / "out").rglob("*.png"))
    told(capsys, "export", run, tmp_path / "t.txt", "--paths")
    lines = (tmp_path / "t.txt").read_text().splitlines()
    assert len(files) == len(lines)
    photos = run.parent / "photos"
    assert sorted(file.read_bytes() for file in files) == sorted((photos / line).read_bytes() for line in lines)
    assert {file.parent.name for file in files} == {"apple", "pear", "plum"}
    assert all(file.is_symlink() == (way == "links") for file in files)
    assert "not empty" in refused(capsys, "export", run, tmp_path / "out")


def test_images_that_are_no_files_become_pictures(capsys, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (20, 6, 6, 3)).astype(np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4], classes=np.array(["../evil", "a/b"]))
    (tmp_path / "c.yaml").write_text(f"data: {{name: npz, path: {tmp_path}/d.npz}}\nfolder: {tmp_path}/none\n")
    np.save(tmp_path / "rows.npy", [3, 4, 19])
    told(capsys, "import", tmp_path / "rows.npy", "--data", tmp_path / "c.yaml", "--out", tmp_path / "t.npz")
    told(capsys, "export", tmp_path / "t.npz", tmp_path / "out", "--data", tmp_path / "c.yaml")
    files = {
        str(file.relative_to(tmp_path / "out")): np.asarray(Image.open(file))
        for file in (tmp_path / "out").rglob("*.png")
    }
    assert sorted(files) == ["_evil/0000004.png", "a_b/0000003.png", "a_b/0000019.png"]
    assert np.array_equal(files["a_b/0000019.png"], x[19])


def test_other_data_are_refused_and_forced_with_a_word_on_the_risk(run, capsys, tmp_path):
    known = Subset.load(run / "subset.npz")
    stranger = Subset(known.rows, known.total, fingerprint="stranger")
    stranger.save(tmp_path / "s.npz")
    for words in (
        ("show", tmp_path / "s.npz", "--data", run),
        ("export", tmp_path / "s.npz", tmp_path / "x.npy", "--data", run),
        ("import", tmp_path / "s.npz", "--data", run, "--out", tmp_path / "x.npz"),
    ):
        assert "data stranger" in (why := refused(capsys, *words))
        assert "--force, at the risk that" in why
        assert words[0] != "export" or not (tmp_path / "x.npy").exists()
        notes = told(capsys, *words, "--force")
        assert "forced: the ticket is of data stranger" in str(notes)
    assert "data stranger" in refused(capsys, "compare", run, tmp_path / "s.npz")
    assert told(capsys, "compare", run, tmp_path / "s.npz", "--force")["pairs"][0]["jaccard"] == 1
    assert Subset.load(tmp_path / "x.npz").fingerprint == known.fingerprint
    Subset([0], 999, fingerprint="stranger").save(tmp_path / "s.npz")
    assert "Nothing can force" in refused(
        capsys, "export", tmp_path / "s.npz", tmp_path / "y.npy", "--data", run, "--force"
    )


def test_data_that_changed_since_they_were_prepared(run, capsys, tmp_path):
    extra = run.parent / "photos" / "apple" / "apple_99.png"
    Image.new("RGB", (8, 8)).save(extra)
    try:
        why = refused(capsys, "export", run, tmp_path / "t.npy")
        assert "has changed since it was prepared" in why
        assert told(capsys, "export", run, tmp_path / "t.npy", "--index", "row")["kept"] > 0
    finally:
        extra.unlink()


@pytest.mark.parametrize("where", ["signals.npz", "data/train.beton", ".", "config.yaml"])
def test_data_are_named_in_any_of_these_ways(run, capsys, where, tmp_path):
    rows = Subset.load(run / "subset.npz").rows
    np.save(tmp_path / "r.npy", rows)
    more = ["--index", "row"] if where in (".", "config.yaml") else []
    told(capsys, "import", tmp_path / "r.npy", "--data", run / where, "--out", tmp_path / "t.npz", *more)
    assert np.array_equal(Subset.load(tmp_path / "t.npz").rows, rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "{bare}", "{tmp}/folder"), "needs the images"),
        (("export", "{bare}", "{tmp}/x.txt", "--paths"), "needs the images"),
        (("export", "{bare}", "{tmp}/x.npy", "--index", "source"), "how the data set comes"),
        (("export", "{bare}", "{tmp}/x.npy"), "the ticket does not say how the data set comes"),
        (
            ("export", "{bare}", "{tmp}/x.csv", "--data", "{run}/signals.npz"),
            "--index row for the rows of those that train",
        ),
        (("export", "{bare}", "{tmp}/x.pdf", "--index", "row"), "written are"),
        (("export", "{bare}", "{tmp}/x.beton", "--data", "{run}/signals.npz"), "no train.beton"),
        (("export", "{bare}", "{tmp}/x", "--data", "{run}/signals.npz"), "holds none"),
        (("show", "{run}/signals.npz"), "not a ticket"),
        (("show", "{tmp}"), "no ticket in this folder"),
        (("show", "{bare}", "--data", "{tmp}/nowhere"), "there is nothing"),
        (("show", "{bare}", "--picture", "{tmp}/x.gif"), "drawn are"),
        (("compare", "{bare}"), "two tickets"),
        (("import", "{tmp}/x.npy", "--data", "{run}", "--out", "{tmp}/y.npz"), "cannot be read"),
        (("import", "{bare}", "--data", "{run}", "--out", "{tmp}/y.npy"), "are .npz files"),
    ],
)
def test_what_cannot_be_done_says_so(run, capsys, words, says, tmp_path):
    subset = Subset.load(run / "subset.npz")
    subset.save(tmp_path / "bare.npz")
    names = {"run": run, "tmp": tmp_path, "bare": tmp_path / "bare.npz"}
    assert says in refused(capsys, *(word.format(**names) for word in words))


@pytest.mark.parametrize(
    "flag",
    [
        ("--keep", "0.1"), ("--as", "remove"), ("--seed", "3"), ("--negate",), ("--column", "x"), ("--order", "class"),
        ("--index", "row"),
    ],
)  # fmt: skip
def test_a_ticket_of_ours_takes_no_flag_for_files_of_others(run, capsys, flag, tmp_path):
    words = ("import", run / "subset.npz", "--data", run, "--out", tmp_path / "t.npz")
    assert f"{flag[0]}: {run / 'subset.npz'} is a ticket of LOTUS" in refused(capsys, *words, *flag)
    assert not list(tmp_path.iterdir())
    told(capsys, *words)
    assert np.array_equal(Subset.load(tmp_path / "t.npz").rows, Subset.load(run / "subset.npz").rows)


def test_a_seed_is_refused_where_nothing_is_drawn(run, capsys, tmp_path):
    np.save(tmp_path / "rows.npy", [1, 2])
    np.save(tmp_path / "scores.npy", np.zeros(Subset.load(run / "subset.npz").total))
    rows, scores = (
        ("import", tmp_path / name, "--data", run / "signals.npz", "--out", tmp_path / "t.npz")
        for name in ("rows.npy", "scores.npy")
    )
    for words in (rows, scores):
        assert "--seed 3: decides among equal scores" in refused(capsys, *words, "--seed", "3")
        assert not (tmp_path / "t.npz").exists()
    drawn = []
    for seed in ("3", "4"):
        told(capsys, *scores, "--keep", "0.5", "--seed", seed)
        drawn.append(Subset.load(tmp_path / "t.npz").rows.tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
def test_a_ticket_cut_short(run, capsys, part, tmp_path):
    whole = (run / "subset.npz").read_bytes()
    (tmp_path / "t.npz").write_bytes(whole[: int(part * len(whole))])
    for words in (
        ("show", tmp_path / "t.npz"),
        ("compare", run, tmp_path / "t.npz"),
        ("export", tmp_path / "t.npz", tmp_path / "x.npy"),
        ("import", tmp_path / "t.npz", "--data", run, "--out", tmp_path / "x.npz"),
    ):
        assert str(tmp_path / "t.npz") in refused(capsys, *words)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.npz"]


@pytest.mark.parametrize("ending", [".png", ".svg", ".html"])
def test_a_picture(run, capsys, ending, tmp_path):
    file = tmp_path / f"p{ending}"
    told(capsys, "show", run, "--picture", file)
    if ending == ".png":
        with Image.open(file) as drawn:
            colors = {color for _, color in drawn.convert("RGB").getcolors(1 << 24)}
            assert drawn.width == 2240
        assert {(0xB8, 0x46, 0x7F), (0xCB, 0xC5, 0xCC), (0x22, 0x25, 0x2B)} <= colors
        return
    text = file.read_text()
    for heading in ("Scores by el2n", "Where the images lie", "Classes", "Kept", "Left out", "14 of 29 images kept"):
        assert heading in text or heading.startswith("14")
    assert text.count("data:image/png") == Subset.load(run / "subset.npz").total
    assert "<script" not in text
    if ending == ".svg":
        import xml.etree.ElementTree as tree

        assert tree.fromstring(text).tag.endswith("svg")


def pictured(run, to):
    words = ["select", str(run / "signals.npz"), "--score", "el2n", "--pick", "k_center", "--keep", "0.5"]
    return [*words, "--no-balance", "--floor", "0.5", "--out", str(to / "t.npz"), "--picture", str(to / "p.svg")]


def test_a_ticket_is_pictured_as_it_is_drawn(run, tmp_path):
    """What `lotus ticket show` draws of it, with the images of the run in whose folder the signals lie."""
    words = pictured(run, tmp_path)
    assert main(words) == 0
    text = (tmp_path / "p.svg").read_text()
    assert text.count("data:image/png") == 29
    assert "Where the images lie" in text
    ticket = Subset.load(tmp_path / "t.npz")
    assert (ticket.origin["floor"], ticket.origin["balance"]) == (0.5, False)
    (tmp_path / "signals.npz").write_bytes((run / "signals.npz").read_bytes())  # of no run: what signals alone can show
    words[1] = str(tmp_path / "signals.npz")
    assert main([*words, "--json"]) == 0
    text = (tmp_path / "p.svg").read_text()
    assert "Where the images lie" in text
    assert "data:image/png" not in text


def test_what_a_file_of_signals_lacks_is_told_with_what_it_has(run, capsys):
    words = ["select", str(run / "signals.npz"), "--keep", "0.5"]
    assert main([*words, "--score", "memorization"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "'memorization' reads run_in, run_p_label, which is not here." in said
    assert "score.subsets.runs=10" in said
    assert "Here: embeddings, error_norm, labels." in said
    assert main([*words, "--score", "el2n", "--pick", "beta"]) == 2
    assert (
        "'beta' reads p_label, which is not here. Here: budget, embeddings, error_norm, keep, labels, quotas,"
        in " ".join(capsys.readouterr().err.split())
    )


def test_a_picture_of_a_bare_ticket(run, capsys, tmp_path):
    Subset([1, 2], 9, fingerprint="d").save(tmp_path / "t.npz")
    told(capsys, "show", tmp_path / "t.npz", "--picture", tmp_path / "p.png")
    scores = np.array([0.5, np.inf, np.inf])
    for values in (scores, np.full(3, 1e30), np.full(3, np.inf), np.zeros(3)):
        bare = Subset([1], 3, fingerprint="d", known=Known([0, 1, 1], ["<b>", "字"], values))
        bare.save(tmp_path / "t.npz")
        told(capsys, "show", tmp_path / "t.npz", "--picture", tmp_path / "p.png")
        told(capsys, "show", tmp_path / "t.npz", "--picture", tmp_path / "p.svg")
    assert "&lt;b&gt;" in (tmp_path / "p.svg").read_text()


def test_a_ticket_to_start_from_stays(tmp_path, capsys):
    rng = np.random.default_rng(0)
    known = {"labels": np.arange(60) % 3, "embeddings": rng.normal(size=(60, 4))}
    Signals(known, fingerprint="d").save(tmp_path / "s.npz")
    words = ["select", f"{tmp_path}/s.npz", "--score", "random", "--pick", "k_center", "--keep"]
    assert main([*words, "0.2", "--out", f"{tmp_path}/few.npz"]) == 0
    assert main([*words, "0.5", "--start", f"{tmp_path}/few.npz", "--seed", "9", "--out", f"{tmp_path}/more.npz"]) == 0
    few, more = (Subset.load(tmp_path / name) for name in ("few.npz", "more.npz"))
    assert (len(few), len(more)) == (12, 30)
    assert set(few.rows) < set(more.rows)
    Subset([1], 60, fingerprint="other").save(tmp_path / "other.npz")
    capsys.readouterr()
    assert main([*words, "0.5", "--start", f"{tmp_path}/other.npz"]) == 2
    assert "start: it is for 60 images of data other" in capsys.readouterr().err


def test_a_proxy_is_not_written_over(run, tmp_path, capsys):
    signals = tmp_path / "signals.npz"
    signals.write_bytes((run / "signals.npz").read_bytes())
    words = ["select", str(signals), "--score", "el2n", "--pick", "ccs", "--keep", "0.4", "--out"]
    assert main([*words, str(signals)]) == 2
    assert "there is something there that is no ticket" in capsys.readouterr().err
    assert signals.read_bytes() == (run / "signals.npz").read_bytes()
    assert main([*words, f"{tmp_path}/t.npz"]) == main([*words, f"{tmp_path}/t.npz", "--seed", "1"]) == 0


@pytest.mark.parametrize("name", ["rows.npy", "scores.npy"])
def test_an_import_writes_over_its_like_alone(run, tmp_path, capsys, name):
    total = Subset.load(run / "subset.npz").total
    np.save(tmp_path / "rows.npy", [1, 2])
    np.save(tmp_path / "scores.npy", np.linspace(0, 1, total))
    for proxy in ("signals.npz", "subset.npz")[: 1 if name == "rows.npy" else 2]:
        there = tmp_path / proxy
        there.write_bytes((run / proxy).read_bytes())
        words = ["import", tmp_path / name, "--data", run / "data" / "train.beton", "--out"]
        assert "there is something there that is no" in refused(capsys, *words, there)
        assert there.read_bytes() == (run / proxy).read_bytes()
    for _ in range(2):
        told(capsys, *words, tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--set", "pick.name=foo"), "Write --pick foo"),
        (("--set", "score.name=foo"), "Write --score foo"),
        (("--out", "{tmp}/file/t.npz"), "file is no folder that can be written to"),
        (("--out", "{tmp}/t.npz", "--picture", "{tmp}/file/p.png"), "file is no folder that can be written to"),
        (("--out", "{tmp}/t.npz", "--picture", "{tmp}/p.gif"), "drawn are"),
        (("--out", "{tmp}/t.npz", "--picture", "{tmp}/folder.png"), "it is a folder"),
    ],
)
def test_what_a_draw_cannot_do_is_refused_before_it(run, tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.setattr("selection.lottery.select", lambda *_, **__: pytest.fail("it was drawn"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    words = ["select", str(run / "signals.npz"), "--score", "el2n", "--pick", "ccs", "--keep", "0.4"]
    assert main([*words, *(word.format(tmp=tmp_path) for word in more)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_ticket_is_there_though_its_picture_is_not(run, tmp_path, monkeypatch):
    def no(*_):
        raise Refused("picture: no. None.")

    monkeypatch.setattr("lotus.report.ticket_picture.draw", no)
    words = ["select", str(run / "signals.npz"), "--score", "el2n", "--pick", "ccs", "--keep", "0.4"]
    assert main([*words, "--out", f"{tmp_path}/t.npz", "--picture", f"{tmp_path}/p.png"]) == 2
    assert len(Subset.load(tmp_path / "t.npz"))


def test_an_exported_list_is_not_written_over_by_a_manifest(run, tmp_path, capsys):
    words = ["ticket", "export", str(run), f"{tmp_path}/part.beton"]
    assert [main(words), main(words), main([*words, "--force"])] == [0, 2, 0]
    assert "part.beton: is there already" in " ".join(capsys.readouterr().err.split())
    assert main(["ticket", "export", str(run), f"{tmp_path}/part.json", "--force"]) == 0
    kept = (tmp_path / "part.json").read_bytes()
    assert main([*words, "--force"]) == 2
    assert "stands where the manifest of part.beton would go" in capsys.readouterr().err
    assert (tmp_path / "part.json").read_bytes() == kept


def test_selecting_and_tickets_load_no_torch(run, tmp_path):
    np.save(tmp_path / "emb.npy", np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32))
    (tmp_path / "other").mkdir()
    words = [
        [
            "select",
            f"{tmp_path}/emb.npy",
            "--pick",
            "k_center",
            "--keep",
            "0.1",
            "--out",
            f"{tmp_path}/k.npz",
            "--json",
        ],
        pictured(run, tmp_path / "other"),
        [
            "select",
            f"{run}/signals.npz",
            "--score",
            "el2n",
            "--pick",
            "ccs",
            "--keep",
            "0.4",
            "--out",
            f"{tmp_path}/t.npz",
            "--max-memory",
            "1GB",
        ],
        ["ticket", "show", f"{run}"],
        ["ticket", "compare", f"{run}", f"{tmp_path}/t.npz"],
        ["ticket", "export", f"{run}", f"{tmp_path}/t.csv"],
        ["ticket", "import", f"{tmp_path}/t.csv", "--data", f"{run}", "--out", f"{tmp_path}/u.npz"],
        ["ticket", "show", f"{run}", "--picture", f"{tmp_path}/p.png"],
    ]
    code = (
        "import sys\nfrom lotus.cli import main\n"
        f"assert [main(words) for words in {words!r}] == [0] * {len(words)}\n"
        "sys.exit(f'loaded: {heavy}' if (heavy := {'torch', 'timm', 'deepspeed', 'ffcv', 'numba'} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_of_images_that_are_no_files_are_refused_with_the_cure(capsys, tmp_path):
    """Their names would not be found again: what stands in the text must be readable by import."""
    x, y = np.zeros((12, 4, 4, 3), np.uint8), np.arange(12) % 2
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{name: npz, path: {tmp_path}/d.npz}}\nfolder: {tmp_path}/none\n")
    np.save(tmp_path / "rows.npy", np.array([1, 2, 7]))
    ticket = tmp_path / "t.npz"
    told(capsys, "import", tmp_path / "rows.npy", "--data", config, "--out", ticket)
    for flag in ("--paths", "--labels"):
        said = refused(capsys, "export", ticket, tmp_path / "t.txt", flag, "--data", config)
        assert "no files" in said
        assert "indices" in said
    for name in ("t.txt", "t.csv"):  # which is the cure
        told(capsys, "export", ticket, tmp_path / name, "--data", config)
        told(capsys, "import", tmp_path / name, "--data", config, "--out", tmp_path / "back.npz")
        assert Subset.load(tmp_path / "back.npz").rows.tolist() == [1, 2, 7]
