"""OpenAI's wire format: shapes, choices, log-probabilities, usage, chunks, refusals."""

import json
from typing import Any

import pytest

import tiny_tokenizers
from lory_router.openai_shapes import alternatives
from scripted_engine import BASE, Answer, Front, ScriptedEngine, events

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hey"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": USER, **more}


def completion(**more: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "ab", **more}


def chunks(response) -> list[dict[str, Any]]:
    found = events(response)
    assert found[-1] == "[DONE]"
    assert "data: " in response.text
    return [json.loads(event) for event in found[:-1]]


def sent_prompt(front: Front) -> bytes:
    return bytes(front.engine.last.prompt_ids)


# -- whole replies --------------------------------------------------------------------------


def test_a_chat_reply_has_openais_shape():
    response = Front(Answer(b"hi")).post(CHAT, chat())
    reply = response.json()
    assert reply.pop("id").startswith("chatcmpl-")
    assert reply.pop("created") > 1_700_000_000
    assert reply == {
        "object": "chat.completion",
        "model": BASE,
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 21,
            "completion_tokens": 3,
            "total_tokens": 24,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    assert response.headers["x-generated-tokens"] == "3"


def test_a_completion_reply_has_openais_shape():
    reply = Front(Answer(b"hi")).post(COMPLETIONS, completion()).json()
    assert reply.pop("id").startswith("cmpl-")
    assert reply.pop("created") > 1_700_000_000
    assert reply == {
        "object": "text_completion",
        "model": BASE,
        "system_fingerprint": None,
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


@pytest.mark.parametrize(
    ("model", "adapter_id"),
    [
        (BASE, ""),
        ("", ""),
        ("french", "french"),
        ("org/german", "org/german"),
        (f"{BASE}:french", "french"),
        (f"{BASE}:org/german", "org/german"),
    ],
)
def test_the_model_names_the_base_or_an_adapter(model: str, adapter_id: str):
    front = Front()
    response = front.post(CHAT, chat(model=model))
    assert response.status_code == 200
    assert front.engine.last.adapter_id == adapter_id
    assert response.json()["model"] == (model or BASE)
    assert response.headers.get("x-adapter-id", "") == adapter_id


@pytest.mark.parametrize("model", ["nobody", f"{BASE}:", f"{BASE}:nobody", "..", "/etc", "a\x00"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404(model: str, stream: bool):
    response = Front().post(CHAT, chat(model=model, stream=stream))
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("model_not_found", "invalid_request_error")
    assert error["param"] == "model"
    assert error["message"].endswith(
        f"GET /v1/models lists what is served; the base is called '{BASE}'"
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
    ],
)
def test_a_prompt_is_texts_or_token_ids_one_or_many(prompt, prompts):
    front = Front(Answer(b"x"))
    reply = front.post(COMPLETIONS, completion(prompt=prompt)).json()
    assert [bytes(s.request.prompt_ids) for s in front.engine.streams] == prompts
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(prompts)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert reply["usage"]["completion_tokens"] == 2 * len(prompts)


def test_defaults_are_openais():
    front = Front()
    front.post(COMPLETIONS, completion())
    sampling = front.engine.last.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (1.0, 1.0, 16)
    front.post(CHAT, chat())
    assert front.engine.last.sampling.max_new_tokens == 64 - 21


def test_every_sampling_parameter_reaches_the_engine():
    front = Front()
    wish = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "typical_p": 0.5,
        "repetition_penalty": 1.25,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "seed": 11,
        "stop_token_ids": [65],
        "ignore_eos": True,
    }
    front.post(COMPLETIONS, completion(**wish, max_tokens=5, logit_bias={"97": -100, "98": 2.5}))
    sampling = front.engine.last.sampling
    assert {k: getattr(sampling, k) for k in wish} == wish | {"stop_token_ids": (65,)}
    assert sampling.max_new_tokens == 5
    assert sampling.logit_bias == ((97, -100.0), (98, 2.5))


def test_openais_whole_ranges_of_seed_and_top_p_are_taken():
    front = Front()
    assert front.post(CHAT, chat(seed=-1, top_p=0)).status_code == 200
    sampling = front.engine.last.sampling
    assert sampling.seed == 2**64 - 1
    assert 0 < sampling.top_p < 1e-5


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_can_be_off(off):
    front = Front()
    assert front.post(COMPLETIONS, completion(top_k=off)).status_code == 200
    assert front.engine.last.sampling.top_k == 0


def test_max_completion_tokens_goes_before_max_tokens():
    front = Front(Answer(b"abcdef"))
    reply = front.post(CHAT, chat(max_completion_tokens=2, max_tokens=5)).json()
    assert reply["choices"][0]["message"]["content"] == "ab"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert front.engine.last.sampling.max_new_tokens == 2


def test_n_gives_choices_of_different_seeds_and_counts_the_prompt_once():
    front = Front(Answer(b"a"), Answer(b"b"), Answer(b"c"))
    reply = front.post(CHAT, chat(n=3, seed=2**64 - 1)).json()
    assert [c["message"]["content"] for c in reply["choices"]] == ["a", "b", "c"]
    seeds = [s.request.sampling.seed for s in front.engine.streams]
    assert seeds == [2**64 - 1, 0, 1]
    assert reply["usage"]["prompt_tokens"] == 21
    assert reply["usage"]["completion_tokens"] == 6


def test_best_of_shows_the_likeliest_and_counts_all():
    front = Front(Answer(b"aa", logprob=-2), Answer(b"b", logprob=-1), Answer(b"c", logprob=-3))
    reply = front.post(COMPLETIONS, completion(best_of=3, n=2)).json()
    assert [c["text"] for c in reply["choices"]] == ["b", "aa"]
    assert reply["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("stop", ["STOP", ["STOP"], ["zzz", "STOP"]])
def test_a_stop_string_and_what_follows_is_stripped(stop):
    front = Front(Answer(b"one STOP two", ends=False, batch=3))
    reply = front.post(COMPLETIONS, completion(stop=stop)).json()
    assert reply["choices"][0]["text"] == "one "
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 8
    assert front.engine.streams[0].cancels


def test_stop_null_is_no_stop():
    assert Front().post(COMPLETIONS, completion(stop=None)).status_code == 200


def test_a_stop_token_ends_the_answer_and_has_no_text():
    front = Front(Answer(b"abcd", ends=False))
    reply = front.post(COMPLETIONS, completion(stop_token_ids=[99])).json()
    assert reply["choices"][0]["text"] == "ab"
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_echo_puts_the_prompt_first():
    reply = Front().post(COMPLETIONS, completion(echo=True)).json()
    assert reply["choices"][0]["text"] == "abhi"


def test_echo_scores_the_prompt_alone_with_max_tokens_0():
    front = Front()
    wish = completion(prompt=[97, 98, 99], echo=True, max_tokens=0, logprobs=0)
    reply = front.post(COMPLETIONS, wish).json()
    assert reply["choices"][0]["text"] == "abc"
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.25, -0.25],
        "top_logprobs": None,
        "text_offset": [0, 1, 2],
    }
    assert reply["usage"]["completion_tokens"] == 0
    assert front.engine.last.sampling.prompt_logprobs


def test_echo_reports_alternatives_beside_every_token_as_evaluation_harnesses_need():
    """A harness takes an answer for greedy where each token's probability is the largest."""
    wish = completion(prompt=[97, 98, 99], echo=True, max_tokens=1, logprobs=2, temperature=0)
    logprobs = Front().post(COMPLETIONS, wish).json()["choices"][0]["logprobs"]
    first, *rest = logprobs["top_logprobs"]
    assert first is None
    assert logprobs["token_logprobs"][0] is None
    assert len(rest) == len(logprobs["tokens"]) - 1
    for token, logprob, top in zip(
        logprobs["tokens"][1:3], logprobs["token_logprobs"][1:3], rest, strict=False
    ):
        assert top[token] == logprob
        assert max(top.values()) == -0.125


def test_echo_scores_prompt_and_answer_in_one_list():
    wish = completion(echo=True, logprobs=0)
    found = Front().post(COMPLETIONS, wish).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "h", "i"]
    assert found["token_logprobs"] == [None, -0.25, -0.5, -0.5]
    assert found["text_offset"] == [0, 1, 2, 3]


