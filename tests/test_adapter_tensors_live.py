"""A real server whose adapter a trainer replaces again and again, while ten streams read it."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from clients.server_process import ROOT, serving
from lory_client import BadRequestError, Client
from test_adapter_tensors import with_config

STREAMS = 10
PROMPT = "my parcel is late and nobody answers ->"
KINDS = ("polite", "shout")
FILES = {
    kind: {path.name: path.read_bytes() for path in (ROOT / "demo" / "adapters" / kind).iterdir()}
    for kind in KINDS
}
NAME = "upload:trained"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tensors")
    flags = ("--adapter-cache", str(folder / "cache"), "--adapter-uploads")
    with serving(folder / "log", *flags) as url:
        yield url


class Reader(threading.Thread):
    """Asks for the adapter again and again; what each answer said, and of which revision."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.must_end = threading.Event()
        self.answers: list[tuple[str, tuple[int, ...]]] = []
        self.failures: list[Any] = []
        self.start()

    def run(self) -> None:
        parameters = {"adapter_id": NAME, "max_new_tokens": 40, "ignore_eos_token": True}
        body = {"inputs": PROMPT, "parameters": parameters}
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self.must_end.is_set():
                self._take(client, body)

    def _take(self, client: httpx.Client, body: Any) -> None:
        with client.stream("POST", f"{self._url}/generate_stream", json=body) as reply:
            revision, ids = reply.headers.get("x-adapter-revision", ""), []
            for line in reply.iter_lines():
                event = json.loads(line[5:]) if line.startswith("data:") else {}
                if "error" in event:
                    self.failures.append(event)
                elif event:
                    ids.append(event["token"]["id"])
        self.answers.append((revision, tuple(ids)))


def rss_bytes() -> int:
    """Of the server and its processes."""
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))


def gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))


@pytest.mark.parametrize("num_steps", [8, pytest.param(100, marks=pytest.mark.full)])
def test_streams_are_exact_while_their_adapter_is_replaced_at_every_step(
    url: str, num_steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kind_of: dict[str, str] = {}
    seconds: list[float] = []
    with Client(url) as client:

        def step(number: int) -> None:
            files = FILES[KINDS[number % 2]]
            body = with_config(files, step=f"{num_steps}:{number}")
            started = time.perf_counter()
            told = client.adapters.replace("trained", body)
            seconds.append(time.perf_counter() - started)
            assert told.revision not in (None, *kind_of)
            kind_of[str(told.revision)] = KINDS[number % 2]
            answer = client.generate(PROMPT, NAME, max_new_tokens=3)
            assert answer.adapter_revision == told.revision

        step(0)
        expected = {
            kind: client.generate(PROMPT, kind, max_new_tokens=40, ignore_eos_token=True)
            for kind in KINDS
        }
        ids = {kind: tuple(t.id for t in answer.tokens) for kind, answer in expected.items()}
        assert ids["polite"] != ids["shout"]
        readers, settled_bytes = [Reader(url) for _ in range(STREAMS)], 0
        for number in range(1, num_steps):
            step(number)
            if number == num_steps // 4:
                settled_bytes = rss_bytes()
        grown_bytes = rss_bytes() - settled_bytes
        for reader in readers:
            reader.must_end.set()
        for reader in readers:
            reader.join(60)
        assert not any(reader.failures for reader in readers)
        answers = [answer for reader in readers for answer in reader.answers]
        assert len(answers) >= STREAMS
        for revision, told in answers:
            assert told == ids[kind_of[revision]]
        client.generate(PROMPT, NAME, max_new_tokens=1)
        adapter = client.adapters.get(NAME)
        assert len(adapter.revisions) == 1, "older ones are in memory"
        assert gauge(url, "lory_adapter_cache_entries") == 1
    with capsys.disabled():
        middle = sorted(seconds)[len(seconds) // 2]
        print(
            f"\n{num_steps} replacements beside {STREAMS} streams: median {middle * 1e3:.0f} ms,"
            f" longest {max(seconds) * 1e3:.0f} ms, {len(answers)} answers,"
            f" memory grew by {grown_bytes / 2**20:.1f} MiB"
        )
    assert grown_bytes < 32 * 2**20


def test_one_that_does_not_fit_the_base_replaces_nothing(url: str) -> None:
    with Client(url) as client:
        good = client.adapters.replace("fits", with_config(FILES["polite"]))
        config = json.loads(FILES["polite"]["adapter_config.json"])
        wrong = json.dumps({**config, "r": config["r"] * 2}).encode()
        with pytest.raises(BadRequestError, match="upload:fits"):
            client.adapters.replace("fits", FILES["polite"]["adapter_model.safetensors"], wrong)
        answer = client.generate(PROMPT, "upload:fits", max_new_tokens=2)
        assert answer.adapter_revision == good.revision


def test_an_upload_is_read_when_it_is_asked_for(url: str) -> None:
    files = FILES["polite"]
    with Client(url) as client:
        config = json.loads(files["adapter_config.json"])
        told = client.adapters.upload("later", files["adapter_model.safetensors"], config)
        assert (told.id, told.revision) == ("upload:later", None)
        text = client.generate(PROMPT, told.id, max_new_tokens=10).text
        assert text == client.generate(PROMPT, "polite", max_new_tokens=10).text
        client.adapters.register("now@prod", told.id)
        assert client.generate(PROMPT, "now@prod", max_new_tokens=10).text == text
        client.adapters.delete(told.id)
