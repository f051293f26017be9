"""Is what arrives an adapter's file? Judged by its first bytes, before the rest is fetched.

The weights' header is judged by the engine's own rules as soon as it is there, all of it once more
when the file is whole. It must not know networks or where the file will lie.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lory_server.adapters.config import CONFIG_NAME, MAX_CONFIG_BYTES
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import (
    MAX_HEADER_BYTES,
    WEIGHTS_NAME,
    read_exactly,
    read_header,
    read_header_bytes,
)
from lory_server.adapters.manner import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manner
from lory_server.adapters.strict_json import parse_object
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME, most_file_bytes
from lory_server.adapters.tokenizer_files import check_file as check_tokenizer_file

_LENGTH_BYTES = 8
CONFIG_KEY = "adapter_config"
MANIFEST_KEY = "adapter_manifest"


@dataclass(frozen=True, slots=True)
class FileCheck:
    """Both raise AdapterInvalidError, and read from the file itself."""

    beginning: Callable[[int, int, int | None], bool]
    """Of an open file, its bytes so far and in the end, if known: whether they were judged; False
    asks again with more."""
    whole: Callable[[int, int], None]
    """Of an open file and its bytes."""


def _begins_as_weights(fd: int, num_bytes: int, total_bytes: int | None) -> bool:
    if num_bytes < _LENGTH_BYTES:
        return False
    size = int.from_bytes(read_exactly(fd, _LENGTH_BYTES, 0, WEIGHTS_NAME), "little")
    if size <= MAX_HEADER_BYTES and num_bytes < _LENGTH_BYTES + size:
        return False
    raw = read_header_bytes(fd)
    if total_bytes is not None:
        read_header(raw, total_bytes)
    return True


def _are_weights(fd: int, num_bytes: int) -> None:
    read_header(read_header_bytes(fd), num_bytes)


def _begins_as_object(name: str, fd: int, num_bytes: int, total_bytes: int | None) -> bool:
    if os.pread(fd, 1, 0) not in (b"{", b" ", b"\n", b"\r", b"\t"):
        raise AdapterInvalidError(f"{name}: a JSON object is expected")
    return True


def _is_config(fd: int, num_bytes: int) -> None:
    parse_object(read_exactly(fd, num_bytes, 0, CONFIG_NAME), CONFIG_NAME)


def _is_manifest(fd: int, num_bytes: int) -> None:
    read_manner(read_exactly(fd, num_bytes, 0, MANIFEST_NAME))


def _is_of_tokenizer(name: str, fd: int, num_bytes: int) -> None:
    check_tokenizer_file(name, read_exactly(fd, num_bytes, 0, name))


def _of_tokenizer(name: str) -> FileCheck:
    begins = partial(_begins_as_object, name) if name.endswith(".json") else _is_text
    return FileCheck(begins, partial(_is_of_tokenizer, name))


def _is_text(fd: int, num_bytes: int, total_bytes: int | None) -> bool:
    return True


def config_within(fd: int) -> bytes:
    """The configuration that a trainer wrote into the weights' header, beside the tensors."""
    text = _written_within(fd, CONFIG_KEY)
    if text is None:
        raise AdapterInvalidError(
            f"{WEIGHTS_NAME}: its header's __metadata__ has no {CONFIG_KEY!r}; save with"
            f" metadata={{{CONFIG_KEY!r}: json.dumps(config)}}, or send both files as parts"
        )
    return text


def manifest_within(fd: int) -> bytes | None:
    """The manifest, if it stands there too."""
    return _written_within(fd, MANIFEST_KEY)


def _written_within(fd: int, key: str) -> bytes | None:
    header = parse_object(read_header_bytes(fd)[_LENGTH_BYTES:], f"{WEIGHTS_NAME} header")
    metadata = header.get("__metadata__")
    text = metadata.get(key) if isinstance(metadata, dict) else None
    return text.encode() if isinstance(text, str) else None


CHECKS = {
    CONFIG_NAME: FileCheck(partial(_begins_as_object, CONFIG_NAME), _is_config),
    WEIGHTS_NAME: FileCheck(_begins_as_weights, _are_weights),
    MANIFEST_NAME: FileCheck(partial(_begins_as_object, MANIFEST_NAME), _is_manifest),
    **{name: _of_tokenizer(name) for name in (TOKENIZER_NAME, *COMPANIONS)},
}


def most_bytes(name: str, adapter_bytes: int) -> int:
    """The most that a file of an adapter may have, if all of it may have `adapter_bytes`."""
    limits = {CONFIG_NAME: MAX_CONFIG_BYTES, MANIFEST_NAME: MAX_MANIFEST_BYTES}
    limits |= {of: most_file_bytes(of) for of in (TOKENIZER_NAME, *COMPANIONS)}
    return min(adapter_bytes, limits.get(name, adapter_bytes))
