"""What is a link to what: deleting what may go leaves every other picture readable."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from selection import links


@pytest.mark.parametrize("seed", range(20))
def test_whatever_goes_the_others_can_be_read(tmp_path: Path, seed: int) -> None:
    """By deleting: random folders, some of them links to others, of files, and of links to any of these, one after another."""
    rng, names = np.random.default_rng(seed), list[str]()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "other").mkdir()
    for number in range(12):
        home = tmp_path / str(rng.choice(["real", "link", "other"]))
        file = home / str(number)
        if number < 4:
            file.write_text(str(number))
        else:
            to = names[rng.integers(len(names))]
            file.symlink_to(to if rng.random() < 0.5 else os.path.relpath(to, os.path.realpath(home)))
        names.append(str(file))
    names += [str(tmp_path / "real" / name) for name in os.listdir(tmp_path / "link")]
    names = sorted(set(names))
    asked = [name for name in names if rng.random() < 0.4]
    gone, held = links.apart(asked, names)
    assert sorted([*gone, *held]) == asked
    for name in gone:
        Path(name).unlink(missing_ok=True)
    assert all(Path(name).is_file() for name in names if name not in asked)
    for name in held:  # one that is held is needed: without it somebody could not be read
        kept = Path(name).read_text() if Path(name).is_file() else ""
        assert kept
        where, own = links.place(name), os.readlink(name) if os.path.islink(name) else None
        os.unlink(where)
        assert not all(Path(other).is_file() for other in names if other not in asked)
        os.symlink(own, where) if own is not None else Path(where).write_text(kept)


def test_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert links.passed(str(tmp_path / "a"))[:2] == [str(tmp_path / "a"), str(tmp_path / "b")]
