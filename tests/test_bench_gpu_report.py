"""What `make gpu-check` found, as tables, a picture and goals: its figures, and nothing else's."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_check, gpu_report, performance, scale_report
from benchmarks.goals import GOALS, NOT_MEASURED, Measured

FACTS = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "abcdefabcdefabcd",
    "command": "python -m benchmarks.gpu_check curve",
    "versions": {"torch": "2.11.0"},
    "machine": {"cpu": "Example CPU", "cores": 16},
    "device": "Example GPU",
    "is_whole": True,
    "not_reached": [],
}


def write(results: Path, **sections: Any) -> Path:
    (results / "gpu.json").write_text(json.dumps(sections))
    return results


def point(popularity: str, count: int, rate: float) -> dict[str, Any]:
    return {
        "popularity": popularity,
        "count": count,
        "output_tokens_per_s": rate,
        "ttft_p50_s": 0.0251,
        "ttft_p99_s": 0.0502,
        "tpot_p50_s": 0.0103,
        "tpot_p99_s": 0.0124,
        "copies_a_request": 0.125,
        "cost_per_million": 0.25,
        "cost_per_million_dedicated": 0.25 * count,
        "runs": [{}] * 2,
    }


def curve(**changes: Any) -> dict[str, Any]:
    held = {"adapters": 1000, "wanted": 1000, "host_bytes": 84e9, "why_no_more": ""}
    points = [point("uniform", 1000, 5850.0), point("uniform", 5, 6000.0)]
    facts = {
        "model": "random NF4", "rank": 16, "resident": 128, "rows": 64, "prompt_tokens": 128,
        "output_tokens": [64, 192], "window_s": 6.0, "load": "closed loop", "adapters": "so made",
        "bypassed": "HTTP", "price_per_hour": 4.0, "cost": "a formula", "held": held,
    }  # fmt: skip
    loads = [
        {
            "rank": 16, "device_bytes": 84_000_000, "to_device_ms": 8.4, "bytes_per_s": 10e9,
            "pinned_bytes_per_s": 50e9,
        }
    ]  # fmt: skip
    quiet = {"mean_ms": 10.0, "p99_ms": 11.0}
    overlap = {
        "rows": 64, "quiet": quiet, "copying": {"mean_ms": 10.3, "p99_ms": 12.0}, "copies": 20,
        "copied_bytes_per_s": 9e9, "lost_share": 0.03, "idle_share": 0.04,
    }  # fmt: skip
    firsts = [{"rank": 16, "host_ms": 31.5, "device_ms": 22.25}]
    measured = {"points": points, "loads": loads, "first_tokens": firsts, "overlap": overlap}
    return FACTS | facts | measured | changes


def step_point(**changes: Any) -> dict[str, Any]:
    parts = dict.fromkeys(gpu_report.PARTS, 0.25) | {"lora": 1.75}
    return {
        "batch": 32, "distinct_adapters": 32, "ranks": "16", "parts_ms": parts,
        "pipelined_ms": 5.5, "limit_ms": 2.5, "step_ms": 6.0, "forward_ms": 5.0,
        "op_by_op_ms": 20.0,
    } | changes  # fmt: skip


def step(*points: dict[str, Any], **changes: Any) -> dict[str, Any]:
    facts = {
        "model": "random NF4", "context": 512, "rank": 16, "mixed_ranks": [8, 64], "limit": "bytes",
        "copy_gb_per_s": 4300.0, "tflop_per_s": 700.0, "captured": {}, "points": points,
        "prompts": [],
    }  # fmt: skip
    return FACTS | facts | changes


def found(start: str, results: Path) -> str:
    goal = next(one for one in GOALS if one.what.startswith(start))
    return goal.found(Measured.read(results))


# -- nothing is made up -----------------------------------------------------------------------


@pytest.mark.parametrize("sections", [{}, {"curve": FACTS}, {"step": step()}])
def test_what_was_not_measured_is_said(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Nothing at all, or a section that was cut off before it found anything."""
    write(tmp_path, **sections)
    for name, make in {
        "curve": gpu_report.curve_table,
        "step": gpu_report.parts_tables,
        "peft": gpu_report.peft_table,
        "train": gpu_report.train_table,
    }.items():
        assert make(tmp_path) == f"Not measured yet: run `make gpu-check SECTION={name}`.\n"
    assert "Not measured yet" in gpu_report.copies_tables(tmp_path)
    assert gpu_report.chart(tmp_path) is None
    for start in ("throughput with 1,000", "time to the first token", "time that the device"):
        assert found(start, tmp_path) == NOT_MEASURED


