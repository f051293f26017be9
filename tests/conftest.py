"""What every test file shares: one thread, this folder's helper modules, --record-matrix."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-matrix",
        type=Path,
        metavar="FILE",
        help="JSON file for what the SGMV matrix finds; it keeps the pieces that did not run",
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record-matrix")
    if file is not None and not hasattr(config, "workerinput"):
        from matrix_record import MatrixRecord

        config.pluginmanager.register(MatrixRecord(file, config.invocation_params.args))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run in parallel; two OpenMP threads on a busy core lose a factor of ten."""
    import torch

    torch.set_num_threads(1)
