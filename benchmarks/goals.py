"""What we chase: each goal with its limit, what we want, and how its figure is found in results.

A goal that no result tells of is not measured: nothing is assumed, nothing is carried over from
elsewhere. It must not know how anything was measured, nor what a page looks like.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.report import LORY

NOT_MEASURED = "not measured"
COMPARISONS = "cpu-compare-*.json"
ROWS = 32
"""Rows of a step, and requests of a comparison, that goals speak of."""
SITES = {"qkv", "o", "gate_up", "down"}
"""The linears of a layer, as the kernels' cases name them."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One measured value, and whether it is what we want."""

    text: str
    is_met: bool

    def __str__(self) -> str:
        return f"{self.text}: {'met' if self.is_met else 'not met'}"


@dataclass(frozen=True)
class Measured:
    """All results that goals are looked up in."""

    comparisons: tuple[Result, ...]
    """The newest first."""
    cold: Result | None
    """The newest of the gaps while cold adapters arrive."""
    parts: tuple[Result, ...]
    """Of steps."""
    curve: Result | None
    """The newest of throughput over the number of adapters."""
    gpu: Mapping[str, Result]
    """By section."""

    @classmethod
    def read(cls, results: Path) -> "Measured":
        gpu = results / "gpu.json"
        return cls(
            comparisons=_newest_first(results, COMPARISONS),
            cold=next(iter(_newest_first(results, "cold-adapters-*.json")), None),
            parts=_by_name(results, "step-parts-*.json"),
            curve=next(
                (r for r in _newest_first(results, "adapters-at-scale-*.json") if "curve" in r),
                None,
            ),
            gpu=record.read(gpu) if gpu.exists() else {},
        )

    def newest(self, peer: str = "") -> Iterator[tuple[Result, Result]]:
        """The newest comparison of each model and kind of weights, with its ratios at 32 requests.

        Of those that have the peer, if one is asked for.
        """
        seen: set[tuple[str, str]] = set()
        for result in self.comparisons:
            kind = (result["model"], result["settings"]["weights"])
            ratio = next((one for one in result["ratios"] if one["requests"] == ROWS), None)
            if ratio is None or kind in seen or (peer and _named(ratio, peer) is None):
                continue
            seen.add(kind)
            yield result, ratio


Find = Callable[[Measured], Iterator[Figure]]


@dataclass(frozen=True)
class Goal:
    what: str
    limit: str
    wanted: str
    figures: Find

    def found(self, measured: Measured) -> str:
        """What was measured, as a cell."""
        return "; ".join(map(str, self.figures(measured))) or NOT_MEASURED


def median_s(contender: Mapping[str, Any]) -> float | None:
    """Of one contender in a case of the kernels: cold where there is such a figure."""
    timing = contender["timing"]
    if timing is None:
        return None
    return (timing["cold"] or timing["warm"])["median_s"]


def _newest_first(results: Path, pattern: str) -> tuple[Result, ...]:
    return tuple(sorted(_by_name(results, pattern), key=lambda one: one["date"], reverse=True))


def _by_name(results: Path, pattern: str) -> tuple[Result, ...]:
    return tuple(record.read(path) for path in sorted(results.glob(pattern)))


# -- on a CPU ---------------------------------------------------------------------------------


def _distinct_to_base(wanted: float) -> Find:
    def figures(measured: Measured) -> Iterator[Figure]:
        for result, ratio in measured.newest():
            value = ratio["distinct_to_base"][LORY]
            yield Figure(f"{value:.2f} on {_label(result)}", value >= wanted)

    return figures


def _to_peer(scenario: str, model: str, peer: str, wanted: float) -> Find:
    """Lory's rate to that of a peer, both with weights in bfloat16."""

    def figures(measured: Measured) -> Iterator[Figure]:
        for result, ratio in measured.newest(peer):
            name = _named(ratio, peer)
            if name is None or result["model"] != model or not _is_plain(result):
                continue
            value = ratio["lory_to"][name][scenario]
            yield Figure(f"{value:.2f} times {name}{_unclean(result)}", value >= wanted)

    return figures


