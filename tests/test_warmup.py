"""Pins and warm-ups are in memory before the server says that it is ready."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest

from lory_router.app import create_app
from lory_router.config import StartError
from lory_router.engine import Unavailable
from lory_router.names import Target
from lory_router.registry import Registry
from lory_router.settings import RouterSettings
from lory_router.warmup import AT_ONCE, WarmUp
from lory_server.messages import Failure, OrderDone
from lory_server.recipes import MergeSource, Recipe
from scripted_engine import BASE, REVISION, TEXT, Ledger, ScriptedEngine


class SlowEngine(ScriptedEngine):
    """Orders wait until they are let through."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.may_go = asyncio.Event()
        self.num_waiting = self.most_waiting = 0

    async def order(self, *order: Any) -> OrderDone:
        self.num_waiting += 1
        self.most_waiting = max(self.most_waiting, self.num_waiting)
        await self.may_go.wait()
        self.num_waiting -= 1
        return await super().order(*order)


async def registered(*pins: Target, **names: Target) -> Registry:
    registry = Registry()
    for pin in pins:
        await registry.pin(pin)
    for name, target in names.items():
        await registry.register(f"{target.adapter_id}@{name}", target)
    return registry


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 5))


def test_health_is_bad_until_pins_and_warm_ups_are_loaded() -> None:
    async def story() -> None:
        engine = SlowEngine()
        registry = await registered(Target("french", REVISION), prod=Target("org/german", REVISION))
        warm_up = WarmUp(engine, registry, ["org/german@prod"])
        settings = RouterSettings(model_names=(BASE,))
        app = create_app(engine, settings, TEXT, Ledger(), registry, warm_up.is_done)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://lory") as client:
            assert (await client.get("/health")).status_code == 503
            warm_up.begin()
            await asyncio.sleep(0.01)
            assert (await client.get("/health")).status_code == 503
            reply = await client.post("/generate", json={"inputs": "a"})
            assert reply.status_code == 200, "requests need not wait"
            engine.may_go.set()
            await warm_up.check()
            assert (await client.get("/health")).status_code == 200
        assert engine.orders == [("pin", "french", REVISION), ("load", "org/german", REVISION)]

    run(story())


def test_every_engine_that_is_started_is_warmed() -> None:
    async def story() -> None:
        engine = SlowEngine()
        warm_up = WarmUp(engine, await registered(Target("french")), [])
        warm_up.begin()
        checking = asyncio.ensure_future(warm_up.check())
        await asyncio.sleep(0.01)
        warm_up.begin()
        engine.may_go.set()
        await checking
        assert engine.orders == [("pin", "french", "")]
        warm_up.begin()
        assert not warm_up.is_done()
        await warm_up.check()
        assert engine.orders == [("pin", "french", "")] * 2
        warm_up.stop()

    run(story())


@pytest.mark.parametrize(
    ("name", "says"),
    [("frensh", "adapter 'frensh': there is none"), ("french@prod", "no adapter is called")],
)
def test_a_warm_up_that_cannot_be_loaded_ends_the_start(name: str, says: str) -> None:
    async def story() -> None:
        warm_up = WarmUp(ScriptedEngine(), Registry(), ["french", name])
        warm_up.begin()
        with pytest.raises(StartError, match=f"--warm-up: {says}"):
            await warm_up.check()

    run(story())


def test_a_pin_that_cannot_be_loaded_is_told_and_the_server_starts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        engine = ScriptedEngine(refuses=Failure(code="adapter_invalid", message="damaged"))
        warm_up = WarmUp(engine, await registered(Target("french")), [])
        warm_up.begin()
        await warm_up.check()

    with caplog.at_level(logging.WARNING):
        run(story())
    assert "pinned adapter 'french' is not loaded: adapter 'french': damaged" in caplog.text


@pytest.mark.parametrize(("reason", "fails"), [("loading", True), ("down", False)])
def test_an_engine_that_ends_is_no_failure_and_one_that_is_late_is(
    reason: Any, fails: bool
) -> None:
    async def story() -> None:
        warm_up = WarmUp(
            ScriptedEngine(down=Unavailable(reason, "not yet")), Registry(), ["french"]
        )
        warm_up.begin()
        if fails:
            with pytest.raises(StartError, match="not yet"):
                await warm_up.check()
        else:
            await warm_up.check()

    run(story())


def test_so_many_are_brought_in_at_once() -> None:
    async def story() -> None:
        names = [f"a{index}" for index in range(3 * AT_ONCE)]
        engine = SlowEngine(adapters=tuple(names))
        warm_up = WarmUp(engine, Registry(), names)
        warm_up.begin()
        await asyncio.sleep(0.01)
        engine.may_go.set()
        await warm_up.check()
        assert engine.most_waiting == AT_ONCE
        assert len(engine.loaded) == len(names)

    run(story())


def test_a_pinned_merge_whose_source_was_removed_is_not_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was pinned again at every start, and took memory though nobody was served it."""

    async def story() -> None:
        engine, registry = ScriptedEngine(), await registered(Target("blend"), Target("french"))
        sources = (MergeSource("french", 0.5), MergeSource("org/german", 0.5))
        await registry.save_merge(Recipe(sources=sources, name="blend"))
        await registry.remove("org/german")
        warm_up = WarmUp(engine, registry, [])
        for _ in range(2):
            warm_up.begin()
            await warm_up.check()
        assert engine.orders == [("pin", "french", "")] * 2
        assert Target("blend") in registry.state.pins, "it is wished for all the same"

    with caplog.at_level(logging.WARNING):
        run(story())
    says = (
        "pinned adapter 'blend' is not loaded: adapter 'blend': its source 'org/german' was removed"
    )
    assert caplog.text.count(says) == 2
