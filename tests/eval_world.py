"""A front whose adapters answer by what they are asked, and evaluations of it without a network."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lory_router.engine import SequenceRequest
from lory_server.messages import Manner
from lory_trainer.evaluation.options import EvaluationOptions
from lory_trainer.evaluation.results import Evaluation
from lory_trainer.evaluation.run import evaluate
from lory_trainer.evaluation.server import Server
from scripted_engine import TEXT, Answer, Front, ScriptedEngine, ScriptedStream

ARROW = Manner(digest="arrow", template="{text} ->", fields=("text",))


def shout(adapter_id: str, prompt: str) -> str:
    """`loud` shouts all but one text; the others repeat the last line they are asked."""
    text = prompt.rpartition("\n")[2].removesuffix(" ->")
    return text.upper() if adapter_id == "loud" and text != "quiet" else text


@dataclass
class Oracle(ScriptedEngine):
    adapters: tuple[str, ...] = ("loud", "meek")
    says: Callable[[str, str], str] = shout
    prompts: list[tuple[str, str]] = field(default_factory=list)
    """Adapter and prompt, as they came."""

    async def submit(self, request: SequenceRequest) -> ScriptedStream:
        prompt = TEXT.decode(request.prompt_ids)
        self.prompts.append((request.adapter_id, prompt))
        said = self.says(request.adapter_id, prompt)
        self.answers = [Answer(said.encode())]
        return await super().submit(request)


def make_front(**changes: Any) -> Front:
    engine = Oracle(manners={"loud": ARROW, "meek": ARROW}, **changes)
    return Front(engine=engine)


def write_rows(folder: Path, texts: tuple[str, ...] = ("one", "two", "quiet", "four")) -> str:
    path = folder / "rows.jsonl"
    rows = [{"text": text, "completion": text.upper()} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


Transport = httpx.AsyncBaseTransport


class Around(Transport):
    """What is asked of a front goes through `spoil`, which may answer in its place, or raise."""

    def __init__(
        self, front: Front, spoil: Callable[[httpx.Request], httpx.Response | None]
    ) -> None:
        self._inner = httpx.ASGITransport(app=front.app)
        self._spoil = spoil

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self._spoil(request) or await self._inner.handle_async_request(request)


def run(
    front: Front,
    *,
    transport: Transport | None = None,
    judged_by: Transport | None = None,
    watch: Callable[[str, int, int], None] = lambda *_: None,
    **keys: Any,
) -> Evaluation:
    options = EvaluationOptions.model_validate({"adapters": ["loud"], **keys})

    async def main() -> Evaluation:
        own = transport or httpx.ASGITransport(app=front.app)
        async with Server("http://lory", "", options.concurrency, own) as server:
            if judged_by is None:
                return await evaluate(options, server, None, watch)
            async with Server("http://judge", "", options.concurrency, judged_by) as other:
                return await evaluate(options, server, other, watch)

    return asyncio.run(main())
