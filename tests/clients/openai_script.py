"""What OpenAI's published client (openai) sees of a server: facts, printed as JSON.

Usage: python openai_script.py BASE_URL BASE_MODEL ADAPTER. It judges nothing
(tests/test_clients_live.py does), imports nothing of Lory, and runs in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

PROMPT = "The order arrived late and the box was damaged"
PROMPTS = [f"{PROMPT} {i}" for i in range(4)]
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


def token_ids(url: str, text: str) -> list[int]:
    request = urllib.request.Request(
        f"{url}/tokenize",
        data=json.dumps({"inputs": text}).encode(),
        headers={"content-type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as reply:
        return [token["id"] for token in json.load(reply)]


def usage_facts(usage: Any) -> list[int]:
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


def completion_facts(reply: Any) -> dict[str, Any]:
    return {
        "id": reply.id,
        "object": reply.object,
        "created": reply.created,
        "model": reply.model,
        "texts": [choice.text for choice in reply.choices],
        "indices": [choice.index for choice in reply.choices],
        "finish_reasons": [choice.finish_reason for choice in reply.choices],
        "usage": usage_facts(reply.usage),
    }


def chat_facts(reply: Any) -> dict[str, Any]:
    return {
        "id": reply.id,
        "object": reply.object,
        "created": reply.created,
        "model": reply.model,
        "roles": [choice.message.role for choice in reply.choices],
        "texts": [choice.message.content for choice in reply.choices],
        "finish_reasons": [choice.finish_reason for choice in reply.choices],
        "usage": usage_facts(reply.usage),
    }


def raised(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except openai.APIStatusError as error:
        return error_facts(error)
    return {"type": "nothing"}


def error_facts(error: openai.APIStatusError) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "status": error.status_code,
        "code": error.code,
        "param": error.param,
        "message": error.message,
    }


def models(client: openai.OpenAI, adapter: str) -> dict[str, Any]:
    return {
        "ids": [model.id for model in client.models.list()],
        "retrieved": client.models.retrieve(adapter).id,
        "missing": raised(lambda: client.models.retrieve("no-such-adapter")),
    }


def completions(client: openai.OpenAI, url: str, base: str, adapter: str) -> dict[str, Any]:
    def ask(**given: Any) -> Any:
        asked = {"model": adapter, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **given}
        return client.completions.create(**asked)

    text = completion_facts(ask())
    logprobs = ask(logprobs=2).choices[0].logprobs
    sampled = {"n": 2, "temperature": 1.5}
    return {
        "text": text,
        "ids": completion_facts(ask(prompt=token_ids(url, PROMPT))),
        "base": completion_facts(ask(model=base)),
        "batch": completion_facts(ask(prompt=PROMPTS[:2])),
        "each": [ask(prompt=p, max_tokens=8).choices[0].text for p in PROMPTS],
        "two": completion_facts(ask(**sampled, seed=3)),
        "two_again": completion_facts(ask(**sampled, seed=3)),
        "stop": text["texts"][0][2:5],
        "stopped": completion_facts(ask(stop=text["texts"][0][2:5])),
        "logprobs": {
            "tokens": logprobs.tokens,
            "values": logprobs.token_logprobs,
            "tops": [sorted(top.values()) for top in logprobs.top_logprobs],
        },
        "stream": completion_stream(ask),
    }


def completion_stream(ask: Callable[..., Any]) -> dict[str, Any]:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    pieces = [c for c in chunks if c.choices]
    return {
        "text": "".join(c.choices[0].text for c in pieces),
        "finish_reasons": [
            c.choices[0].finish_reason for c in pieces if c.choices[0].finish_reason
        ],
        "objects": sorted({c.object for c in chunks}),
        "ids": len({c.id for c in chunks}),
        "usage": usage_facts(chunks[-1].usage),
        "last_has_choices": bool(chunks[-1].choices),
        "long": num_chunks(ask),
    }


def num_chunks(ask: Callable[..., Any]) -> int:
    """Of 900 tokens: a server that collects the answer first sends few."""
    return len(list(ask(stream=True, max_tokens=900, extra_body={"ignore_eos": True})))


def chats(client: openai.OpenAI, base: str, adapter: str) -> dict[str, Any]:
    def ask(**given: Any) -> Any:
        asked = {"model": adapter, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        return client.chat.completions.create(**{**asked, **given})

    content = ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    newer = {"max_tokens": openai.omit, "max_completion_tokens": 12}
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    return {
        "text": chat_facts(ask()),
        "newer_limit": chat_facts(ask(**newer)),
        "parts": chat_facts(ask(messages=parts)),
        "base": chat_facts(ask(model=base)),
        "two": chat_facts(ask(n=2, temperature=1.5, seed=3)),
        "two_again": chat_facts(ask(n=2, temperature=1.5, seed=3)),
        "logprobs": [
            [item.token, item.logprob, [top.logprob for top in item.top_logprobs]]
            for item in content
        ],
        "stream": chat_stream(ask),
        "request_id": ask(max_tokens=1)._request_id,
    }


def chat_stream(ask: Callable[..., Any]) -> dict[str, Any]:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0] for c in chunks if c.choices]
    return {
        "text": "".join(piece.delta.content or "" for piece in pieces),
        "role": pieces[0].delta.role,
        "finish_reasons": [piece.finish_reason for piece in pieces if piece.finish_reason],
        "objects": sorted({c.object for c in chunks}),
        "models": sorted({c.model for c in chunks}),
        "usage": usage_facts(chunks[-1].usage),
        "last_has_choices": bool(chunks[-1].choices),
    }


def left_early(client: openai.OpenAI, adapter: str) -> str:
    """A stream closed after its first chunk; the server goes on answering."""
    with client.completions.create(
        model=adapter, prompt=PROMPT, max_tokens=64, stream=True
    ) as stream:
        next(iter(stream))
    return (
        client.completions.create(model=adapter, prompt=PROMPT, max_tokens=12, temperature=0)
        .choices[0]
        .text
    )


def errors(client: openai.OpenAI, adapter: str) -> dict[str, Any]:
    def complete(**given: Any) -> Any:
        return client.completions.create(**{"model": adapter, "prompt": PROMPT, **given})

    def chat(**given: Any) -> Any:
        asked = {"model": adapter, "messages": MESSAGES, **given}
        return client.chat.completions.create(**asked)

    missing = "no-such-adapter"
    return {
        "unknown_model": raised(lambda: complete(model=missing)),
        "unknown_model_stream": raised(lambda: complete(model=missing, stream=True)),
        "unknown_chat_model": raised(lambda: chat(model=missing)),
        "too_hot": raised(lambda: complete(temperature=9)),
        "no_messages": raised(lambda: chat(messages=[])),
        "unknown_path": raised(lambda: client.get("/no-such-path", cast_to=object)),
    }


def fields() -> dict[str, list[str]]:
    """What the client's two calls can send."""
    return {
        "completions": sorted(
            completion_create_params.CompletionCreateParamsNonStreaming.__required_keys__
            | completion_create_params.CompletionCreateParamsNonStreaming.__optional_keys__
        ),
        "chats": sorted(
            chat_create_params.CompletionCreateParamsNonStreaming.__required_keys__
            | chat_create_params.CompletionCreateParamsNonStreaming.__optional_keys__
        ),
    }


async def asynchronous(url: str, adapter: str) -> dict[str, Any]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def complete(prompt: str) -> str:
            reply = await client.completions.create(
                model=adapter, prompt=prompt, max_tokens=8, temperature=0
            )
            return reply.choices[0].text

        stream = await client.chat.completions.create(
            model=adapter, messages=MESSAGES, max_tokens=12, temperature=0, stream=True
        )
        pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        return {
            "each": await asyncio.gather(*(complete(p) for p in PROMPTS)),
            "crowd": await asyncio.gather(*(complete(PROMPT) for _ in range(16))),
            "stream": "".join(pieces),
        }


def main(url: str, base: str, adapter: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        result = {
            "fields": fields(),
            "models": models(client, adapter),
            "completions": completions(client, url, base, adapter),
            "chats": chats(client, base, adapter),
            "left_early": left_early(client, adapter),
            "errors": errors(client, adapter),
            "async": asyncio.run(asynchronous(url, adapter)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:4])
