"""Writes the tables of docs/performance.md from measured JSON, between the marks of report.py.

    python -m benchmarks.performance            write them
    python -m benchmarks.performance --check    say whether they are as they should be

What we want is in goals.py; what was found comes from benchmarks/results alone. It must not know
how anything was measured.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import goals, gpu_report, record, report

PAGE = record.ROOT / "docs" / "performance.md"


def fill(text: str, results: Path = record.RESULTS) -> str:
    """`text` with every table made anew."""
    return report.fill_tables(
        text,
        {
            "goals": lambda: goals_table(results),
            "bench": lambda: report.bench_tables(results),
            "cold": lambda: report.cold_table(results),
            "parts": lambda: parts_tables(results),
            "kernels": lambda: kernels_tables(results),
            "gpu": lambda: report.gpu_tables(results),
            "gpuparts": lambda: gpu_report.parts_tables(results),
            "gpupeft": lambda: gpu_report.peft_table(results),
            "gputrain": lambda: gpu_report.train_table(results),
        },
    )


def goals_table(results: Path) -> str:
    measured = goals.Measured.read(results)
    rows = [[goal.what, goal.limit, goal.wanted, goal.found(measured)] for goal in goals.GOALS]
    return report.markdown(["what", "limit", "we want", "measured"], rows, numbers=False)


def parts_tables(results: Path) -> str:
    found = [record.read(path) for path in sorted(results.glob("step-parts-*.json"))]
    if not found:
        return "Not measured yet: run `python -m benchmarks.step_parts`.\n"
    return "\n".join(_parts_table(result) for result in found)


PARTS = {
    "linears": "linears of the layers",
    "sgmv": "SGMV",
    "attention": "attention",
    "elementwise": "norms, rotary embedding, activations",
    "head": "head",
    "sampling": "sampling",
    "packing": "packing the plan",
    "rest": "rest",
}
SCENARIOS = report.TITLES | {"bare": "base rows, no adapter loaded", "base": "base rows"}


def _parts_table(result: Mapping[str, Any]) -> str:
    scenarios = result["scenarios"].values()
    rows = [
        [title, *(_ms(figures["parts_ms"][part]) for figures in scenarios)]
        for part, title in PARTS.items()
    ]
    for title, key in (("op by op, whole", "op_by_op_ms"), ("served, whole", "served_ms")):
        rows.append([title, *(_ms(figures[key]) for figures in scenarios)])
    heads = [f"{_base(result)}, ms", *(SCENARIOS[name] for name in result["scenarios"])]
    return report.markdown(heads, rows) + "\n" + _parts_footer(result)


def _parts_footer(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    mark = "" if result["clean"] else " *Others used the machine meanwhile.*"
    if not result["is_recorded"]:
        mark += " *No step could be recorded here: served is op by op.*"
    return (
        f"{settings['rows']} rows at {settings['context']} tokens of context, adapters of rank "
        f"{settings['rank']}, {settings['threads']} threads; scenarios in turn, means over the "
        f"middle half of {settings['turns'] * settings['reps']} steps. {report.machine(result)}, "
        f"{result['date'][:10]}, {report.version(result)}: `{result['command']}`.{mark}\n"
    )


def _base(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    return f"`{settings['model']}`" + (" in NF4" if settings["quantize"] == "nf4" else "")


def _ms(value: float) -> str:
    return f"{value:.2f}"


# -- kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Cases of one op and as many rows, of one contender."""

    op: str
    rows: int
    contender: str
    found: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]
    """(case, what the contender did in it)."""

    @property
    def cells(self) -> list[str]:
        shares = [one["of_limit"] for case, one in self.found if _has_share(case, one)]
        right = sum(one["status"] == "right" for _, one in self.found)
        ratios = [ratio for pair in self.found if (ratio := _to_reference(*pair)) is not None]
        return [
            self.op,
            str(self.rows),
            self.contender,
            f"{right} of {len(self.found)}",
            _spread(shares),
            _spread(ratios),
        ]


def kernels_tables(results: Path) -> str:
    found = [record.read(path) for path in sorted(results.glob("cpu-kernels-*.json"))]
    tables = [_kernels_table(result, _cpu_title(result)) for result in found]
    if not found:
        tables.append("CPU: not measured yet; run `python -m lory_kernels.bench --json FILE`.\n")
    gpu = goals.Measured.read(results).gpu.get("kernels")
    if gpu is None:
        tables.append("GPU: not measured yet; run `make gpu-check SECTION=kernels`.\n")
    else:
        tables.append(_kernels_table(gpu, report.gpu(gpu)))
    return "\n".join(tables)


def _kernels_table(result: Mapping[str, Any], title: str) -> str:
    heads = ["op", "rows", "who", "right", "share of the limit", "times the reference's speed"]
    limits = result["limits"]
    footer = (
        f"{title}, {result['dtype']}; limits measured with it: "
        f"{limits['bytes_per_s'] / 1e9:.1f} GB/s, {limits['flops_per_s'] / 1e12:.2f} TFLOP/s. "
        f"`{result['command']}`.\n"
    )
    rows = [group.cells for group in _groups(result["cases"])]
    return report.markdown(heads, rows) + "\n" + footer


def _cpu_title(result: Mapping[str, Any]) -> str:
    return f"CPU ({result['device']}), {result['threads']} threads, {result['date'][:10]}"


def _groups(cases: Sequence[Mapping[str, Any]]) -> list[Group]:
    """In the order in which they were measured; the reference is in the ratios."""
    found: dict[tuple[str, int, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for case in cases:
        for one in case["contenders"]:
            if one["role"] != "reference" or len(case["contenders"]) == 1:
                key = (case["op"], case["rows"], one["contender"])
                found.setdefault(key, []).append((case, one))
    return [Group(*key, tuple(pairs)) for key, pairs in found.items()]


def _has_share(case: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    """A case that must move nothing has no limit."""
    return one["of_limit"] is not None and case["limit_s"] > 0


def _to_reference(case: Mapping[str, Any], one: Mapping[str, Any]) -> float | None:
    """None, too, where nothing must be moved: both then tell how long they take to see that."""
    if not case["limit_s"] > 0:
        return None
    reference = next((other for other in case["contenders"] if other["role"] == "reference"), None)
    ours_s, theirs_s = goals.median_s(one), None if reference is None else goals.median_s(reference)
    return None if ours_s is None or theirs_s is None else theirs_s / ours_s


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    least, middle, most = min(values), statistics.median(values), max(values)
    return f"{least:.2f} / {middle:.2f} / {most:.2f}"


def main(argv: Sequence[str]) -> int:
    return report.write_page(argv, "benchmarks.performance", PAGE, fill)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
