"""Merges as callers ask for them: in a request of either dialect, saved by name, and by the SDK."""

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from lory_client import (
    AdapterNotFoundError,
    AsyncClient,
    Client,
    ConflictError,
    MergedAdapters,
    MergeSource,
    ValidationError,
)
from lory_router.cli import app
from lory_router.engine import SequenceRequest
from lory_router.keys import Keyring
from lory_router.metrics import Metrics
from lory_router.names import Target
from lory_router.registry import Registry
from lory_router.registry_file import SCHEMA_VERSION, RegistryError
from lory_router.sourced_engine import SourcedEngine
from lory_router.sources.reference import Reference, read_reference
from lory_router.warmup import WarmUp
from lory_server import recipes
from lory_server.messages import Failure, Sampling
from lory_server.recipes import MAX_SOURCES, MERGED, Recipe, merged_id
from scripted_engine import REVISION, Front, ScriptedEngine, ScriptedStream

MERGE = "/v1/adapters/merge"
TWO = {"ids": ["french", "org/german"], "weights": [0.5, -1]}
SOURCES = (recipes.MergeSource("french", 0.5), recipes.MergeSource("org/german", -1.0))
BOTH = [{"adapter_id": "french", "weight": 0.5}, {"adapter_id": "org/german", "weight": -1}]


def generate(front: Front, merged: Any, **parameters: Any) -> httpx.Response:
    body = {"inputs": "a", "parameters": {"merged_adapters": merged, **parameters}}
    return front.post("/generate", body)


def refusal(reply: httpx.Response, status: int = 422) -> str:
    assert reply.status_code == status, reply.text
    told = reply.json()["error"]
    return told if isinstance(told, str) else told["message"]


# -- in a request ---------------------------------------------------------------------------


