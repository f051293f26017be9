"""Writes the README's tables, and those of docs/evaluation.md and docs/fine-tuning-api.md, from
measured JSON, between <!-- table:NAME --> and <!-- /table -->.

    python -m benchmarks.report            write them
    python -m benchmarks.report --check    say whether they are as they should be

No figure in a table is typed by hand. It must not know how anything was measured.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

README = record.ROOT / "README.md"
EVALUATION = record.ROOT / "docs" / "evaluation.md"
FINE_TUNING = record.ROOT / "docs" / "fine-tuning-api.md"
PAGES = (README, EVALUATION, FINE_TUNING)
ACCURACY = record.ROOT / "demo" / "accuracy.json"
MISMATCHES = record.ROOT / "demo" / "mismatches.json"
LORY = "Lory"
COLD_GOAL = 1.2
"""At most so much longer may the slowest gaps be while cold adapters arrive."""
SHAPES = {"small": "a small Llama's shape", "tinyllama": "TinyLlama's shape"}
TITLES = {"base": "the base alone", "one": "one adapter", "distinct": "distinct adapters"}
_TABLE = re.compile(r"<!-- table:([a-z]+) -->\n(.*?)<!-- /table -->", re.DOTALL)


class ReportError(Exception):
    """The README names a table that nobody makes."""


def fill(text: str, results: Path = record.RESULTS, accuracy: Path = ACCURACY) -> str:
    """`text` with every table made anew."""
    makers: dict[str, Callable[[], str]] = {
        "bench": lambda: bench_tables(results),
        "cold": lambda: cold_table(results),
        "gpu": lambda: gpu_tables(results),
        "training": lambda: training_table(results),
        "accuracy": lambda: accuracy_table(accuracy),
        "mismatches": lambda: mismatches_table(MISMATCHES),
    }
    return fill_tables(text, makers)


def fill_tables(text: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """`text` with what the makers of these names make between its marks."""

    def replace(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in makers:
            raise ReportError(f"no such table: {name}; there are {', '.join(sorted(makers))}")
        return f"<!-- table:{name} -->\n{makers[name]()}<!-- /table -->"

    return _TABLE.sub(replace, text)


# -- tables -----------------------------------------------------------------------------------


def bench_tables(results: Path) -> str:
    """The newest comparison of each model and kind of weights."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(results.glob("cpu-compare-*.json")):
        result = record.read(path)
        kind = (result["model"], result["settings"]["weights"])
        known = newest.get(kind)
        if known is None or result["date"] > known["date"]:
            newest[kind] = result
    if not newest:
        return "Not measured yet: run `make bench`.\n"
    return "\n".join(_bench_table(newest[kind]) for kind in sorted(newest, key=_table_place))


def _table_place(kind: tuple[str, str]) -> tuple[str, bool, str]:
    """By model; quantized weights after plain ones."""
    model, weights = kind
    return model, "NF4" in weights, weights


def _bench_table(result: Mapping[str, Any]) -> str:
    names = list(result["cases"][0]["contenders"])
    rows: list[list[str]] = []
    for case in result["cases"]:
        figures = [case["contenders"][name] for name in names]
        title = TITLES[case["scenario"]]
        rows.append([f"{case['requests']} requests, {title}", *map(_rate, figures)])
    for ratio in result["ratios"]:
        own = [f"{ratio['distinct_to_base'][name]:.2f}" for name in names]
        rows.append([f"{ratio['requests']} requests, distinct against own base", *own])
    for ratio in result["ratios"]:
        against = [
            "1" if name == LORY else f"1 / {ratio['lory_to'][name]['distinct']:.1f}"
            for name in names
        ]
        rows.append([f"{ratio['requests']} requests, distinct, against Lory", *against])
    memory = result.get("memory_gib")
    if memory:
        rows.append(["memory at the end", *(_gib(memory.get(name)) for name in names)])
    settings, shape = result["settings"], result["settings"]["shape"]
    weights = settings["weights"].replace(", ", " ")
    heading = (
        f"`{result['model']}` ({SHAPES.get(result['model'], 'a shape')}, {weights} "
        f"weights: hidden {shape['hidden_size']}, {shape['num_layers']} layers, vocabulary "
        f"{shape['vocab_size']}): output tokens per second\n\n"
    )
    return heading + markdown(["", *names], rows) + "\n" + _bench_footer(result)


