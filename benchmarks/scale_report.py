"""Writes the tables and the chart of docs/scale.md from measured JSON.

    python -m benchmarks.scale_report            write them
    python -m benchmarks.scale_report --check    say whether they are as they should be

Each part is taken from the newest result that has it. It must not know how anything was measured.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, record, report, svg

PAGE = record.ROOT / "docs" / "scale.md"
CHART = "scale.svg"
NOT_MEASURED = "Not measured yet: run `python -m benchmarks.adapters_at_scale`.\n"
DROP_GOAL = 0.05
"""At most so much of the throughput with 5 adapters may be lost with 2,000."""

Result = Mapping[str, Any]


def newest(results: Path, part: str) -> Result | None:
    """The newest result that has this part."""
    found = [record.read(path) for path in sorted(results.glob("adapters-at-scale-*.json"))]
    return max((r for r in found if part in r), key=lambda r: r["date"], default=None)


def fill(text: str, results: Path = record.RESULTS) -> str:
    """`text` with every table made anew."""
    return report.fill_tables(
        text,
        {
            "padding": lambda: _of(results, "sim", padding_table),
            "fragments": lambda: _of(results, "sim", fragments_line),
            "evictions": lambda: _of(results, "sim", evictions_table),
            "loads": lambda: _of(results, "loads", loads_table),
            "firsttokens": lambda: _of(results, "loads", first_tokens_table),
            "curve": lambda: _of(results, "curve", curve_table),
            "gpucurve": lambda: gpu_report.curve_table(results),
            "gpucopies": lambda: gpu_report.copies_tables(results),
        },
    )


def chart(results: Path = record.RESULTS) -> str | None:
    """The picture beside the page; None before anything was measured."""
    result = newest(results, "curve")
    if result is None:
        return None
    settings = result["curve"]["settings"]
    lines = [
        svg.Line(
            report.popularity_title(popularity),
            [(p["count"], p["output_tokens_per_s"]) for p in points],
        )
        for popularity, points in _by_popularity(result["curve"]["points"]).items()
    ]
    return svg.draw(
        svg.Chart(
            f"{settings['concurrency']} requests at once over more and more adapters",
            f"adapters of rank {settings['rank']}, all in host memory, at most "
            f"{settings['resident']} on the device",
            "output tokens per second",
            lines,
        )
    )


def _of(results: Path, part: str, make: Callable[[Result], str]) -> str:
    result = newest(results, part)
    return NOT_MEASURED if result is None else make(result)


# -- simulated --------------------------------------------------------------------------------


def padding_table(result: Result) -> str:
    rows = [
        [
            f"{case['count']} x {case['what']}",
            _gb(case["exact_bytes"]),
            _gb(case["slots_bytes"]),
            f"{case['slots_bytes'] / case['exact_bytes']:.1f}",
        ]
        for case in result["sim"]["padding"]
    ]
    heads = [f"on {result['sim']['shape']}", "here", "padded slots", "times"]
    return report.markdown(heads, rows)


def fragments_line(result: Result) -> str:
    found = result["sim"]["fragments"]
    return (
        f"Over {found['loads']:,} loads of ranks {found['ranks'][0]} to {found['ranks'][-1]}, each "
        f"as likely, in {_gb(found['pool_bytes'])} on {result['sim']['shape']}: when an adapter is "
        f"turned away, {found['mean_filled']:.1%} of the pool are in use on average; free and yet "
        f"of no use to it are {found['worst_loss']:.2%} at worst. {found['split_share']:.0%} of "
        f"the loads are split, {found['padding_share']:.2%} of their "
        f"bytes are padding. `{result['command']}`, {report.version(result)}.\n"
    )


def evictions_table(result: Result) -> str:
    sim = result["sim"]
    rows = [
        [
            case["what"],
            f"{case['lru']['miss_share']:.1%}",
            f"{case['by_worth']['miss_share']:.1%}",
            f"{case['lru']['load_s']:,.0f} s",
            f"{case['by_worth']['load_s']:,.0f} s",
            f"{case['load_s_to_lru']:.2f}",
        ]
        for case in sim["evictions"]
    ]
    heads = ["trace", "misses, LRU", "misses", "loading, LRU", "loading", "against LRU"]
    footer = (
        f"{sim['num_requests']:,} requests for {sim['num_adapters']:,} adapters of ranks 8 to 256 "
        f"on {sim['shape']}, a tenth with DoRA unless it says otherwise, a fifth of all bytes in "
        "memory; reading at 1 GB/s, folding 10.5 s. Halfway all adapters change their popularity. "
        f"`{result['command']}`, {report.version(result)}.\n"
    )
    return report.markdown(heads, rows) + "\n" + footer


# -- measured ---------------------------------------------------------------------------------


def loads_table(result: Result) -> str:
    rows = [
        [
            str(one["rank"]),
            _mb(one["host_bytes"]),
            _ms(one["from_disk_ms"]),
            _ms(one["from_pages_ms"]),
            _mb(one["device_bytes"]),
            _ms(one["to_device_ms"]),
        ]
        for one in result["loads"]["loads"]
    ]
    heads = [
        "rank", "on the host", "from disk", "from page cache", "on the device", "host to device"
    ]  # fmt: skip
    count = result["loads"]["loads"][0]["count"]
    return report.markdown(heads, rows) + "\n" + _footer(result, f"medians of {count} adapters")


def first_tokens_table(result: Result) -> str:
    rows = [
        [
            str(one["rank"]),
            _ms(one["device_ms"]),
            _ms(one["host_ms"]),
            _ms(one["host_ms"] - one["device_ms"]),
            _ms(one["disk_ms"]),
        ]
        for one in result["loads"]["first_tokens"]
    ]
    heads = ["rank", "on the device", "in host memory", "more", "on disk, never read"]
    note = "one request at a time, 16 tokens in, over HTTP; medians"
    return report.markdown(heads, rows) + "\n" + _footer(result, note)


def curve_table(result: Result) -> str:
    curve = result["curve"]
    settings = curve["settings"]
    distinct = curve.get("distinct")
    groups = _by_popularity(([distinct] if distinct else []) + curve["points"])
    rows = [
        [
            report.popularity_title(point["popularity"]),
            f"{point['count']:,}",
            f"{point['output_tokens_per_s']:,.0f}" + ("" if point["clean"] else " (unclean)"),
            f"{point['growing_tokens_per_s']:,.0f}",
            f"{point['distinct_in_batch']:.0f}",
            _ms(point["ttft_p50_s"] * 1e3),
            _ms(point["ttft_p99_s"] * 1e3),
        ]
        for points in groups.values()
        for point in points
    ]
    heads = [
        "popularity", "adapters", "tokens/s", "when no more were known", "distinct among 32",
        "first token, p50", "p99",
    ]  # fmt: skip
    heads[4] = f"distinct among {settings['concurrency']}"
    note = (
        f"{settings['requests']} requests a point, {settings['concurrency']} at once, "
        f"{settings['prompt_tokens']} tokens in and {settings['output_tokens']} out, medians of "
        f"{settings['passes']} passes in random turn; the server holds "
        f"{curve['resident_bytes'] / 2**30:.1f} GiB at the end"
    )
    drops = "".join(_drop(name, curve["drops"][name], groups, distinct) for name in curve["drops"])
    picture = f"![tokens per second over the number of adapters]({CHART})\n\n"
    return picture + report.markdown(heads, rows) + f"\n{drops}\n" + _footer(result, note)


def _drop(
    popularity: str,
    drops: Mapping[str, float],
    groups: Mapping[str, Sequence[Result]],
    distinct: Result | None,
) -> str:
    """What the most adapters lose, against the fewest, against each other count, and against as
    many on the device as a step can read."""
    counts = sorted(map(int, drops))
    least, most = counts[0], counts[-1]
    lost = drops[str(least)]
    others = ", ".join(f"{drops[str(n)]:.1%} against {n:,}" for n in counts[1:-1])
    is_met = "met" if lost <= DROP_GOAL else "not met"
    beside = ""
    if distinct is not None:
        share = groups[popularity][-1]["output_tokens_per_s"] / distinct["output_tokens_per_s"]
        beside = (
            f"; **{1 - share:.1%}** against {distinct['count']} distinct ones that stay on the "
            "device"
        )
    return (
        f"{report.popularity_title(popularity)}: {most:,} adapters lose **{lost:.1%}** against "
        f"{least} (at most {DROP_GOAL:.0%} is wanted: {is_met}); {others}{beside}.\n"
    )


def _by_popularity(points: Sequence[Result]) -> dict[str, list[Result]]:
    names = dict.fromkeys(point["popularity"] for point in points)
    return {
        name: sorted((p for p in points if p["popularity"] == name), key=lambda p: p["count"])
        for name in names
    }


def _footer(result: Result, note: str) -> str:
    return (
        f"`{result['model']}` model on a CPU, engine on {result['threads']} "
        f"thread{'s' if result['threads'] > 1 else ''}; {note}. {report.machine(result)}, "
        f"{result['date'][:10]}, {report.version(result)}: `{result['command']}`.\n"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


# -- the page ---------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    code = report.write_page(argv, "benchmarks.scale_report", PAGE, fill)
    pictures = {CHART: chart(), gpu_report.CHART: gpu_report.chart(record.RESULTS)}
    return max(code, *(_draw(argv, PAGE.with_name(name), pictures[name]) for name in pictures))


def _draw(argv: Sequence[str], path: Path, picture: str | None) -> int:
    """Write a picture, or say whether it is as it should be; the exit code."""
    if "--check" not in argv:
        if picture is not None:
            path.write_text(picture, encoding="utf-8")
        return 0
    drawn = path.read_text(encoding="utf-8") if path.exists() else None
    if drawn != picture:
        print(f"{path.name}: run benchmarks.scale_report")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