# -- the curve --------------------------------------------------------------------------------


def test_the_curve_becomes_a_table_in_order_of_counts(tmp_path: Path) -> None:
    text = gpu_report.curve_table(write(tmp_path, curve=curve()))
    few = "| uniform | 5 | 6,000 | 25.1 ms | 50.2 ms | 10.3 ms | 12.4 ms | 0.12 | 0.250 | 1.25 |"
    many = few.replace("| 5 | 6,000 ", "| 1,000 | 5,850 ").replace("| 1.25 |", "| 250.00 |")
    assert text.index(few) < text.index(many)
    assert "1,000 of 1,000 in host memory, 84.0 GB; 128 on the device" in text
    assert "Left out: HTTP." in text
    assert "Cost at 4 an hour: a formula." in text
    assert "Example GPU, torch 2.11.0, 2026-01-02, commit abcdefa" in text
    assert "Cut off" not in text


def test_what_is_missing_from_the_curve_is_said(tmp_path: Path) -> None:
    held = {"adapters": 40, "wanted": 1000, "host_bytes": 3e9, "why_no_more": "memory ran out"}
    missed = ["100 adapters, uniform"]
    text = gpu_report.curve_table(
        write(tmp_path, curve=curve(held=held, is_whole=False, not_reached=missed))
    )
    assert "40 of 1,000 in host memory, 3.0 GB (memory ran out)" in text
    assert "*Cut off before its end.*" in text
    assert "Not measured, for want of time: 100 adapters, uniform." in text


def test_the_curve_becomes_a_picture(tmp_path: Path) -> None:
    picture = gpu_report.chart(write(tmp_path, curve=curve()))
    assert picture is not None
    texts = [node.text for node in ElementTree.fromstring(picture).iter() if node.text]
    assert any("Example GPU" in text for text in texts)
    assert any("at most 128 on the device" in text for text in texts)


def test_copies_become_a_table_with_what_steps_lose(tmp_path: Path) -> None:
    text = gpu_report.copies_tables(write(tmp_path, curve=curve()))
    row = "| 16 | 84.0 MB | 8.40 ms | 10.0 GB/s | 50.0 GB/s | 22.2 ms | 31.5 ms |"
    assert row in text
    assert "takes 10.30 ms instead of 10.00 (**+3.0%**; p99 12.00 instead of 11.00)" in text
    assert "idles 4.0% of the time" in text
    cut_off = curve(is_whole=False)
    del cut_off["overlap"], cut_off["first_tokens"]
    text = gpu_report.copies_tables(write(tmp_path, curve=cut_off))
    assert "| 50.0 GB/s | - | - |" in text
    assert "instead of" not in text


def test_goals_are_found_in_the_curve(tmp_path: Path) -> None:
    write(tmp_path, curve=curve())
    kept = "throughput with 1,000"
    assert found(kept, tmp_path) == "0.975 with uniform on Example GPU: met"
    assert found("time to the first token", tmp_path) == "9.2 ms on Example GPU: met"
    assert found("time that the device", tmp_path) == "4.0% on Example GPU: met"
    slow = curve(points=[point("uniform", 5, 6000.0), point("uniform", 1000, 5000.0)])
    slow["first_tokens"][0]["host_ms"] = 40.0
    slow["overlap"]["idle_share"] = 0.06
    write(tmp_path, curve=slow)
    for start in (kept, "time to the first token", "time that the device"):
        assert found(start, tmp_path).endswith(": not met")
    write(tmp_path, curve=curve(points=[point("uniform", 5, 1.0), point("uniform", 900, 1.0)]))
    assert found(kept, tmp_path) == NOT_MEASURED, "900 are not 1,000"


