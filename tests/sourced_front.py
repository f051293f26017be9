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
from lory_server.messages import AdapterEntry, OrderDone, OrderKind
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
        self.adapters = (*ScriptedEngine().adapters, *(f"@{name}" for name in kept(self.folder)))

    async def submit(self, request: SequenceRequest) -> ScriptedStream:
        self._look()
        self.held.append(self.sources.disk.is_held(request.adapter_id[1:]))
        return await super().submit(request)


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

    def front(self, **changes: Any) -> "SourcedFront":
        hosts = () if self._hub_url else (self.hub.cdn.url,)
        chosen = settings(self.folder, hub=self._hub_url or self.hub.url, hosts=hosts)
        return SourcedFront(self, replace(chosen, **changes))


class SourcedFront(Front):
    """A front over sources; each `run` has an event loop, and so sources, of its own."""

    def __init__(self, world: World, chosen: SourceSettings) -> None:
        self.engine = world.engine
        web: frozenset[SourceKind] = frozenset(("web",))
        self.settings = RouterSettings(model_names=(BASE,), adapter_sources=chosen.kinds | web)
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
