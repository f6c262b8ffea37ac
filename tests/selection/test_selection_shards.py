"""Facility location by shards: beside greedy over everything, written out here; exact budgets; any map; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotus.cli import main
from selection import shards
from selection.errors import Refused
from selection.facility import Way, represent
from selection.neighbors import Cosine
from selection.subset import Subset


def clustered(n: int, classes: int = 3, width: int = 8, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    middle = rng.standard_normal((classes, 6, width))
    return {
        "embeddings": middle[labels, rng.integers(0, 6, n)] + 0.4 * rng.standard_normal((n, width)),
        "labels": labels,
    }


def similar(embeddings: np.ndarray) -> np.ndarray:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (1 + unit @ unit.T) / 2


def greedy(matrix: np.ndarray, budget: int, stands: np.ndarray) -> list[int]:
    """To the letter: every gain, every time."""
    cover, taken = np.zeros(len(matrix)), list[int]()
    for _ in range(budget):
        gains = np.maximum(matrix - cover, 0) @ stands
        gains[taken] = -1
        taken.append(int(gains.argmax()))
        cover = np.maximum(cover, matrix[taken[-1]])
    return taken


def value(matrix: np.ndarray, rows: Any, stands: np.ndarray | float = 1.0) -> float:
    return float((matrix[:, rows].max(1) * stands).sum())


def saved(folder: Path, made: dict[str, Any], parts: int = 1) -> list[str]:
    files = [folder / f"e{i}.npz" for i in range(parts)]
    for file, rows in zip(files, np.array_split(np.arange(len(made["labels"])), parts), strict=True):
        np.savez(file, **{name: array[rows] for name, array in made.items()})
    return list(map(str, files))


@pytest.mark.parametrize("maximizer", ["lazy", "sparse", "stochastic"])
def test_an_image_that_stands_for_many_counts_for_many(maximizer: Any) -> None:
    made = clustered(120)["embeddings"].astype(np.float32)
    stands = np.random.default_rng(1).integers(1, 9, 120).astype(np.float64)
    matrix = similar(made)
    way = Way(maximizer, neighbors=119 if maximizer == "sparse" else None, epsilon=1e-4)
    rows, _ = represent("test", Cosine(made), 10, np.random.default_rng(0), [], way, stands)
    exact = value(matrix, greedy(matrix, 10, stands), stands)
    assert value(matrix, rows, stands) >= exact * (1 - 1e-5)
    many = np.repeat(np.arange(120), stands.astype(int))
    alike = greedy(matrix[np.ix_(many, many)], 10, np.ones(len(many)))
    assert value(matrix, many[alike], stands) == pytest.approx(exact)


@pytest.mark.parametrize("balance", [True, False])
def test_shards_come_within_two_percent_of_the_whole(tmp_path: Path, balance: bool) -> None:
    made = clustered(600)
    for parts, count in ((1, 6), (3, 0)):
        subset, given = shards.select(saved(tmp_path, made, parts), shards.Sharded(0.1, count, balance=balance))
        assert len(subset) == 60
        assert subset.total == given.signals.images == 600
        groups = [np.flatnonzero(made["labels"] == c) for c in range(3)] if balance else [np.arange(600)]
        for rows in groups:
            matrix = similar(made["embeddings"][rows])
            taken = np.flatnonzero(np.isin(rows, subset.rows))
            assert abs(len(taken) - len(rows) / 10) < 1
            exact = value(matrix, greedy(matrix, len(taken), np.ones(len(rows))))
            assert value(matrix, taken) > 0.98 * exact


def test_the_seed_decides_and_files_count_in_their_order(tmp_path: Path) -> None:
    files = saved(tmp_path, clustered(200), 2)
    asked = shards.Sharded(0.1, 4)
    first, given = shards.select(files, asked)
    again, _ = shards.select(files, asked, lambda function, items: [function(one) for one in reversed(items)][::-1])
    assert first.rows.tolist() == again.rows.tolist()
    assert first.fingerprint == again.fingerprint == given.signals.fingerprint
    other, _ = shards.select(files, shards.Sharded(0.1, 4, seed=1))
    assert first.rows.tolist() != other.rows.tolist()
    turned, _ = shards.select(files[::-1], asked)
    assert turned.fingerprint != first.fingerprint
    assert len(shards.select(files, shards.Sharded(1.0, 4))[0]) == 200
    assert len(shards.select(files, shards.Sharded(0.1, 150, over=200))[0]) == 20, "shards without an image of a class"


def test_what_shards_refuse(tmp_path: Path) -> None:
    files = saved(tmp_path, clustered(60), 2)
    scores = tmp_path / "s.npy"
    np.save(scores, np.arange(60.0))
    unlike = tmp_path / "u.npy"
    np.save(unlike, clustered(60)["embeddings"])
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([str(scores)], {}, "has no embeddings"),
        ([files[0], files[0]], {}, "named twice"),
        ([files[0], str(unlike)], {}, "has other classes"),
        (files, {"keep": 0.01}, "fewer than 3 classes"),
        (files, {"keep": 0.0}, "no fraction"),
        (files, {"over": 0.5}, "over"),
        (files, {"shards": -1}, "shards"),
        ([str(tmp_path / "none.npz")], {}, "none.npz"),
    ]
    for names, more, says in cases:
        with pytest.raises(Refused, match=says):
            shards.select(names, shards.Sharded(**{"keep": 0.1, **more}))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path, clustered(200), 2)
    out = tmp_path / "t.npz"
    base = ["select", *files, "--keep", "0.1", "--pick", "facility_location"]
    assert (
        main([*base, "--shards", "4", "--out", str(out), "--set", "pick.over=3", "--set", "pick.maximizer=lazy"]) == 0
    )
    assert "4 shards" in capsys.readouterr().out
    assert Subset.load(out).rows.tolist() == shards.select(files, shards.Sharded(0.1, 4, 3.0))[0].rows.tolist()
    for more, says in (
        (["--pick", "k_center"], "Say --pick facility_location"),
        (["--score", "el2n"], "--score: has no part"),
        (["--labels", files[0]], "--labels: is of one file"),
        (["--set", "pick.ovr=3"], "Did you mean 'over'"),
    ):
        assert main([*base, *more]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_dask_draws_what_this_process_draws(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="of the extra scale")
    from lotus.dask_map import mapping

    files = saved(tmp_path, clustered(300), 3)
    asked = shards.Sharded(0.1, 6)
    np.save(tmp_path / "s.npy", np.arange(30.0))
    with mapping("local") as run:
        there, _ = shards.select(files, asked, run)
        with pytest.raises(Refused, match="has no embeddings"):
            shards.select([str(tmp_path / "s.npy")], asked, run)
    assert there.rows.tolist() == shards.select(files, asked)[0].rows.tolist()
