"""Published clients and our own against a real `lory serve` of the demo's base and adapters.

Each published client runs in an environment of its own and prints what it saw; the judging is
here. Nothing is skipped: a server that does not start, or an environment that cannot be made,
fails the tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import lory_client
from clients import environments, server_process
from lory_router.schemas_openai import (
    HARMLESS,
    NOT_SERVED,
    OF_OTHER_ROUTES,
    ChatBody,
    CommonBody,
    CompletionBody,
)

PROMPT = "The order arrived late and the box was damaged"


@dataclass(frozen=True)
class LiveServer:
    url: str
    base: str
    adapter: str


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log_path = tmp_path_factory.mktemp("serve") / "log"
    with server_process.serving(log_path) as url:
        with lory_client.Client(url) as client:
            models = client.models()
        base = next(m.id for m in models if m.parent is None)
        adapter = next(m.id for m in models if m.parent == base)
        yield LiveServer(url, base, adapter)


@pytest.fixture(scope="session")
def lorax(live_server: LiveServer) -> dict[str, Any]:
    return environments.run_script("lorax", live_server.url, live_server.adapter)


@pytest.fixture(scope="session")
def openai(live_server: LiveServer) -> dict[str, Any]:
    return environments.run_script("openai", live_server.url, live_server.base, live_server.adapter)


def token_text(tokens: list[Any]) -> str:
    return "".join(text for _, text, _, special in tokens if not special)


# -- lorax-client -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["adapter", "base"])
def test_lorax_generates_with_consistent_details(lorax: dict[str, Any], which: str):
    seen = lorax["plain"][which]
    assert seen["text"] == token_text(seen["tokens"]) != ""
    assert seen["generated_tokens"] == len(seen["tokens"]) <= 12
    assert (seen["finish_reason"] == "length") == (len(seen["tokens"]) == 12)
    assert all(logprob <= 0.0 for _, _, logprob, _ in seen["tokens"])
    assert seen["prompt_tokens"] > 0
    assert (seen["prefill"], seen["seed"]) == ([], None)


def test_lorax_gets_the_adapter_it_names(lorax: dict[str, Any]):
    again = lorax["plain"]["adapter_again"]
    assert again["text"] == lorax["plain"]["adapter"]["text"]
    assert lorax["plain"]["adapter"]["tokens"] != lorax["plain"]["base"]["tokens"]


@pytest.mark.parametrize("which", ["adapter", "base"])
def test_lorax_streams_what_it_generates(lorax: dict[str, Any], which: str):
    whole, stream = lorax["plain"][which], lorax["plain"][f"{which}_stream"]
    assert [t[:2] for t in stream["tokens"]] == [t[:2] for t in whole["tokens"]]
    assert (stream["text"], stream["early_texts"]) == (whole["text"], 0)
    assert stream["finish_reason"] == whole["finish_reason"]
    assert stream["generated_tokens"] == whole["generated_tokens"]


def test_lorax_stop_strings_end_the_text_and_stay_in_it(lorax: dict[str, Any]):
    stopped, stop = lorax["parameters"]["stopped"], lorax["parameters"]["stop"]
    assert stop
    assert stopped["finish_reason"] == "stop_sequence"
    assert stopped["text"] == stop
    assert stopped["generated_tokens"] == 2


def test_lorax_prompt_details_cover_the_prompt(lorax: dict[str, Any]):
    seen = lorax["parameters"]["prefill"]
    assert len(seen["prefill"]) == seen["prompt_tokens"]
    first, *others = [logprob for _, _, logprob in seen["prefill"]]
    assert first is None
    assert others
    assert all(logprob <= 0.0 for logprob in others)
    assert seen["text"] == lorax["plain"]["adapter"]["text"]


def test_lorax_parameters_do_what_they_say(lorax: dict[str, Any]):
    seen, text = lorax["parameters"], lorax["plain"]["adapter"]["text"]
    assert seen["full_text"]["text"] == PROMPT + text
    assert seen["ignore_eos"]["generated_tokens"] == 40
    assert seen["ignore_eos"]["finish_reason"] == "length"
    assert seen["truncated"]["prompt_tokens"] == 3
    assert seen["no_details"] is True
    assert seen["warped"]["generated_tokens"] > 0


def test_lorax_seeds_repeat_a_draw(lorax: dict[str, Any]):
    seven, again, eight = lorax["parameters"]["seeded"]
    assert seven["text"] == again["text"]
    assert (seven["seed"], eight["seed"]) == (7, 8)
    assert seven["tokens"] != eight["tokens"]


def test_lorax_best_of_gives_the_other_sequence_too(lorax: dict[str, Any]):
    best, others = lorax["parameters"]["best"], lorax["parameters"]["best_others"]
    assert len(others) == 1
    text, reason, num_tokens = others[0]
    assert num_tokens > 0
    assert reason in ("length", "eos_token", "stop_sequence")
    assert text != best["text"]


def test_lorax_parameters_not_served_are_refused_by_name(lorax: dict[str, Any]):
    alternatives, watermark = lorax["parameters"]["refused"]
    assert (alternatives[0], watermark[0]) == ("ValidationError", "ValidationError")
    assert "return_k_alternatives" in alternatives[1]
    assert "watermark" in watermark[1]


def test_lorax_merges_adapters_by_their_sum(lorax: dict[str, Any]):
    merged, plain = lorax["merged"], lorax["plain"]
    assert merged["halves"]["text"] == merged["ties"]["text"] == plain["adapter"]["text"]
    assert merged["nothing"]["text"] == plain["base"]["text"]
    assert merged["pruned"][0] == "ValidationError"
    assert "merged_adapters.density" in merged["pruned"][1]


def test_lorax_errors_come_as_its_own_classes(lorax: dict[str, Any]):
    seen = lorax["errors"]
    assert seen["unknown_adapter"][0] == seen["unknown_adapter_stream"][0] == "NotFoundError"
    assert "no-such-adapter" in seen["unknown_adapter"][1]
    assert seen["validation"][0] == seen["validation_stream"][0] == "ValidationError"
    assert "max_new_tokens" in seen["validation"][1]
    assert seen["too_long"][0] == "ValidationError"
    assert seen["after_errors"]


def test_lorax_async_client_sees_the_same(lorax: dict[str, Any]):
    seen, plain = lorax["async"], lorax["plain"]
    assert [t[:2] for t in seen["adapter"]["tokens"]] == [t[:2] for t in plain["adapter"]["tokens"]]
    assert seen["adapter_stream"]["text"] == plain["adapter"]["text"]
    assert seen["each"] == plain["each"]
    assert seen["unknown_adapter"][0] == "NotFoundError"
    assert seen["validation"][0] == "ValidationError"


# -- openai -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "kind"), [("completions", CompletionBody), ("chats", ChatBody)])
def test_openai_sends_no_field_that_is_unknown_here(
    openai: dict[str, Any], route: str, kind: type[CommonBody]
):
    assert "logit_bias" in openai["fields"][route]
    known = {*kind.__struct_fields__, *HARMLESS, *NOT_SERVED, *OF_OTHER_ROUTES}
    assert set(openai["fields"][route]) <= known


def test_openai_lists_the_base_and_its_adapters(openai: dict[str, Any], live_server: LiveServer):
    assert {live_server.base, live_server.adapter} <= set(openai["models"]["ids"])
    assert openai["models"]["retrieved"] == live_server.adapter
    assert openai["models"]["missing"]["type"] == "NotFoundError"


def check_usage(seen: dict[str, Any]) -> None:
    num_prompt, num_generated, num_total = seen["usage"]
    assert num_prompt > 0
    assert num_generated > 0
    assert num_total == num_prompt + num_generated


def test_openai_completions_have_their_shape(openai: dict[str, Any], live_server: LiveServer):
    seen = openai["completions"]["text"]
    check_usage(seen)
    assert (seen["object"], seen["model"]) == ("text_completion", live_server.adapter)
    assert seen["created"] > 1_700_000_000
    assert (seen["indices"], len(seen["id"]) > 6) == ([0], True)
    assert seen["texts"][0]
    assert seen["finish_reasons"][0] in ("stop", "length")


def test_openai_gets_the_model_it_names(openai: dict[str, Any], live_server: LiveServer):
    base = openai["completions"]["base"]
    assert base["model"] == live_server.base
    assert base["texts"] != openai["completions"]["text"]["texts"]


def test_openai_token_ids_are_a_prompt_too(openai: dict[str, Any]):
    ids, text = openai["completions"]["ids"], openai["completions"]["text"]
    assert (ids["texts"], ids["usage"]) == (text["texts"], text["usage"])


def test_openai_prompts_of_a_batch_are_answered_in_order(openai: dict[str, Any]):
    batch, each = openai["completions"]["batch"], openai["completions"]["each"]
    assert batch["indices"] == [0, 1]
    assert all(long.startswith(short) for long, short in zip(batch["texts"], each[:2], strict=True))


@pytest.mark.parametrize("route", ["completions", "chats"])
def test_openai_n_draws_twice_and_a_seed_repeats_it(openai: dict[str, Any], route: str):
    two, again = openai[route]["two"], openai[route]["two_again"]
    assert len(two["texts"]) == 2
    assert two["texts"][0] != two["texts"][1]
    assert two["texts"] == again["texts"]


def test_openai_stop_strings_are_left_out(openai: dict[str, Any]):
    text, stop = openai["completions"]["text"]["texts"][0], openai["completions"]["stop"]
    stopped = openai["completions"]["stopped"]
    assert stop
    assert stopped["texts"] == [text[: text.index(stop)]]
    assert stopped["finish_reasons"] == ["stop"]


def test_openai_completion_logprobs_fit_the_tokens(openai: dict[str, Any]):
    seen = openai["completions"]["logprobs"]
    assert len(seen["tokens"]) == len(seen["values"]) == len(seen["tops"]) > 0
    assert "".join(seen["tokens"]) == openai["completions"]["text"]["texts"][0]
    assert all(value <= 0.0 for value in seen["values"])
    assert all(
        len(top) >= 2 and top[-1] == pytest.approx(value, abs=1e-3)
        for top, value in zip(seen["tops"], seen["values"], strict=True)
    )


@pytest.mark.parametrize(
    ("route", "object_name"),
    [("completions", "text_completion"), ("chats", "chat.completion.chunk")],
)
def test_openai_streams_what_it_completes(openai: dict[str, Any], route: str, object_name: str):
    stream, whole = openai[route]["stream"], openai[route]["text"]
    assert stream["text"] == whole["texts"][0]
    assert stream["finish_reasons"] == whole["finish_reasons"]
    assert stream["usage"] == whole["usage"]
    assert (stream["objects"], stream["last_has_choices"]) == ([object_name], False)


def test_openai_streams_come_as_they_are_generated(openai: dict[str, Any]):
    assert openai["completions"]["stream"]["long"] > 10


def test_openai_chats_have_their_shape(openai: dict[str, Any], live_server: LiveServer):
    seen = openai["chats"]["text"]
    check_usage(seen)
    assert (seen["object"], seen["model"]) == ("chat.completion", live_server.adapter)
    assert (seen["roles"], openai["chats"]["stream"]["role"]) == (["assistant"], "assistant")
    assert seen["texts"][0]
    assert openai["chats"]["request_id"]
    assert openai["chats"]["base"]["texts"] != seen["texts"]


def test_openai_chats_take_their_newer_fields(openai: dict[str, Any]):
    whole = openai["chats"]["text"]["texts"]
    assert openai["chats"]["newer_limit"]["texts"] == whole
    assert openai["chats"]["parts"]["texts"] == whole


def test_openai_chat_logprobs_fit_the_tokens(openai: dict[str, Any]):
    seen = openai["chats"]["logprobs"]
    assert "".join(token for token, _, _ in seen) == openai["chats"]["text"]["texts"][0]
    for _, logprob, tops in seen:
        assert len(tops) == 2
        assert tops[0] == pytest.approx(logprob, abs=1e-3)


def test_openai_may_leave_a_stream_early(openai: dict[str, Any]):
    assert openai["left_early"] == openai["completions"]["text"]["texts"][0]


def test_openai_errors_come_as_its_own_classes(openai: dict[str, Any]):
    seen = openai["errors"]
    for name in ("unknown_model", "unknown_model_stream", "unknown_chat_model"):
        assert (seen[name]["type"], seen[name]["code"]) == ("NotFoundError", "model_not_found")
        assert seen[name]["param"] == "model"
    assert (seen["too_hot"]["type"], seen["too_hot"]["param"]) == ("BadRequestError", "temperature")
    assert seen["no_messages"]["type"] == "BadRequestError"
    assert seen["unknown_path"]["type"] == "NotFoundError"


def test_openai_concurrent_requests_get_their_own_answers(openai: dict[str, Any]):
    seen = openai["async"]
    assert seen["each"] == openai["completions"]["each"]
    assert len(set(seen["crowd"])) == 1
    assert openai["completions"]["text"]["texts"][0].startswith(seen["crowd"][0])
    assert seen["stream"] == openai["chats"]["text"]["texts"][0]


# -- lory-client ------------------------------------------------------------------------------


@pytest.fixture
def ours(live_server: LiveServer) -> Iterator[lory_client.Client]:
    with lory_client.Client(live_server.url) as client:
        yield client


def test_ours_generates_and_streams_the_same(ours: lory_client.Client, live_server: LiveServer):
    whole = ours.generate(PROMPT, live_server.adapter, max_new_tokens=12)
    with ours.generate_stream(PROMPT, live_server.adapter, max_new_tokens=12) as stream:
        ids = [token.id for token in stream]
    assert ids == [token.id for token in whole.tokens]
    assert (stream.generation.text, stream.generation.usage) == (whole.text, whole.usage)
    assert whole.adapter_id == stream.generation.adapter_id == live_server.adapter
    assert whole.request_id
    assert whole.request_id != stream.request_id


def test_ours_chats_and_streams_the_same(ours: lory_client.Client, live_server: LiveServer):
    messages: list[lory_client.ChatMessage] = [{"role": "user", "content": PROMPT}]
    asked: lory_client.ChatParameters = {
        "max_tokens": 12,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = ours.chat(messages, live_server.adapter, **asked)
    stream = ours.chat_stream(messages, live_server.adapter, **asked)
    assert "".join(piece.text for piece in stream) == whole.text != ""
    assert stream.completion.usage == whole.usage
    streamed = stream.completion.choices[0].logprobs
    assert [t.text for t in streamed] == [t.text for t in whole.choices[0].logprobs]
    assert ours.chat(messages, max_tokens=4).model == live_server.base


def test_ours_saves_a_merge_and_asks_for_it(ours: lory_client.Client, live_server: LiveServer):
    adapter = live_server.adapter
    saved = ours.adapters.merge("live-blend", {adapter: 1.0})
    assert saved.state == "host"
    answer = ours.generate(PROMPT, "live-blend", max_new_tokens=8)
    assert answer.text == ours.generate(PROMPT, adapter, max_new_tokens=8).text
    assert answer.adapter_revision == saved.revision
    wish = lory_client.MergedAdapters([adapter, "live-blend"], [1, 1])
    with pytest.raises(lory_client.ValidationError, match="itself a merge"):
        ours.generate(PROMPT, merged_adapters=wish)
    wish = lory_client.MergedAdapters([adapter], [1])
    same = ours.generate(PROMPT, merged_adapters=wish, max_new_tokens=8)
    assert same.adapter_revision == saved.revision
    ours.adapters.delete("live-blend")


def test_ours_reads_the_descriptions(ours: lory_client.Client, live_server: LiveServer):
    assert ours.health() is True
    assert ours.info().model_id == live_server.base
    assert "".join(t.text for t in ours.tokenize(PROMPT, add_special_tokens=False)) == PROMPT


def test_ours_raises_its_own_errors(ours: lory_client.Client):
    messages: list[lory_client.ChatMessage] = [{"role": "user", "content": PROMPT}]
    with pytest.raises(lory_client.AdapterNotFoundError, match="no-such-adapter"):
        ours.generate(PROMPT, "no-such-adapter")
    with pytest.raises(lory_client.AdapterNotFoundError, match="no-such-adapter"):
        next(ours.generate_stream(PROMPT, "no-such-adapter"))
    with pytest.raises(lory_client.AdapterNotFoundError):
        ours.chat(messages, "no-such-adapter")
    with pytest.raises(lory_client.ValidationError, match="max_new_tokens") as caught:
        ours.generate(PROMPT, max_new_tokens=0)
    assert (caught.value.status, caught.value.code) == (422, "validation")
    assert caught.value.request_id


def test_ours_leaves_a_stream_early(ours: lory_client.Client, live_server: LiveServer):
    for _ in range(20):
        for _token in ours.generate_stream(PROMPT, live_server.adapter, max_new_tokens=400):
            break
    assert ours.generate(PROMPT, live_server.adapter, max_new_tokens=4).tokens
