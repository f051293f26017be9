"""`lory eval` as a command: exit codes, files, gates and what they publish."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval_world import Oracle, make_front, write_rows
from lory_router.cli import app
from lory_router.names import Target
from lory_router.registry import Registry
from scripted_engine import REVISION, Front


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with closing(Registry()) as registry:
        yield registry


@pytest.fixture(scope="module")
def front(registry: Registry) -> Front:
    engine = make_front().engine
    assert isinstance(engine, Oracle)
    return Front(engine=engine, registry=registry, api_keys=("secret",))


@pytest.fixture(scope="module")
def url(front: Front) -> Iterator[str]:
    with front.served() as url:
        yield url


def lory_eval(url: str, *flags: str, key: str = "secret"):
    where = ["eval", "--url", url, "--api-key", key]
    return CliRunner().invoke(app, [*where, *flags], env={"COLUMNS": "160"})


def test_a_good_adapter_is_shown_written_and_let_through(url, tmp_path):
    report, page = tmp_path / "out" / "report.json", tmp_path / "out" / "page.html"
    done = lory_eval(
        url,
        write_rows(tmp_path),
        *("--adapter", "loud", "--metric", "exact_match", "--metric", "rouge_l"),
        *("--gate", "exact_match >= 0.75", "--gate", "exact_match > base"),
        *("--output", str(report), "--page", str(page), "--price-per-hour", "2"),
    )
    assert done.exit_code == 0, done.output
    assert "75.0%" in done.output
    assert "gate holds: exact_match > base" in done.output
    told = json.loads(report.read_text())
    assert told["variants"][0]["scores"]["exact_match"]["value"] == 0.75
    assert [gate["holds"] for gate in told["gates"]] == [True, True]
    assert told["rows"][2]["answers"] == {"loud": "quiet", "base": "quiet"}
    assert page.read_text().startswith("<!doctype html>")


def test_a_gate_that_fails_is_exit_code_3_and_publishes_nothing(url, tmp_path, registry):
    report = tmp_path / "report.json"
    done = lory_eval(
        url,
        write_rows(tmp_path),
        *("--adapter", "loud", "--gate", "exact_match >= 0.9", "--publish", "loud@best"),
        *("--output", str(report)),
    )
    assert done.exit_code == 3
    assert "gate FAILS" in done.output
    assert json.loads(report.read_text())["gates"][0]["holds"] is False
    assert "loud@best" not in registry.state.names


@pytest.mark.parametrize(
    "gate",
    [
        "exact_mach >= 0.9",
        "exact_match > nobody",
        "cost_per_correct < 1",
        "exact_match > 2nd",
        "perplexity < base",
    ],
)
def test_a_gate_that_cannot_be_looked_at_costs_no_answers(url, tmp_path, front, registry, gate):
    num_asked = len(front.engine.prompts)
    flags = ("--adapter", "loud", "--gate", gate, "--publish", "loud@best")
    done = lory_eval(url, write_rows(tmp_path), *flags)
    assert (done.exit_code, "error: gate: " in done.output) == (1, True)
    assert len(front.engine.prompts) == num_asked
    assert "loud@best" not in registry.state.names


def test_nothing_is_published_whose_report_cannot_be_written(url, tmp_path, registry):
    flags = ("--adapter", "loud", "--publish", "loud@best", "--output", "/dev/null/x")
    assert lory_eval(url, write_rows(tmp_path), *flags).exit_code == 1
    assert "loud@best" not in registry.state.names


ENOUGH = ("a", "b", "c", "d", "e", "f")


def test_what_is_not_better_is_not_published_and_what_is_is(url, tmp_path, registry):
    data = write_rows(tmp_path, ENOUGH)
    assert lory_eval(url, data, "--adapter", "meek", "--publish", "meek@live").exit_code == 3
    assert "meek@live" not in registry.state.names
    done = lory_eval(url, data, "--adapter", "loud", "--publish", "loud@live")
    assert done.exit_code == 0, done.output
    assert registry.state.names["loud@live"] == Target("loud", REVISION)


def test_scores_are_recorded_beside_what_the_manifest_said(url, tmp_path, monkeypatch):
    monkeypatch.setattr("lory_trainer.evaluation.cli.serving", lambda *_: nullcontext(url))
    (tmp_path / "loud").mkdir()
    manifest = tmp_path / "loud" / "adapter_manifest.json"
    manifest.write_text(json.dumps({"template": "{text}", "scores": "old"}))
    flags = ("--adapter", "loud", "--base", "b", "--adapters", str(tmp_path), "--record")
    done = lory_eval(url, write_rows(tmp_path), *flags, "--gate", "exact_match > base")
    assert done.exit_code == 0, done.output
    told = json.loads(manifest.read_text())
    assert told["template"] == "{text}"
    assert told["scores"]["variants"]["loud"]["exact_match"]["value"] == 0.75
    assert told["scores"]["variants"]["base"]["exact_match"]["value"] == 0
    assert told["scores"]["gates"] == [{"condition": "exact_match > base", "holds": True}]
    assert (told["scores"]["data"]["rows"], told["scores"]["candidate"]) == (4, "loud")
    assert [path.name for path in (tmp_path / "loud").iterdir()] == [manifest.name]
    manifest.unlink()
    done = lory_eval(url, write_rows(tmp_path), *flags)
    assert (done.exit_code, "--record: " in done.output) == (1, True)


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_what_is_better_by_chance_is_not_published(url, tmp_path, registry, num_rows):
    data = write_rows(tmp_path, ENOUGH[:num_rows])
    done = lory_eval(url, data, "--adapter", "loud", "--publish", "loud@few")
    assert done.exit_code == 3
    assert f"{num_rows} rows won, 0 lost, p " in done.output
    assert "loud@few" not in registry.state.names
    gate = ("--gate", "exact_match > base")
    done = lory_eval(url, data, "--adapter", "loud", "--publish", "loud@few", *gate)
    assert done.exit_code == 0, done.output
    assert registry.state.names["loud@few"] == Target("loud", REVISION)
    asyncio.run(registry.forget("loud@few"))


def test_a_judge_that_fails_costs_no_answers_and_publishes_nothing(url, tmp_path, registry):
    report = tmp_path / "report.json"
    done = lory_eval(
        url,
        write_rows(tmp_path, ENOUGH),
        *("--adapter", "loud", "--publish", "loud@judged", "--output", str(report)),
        *("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "wise"),
    )
    assert done.exit_code == 1
    assert "error: the judge: no answer from http://127.0.0.1:9:" in done.output
    told = json.loads(report.read_text())
    assert (len(told["rows"]), told["judged"]) == (6, [])
    assert "0 of 6 rows" in told["judge_error"]
    assert "loud@judged" not in registry.state.names


def test_compare_asks_two_adapters_and_nobody_else(url, tmp_path):
    report = tmp_path / "report.json"
    flags = ("--compare", "loud", "meek", "--output", str(report))
    assert lory_eval(url, write_rows(tmp_path), *flags).exit_code == 0
    told = json.loads(report.read_text())
    assert [variant["name"] for variant in told["variants"]] == ["loud", "meek"]


@pytest.mark.parametrize(
    ("flags", "key", "says"),
    [
        (("--adapter", "loud"), "wrong", "--api-key"),
        (("--adapter", "nobody"), "secret", "no adapter 'nobody'"),
        (("--adapter", "loud", "--gate", "good"), "secret", "FIGURE SIGN NUMBER"),
        (("--adapter", "loud", "--base", "x"), "secret", "--base and --adapters"),
        (("--adapter", "loud", "--serve-flags", "x"), "secret", "--serve-flags"),
        (("--adapter", "loud", "--record"), "secret", "--record needs the folder"),
        (("--adapter", "loud", "--output", "/dev/null/x"), "secret", "cannot be written"),
        (("--compare", "loud", "meek", "--against", "nobody"), "secret", "compare"),
        (("--compare", "loud", "loud"), "secret", "two revisions of one"),
        (("--compare", "loud", "meek", "--adapter", "x"), "secret", "leave --adapter out"),
        (("--adapter", "loud", "--publish", "loud"), "secret", "name@alias"),
        (("--adapter", "loud", "--publish", "@best"), "secret", "name@alias"),
        (("--adapter", "loud", "--shots", "2"), "secret", "--against prompt_only"),
        (("--adapter", "loud", "--instruction", "Up"), "secret", "--against prompt_only"),
        (("--adapter", "loud", "--template", "{text}"), "secret", "leave --template out"),
    ],
)
def test_what_went_wrong_is_one_message_and_exit_code_1(url, tmp_path, flags, key, says):
    done = lory_eval(url, write_rows(tmp_path), *flags, key=key)
    assert done.exit_code == 1
    assert says in done.output
    assert "Traceback" not in done.output


def test_no_server_is_told_with_its_address(tmp_path):
    done = lory_eval("http://127.0.0.1:9", write_rows(tmp_path), "--adapter", "loud")
    assert done.exit_code == 1
    assert "no answer from http://127.0.0.1:9" in done.output


def test_everything_can_come_from_a_file(url, tmp_path):
    write_rows(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        "adapter_id: loud\nevaluation:\n  data: rows.jsonl\n  gate: {exact_match: '> base'}\n"
    )
    done = lory_eval(url, "--config", str(config))
    assert done.exit_code == 0, done.output
    assert "gate holds" in done.output


def test_help_names_every_flag():
    done = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for flag in (
        "--url",
        "--server",
        "--api-key",
        "--gate",
        "--publish",
        "--judge-url",
        "--compare",
    ):
        assert flag in done.output


def test_evaluation_needs_no_torch():
    import subprocess
    import sys

    program = (
        "import sys, lory_trainer.evaluation.cli\n"
        "assert not {'torch', 'transformers', 'lory_router', 'lory_server'} & {*sys.modules}\n"
    )
    paths = str(Path(__file__).parents[1] / "trainer")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
