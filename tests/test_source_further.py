"""What an adapter has beside configuration and weights comes along, from wherever it comes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lory_router.errors import AdapterFileTooLarge, AdapterInvalid, SourceUnavailable
from lory_router.sources import check
from lory_router.sources.service import Sources
from lory_router.sources.settings import S3Settings, SourceSettings
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME
from source_files import adapter_bytes, at, is_clean, kept, settings, with_sources
from source_servers import CONFIG, WEIGHTS, Hub, Reply, Repo, Seen, Server
from test_sources import files, refusal

ONE = adapter_bytes(200, fill=1)
MANIFEST = {MANIFEST_NAME: b'{"manifest_version": 1, "template": "{text} ->"}'}
TOKENIZER = {
    TOKENIZER_NAME: json.dumps({"model": {"vocab": {"a": 0}}}).encode(),
    "tokenizer_config.json": b'{"eos_token": "a"}',
    "chat_template.jinja": b"{{ messages }}",
}
ALL = {**ONE, **MANIFEST, **TOKENIZER}


class Place:
    """A source with one adapter."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.hub, self.server = Hub(), Server()

    @contextmanager
    def running(self) -> Iterator["Place"]:
        with self.hub.running(), self.server.running():
            yield self

    @property
    def name(self) -> str:
        web = f"{self.server.url}/models/a"
        return {"hub": "hub:org/a", "s3": "s3:models/a", "web": web}[self.kind]

    @property
    def asked(self) -> Server:
        return self.hub.front if self.kind == "hub" else self.server

    def put(self, found: dict[str, bytes]) -> None:
        """In place of what was there, under another commit of a hub."""
        repo = self.hub.repos.setdefault("org/a", Repo({}))
        repo.files, repo.commit = found, f"{len(repo.older) + 1:040x}"
        repo.older[repo.commit] = found
        self.server.files = at("/models/a", found)

    def settings(self, **changes: object) -> SourceSettings:
        hosts = (self.hub.cdn.url, self.server.url)
        chosen = settings(self.folder, hub=self.hub.url, hosts=hosts, recheck_s=0.0, **changes)
        store = S3Settings(endpoint=self.server.url, buckets=("models",))
        return replace(chosen, s3=store)

    def fetched(self) -> dict[str, bytes]:
        return with_sources(self.settings(), lambda sources: files(sources, self.name))

    def refusal(self) -> Exception:
        return with_sources(self.settings(), lambda s: refusal(files(s, self.name)))


