"""What is not there is refused with the nearest name that the caller may see."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lory_router.engine import Unavailable
from lory_router.keys import Keyring
from lory_router.nearest import MAX_COMPARED, nearest
from lory_router.registry import Registry
from scripted_engine import BASE, Front, ScriptedEngine

# -- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("suport-desk", "support-desk"),
        ("Support-Desk", "support-desk"),
        ("support-desk-v2-french", "support-desk-v2"),
        ("ft-shout-6f1c9a", "ft-shout-6f1c9a0b2d3e"),
        ("nothing-like-it", ""),
        ("", ""),
        ("s" * 1000, ""),
    ],
)
def test_the_nearest_name_is_the_one_that_is_like_enough(name: str, expected: str):
    assert nearest(name, ("support-desk", "support-desk-v2", "ft-shout-6f1c9a0b2d3e")) == expected


def test_a_beginning_of_two_names_means_neither():
    assert nearest("ft-shout-6f1", ("ft-shout-6f1c9a0b2d3e", "ft-shout-6f1d9a0b2d3e")) == ""


def test_only_so_many_names_are_compared():
    names = [*(f"{n:08}" for n in range(MAX_COMPARED)), "support"]
    assert nearest("suport", names) == ""
    assert nearest("suport", names[1:]) == "support"


def test_among_thousands_that_are_alike_it_is_found_soon():
    """A 404 must not be dear: letter by letter this took a second."""
    names = [f"customer-support-desk-number-{n}" for n in range(MAX_COMPARED)]
    start = time.process_time()
    assert nearest("customer-suport-desk-number-1234", names) == "customer-support-desk-number-1234"
    assert time.process_time() - start < 0.25


# -- adapters -------------------------------------------------------------------------------

ASKED: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
    ("POST", "/generate", {"inputs": "a", "parameters": {"adapter_id": "frensh"}}),
    ("POST", "/v1/completions", {"model": "frensh", "prompt": "a"}),
    ("POST", "/v1/completions", {"model": f"{BASE}:frensh", "prompt": "a"}),
    ("GET", "/v1/models/frensh", None),
    ("GET", "/v1/adapters/frensh", None),
    ("DELETE", "/v1/adapters/frensh", None),
    ("POST", "/v1/adapters/frensh/pin", {}),
)


@pytest.mark.parametrize(("method", "path", "body"), ASKED)
def test_an_adapter_that_is_not_there_has_its_neighbour_named(
    method: str, path: str, body: dict[str, Any] | None
):
    reply = Front().ask(method, path, json=body)
    assert reply.status_code == 404
    error = reply.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert "did you mean 'french'? GET /v1/models lists what is served" in message


def test_without_a_list_there_is_no_hint():
    front = Front(engine=ScriptedEngine(down=Unavailable("loading", "it loads")))
    error = front.get(f"/v1/adapters/{'x' * 3000}").json()["error"]
    assert error["message"].startswith("No adapter named 'xxx")
    assert "did you mean" not in error["message"]


def test_what_is_anothers_is_never_what_was_meant(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in ("acme", "beta")]))
    front = Front(
        engine=ScriptedEngine(adapters=("acme/support-desk", "french")),
        registry=Registry(str(tmp_path / "registry")),
        keys=Keyring(("admin",), str(path)),
    )

    def message(key: str, name: str) -> str:
        body = {"model": name, "prompt": "a"}
        reply = front.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 404
        return reply.json()["error"]["message"]

    owned = {"name": "acme/support-desk", "owner": "acme"}
    headers = {"authorization": "Bearer admin"}
    assert front.post("/v1/adapters", owned, headers=headers).status_code == 201
    hint = "did you mean 'acme/support-desk'?"
    for wrong in ("acme/suport-desk", "acme/support-des"):
        assert hint in message("acme", wrong)
        assert hint in message("admin", wrong)
        assert "did you mean" not in message("beta", wrong)
    real, none = message("beta", "acme/support-desk"), message("beta", "acme/support-disk")
    assert real.replace("desk", "disk") == none
    front.registry.close()


# -- paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/generate/", "/generate"),
        ("/v1/model", "/v1/models"),
        ("/v1/adapter/french/pin", "/v1/adapters/french/pin"),
        ("/helth", "/health"),
    ],
)
def test_an_unknown_path_has_its_neighbour_named(path: str, meant: str):
    reply = Front().post(path, {})
    assert reply.status_code == 404
    assert f"No such path: '{path}'; did you mean '{meant}'?" in reply.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/docs", "/v1/upload"])
def test_a_path_like_no_other_leads_nowhere(path: str):
    assert "did you mean" not in Front().get(path).text


@pytest.mark.parametrize("path", ["/v1/files", "/v1/fine_tuning/jobs/ftjob-1/events"])
def test_a_server_without_fine_tuning_says_how_to_have_it(path: str):
    reply = Front().get(path)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (404, "not_served")
    assert "--fine-tuning FOLDER" in error["message"]
