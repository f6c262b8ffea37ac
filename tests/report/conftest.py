"""One run's folder for all tests of the report."""

from pathlib import Path

import pytest
from run_folder import make


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; not to be changed."""
    return make(tmp_path_factory.mktemp("run"))
