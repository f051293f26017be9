"""A real server: what was decided before it started, and ten streams while an adapter changes."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.server_process import ROOT, serving
from lory_client import AdapterNotFoundError, Client
from lory_router.names import Target
from lory_router.registry import Registry

STREAMS = 10
PROMPT = "my parcel is late and nobody answers ->"


@pytest.fixture(scope="module")
def adapters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "adapters"
    for name in ("polite", "shout", "redact", "sentiment"):
        shutil.copytree(ROOT / "demo" / "adapters" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def url(adapters_dir: Path) -> Iterator[str]:
    path = adapters_dir.parent / "registry"
    registry = Registry(str(path))
    with closing(registry):
        asyncio.run(registry.pin(Target("shout")))
        asyncio.run(registry.register("loud", Target("shout")))
        asyncio.run(registry.remove("redact"))
    log, flags = adapters_dir.parent / "log", ("--registry", str(path), "--warm-up", "sentiment")
    with serving(log, *flags, adapters=adapters_dir) as url:
        yield url


class Stream(threading.Thread):
    """One streamed answer, read to its end."""

    def __init__(self, url: str, adapter_id: str) -> None:
        super().__init__()
        self._url = url
        self._body = {
            "inputs": PROMPT,
            "parameters": {
                "adapter_id": adapter_id,
                "max_new_tokens": 900,
                "ignore_eos_token": True,
            },
        }
        self.has_begun = threading.Event()
        self.ids: list[int] = []
        self.revision = ""
        self.failure: Any = None
        self.start()

    def run(self) -> None:
        url = f"{self._url}/generate_stream"
        with httpx.stream("POST", url, json=self._body, timeout=60, trust_env=False) as reply:
            self.revision = reply.headers.get("x-adapter-revision", "")
            for line in reply.iter_lines():
                if line.startswith("data:"):
                    self._take(json.loads(line[5:]))

    def _take(self, event: Any) -> None:
        if "error" in event:
            self.failure = event
        else:
            self.ids.append(event["token"]["id"])
        self.has_begun.set()


def answers(url: str, adapter_id: str) -> Stream:
    stream = Stream(url, adapter_id)
    stream.join(60)
    return stream


def test_decisions_of_before_the_start_hold(url: str) -> None:
    with Client(url) as client:
        known = {adapter.id: adapter for adapter in client.adapters.list()}
        assert set(known) == {"polite", "shout", "sentiment"}
        assert (known["shout"].state, known["shout"].pinned) == ("device", True)
        assert (known["sentiment"].state, known["sentiment"].pinned) == ("device", False)
        assert known["polite"].state == "disk"
        assert dict(known["shout"].names) == {"loud": None}
        loud, shout = (
            client.generate(PROMPT, name, max_new_tokens=20) for name in ("loud", "shout")
        )
        assert loud.text == shout.text
        with pytest.raises(AdapterNotFoundError):
            client.generate(PROMPT, "redact")
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    assert 'lory_pinned_adapters{tier="device"} 1.0' in metrics


def test_ten_streams_are_exact_while_their_adapter_is_replaced_and_removed(
    url: str, adapters_dir: Path
) -> None:
    polite, shout = answers(url, "polite"), answers(url, "shout")
    assert polite.ids != shout.ids
    old = [Stream(url, "polite") for _ in range(STREAMS)]
    assert all(stream.has_begun.wait(30) for stream in old)
    (adapters_dir / "polite").rename(adapters_dir / ".old")
    shutil.copytree(adapters_dir / "shout", adapters_dir / ".new")
    (adapters_dir / ".new").rename(adapters_dir / "polite")
    new = [Stream(url, "polite") for _ in range(STREAMS)]
    assert all(stream.has_begun.wait(30) for stream in new)
    with Client(url) as client:
        client.adapters.delete("polite")
        with pytest.raises(AdapterNotFoundError):
            client.generate(PROMPT, "polite")
        assert any(stream.is_alive() for stream in new), "nothing ran when it was removed"
        for stream in (*old, *new):
            stream.join(60)
            assert stream.failure is None
        assert [stream.ids for stream in old] == [polite.ids] * STREAMS
        assert [stream.ids for stream in new] == [shout.ids] * STREAMS
        assert {stream.revision for stream in old} == {polite.revision}
        assert {stream.revision for stream in new} == {shout.revision}
        assert client.adapters.register("polite").revision == shout.revision
        again = client.generate(PROMPT, "polite", max_new_tokens=20)
        assert again.text == client.generate(PROMPT, "shout", max_new_tokens=20).text
