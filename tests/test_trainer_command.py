"""The command: what it says, how it ends, what it writes beside the adapter."""

import json
import os
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from lory_trainer import cli, publish, trackers, train
from lory_trainer.config import TrackingOptions, load_options, parse_options
from lory_trainer.curve import HELD_OUT, NORM, SMOOTHED, TRAINED, draw, series
from lory_trainer.dry_run import forecast, resolved
from lory_trainer.errors import ConfigError, PublishError
from lory_trainer.events import Event, EventLog, read_events
from lory_trainer.memory import GIB, num_weight_bytes
from trainer_world import CONFIG, events, make_world, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    make_world(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lory_train(*arguments: str, answers: str | None = None) -> Any:
    app = typer.Typer()
    app.command()(cli.train)
    return CliRunner().invoke(app, [*arguments], input=answers)


def test_a_run_leaves_an_adapter_events_and_a_curve(world):
    done = lory_train("mine.yaml")
    assert done.exit_code == 0, done.output
    assert (world / "adapters" / "mine" / "adapter_config.json").exists()
    assert {path.name for path in (world / "runs" / "mine").iterdir()} == {
        "events.jsonl",
        "curve.png",
    }
    finished = events(world)[-1]
    assert (finished["type"], finished["adapter_id"]) == ("finished", "mine")
    assert finished["tokens"] == 4 * 8 * 6


def test_the_command_line_goes_before_the_file(world):
    write_rows(world / "other.jsonl", {"text": "a", "completion": "b"})
    (world / "mine.yaml").write_text(CONFIG + "output: there/written\nname: helper\n")
    done = lory_train("mine.yaml", "--dataset", "other.jsonl", "--run", "here")
    assert done.exit_code == 0, done.output
    manifest = json.loads((world / "there/written/adapter_manifest.json").read_text())
    assert (manifest["name"], manifest["data"]["rows"]) == ("helper", 1)
    assert (world / "here" / "events.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_the_same_command_goes_on(world, monkeypatch, number):
    real = EventLog.say

    def say(self: EventLog, kind: Any, **fields: Any) -> None:
        real(self, kind, **fields)
        if kind == "step" and fields["step"] == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(EventLog, "say", say)
    stopped = lory_train("mine.yaml")
    assert stopped.exit_code == 130
    assert "stopped at step 3 of 8, after a checkpoint; go on with --resume" in stopped.output
    assert not (world / "adapters").exists()
    last = events(world)[-1]
    assert (last["code"], last["checkpoint"]) == ("stopped", "checkpoints/step-00000003")
    monkeypatch.setattr(EventLog, "say", real)
    assert lory_train("mine.yaml", "--resume").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_does_not_wait(world, monkeypatch):
    real = EventLog.say

    def say(self: EventLog, kind: Any, **fields: Any) -> None:
        real(self, kind, **fields)
        if kind == "step":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EventLog, "say", say)
    assert lory_train("mine.yaml").exit_code == 130
    assert events(world)[-1]["checkpoint"] is None


def test_a_failure_is_told_on_the_terminal_and_in_the_events(world):
    (world / "mine.yaml").write_text(CONFIG.replace("r: 4", "r: 4, target_modules: [nothing]"))
    done = lory_train("mine.yaml")
    assert done.exit_code == 1
    assert "error: lora.target_modules: " in done.output
    last = events(world)[-1]
    assert (last["type"], last["code"]) == ("failed", "config")
    assert last["error"].startswith("lora.target_modules")


def test_no_configuration_is_a_message(world):
    done = lory_train()
    assert (done.exit_code, "CONFIG is missing" in done.output) == (1, True)


# -- dry run and init ----------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_writes_nothing(world):
    before = sorted(world.rglob("*"))
    done = lory_train("mine.yaml", "--dry-run", "--price-per-hour", "2")
    assert done.exit_code == 0, done.output
    assert sorted(world.rglob("*")) == before
    for text in (
        "learning_rate: 0.02",
        "example 3",
        "<eos>",
        "8, each of 4 x 1 rows",
        "example 1: >>> is learned <<<",
        ">>>y <eos><<<",
        "warning: 8 rows",
        "192 read, 64 learned",
        "activations",
        "at 2 an hour",
        "8 rows: under 50",
    ):
        assert text in done.output


@pytest.mark.parametrize(
    "more", ["", "quantization: {bits: 4}\n", "batch_size: auto\n", "warmup_steps: 1\n"]
)
def test_what_a_dry_run_resolves_is_a_configuration_of_the_same_run(world, more):
    text = CONFIG.replace("batch_size: 4\n", "") if "batch" in more else CONFIG
    settled = forecast(parse_options(text + more), world).options
    again = parse_options(yaml.safe_dump(resolved(settled)))
    assert forecast(again, world).options == again
    assert again.model_dump() | {"lora": None} == settled.model_dump() | {"lora": None}


def test_a_forecast_counts_what_the_run_will_do(world):
    found = forecast(load_options(world / "mine.yaml"), world)
    assert lory_train("mine.yaml").exit_code == 0
    [started], finished = events(world, "started"), events(world)[-1]
    assert len(found.steps) == started["num_steps"]
    assert found.num_trainable == started["num_trainable"]
    assert found.num_parameters == started["num_parameters"]
    assert (found.num_tokens, found.num_learned) == (
        finished["tokens"],
        finished["learned_tokens"],
    )


@pytest.mark.parametrize("lora", ["{r: 4, use_dora: true}", "{r: 4, init: orthogonal}"])
def test_a_forecast_needs_no_weights(world, monkeypatch, lora):
    text = CONFIG.replace("{r: 4, dtype: float32}", lora) + "quantization: {bits: 4}\n"
    (world / "tiny" / "model.safetensors").unlink()
    found = forecast(parse_options(text), world)
    assert found.num_trainable > 0
    assert found.memory.weights < 4 * found.num_parameters / 3


def test_a_dry_run_says_what_the_run_would_say(world):
    more = "logging_steps: 5\noptimizer: paged_adamw\nearly_stop: 2\neval_data: rows.jsonl\n"
    (world / "mine.yaml").write_text(CONFIG + more)
    done = lory_train("mine.yaml", "--dry-run")
    said = [event["text"] for event in _events_of_a_run(world)]
    assert said[0] == "logging_steps: has no effect here: every step is told"
    assert "a CPU pages nothing: adamw it is" in said
    for text in said:
        assert text in done.output


def _events_of_a_run(world: Path) -> list[Event]:
    """Up to the first step."""
    lory_train("mine.yaml", "--replace")
    kinds = [event["type"] for event in read_events(world / "runs" / "mine")]
    told = read_events(world / "runs" / "mine")[: kinds.index("step")]
    return [event for event in told if event["type"] == "message"]


def test_colours_take_the_place_of_marks(world):
    from lory_trainer.dry_run import show

    shown = StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", width=80)
    show(forecast(load_options(world / "mine.yaml"), world), console, 0.0)
    assert "grey is read, green is learned" in shown.getvalue()
    assert ">>>" not in shown.getvalue()
    plain = StringIO()
    console = Console(file=plain, force_terminal=True, no_color=True, width=80)
    show(forecast(load_options(world / "mine.yaml"), world), console, 0.0)
    assert ">>> is learned <<<" in plain.getvalue()


def test_the_mask_is_drawn_over_the_very_tokens(world):
    from lory_trainer.dry_run import _masked

    found = forecast(load_options(world / "mine.yaml"), world)
    text = _masked(found.data.examples[0], found.data.encoder.tokenizer)  # type: ignore[arg-type]
    assert [(text.plain[s.start : s.end].replace(" ", ""), str(s.style)) for s in text.spans] == [
        ("<bos>ay>", "bright_black"),
        ("y<eos>", "green"),
    ]


def test_init_writes_a_file_that_trains(world):
    answers = "tiny\nrows.jsonl\nsftt\nsft\nn\n4\n2\n64\n"
    done = lory_train("new.yaml", "--init", answers=answers)
    assert done.exit_code == 0, done.output
    options = load_options(world / "new.yaml")
    assert (options.base, options.template, options.lora.r) == ("tiny", "{text}", 4)
    assert yaml.safe_load((world / "new.yaml").read_text())["completion"] == "completion"
    assert lory_train("new.yaml").exit_code == 0
    assert "exists; give another name" in lory_train("new.yaml", "--init").output


def test_init_asks_for_the_prompt_where_the_columns_do_not_say_it(world):
    write_rows(world / "odd.jsonl", {"ticket": "a", "label": "b"})
    answers = "tiny\nodd.jsonl\nsft\nlabel\n{ticket} ->\ny\n4\n2\n64\n"
    done = lory_train("odd.yaml", "--init", answers=answers)
    assert done.exit_code == 0, done.output
    options = load_options(world / "odd.yaml")
    assert (options.template, options.completion) == ("{ticket} ->", "label")
    assert options.quantization.bits == 4


WRONG_THEN_RIGHT = (
    ("nowhere", "there is no folder nowhere"),
    ("adapters", "holds no config.json"),
    ("tiny", ""),
    ("none.jsonl", "there is no file or folder none.jsonl"),
    ("bad.jsonl", "bad.jsonl line 1: not JSON"),
    ("odd.jsonl", ""),
    ("stf", "none of: sft, dpo, pretrain"),
    ("sft", ""),
    ("lable", "there is no column 'lable'"),
    ("label", ""),
    ("{label} ->", "no column 'label' to ask by"),
    ("{ticket", "template: "),
    ("ticket", "names no column"),
    ("{ticket}\\n ->", ""),
    ("perhaps", "invalid input"),
    ("n", ""),
    ("many", "'many' is no whole number from 1 up to 256"),
    ("300", "'300' is no whole number"),
    ("8", ""),
    ("0", "'0' is no whole number"),
    ("2", ""),
    ("64", ""),
)


def test_init_asks_again_and_loses_no_answer(world):
    (world / "adapters").mkdir()
    (world / "bad.jsonl").write_text("{")
    write_rows(world / "odd.jsonl", {"ticket": "a", "label": "b"})
    answers = "".join(f"{answer}\n" for answer, _ in WRONG_THEN_RIGHT)
    done = lory_train("odd.yaml", "--init", answers=answers)
    assert done.exit_code == 0, done.output
    for _, complaint in WRONG_THEN_RIGHT:
        assert complaint in done.output
    options = load_options(world / "odd.yaml")
    assert (options.template, options.lora.r, options.epochs) == ("{ticket}\n ->", 8, 2)
    assert lory_train("odd.yaml").exit_code == 0


def test_init_writes_nothing_when_it_is_broken_off(world):
    done = lory_train("new.yaml", "--init", answers="tiny\nrows.jsonl\n")
    assert done.exit_code == 1
    assert not (world / "new.yaml").exists()


def test_init_finds_what_is_typed_from_here_and_names_it_from_the_file(world):
    write_rows(world / "it's: #1.jsonl", {"prompt": "a", "chosen": "y", "rejected": "z"})
    answers = "tiny\nit's: #1.jsonl\ndpo\nn\n4\n2\n64\n"
    done = lory_train("conf/pairs.yaml", "--init", answers=answers)
    assert done.exit_code == 0, done.output
    options = load_options(world / "conf" / "pairs.yaml")
    assert (options.base, options.data) == ("../tiny", "../it's: #1.jsonl")
    assert (options.method, options.dpo.sft_weight, options.template) == ("dpo", 1, "{prompt}")
    assert lory_train("conf/pairs.yaml").exit_code == 0


def test_init_of_instructions_writes_their_words_as_lines(world):
    write_rows(world / "alpaca.jsonl", {"instruction": "a", "input": "b", "output": "c"})
    done = lory_train("a.yaml", "--init", answers="tiny\nalpaca.jsonl\nsft\nn\n4\n2\n256\n")
    assert done.exit_code == 0, done.output
    assert "\n  ### Instruction:\n  {instruction}\n\n  ### Input:" in (world / "a.yaml").read_text()
    template = load_options(world / "a.yaml").template
    assert template is not None
    assert template.endswith("### Response:\n")


# -- memory --------------------------------------------------------------------------------------


def test_weights_are_counted_as_the_papers_count_them():
    billion = 10**9
    assert num_weight_bytes(billion, billion, None, 4) == 4 * billion
    assert num_weight_bytes(billion, billion, None, 2) == 2 * billion
    assert num_weight_bytes(billion, billion, 8, 2) == billion
    assert num_weight_bytes(65 * billion, 64 * billion, 4, 2) < 48 * GIB
    assert num_weight_bytes(7 * billion, 6 * billion, 4, 2) < 15 * GIB / 2


def test_the_estimate_of_weights_is_what_they_take(world):
    found = forecast(load_options(world / "mine.yaml"), world)
    size = (world / "tiny" / "model.safetensors").stat().st_size
    assert found.memory.weights == pytest.approx(size, rel=0.05)
    assert found.memory.adapter == 4 * found.num_trainable
    assert found.memory.optimizer == 8 * found.num_trainable
    longer = forecast(parse_options(CONFIG + "eval_batch_size: 1\n"), world)
    assert longer.memory.activations == found.memory.activations > 0


# -- curve and trackers --------------------------------------------------------------------------


def test_a_curve_is_a_picture_of_every_step(world):
    """Blue, light blue and orange above, green below: all that is told is drawn."""
    from matplotlib.image import imread

    write_rows(world / "held.jsonl", {"text": "ab", "completion": "y"})
    (world / "mine.yaml").write_text(CONFIG + "eval_data: held.jsonl\n")
    assert lory_train("mine.yaml").exit_code == 0
    picture = world / "runs" / "mine" / "curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape == (500, 760, 3)
    for colour in (TRAINED, SMOOTHED, HELD_OUT, NORM):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).any(), colour


