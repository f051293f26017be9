"""How much memory a job takes, with all it has started, and how much it may."""

import os
from pathlib import Path

from lory_router.tuning.memory import FREE_PART, MemoryLimit, session_bytes

KB = 1024


def process(proc: Path, number: int, session: int, own_kb: int, part_kb: int) -> None:
    folder = proc / str(number)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{number} (a) b) (c) S 1 {number} {session} 0 -1\n")
    (folder / "status").write_text(
        f"Name:\tx\nVmRSS:\t99999999 kB\nRssAnon:\t{own_kb} kB\nRssFile:\t7777 kB\n"
        "RssShmem:\t1 kB\nVmSwap:\t2 kB\n"
    )
    (folder / "smaps_rollup").write_text(
        f"00-ff ---p 0 00:00 0 [rollup]\nRss: 9 kB\nPss_Anon: {part_kb} kB\nPss_Shmem: 0 kB\n"
        "SwapPss: 0 kB\n"
    )


def test_all_processes_of_a_job_count_and_no_others(tmp_path: Path):
    process(tmp_path, 10, 10, 100, 100)
    process(tmp_path, 11, 10, 200, 200)
    process(tmp_path, 12, 1, 4000, 4000)
    (tmp_path / "meminfo").write_text("")
    (tmp_path / "13").mkdir()
    assert session_bytes(10, 10**9, tmp_path) == (100 + 200 + 2 * 3) * KB


def test_pages_that_a_job_shares_with_its_children_do_not_end_it(tmp_path: Path):
    process(tmp_path, 10, 10, 1000, 550)
    process(tmp_path, 11, 10, 1000, 500)
    assert session_bytes(10, 1500 * KB, tmp_path) == 1050 * KB
    assert session_bytes(10, 9000 * KB, tmp_path) == 2006 * KB, "told apart where it matters"


def test_a_job_may_take_three_quarters_of_what_is_free_unless_told_otherwise():
    assert FREE_PART == 0.75
    session = os.getsid(0)
    assert "of what was free" in MemoryLimit(0, lambda: 4096).excess(session)
    assert "3072 bytes" in MemoryLimit(0, lambda: 4096).excess(session)
    assert "of --tuning-memory" in MemoryLimit(4096).excess(session)
    assert MemoryLimit(2**50).excess(session) == ""