def test_a_request_names_several_adapters_as_loraxs_callers_do() -> None:
    front = Front()
    # What lorax-client sends: its density is required, whatever the strategy.
    wish = {**TWO, "merge_strategy": None, "density": 0.5, "majority_sign_method": None}
    reply = generate(front, wish, adapter_id=None, adapter_source=None)
    assert reply.status_code == 200, reply.text
    assert front.engine.last.recipe == Recipe(sources=SOURCES)
    assert front.engine.last.adapter_id == ""
    assert reply.headers["x-adapter-id"] == "french,org/german"
    assert reply.headers["x-adapter-source"] == "local"
    assert reply.headers["x-adapter-revision"] == REVISION
    assert front.ledger.records[-1].adapter_id == MERGED


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream", "/invocations"])
def test_every_route_of_loraxs_merges(path: str) -> None:
    front = Front()
    reply = front.post(path, {"inputs": "a", "parameters": {"merged_adapters": TWO}})
    assert reply.status_code == 200, reply.text
    assert front.engine.last.recipe == Recipe(sources=SOURCES)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_openais_routes_merge_by_the_same_field(path: str, body: dict[str, Any]) -> None:
    front = Front()
    wish = {**TWO, "merge_strategy": "ties", "density": 0.25}
    reply = front.post(path, {"model": "tiny", "merged_adapters": wish, **body})
    assert reply.status_code == 200, reply.text
    assert front.engine.last.recipe == Recipe(sources=SOURCES, method="ties", density=0.25)
    assert reply.headers["x-adapter-id"] == "french,org/german"
    assert front.ledger.records[-1].adapter_id == MERGED
    other = front.post(path, {"model": "french", "merged_adapters": wish, **body})
    assert "at most one adapter" in refusal(other, 400)
    stray = front.post(path, {"model": "tiny", "merged_adapters": {**wish, "top": 1}, **body})
    assert "`merged_adapters`: field 'top'" in refusal(stray, 400)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, Recipe(sources=SOURCES)),
        ({"merge_strategy": "cat"}, Recipe(sources=SOURCES)),
        ({"density": 0.0, "majority_sign_method": "frequency"}, Recipe(sources=SOURCES)),
        (
            {"merge_strategy": "ties", "density": 1, "majority_sign_method": "frequency"},
            Recipe(sources=SOURCES, method="ties", majority_sign_method="frequency"),
        ),
        (
            {"merge_strategy": "dare_linear", "density": 0.5, "seed": 7},
            Recipe(sources=SOURCES, method="dare_linear", density=0.5, seed=7),
        ),
        (
            {"merge_strategy": "svd", "rank": 16},
            Recipe(sources=SOURCES, method="svd", rank=16),
        ),
        ({"merge_strategy": "lorax_linear"}, Recipe(sources=SOURCES, method="lorax_linear")),
    ],
)
def test_what_a_strategy_does_not_use_makes_no_other_merge(
    told: dict[str, Any], expected: Recipe
) -> None:
    front = Front()
    assert generate(front, {**TWO, **told}).status_code == 200
    assert front.engine.last.recipe == expected


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"ids": [], "weights": []}, "merged_adapters.ids"),
    ({"ids": ["french"] * (MAX_SOURCES + 1), "weights": [1] * (MAX_SOURCES + 1)}, "Given: 33"),
    ({"ids": ["french"] * 100, "weights": [1] * 100}, "merged_adapters.ids"),
    ({"weights": [1]}, "merged_adapters.weights"),
    ({"weights": [1, 2, 3]}, "must be as many as `ids`, 2"),
    ({"weights": [1, 1e9]}, "merged_adapters.weights[1]"),
    ({"weights": [1, "1"]}, "merged_adapters.weights"),
    ({"weights": [1, True]}, "merged_adapters.weights"),
    ({"weights": None}, "merged_adapters.weights"),
    ({"ids": "french"}, "merged_adapters.ids"),
    ({"ids": ["french", ""]}, "merged_adapters.ids[1]"),
    ({"ids": ["french", "tiny"]}, "merged_adapters.ids[1]"),
    ({"ids": ["french", "__base_model__"]}, "merged_adapters.ids[1]"),
    ({"ids": ["french", None]}, "merged_adapters.ids"),
    ({"merge_strategy": "average"}, "known are linear, ties"),
    ({"merge_strategy": "ties"}, "`merged_adapters.density` is required"),
    ({"merge_strategy": "ties", "density": 0}, "merged_adapters.density"),
    ({"merge_strategy": "ties", "density": 1.01}, "merged_adapters.density"),
    ({"merge_strategy": "dare_ties", "density": -0.1}, "merged_adapters.density"),
    ({"density": 2}, "merged_adapters.density"),
    ({"majority_sign_method": "mean"}, "merged_adapters.majority_sign_method"),
    ({"rank": 4}, "is for the method svd"),
    ({"merge_strategy": "svd", "rank": 0}, "merged_adapters.rank"),
    ({"merge_strategy": "svd", "rank": 257}, "merged_adapters.rank"),
    ({"seed": 4}, "merged_adapters.seed"),
    ({"merge_strategy": "dare_ties", "density": 0.5, "seed": -1}, "merged_adapters.seed"),
    ({"merge_strategy": "dare_ties", "density": 0.5, "seed": 2**64}, "merged_adapters.seed"),
    ({"mode": "ties"}, "parameters.merged_adapters.mode"),
]


@pytest.mark.parametrize(("told", "says"), HOSTILE, ids=[says for _, says in HOSTILE])
def test_a_wish_that_makes_no_sense_names_its_field(told: dict[str, Any], says: str) -> None:
    front = Front()
    assert says in refusal(generate(front, {**TWO, **told}))
    assert not front.engine.streams


def test_nan_is_no_json_and_no_weight() -> None:
    for number in ("NaN", "Infinity", "1e999"):
        merged = f'{{"ids": ["french"], "weights": [{number}]}}'
        text = f'{{"inputs": "a", "parameters": {{"merged_adapters": {merged}}}}}'
        reply = Front().ask("POST", "/generate", content=text)
        assert reply.status_code in (400, 422), reply.text


