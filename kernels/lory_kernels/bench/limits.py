"""What this machine can do, measured: bytes and products a second, and the least time of a case.

It must not know any op.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lory_kernels.bench.case import Case, Place
from lory_kernels.bench.linears import own_dense

COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
PANEL_ROWS = 512
REPETITIONS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    copy_bytes_per_s: float
    """Bytes read and written by a large copy."""
    read_bytes_per_s: float
    """Bytes read by a sum over a large tensor."""
    flops_per_s: float
    """Of a large matrix product in the dtype measured."""

    @property
    def bytes_per_s(self) -> float:
        """The better of both: no kernel can be asked to beat less than was seen."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def seconds(self, num_bytes: int, flops: int) -> float:
        """The larger of what the bytes and what the products take."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def of(self, case: Case) -> float:
        return self.seconds(case.num_bytes, case.flops)


def measured_limits(place: Place) -> Limits:
    return Limits(*_bytes_per_s(place.device), _flops_per_s(place))


def _bytes_per_s(device: torch.device) -> tuple[float, float]:
    """Of a copy, which reads and writes, and of a sum."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copy_s = _fastest(device, lambda: target.copy_(source))
    read_s = _fastest(device, lambda: source.sum())
    return 2 * source.nbytes / copy_s, source.nbytes / read_s


def _flops_per_s(place: Place) -> float:
    """Of torch's product and, where there is one, of our own linear on many rows."""
    size = PRODUCT_SIZE[place.device.type]
    left, right = place.normal(size, size), place.normal(size, size)
    rates = [2 * size**3 / _fastest(place.device, lambda: left @ right)]
    multiply = own_dense(place.new_ops(), right)
    if multiply is not None:
        rows = left[: min(PANEL_ROWS, size)]
        flops = 2 * rows.shape[0] * size * size
        rates.append(flops / _fastest(place.device, lambda: multiply(rows)))
    return max(rates)


def _fastest(device: torch.device, call: Callable[[], object]) -> float:
    times: list[float] = []
    call()
    for _ in range(REPETITIONS):
        _synchronize(device)
        began_s = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - began_s)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
