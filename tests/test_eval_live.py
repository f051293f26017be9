"""The shipped demo through a real server: manners, `lory eval`, and what each mismatch costs."""

import asyncio
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from clients.server_process import ROOT, serving

DEMO = ROOT / "demo"
sys.path.insert(0, str(DEMO))

import evaluate  # noqa: E402
import mismatches  # noqa: E402

from lory_trainer.evaluation.errors import EvaluationError  # noqa: E402
from lory_trainer.evaluation.options import EvaluationOptions  # noqa: E402
from lory_trainer.evaluation.own_server import serving as own_server  # noqa: E402
from lory_trainer.evaluation.results import Evaluation  # noqa: E402
from lory_trainer.evaluation.run import evaluate as run_evaluation  # noqa: E402
from lory_trainer.evaluation.server import Server  # noqa: E402

TASKS = sorted(path.name for path in (DEMO / "adapters").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo's adapters, and beside them one of them mistreated in every way."""
    folder = tmp_path_factory.mktemp("eval")
    adapters = folder / "adapters"
    mismatches.write_adapters(adapters)
    for task in TASKS:
        shutil.copytree(DEMO / "adapters" / task, adapters / task)
    with serving(folder / "log", "--dtype", "float32", adapters=adapters) as url:
        yield url


def post(url: str, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=60, trust_env=False)


def test_fields_and_the_rendered_text_are_the_same_request(url: str) -> None:
    text = "My card was charged twice"
    parameters = {"adapter_id": "right", "max_new_tokens": 80}
    made = post(url, "/generate", {"inputs": {"text": text}, "parameters": parameters})
    raw = post(url, "/generate", {"inputs": f"{text} ->", "parameters": parameters})
    chat = {"model": "right", "messages": [{"role": "user", "content": text}], "temperature": 0}
    said = post(url, "/v1/chat/completions", {**chat, "max_tokens": 80})
    assert made.json() == raw.json()
    assert said.json()["choices"][0]["message"]["content"] == raw.json()["generated_text"]
    templates = [reply.headers["x-template"] for reply in (made, raw, said)]
    assert templates == ["adapter", "none", "adapter"]


def measured(url: str, tmp_path: Path, num_rows: int) -> dict[str, dict[str, float]]:
    result = mismatches.measure(url, tmp_path / "schema.json", num_rows)
    return {
        variant.name: {name: score.value for name, score in variant.scores.items()}
        for variant in result.variants
    }


def check_mismatches(scores: dict[str, dict[str, float]]) -> None:
    right = scores.pop("right")
    assert right["json_valid"] == 1
    assert right["json_schema.valid"] >= 0.95
    space = scores.pop("space")
    assert space["exact_match"] <= right["exact_match"] - 0.2
    assert set(scores) == {"chat", "raw", "newline", "no-mlp", "rslora", "twice"}
    for name, score in scores.items():
        assert score["json_schema.valid"] <= 0.1, name
        assert score["exact_match"] == 0, name


def test_every_way_to_serve_an_adapter_wrongly_loses(url: str, tmp_path: Path) -> None:
    check_mismatches(measured(url, tmp_path, num_rows=15))


@pytest.mark.full
def test_every_way_to_serve_an_adapter_wrongly_loses_on_all_rows(url: str, tmp_path: Path) -> None:
    check_mismatches(measured(url, tmp_path, num_rows=100))
    told = json.loads((DEMO / "mismatches.json").read_text())["served"]
    assert told["right"]["json_valid"] == 1


def through_http(url: str, task: str, num_rows: int) -> Evaluation:
    return asyncio.run(evaluate.evaluate_task(url, task, num_rows))


@pytest.mark.full
def test_perplexity_through_http_is_that_of_the_trainers_model(url: str) -> None:
    """Of the wanted answers' tokens, under transformers + PEFT."""
    options = EvaluationOptions(
        data=str(evaluate.eval_file("sentiment")),
        adapters=("sentiment",),
        metrics=("perplexity",),
        rows=20,
    )

    async def ask() -> Evaluation:
        async with Server(url, "", 8) as server:
            return await run_evaluation(options, server, None, lambda *_: None)

    served = {v.name: v.scores["perplexity"].value for v in asyncio.run(ask()).variants}
    model, tokenizer = evaluate.load_models(DEMO / "base", DEMO / "adapters")
    for name, adapter_id in (("sentiment", "sentiment"), ("base", None)):
        with evaluate.use_adapter(model, adapter_id), torch.inference_mode():
            found = [
                _logprobs(model, tokenizer, *row) for row in evaluate.read_eval("sentiment")[:20]
            ]
        nats = -sum(sum(one) for one in found) / sum(len(one) for one in found)
        assert math.log(served[name]) == pytest.approx(nats, rel=1e-3, abs=1e-4)


def _logprobs(model, tokenizer, prompt: str, wanted: str) -> list[float]:
    prompt_ids = tokenizer.encode(prompt)
    wanted_ids = tokenizer.encode(wanted, add_special_tokens=False)
    logits = model(torch.tensor([[*prompt_ids, *wanted_ids]])).logits[0]
    logprobs = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logprobs[range(len(wanted_ids)), wanted_ids].tolist()


@pytest.mark.full
def test_every_task_scores_the_same_through_http_as_in_the_trainer(url: str) -> None:
    local = evaluate.local_scores(TASKS, num_rows=100)
    for task in TASKS:
        result = through_http(url, task, 100)
        served = {v.name: v.scores["exact_match"].value for v in result.variants}
        assert served == {task: local[task]["adapter"], "base": local[task]["base"]}, task


@pytest.mark.full
def test_a_server_of_ones_own_is_started_asked_and_ended() -> None:
    with own_server(str(DEMO / "base"), str(DEMO / "adapters"), ("--dtype", "float32")) as own:
        assert post(own, "/generate", {"inputs": "a"}).status_code == 200
    with pytest.raises(httpx.ConnectError):
        post(own, "/generate", {"inputs": "a"})


def test_a_server_that_cannot_start_is_told_in_its_own_words(tmp_path: Path) -> None:
    with (
        pytest.raises(EvaluationError, match="no folder /nowhere"),
        own_server("/nowhere", str(tmp_path)),
    ):
        pytest.fail("it started")
