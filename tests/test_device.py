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
ASKED = "training/engine.py:clipped"


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
def test_a_step_makes_the_host_wait_once(told: dict[str, dict[str, Any]]) -> None:
    """Twice the steps, as many waits: at the end of an epoch, and for a checkpoint. But for the one question of each step of a
    training: whether it is finite."""
    pairs = [name for name in told if name.endswith(", 1 times the steps")]
    assert len(pairs) > 5
    for name in pairs:
        both = told[name], told[name.replace(", 1 ", ", 2 ")]
        few, many = ({place: count for place, count in one["waits"].items() if ASKED not in place} for one in both)
        more = {place for place in many if few.get(place) != many[place]}
        assert not more, name
        for one in both:
            asked = [count for place, count in one["waits"].items() if ASKED in place]
            assert asked == ([one["steps"]] if one["steps"] else []), name
