"""`lory adapters pin NAME` and its like: one request to a running server, and what came of it.

It must not know the server's inside.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args
from urllib.parse import quote

import httpx
from rich.console import Console

from lory_router.adapter_table import MIB, fetched, merged
from lory_router.config import ConfigError
from lory_router.remote import check, connect, one_line_errors

Deed = Literal["list", "show", "load", "unload", "pin", "unpin", "register", "merge", "delete"]

Wish = dict[str, Any]
"""Fields of a request's body, beside the name."""


def check_arguments(deed: Deed, name: str, registered: Wish, merged: Wish) -> Wish:
    """The wish, which is of one of the two."""
    if not name and deed != "list":
        raise ConfigError(f"lory adapters {deed}: needs the name of an adapter")
    if registered and deed != "register":
        text = "--adapter, --revision and --owner are for register"
        raise ConfigError(f"lory adapters {deed}: {text}")
    if merged and deed != "merge":
        text = "--of, --method, --density, --sign, --rank and --seed are for merge"
        raise ConfigError(f"lory adapters {deed}: {text}")
    if deed == "merge" and "adapters" not in merged:
        raise ConfigError("lory adapters merge: --of ADAPTER=WEIGHT names what it is merged from")
    return registered or merged


def given(**fields: object) -> Wish:
    """The flags that were given."""
    return {field: value for field, value in fields.items() if value not in ("", None, [])}


def merge_wish(
    of: Sequence[str] | None,
    method: str,
    density: float | None,
    sign: str,
    rank: int | None,
    seed: int | None,
) -> Wish:
    """By the names of the server's fields."""
    return given(
        adapters=read_weights(of or ()),
        method=method,
        density=density,
        majority_sign_method=sign,
        rank=rank,
        seed=seed,
    )


def read_weights(of: Sequence[str]) -> list[Wish]:
    """ADAPTER=WEIGHT, as the server wants it."""
    found: list[Wish] = []
    for text in of:
        adapter_id, _, weight = text.rpartition("=")
        try:
            found.append({"adapter_id": adapter_id, "weight": float(weight)})
        except ValueError as error:
            raise ConfigError(f"--of {text}: write ADAPTER=WEIGHT, as support=0.5") from error
    return found


def do(
    url: str,
    api_key: str,
    deed: Deed,
    name: str,
    wish: Wish,
    *,
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
            return client.post("/v1/adapters", json={"name": name, **wish})
        case "merge":
            return client.post("/v1/adapters/merge", json={"name": name, **wish})
        case _:
            return client.post(f"{path}/{deed}")


def _lines(told: dict[str, Any]) -> list[str]:
    if told.get("deleted"):
        # The adapters folder is the operator's; an upload, or what was fetched, goes with its name.
        kept = "" if ":" in told["id"] else "; no file was touched"
        return [f"{told['id']} is not served any more{kept}"]
    facts: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
        ("state", lambda a: a["state"] + (", pinned" if a["pinned"] else "")),
        ("fetching", lambda a: fetched(a["fetching"]) if a.get("fetching") else None),
        ("owner", lambda a: a.get("owner")),
        ("revision", lambda a: a["revision"]),
        ("refused", lambda a: a["refused"]),
        ("merged", lambda a: merged(a["merged"]) if a.get("merged") else None),
        ("changes", _changes),
        ("acts from", _invocation),
        ("memory", _memory),
        ("requests", lambda a: a["requests"] or None),
        ("names", lambda a: ", ".join(a["names"])),
    ]
    found = [(label, fact(told)) for label, fact in facts]
    return [told["id"], *(f"  {label:9} {value}" for label, value in found if value)]


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
