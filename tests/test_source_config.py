"""The flags of sources: each arrives where it is used, each wrong one is refused by its name."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lory_router.config import ConfigError, ServeConfig, StartError
from lory_router.serve import _load_text, _open_sources
from lory_router.source_config import SourceConfig
from lory_router.sources.disk import DiskCache
from lory_router.sources.settings import HELD, S3Settings


def config(tmp_path: Path, **flags: Any) -> ServeConfig:
    return ServeConfig.from_flags(
        {"model": "org/base", "adapter_cache": str(tmp_path / "c")} | flags
    )


def test_without_a_cache_there_are_no_sources():
    bare = ServeConfig.from_flags({"model": "org/base"})
    assert bare.source_settings is None
    assert bare.router_settings().adapter_sources == frozenset()
    assert bare.engine_options().fetched_dir == ""


def test_with_a_cache_there_is_the_hub_and_others_when_listed(tmp_path: Path):
    def kinds(**flags: Any) -> set[str]:
        return set(config(tmp_path, **flags).router_settings().adapter_sources)

    assert kinds() == {"hub"}
    assert kinds(s3_buckets="b") == {"hub", "s3"}
    assert kinds(adapter_hosts="h") == {"hub", "web"}
    assert kinds(adapter_uploads=True) == {"hub", "upload"}


def test_the_engine_reads_where_the_cache_keeps(tmp_path: Path):
    chosen = config(tmp_path)
    assert chosen.router_settings().trusted_templates == {"s3", "web"}
    trusting = config(tmp_path, trust_templates="upload,hub")
    assert trusting.router_settings().trusted_templates == {"s3", "web", "hub", "upload"}
    DiskCache(tmp_path / "c", 1).close()
    assert Path(chosen.engine_options().fetched_dir) == tmp_path / "c" / HELD
    assert (tmp_path / "c" / HELD).is_dir()


def test_every_flag_arrives(tmp_path: Path):
    flags = {
        "adapter_cache_size": 5, "max_adapter_size": 4, "adapter_hosts": "a,b",
        "adapter_uploads": True, "adapter_offline": True, "adapter_recheck": 3.0,
        "source_timeout": 2.0, "download_timeout": 1.0, "hub_endpoint": "http://h",
        "hub_token": "t", "hub_hosts": "x", "s3_buckets": "p,q", "s3_endpoint": "http://s",
        "s3_region": "r", "s3_access_key_id": "k", "s3_secret_access_key": "s",
        "s3_session_token": "n", "tenant_uploads_size": 2,
        "trust_templates": "hub",
    }  # fmt: skip
    assert set(flags) | {"adapter_cache"} == {field.name for field in fields(SourceConfig)}
    flags["request_timeout"], flags["max_queued"] = 9.0, 40
    told = config(tmp_path, **flags).source_settings
    assert told is not None
    assert (told.budget_bytes, told.max_adapter_bytes, told.recheck_s) == (5, 4, 3.0)
    assert told.tenant_bytes == 2
    assert (told.stall_s, told.download_timeout_s, told.wait_timeout_s) == (2.0, 1.0, 9.0)
    assert (told.max_waiting, told.is_offline, told.allows_upload) == (10, True, True)
    assert told.web_hosts.entry_for("https://b/x") == "b"
    assert told.hub.hosts.entry_for("https://x/") == "x"
    assert (told.hub.endpoint, told.hub.token) == ("http://h", "t")
    assert told.s3 == S3Settings("http://s", "r", "k", "s", "n", ("p", "q"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"adapter_hosts": "a b"}, "--adapter-hosts: 'a b' is not HOST"),
        ({"hub_hosts": "ftp://x"}, "--hub-hosts: 'ftp://x' is not HOST"),
        ({"hub_endpoint": "huggingface.co"}, "--hub-endpoint: 'huggingface.co' is not a URL"),
        ({"s3_endpoint": "http://u:p@h"}, "--s3-endpoint: "),
        ({"s3_access_key_id": "k"}, "--s3-access-key-id: needs --s3-secret-access-key"),
        ({"trust_templates": "hub,s3"}, "--trust-templates: 's3' is none of hub, upload"),
        ({"adapter_cache_size": 0}, "--adapter-cache-size: must be more than 0"),
        ({"source_timeout": 0.0}, "--source-timeout: must be more than 0"),
        ({"adapter_recheck": -1.0}, "--adapter-recheck: -1.0 is too small"),
        ({"adapter_cache": "", "hub_token": "t"}, "--hub-token: needs --adapter-cache FOLDER"),
        ({"adapter_cache": "", "adapter_uploads": True}, "--adapter-uploads: needs"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(tmp_path: Path, flags: Any, message: str):
    with pytest.raises(ConfigError) as told:
        config(tmp_path, **flags)
    assert str(told.value).startswith(message)


@pytest.mark.parametrize(("cache", "adapters"), [("a", "a"), ("a/c", "a"), ("a", "a/b")])
def test_the_cache_is_not_the_local_folder(tmp_path: Path, cache: str, adapters: str):
    (tmp_path / adapters).mkdir(parents=True)
    with pytest.raises(ConfigError, match="--adapter-cache: must not lie in --adapters"):
        config(tmp_path, adapter_cache=str(tmp_path / cache), adapters=str(tmp_path / adapters))


def test_secrets_are_not_shown_and_do_not_reach_the_engine(tmp_path: Path):
    keys = {"s3_access_key_id": "id", "s3_secret_access_key": "canary", "hub_token": "canary"}
    chosen = config(tmp_path, s3_session_token="canary", **keys)
    assert "canary" not in repr(chosen)
    assert "canary" not in repr(chosen.source_settings)
    assert b"canary" not in msgspec.msgpack.encode(chosen.engine_options())


def test_a_folder_that_cannot_be_used_ends_the_start(tmp_path: Path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").touch()
    with pytest.raises(StartError, match=r"--adapter-cache: .* holds other files"):
        _open_sources(config(tmp_path))


def test_a_base_that_is_nowhere_is_told_apart_from_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def nothing(model: str) -> None:
        raise OSError(f"{model}: nothing there")

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("lory_router.serve.load_text_model", nothing)
    with pytest.raises(StartError, match="mine: its tokenizer cannot be read"):
        _load_text(config(tmp_path, model=str(tmp_path / "mine")))
    with pytest.raises(StartError, match="org/base: there is no such folder, and as a model of"):
        _load_text(config(tmp_path))