def _to_fastest_base(scenario: str, wanted: float, model: str = "") -> Find:
    """Lory's rate to the best rate of a peer's base alone, on one model or on all."""

    def figures(measured: Measured) -> Iterator[Figure]:
        for result, _ in measured.newest():
            cases = {
                case["scenario"]: case["contenders"]
                for case in result["cases"]
                if case["requests"] == ROWS
            }
            if not cases.keys() >= {"base", scenario} or model not in ("", result["model"]):
                continue
            bases = {name: one["output_tokens_per_s"] for name, one in cases["base"].items()}
            fastest = max(bases.keys() - {LORY}, key=bases.__getitem__, default=None)
            if fastest is not None:
                value = cases[scenario][LORY]["output_tokens_per_s"] / bases[fastest]
                yield Figure(f"{value:.2f} times {fastest} on {_label(result)}", value > wanted)

    return figures


def _base_rows(wanted: float) -> Find:
    def figures(measured: Measured) -> Iterator[Figure]:
        for result in measured.parts:
            settings, value = result["settings"], result["bare_to_base"]
            if settings["rows"] != ROWS:
                continue
            weights = " in NF4" if settings["quantize"] == "nf4" else ""
            mark = "" if result["clean"] else ", unclean"
            yield Figure(f"{value:.3f} on `{settings['model']}`{weights}{mark}", value >= wanted)

    return figures


def _cold_gap(wanted: float) -> Find:
    def figures(measured: Measured) -> Iterator[Figure]:
        if measured.cold is not None:
            value = measured.cold["median"]["p99_cold_to_quiet"]
            mark = "" if measured.cold["clean"] else ", unclean"
            yield Figure(f"{value:.2f} times{mark}", value <= wanted)

    return figures


def _lost(fewest: int, most: int, wanted: float) -> Find:
    """Of the throughput with `fewest` adapters, with `most`."""

    def figures(measured: Measured) -> Iterator[Figure]:
        points = measured.curve["curve"]["points"] if measured.curve else ()
        of = {(p["popularity"], p["count"]): p for p in points}
        for (popularity, count), many in of.items():
            few = of.get((popularity, fewest))
            if count == most and few is not None:
                yield _loss(few, many, wanted)

    return figures


def _lost_to_distinct(most: int, wanted: float) -> Find:
    """Of the throughput with as many distinct adapters as requests, with `most`."""

    def figures(measured: Measured) -> Iterator[Figure]:
        curve = measured.curve["curve"] if measured.curve else {}
        if "distinct" in curve:
            for many in (point for point in curve["points"] if point["count"] == most):
                yield _loss(curve["distinct"], many, wanted)

    return figures


def _loss(few: Result, many: Result, wanted: float) -> Figure:
    lost = 1 - many["output_tokens_per_s"] / few["output_tokens_per_s"]
    mark = "" if few["clean"] and many["clean"] else ", unclean"
    return Figure(f"{lost:.1%} with {many['popularity']}{mark}", lost <= wanted)


def _named(ratio: Mapping[str, Any], peer: str) -> str | None:
    """The contender that is this peer, whatever its version."""
    names = (name for name in ratio["lory_to"] if name.lower().startswith(peer.lower()))
    return next(names, None)


def _is_plain(result: Result) -> bool:
    return result["settings"]["weights"] == "random, bfloat16"


def _label(result: Result) -> str:
    weights = result["settings"]["weights"].removeprefix("random, ")
    kind = "" if _is_plain(result) else f" ({weights})"
    return f"`{result['model']}`{kind}{_unclean(result)}"


def _unclean(result: Result) -> str:
    cases = (case for case in result["cases"] if case["requests"] == ROWS)
    is_clean = all(one["clean"] for case in cases for one in case["contenders"].values())
    return "" if is_clean else ", unclean"


