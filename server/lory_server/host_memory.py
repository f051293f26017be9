"""How much host memory may still be taken: what the system calls available, within the container.

Free pages alone would not do: the page cache gives way, and a container's limit may be lower than
the machine's memory. It must not know what the memory is for.
"""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    limits = [_available(meminfo), _left_in_container(cgroup)]
    return min(limit for limit in limits if limit is not None)


def _available(meminfo: Path) -> int:
    """MemAvailable where there is one (Linux), else the free pages."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_container(cgroup: Path) -> int | None:
    """The limit of this control group (version 2), less what it uses; None: no limit.

    Pages of files that nobody has touched lately count as use, and are given up on demand.
    """
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if not limit.exists() or not used.exists():
        return None
    text = limit.read_text().strip()
    if text == "max":
        return None
    return max(int(text) - int(used.read_text()) + _inactive_file_bytes(cgroup), 0)


def _inactive_file_bytes(cgroup: Path) -> int:
    stat = cgroup / "memory.stat"
    for line in stat.read_text().splitlines() if stat.exists() else ():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
