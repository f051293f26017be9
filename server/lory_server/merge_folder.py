"""Writes a merge as a folder that PEFT reads, for other programs than this server.

    python -m lory_server.merge_folder --model BASE --adapters FOLDER --out FOLDER --recipe JSON

The numbers are those that are served, in float32. The folder is written aside and renamed, so that
there is never half of one. It must not know HTTP or how recipes are checked.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.config import CONFIG_NAME
from lory_server.adapters.errors import AdapterError
from lory_server.adapters.format import Base
from lory_server.adapters.header import WEIGHTS_NAME, read_exactly
from lory_server.adapters.merge_plan import module_of
from lory_server.adapters.merge_sources import Files, SourceFiles, locate
from lory_server.adapters.reader import ThreadReader
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.tokenizer_files import read_base_tokenizer
from lory_server.build import base_names
from lory_server.messages import EngineOptions
from lory_server.model.checkpoint import locate as locate_base
from lory_server.model.errors import ModelError
from lory_server.model.families import read_spec
from lory_server.recipes import Recipe, merged_id


def main() -> int:
    parser = argparse.ArgumentParser(prog="lory_server.merge_folder")
    for name in ("model", "adapters", "out", "recipe"):
        parser.add_argument(f"--{name}", required=True)
    told = parser.parse_args()
    recipe = msgspec.json.decode(told.recipe, type=Recipe)
    try:
        names = base_names(EngineOptions(model=told.model))
        folder = locate_base(told.model)
        base = Base(read_spec(folder).sites(), names, tokenizer=read_base_tokenizer(folder))
        write_folder(recipe, base, AdapterStore(Path(told.adapters)), Path(told.out))
    except (AdapterError, ModelError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def write_folder(recipe: Recipe, base: Base, store: AdapterStore, out: Path) -> None:
    """Raises AdapterError, or FileExistsError if `out` is there."""
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a folder that is not")
    reader = ThreadReader(base, torch.float32)
    with locate(store, merged_id(recipe)) as files:
        blob = reader.blob(files, reader.manifest(files))
        tokenizer = _tokenizer(files) if blob.manifest.tokenizer else {}
        files.check_unchanged()
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        save_file(_tensors(blob), aside / WEIGHTS_NAME)
        (aside / CONFIG_NAME).write_text(json.dumps(_config(blob), indent=2) + "\n")
        for name, raw in tokenizer.items():
            (aside / name).write_bytes(raw)
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside)
        raise


def _tokenizer(files: Files) -> dict[str, bytes]:
    """The files of the one that all sources have, as the first has them."""
    assert isinstance(files, SourceFiles)
    descriptors = files.sources[0].tokenizer_fds
    return {n: read_exactly(fd, os.fstat(fd).st_size, 0, n) for n, fd in descriptors.items()}


def _tensors(blob: AdapterBlob) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, starts in blob.manifest.placed(blob.chunk_starts):
        assert part.a is not None
        assert part.b is not None
        for spec, start in ((part.a, starts["a"]), (part.b, starts["b"])):
            numbers = blob.data[start : start + spec.shape[0] * spec.shape[1]]
            is_b = spec is part.b
            matrix = numbers.view(spec.shape[::-1]).T if is_b else numbers.view(spec.shape)
            factor = "lora_B" if is_b else "lora_A"
            name = f"base_model.model.{module_of(part)}.{factor}.weight"
            found[name] = matrix.contiguous()
    return found


def _config(blob: AdapterBlob) -> dict[str, Any]:
    """Patterns say what differs from most modules."""
    ranks = {module_of(part): part.rank for part in blob.manifest.slices}
    alphas = {module_of(part): part.rank * part.scale for part in blob.manifest.slices}
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": blob.manifest.base_model_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {module: one for module, one in alphas.items() if one != alpha},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


if __name__ == "__main__":
    raise SystemExit(main())
