"""`lory bench` against a stand-in server whose answers, pauses and failures are known."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench_stub import ADAPTERS, Stub, running_stub
from lory_router.bench import machine
from lory_router.bench.client import Exchange, ReplyError, Target, read_reply
from lory_router.bench.command import main
from lory_router.bench.figures import medians, percentile, summarise
from lory_router.bench.load import Outcome, Usage

FAST = ["--warmup", "0", "--reps", "1", "--quiet-limit", "0", "--prompt-tokens", "5"]


@pytest.fixture
def stub():
    with running_stub() as one:
        yield one


def measured(stub: Stub, tmp_path: Path, *options: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["--url", stub.url, *FAST, *options, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_closed_loop_counts_tokens_from_usage(stub: Stub, tmp_path: Path) -> None:
    record = measured(
        stub, tmp_path, "--requests", "12", "--concurrency", "3", "--output-tokens", "4"
    )
    run = record["repetitions"][0]
    assert (run["answered"], run["prompt_tokens"], run["output_tokens"]) == (12, 60, 48)
    assert run["output_tokens_per_s"] == pytest.approx(48 / run["wall_s"], rel=0.01)
    assert sorted(body["model"] for body in stub.asked) == sorted(ADAPTERS * 4)
    assert all(body["ignore_eos"] and len(body["prompt"]) == 5 for body in stub.asked)
    assert record["workload"]["popularity"] == "distinct"
    assert record["server"]["base"] == "base"
    assert "late_s" not in run


def test_times_are_those_of_the_stream(stub: Stub, tmp_path: Path) -> None:
    stub.token_pause_s = 0.05
    options = ("--requests", "2", "--concurrency", "2", "--output-tokens", "4")
    run = measured(stub, tmp_path, *options)["repetitions"][0]
    assert run["ttft_s"]["p50"] == pytest.approx(0.05, abs=0.04)
    assert run["itl_s"]["p50"] == pytest.approx(0.05, abs=0.04)
    assert run["tpot_s"]["p50"] == pytest.approx(0.05, abs=0.04)
    assert run["latency_s"]["p50"] == pytest.approx(0.2, abs=0.1)


def test_without_streaming_there_is_no_time_to_first_token(stub: Stub, tmp_path: Path) -> None:
    record = measured(stub, tmp_path, "--requests", "3", "--no-stream", "--output-tokens", "4")
    run = record["repetitions"][0]
    assert (run["output_tokens"], run["ttft_s"], run["itl_s"]) == (12, None, None)


def test_an_open_loop_does_not_wait_for_answers(stub: Stub, tmp_path: Path) -> None:
    """Each answer takes 0.4 s; a generator that waited would need 8 s for 20 requests."""
    stub.token_pause_s = 0.2
    options = ("--requests", "20", "--rate", "50", "--output-tokens", "2")
    run = measured(stub, tmp_path, *options)["repetitions"][0]
    assert run["answered"] == 20
    assert run["wall_s"] < 4
    assert run["late_s"]["p50"] < 0.2


def test_repetitions_have_medians_and_the_warm_up_is_not_counted(
    stub: Stub, tmp_path: Path
) -> None:
    options = ("--requests", "3", "--reps", "3", "--warmup", "2", "--output-tokens", "2")
    record = measured(stub, tmp_path, *options)
    assert len(record["repetitions"]) == 3
    assert len(stub.asked) == 3 * 5
    walls = sorted(run["wall_s"] for run in record["repetitions"])
    assert record["median"]["wall_s"] == pytest.approx(walls[1], abs=1e-4)


def test_the_record_says_what_made_it(stub: Stub, tmp_path: Path) -> None:
    record = measured(stub, tmp_path, "--requests", "1", "--api-key", "hidden-key")
    assert record["machine"]["cores"] == os.cpu_count()
    assert "--requests 1" in record["command"]
    assert "hidden-key" not in json.dumps(record)
    assert record["versions"]["lory"]
    assert record["server"]["vocab_size"] == 50


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("overloaded", "HTTP 429"),
        ("error event", "the engine died"),
        ("cut", "cut short"),
        ("silent", "within 0.3 s"),
    ],
)
def test_a_failed_request_is_counted_and_never_as_an_answer(
    stub: Stub, tmp_path: Path, behaviour: str, message: str
) -> None:
    stub.behaviour = behaviour
    out = tmp_path / "out.json"
    options = ["--requests", "2", "--output-tokens", "3", "--timeout", "0.3", "--out", str(out)]
    assert main(["--url", stub.url, *FAST, *options]) == 1
    run = json.loads(out.read_text())["repetitions"][0]
    assert (run["answered"], run["output_tokens"], run["output_tokens_per_s"]) == (0, 0, 0)
    (failure,) = run["failures"]
    assert message in failure
    assert run["failures"][failure] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1", "--rate", "1"], "give one"),
        (["--popularity", "zipf"], "zipf:ALPHA"),
        (["--route", "generate"], "--prompt-file"),
        (["--route", "chat"], "completions or generate"),
        (["--url", "ftp://localhost"], "--url"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    stub: Stub, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", stub.url, *options]) == 2
    assert message in capsys.readouterr().err
    assert stub.asked == []


def test_the_generator_needs_no_torch() -> None:
    program = "import sys, lory_router.bench.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# -- figures ----------------------------------------------------------------------------------


def test_percentiles_are_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([7.0], 50) == 7.0


def test_a_failed_request_adds_no_latency() -> None:
    good = Outcome("a", 1.0, 0.0, usage=Usage(3, 2), token_times_s=(0.25, 0.75))
    bad = Outcome("a", 99.0, 0.0, failure="HTTP 500")
    figures = summarise([good, bad], wall_s=2.0)
    assert figures["latency_s"]["max"] == 1.0
    assert figures["tpot_s"]["p50"] == 0.5
    assert figures["output_tokens_per_s"] == 1.0


def test_medians_leave_out_what_some_run_lacks() -> None:
    runs = [{"x": 1.0, "y": None, "s": {"p": 3}}, {"x": 3.0, "y": 1.0, "s": {"p": 5}}]
    assert medians(runs) == {"x": 2.0, "s": {"p": 4.0}}


# -- replies ----------------------------------------------------------------------------------


def arrivals(*pieces: bytes) -> Exchange:
    return Exchange(0.0, 9.0, [(float(i), piece) for i, piece in enumerate(pieces)])


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_an_event_has_the_time_of_its_last_byte() -> None:
    """Chunks and reads are cut wherever they like, within an event and within a chunk's size."""
    raw = HEAD + b"7\r\ndata: 1\r\n2\r\n\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"
    cut = len(HEAD) + 14
    reply = read_reply(arrivals(HEAD[:20], raw[20:cut], raw[cut : cut + 6], raw[cut + 6 :]))
    assert list(reply.events()) == [(2.0, b"1"), (3.0, b"2")]


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"HTTP/1.1 200 OK\r\n",),
        (b"SSH-2.0\r\n\r\n",),
        (HEAD + b"5\r\nab",),
        (HEAD + b"2\r\nab\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",),
    ],
)
def test_what_is_no_whole_reply_is_refused(pieces: tuple[bytes, ...]) -> None:
    with pytest.raises(ReplyError):
        read_reply(arrivals(*pieces))


