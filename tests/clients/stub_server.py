"""A server that speaks Lory's wire and runs no model: standard library alone, Python 3.9.

It answers with made-up words that depend on the adapter, the prompt and, when sampling, the seed.
The SDK's tests run against it, and `python stub_server.py PORT` serves it for trying a client by
hand. It must not know Lory's code: it is written from the wire's description.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BASE = "stub-base"
ADAPTERS = ("shout", "polite")
WORDS = ("red", "green", "blue", "cyan", "pink", "gold", "grey", "teal")
TOKEN_S = 0.0005
MAX_NEW_TOKENS = 200_000


@dataclass(eq=False)
class RefusalError(Exception):
    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Answer:
    """Words of one sequence, as tokens."""

    words: list[str]
    finish_reason: str
    seed: int | None

    @property
    def text(self) -> str:
        return "".join(self.words)

    def tokens(self) -> list[dict[str, Any]]:
        return [_token(word) for word in self.words]


def _token(word: str) -> dict[str, Any]:
    return {"id": _id(word), "text": word, "logprob": -0.5, "special": False, "skipped": False}


def _id(word: str) -> int:
    return sum(word.encode()) % 900


def prompt_words(prompt: Any) -> list[str]:
    """A text's words; token ids stand for themselves."""
    if isinstance(prompt, str):
        return [" " * bool(i) + word for i, word in enumerate(prompt.split(" "))]
    return [str(token_id) for token_id in prompt]


def answer(prompt: Any, adapter_id: str | None, parameters: dict[str, Any], seed: Any) -> Answer:
    """The same words for the same adapter, prompt and seed; greedy ignores the seed."""
    ids = [_id(word) if isinstance(prompt, str) else int(word) for word in prompt_words(prompt)]
    draw = random.Random(repr((adapter_id, ids, seed)))
    words: list[str] = []
    for _ in range(parameters.get("max_new_tokens") or 8):
        words.append(" " + draw.choice(WORDS))
        if any(stop in "".join(words) for stop in parameters.get("stop") or ()):
            return Answer(words, "stop_sequence", seed)
    return Answer(words, "length", seed)


def is_sampling(parameters: dict[str, Any]) -> bool:
    return bool(parameters.get("do_sample") or parameters.get("temperature"))


