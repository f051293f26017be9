"""What backends require of tensors before they pass addresses on: layout and dtype.

A ValueError names the argument, what it must be and what it is. It must not know ops or backends.
"""

import torch
from torch import Tensor


def require_rows(**tensors: Tensor) -> None:
    """Rows may lie apart, a row's numbers side by side."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have whole rows, its strides are {tensor.stride()}")


def require_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def require_dtype(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")


def require_table(dtype: torch.dtype, **tensors: Tensor) -> None:
    """Contiguous, and of this dtype."""
    require_contiguous(**tensors)
    require_dtype(dtype, **tensors)


def require_norm_weight(dtype: torch.dtype, in_fp32: bool, **tensors: Tensor) -> None:
    """A table of the dtype of x or, where the product is made in float32, of float32."""
    for name, tensor in tensors.items():
        may_be = torch.float32 if in_fp32 and tensor.dtype == torch.float32 else dtype
        require_table(may_be, **{name: tensor})
