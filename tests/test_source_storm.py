"""A real server while callers and operators do everything with adapters from sources at once: each
answer is its revision's, no tenant gets another's, and in the end nothing is left in any tier."""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients import server_process
from source_servers import CONFIG, WEIGHTS, Hub, Repo, Server

SECONDS = 20.0
WORKERS = 12
PROMPT = "my parcel is late and nobody answers ->"
DEMO = server_process.ROOT / "demo" / "adapters"
KINDS = ("polite", "shout", "sentiment", "ticket-router")
FILES = {
    kind: {name: (DEMO / kind / name).read_bytes() for name in (CONFIG, WEIGHTS)} for kind in KINDS
}
REPOS = ("org/r0", "org/r1", "org/secret")
UPLOADS = {"u0": "ops", "u1": "ops", "acme/u": "acme", "beta/u": "beta"}
"""By name, who sends it."""
NAMES = ("ptr", "ptr2")
KEYS = [
    {"key": "sk-ops", "tenant": "ops", "role": "admin"},
    {"key": "sk-acme", "tenant": "acme"},
    {"key": "sk-beta", "tenant": "beta"},
]
ADAPTERS = "/v1/adapters"


class SourceStorm:
    def __init__(self, seed: int, hub: Hub, web: Server, url: str) -> None:
        self.draw = random.Random(seed)
        self.hub, self.web = hub, web
        self.client = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
        self.expected: dict[str, tuple[int, ...]] = {}
        """By revision, its tokens."""
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.wrong: list[object] = []

    async def ask(self, who: str, name: str, num_tokens: int, **more: str) -> httpx.Response:
        wish = {"adapter_id": name, "max_new_tokens": num_tokens, "ignore_eos_token": True}
        body = {"inputs": PROMPT, "parameters": {**wish, "details": True, **more}}
        return await self.send("POST", "/generate", who, json=body)

    async def send(self, method: str, path: str, who: str = "ops", **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer sk-{who}"}
        reply = await self.client.request(method, path, headers=headers, **more)
        self.statuses[method, reply.status_code] += 1
        if reply.status_code not in (200, 201, 404, 409, 503):
            self.wrong.append((method, path, reply.status_code, reply.text))
        return reply

    # -- what is done -----------------------------------------------------------------------

    def push(self, name: str) -> None:
        commit, files = f"{self.draw.getrandbits(160):040x}", dict(FILES[self.draw.choice(KINDS)])
        readers = {"tok"} if name == "org/secret" else None
        self.hub.repos[name] = Repo(files, commit, readers=readers)

    def put_on_the_web(self) -> None:
        files = FILES[self.draw.choice(KINDS)]
        self.web.files = {f"/w/{name}": body for name, body in files.items()}

    async def generate(self) -> None:
        uploads = [f"upload:{name}" for name in UPLOADS]
        hubs = [f"hub:{name}" for name in REPOS]
        name = self.draw.choice([*uploads, *hubs, *NAMES, f"{self.web.url}/w"])
        who = self.draw.choice(["ops", "acme", "beta"])
        token = self.draw.choice(["tok", "bad", ""]) if name == "hub:org/secret" else ""
        more = {"api_token": token} if token else {}
        num_tokens = self.draw.choice([2, 12, 24])
        reply = await self.ask(who, name, num_tokens, **more)
        if reply.status_code != 200:
            return
        told = tuple(token["id"] for token in reply.json()["details"]["tokens"])
        revision = reply.headers["x-adapter-revision"]
        if told != self.expected.get(revision, ())[:num_tokens]:
            self.wrong.append(("tokens", name, revision))
        owner = UPLOADS.get(name.removeprefix("upload:"), "ops")
        is_anothers = owner != "ops" and who not in ("ops", owner)
        if is_anothers or (name == "hub:org/secret" and token != "tok"):
            self.wrong.append(("another's", who, name, token))

    async def upload(self) -> None:
        name, who = self.draw.choice(list(UPLOADS.items()))
        how = self.draw.choice([("PUT", "files"), ("PUT", "files"), ("POST", "tensors")])
        files = FILES[self.draw.choice(KINDS)]
        sent = [(file, (file, body)) for file, body in files.items()]
        await self.send(how[0], f"{ADAPTERS}/{name}/{how[1]}", who, files=sent)

    async def operate(self) -> None:
        name = self.draw.choice(["upload:u0", "hub:org/r0", "hub:org/r1", "ptr", "ptr2"])
        deed = self.draw.choice(["pin", "unpin", "load", "unload"])
        await self.send("POST", f"{ADAPTERS}/{name}/{deed}")

    async def name(self) -> None:
        targets = ("hub:org/r0", "hub:org/r1", "upload:u0", "upload:u1")
        wish = {"name": self.draw.choice(NAMES), "adapter_id": self.draw.choice(targets)}
        await self.send("POST", ADAPTERS, json=wish)

    async def remove(self) -> None:
        name = self.draw.choice([*(f"upload:{name}" for name in UPLOADS), "ptr", "hub:org/r1"])
        await self.send("DELETE", f"{ADAPTERS}/{name}")
        if name.startswith("hub:"):
            await self.send("POST", ADAPTERS, json={"name": name})

    async def change(self) -> None:
        self.push(self.draw.choice(REPOS))
        self.put_on_the_web()

    async def work(self) -> None:
        deeds = (self.generate, self.upload, self.operate, self.name, self.remove, self.change)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            (deed,) = self.draw.choices(deeds, (55, 14, 6, 6, 6, 8))
            await deed()

    # -- what is left -----------------------------------------------------------------------

    async def run(self) -> None:
        for kind in KINDS:
            reply = await self.ask("ops", kind, 24)
            tokens = tuple(token["id"] for token in reply.json()["details"]["tokens"])
            self.expected[reply.headers["x-adapter-revision"]] = tokens
        assert len(set(self.expected.values())) == len(KINDS)
        await asyncio.gather(*(self.work() for _ in range(WORKERS)))
        await self.take_all_away()
        metrics = (await self.send("GET", "/metrics")).text
        await self.client.aclose()
        told = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[:1] != "#")
        for name in (
            "lory_adapter_downloads",
            "lory_adapter_cache_bytes",
            "lory_adapter_cache_entries",
            'lory_adapters{tier="device"}',
            'lory_adapter_bytes{tier="host"}',
            'lory_adapter_bytes{tier="device"}',
            'lory_pinned_adapters{tier="host"}',
            'lory_kv_blocks{state="used"}',
        ):
            assert float(told[name]) == 0, name

    async def take_all_away(self) -> None:
        for name in [*NAMES, *(f"upload:{name}" for name in UPLOADS)]:
            await self.send("DELETE", f"{ADAPTERS}/{name}")
        for name in (*(f"hub:{name}" for name in REPOS), f"{self.web.url}/w"):
            await self.send("DELETE", f"{ADAPTERS}/{name}")
        for kind in KINDS:
            await self.send("POST", f"{ADAPTERS}/{kind}/unload")
        listed = (await self.send("GET", ADAPTERS)).json()["data"]
        assert not [one for one in listed if one["requests"] or one["pinned"]]
        assert {one["id"] for one in listed} == set(KINDS)


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_everything_at_once_leaves_every_answer_right_and_nothing_behind(
    tmp_path: Path, seed: int
) -> None:
    adapters, cache = tmp_path / "adapters", tmp_path / "cache"
    for kind, files in FILES.items():
        (adapters / kind).mkdir(parents=True)
        for name, body in files.items():
            (adapters / kind / name).write_bytes(body)
    (tmp_path / "keys").write_text(json.dumps(KEYS))
    with Hub().running() as hub, Server().running() as web:
        flags = ["--adapter-cache", str(cache), "--adapter-uploads", "--threads", "1"]
        flags += ["--hub-endpoint", hub.url, "--hub-hosts", hub.cdn.url]
        flags += ["--adapter-hosts", web.url, "--adapter-cache-size", "3MB"]
        flags += ["--adapter-recheck", "0", "--max-resident-adapters", "4"]
        flags += ["--api-keys", str(tmp_path / "keys"), "--registry", str(tmp_path / "registry")]
        with server_process.serving(tmp_path / "log", *flags, adapters=adapters) as url:
            storm = SourceStorm(seed, hub, web, url)
            storm.put_on_the_web()
            for name in REPOS:
                storm.push(name)
            asyncio.run(storm.run())
    assert not storm.wrong
    assert storm.statuses["POST", 200] > 50
    assert not [*(cache / "held").iterdir(), *(cache / "arriving").iterdir()]
    assert "Traceback" not in (tmp_path / "log").read_text()
