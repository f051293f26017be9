"""Fetched adapters in the engine: a second folder, names of their own, the same tokens as ever."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

import lory_client
import tiny_models
from adapter_files import write_adapter
from clients import server_process
from lory_router.sources.reference import Reference
from lory_router.sources.service import Sources
from lory_router.sources.source import FURTHER_NAMES
from lory_server.adapters.errors import AdapterNotFoundError
from lory_server.adapters.store import AdapterStore
from lory_server.messages import EngineOptions
from parity_world import ParityWorld, Session
from source_files import settings, with_sources
from source_servers import CONFIG, WEIGHTS, Hub, Repo, Server

DEMO = server_process.ROOT / "demo" / "adapters"
PROMPT = "My card was charged twice ->"


def read_files(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in (CONFIG, WEIGHTS, *FURTHER_NAMES)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


# -- the store ------------------------------------------------------------------------------------


def test_a_fetched_adapter_is_found_by_its_mark_and_nowhere_else(tmp_path: Path):
    write_adapter(tmp_path / "local" / "one")
    write_adapter(tmp_path / "fetched" / "hub-x-1", seed=1)
    store = AdapterStore(tmp_path / "local", fetched=tmp_path / "fetched")
    with store.locate("@hub-x-1") as files:
        assert Path(f"/proc/self/fd/{files.config_fd}").resolve().parent.name == "hub-x-1"
    for name in ("hub-x-1", "@one", "@../local/one", "@", "@@hub-x-1", "@hub-x-1/.."):
        with pytest.raises(AdapterNotFoundError):
            store.locate(name)
    assert store.list_ids() == ("one", "@hub-x-1")
    assert store.list_nameless() == ()


def test_adapters_may_all_be_fetched(tmp_path: Path):
    write_adapter(tmp_path / "a")
    store = AdapterStore(None, fetched=tmp_path)
    assert store.list_ids() == ("@a",)
    with store.locate("@a"), pytest.raises(AdapterNotFoundError):
        store.locate("a")
    with pytest.raises(AdapterNotFoundError):
        AdapterStore(tmp_path).locate("@a")


# -- the engine -----------------------------------------------------------------------------------


def test_an_engine_answers_from_fetched_bytes_as_from_local_ones(tmp_path: Path):
    """Token for token, in one batch; and without a local folder at all."""
    base = tiny_models.build("llama", tmp_path / "base", tie_word_embeddings=False)
    local = tmp_path / "local" / "one"
    tiny_models.save_adapter(local, base, 8, 16, ["q_proj", "v_proj"], seed=3)
    hub, cache = Hub(), tmp_path / "cache"
    hub.repos["org/one"] = Repo(read_files(local))

    async def work(sources: Sources) -> str:
        return await sources.acquire(Reference("hub", "org/one"))

    with hub.running():
        chosen = settings(cache, hub=hub.url, hosts=(hub.cdn.url,))
        name = with_sources(chosen, work)
    world = ParityWorld("llama", base, tmp_path / "local", {})
    held = str(cache / "held")
    bare, told, fetched = answers(world.options(fetched_dir=held), "", "one", name)
    assert fetched == told != bare
    assert answers(world.options(adapters_dir="", fetched_dir=held), name) == [told]


def answers(options: EngineOptions, *adapters: str) -> list[list[int]]:
    session = Session(options)
    for number, adapter in enumerate(adapters):
        session.submit(number, [1, 2, 3, 4], adapter)
    session.run()
    session.close()
    return [session.answers[number].tokens for number in range(len(adapters))]


# -- a whole server -------------------------------------------------------------------------------


def tokens_of(client: httpx.Client, **parameters: Any) -> list[tuple[int, float]]:
    wish = {"max_new_tokens": 24, "details": True, **parameters}
    response = client.post("/generate", json={"inputs": PROMPT, "parameters": wish})
    assert response.status_code == 200, response.text
    return [(t["id"], round(t["logprob"], 4)) for t in response.json()["details"]["tokens"]]


@pytest.mark.full
def test_a_fetched_adapter_says_what_the_local_one_says(tmp_path: Path):
    names = ("shout", "polite", "ticket-router")
    hub, web = Hub(), Server()
    for name in names:
        hub.repos[f"demo/{name}"] = Repo(read_files(DEMO / name))
        web.files |= {f"/demo/{name}/{file}": b for file, b in read_files(DEMO / name).items()}
    with hub.running(), web.running():
        flags = ("--adapter-cache", str(tmp_path / "cache"), "--hub-endpoint", hub.url)
        flags += ("--hub-hosts", hub.cdn.url, "--adapter-hosts", web.url)
        flags += ("--adapter-uploads", "--max-adapter-size", "10MB")
        with (
            server_process.serving(tmp_path / "log", *flags) as url,
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            base = tokens_of(client)
            for name in names:
                local = tokens_of(client, adapter_id=name)
                assert local != base
                hubs = tokens_of(client, adapter_id=f"demo/{name}", adapter_source="hub")
                assert hubs == local
                assert tokens_of(client, adapter_id=f"{web.url}/demo/{name}") == local
                assert _upload(client, name, read_files(DEMO / name)) == 201
                assert tokens_of(client, adapter_id=f"upload:{name}") == local
            weights = read_files(DEMO / "shout")[WEIGHTS].ljust(30_000_000)
            assert _upload(client, "large", read_files(DEMO / "shout") | {WEIGHTS: weights}) == 413
            _check_lists(url, names, web)
            _check_metrics(client.get("/metrics").text)
    log = (tmp_path / "log").read_text()
    assert len(re.findall(r"fetched hub:demo/shout in", log)) == 1
    assert re.search(r"8 adapters in \S*demo/adapters", log)


def _upload(client: httpx.Client, name: str, files: dict[str, bytes]) -> int:
    sent = [(file, (file, body)) for file, body in files.items()]
    return client.put(f"/v1/adapters/{name}/files", files=sent).status_code


def _check_lists(url: str, names: tuple[str, ...], web: Server) -> None:
    with lory_client.Client(url) as client:
        listed = {model.id for model in client.models()}
    assert {f"hub:demo/{name}" for name in names} <= listed
    assert {f"{web.url}/demo/{name}" for name in names} <= listed
    assert not any(name.startswith("@") for name in listed)


def _check_metrics(text: str) -> None:
    assert 'lory_adapter_requests_total{adapter="hub:demo/shout"} 1.0' in text
    assert 'lory_adapter_fetches_total{outcome="fetched"} 6.0' in text
    assert '"@' not in text
