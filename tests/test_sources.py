"""Adapters from a hub and a store: who may read them, which revision, one download for all."""

import asyncio
import hashlib
import logging
import shutil
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lory_router.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ApiError,
    HostForbidden,
    SourceUnavailable,
    TimedOut,
)
from lory_router.sources import access
from lory_router.sources.hosts import HostList
from lory_router.sources.reference import Reference, read_reference
from lory_router.sources.s3 import NO_BODY_SHA256, authorization
from lory_router.sources.service import Sources
from lory_router.sources.settings import HubSettings, S3Settings, SourceSettings
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import TOKENIZER_NAME
from source_files import adapter_bytes, at, is_clean, kept, settings, with_sources
from source_servers import (
    CONFIG,
    WEIGHTS,
    Hub,
    Reply,
    Repo,
    Seen,
    Server,
    SignedStore,
    requests_by_path,
)

ONE, TWO = adapter_bytes(1000, fill=1), adapter_bytes(1000, fill=2)
NEW = "2" * 40


def ref(name: str) -> Reference:
    reference = read_reference(name)
    assert reference is not None
    return reference


async def files(sources: Sources, name: str, token: str = "") -> dict[str, bytes]:
    """What is served for `name` now."""
    async with sources.using(ref(name), token) as engine_name:
        return kept(sources.settings.folder)[engine_name.removeprefix("@")]


