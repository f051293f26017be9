"""Configurations as users of other trainers have them, and what becomes of each here.

TAKEN train as they are; REFUSED name every key that asks for something else.
"""

LUDWIG_QLORA = """
model_type: llm
base_model: meta-llama/Llama-2-7b-hf
quantization: {bits: 4}
adapter: {type: lora}
prompt:
  template: |
    ### Instruction:
    {instruction}

    ### Input:
    {input}

    ### Response:
input_features: [{name: prompt, type: text}]
output_features: [{name: output, type: text}]
trainer:
  type: finetune
  learning_rate: 0.0001
  batch_size: 1
  gradient_accumulation_steps: 16
  epochs: 3
  learning_rate_scheduler: {decay: cosine, warmup_fraction: 0.01}
preprocessing: {sample_ratio: 0.1}
backend: {type: local}
"""

LUDWIG_CHAT = """
model_type: llm
base_model: HuggingFaceH4/zephyr-7b-beta
input_features:
  - {name: instruction, type: text, preprocessing: {max_sequence_length: 256}}
output_features:
  - {name: output, type: text, preprocessing: {max_sequence_length: 256}}
prompt: {template: "{instruction} {input}"}
generation: {temperature: 0.1, max_new_tokens: 512}
adapter: {type: lora, r: 16, alpha: 32, dropout: 0.1, target_modules: [q_proj, v_proj]}
quantization: {bits: 4}
preprocessing: {global_max_sequence_length: 512, split: {type: random, probabilities: [1, 0, 0]}}
trainer:
  type: finetune
  optimizer: {type: paged_adam}
  epochs: 1
  batch_size: auto
  learning_rate: auto
  enable_gradient_checkpointing: true
  use_mixed_precision: true
dataset: rows.csv
"""

LUDWIG_ZERO_SHOT = """
model_type: llm
base_model: meta-llama/Llama-2-7b-chat-hf
generation: {temperature: 0.1, num_beams: 2}
prompt: {task: "Classify the sentiment."}
input_features: [{name: review, type: text}]
output_features:
  - {name: label, type: category, decoder: {type: category_extractor, fallback_label: neutral}}
trainer: {type: none}
dataset: rows.csv
"""

LUDWIG_DPO = """
model_type: llm
base_model: llama-2-7b
adapter: {type: lora, use_dora: true, postprocessor: {merge_adapter_into_base_model: false}}
input_features: [{name: prompt, type: text}]
output_features: [{name: chosen, type: text}]
trainer: {type: dpo, dpo_beta: 0.1, dpo_loss_type: hinge, rejected_column: rejected, epochs: 2}
dataset: pairs.parquet
"""

AXOLOTL_LLAMA_2 = """
base_model: NousResearch/Llama-2-7b-hf
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer
is_llama_derived_model: true
load_in_8bit: true
load_in_4bit: false
strict: false
datasets: [{path: mhenrichsen/alpaca_2k_test, type: alpaca}]
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
eval_table_size:
eval_max_new_tokens: 128
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
"""

AXOLOTL_LLAMA_3 = """
base_model: meta-llama/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
lora_mlp_kernel: true
lora_qkv_kernel: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
gradient_checkpointing: true
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
special_tokens: {pad_token: "<|end_of_text|>"}
"""

AXOLOTL_CHAT = """
base_model: NousResearch/Meta-Llama-3-8B-Instruct
load_in_8bit: true
chat_template: llama3
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: messages
    message_property_mappings: {role: role, content: content}
    roles: {user: [user], assistant: [assistant]}
adapter: lora
plugins: [axolotl.integrations.liger.LigerPlugin]
micro_batch_size: 2
num_epochs: 4
warmup_steps: 10
deepspeed: deepspeed_configs/zero2.json
"""

AXOLOTL_MESSAGES = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: false
adapter: lora
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles: {system: [system], user: [human, user], assistant: [gpt, assistant]}
shuffle_merged_datasets: true
val_set_size: 0.05
sequence_len: 4096
lora_r: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: true
gradient_checkpointing_kwargs: {use_reentrant: false}
warmup_steps: 10
save_first_step: true
"""

AXOLOTL_ORPO = """
base_model: mistralai/Mistral-7B-v0.1
load_in_4bit: true
rl: orpo
orpo_alpha: 0.1
chat_template: tokenizer_default
datasets: [{path: argilla/ultrafeedback, type: chat_template.argilla}]
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
sequence_len: 4096
micro_batch_size: 1
num_epochs: 1
optimizer: paged_adamw_32bit
learning_rate: 0.00001
"""

AXOLOTL_SIMPO = """
base_model: google/gemma-2-9b-it
rl: simpo
rl_beta: 0.1
cpo_alpha: 1.0
simpo_gamma: 0.5
datasets: [{path: pairs.jsonl, type: chat_template.argilla}]
adapter: lora
lora_target_linear: true
"""

AXOLOTL_PRETRAINING = """
base_model: TinyLlama/TinyLlama-1.1B
pretraining_dataset: [{path: allenai/c4, name: en, type: pretrain}]
max_steps: 200
adapter: lora
tokens: ["<|new|>"]
special_tokens: {bos_token: "<s>", eos_token: "</s>"}
lora_modules_to_save: [embed_tokens, lm_head]
"""

FACTORY_SFT = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
train_file: rows.json
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""

FACTORY_DPO = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
pref_beta: 0.1
pref_loss: sigmoid
pref_ftx: 0.5
dataset: pairs.jsonl
cutoff_len: 2048
quantization_bit: 4
quantization_method: bnb
double_quantization: true
"""

