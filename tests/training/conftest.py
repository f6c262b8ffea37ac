import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are quickest so, and a sum always comes out the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
