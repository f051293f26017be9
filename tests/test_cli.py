"""The `lory` command, as typed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from lory_router import cli
from lory_router.chat import ChatOptions, Conversation, show_adapters, stream_answer
from lory_router.config import CommandError, ServeConfig, StartError
from lory_router.demo import DemoFiles, Sample, pasteable_lines
from lory_router.remote import connect


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """The configurations that `lory serve` ran with; nothing is really served."""
    from lory_router import serve

    seen: list[ServeConfig] = []

    def run(config: ServeConfig, **_: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(serve, "run", run)
    return seen


def invoke(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code and all output."""
    result = CliRunner().invoke(cli.app, list(arguments), env=environment)
    if isinstance(result.exception, CommandError):
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.output


def test_flags_become_the_configuration(served: list[ServeConfig]) -> None:
    code, _ = invoke(
        "serve", "--model", "org/base", "--port", "9", "--memory", "2GiB", "--quantize", "nf4",
        "--no-prefix-caching", "--double-quant", "--drain-timeout", "2.5",
    )  # fmt: skip
    assert code == 0
    (config,) = served
    assert config.model.model == "org/base"
    assert config.http.port == 9
    assert config.memory.memory == 2 * 1024**3
    assert config.model.double_quant
    assert not config.step.prefix_caching
    assert config.http.drain_timeout == 2.5


def test_variables_set_what_flags_do_not(served: list[ServeConfig]) -> None:
    environment = {
        "LORY_MODEL": "org/base",
        "LORY_PORT": "9",
        "LORY_MEMORY": "1GB",
        "LORY_PREFIX_CACHING": "false",
    }
    assert invoke("serve", "--port", "10", **environment)[0] == 0
    (config,) = served
    assert config.model.model == "org/base"
    assert config.http.port == 10
    assert config.memory.memory == 10**9
    assert not config.step.prefix_caching


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modle", "x"), "--model"),
        (("--model", "x", "--max-batch-row", "3"), "--max-batch-rows"),
        (("--model-id", "x"), "here it is --model"),
        (("--model", "x", "--max-concurrent-requests=3"), "here it is --max-queued"),
        (("--model", "x", "--port", "many"), "--port"),
        (("--model", "x", "--memory", "4G"), "512MiB"),
        (("--model", "x", "--quantize", "gptq"), "nf4"),
        (("--model", "x", "--port", "70000"), "at most 65535"),
        (("--model", "x", "stray"), "stray"),
        ((), "--model"),
    ],
)
def test_a_wrong_flag_exits_with_2_and_says_what_is_right(
    served: list[ServeConfig], arguments: tuple[str, ...], message: str
) -> None:
    code, output = invoke("serve", *arguments)
    assert code == 2
    assert message in output
    assert "Value error" not in output
    assert not served


@pytest.mark.parametrize(
    ("command", "name", "value", "fix"),
    [
        ("serve", "LORY_PORT", "abc", "'abc' is not a whole number; write it like 8080"),
        ("demo", "LORY_PORT", "abc", "'abc' is not a whole number; write it like 8080"),
        ("demo", "LORY_PRICE_PER_HOUR", "much", "'much' is not a number; write it like 2.5"),
        ("serve", "LORY_PREFIX_CACHING", "maybe", "'maybe'; write true or false"),
        ("serve", "LORY_MEMORY", "4G", "'4G' is not a size; write it like 512MiB"),
    ],
)
def test_a_wrong_variable_is_told_with_its_value_and_the_fix(
    served: list[ServeConfig], command: str, name: str, value: str, fix: str
) -> None:
    """A parser's own words named neither the value nor how to write it."""
    arguments = ("--model", "x") if command == "serve" else ()
    code, output = invoke(command, *arguments, **{name: value})
    assert code == 2
    assert name in output
    assert fix in output
    assert not served


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_an_unknown_variable_exits_with_2(served: list[ServeConfig], command: str) -> None:
    arguments = ("--model", "x") if command == "serve" else ()
    code, output = invoke(command, *arguments, LORY_MAX_BATCH_ROW="3")
    assert (code, output.endswith("did you mean LORY_MAX_BATCH_ROWS?")) == (2, True)
    assert not served


def test_every_renamed_flag_leads_to_one_that_exists() -> None:
    real = invoke("serve", "--help")[1]
    for old, new in cli.RENAMED.items():
        assert new in real
        assert f" {old} " not in real


