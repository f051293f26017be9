"""The ops of Lory behind one contract: `select` a backend, call its methods.

It must not know models, adapters' files or scheduling. Backends import lazily, so that one whose
needs are absent (a compiler, Triton) costs nothing until it is asked for.
"""

import logging

from lory_kernels.contract import (
    BASE_SLOT,
    MAX_RANK,
    Backend,
    KernelUnavailableError,
    Ops,
    Segments,
    SiteTable,
)
from lory_kernels.reference import TorchOps

__all__ = [
    "BASE_SLOT",
    "MAX_RANK",
    "Backend",
    "KernelUnavailableError",
    "Ops",
    "Segments",
    "SiteTable",
    "best_cpu_backend",
    "select",
]

_log = logging.getLogger(__name__)


def select(backend: Backend, *, threads: int = 0) -> Ops:
    """The ops of a backend; raises KernelUnavailableError if it cannot run here.

    `threads` is for the backend `cpu`: 0 takes torch.get_num_threads() as it is now.
    """
    if backend == "torch":
        return TorchOps()
    if backend == "cpu":
        from lory_kernels.cpu import CpuOps

        return CpuOps(threads)
    if backend == "triton":
        return _triton_ops()
    raise ValueError(f"backend: {backend!r} is not one of 'torch', 'cpu', 'triton'")


def _triton_ops() -> Ops:
    try:
        from lory_kernels.triton_ops import TritonOps
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise KernelUnavailableError(
            "triton is not installed: pip install 'triton>=3.6'"
        ) from error
    return TritonOps()


def best_cpu_backend() -> Backend:
    """'cpu' where its kernels can be compiled, else 'torch' with a warning that says why."""
    from lory_kernels.build import compiled_library

    try:
        compiled_library()
    except KernelUnavailableError as error:
        _log.warning("the CPU kernels are off, and plain PyTorch runs instead, slower: %s", error)
        return "torch"
    return "cpu"
