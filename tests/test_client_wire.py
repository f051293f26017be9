"""The SDK's pure part: bodies it builds, replies it reads, event streams it decodes."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_client import (
    ChatDelta,
    ChatParameters,
    GenerateParameters,
    GenerationError,
    IncompleteStreamError,
    ProtocolError,
    Usage,
    wire,
)
from lory_client.replies import Head
from lory_client.sse import SSEDecoder
from lory_client.streams import StreamReader
from lory_router import schemas_lorax, schemas_openai
from lory_router.intake_lorax import NOT_SUPPORTED

STREAM_HEAD = Head(200, {"content-type": "text/event-stream; charset=utf-8"})


def body_of(call: Any) -> Any:
    return json.loads(call.body)


def token(text: str, **fields: Any) -> dict[str, Any]:
    return {"id": 7, "text": text, "logprob": -0.25, "special": False, **fields}


def event(text: str, **fields: Any) -> dict[str, Any]:
    return {"token": token(text), "generated_text": None, "details": None, **fields}


def framed(*events: Any) -> bytes:
    texts = [e if isinstance(e, str) else json.dumps(e) for e in events]
    return b"".join(f"data:{text}\n\n".encode() for text in texts)


FINAL_DETAILS = {"finish_reason": "length", "prompt_tokens": 3, "generated_tokens": 2, "seed": 11}
GENERATION_STREAM = framed(event(" a"), event(" b", generated_text=" a b", details=FINAL_DETAILS))


# -- requests -------------------------------------------------------------------------------


def test_only_parameters_that_were_given_are_sent():
    call = wire.generate("hi", "shout", {"max_new_tokens": 4, "stop": ("x",), "top_k": None})  # type: ignore[typeddict-item]
    assert (call.method, call.path) == ("POST", "/generate")
    assert body_of(call) == {
        "inputs": "hi",
        "parameters": {"max_new_tokens": 4, "stop": ["x"], "details": True, "adapter_id": "shout"},
    }


def test_fields_of_a_template_are_sent_as_they_are():
    call = wire.generate({"text": "hi"}, "shout", {})
    assert body_of(call)["inputs"] == {"text": "hi"}


def test_the_base_is_asked_for_by_naming_no_adapter():
    body = body_of(wire.generate_stream("hi", None, {}))
    assert body == {"inputs": "hi", "parameters": {"details": True}}
    assert body_of(wire.chat([], None, {}))["model"] == ""


def test_falsy_values_are_sent():
    parameters = body_of(wire.generate("hi", None, {"temperature": 0.0, "details": False}))
    assert parameters["parameters"] == {"temperature": 0.0, "details": False}


def test_a_misspelt_parameter_is_refused_not_dropped():
    with pytest.raises(TypeError, match=r"unknown parameter 'temprature'.*temperature"):
        wire.generate("hi", None, {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError, match="max_new_tokens"):
        wire.chat([], None, {"max_new_tokens": 1})  # type: ignore[typeddict-unknown-key]


def test_extra_is_merged_into_the_parameters():
    parameters = body_of(wire.generate("hi", None, {"extra": {"mirostat": 2}}))["parameters"]
    assert parameters == {"details": True, "mirostat": 2}
    assert body_of(wire.chat([], "a", {"extra": {"tools": []}}))["tools"] == []


def test_a_chat_names_its_adapter_as_the_model():
    call = wire.chat([{"role": "user", "content": "hi"}], "shout", {"n": 2})
    assert call.path == "/v1/chat/completions"
    messages = [{"role": "user", "content": "hi"}]
    assert body_of(call) == {"model": "shout", "messages": messages, "n": 2}


def test_a_chat_stream_asks_for_usage_and_stays_a_stream():
    body = body_of(wire.chat_stream([], "shout", {"extra": {"stream": False}}))
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_text_that_is_not_ascii_survives_and_nan_is_refused():
    assert body_of(wire.generate("h\u00e9 \U0001f600", None, {}))["inputs"] == "h\u00e9 \U0001f600"
    with pytest.raises(ValueError, match="JSON compliant"):
        wire.generate("hi", None, {"temperature": float("nan")})


def test_every_parameter_offered_is_one_the_server_serves():
    native = set(schemas_lorax.Parameters.__struct_fields__) - set(NOT_SUPPORTED)
    assert set(GenerateParameters.__annotations__) - {"extra"} <= native
    openai = set(schemas_openai.ChatBody.__struct_fields__) | schemas_openai.HARMLESS
    assert set(ChatParameters.__annotations__) - {"extra"} <= openai


# -- replies --------------------------------------------------------------------------------


def full_reply() -> dict[str, Any]:
    other = {
        "generated_text": " z",
        "finish_reason": "length",
        "generated_tokens": 1,
        "prefill": [],
        "tokens": [token(" z")],
        "seed": 12,
    }
    details = {
        **FINAL_DETAILS,
        "skipped_tokens": 0,
        "prefill": [
            {"id": 1, "text": "<s>", "logprob": None},
            {"id": 2, "text": "x", "logprob": -3},
        ],
        "tokens": [
            token(" a"),
            token("</s>", special=True, logprob=None),
        ],
        "best_of_sequences": [other],
    }
    return {"generated_text": " a", "details": details}


def parsed(reply: Any, headers: dict[str, str] | None = None) -> Any:
    call = wire.generate("hi", None, {})
    return call.parse(Head(200, headers or {}), json.dumps(reply).encode())


def test_a_whole_generation_is_read():
    headers = {"x-request-id": "r1", "x-adapter-id": "shout"}
    generation = parsed(full_reply(), headers)
    assert (generation.text, generation.finish_reason, generation.seed) == (" a", "length", 11)
    assert generation.usage == Usage(prompt_tokens=3, generated_tokens=2)
    assert generation.usage.total_tokens == 5
    assert (generation.request_id, generation.adapter_id) == ("r1", "shout")
    assert [p.logprob for p in generation.prompt_tokens] == [None, -3.0]
    assert (generation.tokens[1].special, generation.tokens[1].logprob) == (True, None)
    assert [(t.text, t.raw_text) for t in generation.tokens] == [(" a", " a"), ("", "</s>")]
    assert [c.text for c in generation.other_candidates] == [" z"]


def test_unknown_fields_are_let_be_at_every_level():
    reply = full_reply()
    expected = parsed(reply)
    reply["carbon"] = reply["details"]["mood"] = reply["details"]["tokens"][0]["hue"] = {"x": [1]}
    assert parsed(reply) == expected


def test_without_details_there_is_the_text():
    generation = parsed({"generated_text": " a", "details": None})
    assert (generation.text, generation.finish_reason, generation.usage) == (" a", None, None)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda r: r.pop("generated_text"), r"reply\.generated_text should be a string, got noth"),
        (lambda r: r.update(details=[]), r"reply\.details should be an object, got list"),
        (lambda r: r["details"]["tokens"][1].update(id="7"), r"tokens\[1\]\.id should be an int"),
        (lambda r: r["details"]["tokens"][1].update(id=True), r"\.id should be an integer, got bo"),
        (lambda r: r["details"].update(tokens={}), r"details\.tokens should be a list, got dict"),
        (lambda r: r["details"]["tokens"][0].pop("special"), r"\.special should be a boolean"),
    ],
)
def test_a_reply_of_the_wrong_shape_names_the_field(damage: Any, named: str):
    reply = full_reply()
    damage(reply)
    with pytest.raises(ProtocolError, match=named):
        parsed(reply)


def test_a_reply_that_is_not_json_is_a_protocol_error():
    with pytest.raises(ProtocolError, match="not JSON"):
        wire.models().parse(Head(200, {}), b"<html>hello</html>")


def test_models_tell_adapters_from_their_base():
    cards = [{"id": "base", "parent": None}, {"id": "shout", "parent": "base", "root": "/x"}]
    models = wire.models().parse(Head(200, {}), json.dumps({"data": cards}).encode())
    assert [(m.id, m.parent) for m in models] == [("base", None), ("shout", "base")]


def test_info_names_some_fields_and_keeps_the_rest():
    info = wire.info().parse(Head(200, {}), b'{"model_id": "m", "max_best_of": 2}')
    assert (info.model_id, info.max_total_tokens) == ("m", None)
    assert info.fields["max_best_of"] == 2
    with pytest.raises(TypeError):
        info.fields["model_id"] = "other"  # type: ignore[index]


def test_tokens_of_a_text_are_read_from_a_bare_list():
    body = b'[{"id": 5, "text": "hi", "start": 0, "stop": 2}]'
    (only,) = wire.tokenize("hi", True).parse(Head(200, {}), body)
    assert (only.id, only.text, only.start, only.stop) == (5, "hi", 0, 2)


def test_a_chat_completion_is_read():
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello"},
        "finish_reason": "stop",
        "logprobs": {
            "content": [
                {
                    "token": "hello",
                    "logprob": -0.5,
                    "bytes": None,
                    "top_logprobs": [{"token": "hi", "logprob": -1.0, "bytes": None}],
                }
            ]
        },
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    reply = {"id": "c", "model": "shout", "choices": [choice], "usage": usage}
    chat = wire.chat([], "shout", {}).parse(Head(200, {}), json.dumps(reply).encode())
    assert (chat.text, chat.finish_reason, chat.usage) == ("hello", "stop", Usage(1, 2))
    assert chat.choices[0].logprobs[0].alternatives[0].text == "hi"
    with pytest.raises(ProtocolError, match="choices is empty"):
        wire.chat([], "a", {}).parse(Head(200, {}), b'{"id": "c", "model": "m", "choices": []}')


# -- event streams --------------------------------------------------------------------------


def decoded(*chunks: bytes) -> list[str]:
    decoder = SSEDecoder()
    return [data for chunk in chunks for data in decoder.feed(chunk)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def test_data_with_and_without_a_space_is_the_same():
    assert decoded(b"data:x\n\n", b"data: x\n\n", b"data:  x\n\n") == ["x", "x", " x"]


def test_lines_of_one_event_are_joined():
    assert decoded(b"data: a\ndata: b\ndata\n\n") == ["a\nb\n"]


def test_comments_and_other_fields_are_no_events():
    stream = b":\n\n: keep-alive\n\nevent: ping\nid: 3\nretry: 10\n\ndatum: x\n\ndata: y\n\n"
    assert decoded(stream) == ["y"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_the_grammar_ends_a_line(end: bytes):
    assert decoded(end.join([b"data: a", b"", b":c", b"data: b", b"", b""])) == ["a", "b"]


def test_a_crlf_split_between_chunks_is_one_line_end():
    assert decoded(b"data: a\r", b"\ndata: b\r", b"", b"\n\r", b"\n") == ["a\nb"]


def test_a_byte_order_mark_counts_only_at_the_start():
    assert decoded(b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n") == ["a"]


def test_an_event_that_was_not_ended_is_no_event():
    assert decoded(b"data: a\n\ndata: b\n") == ["a"]


def test_line_separators_inside_json_do_not_end_a_line():
    text = "a\u2028b\u0085c\x0bd"
    assert decoded(f"data:{text}\n\n".encode()) == [text]


LINES = st.sampled_from(
    [
        "data: a",
        "data:\u00e9\U0001f600",
        "data",
        ": note",
        "event: x",
        "",
        "",
        "\ufeffdata: q",
        "da",
    ]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"])), max_size=20).map(
    lambda lines: "".join(text + end for text, end in lines).encode()
)
PLACES = st.lists(st.integers(0, 400), max_size=12)


@settings(deadline=None)
@given(STREAMS, PLACES)
def test_decoding_does_not_depend_on_where_chunks_end(stream: bytes, places: list[int]):
    assert decoded(*cut(stream, places)) == decoded(stream)
    assert decoded(*[stream[i : i + 1] for i in range(len(stream))]) == decoded(stream)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\r\n"), max_size=30)), PLACES)
def test_any_text_comes_through(texts: list[str], places: list[int]):
    stream = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8", errors="replace")
    expected = [text.encode("utf-8", errors="replace").decode() for text in texts]
    assert decoded(*cut(stream, places)) == expected


# -- streams of tokens and of chat ------------------------------------------------------------


def generation_reader() -> StreamReader[Any, Any]:
    reader = StreamReader(wire.generate_stream("hi", None, {}).assemble)
    reader.start(Head(200, {**STREAM_HEAD.headers, "x-request-id": "r1"}))
    return reader


def chat_reader() -> StreamReader[Any, Any]:
    reader = StreamReader(wire.chat_stream([], "shout", {}).assemble)
    reader.start(STREAM_HEAD)
    return reader


def test_a_stream_yields_tokens_and_ends_in_a_generation():
    reader = generation_reader()
    assert [t.text for t in reader.feed(GENERATION_STREAM)] == [" a", " b"]
    generation = reader.result()
    assert (generation.text, generation.finish_reason, generation.seed) == (" a b", "length", 11)
    assert [t.text for t in generation.tokens] == [" a", " b"]
    assert (generation.usage, generation.request_id) == (Usage(3, 2), "r1")


@settings(deadline=None)
@given(PLACES)
def test_a_stream_reads_the_same_wherever_it_is_cut(places: list[int]):
    reader = generation_reader()
    texts = [t.text for chunk in cut(GENERATION_STREAM, places) for t in reader.feed(chunk)]
    assert (texts, reader.result().text) == ([" a", " b"], " a b")


def test_tokens_before_an_error_event_are_not_lost():
    reader = generation_reader()
    failed = {"error": "Request failed during generation: boom", "error_type": "generation"}
    texts: list[str] = []

    def read() -> None:
        for item in reader.feed(framed(event(" a"), failed, event(" b"))):
            texts.append(item.text)

    with pytest.raises(GenerationError, match="boom") as caught:
        read()
    assert texts == [" a"]
    assert (caught.value.status, caught.value.request_id) == (424, "r1")


def test_a_stream_without_its_final_event_is_incomplete():
    reader = generation_reader()
    assert len(list(reader.feed(framed(event(" a"), event(" b"))))) == 2
    with pytest.raises(IncompleteStreamError, match="2 tokens"):
        reader.result()


def test_nothing_counts_behind_the_final_event():
    reader = generation_reader()
    assert len(list(reader.feed(GENERATION_STREAM + framed(event(" c"))))) == 2
    assert reader.result().text == " a b"


def test_an_event_of_the_wrong_shape_names_field_and_request():
    with pytest.raises(ProtocolError, match=r"event\.token\.id") as caught:
        list(generation_reader().feed(framed({"token": {"text": "x"}})))
    assert (caught.value.request_id, caught.value.status) == ("r1", 200)


def test_a_reply_that_is_no_event_stream_is_refused():
    reader = StreamReader(wire.generate_stream("hi", None, {}).assemble)
    with pytest.raises(ProtocolError, match="got text/html"):
        reader.start(Head(200, {"content-type": "text/html"}))


def chunk(*choices: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "c", "model": "shout", "choices": list(choices), **fields}


def piece(index: int, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


def test_a_chat_stream_is_put_together_by_choice():
    reader = chat_reader()
    usage = {"prompt_tokens": 1, "completion_tokens": 3}
    stream = framed(
        chunk(piece(0, role="assistant", content=""), piece(1, role="assistant", content="")),
        chunk(piece(1, content="B")),
        chunk(piece(0, content="A")),
        chunk(piece(0, "stop"), piece(1, "length", content="b")),
        chunk(usage=usage),
        "[DONE]",
    )
    deltas = [d for d in reader.feed(stream) if d.text]
    assert deltas == [ChatDelta(1, "B"), ChatDelta(0, "A"), ChatDelta(1, "b", "length")]
    completion = reader.result()
    assert [(c.text, c.finish_reason) for c in completion.choices] == [
        ("A", "stop"),
        ("Bb", "length"),
    ]
    assert (completion.model, completion.usage) == ("shout", Usage(1, 3))


def test_a_chat_stream_without_done_is_incomplete():
    reader = chat_reader()
    list(reader.feed(framed(chunk(piece(0, "stop", content="A")))))
    with pytest.raises(IncompleteStreamError, match="DONE"):
        reader.result()


def test_an_error_chunk_of_a_chat_is_raised():
    error = {"message": "boom", "type": "server_error", "param": None, "code": "generation"}
    with pytest.raises(GenerationError, match="boom"):
        list(chat_reader().feed(framed({"error": error})))
