"""Sequences in flight: a slow reader holds them back, and none is left behind."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from lory_router.engine import SequenceRequest, Unavailable
from lory_router.keys import Caller
from lory_router.running import GATHERED_TOKENS, merged, run_all, running
from lory_router.settings import RouterSettings
from lory_router.transcript import Ending
from lory_router.validate import Ask
from lory_server.messages import Sampling
from scripted_engine import BASE, TEXT, Answer, ScriptedEngine

SETTINGS = RouterSettings(model_names=(BASE,))
ENDLESS = Answer(b"x", repeats=True, ends=False)


def asks(num: int) -> list[Ask]:
    sampling = Sampling(max_new_tokens=1000, seed=0)
    request = SequenceRequest(prompt_ids=(97,), sampling=sampling)
    return [Ask(request, Ending(max_new_tokens=1000, eos_ids=frozenset()))] * num


@pytest.mark.parametrize("num", [1, 3])
def test_sequences_are_read_no_faster_than_their_pieces_are_taken(num: int):
    """Otherwise the stream's bound would not hold: tokens would gather on this side of it."""
    engine = ScriptedEngine([ENDLESS])

    async def main() -> list[int]:
        async with (
            running(engine, asks(num), TEXT, SETTINGS, Caller()) as live,
            aclosing(merged(live)) as batches,
        ):
            await anext(batches)
            for _ in range(50):
                await asyncio.sleep(0)
            return [stream.num_told for stream in engine.streams]

    assert max(asyncio.run(main())) <= 2


def test_when_one_submission_fails_those_before_it_are_cancelled():
    engine = ScriptedEngine([ENDLESS])

    async def main() -> None:
        wanted = asks(3)
        submit = engine.submit

        async def fail_third(request: SequenceRequest):
            if len(engine.streams) == 2:
                raise Unavailable("down", "gone")
            return await submit(request)

        engine.submit = fail_third
        async with running(engine, wanted, TEXT, SETTINGS, Caller()):
            raise AssertionError("not reached")

    with pytest.raises(Unavailable):
        asyncio.run(main())
    assert [stream.cancels for stream in engine.streams] == [["cancelled"], ["cancelled"]]


def test_no_task_outlives_a_reader_that_leaves():
    engine = ScriptedEngine([Answer(b"x", repeats=True, ends=False, delay_s=0.001, hangs=True)])

    async def main() -> int:
        async with (
            running(engine, asks(3), TEXT, SETTINGS, Caller()) as live,
            aclosing(merged(live)) as batches,
        ):
            await anext(batches)
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1


def test_the_deadline_is_over_with_the_request():
    """Its timer would keep every request for ten minutes, and cancel what has long ended."""
    engine = ScriptedEngine([Answer(b"x")])
    hasty = RouterSettings(model_names=(BASE,), request_timeout_s=0.05)

    async def main() -> None:
        async with running(engine, asks(1), TEXT, hasty, Caller()) as live:
            await run_all(live)
        await asyncio.sleep(0.1)

    asyncio.run(main())
    assert "timeout" not in engine.streams[0].cancels


def test_what_is_submitted_after_the_deadline_has_passed_it():
    engine = ScriptedEngine([ENDLESS])
    hasty = RouterSettings(model_names=(BASE,), request_timeout_s=0.05)

    async def main() -> None:
        submit = engine.submit

        async def submit_late(request: SequenceRequest):
            if engine.streams:
                await asyncio.sleep(0.1)
            return await submit(request)

        engine.submit = submit_late
        async with running(engine, asks(2), TEXT, hasty, Caller()):
            pass

    asyncio.run(main())
    assert [stream.cancels[0] for stream in engine.streams] == ["timeout", "timeout"]


@pytest.mark.parametrize(("stops", "gathered"), [((), GATHERED_TOKENS), (("\n",), 1)])
def test_tokens_gather_for_who_waits_for_the_end_unless_a_stop_string_may_come(
    stops: tuple[str, ...], gathered: int
):
    engine = ScriptedEngine()
    (ask,) = asks(1)
    ask = replace(ask, ending=replace(ask.ending, stops=stops))

    async def main() -> None:
        async with running(engine, [ask], TEXT, SETTINGS, Caller()) as live:
            await run_all(live)

    asyncio.run(main())
    assert [stream.num_gathered for stream in engine.streams] == [gathered]


def test_a_reader_of_pieces_gets_them_at_once():
    engine = ScriptedEngine()

    async def main() -> None:
        async with (
            running(engine, asks(1), TEXT, SETTINGS, Caller()) as live,
            aclosing(merged(live)) as batches,
        ):
            await anext(batches)

    asyncio.run(main())
    assert [stream.num_gathered for stream in engine.streams] == [1]
