"""LoRAX's wire format to the letter: bodies, null rules, framing, headers, error bodies."""

import asyncio
import json
from typing import Any

import pytest

import tiny_tokenizers
from lory_router.text import TextModel
from scripted_engine import BASE, Answer, Front, events

# What lorax-client 0.6.3 sends when a caller gives nothing but a prompt.
CLIENT_PARAMETERS: dict[str, Any] = {
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "do_sample": False,
    "max_new_tokens": 20,
    "ignore_eos_token": False,
    "repetition_penalty": None,
    "return_full_text": False,
    "stop": [],
    "seed": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "best_of": None,
    "watermark": False,
    "details": True,
    "decoder_input_details": False,
    "return_k_alternatives": None,
    "response_format": None,
}


def body(inputs: str = "ab", stream: bool | None = None, **parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    return found if stream is None else {**found, "stream": stream}


def token(token_id: int, text: str, special: bool = False) -> dict[str, Any]:
    return {"id": token_id, "text": text, "logprob": -0.5, "special": special, "skipped": False}


# -- whole replies --------------------------------------------------------------------------


def test_the_client_gets_a_list_of_one_with_every_field_it_requires():
    front = Front(Answer(b"hi"))
    sent = {"inputs": "ab", "stream": False, "parameters": CLIENT_PARAMETERS}
    response = front.post("/", sent)
    assert response.status_code == 200
    assert response.json() == [
        {
            "generated_text": "hi",
            "details": {
                "finish_reason": "eos_token",
                "prompt_tokens": 2,
                "generated_tokens": 3,
                "skipped_tokens": 0,
                "seed": None,
                "prefill": [],
                "tokens": [token(104, "h"), token(105, "i"), token(257, "</s>", special=True)],
            },
        }
    ]


@pytest.mark.parametrize(
    ("path", "is_list"), [("/", True), ("/invocations", True), ("/generate", False)]
)
def test_details_are_left_out_unless_asked_for(path: str, is_list: bool):
    reply = Front().post(path, {"inputs": "ab"}).json()
    assert reply == ([{"generated_text": "hi"}] if is_list else {"generated_text": "hi"})


def test_headers_tell_counts_times_and_names():
    response = Front().post("/generate", body(adapter_id="french", adapter_source="local"))
    headers = response.headers
    assert headers["x-prompt-tokens"] == "2"
    assert headers["x-generated-tokens"] == "3"
    assert headers["x-total-tokens"] == "5"
    assert headers["x-skipped-tokens"] == "0"
    assert headers["x-queue-time"] == "250"
    assert headers["x-model-id"] == BASE
    assert headers["x-adapter-id"] == "french"
    assert headers["x-adapter-source"] == "local"
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == "2"
    assert len(headers["x-request-id"]) == 32
    times = ("total", "compute", "validation", "inference")
    assert all(headers[f"x-{name}-time"].isdigit() for name in times)
    rates = ("time-per-token", "time-to-first-token", "time-per-output-token")
    assert all(headers[f"x-{name}"].isdigit() for name in rates)


def test_the_base_answers_to_no_adapter_header():
    headers = Front().post("/generate", body(adapter_id="")).headers
    assert "x-adapter-id" not in headers
    assert "x-adapter-source" not in headers


@pytest.mark.parametrize("name", ["", None, "__base_model__"])
def test_no_adapter_is_the_base(name: str | None):
    front = Front()
    front.post("/generate", body(adapter_id=name))
    assert front.engine.last.adapter_id == ""


def test_an_adapter_name_may_hold_a_slash():
    front = Front()
    assert front.post("/generate", body(adapter_id="org/german")).status_code == 200
    assert front.engine.last.adapter_id == "org/german"


def test_a_stop_string_stays_in_the_text_and_ends_the_sequence_in_the_engine():
    front = Front(Answer(b"one STOP two", ends=False))
    reply = front.post("/generate", body(stop=["STOP"], details=True)).json()
    assert reply["generated_text"] == "one STOP"
    assert reply["details"]["finish_reason"] == "stop_sequence"
    assert reply["details"]["generated_tokens"] == 8
    assert front.engine.streams[0].cancels[0] == "cancelled"
    assert front.engine.streams[0].num_told == 8


def test_tokens_past_a_stop_in_one_batch_are_withheld():
    front = Front(Answer(b"abSTOPcdefgh", ends=False, batch=12))
    reply = front.post("/generate", body(stop=["STOP"], details=True)).json()
    assert reply["generated_text"] == "abSTOP"
    assert len(reply["details"]["tokens"]) == reply["details"]["generated_tokens"] == 6


def test_length_ends_at_max_new_tokens():
    reply = Front(Answer(b"abcdef")).post("/generate", body(max_new_tokens=3, details=True)).json()
    assert reply["generated_text"] == "abc"
    assert reply["details"]["finish_reason"] == "length"


def test_without_max_new_tokens_the_context_is_the_limit():
    front = Front()
    front.post("/generate", body("abcd"))
    assert front.engine.last.sampling.max_new_tokens == 60


def test_return_full_text_puts_the_prompt_first():
    assert Front().post("/generate", body(return_full_text=True)).json()["generated_text"] == "abhi"


def test_truncate_keeps_the_end_of_the_prompt():
    front = Front()
    reply = front.post("/generate", body("abcdef", truncate=2, return_full_text=True)).json()
    assert front.engine.last.prompt_ids == (101, 102)
    assert reply["generated_text"] == "efhi"


def test_truncate_looks_no_further_back_than_its_tokens_can_reach(monkeypatch):
    """A 2 MB text with `truncate` 10 was tokenized whole."""
    looked_at: list[int] = []
    encode = TextModel.encode

    def measured(self: TextModel, text: str, special: bool = True):
        looked_at.append(len(text))
        return encode(self, text, special)

    monkeypatch.setattr(TextModel, "encode", measured)
    front = Front()
    front.post("/generate", body("a" * 1_900_000 + "bcd", truncate=3))
    assert front.engine.last.prompt_ids == (98, 99, 100)
    assert looked_at[0] < 100


def test_truncate_looks_further_back_where_the_end_holds_too_few_tokens():
    front = Front(text=tiny_tokenizers.words())
    front.post("/generate", body("t3 t4 t5" + " " * 5000, truncate=2))
    assert front.engine.last.prompt_ids == (4, 5)


@pytest.mark.parametrize("inputs", ["abcdef", "ab"])
def test_truncate_of_a_template_and_of_a_short_text(inputs: str):
    front = Front()
    front.post("/generate", body(inputs, truncate=20, apply_chat_template=True))
    assert bytes(front.engine.last.prompt_ids) == f"<user>{inputs}\n<assistant>".encode()[-20:]
    reply = front.post("/generate", body(inputs, truncate=6, return_full_text=True)).json()
    assert reply["generated_text"] == inputs + "hi"


def test_decoder_input_details_tell_the_prompt_with_a_null_first():
    front = Front()
    reply = front.post("/generate", body(decoder_input_details=True)).json()
    assert front.engine.last.sampling.prompt_logprobs
    assert len(reply["details"]["tokens"]) == 3
    assert reply["details"]["prefill"] == [
        {"id": 97, "text": "a", "logprob": None},
        {"id": 98, "text": "b", "logprob": -0.25},
    ]


def test_best_of_returns_the_likeliest_per_token_and_the_others_in_details():
    front = Front(
        Answer(b"poor", logprob=-3.0), Answer(b"good", logprob=-0.1), Answer(b"fair", logprob=-1.0)
    )
    reply = front.post("/generate", body(best_of=3, do_sample=True, details=True)).json()
    assert reply["generated_text"] == "good"
    others = reply["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["poor", "fair"]
    keys = "generated_text finish_reason generated_tokens seed prefill tokens"
    assert list(others[0]) == keys.split()
    seeds = {stream.request.sampling.seed for stream in front.engine.streams}
    assert len(seeds) == 3
    assert reply["details"]["seed"] == front.engine.streams[1].request.sampling.seed


def test_an_apply_chat_template_prompt_is_rendered_as_one_user_message():
    front = Front()
    front.post("/generate", body("hey", apply_chat_template=True))
    assert bytes(front.engine.last.prompt_ids) == b"<user>hey\n<assistant>"


def test_a_prompt_begins_with_the_tokenizers_special_tokens_but_a_rendered_one_does_not():
    front = Front(text=tiny_tokenizers.with_bos(tiny_tokenizers.byte_level()))
    front.post("/generate", body("ab"))
    assert front.engine.last.prompt_ids == (256, 97, 98)
    front.post("/generate", body("ab", apply_chat_template=True))
    assert front.engine.last.prompt_ids[0] == ord("<")


# -- sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": None}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0, "do_sample": True, "top_k": 5}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": True}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"typical_p": 0.5}, 1.0),
    ],
)
def test_sampling_is_on_when_told_or_when_a_warper_is_set(parameters, temperature):
    front = Front()
    reply = front.post("/generate", body(**parameters, details=True)).json()
    assert front.engine.last.sampling.temperature == temperature
    assert (reply["details"]["seed"] is None) == (temperature == 0.0)