@pytest.fixture(params=["hub", "s3", "web"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = Place(request.param, tmp_path / "cache")
    with place.running():
        yield place


@pytest.mark.parametrize("more", [{}, MANIFEST, TOKENIZER, MANIFEST | TOKENIZER])
def test_all_that_there_is_comes_and_what_is_not_is_no_error(
    place: Place, more: dict[str, bytes]
) -> None:
    place.put({**ONE, **more, "README.md": b"x"})
    assert place.fetched() == {**ONE, **more}
    assert not any(seen.path.endswith("README.md") for seen in place.asked.seen)


def test_what_stands_beside_a_tokenizer_counts_beside_one_alone(place: Place) -> None:
    lone = {name: body for name, body in TOKENIZER.items() if name in COMPANIONS}
    place.put({**ONE, **lone})
    assert place.fetched() == ONE
    assert not any(seen.path.endswith(COMPANIONS) for seen in place.asked.seen)


def test_a_change_of_any_file_is_another_revision(place: Place) -> None:
    place.put(ALL)
    assert place.fetched() == ALL
    for name in (MANIFEST_NAME, TOKENIZER_NAME, "chat_template.jinja"):
        changed = {**ALL, name: ALL[name] + b" "}
        place.put(changed)
        assert place.fetched() == changed
    place.put(ONE)
    assert place.fetched() == ONE
    assert len(kept(place.folder)) == 5


def test_a_file_that_breaks_off_breaks_the_adapter(place: Place) -> None:
    place.put(ALL)

    def cut(seen: Seen) -> Reply | None:
        is_asked = seen.method == "GET" and seen.path.endswith(TOKENIZER_NAME)
        return Reply(body=TOKENIZER[TOKENIZER_NAME], cut_after=5) if is_asked else None

    place.asked.rules.insert(0, cut)
    error = place.refusal()
    assert isinstance(error, SourceUnavailable)
    assert TOKENIZER_NAME in str(error)
    assert not kept(place.folder)
    assert is_clean(place.folder)


def test_a_source_that_cannot_say_whether_there_is_one_is_asked_again_later(place: Place) -> None:
    """Taken as absent, the adapter would be asked in another way until the next look."""
    place.put(ONE)
    broken = {MANIFEST_NAME: Reply(500)}
    place.asked.rules.insert(0, lambda seen: broken.get(seen.path.rpartition("/")[2]))
    assert isinstance(place.refusal(), SourceUnavailable)
    broken.clear()
    assert place.fetched() == ONE


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_of_what_is_not_there_a_store_may_say_that_it_is_refused(
    tmp_path: Path, status: int
) -> None:
    """S3 answers 403 to who may read objects and not list them."""
    place = Place("s3", tmp_path / "cache")
    with place.running():
        place.put(ONE)
        place.server.rules.append(
            lambda seen: None if seen.path.endswith((CONFIG, WEIGHTS)) else Reply(status)
        )
        assert place.fetched() == ONE


def test_a_mirror_need_not_say_what_is_not_there(tmp_path: Path) -> None:
    place = Place("hub", tmp_path / "cache")
    with place.running():
        place.put({**ONE, **MANIFEST})

        def nameless(seen: Seen) -> Reply | None:
            is_here = seen.path.endswith((CONFIG, WEIGHTS, MANIFEST_NAME))
            return None if is_here else Reply(404)

        place.hub.front.rules.insert(0, nameless)
        assert place.fetched() == {**ONE, **MANIFEST}


def test_a_file_that_only_some_may_read_is_not_taken_as_absent_by_a_hub(tmp_path: Path) -> None:
    place = Place("hub", tmp_path / "cache")
    with place.running():
        place.put(ALL)
        gated = Reply(403, {"x-error-code": "GatedRepo"})
        place.hub.front.rules.insert(
            0, lambda seen: gated if seen.path.endswith(MANIFEST_NAME) else None
        )
        assert isinstance(place.refusal(), SourceUnavailable)
        assert not kept(place.folder)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (MANIFEST_NAME, b'{"manifest_version": 1, "template": "{a.b}"}'),
        (TOKENIZER_NAME, b"<html></html>"),
        (TOKENIZER_NAME, b'{"model": '),
        ("tokenizer_config.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_file_that_is_none_refuses_the_adapter_by_name(
    place: Place, name: str, body: bytes
) -> None:
    place.put({**ALL, name: body})
    error = place.refusal()
    assert isinstance(error, AdapterInvalid)
    assert name in str(error)
    assert not kept(place.folder)


@pytest.mark.parametrize("name", [MANIFEST_NAME, TOKENIZER_NAME, "tokenizer_config.json"])
def test_every_file_has_its_own_bound(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def most_bytes(of: str, adapter_bytes: int) -> int:
        return len(ALL[name]) - 1 if of == name else adapter_bytes

    monkeypatch.setattr("lory_router.sources.fetching.most_bytes", most_bytes)
    place.put(ALL)
    error = place.refusal()
    assert isinstance(error, AdapterFileTooLarge)
    assert name in str(error)


def test_bounds_are_those_of_the_adapters_folder() -> None:
    names = (MANIFEST_NAME, TOKENIZER_NAME, *COMPANIONS)
    bounds = [check.most_bytes(name, 2**40) for name in names]
    assert bounds == [2**20, 2**26, 2**23, 2**23, 2**23]
    assert check.most_bytes(TOKENIZER_NAME, 1000) == 1000


def test_what_an_older_server_fetched_is_fetched_again_when_its_source_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder held configuration and weights alone, under the same commit for ever."""
    place = Place("hub", tmp_path / "cache")

    async def old(sources: Sources) -> None:
        monkeypatch.setattr("lory_router.sources.reference._ALL_FILES", "1")
        assert await files(sources, place.name) == ONE
        monkeypatch.undo()

    with place.running():
        place.put(ONE)
        with_sources(place.settings(), old)
        repo = place.hub.repos["org/a"]
        repo.older[repo.commit] = repo.files = ALL
        offline = place.settings(is_offline=True)
        assert with_sources(offline, lambda s: files(s, place.name)) == ONE
        assert place.fetched() == ALL
        assert with_sources(offline, lambda s: files(s, place.name)) == ALL