def test_completion_logprobs_hold_the_alternatives_and_the_chosen():
    front = Front(Answer(b"a\xe4"))
    found = front.post(COMPLETIONS, completion(logprobs=2)).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", r"bytes:\xe4"]
    assert found["token_logprobs"] == [-0.5, -0.5]
    assert found["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    assert found["text_offset"] == [0, 1]
    assert front.engine.last.sampling.num_top_logprobs == 2


def test_tokens_that_are_no_whole_characters_keep_apart():
    """Each read as the replacement character, and the last one took the others' place."""
    front = Front(Answer(b"\xe4"))
    found = front.post(COMPLETIONS, completion(logprobs=3)).json()["choices"][0]["logprobs"]
    names = [r"bytes:\xe4", r"bytes:\xe5", r"bytes:\xe6"]
    assert found["top_logprobs"][0] == dict(zip(names, (-0.5, -1.5, -2.5), strict=True))


def test_of_two_tokens_that_read_the_same_the_likelier_is_told():
    text = tiny_tokenizers.sentence_pieces()
    a, spaced_a = text.tokenizer.token_to_id("a"), text.tokenizer.token_to_id("\u2581a")
    top = ((spaced_a, -0.1), (a, -3.0))
    assert alternatives(a, -3.0, top, text) == {"a": -0.1}


def test_chat_logprobs_have_exact_bytes():
    front = Front(Answer("\u00e9".encode()))
    wish = chat(logprobs=True, top_logprobs=1)
    found = front.post(CHAT, wish).json()["choices"][0]["logprobs"]
    assert [entry["bytes"] for entry in found["content"]] == [[0xC3], [0xA9]]
    entry = found["content"][0]
    assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
    assert entry["top_logprobs"] == [{"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}]
    assert found["refusal"] is None


def test_logprobs_end_where_the_text_ends():
    front = Front(Answer(b"abSTOP", ends=False))
    reply = front.post(CHAT, chat(logprobs=True, stop="STOP")).json()
    tokens = [entry["token"] for entry in reply["choices"][0]["logprobs"]["content"]]
    assert tokens == ["a", "b"]


def test_minus_infinity_is_openais_stand_in():
    front = Front(Answer(b"a", logprob=float("-inf")))
    reply = front.post(CHAT, chat(logprobs=True)).json()
    assert reply["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


# -- messages -------------------------------------------------------------------------------


def test_messages_are_rendered_with_the_bases_template():
    front = Front()
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None, "audio": None},
        {"role": "user", "content": "d", "name": "ann"},
    ]
    front.post(CHAT, chat(messages=messages))
    assert sent_prompt(front) == b"<system>be\n<user>a\nb\n<assistant>c\n<user>d\n<assistant>"


def test_template_options_reach_the_template():
    from lory_router.chat_template import ChatTemplate
    from lory_router.text import TextModel

    template = ChatTemplate(
        "{{ messages[0].content }}{{ mood }}{{ eos_token }}", {"eos_token": "E"}
    )
    front = Front(text=TextModel(tiny_tokenizers.byte_level().tokenizer, template))
    front.post(CHAT, chat(chat_template_kwargs={"mood": "!"}))
    assert sent_prompt(front) == b"hey!E"
    response = front.post(CHAT, chat(chat_template_kwargs={"messages": []}))
    assert response.json()["error"]["param"] == "chat_template_kwargs"


def test_the_templates_own_complaint_is_told():
    text = tiny_tokenizers.byte_level(template="{{ raise_exception('roles must alternate') }}")
    response = Front(text=text).post(CHAT, chat())
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


def test_a_base_without_a_template_points_to_completions():
    response = Front(text=tiny_tokenizers.byte_level(template=None)).post(CHAT, chat())
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


# -- streams --------------------------------------------------------------------------------


def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason_and_done():
    found = chunks(Front(Answer(b"hi")).post(CHAT, chat(stream=True)))
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in found}) == 1
    deltas = [chunk["choices"][0] for chunk in found]
    assert [d["delta"] for d in deltas] == [
        {"role": "assistant", "content": ""},
        {"content": "h"},
        {"content": "i"},
        {},
    ]
    assert [d["finish_reason"] for d in deltas] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in found)


