"""Other tools' configurations: taken as they are, or refused key by key with the reason."""

from pathlib import Path

import pytest

from lory_trainer.config import TrainOptions, parse_options, read_config
from lory_trainer.config_keys import AXOLOTL, KEYS, LUDWIG, OTHERS, Alias
from lory_trainer.config_page import page, replaced
from lory_trainer.config_translate import option_paths
from lory_trainer.errors import ConfigError
from ludwig_seed import LUDWIG_CONFIG
from wild_configs import REFUSED, TAKEN

DOCS = Path(__file__).parents[1] / "docs" / "training.md"

AXOLOTL_CONFIG = """
base_model: NousResearch/Llama-2-7b-hf
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: data.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
weight_decay: 0.0
"""


def test_ludwigs_configuration_is_taken_unmodified(tmp_path):
    path = tmp_path / "ludwig.yaml"
    path.write_text(LUDWIG_CONFIG)
    options, notes = read_config(path, data="rows.jsonl")
    assert notes == ()
    assert (options.base, options.method) == ("meta-llama/Llama-2-7b-hf", "sft")
    assert options.template is not None
    assert options.template.startswith("Below is an instruction")
    assert options.template.endswith("\n\n### Input: {input}\n\n### Response:")
    assert options.completion == "output"
    assert (options.generation.temperature, options.generation.max_new_tokens) == (0.1, 512)
    assert (options.lora.r, options.lora.resolved_alpha, options.lora.dropout) == (8, 16, 0.05)
    assert options.quantization.bits == 4
    assert (options.max_length, options.overlong) == (512, "cut_prompt")
    assert options.split is not None
    assert options.split.probabilities == [0.9, 0.05, 0.05]
    assert (options.batch_size, options.gradient_accumulation_steps) == (1, 16)
    assert (options.eval_batch_size, options.epochs) == (2, 1)
    assert (options.learning_rate, options.warmup_fraction) == (0.0004, 0.03)


def test_axolotls_configuration_is_taken_unmodified():
    options = parse_options(AXOLOTL_CONFIG)
    assert (options.base, options.data) == ("NousResearch/Llama-2-7b-hf", "data.jsonl")
    assert (options.lora.r, options.lora.resolved_alpha, options.lora.dropout) == (32, 16, 0.05)
    assert options.lora.target_modules == "all-linear"
    assert options.quantization.bits == 4
    assert (options.max_length, options.packing, options.batch_size) == (4096, True, 2)
    assert (options.optimizer, options.schedule) == ("paged_adamw", "cosine")
    assert (options.learning_rate, options.warmup_fraction) == (2e-4, 0.1)
    assert options.split is not None
    assert options.split.probabilities == [0.95, 0.05, 0.0]
    assert (options.output, options.gradient_checkpointing) == ("./outputs/qlora-out", True)


