"""docs/performance.md: that it is what the script makes, and its figures those of the results."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import goals, performance, record
from benchmarks.goals import GOALS, NOT_MEASURED, Goal, Measured

FACTS = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "abcdefabcdefabcd",
    "command": "python -m benchmarks.something",
    "versions": {"torch": "2.13.0"},
    "machine": {"cpu": "Example CPU", "cores": 2},
    "device": "Example GPU",
}


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


def goal(start: str) -> Goal:
    return next(one for one in GOALS if one.what.startswith(start))


def found(start: str, results: Path) -> str:
    return goal(start).found(Measured.read(results))


def comparison(
    peers: dict[str, float],
    distinct: float = 0.9,
    model: str = "small",
    weights: str = "random, bfloat16",
    date: str = "2026-01-02",
    clean: bool = True,
    requests: int = 32,
) -> dict[str, Any]:
    """Lory is as many times as fast as each peer."""
    ratio = {
        "requests": requests,
        "distinct_to_base": {"Lory": distinct} | dict.fromkeys(peers, 0.3),
        "lory_to": {
            name: {"base": value, "one": value, "distinct": 2 * value}
            for name, value in peers.items()
        },
    }
    contender = {"output_tokens_per_s": 100.0, "clean": clean, "runs": [{}]}
    case = {"scenario": "base", "requests": requests, "contenders": {"Lory": contender}}
    settings = {"weights": weights}
    return FACTS | {
        "model": model,
        "date": date,
        "settings": settings,
        "ratios": [ratio],
        "cases": [case],
    }


def parts(bare_to_base: float, quantize: str = "none", rows: int = 32) -> dict[str, Any]:
    figures = {"parts_ms": dict.fromkeys(performance.PARTS, 0.25), "op_by_op_ms": 2.0}
    settings = {
        "model": "small", "quantize": quantize, "rows": rows, "context": 96, "rank": 16,
        "threads": 2, "turns": 5, "reps": 40,
    }  # fmt: skip
    return FACTS | {
        "settings": settings,
        "bare_to_base": bare_to_base,
        "scenarios": {
            "bare": figures | {"served_ms": 0.5},
            "base": figures | {"served_ms": 0.75},
        },
        "clean": True,
        "is_recorded": True,
    }


def step_point(distinct: int, forward_ms: float, limit_ms: float) -> dict[str, Any]:
    return {
        "batch": 32,
        "distinct_adapters": distinct,
        "step_ms": forward_ms + 1,
        "forward_ms": forward_ms,
        "op_by_op_ms": 3 * forward_ms,
        "limit_ms": limit_ms,
    }


def gpu_step(*points: dict[str, Any]) -> dict[str, Any]:
    captured = {"graphs": 12, "seconds": 3.5, "mib": 100.5}
    facts = {"model": "m", "context": 512, "rank": 16, "copy_gb_per_s": 4300.0}
    return FACTS | facts | {"captured": captured, "points": points}


def contender(name: str, role: str, ms: float | None, of_limit: float | None = 0.5) -> dict:
    times = None if ms is None else {"median_s": ms / 1e3}
    timing = None if times is None else {"cold": times, "warm": {"median_s": 1.0}}
    status = "wrong" if ms is None else "right"
    of_limit = None if ms is None else of_limit
    facts = {"contender": name, "role": role, "status": status}
    return facts | {"timing": timing, "of_limit": of_limit}


def case(op: str, shape: str, rows: int, *contenders: dict, limit_s: float = 1e-3) -> dict:
    return {
        "op": op,
        "shape": shape,
        "rows": rows,
        "limit_s": limit_s,
        "contenders": contenders,
    }


def kernels(*cases: dict) -> dict[str, Any]:
    limits = {"bytes_per_s": 4.3e12, "flops_per_s": 700e12}
    facts = {"limits": limits, "dtype": "bfloat16", "threads": 2, "num_layers": 32}
    return FACTS | facts | {"cases": cases}


def linears(op: str, rows: int, ms: float, role: str = "ours") -> list[dict]:
    return [case(op, f"{site} 1->2", rows, contender(op, role, ms)) for site in goals.SITES]


# -- the page ---------------------------------------------------------------------------------


def test_the_page_is_what_the_script_makes(capsys: pytest.CaptureFixture[str]) -> None:
    """If it is not: python -m benchmarks.performance"""
    assert performance.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_page_that_is_behind_is_told_and_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    page.write_text("a\n<!-- table:goals -->\nstale\n<!-- /table -->\nb\n")
    monkeypatch.setattr(performance, "PAGE", page)
    assert performance.main(["--check"]) == 1
    assert "run benchmarks.performance" in capsys.readouterr().out
    assert "stale" in page.read_text()
    assert performance.main([]) == 0
    assert "stale" not in page.read_text()
    assert page.read_text().startswith("a\n<!-- table:goals -->\n| what |")
    assert performance.main(["--check"]) == 0


def test_without_results_everything_is_not_measured(tmp_path: Path) -> None:
    text = performance.fill(performance.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert text.count(f"| {NOT_MEASURED} |") == len(GOALS)
    tables = re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", text, re.DOTALL)
    assert {name for name, _ in tables} == {
        *("goals", "bench", "cold", "parts", "kernels"),
        *("gpu", "gpuparts", "gpupeft", "gputrain"),
    }
    for name, table in tables:
        if name != "goals":
            assert "ot measured yet" in table, name
            assert not re.search(r"\d+\.\d", table), name


def test_what_was_tried_stands_where_it_says() -> None:
    page = (record.ROOT / "docs" / "tried.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        places = re.findall(r"`([^`]+)`, `([^`]+)`", row[-1])
        assert places, row
        for path, name in places:
            assert name in (record.ROOT / path).read_text(encoding="utf-8"), (path, name)


# -- goals ------------------------------------------------------------------------------------


def test_distinct_adapters_against_the_base_are_read_from_the_newest_of_each_kind(
    tmp_path: Path,
) -> None:
    write(tmp_path, "cpu-compare-small-1.json", comparison({}, 0.5, date="2026-01-01"))
    write(tmp_path, "cpu-compare-small-2.json", comparison({}, 0.86, date="2026-01-03"))
    nf4 = comparison({}, 0.7, weights="random, NF4 computed in bfloat16", clean=False)
    write(tmp_path, "cpu-compare-small-nf4.json", nf4)
    figures = found("32 rows over 32 distinct", tmp_path)
    assert figures == "0.86 on `small`: met; 0.70 on `small` (NF4 computed in bfloat16), " \
        "unclean: not met"  # fmt: skip


def test_other_numbers_of_requests_are_not_the_goal(tmp_path: Path) -> None:
    write(tmp_path, "cpu-compare-small.json", comparison({"vLLM": 9.0}, requests=8))
    assert found("32 rows over 32 distinct", tmp_path) == NOT_MEASURED
    assert found("32 requests over 32 distinct", tmp_path) == NOT_MEASURED


def test_a_peer_is_compared_with_itself_alone(tmp_path: Path) -> None:
    """A slower peer in a newer file must not stand for the one that the goal names."""
    peers = {"transformers + PEFT": 5.0, "vLLM 0.30": 1.75}
    write(tmp_path, "cpu-compare-small.json", comparison(peers))
    newer = comparison({"transformers + PEFT": 50.0}, date="2026-02-01")
    write(tmp_path, "cpu-compare-small-newer.json", newer)
    start = "32 requests over 32 distinct"
    assert found(start, tmp_path) == "3.50 times vLLM 0.30: not met"
    assert found("the same on `tinyllama`", tmp_path) == NOT_MEASURED
    write(tmp_path, "cpu-compare-small.json", comparison({"vLLM 0.30": 1.8}))
    assert found(start, tmp_path) == "3.60 times vLLM 0.30: met"
    nf4 = comparison({"vLLM 0.30": 1.8}, weights="random, NF4 computed in bfloat16")
    write(tmp_path, "cpu-compare-small.json", nf4)
    assert found(start, tmp_path) == NOT_MEASURED


def test_distinct_adapters_race_the_fastest_of_the_peers_bases(tmp_path: Path) -> None:
    rates = {"base": {"Lory": 300.0, "slow": 20.0, "fast": 100.0}, "distinct": {"Lory": 150.0}}
    result = comparison({}) | {
        "cases": [
            {
                "scenario": scenario,
                "requests": requests,
                "contenders": {
                    name: {"output_tokens_per_s": rate * factor, "clean": True}
                    for name, rate in ours.items()
                },
            }
            for scenario, ours in rates.items()
            for requests, factor in ((32, 1 if scenario == "distinct" else 0.75), (8, 9.0))
        ]
    }
    start = "32 requests over 32 distinct adapters, against the base"
    write(tmp_path, "cpu-compare-small.json", result)
    base = "32 requests of the base alone, against the fastest peer, `small`"
    assert found(start, tmp_path) == "2.00 times fast on `small`: met"
    assert found(base, tmp_path) == "3.00 times fast on `small`: met"
    result["cases"][0]["contenders"]["slow"]["output_tokens_per_s"] = 200.0
    write(tmp_path, "cpu-compare-small.json", result)
    assert found(start, tmp_path) == "0.75 times slow on `small`: not met"
    assert found(base, tmp_path) == "1.12 times slow on `small`: not met"
    result["cases"] = result["cases"][:1]
    write(tmp_path, "cpu-compare-small.json", result)
    assert found(start, tmp_path) == NOT_MEASURED


def test_base_rows_beside_loaded_adapters(tmp_path: Path) -> None:
    write(tmp_path, "step-parts-small.json", parts(0.995))
    write(tmp_path, "step-parts-small-nf4.json", parts(0.95, "nf4") | {"clean": False})
    write(tmp_path, "step-parts-few.json", parts(0.5, rows=8))
    figures = found("speed of base rows", tmp_path)
    assert figures == "0.950 on `small` in NF4, unclean: not met; 0.995 on `small`: met"


def test_gaps_while_cold_adapters_arrive(tmp_path: Path) -> None:
    cold = FACTS | {"median": {"p99_cold_to_quiet": 1.09}, "clean": True}
    write(tmp_path, "cold-adapters-1.json", cold)
    assert found("p99 gap", tmp_path) == "1.09 times: met"
    later = {"date": "2026-03-01", "median": {"p99_cold_to_quiet": 1.21}, "clean": False}
    write(tmp_path, "cold-adapters-0.json", cold | later)
    assert found("p99 gap", tmp_path) == "1.21 times, unclean: not met"


def test_what_lora_adds_is_the_difference_of_two_points(tmp_path: Path) -> None:
    points = [step_point(0, 4.0, 2.0), step_point(1, 4.25, 2.02), step_point(32, 5.0, 2.5)]
    write(tmp_path, "gpu.json", {"step": gpu_step(*points)})
    distinct, one = "time that LoRA adds", "the same with one adapter"
    assert found(distinct, tmp_path) == "1.00 ms, 2.0 times its limit, on Example GPU: met"
    assert found(one, tmp_path) == "0.25 ms, 12.5 times its limit, on Example GPU: met"
    points[1:] = [step_point(1, 4.35, 2.02), step_point(32, 5.5, 2.5)]
    write(tmp_path, "gpu.json", {"step": gpu_step(*points)})
    assert found(distinct, tmp_path).endswith(": not met")
    assert found(one, tmp_path).endswith(": not met")
    write(tmp_path, "gpu.json", {"step": gpu_step(*points[1:])})
    assert found(distinct, tmp_path) == found(one, tmp_path) == NOT_MEASURED


def test_nf4_linears_are_the_sum_of_all_linears_of_all_layers(tmp_path: Path) -> None:
    """4 linears x 32 layers; the reference alone is not ours."""
    theirs = linears("nf4", 16, 1.0, "reference")
    cases = [*linears("nf4", 8, 0.0125), *linears("nf4", 64, 0.02), *theirs]
    cases += [case("linear", "head 1->2", 64, contender("torch", "reference", 9.0))]
    write(tmp_path, "gpu.json", {"kernels": kernels(*cases)})
    start = "all NF4 linears"
    assert found(start, tmp_path) == "1.60 ms at 8 rows on Example GPU: met"
    cases += linears("linear", 64, 0.025, "reference")
    write(tmp_path, "gpu.json", {"kernels": kernels(*cases)})
    assert found(start, tmp_path).endswith(
        "2.56 ms at 64 rows (bfloat16: 3.20 ms) on Example GPU: met"
    )
    write(tmp_path, "gpu.json", {"kernels": kernels(*linears("nf4", 8, 0.02)[1:])})
    assert found(start, tmp_path) == NOT_MEASURED
    wrong = [case("nf4", f"{site} 1->2", 8, contender("x", "ours", None)) for site in goals.SITES]
    write(tmp_path, "gpu.json", {"kernels": kernels(*wrong)})
    assert found(start, tmp_path) == NOT_MEASURED


# -- tables -----------------------------------------------------------------------------------


def test_the_parts_of_a_step_become_a_table(tmp_path: Path) -> None:
    result: dict[str, Any] = parts(1.0, "nf4") | {"is_recorded": False}
    result["scenarios"]["bare"]["parts_ms"] = dict.fromkeys(performance.PARTS, 0.125)
    write(tmp_path, "step-parts-small.json", result)
    text = performance.parts_tables(tmp_path)
    assert "| `small` in NF4, ms | base rows, no adapter loaded | base rows |" in text
    assert "| SGMV | 0.12 | 0.25 |" in text
    assert "| served, whole | 0.50 | 0.75 |" in text
    assert "middle half of 200 steps" in text
    assert "served is op by op" in text


def test_kernels_are_put_together_by_op_rows_and_contender(tmp_path: Path) -> None:
    reference = contender("torch", "reference", 4.0)
    cases = [
        case("sgmv", "qkv 1->2", 8, contender("cpu", "ours", 1.0, 0.2), reference),
        case("sgmv", "o 1->2", 8, contender("cpu", "ours", 2.0, 0.4), reference),
        case("sgmv", "down 1->2", 8, contender("cpu", "ours", None), reference),
        case("sgmv", "base", 8, contender("cpu", "ours", 4.0, 0.0), reference, limit_s=0.0),
        case("linear", "head 1->2", 8, contender("torch", "reference", 4.0, 0.9)),
    ]
    write(tmp_path, "cpu-kernels-small.json", kernels(*cases))
    text = performance.kernels_tables(tmp_path)
    assert "| sgmv | 8 | cpu | 3 of 4 | 0.20 / 0.30 / 0.40 | 2.00 / 3.00 / 4.00 |" in text
    assert "| linear | 8 | torch | 1 of 1 | 0.90 / 0.90 / 0.90 | 1.00 / 1.00 / 1.00 |" in text
    assert "4300.0 GB/s, 700.00 TFLOP/s" in text
    assert "GPU: not measured yet" in text
    write(tmp_path, "gpu.json", {"kernels": kernels(*cases)})
    assert "GPU: not measured yet" not in performance.kernels_tables(tmp_path)
    assert "Example GPU, torch 2.13.0, 2026-01-02" in performance.kernels_tables(tmp_path)


def test_a_step_on_a_gpu_tells_what_graphs_bring_and_cost(tmp_path: Path) -> None:
    write(tmp_path, "gpu.json", {"step": gpu_step(step_point(1, 4.0, 2.0))})
    text = performance.fill("<!-- table:gpu -->\n<!-- /table -->", tmp_path)
    assert "| step, ms | forward, ms | forward without graphs, ms | limit, ms |" in text
    assert "| 32 | 1 | 5.00 | 4.00 | 12.00 | 2.00 |" in text
    assert "12 CUDA graphs, captured in 3.5 s, hold 100.5 MiB." in text