def test_a_curve_has_a_point_for_each_step_and_none_for_what_is_no_number():
    figure = draw([(1, 2.0), (2, 1.0), (4, 0.5)], [(1, 0.5)], [])
    above, below = figure.axes
    trained: Any = above.lines[0]
    assert trained.get_xydata().tolist() == [[1, 2], [2, 1], [4, 0.5]]
    assert [line.get_label() for line in above.lines] == ["training", "training, smoothed"]
    assert below.lines[0].get_marker() == "o"
    told = [{"type": "step", "step": 1, "loss": None}, {"type": "step", "step": 2, "loss": 3.0}]
    assert series(told, "step", "loss") == [(2, 3.0)]


def test_trackers_are_told_what_the_events_say(world, monkeypatch):
    told: list[tuple[str, int, Any]] = []

    class Callback:
        def on_train_begin(self, args: Any, state: Any, control: Any) -> None:
            told.append(("begin", state.global_step, args.run_name))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any) -> None:
            told.append(("log", state.global_step, logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any) -> None:
            told.append(("end", state.global_step, None))

    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda _: [Callback])
    (world / "mine.yaml").write_text(CONFIG + "tracking: {to: [tensorboard]}\n")
    done = lory_train("mine.yaml")
    assert done.exit_code == 0, done.output
    losses = [event["loss"] for event in events(world, "step")]
    steps = [("log", number, loss) for number, loss in enumerate(losses, start=1)]
    assert told == [("begin", 0, "mine"), *steps, ("end", 8, None)]


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"tracking\.to: .*wandb"):
        trackers.trackers(TrackingOptions(to=["wandb"]), tmp_path, "mine")