def test_a_merge_beside_an_adapter_is_refused() -> None:
    assert "at most one adapter" in refusal(generate(Front(), TWO, adapter_id="french"))
    assert generate(Front(), TWO, adapter_id="").status_code == 200
    assert generate(Front(), None, adapter_id="french").status_code == 200


@pytest.mark.parametrize("name", ["none", "@fetched", "+x", "../french", 'a"b'])
def test_a_source_that_is_not_there_has_the_404_of_any_adapter(name: str) -> None:
    front = Front()
    alone = front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": name}})
    reply = generate(front, {"ids": ["french", name], "weights": [1, 1]})
    assert (reply.status_code, reply.json()) == (alone.status_code, alone.json())
    assert reply.json()["error_type"] == "adapter_not_found"


def test_no_name_of_a_caller_is_a_recipe() -> None:
    recipe = merged_id(Recipe(sources=SOURCES))
    front = Front()
    reply = front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": recipe}})
    assert reply.status_code in (404, 422)
    for path in ("/v1/adapters/{}", "/v1/adapters/{}/load"):
        front.post(path.format(recipe), {})
        front.get(path.format(recipe))
    assert not front.engine.streams
    assert not front.engine.orders


def test_sources_have_aliases_and_revisions_and_removed_ones_are_gone() -> None:
    front = Front()
    front.post("/v1/adapters", {"name": "french@prod"})
    wish = {"ids": ["french@prod", "org/german@0123456789"], "weights": [1, 1]}
    assert generate(front, wish).status_code == 200
    assert front.engine.last.recipe == Recipe(
        sources=(
            recipes.MergeSource("french", 1.0, REVISION),
            recipes.MergeSource("org/german", 1.0, "0123456789"),
        )
    )
    front.ask("DELETE", "/v1/adapters/org/german")
    assert "org/german" in refusal(generate(front, TWO), 404)


def test_metrics_have_one_label_for_all_that_have_no_name() -> None:
    metrics = Metrics(model="tiny")
    labels = metrics._labels
    assert labels.of(MERGED) == "merged"
    assert labels.of("merged") == "tiny:merged"


# -- saved ----------------------------------------------------------------------------------


def save(front: Front, **body: Any) -> httpx.Response:
    return front.post(MERGE, {"name": "blend", "adapters": BOTH, **body})


def test_a_saved_merge_is_an_adapter_with_a_recipe() -> None:
    front = Front()
    reply = save(front, method="dare_ties", density=0.5, seed=3)
    assert reply.status_code == 201, reply.text
    told = reply.json()
    assert told["id"] == "blend"
    assert told["merged"] == {
        "method": "dare_ties",
        "adapters": [
            {"adapter_id": "french", "weight": 0.5, "revision": None},
            {"adapter_id": "org/german", "weight": -1.0, "revision": None},
        ],
        "density": 0.5,
        "majority_sign_method": "total",
        "seed": 3,
    }
    recipe = Recipe(sources=SOURCES, method="dare_ties", density=0.5, seed=3, name="blend")
    assert front.engine.orders == [("find", merged_id(recipe), "")]
    assert save(front, method="dare_ties", density=0.5, seed=3).status_code == 200
    ids = [card["id"] for card in front.get("/v1/models").json()["data"]]
    assert ids == ["tiny", "french", "org/german", "blend"]
    assert front.get("/v1/adapters/blend").json()["merged"] == told["merged"]
    reply = front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "blend"}})
    assert reply.headers["x-adapter-id"] == "blend"
    assert (front.engine.last.recipe, front.engine.last.adapter_id) == (recipe, "blend")
    assert front.ledger.records[-1].adapter_id == "blend"


