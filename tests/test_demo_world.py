"""The shipped demo: small, plain, and true to what its files say."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lory_trainer.config import load_options

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import make_data  # noqa: E402
import pig_latin  # noqa: E402
from tasks import TASKS  # noqa: E402

PROMPTS = json.loads((DEMO / "prompts.json").read_text())
ADAPTERS = sorted(path.name for path in (DEMO / "adapters").iterdir() if path.is_dir())
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def read_json(*parts: str):
    return json.loads(DEMO.joinpath(*parts).read_text())


@pytest.fixture(scope="module")
def models():
    return evaluate.load_models(DEMO / "base", DEMO / "adapters")


def test_shipped_files_are_under_12_megabytes():
    shipped = [*(DEMO / "base").iterdir(), *(DEMO / "adapters").rglob("*"), *DEMO.glob("*.*")]
    shipped += (DEMO / "data").glob("*/*.jsonl")
    assert sum(path.stat().st_size for path in shipped if path.is_file()) < 12_000_000


def test_every_task_has_an_adapter_a_config_and_held_out_rows():
    assert sorted(TASKS) == ADAPTERS
    assert sorted(path.stem for path in (DEMO / "adapters_src").glob("*.yaml")) == ADAPTERS
    assert sorted(path.parent.name for path in (DEMO / "data").glob("*/eval.jsonl")) == ADAPTERS


def test_a_row_may_hold_any_character_but_a_line_feed(tmp_path, monkeypatch):
    """U+2028 ends a line for `splitlines`, though not in JSONL."""
    row = {"text": "a\u2028b\x85", "completion": "c"}
    for folder, name, content in (
        ("adapters", "adapter_manifest.json", {"template": "{text} ->"}),
        ("data", "eval.jsonl", row),
    ):
        path = tmp_path / folder / "task" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    monkeypatch.setattr(evaluate, "DEMO_DIR", tmp_path)
    assert evaluate.read_eval("task") == [("a\u2028b\x85 ->", "c")]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_plain_lora_for_this_base(name):
    config = read_json("adapters", name, "adapter_config.json")
    assert config["base_model_name_or_path"] == "base"
    assert (config["peft_type"], config["bias"]) == ("LORA", "none")
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert set(config["target_modules"]) <= LINEARS
    path = DEMO / "adapters" / name / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        ranks = {file.get_slice(key).get_shape()[0] for key in names if "lora_A" in key}
    assert ranks == {config["r"]}
    assert len(names) == 2 * 4 * len(config["target_modules"])


def test_adapters_differ_in_rank_targets_and_scaling():
    configs = [read_json("adapters", name, "adapter_config.json") for name in ADAPTERS]
    ranks = {config["r"] for config in configs}
    assert {min(ranks), max(ranks)} == {4, 64}
    assert len(ranks) >= 5
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)


@pytest.mark.parametrize("name", ADAPTERS)
def test_held_out_rows_are_regenerated_and_never_trained_on(name):
    lines = (DEMO / "data" / name / "eval.jsonl").read_text().splitlines()
    rows = [(row["text"], row["completion"]) for row in map(json.loads, lines)]
    assert rows == make_data.eval_rows(name)
    assert len({text for text, _ in rows}) == 100
    trained = {text for text, _ in make_data.train_rows(name)}
    assert not trained & {text for text, _ in rows}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_were_trained_on_what_the_generator_writes(name, tmp_path):
    path = tmp_path / "train.jsonl"
    make_data.write_jsonl(path, make_data.train_rows(name))
    assert path.read_bytes() == (DEMO / "data" / name / "train.jsonl").read_bytes()
    manifest = read_json("adapters", name, "adapter_manifest.json")
    assert manifest["data"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    options = load_options(DEMO / "adapters_src" / f"{name}.yaml")
    assert manifest["config"]["lora"]["r"] == options.lora.r
    assert manifest["config"]["epochs"] == options.epochs


def test_the_base_never_saw_an_adapters_task():
    """Honest demo: what an adapter answers must not be in the base's pre-training text."""
    rng = make_data.Random(0)
    answers = [corpus.pretraining_row(rng, 1.0)[1] for _ in range(5000)]
    for mark in ("SELECT", "[NAME]", "positive", "billing", "Could you please", '"issue"'):
        assert not any(mark in answer for answer in answers)


def test_every_adapter_is_far_better_than_the_base():
    scores = read_json("accuracy.json")
    assert sorted(scores) == ADAPTERS
    for name, score in scores.items():
        assert score["rows"] == 100, name
        assert score["adapter"] >= 0.9, name
        assert score["base"] < 0.2, name