# -- publishing ----------------------------------------------------------------------------------


def server(monkeypatch: Any, status: int, body: Any) -> list[httpx.Request]:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        """What it is asked before the run, it has nothing against."""
        if not request.read():
            return httpx.Response(400, json={})
        seen.append(request)
        return httpx.Response(status, json=body)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(publish.httpx, "put", client.put)
    return seen


def test_an_adapter_is_uploaded_whole_under_its_name(world, monkeypatch):
    seen = server(monkeypatch, 201, {"id": "upload:mine"})
    done = lory_train("mine.yaml", "--publish", "http://there:1/", "--api-key", "k")
    assert done.exit_code == 0, done.output
    put = seen[-1]
    assert (put.method, put.url.path) == ("PUT", "/v1/adapters/mine/files")
    assert put.headers["authorization"] == "Bearer k"
    tensors = (world / "adapters/mine/adapter_model.safetensors").read_bytes()
    assert tensors in put.content
    assert b"adapter_config.json" in put.content
    assert (world / "adapters/mine/adapter_manifest.json").read_bytes() in put.content
    assert events(world)[-1]["published"] == "upload:mine at http://there:1"
    assert "published: upload:mine at http://there:1" in done.output
    assert "serve it" not in done.output


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, {}, "start it with --adapter-uploads"),
        (400, {"error": {"message": "rank 300"}}, "refused it: rank 300"),
        (500, ["odd"], "refused it: 500"),
        (302, {}, "refused it: 302"),
        (200, {"status": "ok"}, "does not answer as Lory does"),
    ],
)
def test_what_a_server_refuses_is_told_and_the_adapter_stays(
    world, monkeypatch, status, body, message
):
    server(monkeypatch, status, body)
    done = lory_train("mine.yaml", "--publish", "http://there:1")
    assert (done.exit_code, message in done.output) == (1, True)
    assert (world / "adapters" / "mine" / "adapter_config.json").exists()
    assert events(world)[-1]["code"] == "publish"


