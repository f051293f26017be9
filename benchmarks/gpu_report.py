"""Tables and the chart of what `make gpu-check` found, from its one JSON.

For docs/scale.md (the curve, and copies) and docs/performance.md (the parts of a step, and the
engine beside PEFT). Nothing is carried over from elsewhere: what is not in the JSON is not
measured. It must not know how anything was measured.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, report, svg

CHART = "gpu-curve.svg"
Result = Mapping[str, Any]


def section(results: Path, name: str) -> Result | None:
    """What a section found; None if it has not been run."""
    path = results / "gpu.json"
    return record.read(path).get(name) if path.exists() else None


def _made(results: Path, name: str, needs: str, make: Callable[[Result], str]) -> str:
    """A table of a section that has what it needs."""
    found = section(results, name)
    if found is None or not found.get(needs):
        return f"Not measured yet: run `make gpu-check SECTION={name}`.\n"
    return make(found)


# -- the curve --------------------------------------------------------------------------------


def curve_table(results: Path) -> str:
    return _made(results, "curve", "points", _curve_table)


def _curve_table(curve: Result) -> str:
    rows = [
        [
            report.popularity_title(point["popularity"]),
            f"{point['count']:,}",
            f"{point['output_tokens_per_s']:,.0f}",
            _ms(point["ttft_p50_s"]),
            _ms(point["ttft_p99_s"]),
            _ms(point["tpot_p50_s"]),
            _ms(point["tpot_p99_s"]),
            f"{point['copies_a_request']:.2f}",
            f"{point['cost_per_million']:.3f}",
            f"{point['cost_per_million_dedicated']:,.2f}",
        ]
        for point in _in_order(curve["points"])
    ]
    heads = [
        "popularity", "adapters", "tokens/s", "first token, p50", "p99", "each further token, p50",
        "p99", "copies a request", "a million tokens", "on a device for each adapter",
    ]  # fmt: skip
    picture = f"![tokens per second over the number of adapters]({CHART})\n\n"
    return picture + report.markdown(heads, rows) + "\n" + _curve_footer(curve)


def _in_order(points: Sequence[Result]) -> list[Result]:
    kinds = list(dict.fromkeys(point["popularity"] for point in points))
    return sorted(points, key=lambda point: (kinds.index(point["popularity"]), point["count"]))


def _curve_footer(curve: Result) -> str:
    held = curve["held"]
    few = f" ({held['why_no_more']})" if held["why_no_more"] else ""
    runs = [len(point["runs"]) for point in curve["points"]]
    passes = f"{min(runs)} to {max(runs)} runs" if min(runs) < max(runs) else f"{runs[0]} runs"
    low, high = curve["output_tokens"]
    return (
        f"{curve['model']}; adapters of rank {curve['rank']}: {held['adapters']:,} of "
        f"{held['wanted']:,} in host memory, {held['host_bytes'] / 1e9:.1f} GB{few}; "
        f"{curve['resident']} on the device at most. {curve['rows']} requests at once, "
        f"{curve['prompt_tokens']} tokens in and {low} to {high} out, medians of {passes} of "
        f"{curve['window_s']:g} s. {curve['load'].capitalize()}. Adapters: {curve['adapters']}. "
        f"Left out: {curve['bypassed']}. Cost at {curve['price_per_hour']:g} an hour: "
        f"{curve['cost']}. {_machine(curve)}{_missed(curve)}\n"
    )


def copies_tables(results: Path) -> str:
    return _made(results, "curve", "loads", _copies_tables)


def _copies_tables(curve: Result) -> str:
    firsts = {one["rank"]: one for one in curve.get("first_tokens", ())}
    rows = [
        [
            str(one["rank"]),
            f"{one['device_bytes'] / 1e6:.1f} MB",
            f"{one['to_device_ms']:.2f} ms",
            f"{one['bytes_per_s'] / 1e9:.1f} GB/s",
            f"{one['pinned_bytes_per_s'] / 1e9:.1f} GB/s",
            *_first_token(firsts.get(one["rank"])),
        ]
        for one in curve["loads"]
    ]
    heads = [
        "rank", "on the device", "host to device", "at", "a copy from pinned memory",
        "first token, resident", "in host memory",
    ]  # fmt: skip
    overlap = _overlap_line(curve["overlap"]) if "overlap" in curve else ""
    return report.markdown(heads, rows) + "\n" + overlap + _machine(curve) + "\n"


def _first_token(one: Result | None) -> tuple[str, str]:
    if one is None:
        return "-", "-"
    return f"{one['device_ms']:.1f} ms", f"{one['host_ms']:.1f} ms"


def _overlap_line(overlap: Result) -> str:
    quiet, copying, idle = overlap["quiet"], overlap["copying"], overlap["idle_share"]
    return (
        f"While copies go on ({overlap['copies']}, {overlap['copied_bytes_per_s'] / 1e9:.1f} "
        f"GB/s) a step of {overlap['rows']} rows over as many adapters takes "
        f"{copying['mean_ms']:.2f} ms instead of {quiet['mean_ms']:.2f} "
        f"(**{overlap['lost_share']:+.1%}**; p99 {copying['p99_ms']:.2f} instead of "
        f"{quiet['p99_ms']:.2f}). "
        + ("" if idle is None else f"Between such steps the device idles {idle:.1%} of the time. ")
    )


def chart(results: Path) -> str | None:
    """The picture of the curve; None before it was measured."""
    curve = section(results, "curve")
    if curve is None or not curve.get("points"):
        return None
    points = _in_order(curve["points"])
    lines = [
        svg.Line(
            report.popularity_title(kind),
            [(p["count"], p["output_tokens_per_s"]) for p in points if p["popularity"] == kind],
        )
        for kind in dict.fromkeys(point["popularity"] for point in points)
    ]
    return svg.draw(
        svg.Chart(
            f"{curve['rows']} requests at once over more and more adapters, {curve['device']}",
            f"adapters of rank {curve['rank']}, all in host memory, at most "
            f"{curve['resident']} on the device",
            "output tokens per second",
            lines,
        )
    )


# -- a step, part by part ---------------------------------------------------------------------

PARTS = {
    "linears": "linears",
    "lora": "LoRA",
    "attention": "attention",
    "elementwise": "elementwise",
    "head": "head",
    "sampling": "sampling",
    "copies": "copies",
    "idle": "idle",
}


def parts_tables(results: Path) -> str:
    return _made(results, "step", "points", _parts_tables)


def _parts_tables(step: Result) -> str:
    """Decode steps, then prompts."""
    points = sorted(step["points"], key=report.step_place)
    decode = [[str(point["batch"]), *_part_cells(point)] for point in points]
    prompts = [
        [f"{point['tokens']:,} in {point['rows']}", *_part_cells(point)]
        for point in step.get("prompts", ())
    ]
    others = ["adapters", *PARTS.values(), "step", "limit"]
    text = report.markdown(["batch, ms", *others], decode)
    if prompts:
        text += "\n" + report.markdown(["prompt tokens, ms", *others], prompts)
    footer = (
        f"{step['model']}, {step['context']} tokens of context; adapters of rank {step['rank']}, "
        f"or of ranks {', '.join(map(str, step['mixed_ranks']))} in turn. Parts are times of "
        "kernels in a profile; `step` is measured without one, each step submitted before the one "
        f"before it is collected, and `idle` is what is left of it. The limit: {step['limit']}; "
        f"{step['copy_gb_per_s']} GB/s, {step['tflop_per_s']} TFLOP/s. {_machine(step)}"
        f"{_missed(step)}\n"
    )
    return text + "\n" + footer


def _part_cells(point: Result) -> list[str]:
    parts = point.get("parts_ms")
    told = [f"{parts[part]:.2f}" if parts else "-" for part in PARTS]
    return [
        report.distinct_adapters(point),
        *told,
        f"{point['pipelined_ms']:.2f}",
        f"{point['limit_ms']:.2f}",
    ]


# -- beside PEFT ------------------------------------------------------------------------------


def peft_table(results: Path) -> str:
    return _made(results, "peft", "cases", _peft_table)


def _peft_table(found: Result) -> str:
    names = list(next(iter(found["cases"].values())))
    rows = [
        [
            f"{found['requests']} requests, {report.TITLES[case]}",
            *(f"{of[name]['output_tokens_per_s']:,.0f}" for name in names),
        ]
        for case, of in found["cases"].items()
    ]
    runs = min(len(one["wall_s"]) for of in found["cases"].values() for one in of.values())
    footer = (
        f"Output tokens a second; {found['model']}, adapters of rank {found['rank']}, "
        f"{found['prompt_tokens']} tokens in and {found['output_tokens']} out, all requests at "
        f"once, contenders in turn, medians of {runs} runs. {_machine(found)}{_missed(found)}\n"
    )
    return report.markdown(["", *names], rows) + "\n" + footer


# -- training ---------------------------------------------------------------------------------


def train_table(results: Path) -> str:
    return _made(results, "train", "contenders", _train_table)


def _train_table(found: Result) -> str:
    titles = {"lory": "Lory's trainer", "peft": "PEFT alone", "trl": "TRL"}
    rows = [
        [titles[name], f"{one['tokens_per_s']:,.0f}", f"{one['peak_bytes'] / 2**30:.1f} GiB"]
        for name, one in found["contenders"].items()
    ]
    absent = "" if found["trl_is_installed"] else " TRL was not installed."
    footer = (
        f"QLoRA on a base of the 8B shape, the same steps on the same rows.{absent} "
        f"{_machine(found)}{_missed(found)}\n"
    )
    return report.markdown(["", "tokens/s", "memory at most"], rows) + "\n" + footer


# -- words ------------------------------------------------------------------------------------


def _machine(found: Result) -> str:
    return f"{report.gpu(found)}, {report.version(found)}: `{found['command']}`."


def _missed(found: Result) -> str:
    """What is not in the table, if anything is not."""
    text = "" if found["is_whole"] else " *Cut off before its end.*"
    missed = found.get("not_reached")
    return text + (f" Not measured, for want of time: {'; '.join(missed)}." if missed else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