async def refusal(work: Awaitable[object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


class World:
    """A hub with two repos, and settings to fetch from it."""

    def __init__(self, tmp_path: Path) -> None:
        self.hub = Hub()
        self.hub.repos["org/open"] = Repo(ONE)
        self.hub.repos["org/secret"] = Repo(TWO, readers={"good"})
        self.hub.repos["org/gated"] = Repo(TWO, readers={"good"}, is_gated=True)
        self.folder = tmp_path / "cache"

    def settings(self, **changes: Any) -> SourceSettings:
        hosts = (self.hub.cdn.url,)
        return settings(self.folder, hub=self.hub.url, hosts=hosts, **changes)


@pytest.fixture
def world(tmp_path: Path):
    world = World(tmp_path)
    with world.hub.running():
        yield world


# -- the hub --------------------------------------------------------------------------------------


def test_an_adapter_of_a_hub_comes_with_its_weights_from_elsewhere(world: World):
    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        (entry,) = sources.listing()
        assert (entry.name, entry.revision, entry.is_public) == ("hub:org/open", "1" * 40, True)
        assert sources.name_of(entry.engine_name) == "hub:org/open"

    with_sources(world.settings(), work)
    assert world.hub.cdn.count("GET") == 1


def test_a_revision_is_a_branch_a_tag_or_a_commit(world: World):
    repo = world.hub.repos["org/open"]
    repo.older[NEW] = TWO
    repo.branches["refs/pr/1"] = NEW

    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        assert await files(sources, "hub:org/open@refs/pr/1") == TWO
        assert await files(sources, f"hub:org/open@{NEW}") == TWO
        assert await files(sources, "hub:org/open@main") == ONE

    with_sources(world.settings(), work)


def test_a_push_is_seen_when_the_recheck_is_due(world: World):
    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        repo = world.hub.repos["org/open"]
        repo.older["1" * 40], repo.files, repo.commit = ONE, TWO, NEW
        assert await files(sources, "hub:org/open") == ONE
        await asyncio.sleep(0.3)
        assert await files(sources, "hub:org/open") == TWO
        assert [e.is_latest for e in sources.listing() if e.revision == NEW] == [True]

    with_sources(world.settings(recheck_s=0.25), work)


@pytest.mark.parametrize("name", ["org/secret", "org/gated"])
def test_a_private_adapter_is_for_who_may_read_it_cached_or_not(world: World, name: str):
    async def work(sources: Sources) -> None:
        told = await refusal(files(sources, f"hub:{name}"))
        assert await files(sources, f"hub:{name}", "good") == TWO
        for token in ("", "bad", "goo"):
            again = await refusal(files(sources, f"hub:{name}", token))
            assert (type(again), again.message) == (AdapterNotFound, told.message)
        nowhere = await refusal(files(sources, "hub:org/nowhere", "good"))
        assert nowhere.message == told.message.replace(name, "org/nowhere")
        assert not any(entry.is_public for entry in sources.listing())

    with_sources(world.settings(), work)


def test_a_right_that_is_taken_away_ends_with_the_recheck(world: World):
    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/secret", "good") == TWO
        world.hub.repos["org/secret"].readers = set()
        assert await files(sources, "hub:org/secret", "good") == TWO
        await asyncio.sleep(0.3)
        assert isinstance(await refusal(files(sources, "hub:org/secret", "good")), AdapterNotFound)

    with_sources(world.settings(recheck_s=0.25), work)


def test_with_a_recheck_of_zero_every_request_asks(world: World):
    async def work(sources: Sources) -> None:
        for _ in range(3):
            await files(sources, "hub:org/secret", "good")
        world.hub.repos["org/secret"].readers = set()
        assert isinstance(await refusal(files(sources, "hub:org/secret", "good")), AdapterNotFound)

    with_sources(world.settings(recheck_s=0.0), work)
    assert world.hub.cdn.count("GET") == 1


def test_the_token_goes_to_the_hub_alone(world: World):
    with_sources(world.settings(), lambda sources: files(sources, "hub:org/secret", "good"))
    assert {seen.token for seen in world.hub.front.seen} == {"good"}
    assert {seen.token for seen in world.hub.cdn.seen} == {""}


def test_the_servers_own_token_is_for_who_brings_none(world: World):
    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/secret") == TWO
        assert isinstance(await refusal(files(sources, "hub:org/secret", "bad")), AdapterNotFound)

    chosen = world.settings()
    with_sources(replace(chosen, hub=replace(chosen.hub, token="good")), work)


def test_a_token_of_the_servers_that_has_expired_takes_away_nothing(
    world: World, caplog: pytest.LogCaptureFixture
):
    """A hub refuses it with all that it may read without; everything was a 404, and no line told
    why. A caller's own is the caller's to know."""
    unknown = {"x-error-message": "Invalid credentials in Authorization header"}

    async def fetch(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE

    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        error = await refusal(files(sources, "hub:org/gated"))
        assert isinstance(error, SourceUnavailable)
        assert "--hub-token" in error.message
        assert isinstance(await refusal(files(sources, "hub:org/open", "old")), AdapterNotFound)

    with_sources(world.settings(), fetch)
    world.hub.front.rules.insert(0, lambda seen: Reply(401, unknown) if seen.token else None)
    hub = HubSettings(world.hub.url, token="old", hosts=HostList((world.hub.cdn.url,)))
    with_sources(replace(world.settings(), hub=hub), work)
    assert "does not know --hub-token any more" in caplog.text


@pytest.mark.parametrize("name", ["hub:org/nowhere", "hub:org/open@gone", f"hub:org/open@{NEW}"])
def test_an_unknown_repo_or_revision_is_not_found(world: World, name: str):
    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, name))
        assert isinstance(error, AdapterNotFound)
        assert name in error.message

    with_sources(world.settings(), work)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_repo_that_is_no_adapter_says_so(world: World, missing: str):
    world.hub.repos["org/model"] = Repo({n: b for n, b in ONE.items() if n != missing})

    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "hub:org/model"))
        assert isinstance(error, AdapterInvalid)
        assert missing in error.message

    with_sources(world.settings(), work)


def test_weights_that_are_not_what_the_hub_tells_are_refused(world: World):
    digest = hashlib.sha256(ONE[WEIGHTS]).hexdigest()
    world.hub.cdn.files[f"/lfs/{digest}"] = TWO[WEIGHTS]

    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "hub:org/open"))
        assert isinstance(error, SourceUnavailable)
        assert digest in error.message

    with_sources(world.settings(), work)
    assert not kept(world.folder)


