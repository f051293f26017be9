"""The comparison and the cold-adapter measurement: turns, retries, ratios and windows."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bench_stub import running_stub
from lory_router.bench.client import Exchange, Target
from lory_router.bench.load import CompletionsRoute, Load
from lory_router.bench.workload import Ask

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import cold_adapters, compare, contenders, record
from benchmarks.compare import LORY, Case, Settings
from benchmarks.contenders import BatchResult, HttpContender

SETTINGS = Settings(
    model="tiny",
    threads=1,
    reps=2,
    warmup=1,
    retries=2,
    quiet_limit_s=0.0,
    batches=(4,),
    prompt_tokens=3,
    output_tokens=5,
    rank=4,
    num_adapters=4,
    seed=0,
)
NAMES = ("a00", "a01", "a02", "a03")


@dataclass
class Scripted:
    """A contender whose every run is written down."""

    name: str
    log: list[tuple[str, list[str]]]
    wall_s: float = 1.0
    lost_tokens: int = 0
    pid: int = 0
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, asks: Sequence[Ask], output_tokens: int) -> BatchResult:
        self.log.append((self.name, [ask.adapter for ask in asks]))
        self.prompts += [tuple(int(token) for token in ask.prompt) for ask in asks]
        return BatchResult(self.wall_s, len(asks) * output_tokens - self.lost_tokens)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the machine says of each run, in turn; then always clean."""
    verdicts: list[bool] = []

    class Watch:
        def __init__(self, pid: int) -> None:
            pass

        def stop(self) -> "Watch":
            return self

        @property
        def clean(self) -> bool:
            return verdicts.pop(0) if verdicts else True

        def described(self) -> dict[str, object]:
            return {}

    monkeypatch.setattr(compare, "CpuWatch", Watch)
    return verdicts


def test_contenders_take_turns_on_the_same_requests(clean: list[bool]) -> None:
    log: list[tuple[str, list[str]]] = []
    ours, theirs = Scripted(LORY, log), Scripted("peer", log)
    workload = SETTINGS.workload(Case("distinct", 4), NAMES)
    compare.measure_case([ours, theirs], workload, SETTINGS)
    assert [name for name, _ in log] == [LORY, "peer"] * 3
    assert all(names == list(NAMES) for _, names in log)
    assert ours.prompts == theirs.prompts
    assert len(set(ours.prompts)) == len(ours.prompts), "a prompt was sent twice"


def test_scenarios_are_what_they_say() -> None:
    def adapters(scenario: compare.Scenario) -> list[str]:
        asks = SETTINGS.workload(Case(scenario, 4), NAMES).requests(0)
        return [ask.adapter for ask in asks]

    assert adapters("base") == [""] * 4
    assert adapters("one") == ["a00"] * 4
    assert adapters("distinct") == list(NAMES)


def test_an_unclean_run_is_made_again_and_flagged_if_it_stays_so(clean: list[bool]) -> None:
    contender = Scripted(LORY, [])
    workload = SETTINGS.workload(Case("base", 4), NAMES)
    clean += [False, True, False, False, False]
    runs = compare.measure_case([contender], workload, SETTINGS)[LORY]
    assert [(run["attempts"], run["clean"]) for run in runs] == [(2, True), (3, False)]
    case = compare.summarise(Case("base", 4), {LORY: runs})
    assert case["contenders"][LORY]["clean"] is False
    assert len(set(contender.prompts)) == len(contender.prompts)


def test_a_contender_that_loses_tokens_is_not_measured(clean: list[bool]) -> None:
    contender = Scripted(LORY, [], lost_tokens=1)
    workload = SETTINGS.workload(Case("base", 4), NAMES)
    with pytest.raises(RuntimeError, match="19 tokens came, 20 asked for"):
        compare.measure_case([contender], workload, SETTINGS)


def test_ratios_are_of_medians() -> None:
    rates = {
        ("base", LORY): 100.0,
        ("one", LORY): 95.0,
        ("distinct", LORY): 90.0,
        ("base", "peer"): 50.0,
        ("one", "peer"): 40.0,
        ("distinct", "peer"): 30.0,
    }
    cases = [
        {
            "requests": 4,
            "scenario": scenario,
            "contenders": {
                name: {"output_tokens_per_s": rates[scenario, name]} for name in (LORY, "peer")
            },
        }
        for scenario in compare.SCENARIOS
    ]
    (ratio,) = compare.ratios(cases)
    assert ratio["distinct_to_base"] == {LORY: 0.9, "peer": 0.6}
    assert ratio["lory_to"]["peer"] == {"base": 2.0, "one": 2.38, "distinct": 3.0}


def test_a_peer_that_is_not_there_is_skipped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    with running_stub() as stub:
        found = compare.find_peers([f"here={stub.url}", "gone=http://127.0.0.1:9"])
    assert [(peer.name, peer.base_name) for peer in found] == [("here", "base")]
    assert "skipped peer gone" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="NAME=URL"):
        compare.find_peers(["http://127.0.0.1:9"])


