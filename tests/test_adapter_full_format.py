"""Embeddings, heads and norms of an adapter's own: what is accepted, what is refused, by name."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapter_files import HIDDEN, SITES, make_config, make_tensors
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.format import NO_FILES, AdapterManifest, Base, read_manifest
from lory_server.adapters.merge_plan import plan_merge
from lory_server.adapters.tokenizer_files import tokenizer_of
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE, Site, Slice
from lory_server.recipes import MergeSource, Recipe

VOCAB = 9
ENDS = (
    Site("head", HIDDEN, (Slice(HEAD_MODULE, 0, VOCAB),)),
    Site("embedding", VOCAB, (Slice(EMBEDDING_MODULE, 0, HIDDEN),)),
)
NORMS = (("model.layers.0.input_layernorm", HIDDEN), ("model.norm", HIDDEN))
UNTIED = Base((*SITES, *ENDS), norms=NORMS)
TIED = Base((*SITES, *ENDS), norms=NORMS, tied_head=True)
HEAD = "base_model.model.lm_head"
EMBED = "base_model.model.model.embed_tokens"
DELTA = "token_adapter.trainable_tokens_delta"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
FULL = (VOCAB, HIDDEN)

Shapes = dict[str, tuple[int, ...]]


def manifest_of(
    folder: Path,
    shapes: Shapes,
    base: Base = UNTIED,
    tokenizer_fds: Mapping[str, int] = NO_FILES,
    **fields: Any,
) -> AdapterManifest:
    """Of an adapter with LoRA on q_proj and zeros of such shapes."""
    tensors = make_tensors(4, ("q_proj",)) | {name: torch.zeros(s) for name, s in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(make_config(4, ("q_proj",)) | fields))
    with (
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        return read_manifest(config.fileno(), weights.fileno(), base, tokenizer_fds)


def lora_head(rank: int = 4) -> Shapes:
    return {f"{HEAD}.lora_A.weight": (rank, HIDDEN), f"{HEAD}.lora_B.weight": (VOCAB, rank)}


def lora_embed(rank: int = 4) -> Shapes:
    return {f"{EMBED}.lora_embedding_A": (rank, VOCAB), f"{EMBED}.lora_embedding_B": (HIDDEN, rank)}


ON_HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
ON_EMBED: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize(
    "name", ["weight", "modules_to_save.weight", "modules_to_save.default.weight"]
)
def test_a_saved_module_is_read_under_each_of_its_names(name: str, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, {f"{HEAD}.{name}": FULL}, modules_to_save=["lm_head"])
    [weight] = manifest.full
    assert (weight.module, weight.token_ids, weight.is_tied) == (HEAD_MODULE, (), False)
    assert manifest.has_own_head
    assert manifest.head_params == VOCAB * HIDDEN
    assert not manifest.needs_base
    assert manifest.num_bytes(4) - manifest.pool_bytes(4) == VOCAB * HIDDEN * 4


def test_norm_is_every_module_whose_name_ends_so(tmp_path: Path) -> None:
    shapes: Shapes = {f"base_model.model.{module}.weight": (HIDDEN,) for module, _ in NORMS}
    manifest = manifest_of(tmp_path, shapes, modules_to_save=["norm"])
    assert [weight.module for weight in manifest.full] == [module for module, _ in NORMS]
    assert not manifest.has_own_head
    assert manifest.head_params == 0


def test_lora_on_an_end_may_come_with_the_base_s_own_weight(tmp_path: Path) -> None:
    shapes = lora_head() | {f"{HEAD}.base_layer.weight": FULL}
    for base in (UNTIED, TIED):
        manifest = manifest_of(tmp_path, shapes, base, **ON_HEAD)
        [weight] = manifest.full
        assert weight.may_be_base
        assert weight.is_tied is base.tied_head
        assert manifest.needs_base
        assert [part.rank for part in manifest.slices if part.site >= len(SITES)] == [4]


def test_a_column_of_the_embedding_s_a_is_a_token_s(tmp_path: Path) -> None:
    part = manifest_of(tmp_path, lora_embed(), **ON_EMBED).slices[-1]
    assert part.is_lookup
    assert part.a is not None
    assert part.a.shape == (4, VOCAB)
    assert part.out_features == HIDDEN


def test_factors_on_an_end_are_charged_as_what_they_add_to_a_step(tmp_path: Path) -> None:
    """Those on the embedding were charged as a product over the vocabulary for each token, those
    on the head to tokens of a prompt, too."""
    linears = manifest_of(tmp_path, {}).token_params
    assert linears == len(SITES) // 4 * 4 * (HIDDEN + HIDDEN)
    on_embed = manifest_of(tmp_path, lora_embed(), **ON_EMBED)
    assert on_embed.token_params == linears + 4 * (1 + HIDDEN)
    assert on_embed.head_params == 0
    on_head = manifest_of(tmp_path, lora_head(), **ON_HEAD)
    assert on_head.token_params == linears
    assert on_head.head_params == 4 * (HIDDEN + VOCAB)
    recipe = Recipe(sources=(MergeSource("x", 1.0), MergeSource("y", 1.0)))
    merged = plan_merge(recipe, [on_head] * 2)
    assert merged.manifest.head_params == 2 * on_head.head_params


def test_both_ends_whole_are_looked_at_for_being_one(tmp_path: Path) -> None:
    shapes: Shapes = {f"{HEAD}.weight": FULL, f"{EMBED}.weight": FULL}
    assert manifest_of(tmp_path, shapes, modules_to_save=["lm_head", "embed_tokens"]).needs_base


@pytest.mark.parametrize(
    ("base", "indices", "names", "tied"),
    [
        (UNTIED, [3, 1], [EMBED], False),
        (TIED, [3, 1], [EMBED], True),
        (TIED, {"embed_tokens": [3, 1], "lm_head": [3, 1]}, [EMBED], True),
        (TIED, {"lm_head": [3, 1]}, [HEAD], False),
        (TIED, {"embed_tokens": [3, 1], "lm_head": [0, 5]}, [EMBED, HEAD], False),
        (UNTIED, {"embed_tokens": [3, 1], "lm_head": [3, 1]}, [EMBED, HEAD], False),
    ],
)
def test_trained_tokens_are_of_both_ends_where_peft_ties_them(
    base: Base, indices: Any, names: list[str], tied: bool, tmp_path: Path
) -> None:
    shapes: Shapes = {f"{name}.{DELTA}": (2, HIDDEN) for name in names}
    manifest = manifest_of(tmp_path, shapes, base, trainable_token_indices=indices)
    assert {weight.is_tied for weight in manifest.full} == {tied}
    assert manifest.head_params == (2 * HIDDEN if tied or HEAD in names else 0)
    assert len(manifest.full) == len(names)
    assert not manifest.has_own_head


REFUSED: list[tuple[Shapes, dict[str, Any], str, str]] = [
    ({}, {"modules_to_save": ["lm_head"]}, f"{HEAD}.weight", "missing"),
    ({}, {"modules_to_save": ["norm"]}, "input_layernorm.weight", "missing"),
    ({}, ON_HEAD, f"{HEAD}.lora_A.weight", "missing"),
    ({}, ON_EMBED, f"{EMBED}.lora_embedding_A", "missing"),
    ({}, {"trainable_token_indices": [1]}, f"{EMBED}.{DELTA}", "missing"),
    (lora_head(), {}, HEAD, "target_modules does not select"),
    (lora_embed(), {}, EMBED, "target_modules does not select"),
    (
        lora_head(),
        {
            "target_modules": "all-linear",
            "exclude_modules": r".*(k|v|o|up|down|gate)_proj",
        },
        HEAD,
        "target_modules does not select",
    ),
    (
        lora_head() | {f"{HEAD}.weight": FULL},
        ON_HEAD | {"modules_to_save": ["lm_head"]},
        f"{HEAD}.lora_A.weight",
        "does not select",
    ),
    (lora_head() | {f"{HEAD}.weight": FULL}, ON_HEAD, f"{HEAD}.weight", "base_layer.weight"),
    ({f"{HEAD}.base_layer.weight": FULL}, {}, "base_layer.weight", "does not select"),
    ({f"{Q0}.weight": (HIDDEN, HIDDEN)}, {"modules_to_save": ["q_proj"]}, "q_proj", "train LoRA"),
    ({f"{Q0}.weight": (HIDDEN, HIDDEN)}, {"modules_to_save": ["mlp"]}, "q_proj", "train LoRA"),
    ({"base_model.model.model.norm.weight": (HIDDEN,)}, {}, "model.norm", "does not name"),
    (
        {"base_model.model.model.norm.weight": (HIDDEN + 1,)},
        {"modules_to_save": ["model.norm"]},
        "model.norm",
        f"[{HIDDEN}]",
    ),
    (
        {f"{HEAD}.weight": (VOCAB + 2, HIDDEN)},
        {"modules_to_save": ["lm_head"]},
        f"{HEAD}.weight",
        f"{VOCAB + 2} tokens, the base {VOCAB}",
    ),
    ({f"{EMBED}.weight": (VOCAB - 1, HIDDEN)}, {}, f"{EMBED}.weight", "vocabulary"),
    (
        {f"{HEAD}.weight": (VOCAB, HIDDEN + 1)},
        {"modules_to_save": ["lm_head"]},
        f"{HEAD}.weight",
        f"[{VOCAB}, {HIDDEN}]",
    ),
    ({f"{EMBED}.{DELTA}": (1, HIDDEN)}, {}, DELTA, "does not name"),
    (
        {f"{EMBED}.{DELTA}": (3, HIDDEN)},
        {"trainable_token_indices": [1, 2]},
        DELTA,
        f"[2, {HIDDEN}]",
    ),
    (
        {f"{EMBED}.{DELTA}": (1, HIDDEN)},
        {"trainable_token_indices": [VOCAB]},
        DELTA,
        f"token {VOCAB}, the base has {VOCAB}",
    ),
    (
        lora_embed() | {f"{EMBED}.lora_A.weight": (4, VOCAB)},
        ON_EMBED,
        f"{EMBED}.lora_A.weight",
        "embedding",
    ),
]


@pytest.mark.parametrize(("shapes", "fields", "name", "reason"), REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(
    shapes: Shapes, fields: dict[str, Any], name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterInvalidError) as refusal:
        manifest_of(tmp_path, shapes, **fields)
    assert name in str(refusal.value)
    assert reason in str(refusal.value)


def test_a_saved_module_that_the_base_does_not_have_changes_nothing(tmp_path: Path) -> None:
    """As in PEFT, whose lists of modules are often one for many models."""
    assert manifest_of(tmp_path, {}, modules_to_save=["classifier", "score"]).full == ()


@pytest.mark.parametrize(
    ("shapes", "fields", "says"),
    [
        ({f"{HEAD}.weight": FULL}, {"modules_to_save": ["lm_head"]}, "has a whole embedding, head"),
        ({f"{EMBED}.{DELTA}": (1, HIDDEN)}, {"trainable_token_indices": [1]}, "token rows"),
        (lora_embed(), ON_EMBED, "changes the embedding"),
    ],
)
def test_adapters_with_more_than_linear_factors_are_not_merged(
    shapes: Shapes, fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    manifest = manifest_of(tmp_path, shapes, **fields)
    recipe = Recipe(sources=(MergeSource("x", 1.0), MergeSource("y", 1.0)))
    with pytest.raises(AdapterInvalidError, match=says):
        plan_merge(recipe, [manifest, manifest])


# -- vocabularies of another size -----------------------------------------------------------

OWN: Shapes = {f"{end}.weight": (VOCAB + 3, HIDDEN) for end in (HEAD, EMBED)}
SAVED: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
TOKENIZER = {"added_tokens": [], "model": {"vocab": {"a": 0, "b": VOCAB + 2}}}


def manifest_with_tokenizer(
    folder: Path, shapes: Shapes, tokenizer: Any = TOKENIZER, **fields: Any
) -> AdapterManifest:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    with path.open("rb") as file:
        return manifest_of(folder, shapes, tokenizer_fds={path.name: file.fileno()}, **fields)


@pytest.mark.parametrize("copies", [(), ("modules_to_save.weight", "original_module.weight")])
def test_both_ends_of_another_size_are_taken_with_a_tokenizer(
    tmp_path: Path, copies: tuple[str, ...]
) -> None:
    """And what PEFT writes of them twice more is passed over."""
    more = {f"{end}.{copy}": (VOCAB + 3, HIDDEN) for end in (HEAD, EMBED) for copy in copies}
    manifest = manifest_with_tokenizer(tmp_path, OWN | more, **SAVED)
    assert manifest.vocab_size == VOCAB + 3
    assert manifest.tokenizer
    assert sorted(weight.spec.name for weight in manifest.full) == sorted(OWN)


@pytest.mark.parametrize(
    ("shapes", "fields", "says"),
    [
        ({f"{HEAD}.weight": (VOCAB + 3, HIDDEN)}, {}, "must both be saved, of one size"),
        (OWN | {f"{EMBED}.weight": FULL}, {}, "must both be saved, of one size"),
        (OWN | {f"{EMBED}.weight": (VOCAB + 2, HIDDEN)}, {}, "must both be saved, of one size"),
        (dict.fromkeys(OWN, (4097, HIDDEN)), SAVED, "an adapter may have 4096"),
        (dict.fromkeys(OWN, (0, HIDDEN)), SAVED, "is empty|an adapter may have 4096"),
        (OWN | lora_head(), ON_HEAD, "served whole alone"),
        (OWN | {f"{EMBED}.{DELTA}": (1, HIDDEN)}, {"trainable_token_indices": [2]}, "whole alone"),
        (OWN, {"trainable_token_indices": [2]}, "trainable_tokens_delta.* is missing"),
        (OWN | {f"{HEAD}.original_module.weight": FULL}, SAVED, "original_module.* has shape"),
        ({f"{HEAD}.original_module.weight": FULL}, {}, "no weight that it is a copy of"),
    ],
)
def test_other_vocabularies_are_refused_by_name(
    tmp_path: Path, shapes: Shapes, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(AdapterInvalidError, match=says):
        manifest_with_tokenizer(tmp_path, shapes, **fields)


def test_a_vocabulary_of_its_own_size_takes_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalidError, match="has 12 tokens, the base 9: save its tokenizer"):
        manifest_of(tmp_path, OWN, **SAVED)


def test_a_token_beyond_the_adapter_s_own_embedding_is_refused(tmp_path: Path) -> None:
    beyond = TOKENIZER | {"added_tokens": [{"id": VOCAB + 3, "content": "x"}]}
    says = "has a token 12, the adapter's own embedding has 12 tokens"
    with pytest.raises(AdapterInvalidError, match=says):
        manifest_with_tokenizer(tmp_path, OWN, beyond, **SAVED)


def test_a_tokenizer_that_could_run_for_ever_refuses_its_adapter(tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    cutting = TOKENIZER | {"pre_tokenizer": pattern}
    with pytest.raises(AdapterInvalidError, match="pre_tokenizer has a step 'Split'"):
        manifest_with_tokenizer(tmp_path, {}, cutting)
    base = replace(UNTIED, tokenizer=tokenizer_of({"tokenizer.json": json.dumps(cutting).encode()}))
    own = cutting | {"added_tokens": [{"id": 3, "content": "x"}]}
    assert manifest_with_tokenizer(tmp_path, {}, own, base=base).tokenizer
