"""What other trainers call the options: Ludwig's keys, Axolotl's, and some of other tools.

Every key is an alias (it sets one of our options, its value perhaps turned round), or is taken
with certain values alone and otherwise refused with the reason. A key that is not here and not an
option of ours is unknown. This module must not know the options' types.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lory_trainer.config_turns import (
    Values,
    adapter_kind,
    auto_as_none,
    base_model,
    bits_of,
    datasets,
    evaluation,
    init,
    input_features,
    optimizer,
    output_features,
    report_to,
    rl,
    schedule,
    steps_off,
    stop,
    target_linear,
    trainer_type,
    val_set_size,
    wandb,
)

Origin = Literal["Ludwig", "Axolotl", "others"]


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of one option."""

    path: str
    to: str
    origin: Origin
    turn: Callable[[Any], Any] = lambda value: value
    """The value as our option takes it."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Several:
    """A key that sets several options, or that must be looked into."""

    path: str
    origin: Origin
    read: Callable[[Any], Values]
    note: str


@dataclass(frozen=True, slots=True)
class Only:
    """A key that may have these values, which ask for nothing; any other is refused."""

    path: str
    origin: Origin
    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Noted:
    """A key that has no effect here, and of which the run says so."""

    path: str
    origin: Origin
    note: str


Key = Alias | Several | Only | Noted


_NO_BASE_CHANGE = "would change the base, which all adapters share"
_ONE_PROCESS = "one process trains; there is no distributed training here"
_SEE_EVAL = "is for `lory eval`"
_OFF = (None, False)

LUDWIG: tuple[Key, ...] = (
    Only("model_type", "Ludwig", ("llm",), "only llm is trained"),
    Alias("base_model", "base", "Ludwig", base_model, "Ludwig's presets too"),
    Several("input_features", "Ludwig", input_features, "without a template, the prompt"),
    Several("output_features", "Ludwig", output_features, "the answer's column and its prefix"),
    Alias("prompt.template", "template", "Ludwig"),
    Alias("prompt.chat", "chat", "Ludwig", note="ours, in Ludwig's place"),
    Only("prompt.task", "Ludwig", _OFF, "write the task into prompt.template"),
    Only(
        "prompt.retrieval", "Ludwig", (None, {}), "retrieve first; a column may hold what is found"
    ),
    Alias("generation.stop_sequences", "generation.stop", "others", stop),
    *(
        Only(f"generation.{name}", "Ludwig", values, "answers are sampled token by token")
        for name, values in (
            ("num_beams", (None, 1)),
            ("num_beam_groups", (None, 1)),
            ("penalty_alpha", _OFF),
            ("min_length", (None, 0)),
            ("use_cache", (None, True)),
        )
    ),
    Several("adapter.type", "Ludwig", adapter_kind, "lora"),
    Alias("adapter.r", "lora.r", "Ludwig"),
    Alias("adapter.alpha", "lora.alpha", "Ludwig"),
    Alias("adapter.dropout", "lora.dropout", "Ludwig"),
    Alias("adapter.target_modules", "lora.target_modules", "Ludwig"),
    Alias("adapter.use_rslora", "lora.use_rslora", "Ludwig"),
    Alias("adapter.use_dora", "lora.use_dora", "Ludwig"),
    Alias("adapter.init_lora_weights", "lora.init", "Ludwig", init),
    Alias("adapter.rank_pattern", "lora.rank_pattern", "Ludwig", lambda value: value or {}),
    Alias("adapter.alpha_pattern", "lora.alpha_pattern", "Ludwig", lambda value: value or {}),
    Alias("adapter.loraplus_lr_ratio", "lora.lora_plus_ratio", "Ludwig"),
    Alias("adapter.pretrained_adapter_weights", "lora.start_from", "Ludwig"),
    Only("adapter.bias_type", "Ludwig", (None, "none"), "biases are not trained"),
    Only(
        "adapter.postprocessor.merge_adapter_into_base_model",
        "Ludwig",
        _OFF,
        "an adapter is served beside the base, not merged into it",
    ),
    Noted("adapter.postprocessor.progressbar", "Ludwig", "there is no merging"),
    Alias("quantization.bnb_4bit_quant_type", "quantization.type", "Ludwig"),
    Alias("quantization.bnb_4bit_use_double_quant", "quantization.double", "Ludwig"),
    Alias("quantization.bnb_4bit_compute_dtype", "quantization.compute_dtype", "Ludwig"),
    Only("quantization.backend", "Ludwig", (None, "bitsandbytes"), "only bitsandbytes"),
    Only("quantization.mode", "Ludwig", _OFF, "only bitsandbytes quantizes; this is torchao's"),
    Only("quantization.qat", "Ludwig", _OFF, "the base is not trained"),
    Alias("preprocessing.global_max_sequence_length", "max_length", "Ludwig"),
    Alias("preprocessing.split.type", "split.type", "Ludwig"),
    Alias("preprocessing.split.probabilities", "split.probabilities", "Ludwig"),
    Alias("preprocessing.split.column", "split.column", "Ludwig"),
    Alias("preprocessing.max_rows", "max_rows", "others"),
    Only("preprocessing.sample_ratio", "Ludwig", (None, 1, 1.0), "give max_rows"),
    Only("preprocessing.sample_size", "Ludwig", _OFF, "give max_rows"),
    Only("preprocessing.oversample_minority", "Ludwig", _OFF, "repeat the rows in the data"),
    Only("preprocessing.undersample_majority", "Ludwig", _OFF, "leave the rows out of the data"),
    Alias("trainer.type", "method", "Ludwig", trainer_type),
    Alias("trainer.epochs", "epochs", "Ludwig"),
    Alias("trainer.train_steps", "max_steps", "Ludwig"),
    Alias("trainer.batch_size", "batch_size", "Ludwig"),
    Alias("trainer.eval_batch_size", "eval_batch_size", "Ludwig", auto_as_none),
    Alias(
        "trainer.gradient_accumulation_steps",
        "gradient_accumulation_steps",
        "Ludwig",
        auto_as_none,
        "auto: from effective_batch_size",
    ),
    Alias("trainer.effective_batch_size", "effective_batch_size", "Ludwig", auto_as_none),
    Alias("trainer.learning_rate", "learning_rate", "Ludwig"),
    Alias("trainer.learning_rate_scheduler.decay", "schedule", "Ludwig", schedule),
    Alias("trainer.learning_rate_scheduler.warmup_fraction", "warmup_fraction", "Ludwig"),
    Alias("trainer.learning_rate_scheduler.eta_min", "learning_rate_min", "Ludwig"),
    Only(
        "trainer.learning_rate_scheduler.warmup_evaluations", "Ludwig", (None, 0), "give a fraction"
    ),
    Only(
        "trainer.learning_rate_scheduler.reduce_on_plateau",
        "Ludwig",
        (None, 0),
        "the schedule is known before the run, so that a run can be resumed; use early_stop",
    ),
    Only(
        "trainer.learning_rate_scaling",
        "Ludwig",
        (None, "constant", "linear", "sqrt"),
        _ONE_PROCESS,
    ),
    Alias("trainer.optimizer.type", "optimizer", "Ludwig", optimizer),
    Alias("trainer.optimizer.betas", "betas", "Ludwig"),
    Alias("trainer.optimizer.eps", "epsilon", "Ludwig"),
    Alias("trainer.optimizer.weight_decay", "weight_decay", "Ludwig"),
    Only("trainer.optimizer.amsgrad", "Ludwig", _OFF, "plain AdamW is what there is"),
    Alias("trainer.gradient_clipping.clipglobalnorm", "max_gradient_norm", "Ludwig"),
    Only("trainer.gradient_clipping.clipnorm", "Ludwig", _OFF, "give clipglobalnorm"),
    Only("trainer.gradient_clipping.clipvalue", "Ludwig", _OFF, "give clipglobalnorm"),
    Alias("trainer.enable_gradient_checkpointing", "gradient_checkpointing", "Ludwig"),
    Only(
        "trainer.use_mixed_precision",
        "Ludwig",
        (None, True, False),
        "the base keeps its own precision, the adapter float32",
    ),
    Only("trainer.compile", "Ludwig", _OFF, "is not compiled"),
    Only("trainer.regularization_lambda", "Ludwig", (None, 0, 0.0), "use weight_decay"),
    Only("trainer.should_shuffle", "Ludwig", (None, True), "rows are shuffled by the seed"),
    Only("trainer.skip_all_evaluation", "Ludwig", _OFF, "without split or eval_data there is none"),
    Only("trainer.evaluate_training_set", "Ludwig", _OFF, "each step's loss is told already"),
    Alias("trainer.early_stop", "early_stop", "Ludwig", steps_off),
    Alias("trainer.steps_per_checkpoint", "checkpoint_steps", "Ludwig"),
    Only("trainer.checkpoints_per_epoch", "Ludwig", (None, 0), "give steps_per_checkpoint"),
    Alias("trainer.eval_steps", "eval_steps", "Ludwig", steps_off),
    Alias("trainer.dpo_beta", "dpo.beta", "Ludwig"),
    Alias("trainer.dpo_loss_type", "dpo.loss", "Ludwig"),
    Alias("trainer.dpo_label_smoothing", "dpo.label_smoothing", "Ludwig"),
    Alias("trainer.dpo_sft_weight", "dpo.sft_weight", "others"),
    Alias("trainer.rejected_column", "rejected", "Ludwig"),
    Alias("trainer.seed", "seed", "others"),
    Alias("random_seed", "seed", "Ludwig"),
    Alias("model_parameters.neftune_noise_alpha", "neftune_noise_alpha", "Ludwig"),
    Only("model_parameters.rope_scaling", "Ludwig", (None, {}), _NO_BASE_CHANGE),
    Only("trust_remote_code", "Ludwig", _OFF, "code that comes with a model is never run"),
    Only("is_multimodal", "Ludwig", _OFF, "only text is trained on"),
    Only("hyperopt", "Ludwig", (None, {}), "one run is trained; start several"),
    Only("defaults", "Ludwig", (None, {}), "give each feature's options at the feature"),
    Only("backend", "Ludwig", (None, "local", {"type": "local"}), _ONE_PROCESS),
    Noted("ludwig_version", "Ludwig", "configurations are read by their keys"),
    Alias("adapter_id", "name", "others"),
    Several("evaluation", "others", evaluation, "checked, and read by `lory eval --config`"),
    Alias("dataset", "data", "others"),
)

AXOLOTL: tuple[Key, ...] = (
    Several("adapter", "Axolotl", adapter_kind, "lora, or qlora"),
    Alias("lora_r", "lora.r", "Axolotl"),
    Alias("lora_alpha", "lora.alpha", "Axolotl"),
    Alias("lora_dropout", "lora.dropout", "Axolotl"),
    Alias("lora_target_modules", "lora.target_modules", "Axolotl"),
    Several("lora_target_linear", "Axolotl", target_linear, "true: all-linear"),
    Alias("lora_model_dir", "lora.start_from", "Axolotl"),
    Alias("peft_use_rslora", "lora.use_rslora", "Axolotl"),
    Alias("peft_use_dora", "lora.use_dora", "Axolotl"),
    Alias("peft_init_lora_weights", "lora.init", "Axolotl", init),
    Alias("lora_rank_pattern", "lora.rank_pattern", "Axolotl"),
    Alias("lora_alpha_pattern", "lora.alpha_pattern", "Axolotl"),
    Alias("loraplus_lr_ratio", "lora.lora_plus_ratio", "Axolotl"),
    Only(
        "lora_modules_to_save", "Axolotl", (None, []), "whole modules are not trained, LoRA alone"
    ),
    Only("merge_lora", "Axolotl", _OFF, "an adapter is served beside the base"),
    Several("load_in_4bit", "Axolotl", bits_of(4), "true: quantization.bits 4"),
    Several("load_in_8bit", "Axolotl", bits_of(8), "true: quantization.bits 8"),
    Several(
        "datasets", "Axolotl", datasets, "one: its path; type alpaca, completion, chat_template"
    ),
    Several("val_set_size", "Axolotl", val_set_size, "a share held out to evaluate on"),
    Only(
        "dataset_prepared_path", "Axolotl", (None, "last_run_prepared"), "rows are read each time"
    ),
    Alias("output_dir", "output", "Axolotl"),
    Alias("sequence_len", "max_length", "Axolotl"),
    Alias("sample_packing", "packing", "Axolotl"),
    Noted("pad_to_sequence_len", "Axolotl", "rows are padded to the longest of their batch"),
    Noted("flash_attention", "Axolotl", "transformers chooses the attention"),
    Only("bf16", "Axolotl", (None, True, False, "auto"), "give dtype"),
    Only("fp16", "Axolotl", _OFF, "give dtype"),
    Only("tf32", "Axolotl", _OFF, "is not set"),
    Only("strict", "Axolotl", (None, True, False), "unknown keys are always refused"),
    Only("train_on_inputs", "Axolotl", (None, False), "give train_on_prompt: true"),
    Only(
        "chat_template",
        "Axolotl",
        (None, "tokenizer_default"),
        "the base's own is used: chat: true",
    ),
    Alias("micro_batch_size", "batch_size", "Axolotl"),
    Alias("num_epochs", "epochs", "Axolotl"),
    Alias("lr_scheduler", "schedule", "Axolotl", schedule),
    Alias("warmup_ratio", "warmup_fraction", "Axolotl"),
    Alias("max_grad_norm", "max_gradient_norm", "Axolotl"),
    Alias("adam_epsilon", "epsilon", "Axolotl"),
    Alias("early_stopping_patience", "early_stop", "Axolotl", steps_off),
    Alias("save_steps", "checkpoint_steps", "Axolotl"),
    Alias("save_total_limit", "keep_checkpoints", "Axolotl"),
    Several("rl", "Axolotl", rl, "dpo or ipo"),
    Alias("rl_beta", "dpo.beta", "Axolotl"),
    Alias("dpo_beta", "dpo.beta", "Axolotl"),
    Several("wandb_project", "Axolotl", wandb, "tracking by wandb"),
    Alias("wandb_name", "tracking.run_name", "Axolotl"),
    Only("deepspeed", "Axolotl", _OFF, _ONE_PROCESS),
    Only("fsdp", "Axolotl", (None, []), _ONE_PROCESS),
    Noted("logging_steps", "Axolotl", "every step is told"),
    Only("special_tokens", "Axolotl", (None, {}), _NO_BASE_CHANGE),
    Only("resize_token_embeddings_to_32x", "Axolotl", _OFF, _NO_BASE_CHANGE),
)

OTHERS: tuple[Key, ...] = (
    Alias("model", "base", "others"),
    Alias("model_name_or_path", "base", "others"),
    Alias("train_file", "data", "others"),
    Alias("training_file", "data", "others"),
    Alias("validation_file", "eval_data", "others"),
    Alias("lora_rank", "lora.r", "others"),
    Alias("rank", "lora.r", "others"),
    Alias(
        "lora_target", "lora.target_modules", "others", lambda v: "all-linear" if v == "all" else v
    ),
    Alias("target_modules", "lora.target_modules", "others"),
    Alias("use_rslora", "lora.use_rslora", "others"),
    Alias("use_dora", "lora.use_dora", "others"),
    Alias("quantization_bit", "quantization.bits", "others"),
    Alias("cutoff_len", "max_length", "others"),
    Alias("max_samples", "max_rows", "others"),
    Alias("num_train_epochs", "epochs", "others"),
    Alias("n_epochs", "epochs", "others"),
    Alias("train_steps", "max_steps", "others"),
    Alias("per_device_train_batch_size", "batch_size", "others"),
    Alias("per_device_eval_batch_size", "eval_batch_size", "others"),
    Alias("lr_scheduler_type", "schedule", "others", schedule),
    Alias("pref_beta", "dpo.beta", "others"),
    Alias("report_to", "tracking.to", "others", report_to),
    Alias("run_name", "tracking.run_name", "others"),
    Only("hub_token", "others", (None,), "a token is never read from a file; set HF_TOKEN"),
)

KEYS: dict[str, Key] = {key.path: key for key in (*LUDWIG, *AXOLOTL, *OTHERS)}

OWN_TURNS: dict[str, Callable[[Any], Any]] = {
    "optimizer": optimizer,
    "gradient_accumulation_steps": auto_as_none,
    "generation.stop": stop,
    "max_steps": lambda value: None if value == -1 else value,
}
"""Our own names whose values other tools write in other ways."""
