"""A stand-in for a server under load: /v1/models, /info and /v1/completions, answered by rote."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ADAPTERS = ("a00", "a01", "a02")


@dataclass
class Stub:
    """What it was asked, and how it behaves."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    token_pause_s: float = 0.0
    behaviour: str = "answers"
    """answers, overloaded (429), error event, cut (mid-stream) or silent."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        cards = [{"id": "base", "parent": None}] + [{"id": a, "parent": "base"} for a in ADAPTERS]
        pages = {"/v1/models": {"data": cards}, "/info": {"vocab_size": 50, "version": "stub"}}
        self._whole(200, pages[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.stub.asked.append(body)
        if self.stub.behaviour == "silent":
            time.sleep(1.0)
        elif self.stub.behaviour == "overloaded":
            self._whole(429, {"error": {"message": "full"}})
        elif body["stream"]:
            self._stream(body)
        else:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            self._whole(200, {"choices": [{"text": "x"}], "usage": usage})
        self.close_connection = True

    def _whole(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._chunk(": a comment\n\n")
        for number in range(body["max_tokens"]):
            time.sleep(self.stub.token_pause_s)
            if number == 1 and self.stub.behaviour == "cut":
                return
            if number == 1 and self.stub.behaviour == "error event":
                self._event({"error": {"message": "the engine died"}})
                break
            self._event({"choices": [{"text": f"t{number} ", "finish_reason": None}]})
        self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self._chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, value: object) -> None:
        self._chunk(f"data: {json.dumps(value)}\n\n")

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
        self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def running_stub() -> Iterator[Stub]:
    stub = Stub()
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
