"""Thousands of adapters, measured: what is simulated, what is made, and the page that tells it."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import adapters_at_scale, goals, record, scale_report, scale_sim, svg
from benchmarks.crowd import CONFIG, WEIGHTS, Crowd, forget_pages, gathered
from benchmarks.models import SHAPES
from benchmarks.scale_curve import Point, drops, summary
from benchmarks.scale_sim import LLAMA_8B, ByWorth, Lru, Trace, fragments, replay

from lory_server.adapters.extents import ExtentAllocator

TINY = SHAPES["tiny"]

# -- simulated --------------------------------------------------------------------------------


def test_no_mix_of_ranks_loses_15_percent_of_the_pool() -> None:
    """Ranks 1 to 256 in one pool, on long random traces; the figure is printed."""
    for seed, count in ((0, 256), (1, 256), (2, 40)):
        found = fragments(LLAMA_8B, 1_500, count=count, seed=seed)
        print(
            f"\n{found['pool_bytes'] / 1e9:.1f} GB, {found['turned_away']} turned away: lost "
            f"{found['mean_loss']:.2%}, at worst {found['worst_loss']:.2%}; in use "
            f"{found['mean_filled']:.1%}"
        )
        assert found["turned_away"] > 500
        assert found["worst_loss"] < 0.15
        assert found["padding_share"] < 0.01


def test_without_splitting_the_pool_would_lose_more_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ExtentAllocator, "_split", lambda *_: None)
    assert fragments(LLAMA_8B, 1_500)["worst_loss"] > 0.15


@pytest.mark.parametrize(
    ("alpha", "dora_share", "num_shuffles", "most"),
    [
        (1.0, 0.1, 1, 0.3),
        (0.7, 0.1, 1, 0.3),
        (1.0, 0.0, 1, 0.92),
        (1.0, 0.1, 9, 0.3),
        (1.0, 0.0, 9, 1.02),
    ],
)
def test_worth_spends_less_on_loading_than_lru(
    alpha: float, dora_share: float, num_shuffles: int, most: float
) -> None:
    trace = Trace(LLAMA_8B, 1_000, 30_000, alpha, dora_share=dora_share, num_shuffles=num_shuffles)
    lru, ours = replay(trace, Lru), replay(trace, ByWorth)
    print(f"\nZipf {alpha}: LRU {lru}, by worth {ours}")
    assert ours["load_s"] < most * lru["load_s"]
    assert replay(trace, ByWorth) == ours, "the same trace, the same figures"


def test_padding_is_what_the_largest_rank_takes() -> None:
    cases = {case["what"]: case for case in scale_sim.padding(LLAMA_8B)}
    small = cases["rank 8, slots of rank 64"]
    assert small["exact_bytes"] == pytest.approx(2.7e9, rel=0.01)
    assert small["slots_bytes"] == pytest.approx(21.5e9, rel=0.01)
    even = cases["rank 8, slots of rank 8"]
    assert even["exact_bytes"] == even["slots_bytes"]


# -- made -------------------------------------------------------------------------------------


def test_a_crowd_is_whole_distinct_and_gone_afterwards(tmp_path: Path) -> None:
    crowds = [Crowd(TINY, 2, 3), Crowd(TINY, 4, 2)]
    with gathered(crowds, tmp_path) as folder:
        names = [name for crowd in crowds for name in crowd.names]
        assert sorted(path.name for path in folder.glob("r*")) == sorted(names)
        forget_pages(folder, names)
        found = [load_file(folder / name / WEIGHTS) for name in crowds[0].names]
        first, second = (torch.cat([t.flatten() for t in one.values()]) for one in found[:2])
        assert not torch.equal(first, second)
        assert json.loads((folder / names[0] / CONFIG).read_text())["r"] == 2
        assert (folder / names[0] / CONFIG).stat().st_nlink == 4
    assert not list(tmp_path.iterdir())


# -- measured ---------------------------------------------------------------------------------

TINY_RUN = """
    --model tiny --ranks 2 4 --per-rank 2 --rounds 1 --rank 2 --counts 2 6 --concurrency 3
    --requests 6 --prompt-tokens 4 --output-tokens 3 --passes 1 --resident 3 --sim-loads 30
    --sim-adapters 50 --sim-requests 2000 --quiet-limit 0