def test_the_hub_may_send_a_download_to_listed_hosts_only(world: World):
    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "hub:org/open"))
        assert isinstance(error, HostForbidden)
        assert "--hub-hosts" in error.message

    with_sources(settings(world.folder, hub=world.hub.url), work)
    assert not world.hub.cdn.seen


def test_a_repo_that_was_renamed_is_followed(world: World):
    def moved(seen: Seen) -> Reply | None:
        old, new = "/old/name/", "/org/secret/"
        there = seen.path.replace(old, new)
        return Reply(307, {"location": there}) if seen.path.startswith(old) else None

    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:old/name", "good") == TWO
        assert isinstance(await refusal(files(sources, "hub:old/name")), AdapterNotFound)

    world.hub.front.rules.insert(0, moved)
    with_sources(world.settings(), work)


def test_a_redirects_own_length_is_not_the_files(world: World):
    def plain(seen: Seen) -> Reply | None:
        if not seen.path.endswith(WEIGHTS):
            return None
        url = f"{world.hub.cdn.url}/plain"
        return Reply(302, {"location": url, "x-repo-commit": "1" * 40}, b"Found. Redirecting")

    world.hub.cdn.files["/plain"] = ONE[WEIGHTS]
    world.hub.front.rules.insert(0, plain)
    assert with_sources(world.settings(), lambda s: files(s, "hub:org/open")) == ONE


def test_what_is_no_hub_is_told_of(world: World):
    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "hub:org/open"))
        assert "no hub" in error.message

    world.hub.front.rules.insert(0, lambda seen: Reply(200))
    with_sources(world.settings(), work)


# -- down and offline -----------------------------------------------------------------------------


