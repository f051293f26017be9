"""Requests of the adapters' routes, as data, and their replies as values.

As `wire` and `replies` are for generation. It must not know httpx, sockets, retries or time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from .errors import ProtocolError
from .fields import Fields, parse_json
from .replies import Head
from .types import Adapter, AdapterRevision, MatchedModules, Merge, MergeSource
from .wire import Call

_PATH = "/v1/adapters"


def list_adapters() -> Call[tuple[Adapter, ...]]:
    return Call("GET", _PATH, None, _adapters)


def get(name: str) -> Call[Adapter]:
    return Call("GET", _path(name), None, _adapter)


def register(name: str, adapter_id: str | None, revision: str | None) -> Call[Adapter]:
    given = {"name": name, "adapter_id": adapter_id, "revision": revision}
    body = {field: value for field, value in given.items() if value is not None}
    return Call("POST", _PATH, json.dumps(body).encode("ascii"), _adapter)


def merge(name: str, weights: Mapping[str, float], **fields: Any) -> Call[Adapter]:
    adapters = [{"adapter_id": one, "weight": weight} for one, weight in weights.items()]
    given = {field: value for field, value in fields.items() if value is not None}
    body = {"name": name, "adapters": adapters, **given}
    return Call("POST", f"{_PATH}/merge", json.dumps(body).encode("ascii"), _adapter)


def delete(name: str) -> Call[None]:
    return Call("DELETE", _path(name), None, _nothing)


def do(deed: str, name: str) -> Call[Adapter]:
    """`pin`, `unpin`, `load` or `unload`."""
    return Call("POST", f"{_path(name)}/{deed}", None, _adapter)


def _path(name: str) -> str:
    if not name:
        raise ValueError("name an adapter; an empty name is the base, which is always loaded")
    if {".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is no adapter's name, but a path to another")
    return f"{_PATH}/{quote(name, safe='/@')}"


def _nothing(_head: Head, _body: bytes) -> None:
    """That it was done is all there is to say."""


def _adapters(_head: Head, body: bytes) -> tuple[Adapter, ...]:
    reply = Fields(parse_json(body, "the reply"), "reply")
    return tuple(_as_adapter(item) for item in reply.objects("data"))


def _adapter(_head: Head, body: bytes) -> Adapter:
    return _as_adapter(Fields(parse_json(body, "the reply"), "reply"))


def _as_adapter(item: Fields) -> Adapter:
    sizes = item.object("bytes")
    return Adapter(
        id=item.text("id"),
        state=item.text("state"),
        revision=item.text_or_none("revision"),
        matched=_matched(item),
        disk_bytes=sizes.integer_or_none("disk"),
        host_bytes=sizes.integer("host"),
        device_bytes=sizes.integer("device"),
        requests=item.integer("requests"),
        last_used=item.number_or_none("last_used"),
        pinned=item.flag("pinned"),
        names=_mapping(item, "names"),
        revisions=tuple(_as_revision(one) for one in item.objects("revisions")),
        refused=item.text_or_none("refused"),
        merged=_as_merge(item.object("merged")) if item.has("merged") else None,
    )


def _as_merge(item: Fields) -> Merge:
    return Merge(
        method=item.text("method"),
        adapters=tuple(
            MergeSource(one.text("adapter_id"), one.number("weight"), one.text_or_none("revision"))
            for one in item.objects("adapters")
        ),
        density=item.number_or_none("density"),
        majority_sign_method=item.text_or_none("majority_sign_method"),
        rank=item.integer_or_none("rank"),
        seed=item.integer_or_none("seed"),
    )


def _as_revision(item: Fields) -> AdapterRevision:
    sizes = item.object("bytes")
    return AdapterRevision(
        revision=item.text("revision"),
        state=item.text("state"),
        matched=_matched(item),
        host_bytes=sizes.integer("host"),
        device_bytes=sizes.integer("device"),
        requests=item.integer("requests"),
        pinned=item.flag("pinned"),
    )


def _matched(item: Fields) -> Mapping[str, MatchedModules]:
    kinds = _mapping(item, "matched") if item.has("matched") else {}
    found: dict[str, MatchedModules] = {}
    for name in kinds:
        kind = item.object("matched").object(name)
        ranks = kind.value.get("ranks")
        if not isinstance(ranks, list):
            raise ProtocolError(f"{kind.name}.ranks should be a list")
        found[name] = MatchedModules(kind.integer("modules"), tuple(ranks))
    return MappingProxyType(found)


def _mapping(item: Fields, key: str) -> Mapping[str, Any]:
    return MappingProxyType(dict(item.object(key).value))