def test_no_line_of_the_help_is_cut_off() -> None:
    assert "..." not in invoke("--help")[1].partition("Commands:")[2]


def run_lory(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lory_router", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_errors_are_one_line_on_stderr_from_a_shell() -> None:
    done = run_lory("serve", "--model", "./not-there")
    assert done.returncode == 2
    assert done.stderr == "error: --model: there is no folder ./not-there\n"
    assert done.stdout == ""


def test_help_and_version_start_without_the_heavy_parts() -> None:
    script = (
        "import sys; from lory_router import cli\n"
        "heavy = {'torch','transformers','rich','uvicorn','starlette','fastapi','httpx',"
        "'tokenizers','prometheus_client','lory_router.serve'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    start = time.monotonic()
    assert "serve" in run_lory("--help").stdout
    assert time.monotonic() - start < 3
    assert run_lory("--version").stdout.startswith("lory 0.")


def test_train_speaks_with_the_trainers_own_help() -> None:
    done = run_lory("train", "--help")
    assert done.returncode == 0
    assert "CONFIG" in done.stdout
    assert "--output" in done.stdout


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_of_a_training_spin_for_moments_unless_asked_to(
    given: dict[str, str], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before torch is loaded."""
    environment = given.copy()
    monkeypatch.setattr(os, "environ", environment)
    seen: list[dict[str, str]] = []

    def load(name: str) -> None:
        seen.append(environment.copy())
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(cli.importlib, "import_module", load)
    with pytest.raises(CommandError):
        cli.train(typer.Context(typer.main.get_command(cli.app)))
    assert seen == [found]


def test_training_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lory_trainer.cli", None)
    code, output = invoke("train", "run.yaml")
    assert code == 1
    assert "pip install '.[train]' in the checkout" in output


# -- a running server's commands ------------------------------------------------------------


REFUSALS = {
    "long": {"message": "too long", "code": "context_length_exceeded"},
    "plain": {"message": "this base has no chat template", "code": "invalid_value"},
}
"""What the fake server says to a chat with each of these adapters."""


CONTEXT_LEFT = 600
"""A longer answer is refused."""


class FakeServer(BaseHTTPRequestHandler):
    """Just enough of the front to be talked to."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012 - reset by the fixture
    asked_with: list[str | None] = []  # noqa: RUF012 - reset by the fixture
    """The keys of those who looked something up."""

    def do_GET(self) -> None:
        key = self.headers.get("authorization")
        if key == "Bearer wrong":
            self._reply("application/json", '{"error": {"message": "no such key"}}', 401)
            return
        self.asked_with.append(key)
        names = ("polite", "missing", "long", "plain")
        adapters: list[dict[str, Any]] = [
            {"id": name, "parent": "base", "tier": "device"} for name in names
        ]
        adapters[1]["fetching"] = {"bytes": 2**20, "total": 3 * 2**20, "seconds": 2.0}
        models = [{"id": "base"}, *adapters]
        self._reply("application/json", json.dumps({"data": models}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body | {"path": self.path, "key": self.headers.get("authorization")})
        wanted = body.get("max_tokens") or body.get("parameters", {}).get("max_new_tokens")
        if (wanted or 0) > CONTEXT_LEFT:
            self._reply("application/json", json.dumps({"error": self._too_long(wanted)}), 400)
        elif body.get("model") == "missing":
            self._reply("application/json", '{"error": {"message": "no such model"}}', 404)
        elif body.get("model") in REFUSALS:
            self._reply("application/json", json.dumps({"error": REFUSALS[body["model"]]}), 400)
        elif self.path == "/generate_stream":
            events = [{"token": {"text": t, "special": t == "</s>"}} for t in ("He", "y", "</s>")]
            self._stream(events)
        elif body.get("model") == "dies":
            self._stream([_delta("a"), {"error": {"message": "the engine ended"}}])
        else:
            self._stream([_delta(None), _delta("Good "), _delta("day"), {"choices": []}])

    def _too_long(self, wanted: int) -> Any:
        name = "max_new_tokens" if self.path == "/generate_stream" else "max_tokens"
        message = f"prompt tokens + `{name}` must be <= 99. Given: 9 prompt tokens and {wanted}"
        if name == "max_new_tokens":
            return f"Input validation error: {message}"
        return {"message": message, "code": "context_length_exceeded"}

    def _stream(self, events: list[dict[str, Any]]) -> None:
        lines = [": hello", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
        self._reply("text/event-stream", "\n\n".join(lines) + "\n\n")

    def _reply(self, kind: str, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        return


def _delta(text: str | None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


@contextmanager
def fake_server() -> Iterator[str]:
    FakeServer.asked, FakeServer.asked_with = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answer(url: str, options: ChatOptions, key: str = "") -> str:
    with connect(url, key) as client:
        return "".join(stream_answer(client, options, [{"role": "user", "content": "hi"}]))


def test_chat_streams_an_answer_and_sends_the_key() -> None:
    with fake_server() as url:
        assert answer(url, ChatOptions("polite", max_tokens=9), "k") == "Good day"
        (asked,) = FakeServer.asked
    assert asked["model"] == "polite"
    assert asked["max_tokens"] == 9
    assert asked["key"] == "Bearer k"


def test_plain_chat_continues_text_without_special_tokens() -> None:
    with fake_server() as url:
        assert answer(url, ChatOptions("polite", temperature=0.0, is_plain=True)) == "Hey"
        (asked,) = FakeServer.asked
    assert asked["inputs"] == "hi"
    assert asked["parameters"] == {"max_new_tokens": 512, "adapter_id": "polite"}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("missing", "404: no such model"),
        ("dies", "the engine ended"),
        ("long", "too long; /clear forgets"),
        ("plain", "no chat template; with --plain"),
    ],
)
def test_chat_says_what_the_server_said(adapter: str, message: str) -> None:
    with fake_server() as url, pytest.raises(CommandError, match=message):
        answer(url, ChatOptions(adapter))


def test_a_chat_session_remembers_switches_and_forgets() -> None:
    lines = "hello\n/adapter polite\nagain\n/clear\nonce\n/adapters\n/help\n/exit\nnever\n"
    with fake_server() as url:
        result = CliRunner().invoke(
            cli.app, ["chat", "--url", url, "--system", "Be kind"], input=lines
        )
        asked = list(FakeServer.asked)
    assert result.exit_code == 0, result.output
    assert [one["model"] for one in asked] == ["", "polite", "polite"]
    assert [len(one["messages"]) for one in asked] == [2, 4, 2]
    assert asked[1]["messages"][2] == {"role": "assistant", "content": "Good day"}
    assert "device" in result.output


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate_stream"])
def test_an_answer_takes_what_is_left_of_the_context_unless_told(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The second question of a chat was refused: 512 tokens more than fitted."""
    options = ChatOptions("polite", is_plain=path == "/generate_stream")
    monkeypatch.setitem(globals(), "CONTEXT_LEFT", 99)
    with fake_server() as url:
        assert answer(url, options)
        assert [one["path"] for one in FakeServer.asked] == [path, path]
        assert "max_tokens" not in FakeServer.asked[1]
        assert "max_new_tokens" not in FakeServer.asked[1].get("parameters", {})
        with pytest.raises(CommandError, match="prompt tokens"):
            answer(url, dataclasses.replace(options, max_tokens=100))


def test_an_unknown_command_is_not_asked() -> None:
    with fake_server() as url:
        result = CliRunner().invoke(cli.app, ["chat", "--url", url], input="/adaptr polite\n")
        assert not FakeServer.asked
    assert "no such command: /adaptr" in result.output
    assert "/adapter NAME" in result.output


@pytest.mark.parametrize(("adapter", "code"), [("polite", 0), ("missing", 1)])
def test_a_failure_that_nobody_sees_is_in_the_exit_code(adapter: str, code: int) -> None:
    with fake_server() as url:
        arguments = ["chat", adapter, "--url", url]
        result = CliRunner().invoke(cli.app, arguments, input="a\n")
    assert result.exit_code == code


def test_a_chat_with_nobody_opens_no_prompt() -> None:
    code, output = invoke("chat", "--url", "http://127.0.0.1:9")
    assert (code, "no server answers" in output) == (1, True)
    with fake_server() as url:
        code, output = invoke("chat", "--url", url, "--api-key", "wrong")
    assert (code, output) == (
        1,
        "401: no such key; here by --api-key or LORY_API_KEY",
    )


def test_of_a_servers_keys_the_first_is_sent() -> None:
    """The variable is the server's list, too; all of it was sent as one key."""
    with fake_server() as url:
        for command in ("adapters", "bench"):
            invoke(command, "--url", url, LORY_API_KEY="k1, k2")
        assert set(FakeServer.asked_with) == {"Bearer k1"}


def test_a_failed_question_is_not_remembered() -> None:
    with fake_server() as url:
        result = CliRunner().invoke(
            cli.app, ["chat", "missing", "--url", url], input="a\n/adapter\nb\n"
        )
        assert "no such model" in result.output
        assert len(FakeServer.asked[1]["messages"]) == 1


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("polit", "did you mean polite?"), ("zzz", "lory adapters lists"), ("base:zzz", "is served")],
)
def test_an_adapter_that_is_not_served_fails_before_the_first_question(
    adapter: str, message: str
) -> None:
    with fake_server() as url:
        code, output = invoke("chat", adapter, "--url", url)
        assert (code, message in output) == (1, True), output
        result = CliRunner().invoke(
            cli.app, ["chat", "polite", "--url", url], input=f"/adapter {adapter}\nhi\n"
        )
        assert message in result.output
        assert [one["model"] for one in FakeServer.asked] == ["polite"]


def test_a_revision_can_be_talked_to_though_it_is_not_listed() -> None:
    with fake_server() as url:
        arguments = ["chat", "polite@1f3a9c", "--url", url]
        result = CliRunner().invoke(cli.app, arguments, input="hi\n")
    assert result.exit_code == 0
    assert [one["model"] for one in FakeServer.asked] == ["polite@1f3a9c"]


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit"])
def test_a_chat_is_left_by_a_word(word: str) -> None:
    with fake_server() as url:
        result = CliRunner().invoke(
            cli.app, ["chat", "--url", url], input=f"{word} is a word\n{word}\nnever\n"
        )
    assert len(FakeServer.asked) == word.isalpha()
    assert result.exit_code == (not word.isalpha())
    assert "never" not in str(FakeServer.asked)


def test_an_adapter_answers_greedily_and_the_base_does_not() -> None:
    with fake_server() as url:
        for options in (ChatOptions("polite"), ChatOptions(), ChatOptions("polite", "", 9, 0.5)):
            answer(url, options)
    assert [one["temperature"] for one in FakeServer.asked] == [0.0, 0.7, 0.5]


def test_a_server_may_be_named_without_its_scheme() -> None:
    with fake_server() as url:
        code, output = invoke("adapters", "--url", url.removeprefix("http://"))
    assert code == 0
    assert "polite" in output


def test_a_conversation_starts_with_its_system_message() -> None:
    conversation = Conversation("Be kind")
    conversation.add("user", "hi")
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be kind"}]


def test_adapters_are_shown_with_their_tier() -> None:
    console = Console(file=StringIO(), width=80)
    with fake_server() as url:
        show_adapters(url, "", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "polite" in text
    assert "device" in text
    assert "missing: fetching, 1.0 of 3.0 MiB in 2 s" in text


def test_adapters_are_told_as_json_too() -> None:
    with fake_server() as url:
        code, output = invoke("adapters", "--json", "--url", url)
    assert code == 0
    polite = json.loads(output)[1]
    assert polite == {"id": "polite", "parent": "base", "tier": "device"}


@pytest.mark.parametrize("command", ["adapters", "bench"])
def test_no_server_is_one_line_with_the_way_out(command: str) -> None:
    code, output = invoke(command, "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "start one with lory serve" in output


def test_an_interrupt_while_the_command_is_imported_is_no_traceback() -> None:
    script = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "runpy.run_module('lory_router', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


# -- the demo -------------------------------------------------------------------------------


def test_the_demos_commands_can_be_pasted() -> None:
    sample = Sample("polite", 'it\'s "late"\n', "Good evening")
    lines = pasteable_lines("http://127.0.0.1:8080", sample).splitlines()
    curl = subprocess.run(
        ["bash", "-c", lines[1].replace("curl -s", "printf '%s\\n'")],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert json.loads(curl[-1]) == sample.body
    python = subprocess.run(
        ["bash", "-c", lines[3].replace(f"{sys.executable} -c", "printf '%s'")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    compile(python, "pasted", "exec")
    assert repr(sample.inputs) in python


def test_the_python_line_is_plain_to_read_where_quotes_allow() -> None:
    """It was a thicket of '"'"'."""
    line = pasteable_lines("http://127.0.0.1:8080", Sample("polite", "I'm late", "x")).splitlines()[
        3
    ]
    assert line.count('"') > 2
    line = pasteable_lines("http://127.0.0.1:8080", Sample("polite", "late", "x")).splitlines()[3]
    assert line.count('"') == 2
    assert "generate('late', adapter_id='polite'" in line


def test_the_readme_shows_the_line_that_the_demo_prints() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    printed = pasteable_lines("http://127.0.0.1:8080", DemoFiles.find().shown)
    assert printed.splitlines()[1].strip() in text.replace(" \\\n  ", " ")


def test_the_demo_says_where_lory_is_if_the_shell_would_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lory").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    told = f"The lory command is {tmp_path / 'lory'}"
    sample = Sample("polite", "x", "y")
    monkeypatch.setenv("PATH", "/nowhere")
    assert told in pasteable_lines("http://127.0.0.1:8080", sample)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told not in pasteable_lines("http://127.0.0.1:8080", sample)


def test_the_demo_takes_its_settings_from_flags_and_variables(served: list[ServeConfig]) -> None:
    assert invoke("demo", LORY_PORT="9", LORY_HOST="::1", LORY_PRICE_PER_HOUR="2.5")[0] == 0
    assert invoke("demo", "--price-per-hour", "3", "--check")[0] == 0
    first, second = served
    assert (first.http.host, first.http.port) == ("::1", 9)
    assert (first.metrics.price_per_hour, second.metrics.price_per_hour) == (2.5, 3.0)
    assert invoke("demo", "--check")[0] == 0
    assert served[2].metrics.price_per_hour == 1.0
    assert (second.http.host, second.http.port) == ("127.0.0.1", 0)


def test_the_demo_takes_uploads_from_this_machine_alone(served: list[ServeConfig]) -> None:
    assert invoke("demo")[0] == 0
    assert invoke("demo", "--host", "0.0.0.0")[0] == 0
    here, everywhere = (config.sources for config in served)
    assert (here.adapter_uploads, here.adapter_offline) == (True, True)
    assert not everywhere.adapter_uploads
    assert not everywhere.adapter_cache


def test_the_demo_refuses_variables_it_does_not_take(served: list[ServeConfig]) -> None:
    code, output = invoke("demo", LORY_QUANTIZE="nf4")
    assert (code, "LORY_QUANTIZE: lory demo does not take it" in output) == (2, True)
    assert not served


def test_a_demo_without_its_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="run in a checkout"):
        DemoFiles.find(tmp_path / "none")


@pytest.mark.parametrize("text", ["[]", "{}", "nothing", '[{"adapter_id": "a"}]', "[3]", "3"])
def test_a_demo_whose_prompts_are_wrong_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(StartError, match=r"prompts\.json"):
        DemoFiles.find(tmp_path, tmp_path, path)


def test_a_demo_adapter_without_a_prompt_is_found(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "polite").mkdir(parents=True)
    (tmp_path / "adapters" / "shout").mkdir()
    path = tmp_path / "prompts.json"
    rows = [{"adapter_id": name, "inputs": "x", "expected": "y"} for name in (None, "polite")]
    path.write_text(json.dumps(rows))
    with pytest.raises(StartError, match="no prompt for the adapter shout"):
        DemoFiles.find(tmp_path, tmp_path / "adapters", path)
    (tmp_path / "adapters" / "shout").rmdir()
    files = DemoFiles.find(tmp_path, tmp_path / "adapters", path)
    assert files.shown.adapter_id == "polite"
    assert "adapter_id" not in files.samples[0].body["parameters"]


def test_the_check_compares_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from lory_router import demo

    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"generated_text": json.loads(request.content)["inputs"]})

    real = httpx.AsyncClient

    def client(**options: Any) -> httpx.AsyncClient:
        return real(transport=httpx.MockTransport(reply), **options)

    monkeypatch.setattr(demo.httpx, "AsyncClient", client)
    right, wrong = Sample("a", "x", "x"), Sample("b", "x", "x ")
    assert asyncio.run(demo.check_answers("http://demo", (right,))) == 0
    assert asyncio.run(demo.check_answers("http://demo", (right, wrong))) == 1
