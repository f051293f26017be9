"""`lory adapters pin NAME` and its like: one request to a running server, and what came of it.

It must not know the server's inside.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args
from urllib.parse import quote

import httpx
from rich.console import Console

from lory_router.config import ConfigError
from lory_router.remote import check, connect, one_line_errors

Deed = Literal["list", "show", "load", "unload", "pin", "unpin", "register", "delete"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What register can be told beside a name."""

    adapter_id: str = ""
    revision: str = ""
    owner: str = ""


def check_arguments(deed: Deed, name: str, wish: Wish) -> None:
    if bool(name) != (deed != "list"):
        wants = "takes no name" if name else "needs the name of an adapter"
        raise ConfigError(f"lory adapters {deed}: {wants}")
    if wish != Wish() and deed != "register":
        text = "--adapter, --revision and --owner are for register"
        raise ConfigError(f"lory adapters {deed}: {text}")


def do(
    url: str,
    api_key: str,
    deed: Deed,
    name: str,
    *,
    wish: Wish = Wish(),
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Do it, and print the adapter as it is afterwards."""
    assert deed in get_args(Deed)
    with connect(url, api_key) as client, one_line_errors():
        reply = _request(client, deed, name, wish)
    check(reply)
    console, told = console or Console(), reply.json()
    if as_json:
        console.print_json(data=told)
    else:
        console.print("\n".join(_lines(told)), highlight=False, soft_wrap=True)


def _request(client: httpx.Client, deed: Deed, name: str, wish: Wish) -> httpx.Response:
    path = f"/v1/adapters/{quote(name, safe='/@')}"
    match deed:
        case "show":
            return client.get(path)
        case "delete":
            return client.delete(path)
        case "register":
            body = {"name": name, **asdict(wish)}
            return client.post("/v1/adapters", json={k: v for k, v in body.items() if v})
        case _:
            return client.post(f"{path}/{deed}")


def _lines(told: dict[str, Any]) -> list[str]:
    if told.get("deleted"):
        return [f"{told['id']} is not served any more; its files are where they were"]
    facts: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
        ("state", lambda a: a["state"] + (", pinned" if a["pinned"] else "")),
        ("fetching", lambda a: fetched(a["fetching"]) if a.get("fetching") else None),
        ("owner", lambda a: a.get("owner")),
        ("revision", lambda a: a["revision"]),
        ("refused", lambda a: a["refused"]),
        ("changes", _changes),
        ("acts from", _invocation),
        ("memory", _memory),
        ("requests", lambda a: a["requests"] or None),
        ("names", lambda a: ", ".join(a["names"])),
    ]
    found = [(label, fact(told)) for label, fact in facts]
    return [told["id"], *(f"  {label:9} {value}" for label, value in found if value)]


def fetched(download: dict[str, Any]) -> str:
    """How far it has come."""
    total = download["total"]
    of = "" if total is None else f" of {total / MIB:.1f}"
    return f"{download['bytes'] / MIB:.1f}{of} MiB in {download['seconds']:.0f} s"


def _changes(adapter: dict[str, Any]) -> str:
    kinds = adapter["matched"] or {}
    return ", ".join(
        f"{kind['modules']} x {name} (rank {'/'.join(map(str, kind['ranks']))})"
        for name, kind in kinds.items()
    )


def _invocation(adapter: dict[str, Any]) -> str:
    tokens = adapter["invocation_tokens"] or []
    return f"tokens {' '.join(map(str, tokens))}" if tokens else ""


def _memory(adapter: dict[str, Any]) -> str:
    sizes = {tier: adapter["bytes"][tier] for tier in ("host", "device")}
    return ", ".join(f"{tier} {size / MIB:.1f} MiB" for tier, size in sizes.items() if size)
