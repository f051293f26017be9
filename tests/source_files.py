"""The bytes of small adapters, and `Sources` to fetch them with, for tests of sources.

It must not know servers.
"""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from lory_router.sources.fetching import OpenWriter
from lory_router.sources.hosts import HostList
from lory_router.sources.service import Sources
from lory_router.sources.settings import HubSettings, S3Settings, SourceSettings
from lory_router.sources.source import FURTHER_NAMES
from lory_router.sources.writer import FileWriter
from source_servers import CONFIG, WEIGHTS

T = TypeVar("T")


def weights(num_floats: int = 4, fill: int = 0) -> bytes:
    """A safetensors file of one tensor."""
    entry = {"dtype": "F32", "shape": [num_floats], "data_offsets": [0, 4 * num_floats]}
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes([fill]) * (4 * num_floats)


def adapter_bytes(num_floats: int = 4, fill: int = 0) -> dict[str, bytes]:
    config = {"peft_type": "LORA", "r": 4, "fill": fill}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: weights(num_floats, fill)}


def at(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """As a server has them below `prefix`."""
    return {f"{prefix}/{name}": body for name, body in files.items()}


def settings(
    folder: Path, *, hub: str = "http://127.0.0.1:9", hosts: tuple[str, ...] = (), **changes: Any
) -> SourceSettings:
    """Impatient ones."""
    fields: dict[str, Any] = {
        "folder": folder,
        "hub": HubSettings(hub, hosts=HostList(hosts)),
        "web_hosts": HostList(hosts),
        "s3": S3Settings(),
        "stall_s": 0.5,
        "retry_pause_s": 0.01,
        "wait_timeout_s": 20.0,
    }
    return SourceSettings(**(fields | changes))


def with_sources(
    settings: SourceSettings,
    work: Callable[[Sources], Awaitable[T]],
    open_writer: OpenWriter = FileWriter,
) -> T:
    """What `work` comes to, with sources that live as long."""

    async def main() -> T:
        sources = Sources(settings, open_writer)
        try:
            return await work(sources)
        finally:
            await sources.close()

    return asyncio.run(main())


def kept(folder: Path) -> dict[str, dict[str, bytes]]:
    """The adapters that a cache holds, file by file."""
    found = {}
    for entry in (folder / "held").iterdir():
        names = (CONFIG, WEIGHTS, *FURTHER_NAMES)
        found[entry.name] = {n: (entry / n).read_bytes() for n in names if (entry / n).exists()}
    return found


def is_clean(folder: Path) -> bool:
    """Whether nothing is left of what was being written or removed."""
    return not any((folder / "arriving").iterdir())
