"""Bodies as clients send them: fields that say nothing, and JSON that takes long to read."""

import gc
from typing import Any

import pytest

from lory_router.bodies import read_object, read_struct
from lory_router.errors import BadJson, Invalid
from lory_router.schemas_openai import CompletionBody
from scripted_engine import BASE, Front

TGI_PARAMETERS: dict[str, Any] = {
    "adapter_id": None,
    "best_of": None,
    "decoder_input_details": False,
    "details": True,
    "do_sample": False,
    "frequency_penalty": None,
    "grammar": None,
    "max_new_tokens": 4,
    "repetition_penalty": None,
    "return_full_text": False,
    "seed": None,
    "stop": [],
    "temperature": None,
    "top_k": None,
    "top_n_tokens": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "watermark": False,
}
"""As text-generation's client sends them, every one each time."""


def test_text_generations_client_is_served():
    """It was refused for two fields of its own that it always sends, set or not."""
    sent = {"inputs": "ab", "parameters": TGI_PARAMETERS, "stream": False}
    response = Front().post("/generate", sent)
    assert response.status_code == 200
    assert response.json()["generated_text"] == "hi"


@pytest.mark.parametrize("given", [{"top_n_tokens": 2}, {"grammar": {"type": "json"}}])
def test_what_text_generation_alone_has_is_refused_in_plain_words(given: dict[str, Any]):
    response = Front().post("/generate", {"inputs": "ab", "parameters": given})
    assert response.status_code == 422
    assert f"`{next(iter(given))}` is not supported yet" in response.json()["error"]


CHAT = {"model": BASE, "messages": [{"role": "user", "content": "ab"}]}


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/completions", {"model": BASE, "prompt": "ab", "kv_transfer_params": None}),
        ("/v1/chat/completions", {**CHAT, "mm_processor_kwargs": None, "request_id": None}),
        ("/generate", {"inputs": "ab", "model": None}),
        ("/generate", {"inputs": "ab", "parameters": {"regex": None}}),
        ("/tokenize", {"inputs": "ab", "model": None}),
    ],
)
def test_a_null_is_a_field_that_was_not_given_whatever_its_name(path: str, sent: dict[str, Any]):
    assert Front().post(path, sent).status_code == 200


def test_a_body_of_many_lists_is_read_without_the_collector():
    """It looked through all objects a dozen times meanwhile, and every stream stood still."""
    body = b'{"model": "m", "prompt": [' + b",".join([b"[5]"] * 20_000) + b"]}"
    seen: list[str] = []

    def on_collection(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    gc.collect()
    gc.callbacks.append(on_collection)
    try:
        value = read_object(body)
        num_decoding = len(seen)
        gc.collect()
        seen.clear()
        read_struct(value, CompletionBody)
        num_converting = len(seen)
    finally:
        gc.callbacks.remove(on_collection)
    # One of the youngest is due when the collector is back.
    assert num_decoding <= 2
    assert num_converting <= 2


@pytest.mark.parametrize("body", [b'{"model": 3}', b"{}", b"[", b"[" * 100_000])
def test_the_collector_is_back_after_a_body_that_is_refused(body: bytes):
    with pytest.raises((BadJson, Invalid)):
        read_struct(read_object(body), CompletionBody)
    assert gc.isenabled()