def test_what_has_no_effect_is_said(tmp_path):
    path = tmp_path / "axolotl.yaml"
    path.write_text(AXOLOTL_CONFIG)
    _, notes = read_config(path)
    assert sorted(note.split(":")[0] for note in notes) == [
        "bf16",
        "flash_attention",
        "logging_steps",
        "pad_to_sequence_len",
        "tf32",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("adapter: {type: ia3}", "adapter.type: 'ia3': only lora"),
        ("adapter: null", "adapter: without an adapter the base itself would be trained"),
        ("adapter: {rank: 8}", "adapter.rank: no such key; did you mean"),
        ("adapter: {init_lora_weights: pissa}", "changes the base's own weights"),
        ("adapter: {postprocessor: {merge_adapter_into_base_model: true}}", "is not taken"),
        ("trainer: {type: kto}", "trainer.type: kto: kto learns from single marks"),
        ("trainer: {type: ppo}", "trainer.type: ppo: learning from a reward is left to TRL"),
        ("trainer: {type: orpo}", "give dpo, and dpo.loss: orpo"),
        ("trainer: {type: mlm}", "trainer.type: 'mlm' is not taken; one of: finetune"),
        ("trainer: {type: [dpo]}", "trainer.type: ['dpo'] is not taken"),
        ("trainer: {epoch: 3}", "trainer.epoch: no such key; did you mean `epochs`?"),
        ("trainer: {epochs: many}", "trainer.epochs: "),
        ("trainer: {epochs: 2}\nepochs: 3", "trainer.epochs says something else"),
        ("trainer: 3", "trainer: expected `key: value` lines"),
        ("trainer: {learning_rate_scheduler: {decay: exponential}}", "'exponential' is not taken"),
        ("trainer: {learning_rate_scheduler: {reduce_on_plateau: 2}}", "use early_stop"),
        ("trainer: {optimizer: {type: lion}}", "'lion' is not taken"),
        ("prompt: {retrieval: {type: random}}", "retrieve first"),
        ("input_features: [{name: a, type: image}]", "only text can be trained on"),
        ("input_features: [{name: a}, {name: b}]", "several need a prompt.template"),
        ("output_features: [{name: a}, {name: b}]", "exactly one answer"),
        ("output_features: [{name: a, decoder: {match: {x: {}}}}]", "see lory eval"),
        ("model_type: ecd", "'ecd' is not taken: only llm is trained"),
        ("trust_remote_code: true", "code that comes with a model is never run"),
        ("lora_modules_to_save: [lm_head]", "LoRA alone"),
        ("quantization: {bnb_4bit_quant_type: nf4}", "quantization.bits: is missing"),
        ("quantization: {bits: 2}", "quantization.bits: "),
        ("quantization: {bits: 4, backend: torchao}", "only bitsandbytes"),
        ("split: {type: stratify}", "split.type: "),
        ("preprocessing: {split: {probabilities: [0.5, 0.1]}}", "three shares that sum to 1"),
        ("rl: kto", "rl: kto: kto learns from single marks"),
        ("rl: [dpo]", "one of: dpo, ipo, simpo, orpo"),
        ("load_in_4bit: 'no'", "load_in_4bit: 'no' is not taken; true or false"),
        ("special_tokens: x", "special_tokens: expected"),
        ("template: llama3", "Chat templates have no names here"),
        ("chosen: better", "chosen: is for method: dpo, and this is sft"),
        ("method: pretrain\ncompletion: x", "all of a text is learned"),
        ("stage: rm", "a reward model is no adapter"),
        ("test_datasets: [{path: a}, {path: b}]", "one data set"),
        ("trainer: {type: dpo}\noutput_features: [{name: a}]\nchosen: b", "says something else"),
        ("datasets: [{path: a}, {path: b}]", "one data set is trained on"),
        ("datasets: [{path: a, type: sharegpt_x}]", "template: ..."),
        ("effective_batch_size: 4\ngradient_accumulation_steps: 2", "not both"),
        ("early_stop: 3", "needs rows to evaluate"),
        ("trainer: {dpo_beta: 0.2}", "trainer.dpo_beta: is for method: dpo"),
        ("method: dpo\ntrain_on_prompt: true", "is not for dpo"),
        ("method: dpo\npacking: true", "pairs are not packed"),
        ("lora: {r: 300}", "lora.r: "),
        ("lora_r: 300", "lora_r: "),
        ("tracking: {to: [comet]}", "tracking.to: "),
        ("generation: {num_beams: 4}", "token by token"),
        ("lora: {modules_to_save: [lm_head]}", "lora.modules_to_save: ['lm_head'] is not taken"),
        ("adapter: {layers_to_transform: [1]}", "write target_modules as one regular expression"),
        ("lora: {alora_invocation_tokens: [1]}", "an aLoRA of others is served"),
        ("peft_trainable_token_indices: [1]", "LoRA alone"),
        ("zzz: 1", "zzz: no such key; docs/training.md ends with all keys"),
        ("warmup_steps: 10\nwarmup_ratio: 0.1", "give it or warmup_fraction, not both"),
        ("datasets: [{path: a, roles: {user: [x]}}]", "roles: only path and type are read"),
    ],
)
def test_what_is_not_taken_says_why(lines, message):
    base = "" if "datasets" in lines else "data: rows.jsonl\n"
    with pytest.raises(ConfigError) as caught:
        parse_options(f"base_model: x\n{base}{lines}\n", "run.yaml")
    assert message in str(caught.value)


