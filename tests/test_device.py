"""No tensor is left on the host while the model lies elsewhere, and a step does not make the host wait: found without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GATES = "training/regularize.py:after_step"


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_device"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.slow
def test_a_planted_fault_is_found(told: dict[str, dict[str, Any]]) -> None:
    found = {name: bool(line["wrong"] or line["waits"]) for name, line in told.items() if name.startswith("planted: ")}
    assert len(found) == 7
    assert all(found.values()), found


@pytest.mark.slow
def test_all_of_it_lies_where_the_model_lies(told: dict[str, dict[str, Any]]) -> None:
    assert len(told) > 20
    wrong = {name: line["wrong"] for name, line in told.items() if line["wrong"] and not name.startswith("planted: ")}
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())


@pytest.mark.slow
def test_a_step_does_not_make_the_host_wait(told: dict[str, dict[str, Any]]) -> None:
    """Twice the steps, as many waits: at the end of an epoch, and for a checkpoint. Gates alone are told at once whether a step was
    finite, since they move by it before the next forward pass."""
    pairs = [name for name in told if name.endswith(", 1 times the steps")]
    assert len(pairs) > 5
    for name in pairs:
        few, many = told[name], told[name.replace(", 1 ", ", 2 ")]
        assert few["steps"] is None or many["steps"] > few["steps"], name
        more = {place for place in many["waits"] if few["waits"].get(place) != many["waits"][place]}
        assert all(place.startswith(GATES) for place in more), name
        assert bool(more) == name.startswith("gates"), name
        assert all(many["waits"][place] == many["steps"] for place in more), name
