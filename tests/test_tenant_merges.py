"""How many different merges a tenant's requests may ask for: 429 before they starve the others."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.errors import Overloaded
from lory_router.keys import Keyring
from lory_router.tenant_merges import KEPT_S, TenantMerges
from scripted_engine import Answer, Front, ScriptedEngine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_merge_counts_while_it_is_used_and_a_minute_after() -> None:
    clock = Clock()
    merges = TenantMerges(2, clock)
    merges.begin("acme", "one")
    merges.begin("acme", "one")
    merges.begin("acme", "two")
    merges.begin("beta", "three")
    with pytest.raises(Overloaded, match="different merges") as caught:
        merges.begin("acme", "three")
    assert caught.value.retry_after_s == KEPT_S
    merges.end("acme", "two")
    clock.now = 20.0
    with pytest.raises(Overloaded) as caught:
        merges.begin("acme", "three")
    assert caught.value.retry_after_s == KEPT_S - 20
    clock.now = KEPT_S
    merges.begin("acme", "three")
    merges.end("acme", "one")
    clock.now = 10 * KEPT_S
    with pytest.raises(Overloaded):
        merges.begin("acme", "four")
    merges.end("acme", "one")
    merges.end("acme", "three")
    merges.end("beta", "three")
    clock.now = 20 * KEPT_S
    merges.begin("acme", "four")
    merges.end("acme", "four")
    assert set(merges._uses["acme"]) == {"four"}


def generate(front: Front, weight: float, key: str = "", **more: Any) -> httpx.Response:
    wish = {"merged_adapters": {"ids": ["french"], "weights": [weight]}, **more}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return front.post("/generate", {"inputs": "a", "parameters": wish}, headers=headers)


def test_one_merge_too_many_is_a_429_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in ("acme", "beta")]))
    front = Front(keys=Keyring((), str(path)), max_tenant_merges=2)
    assert [generate(front, w, "acme").status_code for w in (1, 2, 1, 2)] == [200] * 4
    reply = generate(front, 3, "acme")
    assert (reply.status_code, reply.json()["error_type"]) == (429, "overloaded")
    assert "--max-tenant-merges" in reply.json()["error"]
    assert 50 <= int(reply.headers["retry-after"]) <= 60
    assert generate(front, 2, "acme").status_code == 200
    assert generate(front, 3, "beta").status_code == 200
    assert len(front.engine.streams) == 6


def test_what_fails_is_let_go_of_too() -> None:
    class Failing(ScriptedEngine):
        async def submit(self, request: Any) -> Any:
            raise RuntimeError("no")

    front = Front(engine=Failing(), max_tenant_merges=1)
    assert generate(front, 1).status_code == 500
    assert generate(front, 1).status_code == 500
    assert generate(front, 2).status_code == 429


def test_saved_merges_are_not_counted() -> None:
    front = Front(Answer(), max_tenant_merges=1)
    for number in range(3):
        adapters = [{"adapter_id": "french", "weight": number + 1}]
        front.post("/v1/adapters/merge", {"name": f"m{number}", "adapters": adapters})
        asked = {"inputs": "a", "parameters": {"adapter_id": f"m{number}"}}
        assert front.post("/generate", asked).status_code == 200
