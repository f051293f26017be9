"""Free memory is what the system calls available, within the container's limit."""

from pathlib import Path

from lory_server.host_memory import free_host_bytes

MEMINFO = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\n"


def group(folder: Path, limit: str | None, used: str = "0") -> Path:
    if limit is not None:
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
    return folder


def test_the_page_cache_counts_as_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert free_host_bytes(meminfo, group(tmp_path, None)) == 600 * 1024
    assert free_host_bytes(meminfo, group(tmp_path, "max\n")) == 600 * 1024


def test_a_container_may_have_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert free_host_bytes(meminfo, group(tmp_path, "300000\n", "100000\n")) == 200_000
    assert free_host_bytes(meminfo, group(tmp_path, "300000", "400000")) == 0


def test_files_read_in_a_container_leave_its_memory_free(tmp_path: Path) -> None:
    """A base that had been read from disk left no memory for KV and adapters, on paper."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    folder = group(tmp_path, "300000\n", "290000\n")
    (folder / "memory.stat").write_text("anon 50000\nactive_file 40000\ninactive_file 200000\n")
    assert free_host_bytes(meminfo, folder) == 210_000


def test_this_machine_has_some() -> None:
    assert free_host_bytes() > 1 << 20