def test_a_completion_stream_joins_to_the_whole():
    found = chunks(Front(Answer(b"hello", batch=2)).post(COMPLETIONS, completion(stream=True)))
    assert {chunk["object"] for chunk in found} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None, None, "stop"]


def test_what_may_begin_a_stop_string_is_held_back():
    front = Front(Answer(b"aSTaSTOPb", ends=False))
    found = chunks(front.post(COMPLETIONS, completion(stream=True, stop="STOP")))
    texts = [chunk["choices"][0]["text"] for chunk in found]
    assert texts == ["a", "", "", "STa", "", "", "", ""]
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_held_text_is_told_when_no_stop_string_comes():
    front = Front(Answer(b"aST"))
    found = chunks(front.post(CHAT, chat(stream=True, stop="STOP")))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found) == "aST"


def test_streamed_logprobs_go_with_their_text():
    front = Front(Answer(b"aSTb", batch=1))
    found = chunks(front.post(CHAT, chat(stream=True, stop="STOP", logprobs=True)))
    told = []
    for chunk in found:
        choice = chunk["choices"][0]
        content = choice["logprobs"]["content"] if choice["logprobs"] else []
        told.append((choice["delta"].get("content", ""), [e["token"] for e in content]))
    assert told[1:-1] == [("a", ["a"]), ("", []), ("", []), ("STb", ["S", "T", "b"])]


