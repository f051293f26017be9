"""The machine a measurement was made on: what it is, and who used its processors meanwhile.

Everything comes from /proc; where there is none, figures are None and nothing is called clean.
It must not know what is measured.
"""

import contextlib
import os
import platform
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
QUIET_CORES = 0.2
"""Other processes may use this much of one core before a measurement is called unclean."""
QUIET_SAMPLE_S = 0.5
LISTEN_STATE = "0A"


def machine_facts() -> dict[str, object]:
    """Processor, cores and system."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def can_watch() -> bool:
    return (PROC / "stat").exists()


@dataclass(frozen=True, slots=True)
class CpuShares:
    """Mean cores in use over a stretch of time; None where the machine does not tell."""

    generator_cores: float
    server_cores: float | None
    other_cores: float | None
    """Neither the generator nor the server: other processes, and time stolen by the host."""

    @property
    def clean(self) -> bool | None:
        """Whether the machine was ours; None if nobody can say."""
        return None if self.other_cores is None else self.other_cores < QUIET_CORES

    def described(self) -> dict[str, object]:
        return {
            "generator_cores": round(self.generator_cores, 3),
            "server_cores": _rounded(self.server_cores),
            "other_cores": _rounded(self.other_cores),
        }


class CpuWatch:
    """From its making to `stop`: who used the processors. `server_pid` 0: not known."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._began = self._sample()

    def stop(self) -> CpuShares:
        ended = self._sample()
        wall_s = max(ended.at_s - self._began.at_s, 1e-9)
        own = (ended.own_s - self._began.own_s) / wall_s
        if ended.server_s is None or self._began.server_s is None:
            return CpuShares(own, None, None)
        server = (ended.server_s - self._began.server_s) / wall_s
        busy = (ended.busy_s - self._began.busy_s) / wall_s
        return CpuShares(own, server, max(busy - own - server, 0.0))

    def _sample(self) -> "_Sample":
        at_s, own_s = time.monotonic(), time.process_time()
        if not can_watch() or not self._server_pid:
            return _Sample(at_s, own_s, None, 0.0)
        own_tree = self._server_pid == os.getpid()
        server_s = 0.0 if own_tree else tree_cpu_s(self._server_pid)
        return _Sample(at_s, own_s, server_s, busy_s())


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    own_s: float
    server_s: float | None
    busy_s: float


def busy_s() -> float:
    """Processor seconds that this machine has used since it started, stolen ones included."""
    fields = [int(text) for text in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tree_cpu_s(root_pid: int) -> float:
    """Processor seconds of a process, its descendants, and those of them that it has reaped."""
    stats = dict(_process_stats())
    ticks = sum(stats[pid].ticks for pid in _tree(root_pid, stats))
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_resident_bytes(root_pid: int) -> int:
    """Resident memory of a process and its descendants; a shared page counts once in all."""
    return sum(_proportional_bytes(pid) for pid in process_tree(root_pid))


def _proportional_bytes(pid: int) -> int:
    """A page that n processes map counts 1/n; nothing of a process that has ended meanwhile."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def process_tree(root_pid: int) -> list[int]:
    """A process and its descendants."""
    return _tree(root_pid, dict(_process_stats()))


def wait_until_quiet(limit_s: float) -> bool:
    """Wait, at most `limit_s`, until for two samples in a row nobody uses the machine."""
    if not can_watch():
        return False
    deadline = time.monotonic() + limit_s
    quiet_samples = 0
    while quiet_samples < 2 and time.monotonic() < deadline:
        began_s, before_s = time.monotonic(), busy_s()
        time.sleep(QUIET_SAMPLE_S)
        cores = (busy_s() - before_s) / (time.monotonic() - began_s)
        quiet_samples = quiet_samples + 1 if cores < QUIET_CORES else 0
    return quiet_samples >= 2


def listening_pid(host: str, port: int) -> int:
    """The process of ours that listens on a local port, or 0."""
    if not can_watch() or not _is_local(host):
        return 0
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for folder in PROC.glob("[0-9]*"):
        if any(target in sockets for target in _open_files(folder)):
            return int(folder.name)
    return 0


@dataclass(frozen=True, slots=True)
class _Stat:
    parent_pid: int
    ticks: int


def _process_stats() -> Iterable[tuple[int, _Stat]]:
    for folder in PROC.glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:  # it has ended
            continue
        fields = text.rpartition(")")[2].split()
        ticks = sum(int(field) for field in fields[11:15])
        yield int(folder.name), _Stat(int(fields[1]), ticks)


def _tree(root_pid: int, stats: dict[int, _Stat]) -> list[int]:
    found = [root_pid] if root_pid in stats else []
    for pid in found:
        found.extend(child for child, stat in stats.items() if stat.parent_pid == pid)
    return found


def _is_local(host: str) -> bool:
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return False
    return address.startswith("127.") or address == "0.0.0.0"


def _listening_inodes(port: int) -> Iterable[str]:
    for table in ("tcp", "tcp6"):
        path = PROC / "net" / table
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        for fields in (row.split() for row in rows):
            if fields[3] == LISTEN_STATE and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _open_files(folder: Path) -> Iterable[str]:
    """What a process has open; nothing of another user's."""
    try:
        entries = list((folder / "fd").iterdir())
    except OSError:
        return
    for entry in entries:
        with contextlib.suppress(OSError):  # closed since
            yield os.readlink(entry)


def _cpu_model() -> str:
    path = PROC / "cpuinfo"
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _rounded(cores: float | None) -> float | None:
    return None if cores is None else round(cores, 3)
