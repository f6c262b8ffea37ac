"""Two ranks of a run of which one is killed, or stopped: the other one says which and how to go on, and ends by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import free_port, one_of_two

from lotus import watch
from lotus.cli import main
from lotus.watch import Lost, Watch

ROOT = Path(__file__).resolve().parent.parent
WORDS = [str(ROOT / "configs" / "staged.yaml"), "select.keep=0.5", "score.epochs=40", "score.seeds=1", "train.batch_size=32", "model.args.depth=1",
         "model.args.embed_dim=16", "model.args.num_heads=2", "train.epochs=40", "device=cpu", "rank_timeout=0.05"]  # fmt: skip


def begin(rank: int, folder: Path, port: int, *words: str) -> subprocess.Popen[str]:
    told = {**one_of_two(rank, port), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lotus", "train", *WORDS, *words, f"folder={folder}", "--plain"], env={**os.environ, **told}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def reaches(folder: Path, event: str, stage: str, seconds: float = 240) -> None:
    """Wait until the log says so."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (folder / "log.jsonl").exists():
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line.endswith("}")]
            if any(line["event"] == event and line["stage"] == stage for line in lines):
                return
        time.sleep(0.05)
    pytest.fail(f"{stage} did not come to {event}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "sent", "event", "stage"),
    [(1, signal.SIGKILL, "began", "score"), (0, signal.SIGKILL, "step", "score"), (1, signal.SIGKILL, "step", "train"),
     (1, signal.SIGSTOP, "step", "score"), (0, signal.SIGSTOP, "step", "train")],
)  # fmt: skip
def test_the_rank_that_is_left_names_the_other_and_ends(
    victim: int, sent: int, event: str, stage: str, tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "run"
    words = ["select.keep=1"] if stage == "train" else []
    ranks = [begin(rank, folder, port, *words) for rank in range(2)]
    try:
        reaches(folder, event, stage)
        ranks[victim].send_signal(sent)
        began = time.monotonic()
        _, says = ranks[1 - victim].communicate(timeout=60)
        assert time.monotonic() - began < (15 if sent == signal.SIGKILL else 20)
        assert ranks[1 - victim].returncode == 75, says
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = [line for line in says.splitlines() if line.startswith("lotus: ")]
    assert len(told) == 1, says
    wrong = "is gone" if sent == signal.SIGKILL else "has not answered for 3 seconds"
    assert f"rank {victim} (process {ranks[victim].pid} on " in told[0]
    assert wrong in told[0]
    assert "The same command goes on from the last checkpoint." in told[0]
    assert "Traceback" not in says


@pytest.mark.parametrize(
    "told", [{"RANK": "x"}, {"RANK": "1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"LOCAL_RANK": "-1"}]
)
def test_an_environment_that_places_no_rank_is_refused_aloud(
    told: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in watch.ALONE:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert main(["run", WORDS[0], "--dry-run"]) == 2
    says = capsys.readouterr().err
    assert "in the environment" in says
    assert "Unset" in says


@pytest.fixture
def others(tmp_path: Path) -> tuple[Watch, Watch]:
    """Ranks 0 and 1 of three, in this process; rank 2 has left."""
    pair = [Watch(tmp_path, rank, 3, patience=60, every=0.02) for rank in range(2)]
    third = Watch(tmp_path, 2, 3, patience=60)
    with third:
        pass
    return pair[0], pair[1]


def test_who_is_there_or_has_left_is_not_missed(others: tuple[Watch, Watch]) -> None:
    with others[0], others[1]:
        time.sleep(0.1)
        assert others[0].lost() is None
        assert others[1].lost() is None
    assert others[0].lost() is None


def test_who_is_gone_is_named_by_the_first_of_those_that_are_left(others: tuple[Watch, Watch], tmp_path: Path) -> None:
    with others[0], others[1]:
        time.sleep(0.1)
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        told = json.loads((tmp_path / "2").read_text())
        (tmp_path / "2").write_text(json.dumps({**told, "left": False, "pid": gone.pid}))
        lost = [one.lost() for one in others]
    assert [one.speaks for one in lost if one] == [True, False]
    assert f"rank 2 (process {gone.pid} on " in str(lost[0])
    assert "is gone" in str(lost[0])


def test_a_failure_beside_a_lost_rank_is_told_as_that_and_any_other_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENT", 0.3)
    one = Watch(tmp_path, 0, 2, patience=60, every=0.02, grace=60)
    with pytest.raises(RuntimeError, match="my own"), one:
        raise RuntimeError("my own")
    assert "my own" in json.loads((tmp_path / "0").read_text())["why"]
    other = Watch(tmp_path, 1, 2, patience=60, every=0.02, grace=60)
    with pytest.raises(Lost, match=r"rank 0 .*RuntimeError\('my own'\)"), other:
        raise RuntimeError("Connection closed by peer")


def test_who_was_asked_to_stop_says_so_in_its_own_words_beside_one_that_was_too(tmp_path: Path) -> None:
    for rank in range(2):
        one = Watch(tmp_path, rank, 2, patience=60, every=0.02, grace=60)
        with pytest.raises(KeyboardInterrupt, match="saved to 000071"), one:
            raise KeyboardInterrupt("train: stopped, saved to 000071")
        assert json.loads((tmp_path / str(rank)).read_text())["why"] == "train: stopped, saved to 000071"


def test_a_wish_to_stop_goes_to_the_others(tmp_path: Path) -> None:
    """Rank 0 is at work that the others wait for, and only rank 1 was asked."""
    told: list[str] = []
    nobody = SimpleNamespace(now=lambda: None, ask=told.append)
    wishing = SimpleNamespace(now=lambda: SimpleNamespace(reason="asked to terminate"), ask=print)
    with Watch(tmp_path, 0, 2, patience=60, every=0.02, flag=nobody):
        with Watch(tmp_path, 1, 2, patience=60, every=0.02, flag=nobody):
            time.sleep(0.2)
        assert not told
        with Watch(tmp_path, 1, 2, patience=60, every=0.02, flag=wishing):
            while not told:
                time.sleep(0.02)
    assert set(told) == {"asked to terminate"}


def test_a_pause_of_this_process_is_no_silence_of_another(tmp_path: Path) -> None:
    """Silence is counted in looks, not by the clock: all ranks of a group may be stopped for an hour and go on."""
    one = Watch(tmp_path, 0, 2, patience=1.0, every=0.2)
    with Watch(tmp_path, 1, 2, patience=60):
        assert one.lost() is None
        time.sleep(1.2)
        assert one.lost() is None
