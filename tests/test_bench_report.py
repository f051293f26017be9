"""The README's tables: that they are what the script makes, and that the script reads results."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import report

FACTS = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "abcdefabcdefabcd+changes",
    "command": "python -m benchmarks.compare",
    "versions": {"torch": "2.13.0"},
    "machine": {"cpu": "Example CPU", "cores": 2},
}


def comparison(
    model: str,
    date: str,
    rate: float,
    clean: bool = True,
    shares: tuple[float, ...] = (1.0, 0.9, 1.1),
) -> dict[str, Any]:
    def contender(value: float) -> dict[str, Any]:
        runs = [{"output_tokens_per_s": value * share} for share in shares]
        return {"output_tokens_per_s": value, "clean": clean, "runs": runs}

    rates = {"base": rate, "one": rate * 0.95, "distinct": rate * 0.9}
    cases = [
        {
            "scenario": scenario,
            "requests": 32,
            "contenders": {"Lory": contender(value), "PEFT": contender(value / 3)},
        }
        for scenario, value in rates.items()
    ]
    ratio = {
        "requests": 32,
        "distinct_to_base": {"Lory": 0.9, "PEFT": 0.3},
        "lory_to": {"PEFT": {"base": 2.0, "one": 2.5, "distinct": 6.5}},
    }
    settings = {
        "shape": {"hidden_size": 512, "num_layers": 8, "vocab_size": 4096},
        "weights": "random, bfloat16",
        "prompt_tokens": 64,
        "output_tokens": 64,
        "adapters": "32",
        "repetitions": len(shares),
        "threads": 2,
    }
    return {
        **FACTS,
        "date": date,
        "model": model,
        "settings": settings,
        "memory_gib": {"Lory": 1.25},
        "cases": cases,
        "ratios": [ratio],
    }


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize("page", report.PAGES, ids=lambda p: p.name)
def test_a_page_is_what_the_script_makes(page: Path) -> None:
    """If it is not: python -m benchmarks.report"""
    text = page.read_text(encoding="utf-8")
    assert report.fill(text) == text


def test_the_newest_comparison_of_each_model_is_shown(tmp_path: Path) -> None:
    write(tmp_path, "cpu-compare-small-1.json", comparison("small", "2026-01-02", 3000.0))
    write(tmp_path, "cpu-compare-small-2.json", comparison("small", "2026-01-01", 1234.0))
    write(tmp_path, "cpu-compare-big-1.json", comparison("big", "2026-01-01", 50.0))
    text = report.bench_tables(tmp_path)
    assert text.index("`big`") < text.index("`small`")
    assert "| 32 requests, distinct adapters | 2700 (2430-2970) | 900 (810-990) |" in text
    assert "| 32 requests, distinct adapters | 45.0 (40.5-49.5) | 15.0 (13.5-16.5) |" in text
    assert "1234" not in text
    assert "| 32 requests, distinct against own base | 0.90 | 0.30 |" in text
    assert "| 32 requests, distinct, against Lory | 1 | 1 / 6.5 |" in text
    assert "| memory at the end | 1.2 GiB | - |" in text
    assert "Example CPU, 2 cores" in text
    assert "`python -m benchmarks.compare`" in text


def test_each_kind_of_weights_has_a_table(tmp_path: Path) -> None:
    """An older run of another kind stays."""
    nf4 = comparison("small", "2026-01-01", 1234.0)
    nf4["settings"]["weights"] = "random, NF4 computed in bfloat16"
    write(tmp_path, "cpu-compare-small-1.json", comparison("small", "2026-01-02", 3000.0))
    write(tmp_path, "cpu-compare-small-nf4-1.json", nf4)
    text = report.bench_tables(tmp_path)
    assert 0 < text.index("random bfloat16 weights") < text.index("random NF4 computed in bfloat16")


def test_one_run_is_called_one_and_figures_have_three_digits(tmp_path: Path) -> None:
    """A median of one, and 2888 tokens a second, claimed more than was measured."""
    result = comparison("tinyllama", "2026-01-02", 3207.6, shares=(1.0,))
    write(tmp_path, "cpu-compare-tinyllama-1.json", result)
    text = report.bench_tables(tmp_path)
    assert "| 32 requests, the base alone | 3210 | 1070 |" in text
    assert "; one run after a warm-up" in text
    assert "medians" not in text
    assert "`tinyllama` (TinyLlama's shape, random bfloat16 weights: hidden 512" in text


@pytest.mark.parametrize(
    ("value", "text"), [(3285.0, "3280"), (94.15, "94.2"), (5.476, "5.48"), (0.0123, "0.0123")]
)
def test_three_digits_are_kept(value: float, text: str) -> None:
    assert report._significant(value) == text


def test_unclean_figures_are_marked(tmp_path: Path) -> None:
    result = comparison("small", "2026-01-02", 3000.0, clean=False)
    write(tmp_path, "cpu-compare-small-1.json", result)
    text = report.bench_tables(tmp_path)
    assert "2700 (2430-2970) (unclean)" in text
    assert "Others used the machine" in text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    assert "make bench" in report.bench_tables(tmp_path)
    assert "cold_adapters" in report.cold_table(tmp_path)
    assert "make gpu-check" in report.gpu_tables(tmp_path)
    assert "evaluate" in report.accuracy_table(tmp_path / "none.json")


def test_cold_adapters_and_gpu_results_become_tables(tmp_path: Path) -> None:
    median = {f"{phase}_gap_p{p}_s": 0.005 for phase in ("quiet", "cold", "warm") for p in (50, 99)}
    median |= {"p99_cold_to_quiet": 1.1234, "p99_cold_to_warm": 1.01}
    settings = {"num_cold": 64, "model": "small", "num_streams": 8, "threads": 1}
    cold = {**FACTS, "median": median, "settings": settings, "repetitions": [1], "clean": True}
    write(tmp_path, "cold-adapters-1.json", cold)
    text = report.cold_table(tmp_path)
    assert "**1.12**, so the goal of 1.2 is met; " in text
    assert "One run, " in text
    median["p99_cold_to_quiet"] = 1.79
    write(tmp_path, "cold-adapters-1.json", {**cold, "repetitions": [1, 2, 3]})
    text = report.cold_table(tmp_path)
    assert "**1.79**, so the goal of 1.2 is not met; " in text
    assert "Medians of 3 runs, of the ratios too: each is taken within a run" in text
    point = {
        "batch": 8,
        "distinct_adapters": 1,
        "step_ms": 4.5,
        "forward_ms": 4.25,
        "limit_ms": 1.5,
    }
    step = {
        **FACTS,
        "device": "GPU",
        "model": "m",
        "context": 512,
        "rank": 16,
        "copy_gb_per_s": 4300.0,
        "points": [point],
    }
    parity = {**FACTS, "device": "GPU", "num_checks": 2, "checks": [{"passed": True}] * 2}
    write(tmp_path, "gpu.json", {"step": step, "parity": parity})
    text = report.gpu_tables(tmp_path)
    assert "2 of 2 checks" in text
    assert "| 8 | 1 | 4.50 | 4.25 | 1.50 |" in text


def test_accuracy_is_in_percent(tmp_path: Path) -> None:
    write(tmp_path, "a.json", {"shout": {"base": 0.0, "adapter": 0.975, "rows": 100}})
    assert "| `shout` | 0% | 98% | 100 |" in report.accuracy_table(tmp_path / "a.json")


def test_a_table_that_nobody_makes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="no such table: speed"):
        report.fill("<!-- table:speed -->\n<!-- /table -->", tmp_path)


def test_filling_twice_changes_nothing(tmp_path: Path) -> None:
    once = report.fill("a\n<!-- table:bench -->\nold\n<!-- /table -->\nb\n", tmp_path)
    assert "old" not in once
    assert once.startswith("a\n")
    assert once.endswith("<!-- /table -->\nb\n")
    assert report.fill(once, tmp_path) == once


def test_what_streams_keep_beside_training_is_told_with_its_range(tmp_path: Path):
    def one(beside: float) -> dict[str, object]:
        return {"alone": {"tokens_per_s": 100.0}, "beside": {"tokens_per_s": beside}}

    result = {
        "date": "2026-11-21T20:00:00Z",
        "command": "python -m benchmarks.training_beside",
        "commit": "0" * 40,
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "CPU", "cores": 2},
        "settings": {"streams": 8, "threads": 1, "tuning_threads": 1, "share": 0.1},
        "repetitions": [one(80.0), one(95.0), one(90.0)],
        "median": {
            "tokens_per_s_beside_to_alone": 0.9,
            "gap_p50_beside_to_alone": 1.1,
            "gap_p99_beside_to_alone": 1.3,
            "training_tokens_per_s_alone": 500.0,
            "training_tokens_per_s_beside": 50.0,
        },
    }
    assert "Not measured yet" in report.training_table(tmp_path)
    (tmp_path / "training-beside-1.json").write_text(json.dumps(result))
    made = report.training_table(tmp_path)
    assert "| streams: tokens per second | 0.90 (0.80-0.95) |" in made
    assert "| the job: tokens per second | 0.10 (50 a second; 500 without streams) |" in made
    assert "--tuning-share 0.1" in made


def test_what_was_measured_before_a_share_was_kept_is_not_told_any_more(tmp_path: Path):
    result = {"date": "2026-11-21T20:00:00Z", "settings": {"streams": 8}}
    (tmp_path / "training-beside-1.json").write_text(json.dumps(result))
    assert "Not measured yet" in report.training_table(tmp_path)
