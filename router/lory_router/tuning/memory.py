"""What a job takes of the host's memory, its children included, and how much it may take.

Counted is what only its end gives back: its own pages, shared ones, those that were swapped out.
Files that it has mapped, as the base's weights, are the system's to drop. Only Linux tells. It must
not know jobs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from lory_server.host_memory import free_host_bytes

FREE_PART = 0.75
"""Of the memory that is free when a job begins, which it may take unless told otherwise."""
PROC = Path("/proc")

_OWN = frozenset(("RssAnon", "RssShmem", "VmSwap"))
_OWN_PARTS = frozenset(("Pss_Anon", "Pss_Shmem", "SwapPss"))
"""A page that three processes have counts a third for each."""


class MemoryLimit:
    def __init__(self, limit: int, free: Callable[[], int] = free_host_bytes) -> None:
        """0: a part of what is free now."""
        self._source = "of --tuning-memory"
        self._bytes = limit
        if not limit:
            self._source = f"{FREE_PART:g} of what was free when it began"
            self._bytes = int(free() * FREE_PART)

    def excess(self, session: int) -> str:
        """What is wrong and the fix, if a session has taken more; empty if not."""
        if session_bytes(session, self._bytes) <= self._bytes:
            return ""
        return (
            f"the run took more than {self._bytes} bytes of memory, {self._source};"
            " use a smaller batch_size, shorter rows, or raise --tuning-memory"
        )


def session_bytes(leader: int, limit: int, proc: Path = PROC) -> int:
    """Of all processes of a session; exact where it matters, above the limit: below it pages that
    some of them share are counted more than once, for telling them apart takes long."""
    members = list(_members(leader, proc))
    found = sum(_sum(member / "status", _OWN) for member in members)
    if found > limit and len(members) > 1:
        return sum(_sum(member / "smaps_rollup", _OWN_PARTS) for member in members) or found
    return found


def _members(leader: int, proc: Path) -> Iterator[Path]:
    if not proc.is_dir():
        return
    for path in proc.iterdir():
        if path.name.isdecimal() and _session(path) == leader:
            yield path


def _session(process: Path) -> int:
    """The sixth field of proc_pid_stat(5); the second may hold anything, within brackets."""
    try:
        text = (process / "stat").read_text(errors="replace")
    except OSError:
        return 0  # it has ended
    return int(text.rpartition(")")[2].split()[3])


def _sum(path: Path, names: frozenset[str]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    pairs = [line.partition(":") for line in lines]
    return sum(int(value.split()[0]) * 1024 for name, _, value in pairs if name in names)
