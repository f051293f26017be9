"""The digest of a base: the same for the same model, another for any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lory_trainer.digests import base_digests

CONFIG = {"model_type": "llama", "hidden_size": 8, "dtype": "float32", "transformers_version": "5"}


def make_base(folder: Path, *, shards: int = 1, change: float = 0.0, **config: object) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(40, 40, generator=generator) for i in range(4)}
    tensors["w3"][-1, -1] += change
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_the_same_model_saved_otherwise_is_the_same_base(tmp_path):
    first = base_digests(make_base(tmp_path / "one"))
    again = make_base(tmp_path / "another name", shards=3, dtype="bfloat16", use_cache=False)
    assert base_digests(again) == first
    assert first.keys() == {"config", "tokenizer", "weights"}


def other_parts(first: dict[str, str], second: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in first if first[name] != second[name])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("config", {"hidden_size": 9}),
        ("config", {"rope_theta": 1}),
        ("weights", {"change": 1e-3}),
    ],
)
def test_another_model_differs_in_that_part_alone(tmp_path, part, change):
    first = base_digests(make_base(tmp_path / "one"))
    second = base_digests(make_base(tmp_path / "two", **change))
    assert other_parts(first, second) == (part,)


def test_another_tokenizer_is_another_base(tmp_path):
    first, second = make_base(tmp_path / "one"), make_base(tmp_path / "two")
    (second / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    assert other_parts(base_digests(first), base_digests(second)) == ("tokenizer",)


def test_what_is_not_there_has_no_digest(tmp_path):
    folder = make_base(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    assert base_digests(folder).keys() == {"config"}


def test_weights_that_are_none_are_refused(tmp_path):
    folder = make_base(tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="safetensors"):
        base_digests(folder)
    index = {"weight_map": {"w0": "../../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere"):
        base_digests(folder)
