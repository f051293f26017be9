"""A safetensors checkpoint on disk: found, read tensor by tensor, and accounted for to the last.

At most one shard is open at a time, so that loading needs the model's own size and one shard.
Pickled checkpoints are refused by name. This module must not know what the tensors mean.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lory_server.model.errors import ModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DOWNLOADED = ("*.json", "model*.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Older checkpoints store what is computed from the configuration.
_NON_PARAMETERS = ("rotary_emb.inv_freq",)


def locate(model: str) -> Path:
    """The local folder of `model`, which is one already or is a hub id to download."""
    folder = Path(model)
    if model and folder.is_dir():
        return folder
    if not model or folder.is_absolute() or model.startswith((".", "~")):
        raise ModelError(f"model {model!r}: no such folder")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model {model!r}: neither a local folder nor to be had from the hub ({error})"
        ) from error


class Checkpoint:
    """The tensors of one folder by name; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard_of = _shards_by_tensor(folder)
        self._untaken = {name for name in self._shard_of if not name.endswith(_NON_PARAMETERS)}
        self._open_shard = ""
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    @property
    def names(self) -> dict[str, str]:
        """File by tensor name."""
        return self._shard_of

    def take(self, name: str) -> Tensor:
        """The tensor as stored."""
        shard = self._shard_of.get(name)
        if shard is None:
            raise ModelError(f"checkpoint {self._folder} has no tensor {name}")
        self._untaken.discard(name)
        try:
            return self._shard(shard).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self._folder / shard}: cannot read {name}: {error}") from error

    def take_float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter: of the shape that the configuration gives, in a float dtype."""
        tensor = self.take(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"tensor {name} has shape {tuple(tensor.shape)}, its configuration makes it {shape}"
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"tensor {name} is stored as {tensor.dtype}; supported: float32, bfloat16, float16 "
                "and bitsandbytes NF4"
            )
        return tensor

    def take_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.take(name) for name in names}

    def finish(self) -> None:
        """Refuse a checkpoint that holds parameters nobody took."""
        if self._untaken:
            extra = sorted(self._untaken)
            shown = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
            raise ModelError(
                f"checkpoint {self._folder} has {len(extra)} tensors that its architecture does "
                f"not use: {shown}"
            )

    def _shard(self, shard: str) -> Any:
        if shard != self._open_shard:
            self._close()
            self._file = _open(self._folder / shard)
            self._open_shard = shard
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file, self._open_shard = None, ""


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def _shards_by_tensor(folder: Path) -> dict[str, str]:
    """As in transformers, an index beside a single file is one that was left behind."""
    if (folder / _SINGLE_FILE).exists():
        with _open(folder / _SINGLE_FILE) as single:
            return dict.fromkeys(single.keys(), _SINGLE_FILE)
    if (folder / _INDEX_FILE).exists():
        return _read_index(folder / _INDEX_FILE)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    raise ModelError(f"{folder} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = set(shard_of.values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: not a safetensors index ({error!r})") from error
    for shard in sorted(shards):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{path}: shard {shard!r} is not a plain file name")
        if not (path.parent / shard).exists():
            raise ModelError(f"{path}: shard {shard} is missing; download the checkpoint again")
    return shard_of