FACTORY_KTO = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: kto
finetuning_type: lora
lora_target: all
template: llama3
dataset: kto_en_demo
dataset_dir: data
overwrite_output_dir: true
fp16: true
"""

FACTORY_FULL = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
finetuning_type: full
dataset: rows.json
deepspeed: examples/deepspeed/ds_z3_config.json
flash_attn: fa2
save_only_model: true
"""

TRL_SFT = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: rows.jsonl
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: all-linear
max_length: 2048
packing: true
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
optim: adamw_torch_fused
logging_steps: 25
eval_strategy: "no"
report_to: [tensorboard]
torch_dtype: bfloat16
"""

TRL_DPO = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: pairs.jsonl
rl: dpo
dpo_loss_type: [apo_zero]
dpo_beta: 0.05
use_peft: true
adam_beta2: 0.95
push_to_hub: true
load_best_model_at_end: true
"""

PREDIBASE = """
base_model: mistral-7b
dataset: rows.csv
task: instruction_tuning
epochs: 3
learning_rate: 0.0002
rank: 16
target_modules: [q_proj, v_proj]
enable_early_stopping: false
apply_chat_template: true
"""

OPENAI = """
model: meta-llama/Llama-3.1-8B-Instruct
training_file: chats.jsonl
validation_file: held_out.jsonl
n_epochs: 3
batch_size: auto
learning_rate_multiplier: 2
learning_rate: auto
seed: 42
"""

TORCHTUNE = """
output_dir: /tmp/torchtune
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /tmp/tokenizer.model}
model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_rank: 8}
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset}
epochs: 1
max_steps_per_epoch: null
"""

MISSPELT = """
base_model: x
dataset: rows.jsonl
adaptor: {type: lora}
trainer: {learnig_rate: 0.1, epoch: 2}
quantisation: {bits: 4}
lora_rr: 3
generation: {max_tokens: 5, temprature: 0.2}
"""

TAKEN = {
    "axolotl-llama-2": AXOLOTL_LLAMA_2,
    "axolotl-llama-3": AXOLOTL_LLAMA_3,
    "axolotl-messages": AXOLOTL_MESSAGES,
    "axolotl-orpo": AXOLOTL_ORPO,
    "axolotl-simpo": AXOLOTL_SIMPO,
    "ludwig-dpo": LUDWIG_DPO,
    "factory-sft": FACTORY_SFT,
    "factory-dpo": FACTORY_DPO,
    "trl-sft": TRL_SFT,
    "predibase": PREDIBASE,
    "openai": OPENAI,
}

REFUSED = {
    "ludwig-qlora": (
        LUDWIG_QLORA,
        {"preprocessing.sample_ratio": "give max_rows"},
    ),
    "ludwig-chat": (
        LUDWIG_CHAT,
        {
            "input_features": "global_max_sequence_length",
            "output_features": "global_max_sequence_length",
        },
    ),
    "ludwig-zero-shot": (
        LUDWIG_ZERO_SHOT,
        {
            "generation.num_beams": "token by token",
            "prompt.task": "write the task into prompt.template",
            "output_features": "see lory eval",
            "trainer.type": "nothing would be trained",
        },
    ),
    "axolotl-chat": (
        AXOLOTL_CHAT,
        {
            "chat_template": "go through the base's own",
            "plugins": "plugins are not loaded",
            "deepspeed": "one process trains",
        },
    ),
    "axolotl-pretraining": (
        AXOLOTL_PRETRAINING,
        {
            "pretraining_dataset": "give data, and method: pretrain",
            "tokens": "would change the base",
            "special_tokens": "bos_token, eos_token: the base's own are used",
            "lora_modules_to_save": "LoRA alone",
        },
    ),
    "factory-kto": (
        FACTORY_KTO,
        {
            "stage": "kto learns from single marks",
            "dataset_dir": "give a path as data",
            "overwrite_output_dir": "--replace",
            "fp16": "give dtype",
        },
    ),
    "factory-full": (
        FACTORY_FULL,
        {
            "finetuning_type": "the base itself would be trained",
            "deepspeed": "one process trains",
            "save_only_model": "needs to go on",
        },
    ),
    "trl-dpo": (
        TRL_DPO,
        {
            "adam_beta2": "give betas",
            "push_to_hub": "--publish",
            "load_best_model_at_end": "give early_stop",
        },
    ),
    "torchtune": (
        TORCHTUNE,
        {
            "tokenizer": "no such key",
            "max_steps_per_epoch": "no such key",
        },
    ),
    "misspelt": (
        MISSPELT,
        {
            "adaptor": "did you mean `adapter`?",
            "trainer.learnig_rate": "did you mean `learning_rate`?",
            "trainer.epoch": "did you mean `epochs`?",
            "quantisation": "did you mean `quantization`?",
            "lora_rr": "did you mean `lora_r`?",
            "generation.max_tokens": "did you mean `max_new_tokens`?",
            "generation.temprature": "did you mean `temperature`?",
        },
    ),
}