def _bench_footer(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    unclean = sum(
        not figures["clean"] for case in result["cases"] for figures in case["contenders"].values()
    )
    mark = ""
    if unclean:
        mark = f" *Others used the machine during the {unclean} rows marked so.*"
    return (
        f"{settings['prompt_tokens']} random tokens in and {settings['output_tokens']} out, all "
        f"requests at once; adapters: {settings['adapters']}; {_runs(settings['repetitions'])} "
        f"after a warm-up, contenders in turn, {settings['threads']} threads. "
        f"{machine(result)}, {result['date'][:10]}, {version(result)}: "
        f"`{result['command']}`.{mark}\n"
    )


def cold_table(results: Path) -> str:
    found = sorted(results.glob("cold-adapters-*.json"))
    if not found:
        return "Not measured yet: run `python -m benchmarks.cold_adapters`.\n"
    result = max((record.read(path) for path in found), key=lambda one: one["date"])
    median, settings = result["median"], result["settings"]
    rows = [
        [title, _ms(median[f"{phase}_gap_p50_s"]), _ms(median[f"{phase}_gap_p99_s"])]
        for phase, title in (
            ("quiet", "nothing arrives"),
            ("cold", f"{settings['num_cold']} adapters arrive, none loaded before"),
            ("warm", "the same again, now resident"),
        )
    ]
    cold, is_met = median["p99_cold_to_quiet"], median["p99_cold_to_quiet"] <= COLD_GOAL
    ratio = (
        f"Cold against quiet, p99: **{cold:.2f}**, so the goal of {COLD_GOAL} is "
        f"{'met' if is_met else 'not met'}; cold against warm: {median['p99_cold_to_warm']:.2f}. "
    )
    mark = "" if result["clean"] else " *Others used the machine meanwhile.*"
    footer = (
        f"{ratio}{_cold_runs(len(result['repetitions']))}, `{settings['model']}` model, "
        f"{settings['num_streams']} streams, engine on {settings['threads']} thread"
        f"{_core(settings)}. "
        f"{machine(result)}, {result['date'][:10]}, {version(result)}: "
        f"`{result['command']}`.{mark}\n"
    )
    return markdown(["gap between tokens", "p50", "p99"], rows) + "\n" + footer


def training_table(results: Path) -> str:
    """What streams keep of their speed while a job trains beside them, and the job of its own."""
    found = [record.read(path) for path in sorted(results.glob("training-beside-*.json"))]
    found = [one for one in found if "share" in one["settings"]]
    if not found:
        return "Not measured yet: run `python -m benchmarks.training_beside`.\n"
    result = max(found, key=lambda one: one["date"])
    median, settings = result["median"], result["settings"]
    every = [
        one["beside"]["tokens_per_s"] / one["alone"]["tokens_per_s"]
        for one in result["repetitions"]
    ]
    alone, beside = (median[f"training_tokens_per_s_{name}"] for name in ("alone", "beside"))
    rows = [
        [
            "streams: tokens per second",
            f"{median['tokens_per_s_beside_to_alone']:.2f} ({min(every):.2f}-{max(every):.2f})",
        ],
        ["streams: gap between tokens, p50", f"{median['gap_p50_beside_to_alone']:.2f}"],
        ["streams: gap between tokens, p99", f"{median['gap_p99_beside_to_alone']:.2f}"],
        [
            "the job: tokens per second",
            f"{beside / alone:.2f} ({beside:.0f} a second; {alone:.0f} without streams)",
        ],
    ]
    footer = (
        f"With `--tuning-share {settings['share']:g}`. "
        f"Medians of the ratios of {len(every)} runs (least-most), the demo's base, "
        f"{settings['streams']} streams, engine on {settings['threads']} thread, the job on "
        f"{settings['tuning_threads']}. {machine(result)}, {result['date'][:10]}, "
        f"{version(result)}: `{result['command']}`.\n"
    )
    return markdown(["with the other beside it, against without", ""], rows) + "\n" + footer


def gpu_tables(results: Path) -> str:
    path = results / "gpu.json"
    found = record.read(path) if path.exists() else {}
    parts = [_parity_line(found["parity"])] if "parity" in found else []
    parts += [_step_table(found["step"])] if "step" in found else []
    if not parts:
        return "Not measured yet: run `make gpu-check` on a machine with an NVIDIA GPU.\n"
    return "\n".join(parts)


def _parity_line(parity: Mapping[str, Any]) -> str:
    passed = sum(check["passed"] for check in parity["checks"])
    return (
        f"Parity with the CPU reference: {passed} of {parity['num_checks']} checks passed "
        f"({gpu(parity)}).\n"
    )


_STEP_COLUMNS = {
    "step_ms": "step, ms",
    "forward_ms": "forward, ms",
    "op_by_op_ms": "forward without graphs, ms",
    "limit_ms": "limit, ms",
}


def _step_table(step: Mapping[str, Any]) -> str:
    points = step["points"]
    columns = [key for key in _STEP_COLUMNS if all(key in point for point in points)]
    rows = [
        [
            str(point["batch"]),
            distinct_adapters(point),
            *(f"{point[key]:.2f}" for key in columns),
        ]
        for point in sorted(points, key=step_place)
    ]
    heads = ["batch", "distinct adapters", *(_STEP_COLUMNS[key] for key in columns)]
    footer = (
        f"A decode step of {step['model']} at {step['context']} tokens of context, adapters of "
        f"rank {step['rank']} unless it says otherwise. The limit is the bytes read once at the "
        f"{step['copy_gb_per_s']} GB/s that a copy reaches. {_captured(step)}{gpu(step)}.\n"
    )
    return markdown(heads, rows) + "\n" + footer


def step_place(point: Mapping[str, Any]) -> tuple[int, str, int]:
    """Where a step stands in tables."""
    return point["batch"], point.get("ranks", ""), point["distinct_adapters"]


def distinct_adapters(point: Mapping[str, Any]) -> str:
    mixed = " of mixed ranks" if point.get("ranks") == "mixed" else ""
    return f"{point['distinct_adapters']}{mixed}"


def _captured(step: Mapping[str, Any]) -> str:
    """What the graphs cost; nothing where there were none."""
    captured = step.get("captured")
    if not captured:
        return ""
    return (
        f"{captured['graphs']} CUDA graphs, captured in {captured['seconds']} s, hold "
        f"{captured['mib']} MiB. "
    )


def accuracy_table(path: Path) -> str:
    if not path.exists():
        return "Not measured yet: run `python demo/evaluate.py`.\n"
    rows = [
        [f"`{name}`", f"{score['base']:.0%}", f"{score['adapter']:.0%}", str(score["rows"])]
        for name, score in sorted(record.read(path).items())
    ]
    return markdown(["adapter", "base", "with the adapter", "held-out rows"], rows)


def mismatches_table(path: Path) -> str:
    """Ways to serve an adapter, and what each is worth."""
    if not path.exists():
        return "Not measured yet: run `python demo/mismatches.py`.\n"
    told = record.read(path)
    figures = ("json_valid", "json_schema.valid", "json_fields", "exact_match")
    rows = [
        [one["what"], *(f"{one[figure]:.0%}" for figure in figures)]
        for one in told["served"].values()
    ]
    heads = [f"`{told['task']}` served", "valid JSON", "follows the schema", "fields", "exact"]
    return markdown(heads, rows)


def popularity_title(popularity: str) -> str:
    kind, _, alpha = popularity.partition(":")
    return f"Zipf {alpha}" if kind == "zipf" else "each its own" if kind == "distinct" else kind


# -- parts ------------------------------------------------------------------------------------


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table; its columns after the first stand to the right where they hold numbers."""
    rulers = ["---", *["---:" if numbers else "---"] * (len(heads) - 1)]
    lines = [heads, rulers, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _rate(figures: Mapping[str, Any]) -> str:
    """The median and, of several runs, the least and the most."""
    text = _significant(figures["output_tokens_per_s"])
    rates = [run["output_tokens_per_s"] for run in figures["runs"]]
    if len(rates) > 1:
        text += f" ({_significant(min(rates))}-{_significant(max(rates))})"
    return text if figures["clean"] else f"{text} (unclean)"


def _significant(value: float) -> str:
    """Three digits that mean something."""
    decimals = 2 - math.floor(math.log10(value))
    return f"{round(value, decimals):.{max(0, decimals)}f}"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} GiB"


def _runs(num: int) -> str:
    return "one run" if num == 1 else f"medians of {num} runs (least-most)"


def version(result: Mapping[str, Any]) -> str:
    """What was measured: a commit, perhaps with changes."""
    commit, plus, _ = (result["commit"] or "").partition("+")
    return f"commit {commit[:7]}{' with changes' if plus else ''}" if commit else "no commit"


def _core(settings: Mapping[str, Any]) -> str:
    shares = settings.get("share_cores", True)
    return "" if shares else " with a core to itself, all else on the others"


def _cold_runs(num: int) -> str:
    if num == 1:
        return "One run"
    return f"Medians of {num} runs, of the ratios too: each is taken within a run"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def machine(result: Mapping[str, Any]) -> str:
    facts, versions = result["machine"], result["versions"]
    return f"{facts['cpu']}, {facts['cores']} cores, torch {versions['torch']}"


def gpu(section: Mapping[str, Any]) -> str:
    return f"{section['device']}, torch {section['versions']['torch']}, {section['date'][:10]}"


def write_page(argv: Sequence[str], module: str, page: Path, make: Callable[[str], str]) -> int:
    """The command of a page whose tables `make` makes anew; the exit code."""
    parser = argparse.ArgumentParser(
        prog=module, description=f"Writes the tables of {page.name} from measured JSON."
    )
    parser.add_argument("--check", action="store_true", help="say whether they are, write nothing")
    arguments = parser.parse_args(argv)
    text = page.read_text(encoding="utf-8")
    made = make(text)
    if arguments.check:
        print(f"{page.name} is up to date" if made == text else f"{page.name}: run {module}")
        return int(made != text)
    page.write_text(made, encoding="utf-8")
    return 0


def main(argv: Sequence[str]) -> int:
    return max(write_page(argv, "benchmarks.report", page, fill) for page in PAGES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