"""


@pytest.mark.full
def test_all_of_it_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "adapters-at-scale-tiny.json"
    adapters_at_scale.main([*TINY_RUN.split(), "--models", str(tmp_path / "m"), "--out", str(out)])
    result = record.read(out)
    assert [one["rank"] for one in result["loads"]["loads"]] == [2, 4]
    for one in result["loads"]["loads"]:
        assert one["device_bytes"] >= one["host_bytes"] > 0
        assert min(one["from_disk_ms"], one["from_pages_ms"], one["to_device_ms"]) > 0
    points = result["curve"]["points"]
    assert [(point["popularity"], point["count"]) for point in points] == [
        ("uniform", 2), ("zipf:1.0", 2), ("uniform", 6), ("zipf:1.0", 6)
    ]  # fmt: skip
    distinct = result["curve"]["distinct"]
    assert (distinct["popularity"], distinct["count"]) == ("distinct", 3)
    assert distinct["distinct_in_batch"] == 3
    assert not list((tmp_path / "m").glob("crowd-*"))
    text = scale_report.fill(scale_report.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "Not measured yet" not in text
    picture = scale_report.chart(tmp_path)
    assert picture is not None
    ElementTree.fromstring(picture)


def run(number: int, rate: float, clean: bool = True) -> dict[str, Any]:
    times = {"p50": 0.01 * number + 0.01, "p99": 0.1, "max": 1.0}
    return {
        "pass": number, "output_tokens_per_s": rate, "ttft_s": times,
        "distinct_in_batch": 5.0, "clean": clean,
    }  # fmt: skip


def test_the_first_pass_is_not_in_the_medians() -> None:
    point = summary(
        Point("uniform", 5), [run(0, 999.0), run(1, 100.0), run(2, 110.0), run(3, 90.0)]
    )
    assert (point["output_tokens_per_s"], point["growing_tokens_per_s"]) == (100.0, 999.0)
    assert point["ttft_p50_s"] == 0.03
    assert point["clean"]
    assert not summary(Point("uniform", 5), [run(0, 1.0), run(1, 1.0, clean=False)])["clean"]


def test_a_drop_is_of_the_most_adapters_against_each_count() -> None:
    points = [
        {"popularity": "uniform", "count": count, "output_tokens_per_s": rate}
        for count, rate in ((5, 100.0), (32, 96.0), (2000, 90.0))
    ]
    assert drops(points) == {"uniform": {"5": 0.1, "32": 0.0625, "2000": 0.0}}


# -- the page ---------------------------------------------------------------------------------


def test_the_page_is_what_the_script_makes(capsys: pytest.CaptureFixture[str]) -> None:
    """If it is not: python -m benchmarks.scale_report"""
    assert scale_report.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_without_results_nothing_is_measured(tmp_path: Path) -> None:
    text = scale_report.fill(scale_report.PAGE.read_text(encoding="utf-8"), tmp_path)
    tables = re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", text, re.DOTALL)
    on_a_gpu = {table for name, table in tables if name.startswith("gpu")}
    assert on_a_gpu == {"Not measured yet: run `make gpu-check SECTION=curve`.\n"}
    on_a_cpu = [table for name, table in tables if not name.startswith("gpu")]
    assert on_a_cpu == [scale_report.NOT_MEASURED] * 6
    assert scale_report.chart(tmp_path) is None


def test_a_chart_that_is_behind_is_told_and_then_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale_report, "PAGE", tmp_path / "scale.md")
    monkeypatch.setattr(scale_report, "chart", lambda: "<svg/>")
    (tmp_path / "scale.md").write_text("no tables\n")
    assert scale_report.main(["--check"]) == 1
    assert "scale.svg: run" in capsys.readouterr().out
    assert scale_report.main([]) == 0
    assert (tmp_path / "scale.svg").read_text() == "<svg/>"
    assert scale_report.main(["--check"]) == 0


def curve(rates: dict[int, float], clean: bool = True, distinct: float = 980.0) -> dict[str, Any]:
    def point(popularity: str, count: int, rate: float) -> dict[str, Any]:
        return {
            "popularity": popularity, "count": count, "output_tokens_per_s": rate,
            "growing_tokens_per_s": rate, "distinct_in_batch": 5.0, "ttft_p50_s": 0.01,
            "ttft_p99_s": 0.02, "clean": clean,
        }  # fmt: skip

    points = [point("uniform", count, rate) for count, rate in rates.items()]
    settings = {
        "concurrency": 32, "requests": 192, "prompt_tokens": 64, "output_tokens": 48, "passes": 3,
        "rank": 16, "resident": 256,
    }  # fmt: skip
    return {
        "date": "2026-01-02T03:04:05Z", "commit": "abcdefabcdef", "command": "python -m b",
        "versions": {"torch": "2.13.0"}, "machine": {"cpu": "Example CPU", "cores": 2},
        "model": "small", "threads": 1,
        "curve": {
            "settings": settings, "points": points, "drops": drops(points),
            "distinct": point("distinct", 32, distinct), "resident_bytes": 3 * 2**30,
        },
    }  # fmt: skip


def test_a_curve_is_a_table_a_verdict_a_picture_and_a_goal(tmp_path: Path) -> None:
    path = tmp_path / "adapters-at-scale-1.json"
    path.write_text(json.dumps(curve({5: 1000.0, 500: 961.0, 2000: 955.0})))
    text = scale_report.fill("<!-- table:curve -->\n<!-- /table -->", tmp_path)
    assert "| uniform | 2,000 | 955 | 955 | 5 | 10.0 ms | 20.0 ms |" in text
    assert "2,000 adapters lose **4.5%** against 5 (at most 5% is wanted: met); 0.6%" in text
    assert "| each its own | 32 | 980 |" in text
    assert "**2.6%** against 32 distinct ones that stay on the device." in text
    assert "](scale.svg)" in text
    picture = scale_report.chart(tmp_path)
    assert picture is not None
    root = ElementTree.fromstring(picture)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3, "of the curve alone"
    goal = next(one for one in goals.GOALS if one.what.startswith("throughput lost with 2,000"))
    assert goal.found(goals.Measured.read(tmp_path)) == "4.5% with uniform: met"
    beside = next(one for one in goals.GOALS if one.what.startswith("the same against 32 distinct"))
    assert beside.found(goals.Measured.read(tmp_path)) == "2.6% with uniform: met"
    later = curve({5: 1000.0, 2000: 900.0}, clean=False) | {"date": "2026-03-01T00:00:00Z"}
    (tmp_path / "adapters-at-scale-0.json").write_text(json.dumps(later))
    assert goal.found(goals.Measured.read(tmp_path)) == "10.0% with uniform, unclean: not met"
    assert "955" not in scale_report.fill("<!-- table:curve -->\n<!-- /table -->", tmp_path)


def test_a_chart_places_its_points_by_their_logarithm() -> None:
    line = svg.Line("a <b>", [(1, 0.0), (10, 50.0), (100, 100.0)])
    root = ElementTree.fromstring(svg.draw(svg.Chart("t", "x", "y", [line])))
    dots = [e for e in root.iter() if e.tag.endswith("circle")]
    xs, ys = ([float(dot.get(name, "nan")) for dot in dots] for name in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert any(e.text == "a <b>" for e in root.iter())
