"""A real server with keys: tenants share no cached prompt, and the file is read again at SIGHUP."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from clients.server_process import serving
from scripted_engine import wait_until

PROMPT = "a prompt that is long enough to fill more than one block of the cache, and more -> " * 2


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in ("acme", "beta")]))
    return path


@pytest.fixture(scope="module")
def url(keys: Path) -> Iterator[str]:
    flags = ("--api-keys", str(keys), "--api-key", "admin", "--price-per-hour", "1")
    with serving(keys.parent / "log", *flags) as url:
        yield url


def ask(url: str, who: str) -> httpx.Response:
    body: dict[str, Any] = {"model": "polite", "prompt": PROMPT, "max_tokens": 2}
    headers = {"authorization": f"Bearer {who}"}
    return httpx.post(
        f"{url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False
    )


def cached(url: str, who: str) -> int:
    usage = ask(url, who).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_a_prompt_is_cached_for_its_tenant_alone(url: str) -> None:
    assert cached(url, "acme") == 0
    assert cached(url, "acme") > 0
    assert cached(url, "beta") == 0
    assert cached(url, "beta") > 0
    headers = {"authorization": "Bearer admin"}
    text = httpx.get(f"{url}/metrics", headers=headers, trust_env=False).text
    for tenant in ("acme", "beta"):
        assert f'lory_tenant_requests_total{{tenant="{tenant}"}} 2.0' in text
        assert f'lory_tenant_cost_total{{tenant="{tenant}"}}' in text


def test_keys_are_read_again_at_a_signal(url: str, keys: Path) -> None:
    assert ask(url, "later").status_code == 401
    old = keys.read_text()
    pid = next(
        child.pid
        for child in psutil.Process().children()
        if f"--port {url.rpartition(':')[2]}" in " ".join(child.cmdline())
    )
    keys.write_text("[")
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: "stay as they were" in (keys.parent / "log").read_text())
    assert ask(url, "acme").status_code == 200
    keys.write_text(old.replace('"acme"', '"later"'))
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: ask(url, "later").status_code == 200)
    assert ask(url, "acme").status_code == 401
    keys.write_text(old)