def test_every_sampling_parameter_reaches_the_engine():
    front = Front()
    wish = {
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.9,
        "typical_p": 0.8,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "seed": 2**64 - 1,
        "max_new_tokens": 7,
    }
    front.post("/generate", body(**wish, ignore_eos_token=True))
    sampling = front.engine.last.sampling
    assert {name: getattr(sampling, name) for name in wish} == wish
    assert sampling.ignore_eos


# -- streams --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "stream"), [("/", True), ("/invocations", True), ("/generate_stream", None)]
)
def test_a_stream_is_an_event_a_token_and_the_last_tells_the_whole(path, stream):
    response = Front(Answer(b"hi")).post(path, body(details=True, stream=stream))
    assert response.text.startswith('data:{"token":{')
    found = [json.loads(event) for event in events(response)]
    details = {
        "finish_reason": "eos_token",
        "prompt_tokens": 2,
        "generated_tokens": 3,
        "seed": None,
    }
    assert found == [
        {"token": token(104, "h"), "generated_text": None, "details": None},
        {"token": token(105, "i"), "generated_text": None, "details": None},
        {"token": token(257, "</s>", True), "generated_text": "hi", "details": details},
    ]
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-model-id"] == BASE


def test_a_stream_without_details_ends_with_null_details():
    last = json.loads(events(Front().post("/generate_stream", body()))[-1])
    assert last["generated_text"] == "hi"
    assert last["details"] is None