def test_a_key_goes_into_the_request_and_not_into_the_log() -> None:
    target = Target.of("https://example.org/prefix/", "secret-key")
    assert (target.port, target.tls is not None) == (443, True)
    assert b"POST /prefix/x HTTP/1.1" in target.post("/x", b"")
    assert b"Bearer secret-key" in target.post("/x", b"")
    assert "secret-key" not in repr(target)


# -- machine ----------------------------------------------------------------------------------


@pytest.mark.skipif(not machine.can_watch(), reason="no /proc on this system")
def test_work_of_a_process_tree_is_seen() -> None:
    spin = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}]); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while machine.tree_cpu_s(child.pid) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert machine.tree_cpu_s(child.pid) >= 0.3
        assert machine.tree_resident_bytes(child.pid) > 1 << 20
    finally:
        child.communicate(b"\n")


@pytest.mark.skipif(not machine.can_watch(), reason="no /proc on this system")
def test_the_listener_of_a_local_port_is_found(stub: Stub) -> None:
    port = Target.of(stub.url).port
    assert machine.listening_pid("127.0.0.1", port) == os.getpid()
    assert machine.listening_pid("192.0.2.1", port) == 0


def test_nothing_is_called_clean_where_nobody_can_say() -> None:
    shares = machine.CpuWatch(server_pid=0).stop()
    assert (shares.other_cores, shares.clean) == (None, None)
    assert machine.CpuShares(0.1, 1.0, 0.5).clean is False
    assert machine.CpuShares(0.1, 1.0, 0.1).clean is True
