"""Pinned revisions: they stay on the host and the device, and there is always room beside them.

Whoever pins is refused when the rest of a tier would not do for those who hold an adapter now; who
comes later and could never get in is told at once instead of waiting for ever. It belongs to the
engine's thread. It must not know names, files or requests.
"""

from lory_server.adapters.device import DeviceTier
from lory_server.adapters.errors import AdapterCapacityError
from lory_server.adapters.host import HostTier


class Pins:
    def __init__(self, host: HostTier, device: DeviceTier) -> None:
        self._host = host
        self._device = device
        self.device_bytes = 0
        """What all pinned revisions take there, on it or not yet."""
        self.full_bytes = 0
        """The same of their full weights."""

    def __contains__(self, revision: str) -> bool:
        return revision in self._device.pinned

    def add(self, revision: str, waiting_host_bytes: int = 0) -> None:
        """Pin once more; raises AdapterCapacityError. `waiting_host_bytes` is the largest load
        that waits for room on the host."""
        pinned = self._device.pinned
        if revision not in pinned:
            self._check_host(revision, waiting_host_bytes)
            self._check_device(revision)
            self._host.budget.pinned_bytes += self._host.entry(revision).blob.num_bytes
            self.device_bytes += self._device_need(revision)
            self.full_bytes += self._full_need(revision)
        self._host.hold(revision)
        pinned[revision] = pinned.get(revision, 0) + 1

    def remove(self, revision: str) -> None:
        pinned = self._device.pinned
        pinned[revision] -= 1
        if not pinned[revision]:
            del pinned[revision]
            self._host.budget.pinned_bytes -= self._host.entry(revision).blob.num_bytes
            self.device_bytes -= self._device_need(revision)
            self.full_bytes -= self._full_need(revision)
        self._host.release(revision)

    def check_room_beside(self, revision: str, needed_bytes: int, full_bytes: int) -> None:
        """Raise AdapterCapacityError if one that needs so much on the device can never be there."""
        if not self._device.pinned or revision in self:
            return
        left_bytes = self._device.pool.full.total_bytes - self.full_bytes
        if full_bytes > left_bytes:
            raise AdapterCapacityError(
                f"takes {full_bytes} bytes on the device for weights of its own, pinned adapters"
                f" leave {left_bytes}; unpin one, or raise --full-weights-memory"
            )
        left_bytes = self._device.pool.total_bytes - self.device_bytes
        if needed_bytes > left_bytes:
            raise AdapterCapacityError(
                f"takes {needed_bytes} bytes on the device, pinned adapters leave {left_bytes};"
                " unpin one, or raise --adapter-memory"
            )
        if len(self._device.pinned) >= self._device.pool.max_slots:
            raise AdapterCapacityError(
                f"finds all {self._device.pool.max_slots} places on the device taken by pinned"
                " adapters; unpin one, or raise --max-resident-adapters"
            )

    def _check_host(self, revision: str, waiting_host_bytes: int) -> None:
        budget = self._host.budget
        num_bytes = self._host.entry(revision).blob.num_bytes
        if num_bytes + budget.pinned_bytes + waiting_host_bytes > budget.total_bytes:
            raise AdapterCapacityError(
                f"cannot be pinned: it takes {num_bytes} bytes on the host beside"
                f" {budget.pinned_bytes} of other pins and {waiting_host_bytes} of a load that"
                f" waits, of {budget.total_bytes}; unpin one, or raise --adapter-host-memory"
            )

    def _check_device(self, revision: str) -> None:
        pool, pinned = self._device.pool, self._device.pinned
        held = [entry.blob.revision for entry in self._host.held()]
        others = [other for other in held if other not in pinned and other != revision]
        self._check_full(revision, others)
        needed_bytes = self._device_need(revision)
        largest_bytes = max(map(self._device_need, others), default=0)
        if needed_bytes + self.device_bytes + largest_bytes > pool.total_bytes:
            raise AdapterCapacityError(
                f"cannot be pinned: it takes {needed_bytes} bytes on the device beside"
                f" {self.device_bytes} of other pins and {largest_bytes} of the largest adapter in"
                f" use, of {pool.total_bytes}; unpin one, or raise --adapter-memory"
            )
        if len(pinned) + 1 + bool(others) > pool.max_slots:
            raise AdapterCapacityError(
                f"cannot be pinned: {len(pinned)} pins and the adapters in use need all"
                f" {pool.max_slots} places on the device; unpin one, or raise"
                " --max-resident-adapters"
            )

    def _check_full(self, revision: str, others: list[str]) -> None:
        needed_bytes, total_bytes = self._full_need(revision), self._device.pool.full.total_bytes
        largest_bytes = max(map(self._full_need, others), default=0)
        if needed_bytes and needed_bytes + self.full_bytes + largest_bytes > total_bytes:
            raise AdapterCapacityError(
                f"cannot be pinned: its own weights take {needed_bytes} bytes on the device beside"
                f" {self.full_bytes} of other pins and {largest_bytes} of an adapter in use, of"
                f" {total_bytes}; unpin one, or raise --full-weights-memory"
            )

    def _device_need(self, revision: str) -> int:
        return self._host.entry(revision).footprint.num_bytes

    def _full_need(self, revision: str) -> int:
        return self._host.entry(revision).footprint.full_bytes
