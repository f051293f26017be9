"""Which base is this? SHA-256 of its configuration, its tokenizer and samples of its weights.

The trainer writes it into a manifest, the server compares it with the base it serves, and both
call this. Equal whatever the folder is called and however the weights are cut into files; names
would say nothing of either. It must not know torch or transformers.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
FILES = (CONFIG, TOKENIZER, INDEX, "model*.safetensors")

SAMPLE_BYTES = 1024
"""At a tensor's beginning, middle and end: a fine-tune of a base changes nearly all tensors."""
MAX_HEADER_BYTES = 64 * 1024 * 1024
_LENGTH_BYTES = 8

_OF_THE_FILE = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
)
"""What saving the same model again may change in its configuration."""


class BaseDigestError(Exception):
    """The folder is not a base in safetensors; the message names the file."""


@dataclass(frozen=True, slots=True)
class BaseDigest:
    """Each a SHA-256 in hexadecimal."""

    config: str
    tokenizer: str
    weights: str

    def other_parts(self, other: "BaseDigest") -> tuple[str, ...]:
        """Those that differ."""
        names = ("config", "tokenizer", "weights")
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))


def base_digest(folder: Path) -> BaseDigest:
    """Reads a few megabytes. Raises BaseDigestError."""
    try:
        return BaseDigest(_config(folder), _tokenizer(folder), _weights(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseDigestError(f"{folder}: not a base in safetensors: {error}") from error


def _config(folder: Path) -> str:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in _OF_THE_FILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _tokenizer(folder: Path) -> str:
    return hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest()


def _weights(folder: Path) -> str:
    samples = dict(sample for name in _shards(folder) for sample in _samples(folder / name))
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if any(Path(name).name != name for name in files):
        raise ValueError(f"{INDEX} names a file elsewhere")
    return sorted(files)


def _samples(path: Path) -> Iterator[tuple[str, bytes]]:
    """Of every tensor of one file: its name, and a digest of name, kind and samples."""
    with path.open("rb") as file:
        start, header = _header(file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            digest = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
            for place in (first, (first + end) // 2, max(first, end - SAMPLE_BYTES)):
                file.seek(start + place)
                digest.update(file.read(min(SAMPLE_BYTES, end - place)))
            yield name, digest.digest()


def _header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the numbers begin, and what lies where."""
    num_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if num_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {num_bytes} bytes")
    return _LENGTH_BYTES + num_bytes, json.loads(file.read(num_bytes))
