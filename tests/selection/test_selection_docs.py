"""What docs/selection.md says can be run, and names what there is."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotus.cli import main
from selection import dynamic, methods, pickers, scores
from selection.dynamic_pruning import State, epoch_subset
from selection.signals import Signals
from selection.subset import Subset

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")


def test_every_block_of_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "mine"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/selection.md", "exec"), names)
    assert (tmp_path / "state.npz").exists()
    assert (tmp_path / "ticket.npz").exists()
    assert capsys.readouterr().out.splitlines()[1].startswith("300 400")
    mine = type(dynamic)("mine")
    vars(mine)["by_loss"] = names["by_loss"]
    assert len(epoch_subset(State([0] * 10), pick="by_loss", epoch=0, epochs=1, keep=0.3, shelves=[mine]).rows) == 3


def test_a_score_and_a_picker_of_ones_own_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The example's file, and its command to the letter."""
    (file,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "def surprise" in block]
    (command,) = [
        line
        for line in TEXT.replace("\\\n", " ").splitlines()
        if line.startswith("lotus select signals.npz --with mine.py")
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(file)
    loss = np.random.default_rng(0).random((2, 5, 200))
    Signals({"labels": np.arange(200) % 4, "loss": loss}, fingerprint="f").save("signals.npz")
    assert main([*shlex.split(command)[1:], "--json", "--out", "t.npz"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 60
    ticket = Subset.load("t.npz")
    assert ticket.origin["score"] == {"name": "surprise", "last": 3}
    assert ticket.origin["pick"] == {"name": "spread", "first": 0.1}
    np.testing.assert_allclose(ticket.scores, loss[:, -3:].mean(axis=(0, 1)), atol=1e-3)


@pytest.mark.parametrize("shelf", [dynamic, pickers, scores], ids=lambda shelf: shelf.__name__)
def test_every_method_is_named(shelf):
    assert [name for name in methods.names(shelf) if f"`{name}`" not in TEXT] == []
