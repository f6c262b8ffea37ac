"""What docs/selection.md says can be run, and names what there is."""

import re
from pathlib import Path

import pytest

from selection import dynamic, methods, pickers, scores
from selection.redraw import State, redraw

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")


def test_every_block_of_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "mine"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/selection.md", "exec"), names)
    assert (tmp_path / "state.npz").exists()
    assert (tmp_path / "ticket.npz").exists()
    assert capsys.readouterr().out.splitlines()[1].startswith("300 400")
    mine = type(dynamic)("mine")
    mine.by_loss = names["by_loss"]
    assert len(redraw(State([0] * 10), pick="by_loss", epoch=0, epochs=1, keep=0.3, shelves=[mine]).rows) == 3


@pytest.mark.parametrize("shelf", [dynamic, pickers, scores], ids=lambda shelf: shelf.__name__)
def test_every_method_is_named(shelf):
    assert [name for name in methods.names(shelf) if f"`{name}`" not in TEXT] == []
