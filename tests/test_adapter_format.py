"""Which adapter folders are accepted, what is read from them, and how the others are refused."""

import dataclasses
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from adapter_files import BASE, SITES, Tensors, make_config, write_adapter
from lory_server.adapters import blob as blob_module
from lory_server.adapters.blob import AdapterBlob, read_blob
from lory_server.adapters.config import MAX_CONFIG_BYTES, read_config
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.format import AdapterManifest, Base, read_manifest
from lory_server.adapters.header import TensorSpec, read_header, read_header_bytes
from lory_server.adapters.store import AdapterStore
from lory_server.model.sites import Site, Slice
from tiny_models import random_model, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@contextmanager
def opened(folder: Path) -> Iterator[tuple[int, int]]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    fds = [os.open(folder / name, os.O_RDONLY) for name in names]
    try:
        yield fds[0], fds[1]
    finally:
        for fd in fds:
            os.close(fd)


def manifest_of(folder: Path, base: Base = BASE) -> AdapterManifest:
    with opened(folder) as fds:
        return read_manifest(*fds, base)


def blob_of(folder: Path, base: Base = BASE, dtype: torch.dtype = torch.float32) -> AdapterBlob:
    with opened(folder) as fds:
        return read_blob(fds[1], read_manifest(*fds, base), dtype)