def test_while_the_hub_is_down_public_adapters_are_served_as_they_were(
    world: World, caplog: pytest.LogCaptureFixture
):
    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        assert await files(sources, "hub:org/secret", "good") == TWO
        world.hub.front.rules.insert(0, lambda seen: Reply(503))
        for _ in range(3):
            assert await files(sources, "hub:org/open") == ONE
        error = await refusal(files(sources, "hub:org/secret", "good"))
        assert (type(error), error.retry_after_s) == (SourceUnavailable, 5)

    with caplog.at_level(logging.WARNING):
        with_sources(world.settings(recheck_s=0.0), work)
    assert caplog.text.count("served as it was fetched before") == 1


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_a_hub_what_is_here_is_served_under_all_names_of_it(world: World, is_offline: bool):
    """By its branch, which may be told or not, and by the commit that it was fetched at."""
    world.hub.repos["org/open"].branches["v2"] = NEW
    world.hub.repos["org/open"].older[NEW] = TWO

    async def fetch(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        assert await files(sources, "hub:org/open@v2") == TWO

    async def work(sources: Sources) -> None:
        for name in ("hub:org/open@main", f"hub:org/open@{'1' * 40}", "hub:Org/Open"):
            assert await files(sources, name) == ONE
        assert await files(sources, f"hub:org/open@{NEW}") == TWO
        for name in ("hub:org/open@v3", f"hub:org/open@{'3' * 40}", "hub:org/opener"):
            assert isinstance(await refusal(files(sources, name)), SourceUnavailable)

    async def private(sources: Sources) -> None:
        latest = sources.latest(ref("hub:org/open"))
        assert latest is not None
        await sources.disk.set_public(latest.origin.scope, latest.origin.name, False)
        name = f"hub:org/open@{NEW}"
        assert isinstance(await refusal(files(sources, name)), SourceUnavailable)

    with_sources(world.settings(), fetch)
    world.hub.front.rules.insert(0, lambda seen: Reply(503))
    with_sources(world.settings(is_offline=is_offline), work)
    with_sources(world.settings(is_offline=is_offline), private)


def test_what_was_made_private_is_not_served_while_the_hub_is_down(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(access, "REFUSAL_S", 0.0)

    async def work(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        world.hub.repos["org/open"].readers = {"good"}
        assert isinstance(await refusal(files(sources, "hub:org/open")), AdapterNotFound)
        world.hub.front.rules.insert(0, lambda seen: Reply(503))
        assert isinstance(await refusal(files(sources, "hub:org/open")), SourceUnavailable)

    with_sources(world.settings(recheck_s=0.0), work)


def test_offline_nothing_is_asked_and_what_is_public_is_served(world: World):
    async def online(sources: Sources) -> None:
        await files(sources, "hub:org/open")
        await files(sources, "hub:org/secret", "good")

    async def offline(sources: Sources) -> None:
        assert await files(sources, "hub:org/open") == ONE
        for name, token in (("secret", "good"), ("other", "")):
            error = await refusal(files(sources, f"hub:org/{name}", token))
            assert "offline" in error.message

    with_sources(world.settings(), online)
    world.hub.front.seen.clear()
    with_sources(world.settings(is_offline=True), offline)
    assert not world.hub.front.seen


def test_a_restarted_server_fetches_nothing_again(world: World):
    for _ in range(2):
        assert with_sources(world.settings(), lambda s: files(s, "hub:org/open")) == ONE
    assert world.hub.cdn.count("GET") == 1


def test_what_somebody_deleted_by_hand_is_fetched_again(world: World):
    async def work(sources: Sources) -> None:
        await files(sources, "hub:org/open")
        (folder,) = (world.folder / "held").iterdir()
        shutil.rmtree(folder)
        assert await files(sources, "hub:org/open") == ONE
        assert sources.disk.num_bytes == sum(map(len, ONE.values()))

    with_sources(world.settings(), work)


# -- many at once ---------------------------------------------------------------------------------


def test_two_hundred_first_requests_make_one_download(world: World):
    async def work(sources: Sources) -> None:
        names = await asyncio.gather(*(sources.acquire(ref("hub:org/open")) for _ in range(200)))
        assert len(set(names)) == 1
        assert sources.counts.fetched == 1

    with_sources(world.settings(), work)
    counts = requests_by_path(world.hub.front)
    assert counts == {
        ("HEAD", CONFIG): 2,
        ("HEAD", WEIGHTS): 1,
        ("HEAD", MANIFEST_NAME): 1,
        ("HEAD", TOKENIZER_NAME): 1,
        ("GET", CONFIG): 1,
        ("GET", WEIGHTS): 1,
    }
    assert world.hub.cdn.count("GET") == 1


def test_who_leaves_takes_only_itself_away(world: World):
    def slow(seen: Seen) -> Reply | None:
        digest = seen.path.rpartition("/")[2]
        reply = Reply(200, {}, world.hub.cdn.files[f"/lfs/{digest}"])
        reply.delay_s = 0.2
        return reply

    async def work(sources: Sources) -> None:
        tasks = [asyncio.ensure_future(files(sources, "hub:org/open")) for _ in range(5)]
        while not sources.downloads():
            await asyncio.sleep(0.005)
        tasks[0].cancel()
        tasks[1].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[2:] == [ONE] * 3
        assert all(isinstance(one, asyncio.CancelledError) for one in done[:2])

    world.hub.cdn.rules.append(slow)
    with_sources(world.settings(), work)
    assert world.hub.cdn.count("GET") == 1


def test_a_download_that_everybody_left_is_there_for_the_next(world: World):
    def slow(seen: Seen) -> Reply | None:
        return Reply(200, {}, world.hub.cdn.files[seen.path], delay_s=0.1)

    async def work(sources: Sources) -> None:
        task = asyncio.ensure_future(files(sources, "hub:org/open"))
        while not sources.downloads():
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await files(sources, "hub:org/open") == ONE

    world.hub.cdn.rules.append(slow)
    with_sources(world.settings(), work)
    assert world.hub.cdn.count("GET") == 1


def test_a_wait_has_an_end_and_the_download_goes_on(world: World):
    def slow(seen: Seen) -> Reply | None:
        return Reply(200, {}, world.hub.cdn.files[seen.path], delay_s=0.4)

    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "hub:org/open"))
        assert isinstance(error, TimedOut)
        await asyncio.sleep(0.4)
        assert await files(sources, "hub:org/open") == ONE

    world.hub.cdn.rules.append(slow)
    with_sources(world.settings(wait_timeout_s=0.3), work)
    assert world.hub.cdn.count("GET") == 1


def test_progress_is_to_be_seen(world: World):
    def stalls(seen: Seen) -> Reply | None:
        body = world.hub.cdn.files[seen.path]
        return Reply(200, {}, body, stalls_after=500)

    async def work(sources: Sources) -> None:
        task = asyncio.ensure_future(files(sources, "hub:org/open"))
        while not any(d.num_bytes > len(ONE[CONFIG]) for d in sources.downloads()):
            await asyncio.sleep(0.005)
        (seen,) = sources.downloads()
        assert seen.reference == ref("hub:org/open")
        assert seen.num_bytes == len(ONE[CONFIG]) + 500
        assert seen.total_bytes == sum(map(len, ONE.values()))
        assert sources.disk.num_bytes == seen.total_bytes
        task.cancel()

    world.hub.cdn.rules.append(stalls)
    with_sources(world.settings(stall_s=5.0), work)


def test_a_slow_source_delays_no_other_and_takes_no_more_than_its_share(world: World):
    with Server(at("/a", TWO)).running() as good, Server(at("/a", ONE)).running() as bad:
        bad.rules.append(lambda seen: Reply(200, {"etag": '"1"'}, b"{}", delay_s=5))
        chosen = settings(
            world.folder, hub=world.hub.url, hosts=(good.url, bad.url, world.hub.cdn.url),
            stall_s=1.0, max_waiting=4,
        )  # fmt: skip

        async def work(sources: Sources) -> None:
            stuck = [asyncio.ensure_future(files(sources, f"{bad.url}/{i}")) for i in range(4)]
            await asyncio.sleep(0.1)
            error = await refusal(files(sources, f"{bad.url}/9"))
            assert "wait for adapters" in error.message
            started = time.monotonic()
            assert await files(sources, f"{good.url}/a") == TWO
            assert await files(sources, "hub:org/open") == ONE
            assert time.monotonic() - started < 0.8
            for task in stuck:
                task.cancel()

        with_sources(chosen, work)


def test_downloads_from_one_source_are_bounded(world: World):
    running, most = 0, 0
    for number in range(6):
        world.hub.repos[f"org/n{number}"] = Repo(adapter_bytes(1000, fill=number))

    def slow(seen: Seen) -> Reply | None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return None

    async def work(sources: Sources) -> None:
        await asyncio.gather(*(files(sources, f"hub:org/n{i}") for i in range(6)))

    world.hub.cdn.rules.append(slow)
    with_sources(world.settings(max_downloads=2), work)
    assert most == 2


def test_a_failure_is_the_answer_for_a_moment(world: World):
    world.hub.cdn.rules.append(lambda seen: Reply(200, {}, TWO[WEIGHTS]))

    async def work(sources: Sources) -> None:
        first = await refusal(files(sources, "hub:org/open"))
        asked = len(world.hub.cdn.seen)
        again = await refusal(files(sources, "hub:org/open"))
        assert (type(again), again.message) == (type(first), first.message)
        assert again is not first
        assert len(world.hub.cdn.seen) == asked

    with_sources(world.settings(), work)


def test_what_is_offered_and_then_refused_is_given_up(world: World):
    world.hub.cdn.rules.append(lambda seen: Reply(403))

    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "hub:org/open"))
        assert (type(error), "refused after all" in error.message) == (SourceUnavailable, True)

    with_sources(world.settings(), work)


