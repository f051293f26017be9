"""Hands a finished adapter to a server: uploads it, or copies it into the folder it serves.

This module must not know training.
"""

import shutil
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx

from lory_trainer.destination import CONFIG_FILE, check_output
from lory_trainer.errors import OutputError, PublishError
from lory_trainer.export import MANIFEST_FILE, TENSORS_FILE
from lory_trainer.folders import draft_of, publish

TIMEOUT_S = 120.0
SENT_FILES = (CONFIG_FILE, TENSORS_FILE, MANIFEST_FILE)


def deliver(output: Path, name: str, *, target: str, api_key: str, replace: bool) -> str:
    """`target` is a server's URL or an adapters folder; returns what requests should name there."""
    if target.startswith(("http://", "https://")):
        return _upload(output, name, target.rstrip("/"), api_key)
    return _copy(output, name, Path(target), replace=replace)


def check_target(target: str, name: str, api_key: str) -> None:
    """Before a run that may take hours: raises PublishError if it could only fail."""
    if "://" not in target:
        if not Path(target).is_dir():
            raise PublishError(f"--publish: {target} is neither a URL nor an adapters folder")
        return
    parts = urlsplit(target)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PublishError(f"--publish: {parts.scheme}://{parts.hostname or ''} is no http URL")
    if "@" in parts.netloc:
        raise PublishError(
            "--publish: leave the key out of the URL, which is told; give it by --api-key or "
            "LORY_API_KEY"
        )
    url = target.rstrip("/")
    try:
        reply = httpx.put(
            _place(url, name),
            headers=_headers(api_key) | {"content-type": "multipart/form-data; boundary=none"},
            timeout=TIMEOUT_S,
        )
    except httpx.HTTPError as error:
        raise PublishError(f"--publish: no server answers at {url}: {error}") from error
    if reply.status_code in NEVER_TAKEN:
        raise PublishError(f"--publish: {_refusal(reply, url)}")


NEVER_TAKEN = (401, 403, 404, 405)
"""What an upload without files is answered where one with files is not taken either."""


def _place(url: str, name: str) -> str:
    return f"{url}/v1/adapters/{quote(name, safe='/')}/files"


def _headers(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _upload(output: Path, name: str, url: str, api_key: str) -> str:
    files = {file: (output / file).read_bytes() for file in SENT_FILES}
    try:
        reply = httpx.put(
            _place(url, name), files=files, headers=_headers(api_key), timeout=TIMEOUT_S
        )
    except httpx.HTTPError as error:
        raise PublishError(
            f"{output} is written, but {url} did not take it: {error}; send it again with the "
            "adapter routes"
        ) from error
    if not reply.is_success:
        raise PublishError(f"{output} is written, but {_refusal(reply, url)}")
    try:
        return f"{reply.json()['id']} at {url}"
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{output} is written, but {url} does not answer as Lory does; give --publish the URL"
            " of a Lory server"
        ) from error


def _refusal(reply: httpx.Response, url: str) -> str:
    if reply.status_code in (404, 405):
        return (
            f"{url} takes no uploads: start it with --adapter-uploads, or give --publish its "
            "adapters folder"
        )
    return f"{url} refused it: {_reason(reply)}"


def _reason(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{reply.status_code} {reply.text[:200]}"


def _copy(output: Path, name: str, folder: Path, *, replace: bool) -> str:
    place = folder / name
    if place.resolve() == output.resolve():
        return str(place)
    try:
        check_output(place, replace=replace)
    except OutputError as error:
        raise PublishError(f"{output} is written, but {error}") from error
    with draft_of(place) as draft:
        for path in output.iterdir():
            shutil.copyfile(path, draft / path.name)
        publish(draft, place)
    return str(place)