def test_a_saved_merge_has_aliases_pins_and_an_end() -> None:
    front = Front()
    save(front)
    engine_name = merged_id(Recipe(sources=SOURCES, name="blend"))
    assert front.post("/v1/adapters", {"name": "blend@prod"}).status_code == 201
    front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "blend@prod"}})
    assert front.engine.last.adapter_revision == REVISION
    front.engine.adapters += (engine_name,)
    pinned = front.post("/v1/adapters/blend/pin").json()
    assert (pinned["id"], pinned["pinned"]) == ("blend", True)
    assert front.get("/v1/adapters/blend").json()["state"] == "device"
    assert front.post("/v1/adapters/blend/unload").status_code == 409
    assert front.ask("DELETE", "/v1/adapters/blend").status_code == 200
    assert front.engine.orders[-1] == ("drop", engine_name, "")
    assert front.get("/v1/adapters/blend").status_code == 404
    for name in ("blend", "blend@prod"):
        reply = front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": name}})
        assert reply.status_code == 404
    assert front.get("/v1/adapters").json()["removed"] == []
    assert save(front).status_code == 201


def test_names_that_are_taken_or_none_are_refused() -> None:
    front = Front()
    front.post("/v1/adapters", {"name": "help", "adapter_id": "french"})
    for name, status in [("french", 409), ("help", 409), ("tiny", 400), ("a b", 400)]:
        assert save(front, name=name).status_code == status
    for name in ("blend@prod", ""):
        assert save(front, name=name).status_code == 400
    save(front)
    assert "another merge" in refusal(save(front, method="svd"), 409)
    reply = front.post("/v1/adapters", {"name": "blend", "adapter_id": "french"})
    assert reply.status_code == 409
    front.ask("DELETE", "/v1/adapters/org/german")
    assert save(front, name="org/german", adapters=BOTH[:1]).status_code == 409


SAVED_HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"adapters": []}, "`adapters`"),
    ({"adapters": [{"adapter_id": "french"}]}, "weight"),
    ({"adapters": [{**BOTH[0], "scale": 1}]}, "adapters[0].scale"),
    ({"adapters": [{**BOTH[0], "weight": 1e7}]}, "adapters[0].weight"),
    ({"adapters": [BOTH[0], {"adapter_id": "tiny", "weight": 1}]}, "adapters[1].adapter_id"),
    ({"method": "mean"}, "`method`"),
    ({"density": 0.5}, "`density` is for the methods dare_linear"),
    ({"majority_sign_method": "total"}, "`majority_sign_method` is for the methods"),
    ({"method": "ties"}, "`density` is required"),
    ({"merge_strategy": "ties"}, "merge_strategy"),
    ({"rank": 8}, "`rank`"),
]


@pytest.mark.parametrize(("told", "says"), SAVED_HOSTILE, ids=[says for _, says in SAVED_HOSTILE])
def test_a_merge_to_save_is_read_strictly(told: dict[str, Any], says: str) -> None:
    front = Front()
    assert says in refusal(save(front, **told), 400)
    assert not front.engine.orders


def test_a_merge_is_made_before_it_is_saved() -> None:
    front = Front()
    missing = [{"adapter_id": "none", "weight": 1}]
    assert "none" in refusal(save(front, adapters=missing), 404)
    front.engine.refuses = Failure(
        code="adapter_invalid", message="source 1 ('french'): is DoRA", source="french"
    )
    assert "source 1 ('french'): is DoRA" in refusal(save(front), 400)
    assert front.get("/v1/adapters/blend").status_code == 404


def test_a_merge_of_a_merge_is_refused() -> None:
    front = Front()
    save(front)
    again = [{"adapter_id": "blend", "weight": 1}]
    assert "itself a merge" in refusal(save(front, name="more", adapters=again), 400)
    assert "itself a merge" in refusal(generate(front, {"ids": ["blend"], "weights": [1]}))


