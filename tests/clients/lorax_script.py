"""What LoRAX's published client (lorax-client) sees of a server: facts, printed as JSON.

Usage: python lorax_script.py BASE_URL ADAPTER. It judges nothing (tests/test_clients_live.py
does), imports nothing of Lory, and runs in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from lorax import AsyncClient, Client, MergedAdapters

PROMPT = "The order arrived late and the box was damaged"
PROMPTS = [f"{PROMPT} {i}" for i in range(4)]


def facts(response: Any) -> dict[str, Any]:
    details = response.details
    return {
        "text": response.generated_text,
        "finish_reason": details.finish_reason.value,
        "prompt_tokens": details.prompt_tokens,
        "generated_tokens": details.generated_tokens,
        "seed": details.seed,
        "tokens": [[t.id, t.text, t.logprob, t.special] for t in details.tokens],
        "prefill": [[t.id, t.text, t.logprob] for t in details.prefill],
    }


def stream_facts(responses: list[Any]) -> dict[str, Any]:
    last = responses[-1]
    return {
        "text": last.generated_text,
        "tokens": [[r.token.id, r.token.text, r.token.logprob, r.token.special] for r in responses],
        "early_texts": sum(r.generated_text is not None for r in responses[:-1]),
        "finish_reason": last.details.finish_reason.value if last.details else None,
        "generated_tokens": last.details.generated_tokens if last.details else None,
    }


def raised(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


async def raised_async(call: Callable[[], Any]) -> list[str]:
    try:
        await call()
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def plain(client: Client, adapter: str) -> dict[str, Any]:
    whole = facts(client.generate(PROMPT, adapter_id=adapter, max_new_tokens=12))
    stream = list(client.generate_stream(PROMPT, adapter_id=adapter, max_new_tokens=12))
    return {
        "adapter": whole,
        "adapter_again": facts(client.generate(PROMPT, adapter_id=adapter, max_new_tokens=12)),
        "adapter_stream": stream_facts(stream),
        "base": facts(client.generate(PROMPT, max_new_tokens=12)),
        "base_stream": stream_facts(list(client.generate_stream(PROMPT, max_new_tokens=12))),
        "each": [
            client.generate(p, adapter_id=adapter, max_new_tokens=8).generated_text for p in PROMPTS
        ],
    }


def parameters(client: Client, adapter: str, whole: dict[str, Any]) -> dict[str, Any]:
    def ask(**given: Any) -> Any:
        return client.generate(PROMPT, adapter_id=adapter, **{"max_new_tokens": 12, **given})

    stop = "".join(text for _, text, _, _ in whole["tokens"][:2])
    best = ask(best_of=2, do_sample=True, temperature=1.5)
    return {
        "stop": stop,
        "stopped": facts(ask(stop_sequences=[stop])),
        "prefill": facts(ask(decoder_input_details=True)),
        "full_text": facts(ask(return_full_text=True)),
        "ignore_eos": facts(ask(ignore_eos_token=True, max_new_tokens=40)),
        "truncated": facts(ask(truncate=3)),
        "no_details": ask(details=False).details is None,
        "seeded": [facts(ask(do_sample=True, temperature=1.5, seed=s)) for s in (7, 7, 8)],
        "warped": facts(ask(top_k=5, top_p=0.9, typical_p=0.9, repetition_penalty=1.2, seed=1)),
        "best": facts(best),
        "best_others": [
            [o.generated_text, o.finish_reason.value, len(o.tokens)]
            for o in best.details.best_of_sequences or []
        ],
        "refused": [
            raised(lambda: ask(return_k_alternatives=3)),
            raised(lambda: ask(watermark=True)),
        ],
    }


def merged(client: Client, adapter: str) -> dict[str, Any]:
    def ask(strategy: str, density: float, *weights: float) -> Any:
        wish = MergedAdapters(
            ids=[adapter] * len(weights),
            weights=list(weights),
            merge_strategy=strategy,
            density=density,
        )
        return client.generate(PROMPT, merged_adapters=wish, max_new_tokens=12)

    return {
        "halves": facts(ask("linear", 0.0, 0.5, 0.5)),
        "nothing": facts(ask("linear", 0.0, 1.0, -1.0)),
        "ties": facts(ask("ties", 1.0, 1.0)),
        "pruned": raised(lambda: ask("ties", 0.0, 1.0, 1.0)),
    }


def errors(client: Client, adapter: str) -> dict[str, Any]:
    def stream_of(**given: Any) -> Callable[[], Any]:
        return lambda: list(client.generate_stream(PROMPT, **given))

    return {
        "unknown_adapter": raised(lambda: client.generate(PROMPT, adapter_id="no-such-adapter")),
        "unknown_adapter_stream": raised(stream_of(adapter_id="no-such-adapter")),
        "validation": raised(lambda: client.generate(PROMPT, adapter_id=adapter, max_new_tokens=0)),
        "validation_stream": raised(stream_of(adapter_id=adapter, max_new_tokens=0)),
        "too_long": raised(lambda: client.generate(PROMPT, max_new_tokens=10_000_000)),
        "after_errors": client.generate(PROMPT, max_new_tokens=4).generated_text,
    }


async def asynchronous(url: str, adapter: str) -> dict[str, Any]:
    client = AsyncClient(url)
    stream = client.generate_stream(PROMPT, adapter_id=adapter, max_new_tokens=12)
    each = [client.generate(p, adapter_id=adapter, max_new_tokens=8) for p in PROMPTS]
    return {
        "adapter": facts(await client.generate(PROMPT, adapter_id=adapter, max_new_tokens=12)),
        "adapter_stream": stream_facts([response async for response in stream]),
        "each": [r.generated_text for r in await asyncio.gather(*each)],
        "unknown_adapter": await raised_async(
            lambda: client.generate(PROMPT, adapter_id="no-such-adapter")
        ),
        "validation": await raised_async(lambda: client.generate(PROMPT, max_new_tokens=0)),
    }


def main(url: str, adapter: str) -> None:
    client = Client(url)
    whole = plain(client, adapter)
    result = {
        "plain": whole,
        "parameters": parameters(client, adapter, whole["adapter"]),
        "merged": merged(client, adapter),
        "errors": errors(client, adapter),
        "async": asyncio.run(asynchronous(url, adapter)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
