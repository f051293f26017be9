"""A server with fine-tuning jobs, asked over HTTP, whose trainer trains nothing."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

import fake_trainer
from lory_router.app import create_app
from lory_router.engine import Unavailable
from lory_router.keys import Keyring
from lory_router.metrics import Metrics
from lory_router.registry import Registry
from lory_router.settings import RouterSettings
from lory_router.tuning.handover import Handover
from lory_router.tuning.meter import Meter
from lory_router.tuning.service import Tuning
from lory_router.tuning.settings import TuningSettings
from lory_server.messages import Failure, OrderDone, OrderKind
from scripted_engine import BASE, TEXT, ScriptedEngine

FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "hi"}]},
    "preferred_output": [{"role": "assistant", "content": "ho"}],
    "non_preferred_output": [{"role": "assistant", "content": "ha"}],
}
WAIT_S = 20.0


@dataclass
class World:
    client: httpx.AsyncClient
    tuning: Tuning
    settings: TuningSettings
    running: asyncio.Task[None]
    serving: asyncio.Event
    """Set while requests run, or so the jobs think."""

    async def upload(self, *rows: Any, name: str = "rows.jsonl") -> str:
        reply = await self.send("".join(json.dumps(row) + "\n" for row in rows).encode(), name)
        assert reply.status_code == 200, reply.text
        return reply.json()["id"]

    async def send(self, content: bytes, name: str = "rows.jsonl", **fields: str) -> httpx.Response:
        data = {"purpose": "fine-tune", **fields}
        return await self.client.post(FILES, data=data, files={"file": (name, content)})

    async def create(self, **fields: Any) -> dict[str, Any]:
        body = {"model": BASE, "seed": 1, **fields}
        body.setdefault("training_file", await self.upload(CHAT))
        reply = await self.client.post(JOBS, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def job(self, job_id: str) -> dict[str, Any]:
        return (await self.client.get(f"{JOBS}/{job_id}")).json()

    async def until(self, job_id: str, *statuses: str) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while (job := await self.job(job_id))["status"] not in statuses:
                await asyncio.sleep(0.02)
        return job

    async def until_step(self, job_id: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not (await self.events(job_id, "metrics")):
                await asyncio.sleep(0.02)

    async def events(self, job_id: str, kind: str = "message") -> list[str]:
        """Oldest first."""
        data = (await self.client.get(f"{JOBS}/{job_id}/events?limit=100")).json()["data"]
        return [event["message"] for event in data[::-1] if event["type"] == kind]


KEYS = """
- {key: root, tenant: default, role: admin}
- {key: of-acme, tenant: acme}
- {key: of-other, tenant: other}
"""


def keyring(folder: Path) -> Keyring:
    path = folder / "keys.yaml"
    path.write_text(KEYS)
    return Keyring((), str(path))


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def settings_in(folder: Path, **changes: Any) -> TuningSettings:
    (folder / "adapters").mkdir(exist_ok=True)
    found = TuningSettings(
        folder=folder / "tuning",
        adapters=folder / "adapters",
        base="/base",
        model_names=(BASE, "also"),
        command=(sys.executable, fake_trainer.__file__),
        stop_grace_s=5.0,
    )
    return replace(found, **changes)


def unserved(folder: Path, registry: Registry) -> Tuning:
    """Jobs without a server."""
    handover = Handover(ServingEngine(), registry)
    return Tuning(settings_in(folder), {}, handover, Meter(0.0), asyncio.Event())


class RefusingEngine(ScriptedEngine):
    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        failure = Failure(code="adapter_invalid", message="a tensor matches nothing")
        return OrderDone(call_id=1, entry=None, failure=failure)


class AbsentEngine(ScriptedEngine):
    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        raise Unavailable("loading", "it starts")


class ServingEngine(ScriptedEngine):
    """Knows whatever is asked for."""

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        return OrderDone(call_id=1, entry=None, revision="r")


@asynccontextmanager
async def world(
    folder: Path, engine: type[ScriptedEngine] = ServingEngine, **changes: Any
) -> AsyncIterator[World]:
    settings = settings_in(folder, **changes)
    registry = Registry(str(folder / "registry"))
    handover = Handover(engine(), registry)
    meter, serving = Meter(price_per_hour=3600.0), asyncio.Event()
    tuning = Tuning(settings, dict(os.environ), handover, meter, serving)
    metrics = Metrics(model=BASE, price_per_hour=3600.0, trained=meter.charged)
    metrics.add(meter)
    front = create_app(
        engine(),
        RouterSettings(model_names=(BASE,)),
        TEXT,
        metrics,
        registry,
        keys=keyring(folder),
        tuning=tuning,
    )
    transport = httpx.ASGITransport(app=front)
    running = asyncio.create_task(tuning.run())
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=key("root")
    ) as client:
        yield World(client, tuning, settings, running, serving)
        tuning.stop()
        await running
    tuning.close()
    registry.close()


def run(folder: Path, story: Callable[[World], Awaitable[None]], **changes: Any) -> None:
    async def whole() -> None:
        async with world(folder, **changes) as found:
            await story(found)

    asyncio.run(whole())


def name_of(job: dict[str, Any]) -> str:
    return f"ft-{BASE}-{job['id'].partition('-')[2][:12]}"


async def until_made(world: World, job: dict[str, Any]) -> Path:
    """The adapter, once its run is over and it waits to be handed over."""
    made = world.settings.adapters / name_of(job)
    await until(lambda: made.is_dir() and not num_running(world))
    await asyncio.sleep(0.2)
    return made


def num_running(world: World) -> float:
    [sample] = next(iter(world.tuning.meter.collect())).samples
    return sample.value


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.02)