def test_a_source_that_was_removed_is_not_served_by_a_merge() -> None:
    front = Front()
    save(front)
    front.ask("DELETE", "/v1/adapters/french")
    reply = front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "blend"}})
    assert "french" in refusal(reply, 404)
    assert front.post("/v1/adapters/blend/load").status_code == 404
    front.post("/v1/adapters", {"name": "french"})
    reply = front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "blend"}})
    assert reply.status_code == 200


def test_a_pinned_merge_goes_with_its_source_and_comes_back_with_it() -> None:
    front = Front()
    save(front)
    name = merged_id(Recipe(sources=SOURCES, name="blend"))
    assert front.post("/v1/adapters/blend/pin").json()["pinned"]
    assert name in front.engine.pinned
    front.ask("DELETE", "/v1/adapters/french")
    assert not front.engine.pinned
    assert not front.engine.loaded
    told = front.get("/v1/adapters/blend").json()
    assert (told["state"], told["pinned"]) == ("refused", False)
    assert (
        told["refused"] == "its source 'french' was removed; serve that again, or delete the merge"
    )
    assert front.post("/v1/adapters", {"name": "french"}).status_code == 201
    assert front.engine.pinned == {name}
    told = front.get("/v1/adapters/blend").json()
    assert (told["state"], told["refused"]) == ("disk", None)


def test_a_merge_that_cannot_be_pinned_again_is_told_and_its_source_is_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    front = Front()
    save(front)
    front.post("/v1/adapters/blend/pin")
    front.ask("DELETE", "/v1/adapters/french")
    full = Failure(code="adapter_capacity", message="takes too much")
    engine = front.engine
    engine.refuses_to_pin = full
    assert front.post("/v1/adapters", {"name": "french"}).status_code == 201
    assert "pinned merge 'blend' is not loaded: takes too much" in caplog.text


# -- whose ----------------------------------------------------------------------------------


def as_(who: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {who}"}}


@pytest.fixture
def owned(tmp_path: Path) -> Front:
    """`secret` is acme's, and the admin has merged it with `french`, which is for all."""
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in ("acme", "beta")]))
    front = Front(
        engine=ScriptedEngine(adapters=("french", "secret")),
        registry=Registry(str(tmp_path / "registry")),
        keys=Keyring(("admin",), str(path)),
    )
    front.post("/v1/adapters", {"name": "secret", "owner": "acme"}, **as_("admin"))
    adapters = [{"adapter_id": name, "weight": 1} for name in ("french", "secret")]
    reply = front.post(MERGE, {"name": "blend", "adapters": adapters}, **as_("admin"))
    assert reply.status_code == 201, reply.text
    return front


def test_a_merge_is_there_for_who_may_see_all_its_sources(owned: Front) -> None:
    def ask(who: str, **parameters: Any) -> tuple[int, Any]:
        reply = owned.post("/generate", {"inputs": "a", "parameters": parameters}, **as_(who))
        return reply.status_code, reply.json()

    both = {"ids": ["french", "secret"], "weights": [1, 1]}
    for who, status in (("admin", 200), ("acme", 200), ("beta", 404)):
        assert ask(who, adapter_id="blend")[0] == status
        assert ask(who, merged_adapters=both)[0] == status
        ids = [one["id"] for one in owned.get("/v1/adapters", **as_(who)).json()["data"]]
        assert ("blend" in ids) == (status == 200)
    status, told = ask("beta", merged_adapters=both)
    absent = ask("beta", merged_adapters={**both, "ids": ["french", "sacred"]})
    assert told == json.loads(json.dumps(absent[1]).replace("sacred", "secret"))
    assert ask("beta", merged_adapters={"ids": ["french"], "weights": [1]})[0] == 200


