"""Adapters of sources through the routes: how they are named, refused, listed and counted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripted_engine import BASE, Front
from source_files import kept
from source_servers import Reply, Repo
from sourced_front import ONE, TWO, World, lorax


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with world.hub.running():
        yield world


def test_lorax_names_a_source_beside_the_adapter(world: World):
    wish = lorax(adapter_id="org/open", adapter_source="hub")
    response = world.front().post("/generate", wish)
    assert (response.status_code, response.json()) == (200, {"generated_text": "hi"})
    assert response.headers["x-adapter-id"] == "hub:org/open"
    assert response.headers["x-adapter-source"] == "hub"
    assert world.engine.last.adapter_id.startswith("@hub-org-open-")
    assert world.engine.held == [True]


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
def test_a_stream_waits_for_its_adapter(world: World, path: str):
    wish = lorax(adapter_id="hub:org/open@main") | {"stream": True}
    response = world.front().post(path, wish)
    assert response.status_code == 200
    assert '"generated_text":"hi"' in response.text


@pytest.mark.parametrize(
    "named",
    [
        {"model": "hub:org/open"},
        {"model": f"{BASE}:hub:org/open"},
        {"model": "org/open", "adapter_source": "hub"},
        {"model": "hub:org/open", "lora_path": "hub:org/open"},
    ],
)
def test_openai_names_it_in_model(world: World, named: dict[str, str]):
    response = world.front().post("/v1/completions", {"prompt": "ab", "n": 2, **named})
    assert response.status_code == 200
    assert response.json()["model"] == named["model"]
    assert response.headers["x-adapter-id"] == "hub:org/open"
    assert len(world.engine.streams) == 2


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_private_adapter_asks_for_the_callers_token(world: World, path: str):
    def ask(**token: str) -> httpx.Response:
        named = {"adapter_source": "hub", **token}
        if path == "/generate":
            return world.front().post(path, lorax(adapter_id="org/secret", **named))
        return world.front().post(path, {"model": "org/secret", "prompt": "ab", **named})

    assert ask(api_token="good").status_code == 200
    for token in ({}, {"api_token": "bad"}):
        refused = ask(**token)
        assert refused.status_code == 404
        assert "No adapter named 'hub:org/secret'" in refused.text
        assert "good" not in refused.text


@pytest.mark.parametrize(
    ("parameters", "status", "told"),
    [
        ({"adapter_id": "org/none", "adapter_source": "hub"}, 404, "adapter_not_found"),
        ({"adapter_id": "hub:org/open@gone"}, 404, "adapter_not_found"),
        ({"adapter_id": "../x", "adapter_source": "hub"}, 422, "ORG/NAME"),
        ({"adapter_id": "https://other.example/a"}, 403, "--adapter-hosts"),
        ({"adapter_id": "bkt/p", "adapter_source": "s3"}, 422, "--s3-buckets"),
        ({"adapter_id": "a", "adapter_source": "upload"}, 422, "not uploaded"),
        ({"adapter_id": "a", "adapter_source": "pbase"}, 422, "must be one of local, hub, s3"),
        ({"adapter_source": "hub"}, 422, "no adapter is named"),
        ({"adapter_id": "french", "api_token": "x"}, 422, "`api_token`"),
        ({"adapter_id": "hub:org/open", "api_token": "a b"}, 422, "`api_token`"),
        ({"adapter_id": "hub:org/open", "api_token": "a\r\nx: y"}, 422, "`api_token`"),
        ({"adapter_id": "@hub-org-open-1"}, 404, "adapter_not_found"),
        ({"adapter_id": "hub:org/open", "adapter_source": "local"}, 422, "no local adapter"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_right_status(
    world: World, parameters: dict[str, str], status: int, told: str
):
    for path in ("/generate", "/generate_stream"):
        response = world.front().post(path, lorax(**parameters))
        assert response.status_code == status
        assert told in response.text
    assert not world.engine.streams


def test_without_sources_the_fix_is_told():
    front = Front()
    response = front.post("/generate", lorax(adapter_id="hub:org/open"))
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "--adapter-cache" in response.text
    refused = front.post("/v1/completions", {"model": "hub:org/open", "prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter_source")


@pytest.mark.parametrize(
    ("change", "status"),
    [({"max_adapter_bytes": 100}, 413), ({"is_offline": True}, 503)],
)
def test_limits_have_their_status(world: World, change: dict[str, Any], status: int):
    wish = lorax(adapter_id="hub:org/open")
    assert world.front(**change).post("/generate", wish).status_code == status


def test_a_source_that_is_down_is_a_503_that_says_when_to_come_back(world: World):
    world.hub.front.rules.insert(0, lambda seen: Reply(500))
    response = world.front().post("/v1/completions", {"model": "hub:org/open", "prompt": "a"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"]["code"] == "source_unavailable"
    assert "answered 500" in response.text


def test_a_bad_file_is_a_422_under_the_adapters_name(world: World):
    world.hub.repos["org/bad"] = Repo({**ONE, "adapter_config.json": b"[1]"})
    response = world.front().post("/generate", lorax(adapter_id="hub:org/bad"))
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "hub:org/bad: adapter_config.json" in response.text


def test_lists_show_what_was_fetched_by_its_name_and_hide_what_is_private(world: World):
    front = world.front()
    front.post("/generate", lorax(adapter_id="hub:org/open"))
    front.post("/generate", lorax(adapter_id="hub:org/secret", api_token="good"))
    repo = world.hub.repos["org/open"]
    repo.files, repo.commit = TWO, "2" * 40
    front.post("/generate", lorax(adapter_id="hub:org/open"))
    assert len(kept(world.folder)) == 3
    cards = {card["id"]: card for card in front.get("/v1/models").json()["data"]}
    assert set(cards) == {BASE, "french", "org/german", "hub:org/open"}
    assert cards["hub:org/open"]["tier"] == "host"
    one = front.get("/v1/models/hub:org/open")
    assert (one.status_code, one.json()["id"]) == (200, "hub:org/open")
    assert front.get("/v1/models/hub:org/secret").status_code == 404


def test_metrics_count_fetches_and_name_adapters_as_callers_do(world: World):
    front = world.front()

    async def work(client: httpx.AsyncClient) -> str:
        await client.post("/generate", json=lorax(adapter_id="hub:org/open"))
        await client.post("/generate", json=lorax(adapter_id="hub:org/none"))
        return (await client.get("/metrics")).text

    families = {f.name: f for f in text_string_to_metric_families(front.run(work))}
    labels = {s.labels["adapter"] for s in families["lory_adapter_requests"].samples}
    assert labels == {"hub:org/open"}
    size = sum(map(len, ONE.values()))
    assert families["lory_adapter_cache_bytes"].samples[0].value == size
    assert families["lory_adapter_fetched_bytes"].samples[0].value == size
    fetches = {s.labels["outcome"]: s.value for s in families["lory_adapter_fetches"].samples}
    assert fetches == {"fetched": 1.0, "failed": 0.0}
    assert families["lory_adapter_downloads"].samples[0].value == 0


def test_tokens_stand_in_no_log_and_no_repr(world: World, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG", logger="lory_router")
    for token in ("good", "canary-bad"):
        wish = lorax(adapter_id="hub:org/secret", api_token=token)
        response = world.front().post("/generate", wish)
        assert "canary" not in response.text
    assert "canary" not in caplog.text
    assert "good" not in repr(world.engine.last)
