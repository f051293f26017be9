"""Digests by which a base is known again, wherever it lies.

base_files.config     SHA-256 of config.json
base_files.tokenizer  SHA-256 of tokenizer.json
base_files.weights    SHA-256 over every *.safetensors in order of name: its name and size, then its
                      first and last MiB (the header and a sample: an 8B base is not read whole)
A server computes the same. This module must not know models.
"""

import hashlib
from pathlib import Path

MIB = 1 << 20


def base_digests(folder: Path) -> dict[str, str]:
    """Of the files that are there."""
    found = {}
    for name, file in (("config", "config.json"), ("tokenizer", "tokenizer.json")):
        path = folder / file
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        found["weights"] = _weights_digest(weights)
    return found


def _weights_digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    return digest.hexdigest()
