"""Writes an adapter folder: plain PEFT files and a manifest, visible whole or not at all.

A server that watches the parent never meets half of it. This module must not know data or
training loops.
"""

import json
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from lory_trainer.destination import CONFIG_FILE, check_output
from lory_trainer.folders import draft_of, publish

MANIFEST_VERSION = 2
TENSORS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "adapter_manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUMBERS = re.compile(r"\[\n\s+-?[\d.e+-]+(?:,\n\s+-?[\d.e+-]+)*\n\s+\]")
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the manifest says beside PEFT's own files."""

    name: str
    base: dict[str, Any]
    """name, digests of its files, and how it was quantized; never a path of this machine."""
    prompt: dict[str, Any]
    """How a caller's words become the prompt that was trained."""
    generation: dict[str, Any]
    config: dict[str, Any]
    """The training options with every default written out."""
    data: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    """What the run came to."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Rows with what the trained model says of them, to compare a server's with."""


def write_adapter(
    model: PeftModel, facts: AdapterFacts, output: Path, *, dtype: str, replace: bool
) -> None:
    """Writes the active adapter of `model` to `output`, whole or not at all."""
    with draft_of(output) as draft:
        write_files(model, facts, draft, dtype)
        check_output(output, replace=replace)
        publish(draft, output)


def write_files(model: PeftModel, facts: AdapterFacts, folder: Path, dtype: str) -> None:
    # save_pretrained would ask the hub whether the base's vocabulary was resized.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in state.items()
    }
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    _write_json(folder / MANIFEST_FILE, _manifest(facts))
    _write_json(folder / CONFIG_FILE, _peft_config(model, facts.base["name"]))


@torch.no_grad()
def round_adapter(model: PeftModel, dtype: str) -> None:
    """Gives the adapter the values that will be written, so that what is asked of the model now
    is what a server will answer."""
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.copy_(tensor.to(DTYPES[dtype]))


def _peft_config(model: PeftModel, base_name: str) -> dict[str, Any]:
    values = model.peft_config[model.active_adapters[0]].to_dict()
    values = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in values.items()
    }
    return values | {"base_model_name_or_path": base_name, "inference_mode": True}


def _manifest(facts: AdapterFacts) -> dict[str, Any]:
    base = dict(facts.base)
    return {
        "manifest_version": MANIFEST_VERSION,
        "name": facts.name,
        "base": base.pop("name"),
        "base_files": base,
        **facts.prompt,
        "generation": facts.generation,
        "config": facts.config,
        "data": facts.data,
        "training": facts.training,
        "probe": facts.probe,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """A list of numbers is one line."""
    text = json.dumps(value, indent=2, sort_keys=True)
    text = _NUMBERS.sub(lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")
