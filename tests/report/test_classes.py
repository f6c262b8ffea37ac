"""What is told of each class."""

from __future__ import annotations

import numpy as np
import pytest

from lotus.report.classes import per_class, section


@pytest.mark.parametrize("dense", [True, False])
def test_a_thousand_classes_stay_readable(dense: bool) -> None:
    rng = np.random.default_rng(0)
    of = rng.integers(1, 60, 1000)
    of[17] = 0
    right, before = rng.binomial(of, 0.7), rng.binomial(of, 0.6)
    names = [f"n{number:04d}" for number in range(1000)]
    counts = [{"right": one.tolist(), "of": of.tolist()} for one in (right, before)]
    told = per_class(names, counts[0], counts[1] if dense else None)
    there = of > 0
    assert told["macro"] == pytest.approx(100 * np.mean(right[there] / of[there]))
    assert told.get("dense_macro") == (pytest.approx(100 * np.mean(before[there] / of[there])) if dense else None)
    assert len(told["classes"]) == 1000
    assert told["classes"][17]["top1"] is None
    shown = section(told, 71.0)
    assert len(shown.rows) == 21
    assert shown.rows[10][0] == "..."
    each = np.where(there, right / np.maximum(of, 1), np.nan)
    for place, (first, last) in enumerate(zip(shown.rows[:10], shown.rows[11:], strict=True)):
        assert float(first[1].split(" ")[0]) == pytest.approx(100 * np.sort(each[there])[place], abs=0.051)
        assert float(last[1].split(" ")[0]) == pytest.approx(100 * np.sort(each[there])[place - 10], abs=0.051)
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert "all are in results.json" in shown.text
    assert "not measured: n0017" in shown.text


def test_few_classes_are_all_shown_worst_first() -> None:
    told = per_class(["a", "b", "c"], {"right": [1, 9, 2], "of": [2, 10, 10]})
    shown = section(told, 54.5)
    assert [row[0] for row in shown.rows] == ["c", "a", "b"]
    assert shown.rows[0] == ("c", "20.0 ± 12.6", "10")  # sqrt(0.2 * 0.8 / 10)
    assert "Macro average 53.33 %, over all images 54.50 ± 10.62 % (n = 22)" in shown.text
