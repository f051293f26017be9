"""Writes an adapter folder: plain PEFT files and a manifest, visible whole or not at all.

The folder is built beside its destination, synced to disk and renamed, so a server that
watches the parent never meets half of it. This module must not know data or training loops.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from lory_trainer.destination import CONFIG_FILE, check_output

MANIFEST_VERSION = 1
TENSORS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "adapter_manifest.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the manifest says beside PEFT's own files."""

    base_name: str
    """Folder name or hub id; never a path of this machine."""
    template: str
    fields: tuple[str, ...]
    eos_token: str
    config: dict[str, Any]
    """The training options with every default written out."""
    data: dict[str, Any]
    training: dict[str, Any]


def write_adapter(
    model: PeftModel, facts: AdapterFacts, output: Path, *, dtype: str, replace: bool
) -> None:
    """Writes the active adapter of `model` to `output`, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write_files(model, facts, draft, _DTYPES[dtype])
        _let_others_read(draft)
        _sync(draft)
        _publish(draft, output, replace=replace)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_files(model: PeftModel, facts: AdapterFacts, folder: Path, dtype: torch.dtype) -> None:
    # save_pretrained would ask the hub whether the base's vocabulary was resized.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()
    }
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    _write_json(folder / MANIFEST_FILE, _manifest(facts))
    _write_json(folder / CONFIG_FILE, _peft_config(model, facts.base_name))


def _peft_config(model: PeftModel, base_name: str) -> dict[str, Any]:
    values = model.peft_config[model.active_adapters[0]].to_dict()
    values = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in values.items()
    }
    return values | {"base_model_name_or_path": base_name, "inference_mode": True}


def _manifest(facts: AdapterFacts) -> dict[str, Any]:
    return {
        "manifest_version": MANIFEST_VERSION,
        "base": facts.base_name,
        "template": facts.template,
        "fields": list(facts.fields),
        "eos_token": facts.eos_token,
        "config": facts.config,
        "data": facts.data,
        "training": facts.training,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _let_others_read(folder: Path) -> None:
    """Temporary folders and safetensors files are their owner's alone; servers run as others."""
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)


def _sync(folder: Path) -> None:
    """Files first, then the folder's own entry list."""
    for path in (*folder.iterdir(), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(draft: Path, output: Path, *, replace: bool) -> None:
    """Renames the draft into place; a replaced folder is gone for the time of one rename."""
    check_output(output, replace=replace)
    old = draft.with_name(f"{draft.name}.old")
    if output.exists():
        output.rename(old)
    try:
        draft.rename(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
    _sync_path(output.parent)
    shutil.rmtree(old, ignore_errors=True)
