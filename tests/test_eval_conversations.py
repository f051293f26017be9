"""Rows that are conversations: asked as chats, up to the answer that is wanted."""

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

import tiny_tokenizers
from eval_world import Around, Oracle, make_front, run
from lory_trainer.evaluation.errors import EvaluationError
from scripted_engine import INFO, Front

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


def prompts(front: Front) -> list[tuple[str, str]]:
    assert isinstance(front.engine, Oracle)
    return front.engine.prompts


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


def test_perplexity_is_of_what_the_chat_template_makes(tmp_path):
    front = make_front(adapters=("plain",))
    front.engine.manners.clear()
    data = write(tmp_path, said(*TURNS[1:]))
    result = run(front, data=data, adapters=["plain"], metrics=["perplexity"])
    assert [v.scores["perplexity"].value for v in result.variants] == [
        pytest.approx(1.284, 1e-3)
    ] * 2
    whole = "<user>1\n<assistant>I\n<user>two\n<assistant>TWO"
    assert ("plain", whole) in prompts(front)


def test_perplexity_of_conversations_is_refused_where_the_adapter_has_a_template(tmp_path):
    with pytest.raises(EvaluationError, match="perplexity: is not to be had of conversations"):
        run(make_front(), data=write(tmp_path, said(TURNS[3])), metrics=["perplexity"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": TURNS[:2]}], "line 1: no message of the assistant's"),
        ([{"messages": []}], "line 1: expected messages"),
        ([said()], "line 1: messages begin with the answer; nothing is asked"),
        ([said({"role": "user"})], "line 1: a message needs a role, and content or tool_calls"),
        ([said(*TURNS) | {"tools": [1]}], "line 1: tools must be a list of objects"),
        ([said(*TURNS) | {"tools": [{}]}], "was trained by one of its own"),
        ([said(*TURNS), {"text": "a", "completion": "b"}], "both conversations and columns"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path, rows, message):
    with pytest.raises(EvaluationError, match=message):
        run(make_front(), data=write(tmp_path, *rows))


# -- every shape that is trained on -------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f"}}]
TEMPLATE = (
    "{% if tools %}T{{ tools | length }};{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}~{% endif %}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments.x }}]{% endfor %}"
    "{% if m.content %}{{ m.content | trim }}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Begins answers with a mark, trims them, and knows tools and calls."""


def asked_through_template(
    folder: Path, row: Any, says: str, **keys: Any
) -> tuple[Any, list[tuple[str, str]]]:
    """The evaluation of an adapter without a template, and the prompts that came to the engine."""
    info = msgspec.structs.replace(INFO, max_model_len=512)
    engine = Oracle(says=lambda name, _: says if name else "?", info=info)
    front = Front(engine=engine, text=tiny_tokenizers.byte_level(template=TEMPLATE))
    result = run(front, data=write(folder, row), **keys)
    return result, engine.prompts


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


USER = {"role": "user", "content": "go"}


def exact(result: Any) -> list[float]:
    return [variant.scores["exact_match"].value for variant in result.variants]


@pytest.mark.parametrize("arguments", [{"x": 7}, '{"x": 7}'])
def test_a_call_is_wanted_in_the_templates_form_and_asked_with_the_tools(tmp_path, arguments):
    row = {"messages": [USER, call(arguments)], "tools": TOOLS}
    result, sent = asked_through_template(tmp_path, row, "~[f 7]")
    assert exact(result) == [1, 0]
    assert result.rows[0].wanted == "[f 7]"
    assert ("loud", "T1;<user>go<assistant>") in sent
    assert ("", "T1;<user>go<assistant>") in sent


def test_results_of_calls_are_asked_as_they_were_learned(tmp_path):
    told = {"role": "tool", "content": "8"}
    row = {"messages": [USER, call({"x": 7}), told, {"role": "assistant", "content": "eight"}]}
    result, sent = asked_through_template(tmp_path, row, "~eight")
    assert exact(result) == [1, 0]
    assert ("loud", "<user>go<assistant>~[f 7]<tool>8<assistant>") in sent


def test_what_the_template_begins_answers_with_and_cuts_off_is_no_fault(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": " there "}]}
    result, _ = asked_through_template(tmp_path, row, "~there")
    assert exact(result) == [1, 0]
    assert result.rows[0].answers["loud"] == "there"


PAIR = {
    "input": {"messages": [USER]},
    "preferred_output": [{"role": "assistant", "content": "there"}],
    "non_preferred_output": [{"role": "assistant", "content": "no"}],
}
SHAPES = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "go"}, {"from": "gpt", "value": "there"}]
    },
    "prompt in messages": {
        "prompt": [USER],
        "completion": [{"role": "assistant", "content": "there"}],
    },
    "prompt in messages, text": {"prompt": [USER], "completion": "there"},
    "what follows the answer": {
        "messages": [USER, {"role": "assistant", "content": "there", "weight": 1}, USER]
    },
    "learned before": {
        "messages": [
            USER,
            {"role": "assistant", "content": "there"},
            USER,
            {"role": "assistant", "content": "no", "weight": 0},
        ]
    },
    "OpenAI's pair": PAIR,
    "pair in messages": {
        "chosen": [USER, {"role": "assistant", "content": "there"}],
        "rejected": [USER, {"role": "assistant", "content": "no"}],
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "go"}]},
            {"role": "assistant", "content": "there"},
        ]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_of_any_shape_is_asked(tmp_path, shape):
    result, sent = asked_through_template(tmp_path, SHAPES[shape], "~there")
    assert exact(result) == [1, 0]
    assert ("loud", "<user>go<assistant>") in sent


def test_a_system_message_between_others_stays_there(tmp_path):
    said_ = [{"role": "user", "content": "a"}, {"role": "system", "content": "S"}, USER]
    row = {"messages": [*said_, {"role": "assistant", "content": "there"}]}
    _, sent = asked_through_template(tmp_path, row, "~there")
    assert ("loud", "<user>a<system>S<user>go<assistant>") in sent


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": 5, "output": {"a": 1}}, '{"a": 1}'),
        ({"text": None, "answer": 2.5}, "2.5"),
        ({"text": "5", "chosen": "x", "rejected": "y"}, "x"),
        ({"text": "5", "messages": [USER], "response": "r"}, "r"),
    ],
)
def test_columns_are_read_as_they_are_learned(tmp_path, row, wanted):
    front = make_front(says=lambda *_: wanted)
    result = run(front, data=write(tmp_path, row), compare=[])
    assert exact(result) == [1]
    text = "" if row["text"] is None else row["text"]
    assert prompts(front) == [("loud", f"{text} ->")]


def test_a_table_and_the_test_part_of_a_folder_are_read(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text("text,completion\nno,NO\n")
    with pytest.raises(EvaluationError, match="data keeps no test rows apart; name the file"):
        run(make_front(), data=str(folder))
    (folder / "test.csv").write_text("text,completion\none,ONE\n")
    front = make_front()
    assert exact(run(front, data=str(folder), compare=[])) == [1]
    assert prompts(front) == [("loud", "one ->")]
