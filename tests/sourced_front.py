"""A front whose adapters come from a hub stand-in, over a scripted engine, for tests of routes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec

from lory_router.app import create_app
from lory_router.engine import SequenceRequest
from lory_router.keys import Keyring
from lory_router.metrics import Metrics
from lory_router.registry import Registry
from lory_router.settings import RouterSettings
from lory_router.sourced_engine import SourcedEngine
from lory_router.sources.metrics import SourceMetrics
from lory_router.sources.reference import SourceKind
from lory_router.sources.service import Sources
from lory_router.sources.settings import SourceSettings
from lory_server.adapters.manner import MANIFEST_NAME, read_manner, with_tokenizer
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME, tokenizer_of
from lory_server.messages import NO_MANNER, AdapterEntry, Manner, OrderDone, OrderKind
from scripted_engine import BASE, TEXT, Answer, Front, ScriptedEngine, ScriptedStream
from source_files import adapter_bytes, kept, settings
from source_servers import Hub, Repo

ONE, TWO = adapter_bytes(500, fill=1), adapter_bytes(500, fill=2)


class FolderEngine(ScriptedEngine):
    """Knows what lies in the fetched folder, as an engine does."""

    folder: Path
    held: list[bool]
    sources: Sources

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        self._look()
        entries = await super().list_adapters()
        return tuple(
            msgspec.structs.replace(entry, tier="host", revision="r")
            if entry.adapter_id.startswith("@") and entry.adapter_id not in self.loaded
            else entry
            for entry in entries
        )

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        self._look()
        return await super().order(kind, adapter_id, revision)

    def _look(self) -> None:
        found = kept(self.folder)
        self.adapters = (*ScriptedEngine().adapters, *(f"@{name}" for name in found))
        self.manners |= {f"@{name}": manner_of(files) for name, files in found.items()}

    async def submit(self, request: SequenceRequest) -> ScriptedStream:
        self._look()
        self.held.append(self.sources.disk.is_held(request.adapter_id[1:]))
        return await super().submit(request)


def manner_of(files: dict[str, bytes]) -> Manner:
    """As the engine reads it, over a base whose tokenizer is another."""
    manner = read_manner(files[MANIFEST_NAME]) if MANIFEST_NAME in files else NO_MANNER
    if TOKENIZER_NAME not in files:
        return manner
    told = {name: files[name] for name in (TOKENIZER_NAME, *COMPANIONS) if name in files}
    return with_tokenizer(manner, tokenizer_of(told).digest, 0)


class World:
    def __init__(self, tmp_path: Path, hub_url: str = "") -> None:
        """Without a URL the hub has to be run."""
        self.hub = Hub()
        self._hub_url = hub_url
        self.hub.repos["org/open"] = Repo(ONE)
        self.hub.repos["org/secret"] = Repo(TWO, readers={"good"})
        self.folder = tmp_path / "cache"
        self.engine = FolderEngine([Answer(b"hi")])
        self.engine.folder, self.engine.held = self.folder, []
        self.registry = Registry()
        self.keys: Keyring | None = None
        self.settings: dict[str, Any] = {}
        """Of the front, beside what it has from its sources."""

    def front(self, **changes: Any) -> "SourcedFront":
        hosts = () if self._hub_url else (self.hub.cdn.url,)
        chosen = settings(self.folder, hub=self._hub_url or self.hub.url, hosts=hosts)
        return SourcedFront(self, replace(chosen, **changes))


class SourcedFront(Front):
    """A front over sources; each `run` has an event loop, and so sources, of its own."""

    def __init__(self, world: World, chosen: SourceSettings) -> None:
        self.engine = world.engine
        web: frozenset[SourceKind] = frozenset(("web",))
        self.settings = RouterSettings(
            model_names=(BASE,), adapter_sources=chosen.kinds | web, **world.settings
        )
        self.registry, self.keys = world.registry, world.keys
        self._chosen = chosen

    def run(self, work: Any) -> Any:
        async def main(client: httpx.AsyncClient) -> Any:
            try:
                return await work(client)
            finally:
                await sourced.orders.close()
                for engine_name in sourced.orders._pinned.values():
                    self.sources.release(engine_name)
                assert not self.sources.disk._holds, "a hold was not given back"
                await self.sources.close()

        self.sources = Sources(self._chosen)
        self.engine.sources = self.sources
        self.metrics = Metrics(model=BASE, name_of=self.sources.name_of)
        self.metrics.add(SourceMetrics(self.sources))
        sourced = SourcedEngine(self.engine, self.sources)
        self.app = create_app(
            sourced, self.settings, TEXT, self.metrics, self.registry, keys=self.keys
        )
        return super().run(main)


def lorax(**parameters: Any) -> dict[str, Any]:
    """The body of a request for two characters' continuation."""
    return {"inputs": "ab", "parameters": parameters}