class StubServer(ThreadingHTTPServer):
    """What it was asked is in `requests`; `abandoned` is set when a reader leaves a stream."""

    daemon_threads = True

    def __init__(self, port: int = 0, api_key: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.api_key = api_key
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.abandoned = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running(api_key: str | None = None) -> Iterator[StubServer]:
    server = StubServer(api_key=api_key)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    @property
    def _stub(self) -> StubServer:
        assert isinstance(self.server, StubServer)
        return self.server

    def _answer(self, body: Any) -> None:
        self._stub.requests.append((self.command, self.path, dict(self.headers), body))
        try:
            self._check_key()
            self._route(body)
        except RefusalError as refusal:
            self._refuse(refusal)

    def _check_key(self) -> None:
        wanted = self._stub.api_key
        if wanted and self.headers.get("authorization") != f"Bearer {wanted}":
            raise RefusalError(401, "invalid_api_key", "Missing or wrong API key")

    def _route(self, body: Any) -> None:
        routes = {
            ("GET", "/health"): lambda _: self._send(200, b""),
            ("GET", "/info"): lambda _: self._json({"model_id": BASE, "max_total_tokens": 512}),
            ("GET", "/v1/models"): lambda _: self._json({"object": "list", "data": _models()}),
            ("POST", "/tokenize"): lambda b: self._json(_tokenized(b["inputs"])),
            ("POST", "/"): self._compat,
            ("POST", "/generate"): lambda b: self._json(_generation(b)),
            ("POST", "/generate_stream"): self._generate_stream,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
        }
        route = routes.get((self.command, self.path))
        if route is None and self.path.startswith("/v1/models/"):
            return self._json(_model(self.path[len("/v1/models/") :]))
        if route is None:
            raise RefusalError(404, "not_found", f"no such path: {self.path}")
        route(body)

    # -- native --

    def _compat(self, body: Any) -> None:
        if body.get("stream"):
            return self._generate_stream(body)
        self._json([_generation(body)])

    def _generate_stream(self, body: Any) -> None:
        prompt, adapter_id, parameters = _native(body)
        whole = _answers(prompt, adapter_id, parameters)[0]
        self._begin_stream(adapter_id)
        for i, word in enumerate(whole.words):
            event = {"token": _token(word), "generated_text": None, "details": None}
            if i == len(whole.words) - 1:
                event["generated_text"] = whole.text
                details = _details(prompt, whole) if parameters.get("details") else None
                event["details"] = details
            time.sleep(TOKEN_S)
            if not self._event(json.dumps(event)):
                return
        self._end_stream()

    # -- OpenAI --

    def _completions(self, body: Any) -> None:
        adapter_id = _adapter(body["model"])
        parameters = _openai_parameters(body)
        prompt = body["prompt"]
        many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        choices: list[dict[str, Any]] = []
        for one in prompt if many else [prompt]:
            for whole in _answers(one, adapter_id, parameters):
                choices.append(_completion_choice(len(choices), whole, body.get("logprobs")))
        usage = _usage(prompt, sum(len(c["words"]) for c in choices))
        self._openai(body, choices, usage, "text_completion")

    def _chat(self, body: Any) -> None:
        adapter_id = _adapter(body["model"])
        if not body["messages"]:
            raise RefusalError(400, "invalid_value", "messages is empty", "messages")
        prompt = "\n".join(_content(m["content"]) for m in body["messages"])
        wholes = _answers(prompt, adapter_id, _openai_parameters(body))
        choices = [_chat_choice(i, whole, body) for i, whole in enumerate(wholes)]
        usage = _usage(prompt, sum(len(c["words"]) for c in choices))
        self._openai(body, choices, usage, "chat.completion")

    def _openai(
        self, body: Any, choices: list[dict[str, Any]], usage: dict[str, int], kind: str
    ) -> None:
        head = {"id": "cmpl-1", "object": kind, "created": 1, "model": body["model"] or BASE}
        if not body.get("stream"):
            for choice in choices:
                del choice["words"]
            return self._json({**head, "choices": choices, "usage": usage})
        if kind == "chat.completion":
            head["object"] = "chat.completion.chunk"
        self._begin_stream(body["model"])
        for chunk in _chunks(choices, is_chat=kind == "chat.completion"):
            self._event(json.dumps({**head, "choices": [chunk]}))
        if (body.get("stream_options") or {}).get("include_usage"):
            self._event(json.dumps({**head, "choices": [], "usage": usage}))
        self._event("[DONE]")
        self._end_stream()

    # -- HTTP --

    def _refuse(self, refusal: RefusalError) -> None:
        native = {"error": refusal.message, "error_type": refusal.code}
        error = {
            "message": refusal.message,
            "type": "invalid_request_error",
            "param": refusal.param,
            "code": refusal.code,
        }
        self._json({"error": error} if self.path.startswith("/v1/") else native, refusal.status)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("x-request-id", "req-1")
        self.end_headers()
        self.wfile.write(body)

    def _begin_stream(self, adapter_id: str | None) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("x-request-id", "req-1")
        if adapter_id:
            self.send_header("x-adapter-id", adapter_id)
        self.end_headers()
        self._chunk(b": keep-alive\n\n")

    def _event(self, data: str) -> bool:
        """Whether the reader still listens."""
        return self._chunk(f"data:{data}\n\n".encode())

    def _end_stream(self) -> None:
        self._chunk(b"")

    def _chunk(self, data: bytes) -> bool:
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        except (BrokenPipeError, ConnectionResetError):
            self._stub.abandoned.set()
            self.close_connection = True
            return False
        return True


# -- native bodies ----------------------------------------------------------------------------


def _native(body: Any) -> tuple[str, str | None, dict[str, Any]]:
    parameters = body.get("parameters") or {}
    adapter_id = parameters.get("adapter_id") or None
    if adapter_id and adapter_id not in ADAPTERS:
        raise RefusalError(404, "adapter_not_found", f"no adapter named {adapter_id!r}")
    if parameters.get("max_new_tokens") not in (None, *range(1, MAX_NEW_TOKENS + 1)):
        message = f"Input validation error: max_new_tokens must be 1 to {MAX_NEW_TOKENS}"
        raise RefusalError(422, "validation", message)
    return body["inputs"], adapter_id, parameters


def _answers(prompt: Any, adapter_id: str | None, parameters: dict[str, Any]) -> list[Answer]:
    if not is_sampling(parameters):
        seeds: list[int | None] = [None] * (parameters.get("best_of") or 1)
    else:
        first = parameters.get("seed")
        first = random.getrandbits(32) if first is None else first
        seeds = [first + i for i in range(parameters.get("best_of") or 1)]
    return [answer(prompt, adapter_id, parameters, seed) for seed in seeds]


def _generation(body: Any) -> dict[str, Any]:
    prompt, adapter_id, parameters = _native(body)
    best, *others = _answers(prompt, adapter_id, parameters)
    text = (prompt if parameters.get("return_full_text") else "") + best.text
    if not parameters.get("details"):
        return {"generated_text": text}
    prefill = _prefill(prompt) if parameters.get("decoder_input_details") else []
    details = _details(prompt, best)
    details.update(prefill=prefill, tokens=best.tokens())
    if others:
        details["best_of_sequences"] = [
            {
                "generated_text": other.text,
                "prefill": [],
                "tokens": other.tokens(),
                **{k: _details(prompt, other)[k] for k in ("finish_reason", "generated_tokens")},
                "seed": other.seed,
            }
            for other in others
        ]
    return {"generated_text": text, "details": details}


def _details(prompt: Any, whole: Answer) -> dict[str, Any]:
    return {
        "finish_reason": whole.finish_reason,
        "prompt_tokens": len(prompt_words(prompt)),
        "generated_tokens": len(whole.words),
        "skipped_tokens": 0,
        "seed": whole.seed,
    }


def _prefill(prompt: Any) -> list[dict[str, Any]]:
    return [
        {"id": _id(word), "text": word, "logprob": -2.0 if i else None}
        for i, word in enumerate(prompt_words(prompt))
    ]


def _tokenized(text: str) -> list[dict[str, Any]]:
    tokens, start = [], 0
    for word in prompt_words(text):
        tokens.append({"id": _id(word), "text": word, "start": start, "stop": start + len(word)})
        start += len(word)
    return tokens


# -- OpenAI bodies ----------------------------------------------------------------------------


def _models() -> list[dict[str, Any]]:
    card = {"object": "model", "created": 1, "owned_by": "lory"}
    adapters = [{**card, "id": name, "root": name, "parent": BASE} for name in ADAPTERS]
    return [{**card, "id": BASE, "root": BASE, "parent": None}, *adapters]


def _model(name: str) -> dict[str, Any]:
    for card in _models():
        if card["id"] == name:
            return card
    raise RefusalError(404, "model_not_found", f"no model named {name!r}", "model")


def _adapter(model: str) -> str | None:
    if model in ("", BASE):
        return None
    return str(_model(model)["id"])


def _openai_parameters(body: dict[str, Any]) -> dict[str, Any]:
    if (body.get("temperature") or 0) > 2:
        raise RefusalError(400, "invalid_value", "temperature must be at most 2", "temperature")
    stop = body.get("stop") or []
    return {
        "max_new_tokens": body.get("max_tokens") or body.get("max_completion_tokens"),
        "temperature": body.get("temperature", 1.0),
        "seed": body.get("seed"),
        "best_of": body.get("n"),
        "stop": [stop] if isinstance(stop, str) else stop,
    }


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _usage(prompt: Any, num_generated: int) -> dict[str, int]:
    num_prompt = len(prompt_words(prompt))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def _completion_choice(index: int, whole: Answer, logprobs: int | None) -> dict[str, Any]:
    table = {
        "tokens": whole.words,
        "token_logprobs": [-0.5 for _ in whole.words],
        "top_logprobs": [{word: -0.5} for word in whole.words],
        "text_offset": [0 for _ in whole.words],
    }
    return {
        "index": index,
        "text": whole.text,
        "finish_reason": "length" if whole.finish_reason == "length" else "stop",
        "logprobs": table if logprobs is not None else None,
        "words": whole.words,
    }


def _chat_choice(index: int, whole: Answer, body: dict[str, Any]) -> dict[str, Any]:
    tops = [{"token": word, "logprob": -1.0, "bytes": None} for word in WORDS]
    top = tops[: body.get("top_logprobs") or 0]
    content = [
        {"token": word, "logprob": -0.5, "bytes": list(word.encode()), "top_logprobs": top}
        for word in whole.words
    ]
    return {
        "index": index,
        "message": {"role": "assistant", "content": whole.text},
        "finish_reason": "length" if whole.finish_reason == "length" else "stop",
        "logprobs": {"content": content} if body.get("logprobs") else None,
        "words": whole.words,
    }


def _chunks(choices: list[dict[str, Any]], is_chat: bool) -> Iterator[dict[str, Any]]:
    for choice in choices:
        if is_chat:
            role = {"role": "assistant", "content": ""}
            yield {"index": choice["index"], "delta": role, "finish_reason": None}
        for i, word in enumerate(choice["words"]):
            is_last = i == len(choice["words"]) - 1
            piece: dict[str, Any] = {"delta": {"content": word}} if is_chat else {"text": word}
            piece["finish_reason"] = choice["finish_reason"] if is_last else None
            yield {"index": choice["index"], "logprobs": None, **piece}


if __name__ == "__main__":
    StubServer(port=int(sys.argv[1])).serve_forever()