def test_who_loses_the_right_while_fetching_does_not_take_it_from_who_waits(world: World):
    repo = world.hub.repos["org/secret"]
    repo.readers = {"first", "second"}

    def take_away(seen: Seen) -> Reply | None:
        if seen.method == "GET" and seen.token == "first":
            repo.readers = {"second"}
            time.sleep(0.1)
        return None

    async def work(sources: Sources) -> None:
        first = asyncio.ensure_future(files(sources, "hub:org/secret", "first"))
        while not sources.downloads():
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(files(sources, "hub:org/secret", "second"))
        assert isinstance(await refusal(first), AdapterNotFound)
        assert await second == TWO

    world.hub.front.rules.insert(0, take_away)
    with_sources(world.settings(), work)


def test_an_adapter_in_use_stays_while_others_come(world: World):
    size = sum(map(len, ONE.values()))

    async def work(sources: Sources) -> None:
        async with sources.using(ref("hub:org/open")) as name:
            assert await files(sources, "hub:org/secret", "good") == TWO
            world.hub.repos["org/other"] = Repo(adapter_bytes(1000, fill=3))
            await files(sources, "hub:org/other")
            assert name.removeprefix("@") in kept(world.folder)
            assert len(kept(world.folder)) == 2

    with_sources(world.settings(budget_bytes=2 * size + 10), work)
    assert is_clean(world.folder)


