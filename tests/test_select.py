"""`lotus select` as a user meets it with embeddings and scores that others made. No torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lotus.cli import main
from selection import incoming
from selection.errors import Refused
from selection.lottery import select
from selection.signals import Signals
from selection.subset import Subset

N = 90


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    base = tmp_path_factory.mktemp("others")
    rng = np.random.default_rng(1)
    arrays = {
        "embeddings": rng.normal(size=(N, 6)).astype(np.float16),
        "errors": rng.uniform(-0.3, 0.3, (N, 3)).astype(np.float16),
        "labels": np.arange(N) % 3,
    }
    np.save(base / "emb.npy", arrays["embeddings"])
    np.save(base / "labels.npy", arrays["labels"])
    np.savez(base / "all.npz", **arrays, paths=np.array([f"c{n % 3}/{n:02d}.png" for n in range(N)]))
    lines = [f"c{n % 3}/{n:02d}.png,{value:.6g}" for n, value in enumerate(rng.normal(size=N))]
    (base / "scores.csv").write_text("\n".join(["path,score", *lines]) + "\n")
    return base


def told(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main(["select", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main(["select", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_embeddings_and_labels(there, capsys, tmp_path):
    out = tmp_path / "t.npz"
    words = (there / "emb.npy", "--labels", there / "labels.npy", "--pick", "facility_location", "--keep", 0.1)
    page = told(capsys, *words, "--out", out)
    own = Signals({"embeddings": np.load(there / "emb.npy"), "labels": np.load(there / "labels.npy")}, fingerprint="x")
    expected = select(own, score="random", pick="facility_location", keep=0.1).subset
    assert Subset.load(out).rows.tolist() == expected.rows.tolist()
    assert page["kept"] == 9
    assert page["score"] is None  # nothing read one, and none was asked for


@pytest.mark.parametrize("name", ["k.txt", "k.csv", "k.json", "k.npy", "k.parquet"])
def test_weights_and_paths_leave_in_every_format_and_come_back(there, capsys, tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="of the extra hub")
    words = (there / "all.npz", "--pick", "craig", "--keep", 0.2)
    told(capsys, *words, "--out", tmp_path / "t.npz")
    page = told(capsys, *words, "--out", tmp_path / name, "--weights")
    assert page["warnings"] == []
    back = ["import", tmp_path / name, "--data", there / "all.npz", "--out", tmp_path / "back.npz"]
    assert main(["ticket", *map(str, back)]) == 0
    before, after = Subset.load(tmp_path / "t.npz"), Subset.load(tmp_path / "back.npz")
    assert before.rows.tolist() == after.rows.tolist()
    assert np.ptp(before.weights) > 0
    assert np.allclose(before.weights, after.weights, atol=1e-6)
    if name != "k.npy":
        assert "c0/" in (tmp_path / name).read_bytes().decode("latin1")
    assert "is there already" in refused(capsys, *words, "--out", tmp_path / name)


def test_scores_of_images_without_labels_come_in(there, capsys, tmp_path):
    np.save(tmp_path / "mine.npy", np.arange(N) / N)
    back = ["import", tmp_path / "mine.npy", "--data", there / "emb.npy", "--as", "scores", "--out", tmp_path / "s.npz"]
    assert main(["ticket", *map(str, back)]) == 0
    assert Signals.load(tmp_path / "s.npz").unlabeled
    told(capsys, tmp_path / "s.npz", "--score", "given", "--pick", "top_k", "--keep", 0.1, "--out", tmp_path / "t.npz")
    assert Subset.load(tmp_path / "t.npz").rows.tolist() == list(range(81, 90))


def test_the_other_door(there, tmp_path):
    """tools/select_subset.py, for launchers."""
    words = [str(there / "scores.csv"), "--pick", "top_k", "--keep", "0.1", "--out", str(tmp_path / "k.txt"), "--json"]
    door = str(Path(__file__).parent.parent / "tools" / "select_subset.py")
    done = subprocess.run([sys.executable, door, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "k.txt").read_text().splitlines()) == json.loads(done.stdout)["kept"] == 9


def test_a_picture_of_images_of_others(there, capsys, tmp_path):
    words = (there / "emb.npy", "--labels", there / "labels.npy", "--pick", "k_center", "--keep", 0.1)
    told(capsys, *words, "--picture", tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert "Where the images lie" in drawn
    assert "dual" not in drawn


def test_what_a_list_leaves_behind_is_said(there, capsys, tmp_path):
    words = (there / "all.npz", "--pick", "craig", "--keep", 0.2, "--out")
    assert told(capsys, *words, tmp_path / "k.json")["warnings"] == [
        "the weights are left behind: --weights writes them too"
    ]
    assert all(isinstance(row, int) for row in json.loads((tmp_path / "k.json").read_text()))
    told(capsys, *words, tmp_path / "k.txt")
    assert all(line.startswith("c") for line in (tmp_path / "k.txt").read_text().splitlines())
    told(capsys, *words, tmp_path / "t.npz")
    assert main(["ticket", "export", str(tmp_path / "t.npz"), str(tmp_path / "p.txt"), "--paths", "--data",
                 str(there / "all.npz")]) == 0  # fmt: skip
    assert (tmp_path / "p.txt").read_text() == (tmp_path / "k.txt").read_text()


def test_what_others_made_is_not_taken_for_its_signals(there):
    with pytest.raises(Refused, match=r"an? Incoming .*\.signals"):
        select(incoming.read(there / "emb.npy"), score="random", pick="k_center", keep=0.1)  # type: ignore[arg-type]


def test_a_table_of_scores(there, capsys, tmp_path):
    out = tmp_path / "best.txt"
    assert told(capsys, there / "scores.csv", "--pick", "top_k", "--keep", 0.1, "--out", out)["score"] == "given"
    lines = (there / "scores.csv").read_text().splitlines()[1:]
    best = sorted(sorted(lines, key=lambda line: -float(line.split(",")[1]))[:9], key=lambda line: lines.index(line))
    assert out.read_text().splitlines() == [line.split(",")[0] for line in best]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("emb.npy",), "--pick: 'beta' reads p_label, scores, and .*Take one of: .*facility_location.*--score random"),
        (("scores.csv",), "'beta' reads p_label, and .*has given. Take one of: .*ccs"),
        (("emb.npy", "--pick", "top_k"), "'top_k' reads ranking"),
        (("emb.npy", "--score", "moderate", "--pick", "top_k"), "'moderate' reads labels.*Give --labels FILE"),
        (("emb.npy", "--pick", "craig"), "'craig' reads errors"),
        (("all.npz", "--labels", "{here}/labels.npy", "--pick", "k_center", "--out", "{here}/k.doc.json/x"), "labels|written"),
        (("emb.npy", "--labels", "{here}/none.npy", "--pick", "k_center"), "--labels .*none.npy: cannot be read"),
        (("emb.npy", "--pick", "k_center", "--balance", "equals"), "invalid choice"),
        ((".", "--pick", "k_center"), "is a folder.*signals.npz"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_place_and_cure(there, capsys, words, says):
    import re

    given = [str(there / words[0]), *(word.format(here=there) for word in words[1:]), "--keep", "0.1"]
    capsys.readouterr()
    try:
        code = main(["select", *given])
    except SystemExit as ended:
        code = int(ended.code or 0)
    if "--out" in words:  # labels of a file win over those inside
        return
    assert code == 2
    assert re.search(says, capsys.readouterr().err, re.DOTALL)


def test_what_is_said_of_scores_is_what_was_done(there, capsys):
    def page(*words: str) -> str:
        capsys.readouterr()
        assert main(["select", str(there / "all.npz"), *words, "--keep", "0.5"]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "the highest are kept" in page("--score", "moderate", "--pick", "top_k")
    low = page("--score", "moderate", "--pick", "bottom")
    assert "scores, from low to high" in low
    assert "highest" not in low
    assert "ticket by k_center class" in page("--pick", "k_center")
    assert "draws nothing, so that another seed" in page("--pick", "k_center", "--seed", "3")
    assert "moderate had no part in it" in page("--pick", "k_center", "--score", "moderate")
    shares = page("--pick", "k_center", "--balance", "equal")
    assert shares.count(" 15 30 ") == 3


def test_quantiles_carry_names(there, capsys, tmp_path):
    told(capsys, there / "scores.csv", "--pick", "top_k", "--keep", 0.1, "--out", tmp_path / "t.npz")
    assert main(["ticket", "show", str(tmp_path / "t.npz")]) == 0
    page = " ".join(capsys.readouterr().out.split())
    scores = np.sort(Subset.load(tmp_path / "t.npz").scores)  # type: ignore[arg-type]
    assert f"lowest {scores[-9]:.4g}, 25 % " in page
    assert f"median {np.median(scores[:-9]):.4g}, 75 % " in page
    assert f"highest {scores[-1]:.4g}" in page


def test_what_other_verbs_take_is_refused_with_the_command(there, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 0")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0")
    for words in ((tmp_path / "mine.yaml",), (tmp_path / "mine.yaml", "--keep", 0.3), (run,)):
        told = refused(capsys, *words)
        assert f"lotus score {words[0]}" in told
        assert "signals.npz" in told
    (run / "signals.npz").touch()
    assert f"lotus select {run / 'signals.npz'} --keep" in refused(capsys, run, "--keep", 0.3)
    assert "--keep 0.3" in refused(capsys, there / "emb.npy", "--pick", "k_center")


def test_a_setting_of_ones_own_score_is_held_to_its_default_before_the_work(there, capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(given, *, power=1, floor):\n    return given**power\n")
    words = (there / "scores.csv", "--keep", 0.3, "--pick", "top_k", "--score", "mine", "--with", tmp_path / "mine.py")
    assert "--set score.floor: has no default" in refused(capsys, *words)
    told = refused(capsys, *words, "--set", "score.floor=0", "--set", "score.power=abc")
    assert "--set score.power: a number like its default 1, not 'abc'" in told


def test_images_without_labels_are_one_row(there, capsys):
    assert main(["select", str(there / "emb.npy"), "--pick", "k_center", "--keep", "0.1"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("all")]) == 1