def test_the_token_that_completes_a_stop_string_is_the_streams_last():
    front = Front(Answer(b"abSTOPcd", ends=False, batch=3))
    response = front.post("/generate_stream", body(stop=["STOP"], details=True))
    found = [json.loads(event) for event in events(response)]
    assert "".join(event["token"]["text"] for event in found) == "abSTOP"
    assert found[-1]["generated_text"] == "abSTOP"
    assert found[-1]["details"]["finish_reason"] == "stop_sequence"


def test_characters_are_never_split_over_events():
    front = Front(Answer("h\u4f60\U0001f600".encode()))
    found = [json.loads(e) for e in events(front.post("/generate_stream", body()))]
    texts = [event["token"]["text"] for event in found if not event["token"]["special"]]
    assert texts == ["h", "", "", "\u4f60", "", "", "", "\U0001f600"]
    assert found[-1]["generated_text"] == "".join(texts)


def test_a_failure_in_mid_stream_is_one_error_event_and_the_end():
    front = Front(Answer(b"ab", ends=False, fails="engine_died"))
    response = front.post("/generate_stream", body())
    assert response.status_code == 200
    found = [json.loads(event) for event in events(response)]
    assert [event["token"]["text"] for event in found[:-1]] == ["a", "b"]
    assert found[-1] == {
        "error": "Request failed during generation: Server error: it broke",
        "error_type": "generation",
    }