def test_a_section_for_the_evaluation_may_stand_there(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base: x\ndata: y\nevaluation: {metrics: [exact_match]}\n")
    _, notes = read_config(path)
    assert notes == ()


def test_every_wrong_key_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_options("base: x\ndata: y\ntrainer: {epoch: 1, type: kto}\nhyperopt: {a: 1}\n")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "trainer.epoch",
        "trainer.type",
        "hyperopt",
    ]


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("trainer: {type: dpo, dpo_beta: 0.2}", "dpo.beta", 0.2),
        ("trainer: {early_stop: -1}", "early_stop", 0),
        ("trainer: {optimizer: {type: paged_adamw_8bit}}", "optimizer", "paged_adamw_8bit"),
        ("trainer: {gradient_clipping: {clipglobalnorm: 0.5}}", "max_gradient_norm", 0.5),
        ("trainer: {learning_rate_scheduler: {decay: null}}", "schedule", "constant"),
        ("trainer: {learning_rate: auto, batch_size: auto}", "batch_size", "auto"),
        ("model_parameters: {neftune_noise_alpha: 5}", "neftune_noise_alpha", 5.0),
        ("random_seed: 7", "seed", 7),
        ("adapter_id: helper", "name", "helper"),
        ("generation: {stop_sequences: ['#']}", "generation.stop", ["#"]),
        ("rl: ipo", "dpo.loss", "ipo"),
        ("wandb_project: mine", "tracking.to", ["wandb"]),
        ("report_to: tensorboard", "tracking.to", ["tensorboard"]),
        ("lora_target: all", "lora.target_modules", "all-linear"),
        ("lora_target: 'q_proj, v_proj'", "lora.target_modules", ["q_proj", "v_proj"]),
        ("lora: {target_modules: '.*[qv]_proj'}", "lora.target_modules", ".*[qv]_proj"),
        ("num_train_epochs: 3.0", "epochs", 3),
        ("rl: orpo\norpo_alpha: 0.2", "dpo.beta", 0.2),
        ("stage: pt", "method", "pretrain"),
        ("test_datasets: [{path: held.jsonl}]", "eval_data", "held.jsonl"),
        ("trainer: {type: dpo}\noutput_features: [{name: good}]", "chosen", "good"),
        ("use_mlflow: true", "tracking.to", ["mlflow"]),
        ("warmup_steps: 10", "warmup_steps", 10),
        ("lora: {modules_to_save: null, bias: none}", "lora.r", 8),
        ("model_type: LlamaForCausalLM", "lora.dropout", 0.0),
        ("model_type: llm", "lora.dropout", 0.05),
        ("input_features: [{name: question}]", "template", "{question}"),
        ("output_features: [{name: out, prefix: ' '}]", "completion_prefix", " "),
    ],
)
def test_other_names_set_our_options(line, option, value):
    options = parse_options(f"base: x\ndata: y\n{line}\n")
    found: object = options
    for name in option.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("text", TAKEN.values(), ids=TAKEN)
def test_configurations_from_elsewhere_are_taken(text):
    assert parse_options(text).base


@pytest.mark.parametrize(("text", "told"), REFUSED.values(), ids=REFUSED)
def test_what_others_do_that_is_not_done_here_is_told_key_by_key(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_options(text)
    lines = dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])
    assert set(lines) == set(told)
    for key, reason in told.items():
        assert reason in lines[key]


def test_every_alias_names_an_option_and_no_key_is_listed_twice():
    own = set(option_paths(TrainOptions))
    keys = (*LUDWIG, *AXOLOTL, *OTHERS)
    assert {key.to for key in keys if isinstance(key, Alias)} <= own
    assert len(KEYS) == len(keys)
    assert not own & set(KEYS), "an option of ours is never read as another tool's"


def test_the_documents_table_of_keys_is_as_the_code_has_it():
    """Made anew by `python -m lory_trainer.config_page docs/training.md`."""
    text = DOCS.read_text(encoding="utf-8")
    assert page() in text
    assert replaced(text) == text