# -- a step -----------------------------------------------------------------------------------


def test_the_parts_of_a_step_become_a_table(tmp_path: Path) -> None:
    mixed = step_point(ranks="mixed", batch=8, distinct_adapters=8)
    bare = step_point(distinct_adapters=0)
    del bare["parts_ms"]
    prompt = step_point(tokens=2000, rows=1, distinct_adapters=1)
    text = gpu_report.parts_tables(
        write(tmp_path, step=step(step_point(), mixed, bare, prompts=[prompt]))
    )
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    parts = "0.25 | 1.75 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 | 5.50 | 2.50 |"
    assert lines[2:5] == [
        f"| 8 | 8 of mixed ranks | {parts}",
        "| 32 | 0 | - | - | - | - | - | - | - | - | 5.50 | 2.50 |",
        f"| 32 | 32 | {parts}",
    ]
    assert f"| 2,000 in 1 | 1 | {parts}" in lines
    assert "of ranks 8, 64 in turn" in text


def test_goals_are_of_adapters_of_one_rank(tmp_path: Path) -> None:
    base = step_point(distinct_adapters=0, forward_ms=4.0, limit_ms=2.0)
    mixed = step_point(ranks="mixed", forward_ms=99.0, limit_ms=2.1)
    write(tmp_path, step=step(base, step_point(), mixed))
    assert found("time that LoRA adds", tmp_path).startswith("1.00 ms, 2.0 times its limit")


# -- beside others ----------------------------------------------------------------------------


def test_the_engine_beside_peft_becomes_a_table(tmp_path: Path) -> None:
    ours = {"output_tokens_per_s": 3000.0, "wall_s": [1.0, 1.1]}
    theirs = {"output_tokens_per_s": 100.0, "wall_s": [30.0]}
    cases = {"distinct": {"Lory": ours, "transformers + PEFT": theirs}}
    facts = {"model": "m", "rank": 16, "requests": 32, "prompt_tokens": 64, "output_tokens": 64}
    text = gpu_report.peft_table(write(tmp_path, peft=FACTS | facts | {"cases": cases}))
    assert "|  | Lory | transformers + PEFT |" in text
    assert "| 32 requests, distinct adapters | 3,000 | 100 |" in text
    assert "medians of 1 runs" in text


def test_the_trainer_beside_others_becomes_a_table(tmp_path: Path) -> None:
    contenders = {
        "lory": {"tokens_per_s": 5000.0, "peak_bytes": 10 << 30},
        "peft": {"tokens_per_s": 4000.0, "peak_bytes": 12 << 30},
    }
    train = FACTS | {"contenders": contenders, "trl_is_installed": False}
    text = gpu_report.train_table(write(tmp_path, train=train))
    assert "| Lory's trainer | 5,000 | 10.0 GiB |" in text
    assert "TRL was not installed." in text


# -- the pages --------------------------------------------------------------------------------


def test_every_section_has_its_place_on_a_page(tmp_path: Path) -> None:
    pages = [page.read_text() for page in (performance.PAGE, scale_report.PAGE)]
    for name in ("gpu", "gpuparts", "gpupeft", "gputrain", "gpucurve", "gpucopies"):
        assert any(f"<!-- table:{name} -->" in page for page in pages), name
    text = scale_report.fill(scale_report.PAGE.read_text(), write(tmp_path, curve=curve()))
    assert "| uniform | 1,000 | 5,850 |" in text
    assert set(gpu_check.SECTIONS) >= {"curve", "peft", "train", "step"}
