"""The engine as a child process: what callers see of its lives and deaths."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

from lory_router.engine import BufferRoom, SequenceRequest, Unavailable
from lory_router.engine_client import ChildEngine, EngineDeath
from lory_router.metrics import Metrics
from lory_router.sequence_stream import SequenceStream
from lory_router.supervisor import GaveUp, RestartPolicy, Supervisor
from lory_router.wire import EventDecoder, WireError, encode_frame
from lory_server.messages import (
    AdapterList,
    EngineOptions,
    Fatal,
    Finished,
    ListAdapters,
    PromptLogprobs,
    Sampling,
    Token,
)

FAKE = str(Path(__file__).with_name("fake_engine_process.py"))
QUICK = RestartPolicy(first_delay_s=0.05, max_delay_s=0.2, max_deaths=3)
STEP_TIMEOUT_S = 0.5


@dataclass
class House:
    """An engine, its keeper, and the task that keeps it."""

    engine: ChildEngine
    supervisor: Supervisor
    metrics: Metrics
    keeping: asyncio.Task[None]

    async def until(self, condition: Callable[[], object], timeout_s: float = 8.0) -> float:
        """Wait for it; how long that took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < timeout_s, "waited too long"
            if self.keeping.done():
                self.keeping.result()
            await asyncio.sleep(0.005)
        return time.monotonic() - start

    async def ready(self) -> int:
        await self.until(self.engine.is_ready)
        assert self.engine.pid is not None
        return self.engine.pid


def build(*arguments: str) -> tuple[ChildEngine, Metrics]:
    metrics = Metrics(model="fake")
    engine = ChildEngine(
        EngineOptions(model="fake"),
        environment=os.environ,
        on_info=metrics.engine_up,
        on_report=metrics.engine_report,
        step_timeout_s=STEP_TIMEOUT_S,
        command=(sys.executable, FAKE, *arguments),
    )
    return engine, metrics


@asynccontextmanager
async def house(*arguments: str) -> AsyncIterator[House]:
    engine, metrics = build(*arguments)
    supervisor = Supervisor(engine, metrics, QUICK)
    keeping = asyncio.create_task(supervisor.run())
    try:
        yield House(engine, supervisor, metrics, keeping)
    finally:
        supervisor.stop()
        await asyncio.gather(keeping, return_exceptions=True)


def request(
    script: str = "", num_tokens: int = 4, room: BufferRoom | None = None
) -> SequenceRequest:
    return SequenceRequest(
        prompt_ids=(11, 12, 13),
        sampling=Sampling(max_new_tokens=num_tokens, seed=0),
        adapter_id=script,
        room=room or BufferRoom(),
    )


async def read_all(stream: SequenceStream) -> tuple[list[int], Finished]:
    """The tokens and the one end; fails on a second end or on tokens after it."""
    tokens: list[int] = []
    ends: list[Finished] = []
    async for event in stream:
        assert not ends
        if isinstance(event, Finished):
            ends.append(event)
        elif isinstance(event, tuple):
            assert event
            tokens += [token.token_id for token in event]
    assert len(ends) == 1
    return tokens, ends[0]


def in_house(story: Callable[[House], Awaitable[None]], *arguments: str) -> None:
    async def run() -> None:
        async with house(*arguments) as home:
            await story(home)

    asyncio.run(asyncio.wait_for(run(), 20))


# -- a healthy engine -----------------------------------------------------------------------


def test_a_request_yields_its_tokens_in_order_and_one_end() -> None:
    async def story(home: House) -> None:
        await home.ready()
        tokens, end = await read_all(await home.engine.submit(request(num_tokens=5)))
        assert tokens == [11, 12, 13, 11, 12]
        assert (end.reason, end.usage.generated_tokens, end.failure) == ("length", 5, None)

    in_house(story)


def test_many_requests_at_once_each_get_their_own_tokens() -> None:
    async def story(home: House) -> None:
        await home.ready()
        streams = [await home.engine.submit(request(num_tokens=n)) for n in range(1, 30)]
        results = await asyncio.gather(*(read_all(stream) for stream in streams))
        assert [len(tokens) for tokens, _ in results] == list(range(1, 30))
        assert home.engine.num_in_flight == 0

    in_house(story)


