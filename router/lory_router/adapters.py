"""The adapters' routes: /v1/adapters and what lies below it, and vLLM's two for loading.

It must not know how a wish is carried out (`lifecycle`).
"""

import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lory_router import validate
from lory_router.bodies import read_object, read_struct, refuse_unknown
from lory_router.endpoint import Endpoint, Front
from lory_router.errors import ApiError, Invalid, adapter_not_found, shown
from lory_router.exchange import Exchange
from lory_router.lifecycle import Lifecycle
from lory_router.names import is_adapter_id
from lory_router.schemas_adapters import (
    AdapterReply,
    LoadLoraBody,
    RegisterBody,
    RemovedReply,
    UnloadLoraBody,
    adapter_detail,
)

PATH = "/v1/adapters"
LOAD_LORA = "/v1/load_lora_adapter"
UNLOAD_LORA = "/v1/unload_lora_adapter"
COUNTED = (PATH, LOAD_LORA, UNLOAD_LORA)
"""What metrics call them."""

T = TypeVar("T", bound=msgspec.Struct)
Work = Callable[[Exchange, bytes], Coroutine[None, None, None]]


class AdapterRoutes:
    def __init__(self, front: Front, lifecycle: Lifecycle) -> None:
        self._front = front
        self._lifecycle = lifecycle
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
            self._route(LOAD_LORA, LOAD_LORA, self.load_lora),
            self._route(UNLOAD_LORA, UNLOAD_LORA, self.unload_lora),
        ]

    def _route(self, path: str, counted_as: str, work: Work, method: str = "POST") -> Route:
        async def handle(front: Front, exchange: Exchange, body: bytes) -> None:
            await work(exchange, body)

        return Route(path, Endpoint(self._front, counted_as, "openai", handle), methods=[method])

    # -- ours -------------------------------------------------------------------------------

    async def list(self, request: Request) -> Response:
        return _json(await self._lifecycle.list())

    async def get(self, request: Request) -> Response:
        """It is read for that, unless it has been: its folder tells how it wants to be asked."""
        name = _checked(request.path_params["adapter_id"])
        reply = await self._lifecycle.get(name)
        try:
            known = None if ":" in name else await self._front.recipes.known(name)
        except ApiError:
            known = None  # it cannot be served, which `refused` tells
        if known is None:
            return _json(adapter_detail(reply, None, None))
        return _json(adapter_detail(reply, known.recipe, known.base_matches))

    async def register(self, exchange: Exchange, body: bytes) -> None:
        wish = _read(body, RegisterBody)
        reply, is_new = await self._lifecycle.register(wish.name, wish.adapter_id, wish.revision)
        await exchange.reply_json(reply, 201 if is_new else 200)

    async def remove(self, exchange: Exchange, body: bytes) -> None:
        name = _named(exchange)
        await self._lifecycle.remove(name)
        await exchange.reply_json(RemovedReply(id=name))

    def _doing(self, do: Callable[[str], Awaitable[AdapterReply]]) -> Work:
        async def work(exchange: Exchange, body: bytes) -> None:
            if body.strip():
                refuse_unknown(read_object(body), _Nothing)
            await exchange.reply_json(await do(_named(exchange)))

        return work

    # -- vLLM's -----------------------------------------------------------------------------

    async def load_lora(self, exchange: Exchange, body: bytes) -> None:
        """Register a name for an adapter in the folder, and load it."""
        wish = _read(body, LoadLoraBody)
        name, path = wish.lora_name, wish.lora_path
        if not name or not path:
            raise Invalid("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
        if self._lifecycle.is_registered(name) and not wish.load_inplace:
            raise Invalid(
                f"The lora adapter {shown(name)} has already been loaded. If you want to load the"
                " adapter in place, set 'load_inplace' to True.",
                param="lora_name",
            )
        adapter_id = self._adapter_at(path)
        await self._lifecycle.register(name, adapter_id, kind="load", field="lora_name")
        await _reply_text(exchange, f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_lora(self, exchange: Exchange, body: bytes) -> None:
        """Forget a name, and let go of what it stood for."""
        name = _read(body, UnloadLoraBody).lora_name
        if not name:
            raise Invalid(
                "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name"
            )
        await self._lifecycle.unload_and_remove(_checked(name))
        await _reply_text(exchange, f"Success: LoRA adapter '{name}' removed successfully.")

    def _adapter_at(self, path: str) -> str:
        """The name in the adapters folder that a path means. The path is only compared."""
        root = next((root for root in self._roots if path.startswith(root)), "")
        name = path.removeprefix(root).rstrip("/")
        if not is_adapter_id(name):
            raise Invalid(
                f"`lora_path`: {shown(path)} is not in the adapters folder; give the name of one of"
                " its sub-folders, for no other path is read",
                param="lora_path",
            )
        return name


class _Nothing(msgspec.Struct, frozen=True):
    """The body of a route that takes none."""


def _named(exchange: Exchange) -> str:
    return _checked(exchange.scope["path_params"]["adapter_id"])


def _checked(text: str) -> str:
    name = validate.check_adapter_id(text)
    if not name:
        raise adapter_not_found(text)
    return name


def _read(body: bytes, kind: type[T]) -> T:
    value = read_object(body)
    refuse_unknown(value, kind)
    return read_struct(value, kind)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", media_type="application/json")


async def _reply_text(exchange: Exchange, text: str) -> None:
    body = text.encode()
    await exchange.start(200, "text/plain; charset=utf-8", {"content-length": str(len(body))})
    await exchange.write(body, more=False)
