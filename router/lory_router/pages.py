"""What can be looked up: health, the server's facts, its models, its metrics.

It must not know generation.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lory_router import validate
from lory_router.endpoint import Front
from lory_router.errors import Unhealthy, adapter_not_found
from lory_router.intake_openai import adapter_of, model_of
from lory_router.listing import Entries, Listing
from lory_router.registry import State
from lory_server.messages import AdapterEntry

VERSION = "0.1.0"

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
    state: State | None
    body: bytes


class Pages:
    """Handlers of the GET routes."""

    def __init__(self, front: Front, listing: Listing, started_at: int) -> None:
        self._front = front
        self._listing = listing
        self._started_at = started_at
        self._rendered = _Rendered((), None, b"")

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
        entries, state = await self._listing.read(), self._front.registry.state
        if self._rendered.entries is not entries or self._rendered.state is not state:
            body = await asyncio.to_thread(self._render_models, _named(entries, state))
            self._rendered = _Rendered(entries, state, body)
        return Response(self._rendered.body, media_type="application/json")

    def _render_models(self, entries: Sequence[AdapterEntry]) -> bytes:
        base = [self._base_card(name) for name in self._front.settings.model_names]
        cards = [*base, *(self._adapter_card(entry) for entry in entries)]
        return msgspec.json.encode({"object": "list", "data": cards}) + b"\n"

    async def model(self, request: Request) -> Response:
        """One of them; an adapter's name may hold slashes."""
        model_id = request.path_params["model_id"]
        if model_id in self._front.settings.model_names:
            return _json(self._base_card(model_id))
        adapter_id = adapter_of(model_id, self._front.settings)
        entries = _named(await self._listing.read(), self._front.registry.state)
        for entry in entries:
            if entry.adapter_id == adapter_id:
                return _json(self._adapter_card(entry))
        raise adapter_not_found(model_id)

    async def metrics(self, request: Request) -> Response:
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


def _named(entries: Entries, state: State) -> list[AdapterEntry]:
    """The adapters that are served, and each again under its further names."""
    served = {e.adapter_id: e for e in entries if e.adapter_id not in state.removed}
    for name, target in state.names.items():
        entry = served.get(target.adapter_id)
        if entry is not None and name != target.adapter_id:
            served[name] = _as_named(name, entry, target.revision)
    return list(served.values())


def _as_named(name: str, entry: AdapterEntry, revision: str) -> AdapterEntry:
    if not revision or revision == entry.revision:
        return msgspec.structs.replace(entry, adapter_id=name)
    tier = next((one.tier for one in entry.revisions if one.revision == revision), "disk")
    return msgspec.structs.replace(entry, adapter_id=name, revision=revision, tier=tier)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", media_type="application/json")
