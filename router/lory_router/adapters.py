"""The adapters' routes: /v1/adapters and what lies below it, and vLLM's two for loading.

It must not know how a wish is carried out (`lifecycle`).
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lory_router import validate
from lory_router.bodies import read_object, read_struct, refuse_unknown
from lory_router.catalogue import Catalogue
from lory_router.endpoint import Endpoint, Front
from lory_router.errors import ApiError, Forbidden, Invalid, adapter_not_found, shown
from lory_router.exchange import Exchange
from lory_router.gate import caller_of
from lory_router.intake_openai import adapter_of
from lory_router.keys import Caller
from lory_router.lifecycle import Lifecycle, Naming
from lory_router.names import is_adapter_id
from lory_router.schemas_adapters import (
    AdapterReply,
    LoadLoraBody,
    OrderBody,
    RegisterBody,
    RemovedReply,
    UnloadLoraBody,
    adapter_detail,
)
from lory_router.sources.reference import BadReferenceError, is_from_source, reference_of

PATH = "/v1/adapters"
MODELS = "/v1/models"
LOAD_LORA = "/v1/load_lora_adapter"
UNLOAD_LORA = "/v1/unload_lora_adapter"
COUNTED = (PATH, LOAD_LORA, UNLOAD_LORA)
"""What metrics call them."""

OF_VLLM_ALONE = ("lora_int_id", "is_3d_lora_weight")
"""Fields of its routes that mean nothing here."""

MANNER_WAIT_S = 5.0
"""How long a look at an adapter waits for it to be read."""

T = TypeVar("T", bound=msgspec.Struct)
Deed = Callable[[Caller, str, str], Awaitable[AdapterReply]]
"""Who asks, a name, and the token for its source."""
Work = Callable[[Exchange, bytes], Coroutine[None, None, None]]


class AdapterRoutes:
    def __init__(self, front: Front, lifecycle: Lifecycle, catalogue: Catalogue) -> None:
        self._front = front
        self._lifecycle = lifecycle
        self._catalogue = catalogue
        root = front.settings.adapters_dir
        folders = (root, os.path.abspath(root), os.path.realpath(root)) if root else ()
        self._roots = tuple(folder.rstrip("/") + "/" for folder in folders)

    def routes(self) -> list[Route]:
        """Longer paths first: an adapter's name may hold a slash."""
        lifecycle, one = self._lifecycle, PATH + "/{adapter_id:path}"
        deeds = {
            "pin": lifecycle.pin,
            "unpin": lifecycle.unpin,
            "load": lifecycle.load,
            "unload": lifecycle.unload,
        }
        return [
            Route(PATH, self.list),
            self._route(PATH, PATH, self.register),
            *[self._route(f"{one}/{name}", PATH, self._doing(do)) for name, do in deeds.items()],
            self._route(one, PATH, self.remove, "DELETE"),
            Route(one, self.get),
            self._route(MODELS + "/{model:path}", PATH, self.remove_model, "DELETE"),
            self._route(LOAD_LORA, LOAD_LORA, self.load_lora),
            self._route(UNLOAD_LORA, UNLOAD_LORA, self.unload_lora),
        ]

    def _route(self, path: str, counted_as: str, work: Work, method: str = "POST") -> Route:
        async def handle(front: Front, exchange: Exchange, body: bytes) -> None:
            await work(exchange, body)

        return Route(path, Endpoint(self._front, counted_as, "openai", handle), methods=[method])

    # -- ours -------------------------------------------------------------------------------

    async def list(self, request: Request) -> Response:
        return _json(await self._catalogue.list(caller_of(request.scope)))

    async def get(self, request: Request) -> Response:
        """It is read for that: its folder tells how it wants to be asked."""
        name, caller = _checked(request.path_params["adapter_id"]), caller_of(request.scope)
        reply = await self._catalogue.get(caller, name)
        try:
            async with asyncio.timeout(MANNER_WAIT_S):
                known = await self._front.manners.shown(caller, name)
        except (ApiError, TimeoutError):
            known = None  # it cannot be served, which `refused` tells, or not yet
        if known is None:
            return _json(adapter_detail(reply, None, None))
        return _json(adapter_detail(reply, known.manner, known.base_matches))

    async def register(self, exchange: Exchange, body: bytes) -> None:
        wish = _read(body, RegisterBody)
        naming = Naming(
            name=_canonical(wish.name),
            adapter_id=wish.adapter_id and _canonical(wish.adapter_id),
            revision=wish.revision or "",
            owner=wish.owner,
            token=wish.api_token or "",
        )
        reply, is_new = await self._lifecycle.register(exchange.caller, naming)
        await exchange.reply_json(reply, 201 if is_new else 200)

    async def remove(self, exchange: Exchange, body: bytes) -> None:
        name = _named(exchange)
        await self._lifecycle.remove(exchange.caller, name)
        await exchange.reply_json(RemovedReply(id=name))

    async def remove_model(self, exchange: Exchange, body: bytes) -> None:
        """As OpenAI's clients delete a fine-tuned model."""
        model: str = exchange.scope["path_params"]["model"]
        name = adapter_of(model, self._front.settings)
        if not name:
            raise Forbidden("The base is what the server was started with; it is not deleted")
        await self._lifecycle.remove(exchange.caller, _checked(name))
        await exchange.reply_json(RemovedReply(id=model, object="model"))

    def _doing(self, do: Deed) -> Work:
        async def work(exchange: Exchange, body: bytes) -> None:
            wish = _read(body, OrderBody) if body.strip() else OrderBody()
            reply = await do(exchange.caller, _named(exchange), wish.api_token or "")
            await exchange.reply_json(reply)

        return work

    # -- vLLM's -----------------------------------------------------------------------------

    async def load_lora(self, exchange: Exchange, body: bytes) -> None:
        """Register a name for an adapter in the folder, and load it."""
        wish = _read_vllm(body, LoadLoraBody)
        name, path = wish.lora_name, wish.lora_path
        if not name or not path:
            raise Invalid("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
        if self._lifecycle.is_registered(exchange.caller, name) and not wish.load_inplace:
            raise Invalid(
                f"The lora adapter {shown(name)} has already been loaded. If you want to load the"
                " adapter in place, set 'load_inplace' to True.",
                param="lora_name",
            )
        adapter_id = self._adapter_at(path)
        naming = Naming(name, adapter_id, field="lora_name")
        await self._lifecycle.register(exchange.caller, naming, "load")
        await _reply_text(exchange, f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_lora(self, exchange: Exchange, body: bytes) -> None:
        """Forget a name, and let go of what it stood for."""
        name = _read_vllm(body, UnloadLoraBody).lora_name
        if not name:
            raise Invalid(
                "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name"
            )
        await self._lifecycle.unload_and_remove(exchange.caller, _checked(name))
        await _reply_text(exchange, f"Success: LoRA adapter '{name}' removed successfully.")

    def _adapter_at(self, path: str) -> str:
        """The name in the adapters folder, or at a source, that a path means. The path is only
        compared."""
        if is_from_source(path):
            return _canonical(path)
        root = next((root for root in self._roots if path.startswith(root)), "")
        name = path.removeprefix(root).rstrip("/")
        if not is_adapter_id(name):
            raise Invalid(
                f"`lora_path`: {shown(path)} is not in the adapters folder; give the name of one of"
                " its sub-folders, for no other path is read",
                param="lora_path",
            )
        return name


def _named(exchange: Exchange) -> str:
    return _checked(exchange.scope["path_params"]["adapter_id"])


def _checked(text: str) -> str:
    """A name that can be one, in its one spelling."""
    if is_from_source(text):
        try:
            return reference_of(text).name
        except BadReferenceError:
            raise adapter_not_found(text) from None
    name = validate.check_adapter_id(text)
    if not name:
        raise adapter_not_found(text)
    return name


def _canonical(text: str) -> str:
    """The one spelling of a source's name; a wrong one is refused with the form it has."""
    if not is_from_source(text):
        return text
    try:
        return reference_of(text).name
    except BadReferenceError as error:
        raise Invalid(error.message, param="adapter_id") from error


def _read(body: bytes, kind: type[T]) -> T:
    value = read_object(body)
    refuse_unknown(value, kind)
    return read_struct(value, kind)


def _read_vllm(body: bytes, kind: type[T]) -> T:
    """Its generated clients send fields that they do not use, too, as what says nothing."""
    value = read_object(body)
    unused = [name for name in OF_VLLM_ALONE if value.get(name) in (None, False)]
    told = {name: one for name, one in value.items() if name not in unused}
    refuse_unknown(told, kind)
    return read_struct(told, kind)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", media_type="application/json")


async def _reply_text(exchange: Exchange, text: str) -> None:
    body = text.encode()
    await exchange.start(200, "text/plain; charset=utf-8", {"content-length": str(len(body))})
    await exchange.write(body, more=False)