def test_a_folder_that_a_server_watches_gets_the_adapter_whole(world):
    (world / "served").mkdir()
    assert lory_train("mine.yaml", "--publish", "served").exit_code == 0
    names = {path.name for path in (world / "adapters" / "mine").iterdir()}
    assert {path.name for path in (world / "served" / "mine").iterdir()} == names
    again = lory_train("mine.yaml", "--publish", "served", "--output", "adapters/two")
    assert again.exit_code == 0, again.output
    (world / "mine.yaml").write_text(CONFIG + "name: mine\n")
    third = lory_train("mine.yaml", "--publish", "served", "--output", "three", "--run", "r3")
    assert (third.exit_code, "--replace" in third.output) == (1, True)


def test_a_target_that_cannot_be_reached_is_found_before_the_run(world):
    done = lory_train("mine.yaml", "--publish", "http://127.0.0.1:9399")
    assert (done.exit_code, "no server answers" in done.output) == (1, True)
    assert not (world / "runs").exists()
    with pytest.raises(PublishError, match="neither a URL nor an adapters folder"):
        publish.check_target("nowhere", "mine", "")
    with pytest.raises(PublishError, match="is no http URL"):
        publish.check_target("ftp://x", "mine", "")
    with pytest.raises(PublishError, match="give it by --api-key") as told:
        publish.check_target("http://me:secret@127.0.0.1:9399", "mine", "")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": "no such key"}}, "refused it: no such key"),
        (404, {}, "takes no uploads: start it with --adapter-uploads"),
    ],
)
def test_a_server_that_would_not_take_it_is_found_before_the_run(
    world, monkeypatch, status, body, message
):
    reply = httpx.Response(status, json=body)
    monkeypatch.setattr(publish.httpx, "put", lambda *_, **__: reply)
    done = lory_train("mine.yaml", "--publish", "http://there:1")
    assert (done.exit_code, message in done.output) == (1, True)
    assert not (world / "runs").exists()


def test_the_names_of_the_module_and_its_event_file_stay():
    """Other programs start `lory train` and read these."""
    assert (cli.EXIT_FAILED, cli.EXIT_STOPPED) == (1, 130)
    assert train.TEST_FILE == "test.jsonl"
