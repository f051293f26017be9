"""Checkpoints on disk: every tensor accounted for, every refusal by name, one shard at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import lory_kernels
import tiny_models
from lory_server.messages import EngineOptions
from lory_server.model import checkpoint as checkpoint_module
from lory_server.model.checkpoint import Checkpoint, locate
from lory_server.model.decoder import Decoder
from lory_server.model.errors import ModelError
from lory_server.model.load import load
from packed_steps import random_ids, run

ATOL = 2e-5
IDS = random_ids(11, tiny_models.VOCAB_SIZE, 4)


def decoder_of(folder: Path, **options: Any) -> Decoder:
    engine = EngineOptions(model=str(folder), **options)
    return load(engine, "cpu", torch.float32, lory_kernels.select("torch"))


def logits(folder: Path) -> torch.Tensor:
    return run(decoder_of(folder), [IDS], [(len(IDS),)])[0]


def reference(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return tiny_models.load_reference(folder)(torch.tensor([IDS])).logits[0]


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of a single-file checkpoint by name, dots written as __; None deletes one."""
    path = folder / "model.safetensors"
    content = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del content[name]
        else:
            content[name] = tensor
    save_file(content, path, metadata={"format": "pt"})


def sharded(tmp_path: Path) -> Path:
    folder = tiny_models.build("llama", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def test_sharded_checkpoints_equal_single_files(tmp_path: Path) -> None:
    single = tiny_models.build("llama", tmp_path / "single")
    assert torch.equal(logits(sharded(tmp_path)), logits(single))


def test_one_shard_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live: list[str] = []
    most = 0
    really_open = checkpoint_module._open

    class Watched:
        def __init__(self, path: Path) -> None:
            nonlocal most
            self._file = really_open(path)
            live.append(path.name)
            most = max(most, len(live))

        def get_tensor(self, name: str) -> torch.Tensor:
            return self._file.get_tensor(name)

        def __exit__(self, *details: object) -> None:
            live.pop()
            self._file.__exit__(*details)

    monkeypatch.setattr(checkpoint_module, "_open", Watched)
    decoder_of(sharded(tmp_path))
    assert most == 1
    assert live == []


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    change(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    with pytest.raises(ModelError, match=r"1 tensors .*model\.layers\.0\.self_attn\.q_proj\.bias"):
        decoder_of(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    change(folder, **{name: None})
    with pytest.raises(ModelError, match=f"no tensor {name}"):
        decoder_of(folder)


def test_a_missing_bias_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.build("qwen2", tmp_path / "model")
    change(folder, model__layers__0__self_attn__k_proj__bias=None)
    with pytest.raises(ModelError, match=r"k_proj\.bias"):
        decoder_of(folder)


def test_a_misshapen_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    change(folder, model__layers__0__mlp__up_proj__weight=torch.zeros(64, 128))
    with pytest.raises(ModelError, match=r"up_proj\.weight has shape \(64, 128\).*\(128, 64\)"):
        decoder_of(folder)


def test_a_tensor_in_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    stored = torch.zeros(128, 64).to(torch.float8_e4m3fn)
    change(folder, model__layers__0__mlp__up_proj__weight=stored)
    with pytest.raises(ModelError, match=r"up_proj\.weight is stored as torch\.float8_e4m3fn"):
        decoder_of(folder)


def test_stored_frequencies_are_no_parameters(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    expected = logits(folder)
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    assert torch.equal(logits(folder), expected)


def test_a_tied_checkpoint_may_store_its_head_too(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", tie_word_embeddings=True)
    expected = logits(folder)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table.clone())
    assert torch.equal(logits(folder), expected)
    assert (logits(folder) - reference(folder)).abs().max() < ATOL


def test_a_different_head_in_a_tied_checkpoint_means_what_it_means_in_transformers(
    tmp_path: Path,
) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", tie_word_embeddings=True)
    before = logits(folder)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table.flip(0).contiguous())
    assert (logits(folder) - reference(folder)).abs().max() < ATOL
    assert (logits(folder) - before).abs().max() > 100 * ATOL


def test_weights_survive_the_closing_and_rewriting_of_their_file(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    decoder = decoder_of(folder)
    before = run(decoder, [IDS], [(len(IDS),)])[0]
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(run(decoder, [IDS], [(len(IDS),)])[0], before)


def test_pickled_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*safetensors"):
        decoder_of(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        decoder_of(folder)


def test_a_damaged_file_is_refused_by_path(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable"):
        decoder_of(folder)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "not a safetensors index"),
        ('{"weights": {}}', "not a safetensors index"),
        ('{"weight_map": {"a": "../../etc/model.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "model-9.safetensors is missing"),
    ],
)
def test_a_damaged_index_is_refused(index: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=named):
        Checkpoint(tmp_path)


def test_an_index_left_behind_beside_a_single_file_counts_for_nothing(tmp_path: Path) -> None:
    """What `save_pretrained` leaves of an earlier, sharded save: transformers goes by the file."""
    folder = tiny_models.build("llama", tmp_path / "model", seed=1, max_shard_size="100KB")
    tiny_models.build("llama", folder, seed=2)
    assert (folder / "model.safetensors.index.json").exists()
    with Checkpoint(folder) as checkpoint:
        ours = checkpoint.take("model.norm.weight")
    assert torch.equal(ours, tiny_models.load_reference(folder).model.norm.weight)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = "model.layers.0.mlp.up_proj.weight"
    index["weight_map"][name] = shards[index["weight_map"][name] == shards[0]]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"cannot read {name}"):
        decoder_of(folder)


@pytest.mark.parametrize("model", ["/no/such/folder", "./no-such-folder", "~/x", ""])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint_module, "snapshot_download", lambda *a, **k: pytest.fail("asked")
    )
    with pytest.raises(ModelError, match="no such folder"):
        locate(model)


def test_only_json_and_safetensors_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    assert locate("someone/model") == tmp_path
    assert asked["repo"] == "someone/model"
    assert all(p.endswith((".json", ".safetensors")) for p in asked["allow_patterns"])


def test_a_model_the_hub_does_not_give_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(repo: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"someone/model.*offline"):
        locate("someone/model")


def test_a_context_beyond_the_base_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    with pytest.raises(ModelError, match="--max-model-len 129"):
        decoder_of(folder, max_model_len=129)
    assert decoder_of(folder).max_model_len == 128
    assert decoder_of(folder, max_model_len=60).max_model_len == 60