@pytest.mark.parametrize(
    ("code", "status", "error_type"),
    [
        ("adapter_not_found", 404, "adapter_not_found"),
        ("adapter_invalid", 422, "validation"),
        ("adapter_capacity", 422, "validation"),
        ("context_too_long", 422, "validation"),
        ("bad_request", 422, "validation"),
        ("overloaded", 429, "overloaded"),
        ("engine_died", 424, "generation"),
        ("internal", 424, "generation"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_an_early_failure_has_its_own_status_streamed_or_not(path, code, status, error_type):
    response = Front(Answer(b"", ends=False, fails=code)).post(path, body())
    assert response.status_code == status
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == error_type
    assert response.json()["error"].endswith("it broke")
    assert ("retry-after" in response.headers) == (status == 429)


# -- refusals -------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "best_of"),
    ({"best_of": 5_000_000, "do_sample": True}, "best_of"),
    ({"best_of": 2}, "sampling"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"typical_p": 0.0}, "typical_p"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": -5}, "max_new_tokens"),
    ({"max_new_tokens": 63}, "max_new_tokens"),
    ({"max_new_tokens": 10**12}, "max_new_tokens"),
    ({"truncate": 0}, "truncate"),
    ({"truncate": 64}, "truncate"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a" * 257]}, "stop"),
    ({"watermark": True}, "watermark"),
    ({"return_k_alternatives": 2}, "return_k_alternatives"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "text", "schema": {"type": "object"}}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"merged_adapters": {"ids": ["a", "b"]}}, "merged_adapters"),
    ({"api_token": "secret"}, "api_token"),
    ({"adapter_source": "hub"}, "adapter_source"),
    ({"adapter_source": "s3"}, "adapter_source"),
    ({"adapter_source": "pbase"}, "adapter_source"),
    ({"top_k": 1.5}, "parameters.top_k"),
    ({"top_k": True}, "parameters.top_k"),
    ({"temperature": "hot"}, "parameters.temperature"),
    ({"stop": "x"}, "parameters.stop"),
    ({"stop": ["x", 1]}, "parameters.stop[1]"),
    ({"details": 1}, "parameters.details"),
    ({"adapter_id": 7}, "parameters.adapter_id"),
    ({"adapter_name": "french"}, "did you mean `adapter_id`"),
    ({"zzz": 1}, "parameters.zzz"),
]


@pytest.mark.parametrize(("parameters", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_acceptable_is_refused_by_name(parameters, named):
    front = Front()
    response = front.post("/generate", body(**parameters))
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert response.json()["error"].startswith("Input validation error: ")
    assert named in response.json()["error"]
    assert not front.engine.streams
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({}, "`inputs` is required"),
        ({"inputs": None}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": "a" * 64}, "at most 63 tokens. Given: 64"),
        ({"inputs": "a", "parameters": None}, "parameters"),
        ({"inputs": "a", "parameters": []}, "parameters"),
        ({"inputs": "a", "stream": "yes"}, "stream"),
        ({"inputs": "a", "stream": True}, "use /generate_stream"),
        ({"input": "a"}, "did you mean `inputs`"),
        ([], "JSON object"),
        ("text", "JSON object"),
        (7, "JSON object"),
    ],
)
def test_the_top_level_is_checked_as_strictly(sent, named):
    response = Front().post("/generate", sent)
    assert response.status_code == 422
    assert named in response.json()["error"]


def test_null_means_not_given_for_every_parameter():
    front = Front()
    names = [*CLIENT_PARAMETERS, "frequency_penalty", "presence_penalty", "apply_chat_template"]
    assert front.post("/generate", body(**dict.fromkeys(names))).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"best_of": 2, "do_sample": True}, "streaming"),
        ({"decoder_input_details": True}, "streaming"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_the_stream(parameters, named):
    response = Front().post("/generate_stream", body(**parameters))
    assert response.status_code == 422
    assert named in response.json()["error"]


def test_generate_stream_does_not_ignore_stream_false():
    assert Front().post("/generate_stream", body(stream=False)).status_code == 422


def test_a_base_without_a_template_refuses_to_apply_one():
    front = Front(text=tiny_tokenizers.byte_level(template=None))
    response = front.post("/generate", body(apply_chat_template=True))
    assert response.status_code == 422
    assert "no chat template" in response.json()["error"]


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "..",
        "../x",
        "a/../b",
        "/etc/passwd",
        "a\x00b",
        "a\\b",
        "a//b",
        "x" * 4096,
        "./a",
        "a\r\nb: c",
    ],
)
def test_a_name_that_is_no_adapters_gets_the_same_404_whatever_is_wrong_with_it(name):
    front = Front()
    for path in ("/", "/generate", "/generate_stream"):
        response = front.post(path, body(adapter_id=name))
        assert response.status_code == 404
        assert response.json()["error_type"] == "adapter_not_found"
        assert response.json()["error"].startswith("No adapter named '")
        assert response.json()["error"].endswith("; GET /v1/models lists what is served")
        assert len(response.text) < 400
    assert bool(front.engine.orders) == (name == "nobody")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_what_is_wrong_with_an_adapter_is_told_under_its_name(path):
    front = Front(Answer(b"", ends=False, fails="adapter_invalid"))
    error = front.post(path, body(adapter_id="french")).json()["error"]
    assert error == "Input validation error: adapter 'french': it broke"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("adapter_id", "parameters.adapter_id"),
        ("max_new_token", "parameters.max_new_tokens"),
        ("input", "inputs"),
        ("stream_", "stream"),
    ],
)
def test_a_parameter_beside_parameters_is_told_its_place(name, meant):
    response = Front().post("/generate", {**body(), name: "french"})
    assert response.status_code == 422
    assert f"did you mean `{meant}`?" in response.json()["error"]


