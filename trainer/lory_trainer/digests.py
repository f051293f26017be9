"""Digests by which a base is known again, wherever it lies and whatever it is called.

    config     SHA-256 of config.json, without what saving it again may change
    tokenizer  SHA-256 of tokenizer.json
    weights    SHA-256 over all tensors in order of name: name, dtype, shape, and three samples of
               1 KiB; the same however they are cut into files, and an 8B base is not read whole

The trainer writes them into a manifest, the server compares them with those of the base it serves,
and both call this. It must not know models, torch or transformers.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
FILES = (CONFIG, TOKENIZER, INDEX, "model*.safetensors")

SAMPLE_BYTES = 1024
"""At a tensor's beginning, middle and end: any fine-tune of a base changes some of them."""
MAX_HEADER_BYTES = 64 * 1024 * 1024
_LENGTH_BYTES = 8

_OF_THE_FILE = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
)
"""What saving the same model again may change in its configuration."""


def base_digests(folder: Path) -> dict[str, str]:
    """Of the files that are there. Raises ValueError for weights that are no safetensors."""
    found: dict[str, str] = {}
    if (folder / CONFIG).is_file():
        found["config"] = _config(folder)
    if (folder / TOKENIZER).is_file():
        found["tokenizer"] = hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest()
    shards = _shards(folder)
    if shards:
        found["weights"] = _weights(folder, shards)
    return found


def _config(folder: Path) -> str:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in _OF_THE_FILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _weights(folder: Path, shards: list[str]) -> str:
    samples = dict(sample for name in shards for sample in _samples(folder / name))
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS] if (folder / WEIGHTS).is_file() else []
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
        raise ValueError(f"not safetensors: a header of {num_bytes} bytes")
    return _LENGTH_BYTES + num_bytes, json.loads(file.read(num_bytes))
