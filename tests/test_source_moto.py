"""The S3 source against moto's server, over HTTP. moto has an environment of its own."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clients import environments
from lory_router.errors import AdapterNotFound
from lory_router.sources.reference import Reference
from lory_router.sources.service import Sources
from lory_router.sources.settings import S3Settings, SourceSettings
from source_files import adapter_bytes, kept, settings, with_sources
from source_servers import WEIGHTS

FILES = adapter_bytes(1_400_000)
"""More than one part of five megabytes."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a store that holds FILES."""
    folder = tmp_path_factory.mktemp("objects")
    for name, body in FILES.items():
        (folder / name).write_bytes(body)
    script = str(environments.HERE / "moto_script.py")
    command = [str(environments.python_of("moto")), "-I", script, str(folder)]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        assert process.wait(30) == 0


def s3(store: str, folder: Path) -> SourceSettings:
    keys = S3Settings(store, "us-east-1", "key", "secret", buckets=("models",))
    return replace(settings(folder, s3=keys), stall_s=10.0)


@pytest.mark.parametrize("prefix", ["whole", "parts"])
def test_an_adapter_comes_from_an_s3_store(store: str, tmp_path: Path, prefix: str):
    reference = Reference("s3", f"models/{prefix}")

    async def work(sources: Sources) -> None:
        source = sources._sources["s3"]
        revision = await source.look_up(reference, "")
        files = {file.name: file for file in await source.files(reference, revision, "")}
        told = hashlib.sha256(FILES[WEIGHTS]).hexdigest() if prefix == "whole" else ""
        assert files[WEIGHTS].sha256 == told
        assert files[WEIGHTS].num_bytes == len(FILES[WEIGHTS])
        ask = replace(files[WEIGHTS].ask, headers=files[WEIGHTS].conditions(1000))
        async with source.client.get(ask) as response:
            assert response.status_code == 206
            assert await response.aread() == FILES[WEIGHTS][1000:]
        await sources.acquire(reference)

    with_sources(s3(store, tmp_path / "c"), work)
    assert list(kept(tmp_path / "c").values()) == [FILES]


@pytest.mark.parametrize("place", ["models/nothing", "models/whole/deeper"])
def test_what_is_not_in_the_store_is_not_found(store: str, tmp_path: Path, place: str):
    async def work(sources: Sources) -> None:
        with pytest.raises(AdapterNotFound):
            await sources.acquire(Reference("s3", place))

    with_sources(s3(store, tmp_path / "c"), work)
