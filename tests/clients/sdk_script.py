"""A round trip of lory-client with the stub server, for any Python the client supports (3.9 on).

Usage: python sdk_script.py, where `lory_client` and httpx can be imported. Exits with 0 if all is
well. The SDK's tests proper are tests/test_client_*.py; this needs no pytest.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from typing import Any

import stub_server

import lory_client
from lory_client import AsyncClient, Client

PROMPT = "why is the sky"
MESSAGES: list[lory_client.ChatMessage] = [{"role": "user", "content": PROMPT}]
ENDLESS = stub_server.MAX_NEW_TOKENS


def blocking(server: stub_server.StubServer) -> lory_client.Generation:
    with Client(server.url) as client:
        whole = client.generate(PROMPT, "shout", max_new_tokens=5)
        stream = client.generate_stream(PROMPT, "shout", max_new_tokens=5)
        check("stream", tuple(stream) == whole.tokens and stream.generation.text == whole.text)
        chat = client.chat(MESSAGES, "shout", temperature=0.0)
        with client.chat_stream(MESSAGES, "shout", temperature=0.0) as pieces:
            check("chat", "".join(piece.text for piece in pieces) == chat.text)
        check("descriptions", client.health() and len(client.models()) == 3)
        check("error", unknown_adapter_status(client) == 404)
        for _ in client.generate_stream(PROMPT, max_new_tokens=ENDLESS):
            break
        check("left early", server.abandoned.wait(10))
    return whole


def unknown_adapter_status(client: Client) -> int | None:
    try:
        client.generate(PROMPT, "no-such-adapter")
    except lory_client.AdapterNotFoundError as error:
        return error.status
    return None


async def asynchronous(server: stub_server.StubServer, whole: lory_client.Generation) -> None:
    async with AsyncClient(server.url) as client:
        check("async", await client.generate(PROMPT, "shout", max_new_tokens=5) == whole)
        stream = client.generate_stream(PROMPT, "shout", max_new_tokens=5)
        check("async stream", tuple([token async for token in stream]) == whole.tokens)
        server.abandoned.clear()
        async for _ in client.generate_stream(PROMPT, max_new_tokens=ENDLESS):
            break
        loop = asyncio.get_running_loop()
        check("async left early", await loop.run_in_executor(None, server.abandoned.wait, 10))


def check(what: str, is_right: Any) -> None:
    if not is_right:
        sys.exit(f"{what}: not as it should be")


def main() -> None:
    warnings.simplefilter("error")
    with stub_server.running() as server:
        whole = blocking(server)
        asyncio.run(asynchronous(server, whole))
    print(f"lory-client {lory_client.__version__} on Python {sys.version.split()[0]}: ok")


if __name__ == "__main__":
    main()