def test_an_answer_of_no_tokens_is_told_the_context():
    error = Front().post("/generate", body(max_new_tokens=0)).json()["error"]
    assert error == "Input validation error: `max_new_tokens` must be between 1 and 64"


# -- tokenize -------------------------------------------------------------------------------


def test_tokenize_tells_ids_texts_and_places():
    front = Front(text=tiny_tokenizers.words())
    found = front.post("/tokenize", {"inputs": "t5  t6"}).json()
    assert found == [
        {"id": 5, "text": "t5", "start": 0, "stop": 2},
        {"id": 6, "text": "t6", "start": 4, "stop": 6},
    ]


def test_tokenize_adds_special_tokens_unless_told_not_to():
    front = Front(text=tiny_tokenizers.with_bos(tiny_tokenizers.byte_level()))
    assert [t["id"] for t in front.post("/tokenize", {"inputs": "a"}).json()] == [256, 97]
    sent = {"inputs": "a", "add_special_tokens": False}
    assert [t["id"] for t in front.post("/tokenize", sent).json()] == [97]


def test_tokenize_of_a_long_text_is_the_same_off_the_event_loop():
    text = "a\u4f60 " * 3000
    found = Front().post("/tokenize", {"inputs": text}).json()
    assert [t["id"] for t in found] == list(text.encode())


def test_tokenize_tells_what_the_chat_template_makes_of_messages():
    front = Front(
        text=tiny_tokenizers.with_bos(
            tiny_tokenizers.byte_level(
                template=(
                    "{{ tools | tojson if tools }}{% for m in messages %}"
                    "{{ m.role }}{{ m.x }}{% endfor %}"
                    "{{ add_generation_prompt }}"
                )
            )
        )
    )
    messages = [{"role": "tool", "x": {"y": 1}}]
    told = front.post("/tokenize", {"messages": messages}).json()
    assert told == {
        "prompt": (text := "tool{'y': 1}True"),
        "tokens": list(text.encode()),
        "count": 16,
    }
    sent = {"messages": messages, "tools": [{"a": 1}], "add_generation_prompt": False}
    assert front.post("/tokenize", sent).json()["prompt"] == "[{\"a\": 1}]tool{'y': 1}False"


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({}, "`inputs` is required"),
        ({"inputs": "a", "messages": [{"role": "user"}]}, "give one of them"),
        ({"inputs": "a", "tools": []}, "`tools` is for `messages`"),
        ({"inputs": "a", "add_generation_prompt": True}, "`add_generation_prompt` is for"),
        ({"messages": [{"content": "a"}]}, r"`messages[0].role` is required"),
        ({"messages": [{"role": "user"}], "add_special_tokens": True}, "names its special tokens"),
        (
            {"messages": [{"role": "user", "content": "a" * 99}]},
            "`messages` must have at most 128 tokens",
        ),
        ({"messages": [{"role": "x"}], "tools": [{"a": 1}]}, "chat template: no"),
    ],
)
def test_tokenize_refuses_what_is_neither_a_text_nor_messages(sent, says):
    template = "{% if tools %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    front = Front(text=tiny_tokenizers.byte_level(template=template))
    reply = front.post("/tokenize", sent)
    assert reply.status_code == 422
    assert says in reply.json()["error"]


