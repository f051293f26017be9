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
    model_type,
    optimizer,
    output_features,
    pair_loss,
    report_to,
    rl,
    schedule,
    special_tokens,
    stage,
    steps_off,
    stop,
    target_linear,
    target_modules,
    task,
    test_datasets,
    tracker,
    trainer_type,
    val_set_size,
    wandb,
    whole,
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
_LORA_ALONE = "whole modules are not trained, LoRA alone"
_BY_PATH = "write target_modules as one regular expression over module paths"
_PEFTS = {
    "modules_to_save": _LORA_ALONE,
    "trainable_token_indices": _LORA_ALONE,
    "bias": "biases are not trained",
    "layers_to_transform": _BY_PATH,
    "exclude_modules": _BY_PATH,
    "alora_invocation_tokens": "an aLoRA of others is served, and none is trained",
}
"""What PEFT's configuration has, and ours has not."""

LUDWIG: tuple[Key, ...] = (
    Several("model_type", "Ludwig", model_type, "llm; Axolotl's names of classes"),
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
            ("num_return_sequences", (None, 1)),
            ("no_repeat_ngram_size", (None, 0)),
        )
    ),
    Only("generation.max_length", "Ludwig", (None,), "give max_new_tokens"),
    Only("adapters", "Ludwig", (None, {}), "one adapter is trained in a run; give adapter"),
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
    *(
        Only(
            f"trainer.learning_rate_scheduler.{name}", "Ludwig", values, "decay is linear or cosine"
        )
        for name, values in (
            ("decay_rate", (None, 0.96)),
            ("decay_steps", (None, 10000)),
            ("staircase", _OFF),
        )
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
    Noted(
        "trainer.use_mixed_precision",
        "Ludwig",
        "the base keeps its own precision, the adapter float32",
    ),
    Only("trainer.compile", "Ludwig", _OFF, "is not compiled"),
    Only("trainer.regularization_lambda", "Ludwig", (None, 0, 0.0), "use weight_decay"),
    Only("trainer.should_shuffle", "Ludwig", (None, True), "rows are shuffled by the seed"),
    Only("trainer.skip_all_evaluation", "Ludwig", _OFF, "without split or eval_data there is none"),
    Only(
        "trainer.validation_metric",
        "Ludwig",
        (None, "loss", "perplexity"),
        "runs are compared by their loss; other metrics are for `lory eval`",
    ),
    Noted("trainer.validation_field", "Ludwig", "there is one answer"),
    Only("trainer.max_batch_size", "Ludwig", (None,), "give effective_batch_size"),
    Only("trainer.layers_to_freeze_regex", "Ludwig", (None,), "give target_modules"),
    Only("trainer.evaluate_training_set", "Ludwig", _OFF, "each step's loss is told already"),
    Alias("trainer.early_stop", "early_stop", "Ludwig", steps_off),
    Alias("trainer.steps_per_checkpoint", "checkpoint_steps", "Ludwig"),
    Only("trainer.checkpoints_per_epoch", "Ludwig", (None, 0), "give steps_per_checkpoint"),
    Alias("trainer.eval_steps", "eval_steps", "Ludwig", steps_off),
    Alias("trainer.dpo_beta", "dpo.beta", "Ludwig"),
    Alias("trainer.dpo_loss_type", "dpo.loss", "Ludwig", pair_loss),
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

_SPEED_ALONE = "changes speed alone"
_IN_ENVIRONMENT = "is read from the environment by the tracker's own package"

AXOLOTL: tuple[Key, ...] = (
    Several("adapter", "Axolotl", adapter_kind, "lora, or qlora"),
    Alias("lora_r", "lora.r", "Axolotl"),
    Alias("lora_alpha", "lora.alpha", "Axolotl"),
    Alias("lora_dropout", "lora.dropout", "Axolotl"),
    Alias("lora_target_modules", "lora.target_modules", "Axolotl", target_modules),
    Several("lora_target_linear", "Axolotl", target_linear, "true: all-linear"),
    Alias("lora_model_dir", "lora.start_from", "Axolotl"),
    Alias("peft_use_rslora", "lora.use_rslora", "Axolotl"),
    Alias("peft_use_dora", "lora.use_dora", "Axolotl"),
    Alias("peft_init_lora_weights", "lora.init", "Axolotl", init),
    Alias("lora_rank_pattern", "lora.rank_pattern", "Axolotl", lambda value: value or {}),
    Alias("lora_alpha_pattern", "lora.alpha_pattern", "Axolotl", lambda value: value or {}),
    Alias("loraplus_lr_ratio", "lora.lora_plus_ratio", "Axolotl"),
    Only("lora_modules_to_save", "Axolotl", (None, []), _LORA_ALONE),
    Only("peft_trainable_token_indices", "Axolotl", (None, [], {}), _LORA_ALONE),
    Only("lora_fan_in_fan_out", "Axolotl", _OFF, "linears of GPT-2's kind are not adapted"),
    Only("merge_lora", "Axolotl", _OFF, "an adapter is served beside the base"),
    Several("load_in_4bit", "Axolotl", bits_of(4), "true: quantization.bits 4"),
    Several("load_in_8bit", "Axolotl", bits_of(8), "true: quantization.bits 8"),
    Several(
        "datasets", "Axolotl", datasets, "one: its path; type alpaca, completion, chat_template"
    ),
    Several("test_datasets", "Axolotl", test_datasets, "one: rows to evaluate on"),
    Several("val_set_size", "Axolotl", val_set_size, "a share held out to evaluate on"),
    Only("pretraining_dataset", "Axolotl", (None,), "give data, and method: pretrain"),
    Noted("dataset_prepared_path", "Axolotl", "rows are read each time"),
    Noted("dataset_processes", "Axolotl", "rows are read each time"),
    Alias("output_dir", "output", "Axolotl"),
    Alias("sequence_len", "max_length", "Axolotl"),
    Alias("sample_packing", "packing", "Axolotl"),
    Noted("eval_sample_packing", "Axolotl", "held-out rows are asked one by one"),
    Noted("pad_to_sequence_len", "Axolotl", "rows are padded to the longest of their batch"),
    Noted("group_by_length", "Axolotl", "rows of like length are batched anyway"),
    *(
        Noted(name, "Axolotl", "transformers chooses the attention")
        for name in (
            "flash_attention",
            "sdp_attention",
            "xformers_attention",
            "attn_implementation",
            "flash_attn",
        )
    ),
    *(
        Noted(name, "Axolotl", _SPEED_ALONE)
        for name in (
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "cut_cross_entropy",
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_layer_norm",
            "liger_fused_linear_cross_entropy",
            "gradient_checkpointing_kwargs",
        )
    ),
    Only("plugins", "Axolotl", (None, []), "plugins are not loaded"),
    Noted("bf16", "Axolotl", "the base keeps its own precision; give dtype for another"),
    Only("fp16", "Axolotl", _OFF, "give dtype"),
    Noted("tf32", "Axolotl", "products keep the precision of what is multiplied"),
    Noted("strict", "Axolotl", "unknown keys are always refused"),
    Only("debug", "Axolotl", (None, False, ""), "--dry-run shows the rows and their masks"),
    Noted("tokenizer_type", "Axolotl", "the base's own tokenizer is read, as the server reads it"),
    Noted("is_llama_derived_model", "Axolotl", "the base's config.json says what it is"),
    Noted("is_mistral_derived_model", "Axolotl", "the base's config.json says what it is"),
    Only("train_on_inputs", "Axolotl", (None, False), "give train_on_prompt: true"),
    Only(
        "chat_template",
        "Axolotl",
        (None, "tokenizer_default"),
        "rows of messages go through the base's own, which is what the server uses; columns too, "
        "with chat: true",
    ),
    Alias("micro_batch_size", "batch_size", "Axolotl"),
    Alias("num_epochs", "epochs", "Axolotl", whole),
    Alias("lr_scheduler", "schedule", "Axolotl", schedule),
    Alias("warmup_ratio", "warmup_fraction", "Axolotl"),
    Alias("max_grad_norm", "max_gradient_norm", "Axolotl"),
    Alias("adam_epsilon", "epsilon", "Axolotl"),
    Only("adam_beta1", "Axolotl", (None, 0.9), "give betas: [0.9, 0.95] or the like"),
    Only("adam_beta2", "Axolotl", (None, 0.999), "give betas: [0.9, 0.95] or the like"),
    Alias("early_stopping_patience", "early_stop", "Axolotl", steps_off),
    Alias("save_steps", "checkpoint_steps", "Axolotl"),
    Alias("save_total_limit", "keep_checkpoints", "Axolotl"),
    Noted("save_first_step", "Axolotl", "give checkpoint_steps, in optimizer steps"),
    Noted("shuffle_merged_datasets", "Axolotl", "rows are shuffled by the seed"),
    Noted("saves_per_epoch", "Axolotl", "give checkpoint_steps, in optimizer steps"),
    Noted("evals_per_epoch", "Axolotl", "evaluations are once a pass; give eval_steps for others"),
    Noted("eval_table_size", "Axolotl", _SEE_EVAL),
    Noted("eval_max_new_tokens", "Axolotl", _SEE_EVAL),
    Only("auto_resume_from_checkpoints", "Axolotl", _OFF, "give --resume on the command line"),
    Several("rl", "Axolotl", rl, "dpo, ipo, simpo or orpo"),
    Alias("rl_beta", "dpo.beta", "Axolotl"),
    Alias("dpo_beta", "dpo.beta", "Axolotl"),
    Alias("orpo_alpha", "dpo.beta", "Axolotl"),
    Alias("dpo_label_smoothing", "dpo.label_smoothing", "Axolotl"),
    Alias("dpo_loss_type", "dpo.loss", "Axolotl", pair_loss),
    Only("dpo_norm_loss", "Axolotl", _OFF, "give dpo.loss: sigmoid_norm"),
    Only("dpo_use_weighting", "Axolotl", _OFF, "pairs weigh the same; WPO is not done"),
    Alias("simpo_gamma", "dpo.gamma", "Axolotl"),
    Alias("cpo_alpha", "dpo.sft_weight", "Axolotl"),
    Alias("rpo_alpha", "dpo.sft_weight", "Axolotl", lambda value: value or 0),
    Several("wandb_project", "Axolotl", wandb, "tracking by wandb"),
    Alias("wandb_name", "tracking.run_name", "Axolotl", lambda value: value or None),
    *(
        Only(name, "Axolotl", (None, "", False), _IN_ENVIRONMENT)
        for name in (
            "wandb_entity",
            "wandb_watch",
            "wandb_log_model",
            "wandb_run_id",
            "wandb_mode",
            "mlflow_tracking_uri",
            "mlflow_experiment_name",
        )
    ),
    Several("use_tensorboard", "Axolotl", tracker("tensorboard"), "true: tracking there"),
    Several("use_wandb", "Axolotl", tracker("wandb"), "true: tracking there"),
    Several("use_mlflow", "Axolotl", tracker("mlflow"), "true: tracking there"),
    Only("deepspeed", "Axolotl", (None, False, ""), _ONE_PROCESS),
    Only("fsdp", "Axolotl", (None, [], ""), _ONE_PROCESS),
    Only("fsdp_config", "Axolotl", (None, {}), _ONE_PROCESS),
    Only("local_rank", "Axolotl", (None,), _ONE_PROCESS),
    Noted("logging_steps", "Axolotl", "every step is told"),
    Noted("save_safetensors", "Axolotl", "safetensors are all there is"),
    Several("special_tokens", "Axolotl", special_tokens, "pad_token: padding is never looked at"),
    Only("tokens", "Axolotl", (None, []), _NO_BASE_CHANGE),
    Only("resize_token_embeddings_to_32x", "Axolotl", _OFF, _NO_BASE_CHANGE),
    Only("hub_model_id", "Axolotl", (None, ""), "upload the folder yourself, or use --publish"),
    Only("push_to_hub", "Axolotl", _OFF, "upload the folder yourself, or use --publish"),
)

OTHERS: tuple[Key, ...] = (
    Alias("model", "base", "others"),
    Alias("model_name_or_path", "base", "others"),
    Alias("train_file", "data", "others"),
    Alias("training_file", "data", "others"),
    Alias("validation_file", "eval_data", "others"),
    Alias("dataset_name", "data", "others"),
    Alias("torch_dtype", "dtype", "others"),
    Only("use_peft", "others", (None, True), "an adapter is all that is trained"),
    Several("task", "others", task, "Predibase's instruction_tuning, continued_pretraining"),
    Only("dataset_dir", "others", (None,), "no list of data sets is read; give a path as data"),
    Several("stage", "others", stage, "LLaMA-Factory's sft, pt or dpo"),
    Several("finetuning_type", "others", adapter_kind, "lora"),
    Alias("lora_rank", "lora.r", "others"),
    Alias("rank", "lora.r", "others"),
    Alias("lora_target", "lora.target_modules", "others", target_modules),
    Alias("target_modules", "lora.target_modules", "others", target_modules),
    Alias("use_rslora", "lora.use_rslora", "others"),
    Alias("use_dora", "lora.use_dora", "others"),
    Alias("adapter_name_or_path", "lora.start_from", "others"),
    Only("pissa_init", "others", _OFF, _NO_BASE_CHANGE),
    Only("additional_target", "others", (None,), _LORA_ALONE),
    Only("modules_to_save", "others", (None, []), _LORA_ALONE),
    *(
        Only(f"{group}.{name}", "others", (None, False, "none", [], {}), reason)
        for group in ("lora", "adapter")
        for name, reason in _PEFTS.items()
    ),
    Alias("quantization_bit", "quantization.bits", "others"),
    Alias("quantization_type", "quantization.type", "others"),
    Alias("double_quantization", "quantization.double", "others"),
    Only("quantization_method", "others", (None, "bnb", "bitsandbytes"), "only bitsandbytes"),
    Only("rope_scaling", "others", (None,), _NO_BASE_CHANGE),
    Only("use_unsloth", "others", _OFF, "PEFT attaches the adapter"),
    Alias("cutoff_len", "max_length", "others"),
    Alias("max_seq_length", "max_length", "others"),
    Alias("max_samples", "max_rows", "others"),
    Alias("neat_packing", "packing", "others"),
    Alias("apply_chat_template", "chat", "others"),
    Only("mask_history", "others", _OFF, "give weight: 0 to the messages that are not learned"),
    Several("val_size", "others", val_set_size, "a share held out to evaluate on"),
    Alias("num_train_epochs", "epochs", "others", whole),
    Alias("n_epochs", "epochs", "others"),
    Alias("train_steps", "max_steps", "others"),
    Alias("per_device_train_batch_size", "batch_size", "others"),
    Alias("per_device_eval_batch_size", "eval_batch_size", "others"),
    Alias("lr_scheduler_type", "schedule", "others", schedule),
    Alias("optim", "optimizer", "others", optimizer),
    Alias("pref_beta", "dpo.beta", "others"),
    Alias("pref_ftx", "dpo.sft_weight", "others"),
    Alias("pref_loss", "dpo.loss", "others", pair_loss),
    Only("ref_model", "others", (None,), "give dpo.reference: start, base or none"),
    Alias("report_to", "tracking.to", "others", report_to),
    Alias("run_name", "tracking.run_name", "others"),
    Only("do_train", "others", (None, True), "training is what is done"),
    Noted("do_eval", "others", "rows that are held out are evaluated on"),
    Only("do_predict", "others", _OFF, _SEE_EVAL),
    Only("predict_with_generate", "others", _OFF, _SEE_EVAL),
    *(
        Noted(name, "others", "give eval_steps and checkpoint_steps, in optimizer steps")
        for name in ("eval_strategy", "evaluation_strategy", "save_strategy")
    ),
    Only("load_best_model_at_end", "others", _OFF, "give early_stop, which keeps the best"),
    Only("enable_early_stopping", "others", _OFF, "give early_stop, a number of evaluations"),
    Only(
        "resume_from_checkpoint",
        "others",
        (None, False, ""),
        "give --resume on the command line, or lora.start_from",
    ),
    Only("overwrite_output_dir", "others", _OFF, "give --replace on the command line"),
    Noted("plot_loss", "others", "curve.png is always drawn"),
    *(
        Noted(name, "others", _SPEED_ALONE)
        for name in (
            "overwrite_cache",
            "preprocessing_num_workers",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "ddp_timeout",
        )
    ),
    Only("save_only_model", "others", _OFF, "a checkpoint has all that a run needs to go on"),
    Only("hub_token", "others", (None,), "a token is never read from a file; set HF_TOKEN"),
)

KEYS: dict[str, Key] = {key.path: key for key in (*LUDWIG, *AXOLOTL, *OTHERS)}

OWN_TURNS: dict[str, Callable[[Any], Any]] = {
    "optimizer": optimizer,
    "gradient_accumulation_steps": auto_as_none,
    "generation.stop": stop,
    "dpo.loss": pair_loss,
    "lora.target_modules": target_modules,
    "max_steps": lambda value: None if value == -1 else value,
    "early_stop": steps_off,
    "eval_steps": steps_off,
}
"""Our own names whose values other tools write in other ways."""