# -- S3 -------------------------------------------------------------------------------------------

KEYS = S3Settings(access_key_id="AKID", secret_access_key="s3cret", buckets=("models/team", "open"))


def test_requests_are_signed_as_aws_documents_it():
    """The example "GET Object" of Amazon's documentation of Signature Version 4."""
    keys = S3Settings(
        access_key_id="AKIAIOSFODNN7EXAMPLE",
        secret_access_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    )
    headers = {
        "host": "examplebucket.s3.amazonaws.com",
        "range": "bytes=0-9",
        "x-amz-content-sha256": NO_BODY_SHA256,
        "x-amz-date": "20130524T000000Z",
    }
    signed = authorization(keys, "GET", "/test.txt", headers)
    expected = "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    assert signed.endswith(f"Signature={expected}")
    assert "Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request" in signed


def s3_settings(tmp_path: Path, store: Server, **changes: Any) -> SourceSettings:
    keys = replace(KEYS, endpoint=store.url, **changes)
    return settings(tmp_path / "cache", s3=keys)


def test_an_adapter_of_a_store_comes_and_is_fetched_anew_when_it_changed(tmp_path: Path):
    store = SignedStore(KEYS, at("/models/team/a=1", ONE))

    async def work(sources: Sources) -> None:
        assert await files(sources, "s3:models/team/a=1") == ONE
        store.files |= at("/models/team/a=1", TWO)
        assert await files(sources, "s3://models/team/a=1") == TWO

    with store.running():
        chosen = replace(s3_settings(tmp_path, store), recheck_s=0.0)
        with_sources(chosen, work)


def test_a_wrong_key_gets_nothing(tmp_path: Path):
    async def work(sources: Sources) -> None:
        assert isinstance(await refusal(files(sources, "s3:models/team/a")), AdapterNotFound)

    with SignedStore(KEYS, at("/models/team/a", ONE)).running() as store:
        with_sources(s3_settings(tmp_path, store, secret_access_key="other"), work)


@pytest.mark.parametrize("status", [301, 307, 400, 403])
def test_a_bucket_in_another_region_is_told_with_its_region(tmp_path: Path, status: int):
    """AWS answers a HEAD without a body or a Location. It was said to redirect in circles."""
    elsewhere = "http://models.s3.eu-west-3.amazonaws.com/x"
    more = {"location": elsewhere} if status == 307 else {}

    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, "s3:models/team/a"))
        assert isinstance(error, SourceUnavailable)
        assert "eu-west-3; set --s3-region" in error.message

    with SignedStore(KEYS, {}).running() as store:
        told = {"x-amz-bucket-region": "eu-west-3", **more}
        store.rules.insert(0, lambda seen: Reply(status, told))
        with_sources(s3_settings(tmp_path, store), work)


@pytest.mark.parametrize("name", ["s3:models/other/a", "s3:models/teams/a", "s3:private/a"])
def test_callers_name_listed_buckets_only(tmp_path: Path, name: str):
    async def work(sources: Sources) -> None:
        error = await refusal(files(sources, name))
        assert isinstance(error, HostForbidden)
        assert "--s3-buckets" in error.message

    with SignedStore(KEYS, {}).running() as store:
        with_sources(s3_settings(tmp_path, store), work)
    assert not store.seen
