"""What can be looked up: health, the server's facts, its models, its metrics.

It must not know generation.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lory_router import validate
from lory_router.catalogue import Catalogue
from lory_router.endpoint import Front
from lory_router.errors import Unhealthy, adapter_not_found
from lory_router.gate import caller_of
from lory_router.intake_openai import adapter_of, model_of
from lory_router.keys import Caller
from lory_router.listing import Entries
from lory_router.registry import State
from lory_router.sources.memory import Memory
from lory_server.messages import AdapterEntry

VERSION = "0.1.0"
MAX_RENDERED = 8
"""Callers for whom the list of models is kept."""

Json = dict[str, object]


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A model, as OpenAI's clients know it."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: str = "lory"


class AdapterCard(Card, frozen=True, kw_only=True):
    tier: Literal["disk", "host", "device"]
    revision: str | None


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A reply, and what it was made from."""

    entries: Entries
    state: State
    body: bytes


class Pages:
    """Handlers of the GET routes."""

    def __init__(self, front: Front, catalogue: Catalogue, started_at: int) -> None:
        self._front = front
        self._catalogue = catalogue
        self._started_at = started_at
        self._rendered: Memory[Caller, _Rendered] = Memory(MAX_RENDERED)

    async def health(self, request: Request) -> Response:
        """200 and nothing else while a request sent now would be taken."""
        engine = self._front.engine
        if engine.is_draining() or not engine.is_ready():
            raise Unhealthy("unhealthy", retry_after_s=self._front.settings.retry_after_s)
        return Response()

    async def info(self, request: Request) -> Response:
        """LoRAX's facts, and ours after them."""
        settings = self._front.settings
        info = validate.engine_info(self._front.engine.info)
        facts: Json = {
            "model_id": settings.model_names[0],
            "model_sha": None,
            "model_dtype": info.dtype,
            "model_device_type": info.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_best_of": settings.max_best_of,
            "max_stop_sequences": settings.max_stop_sequences,
            "max_input_length": validate.max_input_length(info, settings),
            "max_total_tokens": info.max_model_len,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": info.num_blocks * info.block_size,
            "max_waiting_tokens": 0,
            "validation_workers": 1,
            "eager_prefill": True,
            "version": VERSION,
            "sha": None,
            "docker_label": None,
            "request_logger_url": None,
            "architecture": info.architecture,
            "quantize": info.quantize,
            "max_batch_rows": info.max_batch_rows,
            "max_step_tokens": info.max_step_tokens,
            "vocab_size": info.vocab_size,
        }
        return _json(facts)

    async def models(self, request: Request) -> Response:
        """The base under each of its names, then every adapter and what else it is called."""
        caller = caller_of(request.scope)
        entries, state = await self._catalogue.read()
        kept = self._rendered.get(caller)
        if kept is None or kept.entries is not entries or kept.state is not state:
            body = await asyncio.to_thread(self._render_models, caller, entries, state)
            kept = _Rendered(entries, state, body)
            self._rendered.put(caller, kept, math.inf)
        return Response(kept.body, media_type="application/json")

    def _render_models(self, caller: Caller, entries: Entries, state: State) -> bytes:
        named = self._catalogue.named(caller, entries, state)
        base = [self._base_card(name) for name in self._front.settings.model_names]
        cards = [*base, *map(self._adapter_card, named)]
        return msgspec.json.encode({"object": "list", "data": cards}) + b"\n"

    async def model(self, request: Request) -> Response:
        """One of them; an adapter's name may hold slashes."""
        model_id = request.path_params["model_id"]
        if model_id in self._front.settings.model_names:
            return _json(self._base_card(model_id))
        adapter_id = adapter_of(model_id, self._front.settings)
        entry = None
        if adapter_id:
            entry = await self._catalogue.find(caller_of(request.scope), adapter_id)
        if entry is None:
            raise adapter_not_found(model_id)
        return _json(self._adapter_card(entry))

    async def metrics(self, request: Request) -> Response:
        """All tenants' figures, and so for admins."""
        self._front.rights.check_admin(caller_of(request.scope), "GET /metrics")
        body, content_type = self._front.metrics.render()
        return Response(body, headers={"content-type": content_type})

    def _base_card(self, name: str) -> Card:
        return Card(
            id=name,
            root=name,
            parent=None,
            created=self._started_at,
            max_model_len=self._max_model_len,
        )

    def _adapter_card(self, entry: AdapterEntry) -> AdapterCard:
        settings = self._front.settings
        name = model_of(entry.adapter_id, settings)
        return AdapterCard(
            id=name,
            root=name,
            parent=settings.model_names[0],
            created=self._started_at,
            max_model_len=self._max_model_len,
            tier=entry.tier,
            revision=entry.revision or None,
        )

    @property
    def _max_model_len(self) -> int | None:
        info = self._front.engine.info
        return info.max_model_len if info else None


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", media_type="application/json")