def test_an_engine_serves_from_the_first_request_to_the_end_of_the_last() -> None:
    """However they end; what gives way to requests waits for this."""

    async def story(home: House) -> None:
        await home.ready()
        assert not home.engine.serving.is_set()
        short, long = [await home.engine.submit(request(num_tokens=n)) for n in (1, 50)]
        assert home.engine.serving.is_set()
        await read_all(short)
        assert home.engine.serving.is_set() == bool(home.engine.num_in_flight)
        await read_all(long)
        assert not home.engine.serving.is_set()
        stuck = await home.engine.submit(request("stuck", 100))
        assert home.engine.serving.is_set()
        stuck.cancel()
        await read_all(stuck)
        assert not home.engine.serving.is_set()
        lost = await home.engine.submit(request("slow", 10_000))
        home.engine.kill()
        await read_all(lost)
        await home.until(lambda: not home.engine.serving.is_set())

    in_house(story)


def test_cancel_ends_the_request_with_the_engines_own_word() -> None:
    async def story(home: House) -> None:
        await home.ready()
        stream = await home.engine.submit(request("stuck", 100))
        stream.cancel("timeout")
        stream.cancel("timeout")
        assert (await read_all(stream))[1].reason == "timeout"
        stream.cancel()
        assert home.engine.num_in_flight == 0

    in_house(story)


def test_adapters_are_listed_and_an_unknown_one_fails_alone() -> None:
    async def story(home: House) -> None:
        await home.ready()
        assert "slow" in {entry.adapter_id for entry in await home.engine.list_adapters()}
        _, end = await read_all(await home.engine.submit(request("missing")))
        assert end.failure is not None
        assert end.failure.code == "adapter_not_found"
        assert home.engine.is_ready()

    in_house(story)


def test_a_reader_too_slow_is_cut_off_after_what_was_kept() -> None:
    async def story(home: House) -> None:
        await home.ready()
        stream = await home.engine.submit(request("flood", 100_000, BufferRoom(300)))
        await home.until(lambda: home.engine.num_in_flight == 0)
        tokens, end = await read_all(stream)
        assert len(tokens) == 300
        assert end.reason == "error"
        assert end.failure is not None
        assert end.failure.code == "reader_too_slow"
        assert "read too slowly" in end.failure.message
        assert end.usage.generated_tokens < 100_000
        await read_all(await home.engine.submit(request()))

    in_house(story)


def test_before_the_base_is_loaded_requests_are_told_to_wait() -> None:
    async def story(home: House) -> None:
        with pytest.raises(Unavailable) as told:
            await home.engine.submit(request())
        assert told.value.reason == "loading"
        with pytest.raises(Unavailable):
            await home.engine.list_adapters()

    in_house(story)


# -- deaths ---------------------------------------------------------------------------------


def test_a_killed_engine_ends_its_streams_within_two_seconds_and_comes_back() -> None:
    async def story(home: House) -> None:
        pid = await home.ready()
        stream = await home.engine.submit(request("slow", 10_000))
        calls = asyncio.ensure_future(home.engine.list_adapters())
        await home.until(lambda: stream._tokens)
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        tokens, end = await read_all(stream)
        assert time.monotonic() - start < 2
        assert tokens
        assert end.failure is not None
        assert end.failure.code == "engine_died"
        assert end.usage.generated_tokens == len(tokens)
        await asyncio.gather(calls, return_exceptions=True)
        assert await home.ready() != pid
        assert (await read_all(await home.engine.submit(request())))[1].reason == "length"
        assert b"lory_engine_restarts_total 1.0" in home.metrics.render()[0]

    in_house(story)


def test_a_stopped_engine_is_killed_once_it_has_been_silent_for_too_long() -> None:
    async def story(home: House) -> None:
        pid = await home.ready()
        stream = await home.engine.submit(request("stuck", 100))
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        _, end = await read_all(stream)
        assert STEP_TIMEOUT_S < time.monotonic() - start < STEP_TIMEOUT_S + 2.5
        assert end.failure is not None
        assert "silent" in end.failure.message
        assert await home.ready() != pid
        assert not psutil.pid_exists(pid)

    in_house(story)