# -- on a GPU ---------------------------------------------------------------------------------


def _added_by_adapters(distinct: int, wanted_ms: float | None, wanted_share: float | None) -> Find:
    """What adapters add to the layers of a step of 32 rows, in time and in bytes' time."""

    def figures(measured: Measured) -> Iterator[Figure]:
        step = measured.gpu.get("step")
        points = {} if step is None else _points(step)
        with_them, without = points.get((ROWS, distinct)), points.get((ROWS, 0))
        if step is None or with_them is None or without is None:
            return
        added_ms = with_them["forward_ms"] - without["forward_ms"]
        share = added_ms / (with_them["limit_ms"] - without["limit_ms"])
        is_met = (wanted_ms is None or added_ms <= wanted_ms) and (
            wanted_share is None or share <= wanted_share
        )
        text = f"{added_ms:.2f} ms, {share:.1f} times its limit, on {step['device']}"
        yield Figure(text, is_met)

    return figures


def _points(step: Result) -> dict[tuple[int, int], Mapping[str, Any]]:
    """Those of adapters of one rank."""
    return {
        (point["batch"], point["distinct_adapters"]): point
        for point in step["points"]
        if point.get("ranks") != "mixed"
    }


def _nf4_linears(wanted_ms: Mapping[int, float | None]) -> Find:
    """By rows; None: less than the same linears in bfloat16 take."""

    def figures(measured: Measured) -> Iterator[Figure]:
        kernels = measured.gpu.get("kernels")
        if kernels is None:
            return
        for rows, wanted in wanted_ms.items():
            ours = _all_linears_ms(kernels, "nf4", rows, ("ours",))
            dense = _all_linears_ms(kernels, "linear", rows, ("ours", "reference"))
            most = dense if wanted is None else wanted
            if ours is None or most is None:
                continue
            beside = "" if wanted is not None else f" (bfloat16: {most:.2f} ms)"
            text = f"{ours:.2f} ms at {rows} rows{beside} on {kernels['device']}"
            yield Figure(text, ours <= most)

    return figures


def _all_linears_ms(kernels: Result, op: str, rows: int, roles: Sequence[str]) -> float | None:
    """Of all layers together; None unless every linear of a layer was measured and right."""
    seconds: dict[str, float] = {}
    for case in kernels["cases"]:
        if case["op"] == op and case["rows"] == rows:
            one = next((one for one in case["contenders"] if one["role"] in roles), None)
            median = None if one is None else median_s(one)
            if median is not None:
                seconds[case["shape"].split()[0]] = median
    if not seconds.keys() >= SITES:
        return None
    return sum(seconds[site] for site in SITES) * kernels["num_layers"] * 1e3


def _kept(fewest: int, most: int, wanted: float) -> Find:
    """Of the throughput with `fewest` adapters, with `most`."""

    def figures(measured: Measured) -> Iterator[Figure]:
        curve = measured.gpu.get("curve")
        points = [] if curve is None else curve.get("points", [])
        of = {(p["popularity"], p["count"]): p["output_tokens_per_s"] for p in points}
        for popularity in dict.fromkeys(point["popularity"] for point in points):
            few, many = of.get((popularity, fewest)), of.get((popularity, most))
            if curve is not None and few is not None and many is not None:
                kept = many / few
                yield Figure(f"{kept:.3f} with {popularity} on {curve['device']}", kept >= wanted)

    return figures


def _first_token(rank: int, wanted_ms: float) -> Find:
    """Of an adapter in host memory, above that of a resident one."""

    def figures(measured: Measured) -> Iterator[Figure]:
        curve = measured.gpu.get("curve")
        for one in () if curve is None else curve.get("first_tokens", ()):
            if curve is not None and one["rank"] == rank:
                more_ms = one["host_ms"] - one["device_ms"]
                yield Figure(f"{more_ms:.1f} ms on {curve['device']}", more_ms < wanted_ms)

    return figures