def test_an_http_contender_sends_the_batch_at_once_and_counts_usage() -> None:
    asks = SETTINGS.workload(Case("distinct", 4), NAMES).requests(0)
    with running_stub() as stub:
        contender = HttpContender.at("stub", stub.url)
        done = contender.run(asks, 5)
        assert done.output_tokens == 20
        assert sorted(body["model"] for body in stub.asked) == list(NAMES)
        stub.behaviour = "overloaded"
        with pytest.raises(RuntimeError, match="stub: HTTP 429"):
            contender.run(asks, 5)


def test_a_peer_process_that_dies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.raises(RuntimeError, match="ended with code"),
        contenders.peft_contender(tmp_path / "none", tmp_path, ["a00"], 1, "none"),
    ):
        pass


def test_an_nf4_base_is_asked_for_and_said() -> None:
    settings = replace(SETTINGS, quantize="nf4")
    assert "--quantize nf4" in " ".join(compare.lory_flags(settings))
    assert compare.described(settings)["weights"].startswith("random, NF4")
    assert compare.described(SETTINGS)["weights"] == "random, bfloat16"


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_whole_comparison_runs_on_a_tiny_model(tmp_path: Path, quantize: str) -> None:
    out = tmp_path / "compare.json"
    small = ["--model", "tiny", "--batches", "4", "--adapters", "4", "--rank", "4", "--reps", "1"]
    short = ["--prompt-tokens", "8", "--output-tokens", "8", "--threads", "1", "--retries", "0"]
    place = ["--quiet-limit", "0", "--models", str(tmp_path / "models"), "--out", str(out)]
    compare.main([*small, *short, *place, "--quantize", quantize])
    result = json.loads(out.read_text())
    assert [case["scenario"] for case in result["cases"]] == list(compare.SCENARIOS)
    for case in result["cases"]:
        rates = [c["output_tokens_per_s"] for c in case["contenders"].values()]
        assert len(rates) == 2
        assert min(rates) > 0
    assert result["memory_gib"][LORY] > 0


# -- cold adapters ----------------------------------------------------------------------------


def stream(times: Sequence[float]) -> Exchange:
    """A stream whose tokens came at these times."""
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    event = b'data: {"choices": [{"text": "x"}]}\n\n'
    usage = b'data: {"usage": {"prompt_tokens": 1, "completion_tokens": 9}}\n\n'
    arrivals = [(at, (head if i == 0 else b"") + event) for i, at in enumerate(times)]
    return Exchange(times[0] - 1, times[-1], [*arrivals, (times[-1], usage)])


LOAD = Load(Target.of("http://x"), CompletionsRoute("base"), 9, True, 1, 1.0)
ASK = Ask("a", [1], 0.0)


def test_only_gaps_during_the_arrivals_count() -> None:
    done = stream([10.0, 10.5, 11.0, 11.75, 12.0, 15.0])
    window = cold_adapters.Window([done], [], began_s=10.75, ended_s=12.5)
    assert cold_adapters.stream_gaps([ASK], window, LOAD) == [0.5, 0.75, 0.25]


def test_a_stream_that_ends_before_the_arrivals_is_no_measurement() -> None:
    window = cold_adapters.Window([stream([10.0, 11.0])], [], began_s=10.5, ended_s=12.0)
    with pytest.raises(RuntimeError, match="stream-tokens"):
        cold_adapters.stream_gaps([ASK], window, LOAD)
    broken = cold_adapters.Window([Exchange(1.0, 2.0, failure="gone")], [], 1.0, 2.0)
    with pytest.raises(RuntimeError, match="a stream failed: gone"):
        cold_adapters.stream_gaps([ASK], broken, LOAD)


def test_ratios_of_gaps_are_medians_of_each_repetition() -> None:
    def phases(cold: float) -> dict[str, dict]:
        p99 = {"quiet": 1.0, "cold": cold, "warm": 2.0}
        return {name: {"gap_s": {"p50": 0.5, "p99": value}} for name, value in p99.items()}

    median = cold_adapters.medians([phases(1.0), phases(4.0), phases(3.0)])
    assert median["p99_cold_to_quiet"] == 3.0
    assert median["p99_cold_to_warm"] == 1.5
    assert median["p50_cold_to_quiet"] == 1.0


def test_the_streams_adapters_are_not_among_the_cold_ones() -> None:
    settings = cold_adapters.Settings("tiny", 64, 16, 8, 9, 0.1, 0.01, 4, 1, False, 1, 0.0, 0)
    assert len(settings.cold_names) == 64
    assert not set(settings.cold_names) & set(settings.stream_names)


def test_a_record_says_when_how_and_on_what() -> None:
    facts = record.facts("benchmarks.compare", ["--model", "small"])
    assert facts["command"] == "python -m benchmarks.compare --model small"
    assert facts["machine"]["cores"]
    assert {"python", "torch", "transformers"} <= facts["versions"].keys()


@pytest.mark.parametrize("script", [compare, cold_adapters])
def test_the_help_describes_every_option_and_its_default(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was the module's docstring, reflowed, and no default."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "python -m" not in told
    assert "measured runs" in told or "repetitions, each" in told
    assert "(default: small)" in told
    assert "(default: 64)" in told


def test_scripts_start_without_warnings_of_kernels_that_they_do_without() -> None:
    script = (
        "import logging, benchmarks\n"
        "assert logging.getLogger('bitsandbytes.backends.cpu.ops').level == logging.ERROR"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