def refusal_of(folder: Path, base: Base = BASE, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(AdapterInvalidError) as caught:
        blob_of(folder, base, dtype)
    return str(caught.value)


def write_raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    write_adapter(folder)
    raw = struct.pack("<Q", len(header) if length is None else length) + header + data
    (folder / "adapter_model.safetensors").write_bytes(raw)
    return folder


# -- equal to PEFT --------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    return random_model("llama", num_hidden_layers=3)


def sites_of(model: Any) -> tuple[Site, ...]:
    """A site a linear; heads and embeddings are not served."""
    return tuple(
        Site(
            name,
            module.in_features,
            (Slice(name, 0, module.out_features),),
            has_bias=module.bias is not None,
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"model\.layers\.[02]\..*\.(q|k)_proj"},
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
    "rank_pattern": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.*k_proj": 7, "q_proj": 3},
    },
    "alpha_pattern": {
        "target_modules": ["gate_proj", "up_proj"],
        "alpha_pattern": {"up_proj": 3, r"layers\.[12]\.mlp\.gate_proj": 11},
    },
    "both patterns and rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 9},
        "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.(q|v)_proj": 6},
        "use_rslora": True,
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers_pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "full names": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"],
    },
    "exclude list": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*|.*lm_head"},
    "gaussian": {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
    "bfloat16": {"target_modules": ["q_proj"], "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_what_peft_saves_is_read_as_peft_reads_it(name: str, model: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    sites = sites_of(model)
    save_adapter(tmp_path, model, rank=4, alpha=6, seed=1, **PEFT_CONFIGS[name])
    manifest = manifest_of(tmp_path, Base(sites))
    blob = blob_of(tmp_path, Base(sites))
    peft_model = PeftModel.from_pretrained(model, tmp_path)
    layers = {
        module.removeprefix("base_model.model."): layer
        for module, layer in peft_model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {sites[part.site].name for part in manifest.slices} == layers.keys()
    for index, part in enumerate(manifest.slices):
        layer: Any = layers[sites[part.site].name]
        assert part.scale == layer.scaling["default"]
        assert part.rank == layer.r["default"]
        a, b = chunk_of(blob, 2 * index), chunk_of(blob, 2 * index + 1)
        assert torch.equal(a, layer.lora_A["default"].weight.float())
        assert torch.equal(b, layer.lora_B["default"].weight.float().t())


def name_of(spec: TensorSpec | None) -> str:
    assert spec is not None
    return spec.name


def chunk_of(blob: AdapterBlob, index: int) -> torch.Tensor:
    part = blob.manifest.slices[index // 2]
    assert part.a is not None
    assert part.b is not None
    rows, columns = part.a.shape if index % 2 == 0 else part.b.shape[::-1]
    start = blob.chunk_starts[index]
    return blob.data[start : start + rows * columns].view(rows, columns)


OUTPUT_CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora in bfloat16": {
        "target_modules": "all-linear",
        "use_dora": True,
        "dtype": torch.bfloat16,
    },
    "biases on B": {"target_modules": ["k_proj", "up_proj"], "lora_bias": True},
    "biases of targets": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["v_proj"], "bias": "all"},
    "everything but dora": {
        "target_modules": ["v_proj", "k_proj"],
        "bias": "all",
        "lora_bias": True,
        "layers_to_transform": [1],
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("name", OUTPUT_CONFIGS)
def test_vectors_that_peft_saves_are_read_as_peft_reads_them(name: str, tmp_path: Path) -> None:
    """Magnitudes as they are; the biases of B, scaled, and those in place of the base's, summed."""
    from peft import PeftModel

    model = random_model("qwen2", num_hidden_layers=2)
    sites = sites_of(model)
    save_adapter(tmp_path, model, rank=4, alpha=6, seed=1, **OUTPUT_CONFIGS[name])
    blob = blob_of(tmp_path, Base(sites))
    tuned: Any = PeftModel.from_pretrained(model, tmp_path).base_model.model
    seen = 0
    for part, starts in blob.manifest.placed(blob.chunk_starts):
        layer: Any = tuned.get_submodule(sites[part.site].name)
        vectors = {kind: blob.data[start:][: part.out_features] for kind, start in starts.items()}
        if part.magnitude:
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert torch.equal(vectors["gain"], magnitude.float())
        if part.b_bias or part.bias:
            expected = torch.zeros(part.out_features)
            if part.b_bias:
                expected += layer.scaling["default"] * layer.lora_B["default"].bias.float()
            if part.bias:
                expected += layer.bias
            assert torch.allclose(vectors["bias"], expected, rtol=1e-6)
        seen += len({"gain", "bias"} & starts.keys())
    biased = {"q_proj", "k_proj", "v_proj"}
    expected_vectors = {
        "dora": 3 * 2,  # two gains a layer, and a bias to undo q_proj's own
        "dora in bfloat16": (7 + 3) * 2,
        "biases on B": 2 * 2,
        "biases of targets": 2,
        "all biases": len(biased) * 2,
        "everything but dora": len(biased) * 2,
    }
    assert seen == expected_vectors[name]


def test_fan_in_fan_out_says_nothing_of_linears(model: Any, tmp_path: Path) -> None:
    """PEFT sets it to False where it meets one."""
    from peft import PeftModel

    sites = sites_of(model)
    save_adapter(tmp_path, model, 4, 6, ["o_proj", "down_proj"], 1, use_dora=True)
    tokens = torch.tensor([[3, 4, 5]])
    plain = manifest_of(tmp_path, Base(sites))
    expected = PeftModel.from_pretrained(model, tmp_path)(tokens).logits
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        actual = PeftModel.from_pretrained(random_model("llama", num_hidden_layers=3), tmp_path)
    assert torch.equal(actual(tokens).logits, expected)
    assert manifest_of(tmp_path, Base(sites)).slices == plain.slices


def test_a_scale_other_than_pefts_would_be_seen(model: Any, tmp_path: Path) -> None:
    """The comparison above is exact: rank-stabilised scaling differs from plain scaling."""
    save_adapter(tmp_path / "a", model, 4, 6, ["q_proj"], 1, use_rslora=True)
    save_adapter(tmp_path / "b", model, 4, 6, ["q_proj"], 1)
    first, second = (manifest_of(tmp_path / x, Base(sites_of(model))).slices[0] for x in "ab")
    assert (first.scale, second.scale) == (3.0, 1.5)


# -- what is read ---------------------------------------------------------------------------


def test_slices_are_in_the_order_of_sites_whatever_the_files(tmp_path: Path) -> None:
    def reverse(tensors: Tensors) -> None:
        for name in reversed(list(tensors)):
            tensors[name] = tensors.pop(name)

    manifest = manifest_of(write_adapter(tmp_path, change=reverse))
    places = [(part.site, part.slice) for part in manifest.slices]
    assert places == [(i, k) for i, site in enumerate(SITES) for k in range(len(site.slices))]
    assert manifest.max_rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_cast_to_the_engines_dtype(
    dtype: torch.dtype, engine_dtype: torch.dtype, tmp_path: Path
) -> None:
    write_adapter(tmp_path, rank=3, dtype=dtype)
    blob = blob_of(tmp_path, dtype=engine_dtype)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        for index, part in enumerate(blob.manifest.slices):
            a, b = saved.get_tensor(name_of(part.a)), saved.get_tensor(name_of(part.b))
            assert torch.equal(chunk_of(blob, 2 * index), a.to(engine_dtype))
            assert torch.equal(chunk_of(blob, 2 * index + 1), b.t().to(engine_dtype))
    assert blob.num_bytes == blob.manifest.num_bytes(engine_dtype.itemsize)
    assert all(start * engine_dtype.itemsize % 64 == 0 for start in blob.chunk_starts)


@pytest.mark.parametrize("engine_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_may_change_from_tensor_to_tensor_at_any_offset(
    engine_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Odd widths: a float32 tensor begins where two bytes before it a bfloat16 one has ended."""
    sites = (Site("layers.0.mlp.down", 7, (Slice("model.layers.0.mlp.down_proj", 0, 5),)),)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)

    def mix(tensors: Tensors) -> None:
        for index, name in enumerate(tensors):
            tensors[name] = tensors[name].to(dtypes[index % len(dtypes)])

    sites += tuple(
        Site(f"layers.{n}.mlp.down", 7, (Slice(f"model.layers.{n}.mlp.down_proj", 0, 5),))
        for n in range(1, 6)
    )
    write_adapter(tmp_path, rank=3, modules=("down_proj",), sites=sites, change=mix)
    blob = blob_of(tmp_path, Base(sites), engine_dtype)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        for index, part in enumerate(blob.manifest.slices):
            a, b = saved.get_tensor(name_of(part.a)), saved.get_tensor(name_of(part.b))
            assert torch.equal(chunk_of(blob, 2 * index), a.to(engine_dtype))
            assert torch.equal(chunk_of(blob, 2 * index + 1), b.t().to(engine_dtype))


def test_tensors_larger_than_one_piece_are_read_whole(tmp_path: Path) -> None:
    sites = (Site("wide", 3000, (Slice("model.wide", 0, 2000),)),)
    write_adapter(tmp_path, 64, ("wide",), sites=sites)
    blob = blob_of(tmp_path, Base(sites))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        part = blob.manifest.slices[0]
        assert torch.equal(chunk_of(blob, 0), saved.get_tensor(name_of(part.a)))
        assert torch.equal(chunk_of(blob, 1), saved.get_tensor(name_of(part.b)).t())


def test_names_with_the_adapters_name_are_accepted(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    assert len(manifest_of(write_adapter(tmp_path, change=rename)).slices) == 14


def test_the_revision_is_the_digest_of_both_files(tmp_path: Path) -> None:
    first = blob_of(write_adapter(tmp_path / "a", seed=1)).revision
    assert first == blob_of(write_adapter(tmp_path / "b", seed=1)).revision
    assert first != blob_of(write_adapter(tmp_path / "c", seed=2)).revision
    assert first != blob_of(write_adapter(tmp_path / "d", seed=1, lora_alpha=1)).revision


# -- the base's name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [None, "", "org/Tiny-Base", "other/tiny-base", "/data/tiny-base/", r"C:\models\Tiny-Base",
     "/home/me/.cache/huggingface/hub/models--org--tiny-base/snapshots/0123abc",
     "models--tiny-base/snapshots/0123abc/"],
)  # fmt: skip
def test_a_base_is_known_by_the_last_part_of_its_name(name: str | None, tmp_path: Path) -> None:
    manifest_of(write_adapter(tmp_path, base_model_name_or_path=name))


def test_another_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    write_adapter(tmp_path, base_model_name_or_path="org/other-base")
    message = refusal_of(tmp_path)
    assert "org/other-base" in message
    assert "--allow-base-mismatch" in message
    assert manifest_of(tmp_path, Base(SITES, BASE.names, allow_mismatch=True)).slices


@pytest.mark.parametrize(
    "name", ["models--" + "--" * 400_000, "models--a/" * 90_000, "/" * 900_000]
)
def test_a_hostile_name_of_a_base_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """A regular expression went through it again for each of its dashes: 16 KB took four seconds,
    a megabyte the reader's patience, twice."""
    write_adapter(tmp_path, base_model_name_or_path=name)
    started_s = time.process_time()
    assert "but the base served is 'tiny-base'" in refusal_of(tmp_path)
    assert time.process_time() - started_s < 1


# -- configurations that are refused --------------------------------------------------------

ALORA = {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}

REFUSED_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"peft_type": None}, "peft_type"),
    ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ({"modules_to_save": ["lm_head|.*"]}, "modules_to_save"),
    ({"modules_to_save": ["norm"] * 65}, "modules_to_save"),
    *[({"peft_type": other}, "only LORA is served")
      for other in ("VERA", "IA3", "LOHA", "LOKR", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")],
    ({"use_dora": 1}, "use_dora"),
    ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora"),
    ({"lora_bias": "yes"}, "lora_bias"),
    ({"bias": "boft_only"}, "bias"),
    ({"bias": True}, "bias"),
    ({"bias": ["all"]}, "bias"),
    *[({"trainable_token_indices": t}, "trainable_token_indices")
      for t in ("1", 1, [-1], [1, 1], [True], [1.0], {"q_proj": [1]}, {"": [1]}, {"lm_head": []},
                {"lm_head": [2, 2]}, list(range(70_000)))],
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["experts.w"]}, "target_parameters"),
    ({"alora_invocation_tokens": [1, 2]}, "needs task_type CAUSAL_LM"),
    *[({**ALORA, **fields}, "alora_invocation_tokens") for fields in (
        {"alora_invocation_tokens": []},
        {"alora_invocation_tokens": "<go>"},
        {"alora_invocation_tokens": 3},
        {"alora_invocation_tokens": [1, -2]},
        {"alora_invocation_tokens": [1, True]},
        {"alora_invocation_tokens": [1.0]},
        {"alora_invocation_tokens": [[1, 2]]},
        {"alora_invocation_tokens": [10**9]},
        {"alora_invocation_tokens": [1] * 5000},
        {"use_dora": True},
        {"init_lora_weights": "mica"},
    )],
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_qalora": True}, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
    ({"trust_remote_code": True}, "trust_remote_code"),
    ({"key_of_the_future": 0}, "key_of_the_future"),
    *[({"init_lora_weights": init}, "path_initial_model_for_weight_conversion")
      for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga")],
    ({"init_lora_weights": "loftq"}, "replace_lora_weights_loftq"),
    ({"init_lora_weights": "of the future"}, "init_lora_weights"),
    ({"init_lora_weights": ["eva"]}, "init_lora_weights"),
    *[({"r": r}, "r is") for r in (0, -1, 10**9, 257, 4.0, "4", True, None)],
    *[({"lora_alpha": a}, "lora_alpha") for a in ("8", None, True, 10**400, 1e300)],
    ({"use_rslora": 1}, "use_rslora"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
    ({"rank_pattern": {str(i): 4 for i in range(5000)}}, "rank_pattern"),
    ({"target_modules": None}, "target_modules is empty"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": [1]}, "target_modules"),
    ({"target_modules": {"q_proj": 1}}, "target_modules"),
    ({"target_modules": ["c_attn"]}, "target_modules does not select"),
    ({"target_modules": ".*(?<!k)_proj"}, "target_modules"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"layers_pattern": "layers"}, "layers_pattern needs"),
    ({"layers_pattern": "(a+)+", "layers_to_transform": [0]}, "layers_pattern"),
    ({"layers_to_transform": "all"}, "layers_to_transform"),
    ({"layers_to_transform": [0.5]}, "layers_to_transform"),
    ({"exclude_modules": 3}, "exclude_modules"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), REFUSED_FIELDS)
def test_a_configuration_is_refused_by_field(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    assert named in refusal_of(write_adapter(tmp_path, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": False, "modules_to_save": None, "layer_replication": [], "new_key": None},
        {"new_key": False, "newer_key": {}, "newest_key": ""},
        {"lora_dropout": 0.1, "peft_version": "9.9", "inference_mode": True, "revision": "main"},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "ensure_weight_tying": True},
        {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "auto_mapping": {"a": "b"}},
        {"init_lora_weights": "eva", "task_type": "CAUSAL_LM", "bias": "none"},
        {"init_lora_weights": False, "lora_alpha": 0.5, "layers_to_transform": []},
    ],
)
def test_what_changes_nothing_at_inference_is_accepted(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    assert len(manifest_of(write_adapter(tmp_path, **fields)).slices) == 14


def _since(*added: dict[str, Any]) -> dict[str, Any]:
    """All that a version of PEFT wrote, from what each added to those before."""
    return {name: value for fields in added for name, value in fields.items()}


V0_2: dict[str, Any] = {
    "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.05,
    "merge_weights": False, "modules_to_save": None, "bias": "none", "task_type": "CAUSAL_LM",
}  # fmt: skip
V0_3 = {"init_lora_weights": True, "revision": None}
V0_4 = {"layers_pattern": None, "layers_to_transform": None}
V0_5 = {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}}
V0_6 = {"rank_pattern": {}, "alpha_pattern": {}}
V0_7 = {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}
V0_8 = {"use_rslora": False}
V0_9 = {"use_dora": False}
V0_10 = {"layer_replication": None}
V0_12 = {"eva_config": None, "exclude_modules": None, "lora_bias": False}
SWIFT = {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06}


@pytest.mark.parametrize(
    "added",
    [
        (V0_2,),
        (V0_2, {"merge_weights": True}),
        (V0_2, V0_3),
        (V0_2, V0_3, V0_4, V0_5),
        (V0_2, V0_3, V0_4, V0_5, V0_6, V0_7),
        (V0_2, V0_3, V0_4, V0_5, V0_6, V0_7, V0_8, V0_9, V0_10),
        (V0_3, V0_4, V0_5, V0_6, V0_7, V0_8, V0_9, V0_10, V0_12, SWIFT),
    ],
    ids=["0.2", "0.2-merging", "0.3", "0.5", "0.7", "0.10", "swift"],
)
def test_configurations_of_older_versions_and_other_trainers_are_read(
    added: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    assert len(manifest_of(write_adapter(tmp_path, **_since(*added))).slices) == 14


def test_files_of_trainers_beside_an_adapter_are_let_be(tmp_path: Path) -> None:
    """As Axolotl, LLaMA-Factory, Unsloth and ms-swift leave them."""
    folder = write_adapter(tmp_path / "one")
    revision = blob_of(folder).revision
    for name in ("README.md", "trainer_state.json", "training_args.bin", "optimizer.pt",
                 "scheduler.pt", "rng_state_0.pth", "added_tokens.json", "vocab.json", "merges.txt",
                 "tokenizer.model", "additional_config.json", "args.json", "all_results.json",
                 "trainer_log.jsonl", "training_loss.png", "generation_config.json",
                 "adapter_model.bin", "zero_to_fp32.py"):  # fmt: skip
        (folder / name).write_bytes(b"\x80\x04 not read")
    (folder / "global_step10").mkdir()
    with AdapterStore(tmp_path).locate("one") as files:
        assert files.tokenizer_fds == {}
    assert blob_of(folder).revision == revision


@pytest.mark.parametrize("kind", ["XLORA", "RANDLORA", "BONE", "FOURIERFT"])
def test_a_folder_of_another_kind_is_refused_by_its_kind(kind: str, tmp_path: Path) -> None:
    assert f"peft_type is '{kind}'; only LORA is served" in refusal_of(
        write_adapter(tmp_path, peft_type=kind, adapters={"0": "/a"}, xlora_depth=1)
    )


def test_the_manifest_says_from_which_tokens_an_adapter_acts(tmp_path: Path) -> None:
    assert manifest_of(write_adapter(tmp_path / "a", **ALORA)).invocation_tokens == (3, 4)
    assert manifest_of(write_adapter(tmp_path / "b")).invocation_tokens == ()


def test_an_invocation_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, **ALORA)
    assert manifest_of(folder, Base(SITES, vocab_size=5)).invocation_tokens == (3, 4)
    message = refusal_of(folder, Base(SITES, vocab_size=4))
    assert "alora_invocation_tokens has 4" in message
    assert "vocabulary has 4 tokens" in message


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_acts_before_any_invocation(bias: str, tmp_path: Path) -> None:
    """PEFT puts it in place of the base's, everywhere; where there is none it changes nothing."""
    biased = tuple(dataclasses.replace(site, has_bias=True) for site in SITES)
    fields = {"bias": bias, **ALORA}
    assert manifest_of(write_adapter(tmp_path / "a", **fields)).invocation_tokens
    message = refusal_of(write_adapter(tmp_path / "b", sites=biased, **fields), Base(biased))
    assert "base_layer.bias' acts before the invocation tokens, too" in message
    plain = {"lora_bias": True, **ALORA}
    assert manifest_of(write_adapter(tmp_path / "c", sites=biased, **plain), Base(biased)).slices


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "not valid JSON"),
        (b"[]", "object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"r": 4, "r": 8}', "'r' stands twice"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"peft_type": "LORA", "\\ud800": 1}', "surrogates not allowed"),
        (b'{"base_model_name_or_path": ["\\udfff"]}', "surrogates not allowed"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
)
def test_a_damaged_configuration_is_refused(raw: bytes, named: str, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(raw)
    assert named in refusal_of(tmp_path)
    with pytest.raises(AdapterInvalidError):
        read_config(raw)


# -- tensors that are refused ---------------------------------------------------------------


def _drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, *shape: int, value: float = 1.0) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.full(shape, value)})


def _poke(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1)[-1].fill_(value)


WRONG_TENSORS: list[tuple[Callable[[Tensors], object], str, str]] = [
    (_drop(f"{Q0}.lora_A.weight"), f"{Q0}.lora_A.weight", "missing"),
    (_drop(f"{Q0}.lora_B.weight"), f"{Q0}.lora_B.weight", "missing"),
    (_put(f"{Q0}.lora_A.weight", 5, 16), f"{Q0}.lora_A.weight", "[5, 16]"),
    (_put(f"{Q0}.lora_A.weight", 4, 17), f"{Q0}.lora_A.weight", "[4, 17]"),
    (_put(f"{Q0}.lora_B.weight", 4, 16), f"{Q0}.lora_B.weight", "[4, 16]"),
    (_put(f"{Q0}.lora_B.weight", 16, 4, 1), f"{Q0}.lora_B.weight", "[16, 4, 1]"),
    (_put(f"{Q0}.lora_B.weight", 0, 4), f"{Q0}.lora_B.weight", "[0, 4]"),
    (_put(f"{Q0}.lora_A.default.weight", 4, 16), f"{Q0}.lora_A", "stands twice"),
    (_put(f"{Q0}.lora_magnitude_vector", 16), "lora_magnitude_vector", "use_dora"),
    (_put(f"{Q0}.lora_B.bias", 16), "lora_B.bias", "lora_bias"),
    (_put(f"{Q0}.base_layer.bias", 16), "base_layer.bias", "bias is 'none'"),
    (_put(f"{Q0}.bias", 16), "q_proj.bias", "bias is 'none'"),
    (_put("base_model.model.lm_head.lora_A.weight", 4, 16), "lm_head", "does not have"),
    (
        _put("base_model.model.model.embed_tokens.lora_embedding_C", 4, 9),
        "embedding_C",
        "save it with that",
    ),
    (_put("base_model.model.lm_head.weight", 9, 16), "lm_head.weight", "does not have"),
    (
        _put("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 16),
        "layers.0",
        "whose names begin with 'base_model.model.'; save it with that",
    ),
    (_put(f"{Q0}.lora_A.mine.weight", 4, 16), "lora_A.mine", "save it with that"),
    (_put("vera_lambda_b", 4), "vera_lambda_b", "is not of LoRA"),
    (
        _put(f"{Q0.replace('layers.0', 'layers.9')}.lora_A.weight", 4, 16),
        "layers.9",
        "does not have",
    ),
    (_poke(f"{Q0}.lora_A.weight", float("nan")), f"{Q0}.lora_A.weight", "NaN"),
    (_poke(f"{Q0}.lora_B.weight", float("inf")), f"{Q0}.lora_B.weight", "NaN or infinity"),
    (_poke(f"{Q0}.lora_B.weight", float("-inf")), f"{Q0}.lora_B.weight", "NaN or infinity"),
]


@pytest.mark.parametrize(("change", "name", "reason"), WRONG_TENSORS)
def test_a_wrong_tensor_is_refused_by_name(
    change: Callable[[Tensors], object], name: str, reason: str, tmp_path: Path
) -> None:
    message = refusal_of(write_adapter(tmp_path, change=change))
    assert name in message
    assert reason in message


BIASED = Base(tuple(dataclasses.replace(site, has_bias="qkv" in site.name) for site in SITES))
O0 = "base_model.model.model.layers.0.self_attn.o_proj"
NORM0 = "base_model.model.model.layers.0.input_layernorm"
DORA: dict[str, Any] = {"use_dora": True}
ALL: dict[str, Any] = {"bias": "all", "modules": ("q_proj", "o_proj")}
ONLY: dict[str, Any] = {"bias": "lora_only", "modules": ("q_proj", "o_proj")}

WRONG_VECTORS: list[tuple[dict[str, Any], Callable[[Tensors], object], str, str]] = [
    (DORA, _drop(f"{Q0}.lora_magnitude_vector"), f"{Q0}.lora_magnitude_vector", "missing"),
    (DORA, _put(f"{Q0}.lora_magnitude_vector", 15), "lora_magnitude_vector", "[15]"),
    (DORA, _put(f"{Q0}.lora_magnitude_vector", 16, 1), "lora_magnitude_vector", "[16, 1]"),
    (
        DORA,
        _put(f"{Q0}.lora_magnitude_vector.default.weight", 16),
        "lora_magnitude_vector",
        "stands twice",
    ),
    (DORA, _poke(f"{Q0}.lora_magnitude_vector", float("nan")), "lora_magnitude_vector", "NaN"),
    (DORA, _put(f"{Q0}.lora_B.bias", 16), "lora_B.bias", "lora_bias"),
    (DORA, _put(f"{Q0}.base_layer.bias", 16), f"{Q0}.base_layer.bias", "bias is 'none'"),
    ({"lora_bias": True}, _drop(f"{Q0}.lora_B.bias"), f"{Q0}.lora_B.bias", "missing"),
    ({"lora_bias": True}, _put(f"{Q0}.lora_B.bias", 4), f"{Q0}.lora_B.bias", "[4]"),
    ({"lora_bias": True}, _put(f"{Q0}.lora_A.bias", 4), f"{Q0}.lora_A.bias", "save it with that"),
    (ALL, _drop(f"{Q0}.base_layer.bias"), f"{Q0}.base_layer.bias", "missing"),
    (ALL, _drop(f"{Q0.replace('q_', 'k_')}.bias"), "k_proj.bias", "missing"),
    (ALL, _put(f"{Q0.replace('q_', 'k_')}.base_layer.bias", 8), "k_proj", "does not select"),
    (ALL, _put(f"{Q0}.base_layer.bias", 8), f"{Q0}.base_layer.bias", "[8]"),
    (ALL, _put(f"{Q0}.bias", 16), f"{Q0}.bias", "PEFT reads base_layer.bias"),
    (ALL, _put(f"{O0}.base_layer.bias", 16), f"{O0}.base_layer.bias", "has none in the base"),
    (ALL, _put(f"{NORM0}.bias", 16), f"{NORM0}.bias", "a linear that the base does not have"),
    (ALL, _put("base_model.model.lm_head.bias", 9), "lm_head.bias", "does not have"),
    (ONLY, _drop(f"{Q0}.base_layer.bias"), f"{Q0}.base_layer.bias", "missing"),
    (ONLY, _put(f"{Q0.replace('q_', 'k_')}.bias", 8), "k_proj.bias", "configuration's bias"),
    (ONLY, _poke(f"{Q0}.base_layer.bias", float("inf")), "base_layer.bias", "infinity"),
]


@pytest.mark.parametrize(("fields", "change", "name", "reason"), WRONG_VECTORS)
def test_a_wrong_gain_or_bias_is_refused_by_name(
    fields: dict[str, Any],
    change: Callable[[Tensors], object],
    name: str,
    reason: str,
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path / "right", sites=BIASED.sites, **fields)
    assert manifest_of(tmp_path / "right", BIASED).has_gain_or_bias
    message = refusal_of(
        write_adapter(tmp_path / "wrong", sites=BIASED.sites, change=change, **fields), BIASED
    )
    assert name in message
    assert reason in message


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_magnitudes_have_the_names_of_every_peft(suffix: str, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
            tensors[name + suffix] = tensors.pop(name)

    write_adapter(tmp_path, change=rename, use_dora=True)
    assert all(part.magnitude for part in manifest_of(tmp_path).slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_and_biases_count_in_the_size(dtype: torch.dtype, tmp_path: Path) -> None:
    """In float32, each padded to 64 bytes; a bias only where there is one to undo."""
    plain = write_adapter(tmp_path / "plain", modules=("q_proj", "o_proj"))
    both = write_adapter(
        tmp_path / "both",
        modules=("q_proj", "o_proj"),
        use_dora=True,
        bias="all",
        sites=BIASED.sites,
    )
    sizes = [manifest_of(x, BIASED).num_bytes(dtype.itemsize) for x in (plain, both)]
    gains, biases_of_qkv = 2 * 64, 64 + 2 * 64
    assert sizes[1] - sizes[0] == 2 * (gains + biases_of_qkv)
    assert blob_of(both, BIASED, dtype).num_bytes == sizes[1]


def test_a_tensor_that_the_configuration_does_not_select_is_refused(tmp_path: Path) -> None:
    message = refusal_of(write_adapter(tmp_path, layers_to_transform=[1]))
    assert "layers.0" in message
    assert "does not select" in message


def test_a_rank_other_than_the_configurations_is_refused(tmp_path: Path) -> None:
    message = refusal_of(write_adapter(tmp_path, rank=4, r=8))
    assert "[4, 16]" in message
    assert "[8, 16]" in message


def test_numbers_too_large_for_float16_are_refused_there_only(tmp_path: Path) -> None:
    write_adapter(tmp_path, change=_poke(f"{Q0}.lora_A.weight", 1e6))
    assert "do not fit float16" in refusal_of(tmp_path, dtype=torch.float16)
    assert blob_of(tmp_path, dtype=torch.bfloat16).num_bytes > 0


def test_integers_are_not_weights(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q0}.lora_A.weight"] = torch.ones(4, 16, dtype=torch.int32)

    assert "I32" in refusal_of(write_adapter(tmp_path, change=change))


# -- files that are refused -----------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    sites = SITES[1:2]
    write_adapter(tmp_path, 2, ("o_proj",), sites=sites)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    assert manifest_of(tmp_path, Base(sites)).slices
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert "truncated" in refusal_of(tmp_path, Base(sites))


def test_every_flipped_bit_is_refused_or_changes_the_revision(tmp_path: Path) -> None:
    sites = SITES[1:2]
    write_adapter(tmp_path, 1, ("o_proj",), sites=sites)
    file = tmp_path / "adapter_model.safetensors"
    whole = bytearray(file.read_bytes())
    revision = blob_of(tmp_path, Base(sites)).revision
    for bit in range(0, 8 * len(whole), 5):
        whole[bit // 8] ^= 1 << bit % 8
        file.write_bytes(whole)
        whole[bit // 8] ^= 1 << bit % 8
        try:
            assert blob_of(tmp_path, Base(sites)).revision != revision
        except AdapterInvalidError:
            continue


def test_a_pickle_by_another_name_is_not_opened_as_one(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert "really a safetensors file" in refusal_of(tmp_path)


def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path: Path) -> None:
    """As after a clone without it."""
    write_adapter(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13648688\n"
    (tmp_path / "adapter_model.safetensors").write_text(pointer)
    assert "git lfs pull" in refusal_of(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 4 * 1024 * 1024 + 1])
def test_a_huge_header_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    assert "header claims" in refusal_of(write_raw(tmp_path, b"{}", b"\0" * 100, length))


def _entry(start: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        ({"x": _entry(0, 8, [2]), "y": _entry(4, 12, [2])}, 12, "'y' overlaps"),
        ({"x": _entry(0, 8, [2]), "y": _entry(12, 20, [2])}, 20, "'y' leaves a gap"),
        ({"x": _entry(4, 12, [2])}, 12, "'x' leaves a gap"),
        ({"x": _entry(0, 8, [2])}, 12, "4 bytes follow"),
        ({"x": _entry(0, 8, [2])}, 4, "truncated"),
        ({"x": _entry(0, 8, [3])}, 8, "do not hold"),
        ({"x": _entry(0, 8, [2**61, 2**61])}, 8, "do not hold"),
        ({"x": _entry(0, 8, [2**64])}, 8, "shape"),
        ({"x": _entry(0, 8, [-2])}, 8, "shape"),
        ({"x": _entry(0, 8, [2.0])}, 8, "shape"),
        ({"x": _entry(0, 8, [1] * 9)}, 8, "shape"),
        ({"x": _entry(8, 0, [2])}, 8, "data_offsets"),
        ({"x": {**_entry(0, 8, [2]), "data_offsets": [0]}}, 8, "data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, "expected"),
        ({"x": {**_entry(0, 8, [2]), "more": 1}}, 8, "expected"),
        ({"x": [1]}, 8, "expected"),
        ({"x": _entry(0, 8, [1], "F64")}, 8, "F64"),
        ({"x": _entry(0, 8, [1], [])}, 8, "dtype"),  # pyright: ignore[reportArgumentType]
        ({"x" * 600: _entry(0, 8, [2])}, 8, "tensor name"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": [1]}, 0, "__metadata__"),
        ({f"t{i}": _entry(0, 0, [0]) for i in range(20_000)}, 0, "20000 tensors"),
    ],
)
def test_a_header_that_lies_is_refused(
    header: dict[str, Any], data: int, named: str, tmp_path: Path
) -> None:
    raw = json.dumps(header).encode()
    assert named in refusal_of(write_raw(tmp_path, raw, b"\0" * data))


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x":{},"x":{}}', "'x' stands twice"),
        (b'{"x":{"dtype":"F32","dtype":"F16"}}', "'dtype' stands twice"),
        (b'{"x":NaN}', "NaN"),
    ],
)
def test_a_damaged_header_is_refused(header: bytes, named: str, tmp_path: Path) -> None:
    assert named in refusal_of(write_raw(tmp_path, header))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_revision_is_of_the_bytes_that_were_parsed(name: str, tmp_path: Path) -> None:
    """Both were read a second time for the digest: one version's scale had the other's revision."""
    write_adapter(tmp_path, lora_alpha=16)
    before = blob_of(tmp_path)
    with opened(tmp_path) as fds:
        manifest = read_manifest(*fds, BASE)
        rewrite(tmp_path / name, (b'"lora_alpha": 16', b'"lora_alpha": 32'), KV)
        assert read_manifest(*fds, BASE).slices != manifest.slices
        blob = read_blob(fds[1], manifest, torch.float32)
    assert blob.revision == before.revision
    assert torch.equal(blob.data, before.data)
    assert blob_of(tmp_path).revision != before.revision


KV = (b"k_proj.lora_A", b"v_proj.lora_A")


def rewrite(file: Path, *swaps: tuple[bytes, bytes]) -> None:
    """In place, one for the other and back."""
    raw = file.read_bytes()
    for one, other in swaps:
        raw = raw.replace(one, b"<spare>").replace(other, one).replace(b"<spare>", other)
    with open(file, "r+b") as opened_file:
        opened_file.write(raw)


def test_numbers_are_read_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one's memory would be taken twice over while it is decoded."""
    write_adapter(tmp_path)
    whole = blob_of(tmp_path)
    tensor_bytes = [4 * numel for part in whole.manifest.slices for _, numel in part.chunks()]
    largest = max(tensor_bytes)
    sizes: list[int] = []
    preadv = os.preadv

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    for most_bytes in (2 * largest, largest // 8):
        sizes.clear()
        monkeypatch.setattr(blob_module, "BATCH_BYTES", most_bytes)
        piecemeal = blob_of(tmp_path)
        assert piecemeal.revision == whole.revision
        assert torch.equal(piecemeal.data, whole.data)
        assert largest // 8 < max(sizes) <= max(most_bytes, largest)
        assert sum(sizes) == sum(tensor_bytes)
    assert len(sizes) > len(whole.manifest.slices)


def test_metadata_and_padding_are_allowed(tmp_path: Path) -> None:
    folder = write_raw(tmp_path, json.dumps({"__metadata__": {"format": "pt"}}).encode() + b"   ")
    with opened(folder) as (_, weights_fd):
        raw = read_header_bytes(weights_fd)
        assert read_header(raw, os.fstat(weights_fd).st_size) == ()


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path, b"{}")
    assert "missing" in refusal_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(make_config(4, ("c_attn",))))
    assert "selects no module of the base" in refusal_of(tmp_path)