def _idle(rows: int, wanted: float) -> Find:
    def figures(measured: Measured) -> Iterator[Figure]:
        curve = measured.gpu.get("curve")
        overlap = {} if curve is None else curve.get("overlap", {})
        if curve is not None and overlap.get("rows") == rows and overlap["idle_share"] is not None:
            share = overlap["idle_share"]
            yield Figure(f"{share:.1%} on {curve['device']}", share < wanted)

    return figures


# -- the goals --------------------------------------------------------------------------------

RACE = "the peer's own rate in the same run"

GOALS = (
    Goal(
        "32 rows over 32 distinct rank-16 adapters, against 32 rows of the base alone, CPU",
        "1: the base alone",
        "at least 0.85",
        _distinct_to_base(0.85),
    ),
    Goal(
        "32 requests over 32 distinct adapters, against vLLM for CPU on the same, `small`",
        RACE,
        "3.6 times",
        _to_peer("distinct", "small", "vLLM", 3.6),
    ),
    Goal(
        "the same on `tinyllama`",
        RACE,
        "2.4 times",
        _to_peer("distinct", "tinyllama", "vLLM", 2.4),
    ),
    Goal(
        "32 requests over 32 distinct adapters, against the base alone on the fastest peer, CPU",
        RACE,
        "faster",
        _to_fastest_base("distinct", 1),
    ),
    Goal(
        "32 requests of the base alone, against the fastest peer, `small`",
        RACE,
        "1.3 times",
        _to_fastest_base("base", 1.3, "small"),
    ),
    Goal(
        "the same on `tinyllama`",
        RACE,
        "1.17 times",
        _to_fastest_base("base", 1.17, "tinyllama"),
    ),
    Goal(
        "speed of base rows while 32 adapters are loaded, against the same base without, CPU",
        "1: no adapter is touched",
        "at least 0.99",
        _base_rows(0.99),
    ),
    Goal(
        "p99 gap between tokens of running streams while 64 cold adapters arrive, against the "
        "gap without them",
        "1: a step waits for no load",
        "at most 1.2 times",
        _cold_gap(1.2),
    ),
    Goal(
        "throughput lost with 2,000 adapters against 5, all in host memory, 32 requests, CPU",
        "0: only adapters in use cost",
        "at most 5%",
        _lost(5, 2000, 0.05),
    ),
    Goal(
        "the same against 32 distinct adapters that stay on the device",
        "0: a step reads no more of them",
        "at most 5%",
        _lost_to_distinct(2000, 0.05),
    ),
    Goal(
        "time that LoRA adds to a step of 32 rows, 8B in NF4, 32 distinct rank-16 adapters, H200",
        "the adapters' bytes read once: 2.7 GB",
        "at most 2 times the limit",
        _added_by_adapters(32, None, 2.0),
    ),
    Goal(
        "the same with one adapter",
        "its bytes read once: 84 MB",
        "at most 0.3 ms",
        _added_by_adapters(1, 0.3, None),
    ),
    Goal(
        "all NF4 linears of an 8B model, H200",
        "their codes and scales read once: 3.9 GB",
        "2.0 ms up to 8 rows, 2.5 ms up to 32, less than bfloat16 at 64",
        _nf4_linears({1: 2.0, 8: 2.0, 16: 2.5, 32: 2.5, 64: None}),
    ),
    Goal(
        "throughput with 1,000 adapters against 5 under the same load, H200",
        "1: only adapters in use cost",
        "at least 0.97",
        _kept(5, 1000, 0.97),
    ),
    Goal(
        "time to the first token of an adapter in host memory, above that of a resident one, H200",
        "one copy of its bytes",
        "under 10 ms",
        _first_token(16, 10.0),
    ),
    Goal(
        "time that the device idles between steps at 64 rows, H200",
        "0",
        "under 5% of the step",
        _idle(64, 0.05),
    ),
)
