"""Requests made by the manners of adapters: templates, defaults, stop texts, and other bases."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tiny_tokenizers
from lory_router.base_check import ServedBase
from lory_server.messages import Defaults, Failure, Manner, TrainedOn
from lory_trainer.digests import base_digests
from scripted_engine import EOS, TEXT, Answer, Front, ScriptedEngine, events
from test_trainer_digests import make_base

ONE = Manner(digest="1", template="{text} ->", fields=("text",))
TWO = Manner(digest="2", template="{q}|{{{who}}}", fields=("q", "who"))
DEFAULTS = Defaults(temperature=0.5, top_k=7, top_p=0.25, repetition_penalty=1.5, max_new_tokens=9)
TUNED = Manner(digest="3", defaults=DEFAULTS, stop=("END",))


def front(**manners: Manner) -> Front:
    names = {"french": ONE, "org/german": TWO, "tuned": TUNED} | manners
    engine = ScriptedEngine(adapters=("french", "org/german", "tuned", "plain"), manners=names)
    return Front(engine=engine)


def asked(front: Front) -> str:
    return TEXT.decode(front.engine.last.prompt_ids)


def body(inputs: Any, adapter_id: str = "french", **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"adapter_id": adapter_id, **parameters}}


def chat(*said: tuple[str, str], model: str = "french", **fields: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in said]
    return {"model": model, "messages": messages, **fields}


# -- templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/", "/generate_stream"])
def test_fields_go_into_the_adapters_template(path):
    server = front()
    response = server.post(path, body({"who": "a{q}", "q": "x\n"}, "org/german"))
    assert response.status_code == 200
    assert response.headers["x-template"] == "adapter"
    assert asked(server) == "x\n|{a{q}}"


def test_text_stays_as_it_is():
    server = front()
    response = server.post("/generate", body("{text} raw"))
    assert response.headers["x-template"] == "none"
    assert asked(server) == "{text} raw"
    assert server.engine.last.manner == ONE.digest


@pytest.mark.parametrize(
    ("inputs", "adapter_id", "says"),
    [
        ({}, "french", "`inputs` cannot be empty"),
        ({"txt": "x"}, "french", "`inputs.text` is required"),
        ({"text": "x", "more": "y"}, "french", "no field 'more'; its template has text"),
        ({"text": "x"}, "plain", "has no template"),
        ({"text": "x"}, "", "the base has no template"),
        ({"text": 5}, "french", "`inputs`: expected `str`"),
        (["x"], "french", "inputs"),
    ],
)
def test_fields_that_do_not_fit_are_refused_by_name(inputs, adapter_id, says):
    response = front().post("/generate", body(inputs, adapter_id))
    assert response.status_code == 422
    assert says in response.json()["error"]


def test_a_template_of_ones_own_excludes_the_bases():
    sent = body({"text": "x"}, apply_chat_template=True)
    assert "apply_chat_template" in front().post("/generate", sent).json()["error"]


def test_the_whole_text_shows_the_prompt_that_was_made():
    server = front()
    reply = server.post("/generate", body({"text": "ab"}, return_full_text=True)).json()
    assert reply["generated_text"] == "ab ->hi"


def test_a_chat_fills_a_single_field_with_the_last_message():
    server = front()
    said = (("user", "before"), ("assistant", "yes"), ("user", "now"))
    response = server.post("/v1/chat/completions", chat(*said))
    assert response.status_code == 200
    assert response.headers["x-template"] == "adapter"
    assert asked(server) == "now ->"


def test_a_chats_prompt_is_tokenised_as_training_did():
    """With the special tokens that the tokenizer puts before any text."""
    text = tiny_tokenizers.with_bos(tiny_tokenizers.byte_level())
    engine = ScriptedEngine(adapters=("french",), manners={"french": ONE})
    server = Front(engine=engine, text=text)
    server.post("/v1/chat/completions", chat(("user", "now")))
    assert server.engine.last.prompt_ids == text.encode("now ->")


def test_an_adapter_trained_through_a_chat_template_is_asked_through_it():
    spoken = Manner(digest="s", template="<{text}>", fields=("text",), is_chat=True)
    server = front(plain=spoken)
    assert TEXT.chat_template is not None
    wanted = TEXT.chat_template.render([{"role": "user", "content": "<x>"}])
    for path, sent in (
        ("/generate", body({"text": "x"}, "plain")),
        ("/v1/chat/completions", chat(("user", "x"), model="plain")),
    ):
        response = server.post(path, sent)
        assert response.headers["x-template"] == "adapter"
        assert server.engine.last.prompt_ids == TEXT.encode(wanted, add_special_tokens=False)
    whole = Manner(digest="w", is_chat=True)
    server = front(plain=whole)
    response = server.post("/v1/chat/completions", chat(("user", "x"), model="plain"))
    assert response.headers["x-template"] == "base"


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (chat(("user", "x"), model="org/german"), "fields q, who"),
        (chat(("user", "x"), ("assistant", "y")), "user's message"),
        (chat(("system", "be brief"), ("user", "x")), "no place for a system message"),
        (chat(("developer", "be brief"), ("user", "x")), "no place for a system message"),
        (chat(("user", "x"), chat_template_kwargs={"a": 1}), "chat_template_kwargs"),
    ],
)
def test_a_chat_that_does_not_fit_says_what_to_do(sent, says):
    response = front().post("/v1/chat/completions", sent)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


# -- defaults -------------------------------------------------------------------------------


def test_defaults_hold_where_a_request_names_nothing():
    server = front()
    server.post("/generate", body("a", "tuned"))
    sampling = server.engine.last.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.25)
    assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.5, 9)


def test_what_a_request_names_goes_before_defaults():
    server = front()
    server.post("/generate", body("a", "tuned", temperature=0.75, top_k=3, max_new_tokens=4))
    sampling = server.engine.last.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.75, 3, 0.25)
    assert sampling.max_new_tokens == 4


@pytest.mark.parametrize("wish", [{"do_sample": False}, {"temperature": 0}])
def test_a_request_to_be_greedy_is_not_made_to_sample(wish):
    server = front()
    server.post("/generate", body("a", "tuned", **wish))
    assert server.engine.last.sampling.temperature == 0


def test_an_adapter_that_is_greedy_by_default_samples_when_told_to():
    greedy = Manner(digest="g", defaults=Defaults(temperature=0))
    server = front(plain=greedy)
    server.post("/generate", body("a", "plain", do_sample=True))
    assert server.engine.last.sampling.temperature == 1
    server.post("/v1/completions", {"model": "plain", "prompt": "a"})
    assert server.engine.last.sampling.temperature == 0
    server.post("/v1/completions", {"model": "plain", "prompt": "a", "temperature": 0.5})
    assert server.engine.last.sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/completions", {"model": "tuned", "prompt": "a"}),
        ("/v1/chat/completions", chat(("user", "a"), model="tuned")),
    ],
)
def test_openais_routes_have_the_defaults_too(path, sent):
    server = front()
    assert server.post(path, sent).status_code == 200
    sampling = server.engine.last.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_new_tokens) == (0.5, 7, 9)
    server.post(path, {**sent, "max_tokens": 3, "temperature": 0.25})
    assert server.engine.last.sampling.max_new_tokens == 3
    assert server.engine.last.sampling.temperature == 0.25


def test_a_default_length_gives_way_to_the_context():
    """The caller named none, so there is nothing to refuse."""
    long = Manner(digest="l", defaults=Defaults(max_new_tokens=10_000))
    server = front(plain=long)
    assert server.post("/generate", body("a" * 30, "plain")).status_code == 200
    assert server.engine.last.sampling.max_new_tokens == 64 - 30


def test_stop_texts_add_up():
    answers = [Answer(b"one STOP", ends=False), Answer(b"two END", ends=False)]
    server = front()
    server.engine.answers = answers
    replies = [server.post("/generate", body("a", "tuned", stop=["STOP"])).json() for _ in "ab"]
    assert [reply["generated_text"] for reply in replies] == ["one STOP", "two END"]
    server.engine.answers = [Answer(b"two END and", ends=False)]
    sent = {"model": "tuned", "prompt": "a", "stop": "STOP", "max_tokens": 20}
    assert server.post("/v1/completions", sent).json()["choices"][0]["text"] == "two "


def test_the_token_that_it_learned_to_end_with_ends_an_answer():
    ends = Manner(digest="e", eos_token="!")
    server = front(plain=ends)
    server.post("/generate", body("a", "plain"))
    assert server.engine.last.sampling.stop_token_ids == (ord("!"),)
    server.post("/generate", body("a", "plain", ignore_eos_token=True))
    assert server.engine.last.sampling.stop_token_ids == ()
    own = Manner(digest="o", eos_token=TEXT.token_text(EOS))
    server = front(plain=own)
    server.post("/v1/completions", {"model": "plain", "prompt": "a", "stop_token_ids": [5]})
    assert server.engine.last.sampling.stop_token_ids == (5,)


# -- learning them --------------------------------------------------------------------------


def test_a_manner_is_asked_for_once():
    server = front()
    for _ in range(3):
        server.post("/generate", body({"text": "a"}))
    assert server.engine.orders == [("find", "french", "")]


def test_a_replaced_adapter_is_asked_by_its_new_template():
    server = front()
    server.post("/generate", body({"text": "a"}))
    server.engine.manners["french"] = msgspec.structs.replace(ONE, digest="9", template="<{text}>")
    response = server.post("/generate", body({"text": "a"}))
    assert response.status_code == 200
    assert asked(server) == "<a>"
    server.engine.manners["french"] = ONE
    streamed = server.post("/generate_stream", body({"text": "a"}))
    assert events(streamed)
    assert asked(server) == "a ->"


def test_a_request_is_told_if_its_adapter_never_stops_changing(monkeypatch):
    server = front()

    async def find(*args: Any) -> Any:
        done = await ScriptedEngine.order(server.engine, "find", "french")
        return msgspec.structs.replace(done, manner=TWO)

    monkeypatch.setattr(server.engine, "order", find)
    response = server.post("/generate", body("a"))
    assert (response.status_code, response.json()["error_type"]) == (503, "adapter_replaced")
    assert len(server.engine.streams) == 3


def test_an_adapter_that_cannot_be_read_is_refused_before_it_is_asked():
    server = front()
    server.engine.refuses = Failure(code="adapter_invalid", message="adapter_manifest.json: no")
    response = server.post("/generate", body("a"))
    assert response.status_code == 422
    assert "'french'" in response.json()["error"]
    assert not server.engine.streams


def test_an_adapters_page_tells_how_to_ask_it():
    server = front()
    told = server.get("/v1/adapters/org/german").json()
    assert (told["template"], told["fields"]) == (TWO.template, ["q", "who"])
    assert (told["defaults"], told["stop"], told["base_matches"]) == ({}, [], None)
    told = server.get("/v1/adapters/tuned").json()
    assert (told["template"], told["stop"]) == (None, ["END"])
    assert told["defaults"]["temperature"] == 0.5
    server.engine.refuses = Failure(code="adapter_invalid", message="broken")
    assert server.get("/v1/adapters/french").json()["template"] is None


def test_an_adapters_page_tells_of_the_adapter_as_it_is_now():
    server = front()
    assert server.get("/v1/adapters/french").json()["template"] == ONE.template
    server.engine.manners["french"] = TWO
    assert server.get("/v1/adapters/french").json()["template"] == TWO.template


# -- which base -----------------------------------------------------------------------------


def trained_on(folder: Path) -> Manner:
    return msgspec.structs.replace(ONE, base=TrainedOn(**base_digests(folder)))


def test_an_adapter_of_another_base_is_told_and_with_strict_base_refused(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    served = make_base(tmp_path / "served")
    engine = ScriptedEngine(adapters=("own", "foreign", "untold"), manners={"untold": ONE})
    engine.manners["own"] = trained_on(served)
    engine.manners["foreign"] = trained_on(make_base(tmp_path / "other", change=0.5))
    loose = Front(engine=engine, base=ServedBase(str(served)))
    assert loose.get("/v1/adapters/own").json()["base_matches"] is True
    assert loose.get("/v1/adapters/foreign").json()["base_matches"] is False
    assert loose.get("/v1/adapters/untold").json()["base_matches"] is None
    assert loose.post("/generate", body("a", "foreign")).status_code == 200
    digests = [base_digests(tmp_path / name)["weights"][:12] for name in ("other", "served")]
    both = "another weights ({}..., and {}... is served)".format(*digests)
    assert both in caplog.text
    strict = Front(engine=engine, base=ServedBase(str(served)), strict_base=True)
    response = strict.post("/generate", body("a", "foreign"))
    assert response.status_code == 422
    assert "--strict-base" in response.json()["error"]
    assert both in response.json()["error"]
    for name in ("own", "untold"):
        assert strict.post("/generate", body("a", name)).status_code == 200


def test_another_chat_template_or_precision_is_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    other = TrainedOn(chat_template="0" * 64, is_quantized=True)
    manner = msgspec.structs.replace(ONE, base=other)
    server = Front(
        engine=ScriptedEngine(adapters=("own",), manners={"own": manner}),
        base=ServedBase(str(make_base(tmp_path / "served")), TEXT.chat_template),
    )
    assert server.get("/v1/adapters/own").json()["base_matches"] is False
    assert "another chat template" in caplog.text
    assert "trained on a quantized base" in caplog.text


def test_a_base_whose_files_cannot_be_read_tells_nothing(tmp_path):
    (tmp_path / "config.json").write_text("[")
    server = Front(
        engine=ScriptedEngine(
            adapters=("own",), manners={"own": trained_on(make_base(tmp_path / "a"))}
        ),
        base=ServedBase(str(tmp_path)),
    )
    assert server.get("/v1/adapters/own").json()["base_matches"] is None
