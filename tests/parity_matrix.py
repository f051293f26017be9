"""PEFT's LoRA, feature by feature: what is served exactly, what is refused, what changes nothing.

`test_parity_matrix` keeps it honest and `parity_table` writes it into docs/adapters.md. A row that
is served names the test that compares it with PEFT, and the adapter there that has it; all adapters
of such a test run in one batch. A row that is refused has a configuration, and what its error says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["served", "refused", "without effect"]


@dataclass(frozen=True, slots=True)
class Proof:
    """A test, and the adapter or case in its file that is meant."""

    test: str
    """module::function."""
    case: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    feature: str
    fields: tuple[str, ...]
    """Of LoraConfig."""
    outcome: Outcome
    example: Mapping[str, Any] = field(default_factory=dict)
    """Fields that show it, over those of a plain adapter."""
    says: str = ""
    """A refusal, in part."""
    proofs: tuple[Proof, ...] = ()


def _served(feature: str, fields: str, example: Mapping[str, Any], *proofs: tuple[str, str]) -> Row:
    return Row(
        feature,
        tuple(fields.split()),
        "served",
        example,
        proofs=tuple(Proof(*proof) for proof in proofs),
    )


def _refused(
    feature: str, fields: str, example: Mapping[str, Any], says: str, proof: str = ""
) -> Row:
    """With a proof: the configuration alone does not tell, and the proof has what does."""
    proofs = (Proof(proof),) if proof else ()
    return Row(feature, tuple(fields.split()), "refused", example, says, proofs)


def _idle(feature: str, example: Mapping[str, Any]) -> Row:
    return Row(feature, tuple(example), "without effect", example)


_MIX, _MIX_NF4 = "test_engine_parity::test_float32", "test_engine_parity::test_nf4"
_ENDS, _ENDS_NF4 = "test_engine_parity_ends::test_float32", "test_engine_parity_ends::test_nf4"
_FULL = "test_adapter_full_format::test_what_does_not_belong_together_is_refused_by_name"
_DORA, _DORA_NF4 = "test_engine_parity_dora::test_float32", "test_engine_parity_dora::test_nf4"
_ALORA, _ALORA_NF4 = "test_engine_parity_alora::test_float32", "test_engine_parity_alora::test_nf4"
_PACKED, _PACKED_NF4 = (
    "test_engine_parity_packed::test_float32",
    "test_engine_parity_packed::test_nf4",
)
_FORMS = "test_engine_parity_forms::test_float32"
_SELECTION = "test_adapter_selection::test_any_patterns_choose_what_they_choose_in_peft"
_WAY_OUT = "path_initial_model_for_weight_conversion"
_INVOKED = {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}

SERVED = (
    _served("LoRA, ranks 1 to 256", "r lora_alpha peft_type", {"r": 4},
            (_MIX, "all-16"), (_MIX_NF4, "last-256")),
    _served("rsLoRA", "use_rslora", {"use_rslora": True}, (_MIX, "mlp-3"), (_MIX_NF4, "mlp-3")),
    _served("targets by names, regular expression or `all-linear`", "target_modules",
            {"target_modules": "all-linear"},
            (_SELECTION, ""), (_MIX, "team/regex-64"), (_MIX_NF4, "linear-8")),
    _served("ranks and alphas by module", "rank_pattern alpha_pattern",
            {"rank_pattern": {"down_proj": 2}},
            (_SELECTION, ""), (_MIX, "team/pattern"), (_MIX_NF4, "team/pattern")),
    _served("some layers only", "layers_to_transform layers_pattern", {"layers_to_transform": [1]},
            (_SELECTION, ""), (_MIX, "last-256"), (_MIX_NF4, "last-256")),
    _served("modules left out", "exclude_modules", {"exclude_modules": ["1.mlp.up_proj"]},
            (_SELECTION, ""), (_PACKED, "one-layer"), (_PACKED_NF4, "one-layer")),
    _served("tensors in float32, bfloat16, float16", "", {},
            (_MIX, "attention-33"), (_MIX, "last-256")),
    _served("DoRA", "use_dora", {"use_dora": True},
            (_DORA, "dora-8"), (_DORA_NF4, "dora-8"), (_DORA, "dora-pattern")),
    _served("trained biases of linears", "bias", {"bias": "all"},
            (_DORA, "bias-all"), (_DORA_NF4, "bias-all"), (_DORA, "dora-bias")),
    _served("biases on B", "lora_bias", {"lora_bias": True},
            (_DORA, "lora-bias"), (_DORA_NF4, "lora-bias")),
    _served("aLoRA; its prefix shares the base's KV", "alora_invocation_tokens", _INVOKED,
            (_ALORA, "alora-8"), (_ALORA_NF4, "alora-8"),
            ("test_engine_parity_alora::test_generate_of_peft_gives_the_same_answers", "")),
    _served("aLoRA with rsLoRA, patterns, biases on B", "alora_invocation_tokens", _INVOKED,
            (_ALORA, "alora-16"), (_ALORA, "alora-pattern"), (_ALORA, "alora-bias")),
    _served("packed checkpoints (`qkv_proj`, `gate_up_proj`): LoRA, rsLoRA, patterns, biases on B",
            "target_modules", {}, (_PACKED, "pattern"), (_PACKED, "rslora"),
            (_PACKED, "lora-bias"), (_PACKED_NF4, "pattern")),
    _served("packed checkpoints: DoRA", "use_dora", {"use_dora": True},
            (_PACKED, "dora-linear-pattern"), (_PACKED_NF4, "dora")),
    *(_served(f"begun as {name}", "init_lora_weights", {"init_lora_weights": init}, (_FORMS, case))
      for name, init, case in (
          ("Kaiming", True, "default"), ("random A and B", False, "random-b"),
          ("Gaussian", "gaussian", "gaussian"), ("orthogonal", "orthogonal", "orthogonal"),
          ("EVA", "eva", "eva"), ("MiCA", "mica", "mica"))),
    _served("PiSSA and OLoRA (as CorDA and LoRA-GA), converted by PEFT", "init_lora_weights",
            {"init_lora_weights": True}, (_FORMS, "pissa"), (_FORMS, "olora-rs")),
    _served("LoRA on `lm_head`", "target_modules", {"target_modules": ["lm_head"]},
            (_ENDS, "head-alone"), (_ENDS_NF4, "head-lora")),
    _served("LoRA on `embed_tokens`", "target_modules", {"target_modules": ["embed_tokens"]},
            (_ENDS, "embed-lora"), (_ENDS_NF4, "both-lora")),
    _served("DoRA on `lm_head` and `embed_tokens`", "use_dora", {"use_dora": True},
            (_ENDS, "head-dora"), (_ENDS_NF4, "embed-dora")),
    _served("whole `lm_head`, `embed_tokens`", "modules_to_save", {"modules_to_save": ["lm_head"]},
            (_ENDS, "both"), (_ENDS_NF4, "head-and-lora")),
    _served("a vocabulary of its own size, with its tokenizer", "modules_to_save",
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            ("test_own_vocabulary::test_float32", "grown")),
    _served("norms of its own", "modules_to_save", {"modules_to_save": ["norm"]},
            (_ENDS, "all-norms"), (_ENDS_NF4, "norms-and-head")),
    _served("trained tokens, in the embedding, the head or both", "trainable_token_indices",
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            (_ENDS, "both-tokens"), (_ENDS_NF4, "tokens-and-head-lora")),
    _served("ends tied as the base's are", "ensure_weight_tying", {"ensure_weight_tying": True},
            (_ENDS, "tied-lora"), (_ENDS_NF4, "tied-embed")),
)  # fmt: skip

REFUSED = (
    *(_refused(f"{name}, not converted", "init_lora_weights", {"init_lora_weights": init}, _WAY_OUT)
      for name, init in (("PiSSA", "pissa"), ("PiSSA by fast SVD", "pissa_niter_16"),
                         ("OLoRA", "olora"), ("CorDA", "corda"), ("LoRA-GA", "lora_ga"))),
    _refused("LoftQ by `init_lora_weights`", "init_lora_weights", {"init_lora_weights": "loftq"},
             "replace_lora_weights_loftq"),
    _refused("whole linears (`q_proj`, `mlp`)", "modules_to_save", {"modules_to_save": ["q_proj"]},
             "train LoRA", _FULL),
    _refused("a vocabulary of its own size at one end, or without a tokenizer", "modules_to_save",
             {"modules_to_save": ["lm_head"]}, "tokens, the base", _FULL),
    _refused("names of another kind of checkpoint (`q_proj` where it is packed, or the reverse)",
             "target_modules", {}, "packs q_proj into qkv_proj",
             "test_engine_parity_packed::"
             "test_names_of_the_other_kind_of_checkpoint_are_refused"),
    _refused("aLoRA with DoRA or MiCA (PEFT refuses both)", "alora_invocation_tokens use_dora",
             {**_INVOKED, "use_dora": True}, "goes neither with use_dora nor with MiCA"),
    _refused("aLoRA with trained biases of linears", "alora_invocation_tokens bias", {},
             "acts before the invocation tokens, too",
             "test_adapter_format::test_a_trained_bias_acts_before_any_invocation"),
    _refused("DoRA with biases on B (PEFT refuses it)", "use_dora lora_bias",
             {"use_dora": True, "lora_bias": True}, "which PEFT itself refuses"),
    _refused("LoRA on bare parameters", "target_parameters", {"target_parameters": ["w"]},
             "LoRA on bare parameters is not served"),
    _refused("replicated layers", "layer_replication", {"layer_replication": [[0, 1]]},
             "replicated layers are not served"),
    _refused("Megatron layers", "megatron_config", {"megatron_config": {"a": 1}},
             "Megatron layers are not served"),
    _refused("Arrow routing", "arrow_config", {"arrow_config": {"top_k": 3}},
             "routing among adapters is not served"),
    _refused("KaSA", "kasa_config", {"kasa_config": {"beta": 0.1}}, "KaSA takes a part out"),
    _refused("MonteCLoRA", "monteclora_config", {"monteclora_config": {"num_samples": 8}},
             "MonteCLoRA is not served"),
    _refused("BD-LoRA", "use_bdlora", {"use_bdlora": {"nblocks": 2}},
             "block-diagonal LoRA is not served"),
    _refused("QA-LoRA", "use_qalora", {"use_qalora": True}, "QA-LoRA is of GPTQ bases"),
    _refused("VeLoRA", "velora_config", {"velora_config": {"num_groups": 4}},
             "VeLoRA is not served"),
    _refused("adapters that are not LoRA (VeRA, IA3, LoHa, LoKr, prompt tuning, ...)", "peft_type",
             {"peft_type": "VERA"}, "only LORA is served"),
    _refused("other tasks than causal language models", "task_type", {"task_type": "SEQ_CLS"},
             "only CAUSAL_LM is served"),
)  # fmt: skip

WITHOUT_EFFECT = (
    _idle("dropout, of training alone", {"lora_dropout": 0.1}),
    _idle("how A and B began", {
        "eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "ipm"},
        "lora_ga_config": {"scale": "stable"}, "loftq_config": {"loftq_bits": 4}}),
    _idle("orientation of Conv1D; PEFT sets it to false for linears", {"fan_in_fan_out": True}),
    _idle("companions of fields that are off", {
        "megatron_core": "megatron.core", "qalora_group_size": 16}),
    _idle("what a file says of itself", {
        "auto_mapping": {"parent_library": "x"}, "inference_mode": True, "peft_version": "0.21.2",
        "revision": "main", "runtime_config": {"ephemeral_gpu_offload": False}}),
    _idle("the base's name; another name than the served one's is refused",
          {"base_model_name_or_path": "org/base"}),
)  # fmt: skip

ROWS = (*SERVED, *REFUSED, *WITHOUT_EFFECT)
