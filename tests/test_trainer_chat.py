"""Conversations to ids: what is learned is what a server would be asked."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lory_router.chat_template import ChatTemplate
from lory_router.text import load_text_model
from lory_trainer.config import parse_options
from lory_trainer.data import Example, Pair
from lory_trainer.data_encode import make_encoder
from lory_trainer.data_files import RawRow
from lory_trainer.data_rows import make_sample, plan_rows
from lory_trainer.errors import DataError
from trainer_world import CHAT_TEMPLATE, char_tokenizer

DEMO_BASE = Path(__file__).parents[1] / "demo" / "base"
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{% if loop.last %}{{ m['content'] }}{{ eos_token }}"
    "{% endif %}"
    "{% else %}{{ m['content'] }}>{% endif %}{% endfor %}"
)
"""Leaves out the assistant's earlier turns, as templates of reasoning models leave out thoughts."""
ENDLESS = CHAT_TEMPLATE.replace("{{ eos_token }}", " ")
UNLIKE = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ messages | length }}")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def encoded(row: dict[str, Any], template: str = CHAT_TEMPLATE, config: str = "") -> list[Any]:
    options = parse_options(f"base: x\ndata: y\n{config}\n")
    raw = RawRow(row, "row 1")
    plan = plan_rows(options, [raw])
    encoder = make_encoder(
        char_tokenizer(chat=template), plan, learn_prompt=options.train_on_prompt
    )
    return [*encoder.encode(make_sample(raw, plan))]


def text_of(example: Example) -> list[str]:
    """Read, learned, read, learned, ..."""
    tokenizer, parts, place = char_tokenizer(), [], 0
    for start, end in example.learned:
        parts += [example.ids[place:start], example.ids[start:end]]
        place = end
    return [str(tokenizer.decode(list(ids))).replace(" ", "") for ids in parts]


def test_every_turn_of_the_assistants_is_learned_with_its_end():
    row = {"messages": [user("ab"), said("c"), user("d"), said("ef")]}
    [example] = encoded(row)
    assert text_of(example) == ["<bos>ab>", "c<eos>", "d>", "ef<eos>"]


def test_a_turn_of_weight_0_is_read_alone():
    row = {"messages": [user("a"), said("c", weight=0), user("d"), said("e", weight=1)]}
    [example] = encoded(row)
    assert text_of(example) == ["<bos>a>c<eos>d>", "e<eos>"]
    with pytest.raises(DataError, match="every answer has weight 0"):
        encoded({"messages": [user("a"), said("c", weight=0)]})


def test_a_greeting_is_read_and_an_answer_to_nothing_is_not_learned():
    (example,) = encoded({"messages": [said("hello"), user("hi"), said("yo")]})
    assert text_of(example) == ["<bos>hello<eos>hi>", "yo<eos>"]
    with pytest.raises(DataError, match="or comes before a question; nothing to learn"):
        encoded({"messages": [said("hello")]})


def test_turns_that_later_prompts_do_not_repeat_are_rows_of_their_own():
    row = {"messages": [user("a"), said("c"), user("d"), said("e")]}
    first, second = encoded(row, FORGETFUL)
    assert text_of(first) == ["<bos>a>", "c<eos>"]
    assert text_of(second) == ["<bos>a>d>", "e<eos>"]


def test_a_template_that_ends_no_turn_gets_an_end():
    first, second = encoded({"messages": [user("a"), said("c"), user("d"), said("e")]}, ENDLESS)
    assert text_of(first) == ["<bos>a>", "c<eos>"]
    assert text_of(second) == ["<bos>a>cd>", "e<eos>"]


def test_a_template_that_writes_prompts_otherwise_is_refused():
    with pytest.raises(DataError, match="not what would be asked"):
        encoded({"messages": [user("a"), said("c")]}, UNLIKE)
    with pytest.raises(DataError, match="no chat template"):
        encoded({"messages": [user("a"), said("c")]}, "")


def test_columns_may_go_through_the_chat_template():
    [example] = encoded({"text": "ab", "completion": "c"}, config="chat: true")
    assert text_of(example) == ["<bos>ab>", "c<eos>"]


def test_the_prompt_is_learned_only_where_that_is_asked_for():
    [example] = encoded({"text": "ab", "completion": "c"}, config="train_on_prompt: true")
    assert (example.num_prompt_tokens, example.learned_before) == (0, ())


def test_text_is_learned_whole_with_an_end():
    [example] = encoded({"text": "abc"}, config="method: pretrain")
    assert (example.ids, example.num_prompt_tokens) == ((0, 3, 4, 5, 1), 0)


def test_pairs_share_their_prompt():
    row = {"prompt": [user("ab")], "chosen": [said("c")], "rejected": [said("de")]}
    [pair] = encoded(row, config="method: dpo")
    assert isinstance(pair, Pair)
    assert text_of(pair.chosen) == ["<bos>ab>", "c<eos>"]
    assert text_of(pair.rejected) == ["<bos>ab>", "de<eos>"]


def test_tools_reach_the_template_and_calls_hold_objects():
    template = (
        "{{ bos_token }}{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% for c in m['tool_calls'] %}"
        "{{ c['function']['arguments']['x'] }}{% endfor %}{{ eos_token }}{% else %}"
        "{{ m['content'] }}>{% endif %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "yz"}'}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = {"role": "assistant", "tool_calls": [call]}
    [example] = encoded({"messages": [user("ab"), answer], "tools": tools}, template)
    assert text_of(example) == ["<bos>fab>", "yz<eos>"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_the_server_makes_the_same_tokens_of_the_same_conversation(texts):
    """On the shipped base: the trainer's prompt is the router's, token by token."""
    tokenizer, text_model = _demo_tokenizer(), _demo_text_model()
    messages = [m for text in texts for m in (user(text), said("ok"))]
    raw = RawRow({"messages": messages}, "row")
    plan = plan_rows(parse_options("base: x\ndata: y\n"), [raw])
    examples = make_encoder(tokenizer, plan).encode(make_sample(raw, plan))
    last = examples[-1]
    assert isinstance(last, Example)
    template = text_model.chat_template
    assert isinstance(template, ChatTemplate)
    asked = text_model.encode(template.render(messages[:-1]), add_special_tokens=False)
    assert last.ids[: last.num_prompt_tokens] == asked


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_the_server_makes_the_same_tokens_of_the_same_text(text):
    raw = RawRow({"text": text, "completion": "ok"}, "row")
    plan = plan_rows(parse_options('base: x\ndata: y\ntemplate: "{text} ->"\n'), [raw])
    [example] = make_encoder(_demo_tokenizer(), plan).encode(make_sample(raw, plan))
    assert isinstance(example, Example)
    asked = _demo_text_model().encode(f"{text} ->")
    assert example.ids[: example.num_prompt_tokens] == asked


_loaded: dict[str, Any] = {}


def _demo_tokenizer() -> Any:
    if "tokenizer" not in _loaded:
        _loaded["tokenizer"] = AutoTokenizer.from_pretrained(DEMO_BASE)
    return _loaded["tokenizer"]


def _demo_text_model() -> Any:
    if "text" not in _loaded:
        _loaded["text"] = load_text_model(str(DEMO_BASE))
    return _loaded["text"]