def test_a_tenant_saves_merges_of_what_it_sees_under_names_of_its_own(owned: Front) -> None:
    def save_as(who: str, name: str, *sources: str) -> int:
        adapters = [{"adapter_id": source, "weight": 1} for source in sources]
        return owned.post(MERGE, {"name": name, "adapters": adapters}, **as_(who)).status_code

    assert save_as("acme", "mine", "french") == 403
    assert save_as("acme", "acme/mine", "french", "secret") == 201
    assert save_as("beta", "acme/mine", "french") == 403
    assert save_as("beta", "beta/theirs", "secret") == 404
    adapters = [{"adapter_id": "secret", "weight": 1}]
    reply = owned.post(MERGE, {"name": "beta/theirs", "adapters": adapters}, **as_("beta"))
    assert refusal(reply, 404).startswith("No adapter named 'secret';")
    body = {"inputs": "a", "parameters": {"adapter_id": "acme/mine"}}
    for who, status in (("acme", 200), ("beta", 404)):
        assert owned.post("/generate", body, **as_(who)).status_code == status
    assert owned.ask("DELETE", "/v1/adapters/blend", **as_("acme")).status_code == 403
    assert owned.ask("DELETE", "/v1/adapters/acme/mine", **as_("acme")).status_code == 200
    assert owned.registry.state.owners == {"secret": "acme"}


def test_a_tenants_merge_needs_a_registry_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": "acme", "tenant": "acme"}]))
    front = Front(keys=Keyring((), str(path)))
    body = {"name": "acme/mine", "adapters": BOTH[:1]}
    assert "--registry" in refusal(front.post(MERGE, body, **as_("acme")), 400)


# -- the registry ---------------------------------------------------------------------------


def run(work: Any) -> Any:
    return asyncio.run(work)


def test_a_merge_outlives_the_server(tmp_path: Path) -> None:
    path = str(tmp_path / "registry")
    recipe = Recipe(sources=SOURCES, method="ties", density=0.1, name="blend")
    with closing(Registry(path)) as first:
        run(first.save_merge(recipe))
        run(first.pin(Target("blend")))
    with closing(Registry(path)) as second:
        assert second.state.merges == {"blend": recipe}
        assert second.engine_name("blend") == merged_id(recipe)
        engine = ScriptedEngine()
        run(_warmed(WarmUp(engine, second, ())))
        assert engine.orders == [("pin", merged_id(recipe), "")]
        run(second.clear("blend"))
        assert (second.state.merges, second.state.pins, second.state.removed) == ({}, set(), set())


async def _warmed(warm_up: WarmUp) -> None:
    warm_up.begin()
    await warm_up.check()


def test_a_registry_of_the_first_schema_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "registry"
    with closing(sqlite3.connect(path)) as old, old:
        old.execute("CREATE TABLE names (name TEXT PRIMARY KEY, adapter_id TEXT, revision TEXT)")
        old.execute("CREATE TABLE pins (adapter_id TEXT, revision TEXT)")
        old.execute("CREATE TABLE removed (adapter_id TEXT PRIMARY KEY)")
        old.execute("INSERT INTO names VALUES ('help', 'french', '')")
        old.execute("PRAGMA application_id = 0x4C6F7279")
        old.execute("PRAGMA user_version = 1")
    for _ in range(2):
        with closing(Registry(str(path))) as registry:
            assert registry.target("help") == Target("french")
            assert registry.state.merges == {}
    with closing(sqlite3.connect(path)) as now:
        assert now.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        now.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(RegistryError, match="newer"):
        Registry(str(path))


# -- adapters from sources ------------------------------------------------------------------


class FakeSources:
    """Hands out names, and counts holds."""

    def __init__(self) -> None:
        self.held: list[str] = []

    async def acquire(self, reference: Reference, token: str = "") -> str:
        if "gone" in reference.name:
            raise LookupError(reference.name)
        self.held.append(f"@{reference.name}")
        return self.held[-1]

    def latest(self, reference: Reference) -> None:
        """Nothing is pinned."""

    def release(self, name: str) -> None:
        self.held.remove(name)


