"""`client.adapters`: what an operator does with adapters, as blocking or awaitable calls.

It must not know JSON, routes or how a call is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from . import adapter_calls as calls
from .adapter_calls import Config, Files
from .transport import Timeout
from .types import Adapter, UploadedAdapter
from .wire import Call

Result = TypeVar("Result")


class Send(Protocol):
    def __call__(self, call: Call[Result], timeout: Timeout | None = None) -> Result: ...


class AsyncSend(Protocol):
    async def __call__(self, call: Call[Result], timeout: Timeout | None = None) -> Result: ...


class Adapters:
    """Names may be an adapter's (`team/support`), or end in an alias or a revision's first digits
    (`support@prod`, `support@1f3a9c`)."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def list(self) -> tuple[Adapter, ...]:
        return self._send(calls.list_adapters())

    def get(self, name: str) -> Adapter:
        return self._send(calls.get(name))

    def register(
        self,
        name: str,
        adapter_id: str | None = None,
        revision: str | None = None,
        *,
        owner: str | None = None,
        api_token: str | None = None,
    ) -> Adapter:
        """Let `name` stand for an adapter; an alias (`support@prod`) for its present revision.

        Without `adapter_id` the name is the adapter's own: one that was deleted is served again.
        With an `owner` it is for that tenant alone. `api_token` is for the source of `adapter_id`.
        """
        call = calls.register(
            name, adapter_id=adapter_id, revision=revision, owner=owner, api_token=api_token
        )
        return self._send(call)

    def upload(
        self,
        name: str,
        weights: bytes,
        config: Config,
        *,
        further: Files | None = None,
        owner: str | None = None,
        timeout: Timeout | None = None,
    ) -> UploadedAdapter:
        """Send its files: it is `upload:NAME` then, and is read when somebody asks for it.

        `further` are those that it has beside the two: a manifest, a tokenizer.
        """
        return self._send(calls.upload(name, weights, config, further, owner), timeout)

    def replace(
        self,
        name: str,
        weights: bytes,
        config: Config | None = None,
        *,
        further: Files | None = None,
        owner: str | None = None,
        timeout: Timeout | None = None,
    ) -> UploadedAdapter:
        """Send it and have it loaded: new requests get it, running ones finish on what they hold.

        `weights` are a safetensors file's bytes; without `config` their metadata holds it, as text
        under `adapter_config`. One that cannot be loaded replaces nothing.
        """
        return self._send(calls.replace(name, weights, config, further, owner), timeout)

    def merge(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        method: str | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
        rank: int | None = None,
        seed: int | None = None,
        timeout: Timeout | None = None,
    ) -> Adapter:
        """Let `name` stand for adapters merged by their weights: their sum, unless `method` says
        otherwise. It follows them when they are replaced."""
        call = calls.merge(
            name,
            weights,
            method=method,
            density=density,
            majority_sign_method=majority_sign_method,
            rank=rank,
            seed=seed,
        )
        return self._send(call, timeout)

    def delete(self, name: str) -> None:
        """Forget a name, or serve an adapter no more. Its files stay; running streams finish."""
        self._send(calls.delete(name))

    def load(
        self, name: str, *, api_token: str | None = None, timeout: Timeout | None = None
    ) -> Adapter:
        """Bring it to the device; returns when it is there."""
        return self._send(calls.do("load", name, api_token), timeout)

    def unload(self, name: str) -> Adapter:
        """Let it go from memory, when the last request that uses it has ended."""
        return self._send(calls.do("unload", name))

    def pin(
        self, name: str, *, api_token: str | None = None, timeout: Timeout | None = None
    ) -> Adapter:
        """Load it, and keep it in memory."""
        return self._send(calls.do("pin", name, api_token), timeout)

    def unpin(self, name: str) -> Adapter:
        return self._send(calls.do("unpin", name))


class AsyncAdapters:
    """The same, to be awaited."""

    def __init__(self, send: AsyncSend) -> None:
        self._send = send

    async def list(self) -> tuple[Adapter, ...]:
        return await self._send(calls.list_adapters())

    async def get(self, name: str) -> Adapter:
        return await self._send(calls.get(name))

    async def register(
        self,
        name: str,
        adapter_id: str | None = None,
        revision: str | None = None,
        *,
        owner: str | None = None,
        api_token: str | None = None,
    ) -> Adapter:
        """Let `name` stand for an adapter; an alias (`support@prod`) for its present revision.

        Without `adapter_id` the name is the adapter's own: one that was deleted is served again.
        With an `owner` it is for that tenant alone. `api_token` is for the source of `adapter_id`.
        """
        call = calls.register(
            name, adapter_id=adapter_id, revision=revision, owner=owner, api_token=api_token
        )
        return await self._send(call)

    async def upload(
        self,
        name: str,
        weights: bytes,
        config: Config,
        *,
        further: Files | None = None,
        owner: str | None = None,
        timeout: Timeout | None = None,
    ) -> UploadedAdapter:
        """Send its files: it is `upload:NAME` then, and is read when somebody asks for it.

        `further` are those that it has beside the two: a manifest, a tokenizer.
        """
        return await self._send(calls.upload(name, weights, config, further, owner), timeout)

    async def replace(
        self,
        name: str,
        weights: bytes,
        config: Config | None = None,
        *,
        further: Files | None = None,
        owner: str | None = None,
        timeout: Timeout | None = None,
    ) -> UploadedAdapter:
        """Send it and have it loaded: new requests get it, running ones finish on what they hold.

        `weights` are a safetensors file's bytes; without `config` their metadata holds it, as text
        under `adapter_config`. One that cannot be loaded replaces nothing.
        """
        return await self._send(calls.replace(name, weights, config, further, owner), timeout)

    async def merge(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        method: str | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
        rank: int | None = None,
        seed: int | None = None,
        timeout: Timeout | None = None,
    ) -> Adapter:
        """Let `name` stand for adapters merged by their weights: their sum, unless `method` says
        otherwise. It follows them when they are replaced."""
        call = calls.merge(
            name,
            weights,
            method=method,
            density=density,
            majority_sign_method=majority_sign_method,
            rank=rank,
            seed=seed,
        )
        return await self._send(call, timeout)

    async def delete(self, name: str) -> None:
        """Forget a name, or serve an adapter no more. Its files stay; running streams finish."""
        await self._send(calls.delete(name))

    async def load(
        self, name: str, *, api_token: str | None = None, timeout: Timeout | None = None
    ) -> Adapter:
        """Bring it to the device; returns when it is there."""
        return await self._send(calls.do("load", name, api_token), timeout)

    async def unload(self, name: str) -> Adapter:
        """Let it go from memory, when the last request that uses it has ended."""
        return await self._send(calls.do("unload", name))

    async def pin(
        self, name: str, *, api_token: str | None = None, timeout: Timeout | None = None
    ) -> Adapter:
        """Load it, and keep it in memory."""
        return await self._send(calls.do("pin", name, api_token), timeout)

    async def unpin(self, name: str) -> Adapter:
        return await self._send(calls.do("unpin", name))
