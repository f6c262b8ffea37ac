"""One short run for all tests of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import DIGITS, SHORT, lotus


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run, made once; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    done = lotus("run", DIGITS, f"folder={folder}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
