"""The backend `triton`: SGMV in Triton, for CUDA and for Triton's interpreter.

Norms, activations, rotary embedding and paged attention still run the reference's PyTorch: those
are the kernels to write next. bfloat16 is for CUDA alone; the interpreter computes it wrongly.
It must not know models or adapters' files.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Triton is optional.

import torch
import triton
from torch import Tensor

from lory_kernels.contract import KernelUnavailableError, Segments, SiteTable
from lory_kernels.reference import TorchOps
from lory_kernels.triton_sgmv import sgmv


class TritonOps(TorchOps):
    """Ops with Triton kernels where they exist, plain PyTorch for the others."""

    def __init__(self) -> None:
        if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
            raise KernelUnavailableError(
                "the kernel backend 'triton' needs a CUDA device: choose 'cpu' or 'torch'"
            )
        self._columns: dict[tuple[tuple[int, ...], tuple[int, ...], torch.device], Tensor] = {}

    def sgmv(
        self, y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments
    ) -> None:
        sgmv(y_TN, x_TH, site, pool, segments, self._columns_of(site, pool.device))

    def _columns_of(self, site: SiteTable, device: torch.device) -> Tensor:
        """out_offsets and out_features on the device; a model has a handful of distinct ones."""
        key = (site.out_offsets, site.out_features, device)
        columns_2K = self._columns.get(key)
        if columns_2K is None:
            columns_2K = torch.tensor(
                [site.out_offsets, site.out_features], dtype=torch.int64, device=device
            )
            self._columns[key] = columns_2K
        return columns_2K