def fetched_request(*names: str) -> SequenceRequest:
    sources = tuple(recipes.MergeSource(name, 0.5) for name in names)
    references = tuple(read_reference(name, None) for name in names)
    return SequenceRequest(
        (1,),
        Sampling(max_new_tokens=1, seed=0),
        recipe=Recipe(sources=sources),
        references=references,
    )


def test_every_source_that_was_fetched_is_held_until_the_stream_ends() -> None:
    sources, engine = FakeSources(), ScriptedEngine(adapters=("french", "@hub:o/x", "@hub:o/y"))
    sourced = SourcedEngine(engine, sources)  # type: ignore[arg-type]

    async def story() -> None:
        stream = await sourced.submit(fetched_request("hub:o/x", "french", "hub:o/y"))
        assert sources.held == ["@hub:o/x", "@hub:o/y"]
        async for _ in stream:
            pass
        assert sources.held == []
        stream.cancel()
        with pytest.raises(LookupError):
            await sourced.submit(fetched_request("hub:o/x", "hub:o/gone"))
        assert sources.held == []

    run(story())
    recipe = engine.last.recipe
    assert recipe is not None
    assert [one.adapter_id for one in recipe.sources] == ["@hub:o/x", "french", "@hub:o/y"]
    assert isinstance(engine.streams[-1], ScriptedStream)


# -- the SDK and the command line -----------------------------------------------------------


def test_the_client_merges_in_a_request_and_by_name() -> None:
    front = Front()
    wish = MergedAdapters(["french", "org/german"], [0.5, -1], density=0.5)
    with front.served() as url, Client(url, max_retries=0) as client:
        assert client.generate("a", merged_adapters=wish).adapter_revision == REVISION
        assert front.engine.last.recipe == Recipe(sources=SOURCES)
        client.chat([{"role": "user", "content": "a"}], merged_adapters=TWO)
        assert front.engine.last.recipe == Recipe(sources=SOURCES)
        with pytest.raises(ValidationError, match=r"merged_adapters\.density"):
            client.generate("a", merged_adapters={**TWO, "merge_strategy": "ties"})
        saved = client.adapters.merge("blend", {"french": 0.5, "org/german": -1}, method="svd")
        assert saved.merged is not None
        assert saved.merged.method == "svd"
        assert saved.merged.adapters[1] == MergeSource("org/german", -1.0, None)
        assert {one.id: one.merged for one in client.adapters.list()}["blend"] == saved.merged
        assert client.adapters.get("french").merged is None
        with pytest.raises(ConflictError):
            client.adapters.merge("blend", {"french": 1})
        with pytest.raises(AdapterNotFoundError):
            client.adapters.merge("other", {"none": 1})

        async def awaited() -> str:
            async with AsyncClient(url, max_retries=0) as other:
                return (await other.adapters.merge("again", {"french": 1})).id

        assert run(awaited()) == "again"


def invoke(url: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["adapters", *arguments, "--url", url])
    return result.exit_code, result.output + str(result.exception or "")


def test_the_command_merges_and_tells() -> None:
    front = Front()
    of = ("--of", "french=0.5", "--of", "org/german=-1")
    with front.served() as url:
        code, output = invoke(url, "merge", "blend", *of, "--method", "ties", "--density", "0.5")
        assert code == 0, output
        assert "0.5 x french, -1 x org/german by ties" in output
        assert "blend" in invoke(url, "list")[1]
        shown = json.loads(invoke(url, "show", "blend", "--json")[1])
        assert shown["merged"]["density"] == 0.5
        code, output = invoke(url, "merge", "other", "--of", "french")
        assert code != 0
        assert "write ADAPTER=WEIGHT" in output
        assert "--of ADAPTER=WEIGHT" in invoke(url, "merge", "other")[1]
        assert "are for merge" in invoke(url, "pin", "french", "--rank", "2")[1]
        assert "is taken" in invoke(url, "merge", "french", "--of", "org/german=1")[1]
