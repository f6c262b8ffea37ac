"""One short run for all tests of stages."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest
from running import DIGITS, SHORT, lotus


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run; not to be changed. The first of several workers makes it, the others copy it."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    here = tmp_path_factory.getbasetemp()
    shared = here.parent / "short" if here.name.startswith("popen-") else folder
    with (shared.parent / "short.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "results.json").exists():
            done = lotus("run", DIGITS, f"folder={shared}", *SHORT)
            assert done.returncode == 0, done.stdout + done.stderr
    if shared != folder:
        shutil.copytree(shared, folder)
        for page in folder.glob("**/config.yaml"):
            page.write_text(page.read_text().replace(str(shared), str(folder)))
    return folder