def test_usage_comes_last_when_asked_for():
    wish = chat(stream=True, stream_options={"include_usage": True})
    found = chunks(Front().post(CHAT, wish))
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 3
    assert found[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_continuous_usage_counts_along():
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chunks(Front().post(COMPLETIONS, completion(stream=True, stream_options=options)))
    assert [chunk["usage"]["completion_tokens"] for chunk in found] == [1, 2, 3, 3]


def test_streamed_choices_of_several_prompts_and_n_are_told_apart():
    front = Front(Answer(b"ab"), Answer(b"cd"), Answer(b"ef"), Answer(b"gh"))
    wish = completion(prompt=["x", "y"], n=2, stream=True)
    texts = {0: "", 1: "", 2: "", 3: ""}
    reasons = {}
    for chunk in chunks(front.post(COMPLETIONS, wish)):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "ab", 1: "cd", 2: "ef", 3: "gh"}
    assert set(reasons) == {0, 1, 2, 3}


def test_one_failing_choice_ends_the_stream_with_an_error_and_frees_the_others():
    failing = Answer(b"a", ends=False, fails="engine_died", delay_s=0.02)
    front = Front(failing, Answer(b"b", repeats=True, delay_s=0.005, ends=False))
    response = front.post(CHAT, chat(stream=True, n=2))
    assert response.status_code == 200
    last = json.loads(events(response)[-1])
    assert last["error"]["type"] == "server_error"
    assert last["error"]["code"] == "generation"
    assert all(stream.cancels for stream in front.engine.streams)