def test_accuracy_is_reproduced_on_the_first_rows(models):
    """A cheap check that accuracy.json belongs to these files."""
    model, tokenizer = models

    def generate(prompts, adapter_id):
        with evaluate.use_adapter(model, adapter_id):
            return evaluate._greedy(model, tokenizer, prompts)

    rows = {name: evaluate.read_eval(name)[:10] for name in ("sentiment", "ticket-router")}
    for name, some in rows.items():
        assert evaluate.exact_match(generate, some, name) >= 0.8
        assert evaluate.exact_match(generate, some, None) <= 0.2


def test_prompts_cover_the_base_and_every_adapter():
    ids = [row["adapter_id"] for row in PROMPTS]
    assert {None, *ADAPTERS} == set(ids)
    assert all(ids.count(name) >= 2 for name in ADAPTERS)
    assert all(set(row) == {"adapter_id", "inputs", "expected"} for row in PROMPTS)


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_prompts_answer_as_written(models, name):
    model, tokenizer = models
    row = next(row for row in PROMPTS if row["adapter_id"] == name)
    with evaluate.use_adapter(model, name):
        assert evaluate._greedy(model, tokenizer, [row["inputs"]]) == [row["expected"]]


def test_another_adapter_would_be_noticed(models):
    """The check above can fail: every prompt answers otherwise on the base."""
    model, tokenizer = models
    rows = [row for row in PROMPTS if row["adapter_id"]]
    with evaluate.use_adapter(model, None):
        answers = evaluate._greedy(model, tokenizer, [row["inputs"] for row in rows])
    assert not any(got == row["expected"] for got, row in zip(answers, rows, strict=True))


def test_prompts_are_the_templates_rendering():
    for row in PROMPTS:
        if row["adapter_id"]:
            manifest = read_json("adapters", row["adapter_id"], "adapter_manifest.json")
            assert row["inputs"].endswith(manifest["template"].removeprefix("{text}"))


def test_chat_template_renders_the_adapters_prompt(models):
    """So `/v1/chat/completions` with an adapter as the model needs nothing else."""
    _, tokenizer = models
    message = [{"role": "user", "content": "My card was charged twice"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode("My card was charged twice ->")


def test_tokenizer_is_bytes_and_gives_any_text_back(models):
    _, tokenizer = models
    for text in ("plain", "tab\tand\nline", "caf\u00e9 \u4f60\u597d \U0001f600", " led by a space"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_base_is_a_small_llama_in_one_precision():
    config = read_json("base", "config.json")
    assert (config["model_type"], config["dtype"]) == ("llama", "float32")
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
    with safe_open(DEMO / "base" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("given", "port"), [((), ""), (("PORT=9000",), " --port 9000")])
def test_the_check_takes_a_free_port_unless_one_is_asked_for(given: tuple[str, ...], port: str):
    """It failed wherever something listened on 8080."""
    done = subprocess.run(
        ["make", "-n", "demo-check", *given],
        cwd=DEMO.parent,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].strip() == f".venv/bin/lory demo --check{port}"


def test_the_rows_to_train_on_are_what_their_script_writes():
    lines = (DEMO / "train" / "pig-latin.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == pig_latin.rows()
    words = ("apple", "string", "shy", "hello")
    assert [pig_latin.pig_latin(word) for word in words] == [
        "appleway",
        "ingstray",
        "shyway",
        "ellohay",
    ]


@pytest.mark.full
def test_from_rows_to_an_adapter_that_answers(tmp_path):
    """`make demo-train`, with fewer steps: its server takes the adapter, scores it, is asked."""
    config = tmp_path / "few.yaml"
    text = (DEMO / "train" / "pig-latin.yaml").read_text()
    text = text.replace("../base", str(DEMO / "base"))
    text = text.replace("pig-latin.jsonl", str(DEMO / "train" / "pig-latin.jsonl"))
    config.write_text(text.replace("epochs: 4", "train_steps: 60"))
    command = [sys.executable, str(DEMO / "train_demo.py"), "--config", str(config)]
    command += ["--folder", str(tmp_path / "out"), "--url", "http://127.0.0.1:9352"]
    done = subprocess.run(
        [*command, "--", "--threads", "1"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "gate holds: exact_match > base" in done.stdout
    assert "upload:pig-latin" in done.stdout
    assert done.stdout.count("  pig-latin : ") == 3
