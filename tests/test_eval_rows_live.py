"""Rows that a run learned from, scored through a server: as trained, so are they asked."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from lory_trainer.evaluation.options import EvaluationOptions
from lory_trainer.evaluation.own_server import serving
from lory_trainer.evaluation.results import Evaluation
from lory_trainer.evaluation.run import evaluate
from lory_trainer.evaluation.server import Server
from trainer_world import char_tokenizer, make_base, train, write_rows

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools[0].function.name }} {% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}so {% for c in m.tool_calls or [] %}"
    "call {{ c.function.name }} {{ c.function.arguments.x }}{% endfor %}{{ m.content or '' }}"
    "{{ eos_token }}{% else %}{{ m.content }}>{% endif %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def talk(place: int) -> dict[str, Any]:
    """Of every shape some."""
    asked, answer = "abcdefgh"[place], "stuvwxyz"[place] * 3
    user = {"role": "user", "content": asked}
    if place % 4 == 0:
        call = {"name": "look", "arguments": json.dumps({"x": answer})}
        calls = [{"type": "function", "function": call}]
        return {"messages": [user, {"role": "assistant", "tool_calls": calls}], "tools": TOOLS}
    if place % 4 == 1:
        call = {"name": "look", "arguments": {"x": asked}}
        before = {"role": "assistant", "weight": 0, "tool_calls": [{"function": call}]}
        told = {"role": "tool", "content": answer}
        return {"messages": [user, before, told, {"role": "assistant", "content": answer}]}
    turns = [("system", "be good"), ("human", asked), ("gpt", answer)]
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def scored(url: str, data: Path) -> Evaluation:
    options = EvaluationOptions(
        data=str(data),
        adapters=("mine",),
        metrics=("exact_match", "perplexity"),
        compare=("base", "prompt_only"),
    )

    async def ask() -> Evaluation:
        async with Server(url, "", 8) as server:
            return await evaluate(options, server, None, lambda *_: None)

    return asyncio.run(ask())


def test_conversations_and_calls_score_through_the_server_what_they_did_in_the_trainer(tmp_path):
    base = make_base(tmp_path / "tiny")
    tokenizer = char_tokenizer(chat=TEMPLATE)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(base)
    rows = write_rows(tmp_path / "rows.jsonl", *map(talk, range(8)))
    text = "base: tiny\ndata: rows.jsonl\nlora: {r: 8, dtype: float32}\nepochs: 30\nbatch_size: 4\n"
    output = train(tmp_path, f"{text}learning_rate: 2e-2\n").output
    probes = json.loads((output / "adapter_manifest.json").read_text())["probe"]["rows"]
    right = [row["top"] == row["ids"][row["start"] :] for row in probes]
    logprobs = [one for row in probes for one in row["logprobs"][:-1]]
    with serving(str(base), str(output.parent), ("--dtype", "float32")) as url:
        result = scored(url, rows)
    adapter, base_alone, _ = result.variants
    assert adapter.scores["exact_match"].value == sum(right) / len(right) > 0.8
    assert base_alone.scores["exact_match"].value == 0
    perplexity = adapter.scores["perplexity"].value
    assert perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), abs=1e-4)
    assert result.rows[0].wanted == "call look sss"
