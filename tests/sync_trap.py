"""Fails where code asks a device for a value, or hands it one, in a way that waits for the device.

The host's own memory looks like the device's when both are the CPU, so everything is trapped that
would wait if the tensor were on a device. Kernels are exempt (see graph_tape.TapeOps).
"""

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "unique", "unique_consecutive",
    "masked_select", "__bool__", "__int__", "__float__", "__index__", "__array__", "__iter__",
    "__contains__", "equal", "allclose", "bincount", "repeat_interleave", "to", "cuda",
}  # fmt: skip
_COPIES_FROM_HOST = {"tensor", "as_tensor", "from_numpy", "asarray"}
_ATEN = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::is_nonzero", "aten::equal", "aten::bincount",
    "aten::repeat_interleave",
}  # fmt: skip
_INDEXING = {"__getitem__", "__setitem__"}


class WaitsError(AssertionError):
    """An op that waits for the device."""


class SyncTrap:
    """`with SyncTrap(): ...` around what must not wait."""

    def __enter__(self) -> None:
        self._modes = (_Functions(), _Aten())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    """What Python calls: also what never reaches the dispatcher when the tensor is the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _WAITS or name in _COPIES_FROM_HOST:
            raise WaitsError(f"{name} waits for the device")
        if name == "copy_" and not (kwargs or {}).get("non_blocking"):
            raise WaitsError("copy_ waits for the device unless it is told not to")
        if name in _INDEXING and _holds_host_index(args[1]):
            raise WaitsError(f"{name} with {args[1]!r} waits for the device")
        return func(*args, **(kwargs or {}))


class _Aten(TorchDispatchMode):
    """What torch itself calls."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in _ATEN:
            raise WaitsError(f"{name} waits for the device")
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            indices = [one for one in args[1] if one is not None]
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                raise WaitsError(f"{name} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


def _holds_host_index(index: Any) -> bool:
    """A list or an array goes to the device; a mask is counted there."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list | np.ndarray)
        or (isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8))
        for part in parts
    )
