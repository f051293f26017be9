"""Rows that are conversations: asked as chats, up to the answer that is wanted."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from eval_world import Around, Oracle, make_front, run
from lory_trainer.evaluation.errors import EvaluationError

TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "I"},
    {"role": "user", "content": "two"},
]
"""Few tokens: the front takes 64."""


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(*messages: Any, wanted: str = "TWO") -> dict[str, Any]:
    return {"messages": [*messages, {"role": "assistant", "content": wanted}]}


def asked(folder: Path, turns: Any = TURNS, **keys: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The evaluation, and the bodies that were sent."""
    bodies: list[dict[str, Any]] = []

    def see(request: httpx.Request) -> None:
        if request.url.path == "/v1/chat/completions":
            bodies.append(json.loads(request.content))

    front = make_front(says=lambda name, prompt: "TWO" if name else "two")
    assert isinstance(front.engine, Oracle)
    front.engine.manners.clear()
    result = run(front, data=write(folder, said(*turns)), transport=Around(front, see), **keys)
    return result, bodies


def test_a_conversation_is_asked_up_to_its_last_answer_of_adapter_and_base(tmp_path):
    result, bodies = asked(tmp_path)
    assert [v.scores["exact_match"].value for v in result.variants] == [1, 0]
    assert [body["messages"] for body in bodies] == [TURNS, TURNS]
    assert [body["temperature"] for body in bodies] == [0, 0]
    assert bodies[0]["model"] == "loud"
    assert result.variants[0].revision
    assert result.rows[0].values["messages"].endswith("assistant: I\nuser: two")


def test_an_instruction_goes_before_the_conversations_own_and_examples_between(tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps(said(TURNS[0], {"role": "user", "content": "6"}, wanted="VI")))
    shown = {"instruction": "U", "shots": 1, "shots_from": str(shots)}
    turns = (TURNS[0], TURNS[3])
    _, bodies = asked(tmp_path, turns, compare=["prompt_only"], prompt_only=shown, max_new_tokens=4)
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "U\n\nS"},
        {"role": "user", "content": "6"},
        {"role": "assistant", "content": "VI"},
        TURNS[3],
    ]


def test_an_adapter_may_draw_as_its_defaults_say(tmp_path):
    _, bodies = asked(tmp_path, generation="served")
    assert ["temperature" in body for body in bodies] == [False, True]


def test_perplexity_of_a_conversation_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="perplexity: is not to be had"):
        asked(tmp_path, metrics=["exact_match", "perplexity"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": TURNS}], "line 1: messages must end in the answer"),
        ([{"messages": []}], "line 1: messages must end in the answer"),
        ([said()], "line 1: messages must end in the answer"),
        ([said({"role": "user"})], "line 1: a message needs a role, and content that is text"),
        ([said(*TURNS) | {"tools": [{}]}], "line 1: tools: "),
        ([said(*TURNS), {"text": "a", "completion": "b"}], "both conversations and columns"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path, rows, message):
    with pytest.raises(EvaluationError, match=message):
        run(make_front(), data=write(tmp_path, *rows))
