"""Who may come in: keys of flags and files, what they make of a caller, and that none is shown."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lory_router.errors import Unauthorized
from lory_router.gate import authorise
from lory_router.keys import ADMIN, ANYBODY, Caller, Keyring, KeysError
from scripted_engine import Front

SECRET = "sk-canary-31415926"
ACME = Caller("acme", is_admin=False)


def write(path: Path, *entries: Any) -> str:
    path.write_text(json.dumps(entries))
    return str(path)


def keyring(tmp_path: Path, *entries: Any) -> Keyring:
    return Keyring(path=write(tmp_path / "keys.yaml", *entries))


def test_a_key_stands_for_its_tenant_and_role(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"other").hexdigest()
    entries = (
        {"key": SECRET, "tenant": "acme"},
        {"sha256": digest, "tenant": "beta", "role": "admin"},
    )
    keys = Keyring(("flag",), write(tmp_path / "keys", *entries))
    assert keys.caller(SECRET.encode()) == ACME
    assert keys.caller(b"other") == Caller("beta", is_admin=True)
    assert keys.caller(b"flag") == ADMIN
    for wrong in (b"", b"sk", SECRET.encode() + b" ", digest.encode()):
        assert keys.caller(wrong) is None


def test_the_file_may_be_yaml(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("# ours\n- key: abc\n  tenant: acme\n  role: user\n")
    assert Keyring(path=str(path)).caller(b"abc") == ACME


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"key": SECRET}, "tenant"),
        ({"tenant": "acme"}, "`key` or `sha256`"),
        ({"key": SECRET, "sha256": "0" * 64, "tenant": "acme"}, "one of them"),
        ({"key": SECRET, "tenant": "a b"}, "`tenant` must be"),
        ({"key": SECRET, "tenant": "acme", "role": SECRET}, "`role` must be admin or user"),
        ({"key": SECRET, "tenant": "acme", "rule": "x"}, "rule"),
        ({"key": "", "tenant": "acme"}, "`key` is empty"),
        ({"key": f"{SECRET}\n", "tenant": "acme"}, "`key`"),
        ({"key": 31415926, "tenant": "acme"}, "key"),
        ({"sha256": SECRET, "tenant": "acme"}, "`sha256`"),
        ({"sha256": hashlib.sha256(b"").hexdigest(), "tenant": "acme"}, "`sha256`"),
        (SECRET, "object"),
    ],
)
def test_a_wrong_entry_is_named_by_its_number_and_not_shown(
    tmp_path: Path, entry: Any, says: str
) -> None:
    good = {"key": "abc", "tenant": "acme"}
    with pytest.raises(KeysError, match="entry 2") as refused:
        keyring(tmp_path, good, entry)
    assert says in str(refused.value)
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", f"key: {SECRET}", f"- [{SECRET}", f"- {SECRET}: : x"])
def test_a_file_that_is_no_list_of_keys_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeysError, match=str(path)) as refused:
        Keyring(path=str(path))
    assert "canary" not in str(refused.value)


def test_a_file_that_is_not_there_and_a_key_that_is_there_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read"):
        Keyring(path=str(tmp_path / "none"))
    entry = {"key": "abc", "tenant": "acme"}
    with pytest.raises(KeysError, match="key 2 is there twice"):
        keyring(tmp_path, entry, entry)
    with pytest.raises(KeysError, match="twice"):
        Keyring(("abc",), write(tmp_path / "keys", entry))


def test_a_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = Keyring(path=write(path, {"key": "old", "tenant": "acme"}))
    write(path, {"key": "new", "tenant": "acme"}, {"key": "more", "tenant": "beta"})
    assert keys.reload() == 2
    assert keys.caller(b"old") is None
    assert keys.caller(b"new") == ACME
    path.write_text("[")
    with pytest.raises(KeysError):
        keys.reload()
    assert keys.caller(b"new") == ACME


def test_a_ring_does_not_hold_its_keys(tmp_path: Path) -> None:
    keys = Keyring((SECRET,), write(tmp_path / "keys", {"key": SECRET + "2", "tenant": "acme"}))
    assert "canary" not in repr(vars(keys))


def scope(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "path": path, "headers": list(headers)}


def test_without_a_key_only_probes_come_in_and_as_nobody(tmp_path: Path) -> None:
    keys = keyring(tmp_path, {"key": "abc", "tenant": "acme"})
    given = (b"authorization", b"Bearer abc")
    assert authorise(scope("/v1/models", given), keys) == ACME
    assert authorise(scope("/health"), keys) == Caller()
    for headers in ((), (given, given), ((b"authorization", b"Basic abc"),)):
        with pytest.raises(Unauthorized):
            authorise(scope("/metrics", *headers), keys)
    assert authorise(scope("/metrics"), Keyring()) == ANYBODY


def test_a_callers_tenant_reaches_the_engine_and_the_figures(tmp_path: Path) -> None:
    keys = keyring(tmp_path, {"key": "a", "tenant": "acme"}, {"key": "b", "tenant": "beta"})
    front = Front(keys=keys)
    for key, tenant in (("a", "acme"), ("b", "beta")):
        headers = {"authorization": f"Bearer {key}"}
        for path, body in (
            ("/generate", {"inputs": "a"}),
            ("/generate_stream", {"inputs": "a"}),
            ("/v1/completions", {"model": "french", "prompt": "a"}),
            ("/v1/completions", {"model": "french", "prompt": "a", "stream": True}),
        ):
            assert front.post(path, body, headers=headers).status_code == 200
            assert front.engine.last.caller.tenant == tenant
            assert front.ledger.records[-1].tenant == tenant
    Front().post("/generate", {"inputs": "a"})
    assert front.post("/generate", {"inputs": "a"}).status_code == 401


def test_figures_of_all_tenants_are_for_admins(tmp_path: Path) -> None:
    keys = Keyring(("admin",), write(tmp_path / "keys", {"key": "a", "tenant": "acme"}))
    front = Front(keys=keys)
    refused = front.get("/metrics", headers={"authorization": "Bearer a"})
    assert (refused.status_code, refused.json()["error_type"]) == (403, "forbidden")
    assert front.get("/metrics", headers={"authorization": "Bearer admin"}).status_code == 200
    assert front.get("/info", headers={"authorization": "Bearer a"}).status_code == 200


def test_keys_stand_in_no_log_and_no_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    front = Front(keys=keyring(tmp_path, {"key": "abc", "tenant": "acme"}))
    for path in ("/v1/adapters", "/generate", "/nothing", "/metrics"):
        reply = front.get(path, headers={"authorization": f"Bearer {SECRET}"})
        assert reply.status_code == 401
        assert "canary" not in reply.text
    assert "canary" not in caplog.text
