"""A step's arrays on their way from the host to the device: side by side, in one copy.

On the CPU they are where they should be. Elsewhere the copy is from pinned memory and nobody waits
for it; buffers are used in turn, so that one is not written again while the step in flight may
still be read from it. This module must not know what the arrays mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

ALIGN_BYTES = 64
"""Of every array: kernels are compiled anew for pointers that are not multiples of 16."""

BUFFERS_IN_TURN = 16
"""A step sends twice, and once more for each run of rows with a vocabulary of its own (a head each,
and few heads a step); one more step may be in flight."""

FIRST_BYTES = 1 << 16
"""Of a buffer before it has grown."""

Array = NDArray[Any]
Send = Callable[[Mapping[str, Array]], dict[str, Tensor]]

_TORCH_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


@dataclass(frozen=True, slots=True)
class Field:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    """In bytes."""

    @property
    def end(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize


class Layout:
    """Where named arrays lie in one buffer of bytes."""

    def __init__(self, arrays: Mapping[str, tuple[DTypeLike, tuple[int, ...]]]) -> None:
        """`arrays`: dtype and shape of each, in their order."""
        self.fields: dict[str, Field] = {}
        end = 0
        for name, (dtype, shape) in arrays.items():
            start = -(-end // ALIGN_BYTES) * ALIGN_BYTES
            field = self.fields[name] = Field(np.dtype(dtype), shape, start)
            end = field.end
        self.num_bytes = end

    def arrays(self, buffer: NDArray[np.uint8]) -> dict[str, Array]:
        return {
            name: buffer[field.start : field.end].view(field.dtype).reshape(field.shape)
            for name, field in self.fields.items()
        }

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[field.start : field.end].view(_TORCH_DTYPES[field.dtype]).view(field.shape)
            for name, field in self.fields.items()
        }


class HostBuffer:
    """Bytes on the host, pinned where the device is CUDA."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_cuda)
        self._sent = torch.cuda.Event() if on_cuda else None
        self.array: NDArray[np.uint8] = self._bytes.numpy()

    def wait_until_sent(self) -> None:
        """Before it is written again; its turn comes so late that this returns at once."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: Tensor) -> None:
        """Starts the copy of the first bytes, as many as `target` has."""
        target.copy_(self._bytes[: target.numel()], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def sender(device: torch.device) -> Send:
    return Stage(device).send if device.type == "cuda" else views


def views(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """The very arrays, as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Stage:
    """Sends arrays whose sizes change from step to step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [HostBuffer(FIRST_BYTES, device) for _ in range(BUFFERS_IN_TURN)]
        self._turn = 0

    def send(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """The same arrays on the device, in memory of their own."""
        layout = Layout({name: (array.dtype, array.shape) for name, array in arrays.items()})
        buffer = self._next(layout.num_bytes)
        places = layout.arrays(buffer.array)
        for name, array in arrays.items():
            places[name][...] = array
        there = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._device)
        buffer.send(there)
        return layout.tensors(there)

    def _next(self, num_bytes: int) -> HostBuffer:
        self._turn = (self._turn + 1) % BUFFERS_IN_TURN
        buffer = self._buffers[self._turn]
        buffer.wait_until_sent()
        if buffer.array.nbytes < num_bytes:
            # Twice what is needed: a step that is a little larger does not pin memory again.
            buffer = self._buffers[self._turn] = HostBuffer(2 * num_bytes, self._device)
        return buffer