def test_an_engine_that_loads_for_long_is_not_taken_for_a_silent_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large base is read for minutes without a word."""
    monkeypatch.setattr("lory_router.engine_client.SILENCE_MARGIN_S", 0.0)
    starts = tmp_path / "starts"

    async def story(home: House) -> None:
        await home.ready()

    in_house(story, "--starts", str(starts), "--load-seconds", str(STEP_TIMEOUT_S + 0.5))
    assert len(starts.read_text().splitlines()) == 1


def test_an_idle_engine_is_not_taken_for_a_silent_one() -> None:
    async def story(home: House) -> None:
        pid = await home.ready()
        await asyncio.sleep(STEP_TIMEOUT_S + 1.5)
        assert await home.ready() == pid

    in_house(story)


def test_a_router_that_was_held_up_does_not_kill_its_engine() -> None:
    async def story(home: House) -> None:
        pid = await home.ready()
        time.sleep(STEP_TIMEOUT_S + 2)
        await asyncio.sleep(0.3)
        assert await home.ready() == pid

    in_house(story)


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("crash", "exited with code 3"),
        ("garbage", "protocol"),
        ("device-lost", "the device is lost"),
        ("freeze", "silent"),
    ],
)
def test_every_way_to_die_is_named(script: str, cause: str) -> None:
    async def run() -> None:
        engine, _ = build()
        living = asyncio.ensure_future(engine.live())
        while not engine.is_ready():
            await asyncio.sleep(0.005)
        stream = await engine.submit(request(script))
        _, end = await read_all(stream)
        death = await living
        assert end.failure is not None
        assert end.failure.code == "engine_died"
        assert cause in death.cause
        assert not engine.is_ready()
        with pytest.raises(Unavailable) as told:
            await engine.submit(request())
        assert told.value.reason == "down"

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_fatal_start_is_not_tried_again(tmp_path: Path) -> None:
    starts = tmp_path / "starts"

    async def story(home: House) -> None:
        with pytest.raises(GaveUp, match="no weights in the folder"):
            await home.keeping

    in_house(story, "--starts", str(starts), "--fatal", "no weights in the folder")
    assert len(starts.read_text().splitlines()) == 1


def test_an_engine_that_dies_over_and_over_is_given_up(tmp_path: Path) -> None:
    starts = tmp_path / "starts"

    async def story(home: House) -> None:
        with pytest.raises(GaveUp, match=r"exited with code 9 \(3 times in a row"):
            await home.keeping

    in_house(story, "--starts", str(starts), "--crash-starts", "99")
    assert len(starts.read_text().splitlines()) == QUICK.max_deaths


def test_deaths_are_forgiven_once_a_request_was_served(tmp_path: Path) -> None:
    async def story(home: House) -> None:
        for _ in range(QUICK.max_deaths + 1):
            pid = await home.ready()
            await read_all(await home.engine.submit(request(num_tokens=1)))
            os.kill(pid, signal.SIGKILL)
            await home.until(lambda pid=pid: home.engine.pid != pid)
        await home.ready()

    in_house(story, "--starts", str(tmp_path / "starts"), "--crash-starts", "2")


def test_restart_delays_double_up_to_their_limit() -> None:
    policy = RestartPolicy()
    assert [policy.delay_s(n) for n in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


# -- the end --------------------------------------------------------------------------------


def test_draining_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def story(home: House) -> None:
        await home.ready()
        stream = await home.engine.submit(request("slow", 20))
        draining = asyncio.ensure_future(home.supervisor.drain(5))
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable) as told:
            await home.engine.submit(request())
        assert told.value.reason == "draining"
        assert home.engine.is_draining()
        assert not home.engine.is_ready()
        assert (await read_all(stream))[1].reason == "length"
        assert await draining == 0

    in_house(story)


def test_a_drain_that_takes_too_long_cancels_what_is_left() -> None:
    async def story(home: House) -> None:
        await home.ready()
        stream = await home.engine.submit(request("slow", 100_000))
        assert await home.supervisor.drain(0.2) == 1
        assert (await read_all(stream))[1].reason == "cancelled"

    in_house(story)


@pytest.mark.parametrize("arguments", [(), ("--ignore-hangup",)])
def test_stopping_leaves_no_process_behind(arguments: tuple[str, ...]) -> None:
    async def story(home: House) -> None:
        pid = await home.ready()
        stream = await home.engine.submit(request("stuck", 100))
        home.supervisor.stop()
        assert (await read_all(stream))[1].reason == "error"
        await home.keeping
        assert not psutil.pid_exists(pid)

    in_house(story, *arguments)


def test_an_engine_that_cannot_be_started_is_a_death_like_any_other() -> None:
    async def run() -> None:
        engine, _ = build()
        engine._command = ("/nowhere/python",)
        death = await engine.live()
        assert "could not be started" in death.cause

    asyncio.run(run())


def test_deaths_far_apart_are_not_in_a_row() -> None:
    """Five deaths over a month, on a server that nobody asked anything, ended it."""

    async def lives(loaded_s: float) -> int:
        num_lives = 0

        class Mortal(ChildEngine):
            async def live(self) -> EngineDeath:
                nonlocal num_lives
                num_lives += 1
                if num_lives == 10:
                    supervisor.stop()
                return EngineDeath("it died", False, 0, loaded_s)

        engine = Mortal(
            EngineOptions(model="fake"),
            environment={},
            on_info=lambda info: None,
            on_report=lambda report: None,
        )
        policy = RestartPolicy(first_delay_s=0.001, max_delay_s=0.001, max_deaths=3)
        supervisor = Supervisor(engine, Metrics(model="fake"), policy)
        await supervisor.run()
        return num_lives

    assert asyncio.run(lives(61.0)) == 10
    with pytest.raises(GaveUp, match="3 times in a row"):
        asyncio.run(lives(59.0))


# -- the stream and the wire, by themselves -------------------------------------------------


def test_a_stream_gives_prompt_then_gathered_tokens_then_the_end() -> None:
    async def run() -> None:
        stream = SequenceStream(7, 2, BufferRoom(10), lambda number, reason: None)
        stream.push_token(Token(7, 1, -0.1))
        stream.push_prompt(PromptLogprobs(request_id=7, logprobs=(-1.0,)))
        stream.push_token(Token(7, 2, -0.1))
        stream.fail("internal", "broken")
        events = [event async for event in stream]
        assert [type(event) for event in events] == [PromptLogprobs, tuple, Finished]
        assert len(events[1]) == 2  # type: ignore[arg-type]
        assert [event async for event in stream] == []

    asyncio.run(run())


def test_the_streams_of_a_request_share_its_room_and_alternatives_count() -> None:
    async def run() -> None:
        room, cancelled = BufferRoom(7), []
        streams = [
            SequenceStream(number, 2, room, lambda number, _: cancelled.append(number))
            for number in (1, 2)
        ]
        token = Token(1, 5, -0.1, top=((5, -0.1), (6, -2.0)))
        for stream in streams:
            stream.push_token(token)
        assert room.left == 1
        assert await anext(streams[0]) == (token,)
        streams[1].push_token(token)
        assert not cancelled
        streams[0].push_token(token)
        assert cancelled == [1]

    asyncio.run(run())


def frame(event: object) -> bytes:
    body = msgspec.msgpack.encode(event)
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_events_are_the_same_however_their_bytes_arrive(size: int) -> None:
    sent = [Fatal(message="a" * n) for n in range(20)] + [AdapterList(call_id=1, adapters=())]
    data = b"".join(frame(event) for event in sent)
    decoder = EventDecoder()
    got = [
        event
        for start in range(0, len(data), size)
        for event in decoder.feed(data[start : start + size])
    ]
    assert got == sent


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", frame({"a": 1})])
def test_bytes_that_are_no_event_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        EventDecoder().feed(data)


def test_commands_are_framed_as_the_engine_reads_them() -> None:
    data = encode_frame(ListAdapters(call_id=3))
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert msgspec.msgpack.decode(data[4:], type=ListAdapters).call_id == 3


def test_gathered_tokens_come_first_alone_then_together_or_when_room_is_scarce():
    async def main() -> list[int]:
        stream = SequenceStream(7, 2, BufferRoom(20), lambda number, reason: None)
        stream.gather(4)
        batches: list[int] = []

        async def read() -> None:
            async for event in stream:
                if isinstance(event, tuple):
                    batches.append(len(event))

        reader = asyncio.create_task(read())
        for number in range(10):
            stream.push_token(Token(7, number, -0.5, ()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        stream.gather(100)
        for number in range(11):
            stream.push_token(Token(7, number, -0.5, ()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        stream.end_cancelled()
        await reader
        return batches

    # 1 alone; 4 and 4; the tenth waits until more than half of the room is taken; the rest.
    assert asyncio.run(main()) == [1, 4, 4, 11, 1]