def test_tokenize_of_messages_needs_a_chat_template():
    front = Front(text=tiny_tokenizers.byte_level(template=None))
    reply = front.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    assert "there is no chat template here" in reply.json()["error"]


# -- info -----------------------------------------------------------------------------------


def test_info_has_every_field_lorax_has():
    info = Front().get("/info").json()
    names = (
        "model_id model_sha model_dtype model_device_type model_pipeline_tag"
        " max_concurrent_requests max_best_of max_stop_sequences max_input_length"
        " max_total_tokens waiting_served_ratio max_batch_total_tokens max_waiting_tokens"
        " validation_workers eager_prefill version sha docker_label request_logger_url"
    )
    assert list(info)[:19] == names.split()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_length"]) == (BASE, 64, 63)


def test_several_requests_run_at_once():
    front = Front(Answer(b"ab", delay_s=0.05))

    async def work(client):
        return await asyncio.gather(*(client.post("/generate", json=body()) for _ in range(8)))

    responses = front.run(work)
    assert [r.json() for r in responses] == [{"generated_text": "ab"}] * 8
    assert len(front.engine.streams) == 8


def test_a_text_beyond_the_context_by_its_characters_is_refused_before_it_is_tokenized(monkeypatch):
    """Tokenizing 60 bodies of 1.9 MB took 2 GB of the router's memory and kept them."""
    front = Front()

    def tokenize(*_args, **_kwargs):
        raise AssertionError("tokenized")

    monkeypatch.setattr(TextModel, "encode", tokenize)
    reply = front.post("/generate", {"inputs": "x" * 1_900_000})
    assert reply.status_code == 422
    assert "1900000 characters" in reply.json()["error"]


def test_tokenize_refuses_a_text_whose_reply_would_be_huge():
    """2 MB of text gave a reply of 102 MB."""
    front = Front(max_tokenize_bytes=8)
    assert len(front.post("/tokenize", {"inputs": "a" * 8}).json()) == 8
    for text in ("a" * 9, "\u20ac" * 3):
        reply = front.post("/tokenize", {"inputs": text})
        assert reply.status_code == 422
        assert "`inputs` must have at most 8 bytes" in reply.json()["error"]


def test_tokenize_tells_every_token_of_a_long_text():
    text = "abc" * 5000
    found = Front().post("/tokenize", {"inputs": text}).json()
    assert [t["start"] for t in found] == list(range(15000))
    assert "".join(t["text"] for t in found) == text
    assert Front().post("/tokenize", {"inputs": ""}).json() == []


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "schema": {}}},
        {"response_format": {"type": "Text", "schema": None}},
        {"api_token": ""},
        {"adapter_source": ""},
        {"adapter_source": "local", "adapter_id": "french"},
    ],
)
def test_what_says_the_default_is_accepted(given: dict[str, Any]):
    assert Front().post("/generate", body(**given)).status_code == 200


def test_more_sequences_than_the_queue_holds_are_refused_for_good():
    """It was 429, whose caller tries again for ever."""
    front = Front(max_concurrent_requests=2)
    reply = front.post("/generate", body(best_of=3, do_sample=True))
    assert reply.status_code == 422
    assert "`best_of` asks for 3 sequences; this server's --max-queued is 2" in reply.text
    assert front.post("/generate", body(best_of=2, do_sample=True)).status_code == 200
