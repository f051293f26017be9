"""What can be looked up: health, the server's facts, its models, its metrics.

It must not know generation.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lory_router import validate
from lory_router.endpoint import Front
from lory_router.errors import Unhealthy, adapter_not_found
from lory_router.intake_openai import adapter_of, model_of
from lory_server.messages import AdapterEntry

VERSION = "0.1.0"

Json = dict[str, object]


class Pages:
    """Handlers of the GET routes."""

    def __init__(self, front: Front, started_at: int) -> None:
        self._front = front
        self._started_at = started_at

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
        """The base under each of its names, then every adapter."""
        base = [self._base_card(name) for name in self._front.settings.model_names]
        adapters = await self._front.engine.list_adapters()
        cards = base + [self._adapter_card(entry) for entry in adapters]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One of them; an adapter's name may hold slashes."""
        model_id = request.path_params["model_id"]
        if model_id in self._front.settings.model_names:
            return _json(self._base_card(model_id))
        adapter_id = adapter_of(model_id, self._front.settings)
        for entry in await self._front.engine.list_adapters():
            if entry.adapter_id == adapter_id:
                return _json(self._adapter_card(entry))
        raise adapter_not_found(model_id)

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._front.metrics.render()
        return Response(body, headers={"content-type": content_type})

    def _base_card(self, name: str) -> Json:
        return self._card(name, parent=None)

    def _adapter_card(self, entry: AdapterEntry) -> Json:
        settings = self._front.settings
        name = model_of(entry.adapter_id, settings)
        card = self._card(name, parent=settings.model_names[0])
        return card | {"tier": entry.tier, "revision": entry.revision or None}

    def _card(self, name: str, parent: str | None) -> Json:
        info = self._front.engine.info
        return {
            "id": name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "lory",
            "root": name,
            "parent": parent,
            "max_model_len": info.max_model_len if info else None,
        }


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
