"""What every test file shares: one thread, and this folder's helper modules."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run in parallel; two OpenMP threads on a busy core lose a factor of ten."""
    import torch

    torch.set_num_threads(1)
