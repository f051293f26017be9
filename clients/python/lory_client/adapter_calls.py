"""Requests of the adapters' routes, as data, and their replies as values.

As `wire` and `replies` are for generation. It must not know httpx, sockets, retries or time.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Union
from urllib.parse import quote

from .errors import ProtocolError
from .fields import Fields, parse_json
from .replies import Head
from .types import (
    Adapter,
    AdapterRevision,
    Download,
    MatchedModules,
    Merge,
    MergeSource,
    UploadedAdapter,
)
from .wire import Call

_PATH = "/v1/adapters"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

Config = Union[Mapping[str, Any], str, bytes]
"""An adapter's configuration: the values, or the text of adapter_config.json."""
Files = Mapping[str, bytes]
"""By their names in an adapter's folder: `adapter_manifest.json`, `tokenizer.json`, ..."""


def list_adapters() -> Call[tuple[Adapter, ...]]:
    return Call("GET", _PATH, None, _adapters)


def get(name: str) -> Call[Adapter]:
    return Call("GET", _path(name), None, _adapter)


def register(name: str, **given: str | None) -> Call[Adapter]:
    """`given` are `adapter_id`, `revision`, `owner` and `api_token`."""
    return Call("POST", _PATH, _given({"name": name, **given}), _adapter)


def merge(name: str, weights: Mapping[str, float], **given: Any) -> Call[Adapter]:
    """`given` are `method` and its parameters."""
    adapters = [{"adapter_id": one, "weight": weight} for one, weight in weights.items()]
    body = _given({"name": name, "adapters": adapters, **given})
    return Call("POST", f"{_PATH}/merge", body, _adapter)


def delete(name: str) -> Call[None]:
    return Call("DELETE", _path(name), None, _nothing)


def do(deed: str, name: str, api_token: str | None = None) -> Call[Adapter]:
    """`pin`, `unpin`, `load` or `unload`."""
    body = _given({"api_token": api_token}) if api_token else None
    return Call("POST", f"{_path(name)}/{deed}", body, _adapter)


def upload(
    name: str, weights: bytes, config: Config, further: Files | None, owner: str | None
) -> Call[UploadedAdapter]:
    """All files, to be read when somebody asks for them."""
    body, content_type = _all_files(weights, config, further)
    path = f"{_path(name)}/files{_query(owner)}"
    return Call("PUT", path, body, _uploaded, content_type)


def replace(
    name: str, weights: bytes, config: Config | None, further: Files | None, owner: str | None
) -> Call[UploadedAdapter]:
    """All files, or weights with the configuration in their header, to be loaded at once."""
    body, content_type = weights, "application/octet-stream"
    if config is not None:
        body, content_type = _all_files(weights, config, further)
    elif further:
        raise ValueError("`further` files go beside a configuration; give `config`, too")
    path = f"{_path(name)}/tensors{_query(owner)}"
    return Call("POST", path, body, _uploaded, content_type)


def _given(fields: Mapping[str, Any]) -> bytes:
    told = {field: value for field, value in fields.items() if value is not None}
    return json.dumps(told).encode("ascii")


def _as_bytes(config: Config) -> bytes:
    if isinstance(config, bytes):
        return config
    return (config if isinstance(config, str) else json.dumps(dict(config))).encode()


def _query(owner: str | None) -> str:
    return "" if owner is None else f"?owner={quote(owner, safe='')}"


def _all_files(weights: bytes, config: Config, further: Files | None) -> tuple[bytes, str]:
    return _multipart({_CONFIG: _as_bytes(config), _WEIGHTS: weights, **(further or {})})


def _multipart(files: Files) -> tuple[bytes, str]:
    """A body that holds the files, and its content type."""
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files.items()
    ]
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={boundary}"


def _path(name: str) -> str:
    if not name:
        raise ValueError("name an adapter; an empty name is the base, which is always loaded")
    if {".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is no adapter's name, but a path to another")
    return f"{_PATH}/{quote(name, safe='/@')}"


def _nothing(_head: Head, _body: bytes) -> None:
    """That it was done is all there is to say."""


def _uploaded(_head: Head, body: bytes) -> UploadedAdapter:
    reply = Fields(parse_json(body, "the reply"), "reply")
    return UploadedAdapter(reply.text("id"), reply.text_or_none("revision"), reply.integer("bytes"))


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
        invocation_tokens=_invocation(item),
        owner=item.text_or_none("owner"),
        download=_download(item.object("fetching")) if item.has("fetching") else None,
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


def _download(item: Fields) -> Download:
    return Download(item.integer("bytes"), item.integer_or_none("total"), item.number("seconds"))


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
        invocation_tokens=_invocation(item),
    )


def _invocation(item: Fields) -> tuple[int, ...]:
    tokens = item.value.get("invocation_tokens") or []
    if not isinstance(tokens, list):
        raise ProtocolError(f"{item.name}.invocation_tokens should be a list")
    return tuple(tokens)


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