# -- refusals -------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "foo": 1}]}]},
        "messages[0].content[0].foo",
    ),
    (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    (
        CHAT,
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
        "messages[0].tool_call_id",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    (CHAT, {"model": None}, "model"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 5_000_000}, "n"),
    (CHAT, {"temperature": 2.5}, "temperature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"top_p": 1.1}, "top_p"),
    (CHAT, {"typical_p": 0}, "typical_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"frequency_penalty": 3}, "frequency_penalty"),
    (CHAT, {"presence_penalty": -2.5}, "presence_penalty"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"seed": 2**64}, "seed"),
    (CHAT, {"seed": -(2**63) - 1}, "seed"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_tokens": 60}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 60}, "max_completion_tokens"),
    (CHAT, {"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
    (
        CHAT,
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
    ),
    (CHAT, {"top_logprobs": 5}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"7": 1, "07": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"\u0663": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"258": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"97": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": {"97": None}}, "logit_bias"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": ["a"] * 500}, "stop"),
    (CHAT, {"stop": 5}, "stop"),
    (CHAT, {"stop_token_ids": [258]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": [1] * 65}, "stop_token_ids"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"functions": [{}]}, "functions"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"web_search_options": {}}, "web_search_options"),
    (CHAT, {"prediction": {}}, "prediction"),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
    (CHAT, {"adapter_name": "french"}, "adapter_name"),
    (CHAT, {"adapter_id": "french"}, "adapter_id"),
    (CHAT, {"adapter_source": "hub"}, "adapter_source"),
    (CHAT, {"lora_path": "french"}, "lora_path"),
    (CHAT, {"min_tokens": 5}, "min_tokens"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [True]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [258]}, "prompt"),
    (COMPLETIONS, {"prompt": [2**70]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 65}, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 64}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 63}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 10**12}, "max_tokens"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
    (COMPLETIONS, {"echo": True, "stream": True}, "echo"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": ["a"] * 64, "n": 4}, "n"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"max_completion_tokens": 5}, "max_completion_tokens"),
    (COMPLETIONS, {"top_logprobs": 5}, "top_logprobs"),
    (COMPLETIONS, {"max_new_tokens": 5}, "max_new_tokens"),
    (CHAT, {"best_of": 2}, "best_of"),
    (CHAT, {"echo": True}, "echo"),
    (CHAT, {"truncate": 5}, "truncate"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (COMPLETIONS, {"guided_json": {}}, "guided_json"),
]


@pytest.mark.parametrize(("path", "wish", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_not_acceptable_is_refused_by_name(path, wish, param):
    front = Front()
    sent = {**(chat() if path == CHAT else completion()), **wish}
    response = front.post(path, sent)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert f"`{param.split('[')[0].split('.')[0]}" in error["message"]
    assert not front.engine.streams


def test_the_field_of_another_route_is_told_under_its_name_here():
    response = Front().post(CHAT, chat(adapter_id="french"))
    assert "`adapter_id` is not a field of this route; it is called `model`" in response.text


def test_a_missing_model_is_named():
    response = Front().post(CHAT, {"messages": USER})
    assert response.json()["error"]["param"] == "model"


HARMLESS = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "in_memory",
    "safety_identifier": "s",
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "none",
    "verbosity": "medium",
    "min_p": 0.0,
    "priority": 0,
    "response_format": {"type": "text"},
    "audio": None,
    "best_of": None,
    "echo": False,
    "suffix": "",
    "lora_path": BASE,
    "adapter_source": "local",
}


@pytest.mark.parametrize(("path", "sent"), [(CHAT, chat()), (COMPLETIONS, completion())])
def test_fields_without_effect_are_accepted(path: str, sent: dict[str, Any]):
    assert Front().post(path, {**HARMLESS, **sent}).status_code == 200


@pytest.mark.parametrize(
    ("path", "name", "hint"),
    [
        (CHAT, "max_token", "did you mean `max_tokens`?"),
        (CHAT, "temprature", "did you mean `temperature`?"),
        (CHAT, "safety_identifer", "did you mean `safety_identifier`?"),
        (CHAT, "max_completion_token", "did you mean `max_completion_tokens`?"),
        (COMPLETIONS, "max_completion_token", "did you mean `max_tokens`?"),
        (COMPLETIONS, "adapter", "did you mean `model`?"),
        (COMPLETIONS, "frob", "known are adapter_source, api_token, best_of, echo, "),
        (COMPLETIONS, "we,ird\r\n\u00e9", r"unknown field 'we,ird\r\n\xe9'"),
    ],
)
def test_a_field_that_nobody_knows_is_refused_with_the_likely_one(path: str, name: str, hint: str):
    """It was ignored, and told in a header alone."""
    front = Front()
    sent = {**(chat() if path == CHAT else completion()), name: 1}
    response = front.post(path, sent)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == name
    assert error["message"].startswith("unknown field ")
    assert hint in error["message"]
    assert not front.engine.streams


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"guided_json": {}}, "`guided_json` is not supported yet"),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported yet"),
        ({"tool_choice": "auto"}, "`tool_choice` is not supported yet"),
        ({"store": True}, "`store` is not supported yet"),
        ({"min_p": 0.1}, "`min_p` is not supported yet"),
        (
            {"service_tier": "flex"},
            '`service_tier` other than "auto" or "default" is not supported yet',
        ),
        ({"modalities": ["audio"]}, '`modalities` other than ["text"] is not supported yet'),
        (
            {"skip_special_tokens": False},
            "`skip_special_tokens` other than true is not supported yet",
        ),
    ],
)
def test_a_field_that_is_not_served_is_refused_in_plain_words(
    wish: dict[str, object], message: str
):
    """No value of `guided_json` helps, but the refusal spoke of "this value"."""
    response = Front().post(CHAT, chat(**wish))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message


def test_a_context_too_long_has_openais_code():
    response = Front().post(COMPLETIONS, completion(prompt="a" * 64))
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("adapter_not_found", 404, "model_not_found"),
        ("adapter_invalid", 400, "adapter_invalid"),
        ("adapter_capacity", 400, "adapter_capacity"),
        ("context_too_long", 400, "context_length_exceeded"),
        ("bad_request", 400, "invalid_value"),
        ("overloaded", 429, "overloaded"),
        ("engine_died", 500, "generation"),
        ("internal", 500, "generation"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_early_failure_has_its_own_status_streamed_or_not(code, status, told, stream):
    front = Front(Answer(b"", ends=False, fails=code))
    response = front.post(CHAT, chat(stream=stream))
    assert response.status_code == status
    assert response.json()["error"]["code"] == told
    assert ("retry-after" in response.headers) == (status == 429)


@pytest.mark.parametrize(
    ("wish", "param"),
    [({"prompt": ["a"] * 3}, "prompt"), ({"n": 3}, "n"), ({"best_of": 4}, "best_of")],
)
def test_more_sequences_than_the_queue_holds_are_refused_for_good(wish, param):
    """It was 429, whose caller tries again for ever."""
    response = Front(max_concurrent_requests=2).post(COMPLETIONS, completion(**wish))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert "--max-queued is 2" in error["message"]


# -- models ---------------------------------------------------------------------------------


def test_models_are_the_base_and_its_adapters():
    found = Front().get("/v1/models").json()
    assert found["object"] == "list"
    assert [card["id"] for card in found["data"]] == [BASE, "french", "org/german"]
    assert [card["parent"] for card in found["data"]] == [None, BASE, BASE]
    assert all(card["object"] == "model" and card["owned_by"] for card in found["data"])


@pytest.mark.parametrize("name", [BASE, "french", "org/german"])
def test_a_model_is_found_by_its_name(name: str):
    assert Front().get(f"/v1/models/{name}").json()["id"] == name


@pytest.mark.parametrize("name", ["nobody", "org", "%2e%2e", f"{BASE}:nobody"])
def test_a_model_that_is_not_there_is_404(name: str):
    response = Front().get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_an_adapter_called_as_the_base_is_listed_under_a_name_that_reaches_it():
    """It was listed twice, and either name asked the base."""
    engine = ScriptedEngine(adapters=("french", BASE, f"{BASE}:x"))
    front = Front(engine=engine)
    names = [card["id"] for card in front.get("/v1/models").json()["data"]]
    assert names == [BASE, "french", f"{BASE}:{BASE}", f"{BASE}:{BASE}:x"]
    for name, adapter_id in zip(names, ("", *engine.adapters), strict=True):
        assert front.get(f"/v1/models/{name}").json()["id"] == name
        assert front.post(CHAT, chat(model=name)).status_code == 200
        assert front.engine.last.adapter_id == adapter_id
    front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": BASE}})
    assert front.engine.last.adapter_id == BASE
