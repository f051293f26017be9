"""How other tools write the values of our options, turned into ours.

Each function takes the value as a file has it, and raises ConfigError saying what is taken. This
module must not know where a key stands in a file.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lory_trainer.errors import ConfigError
from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.options import check_section

Values = dict[str, Any]
"""Our options by dotted path."""


def _choice(table: Mapping[Any, Any], fix: str) -> Callable[[Any], Any]:
    def turn(value: Any) -> Any:
        if isinstance(value, list | dict) or value not in table:
            raise ConfigError(f"{value!r} is not taken; {fix}")
        return table[value]

    return turn


def optimizer(value: Any) -> Any:
    names = {
        "adam": "adamw",
        "adamw": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adam_8bit": "adamw_8bit",
        "adamw_8bit": "adamw_8bit",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adam": "paged_adamw",
        "paged_adamw": "paged_adamw",
        "paged_adamw_32bit": "paged_adamw",
        "paged_adam_8bit": "paged_adamw_8bit",
        "paged_adamw_8bit": "paged_adamw_8bit",
        "sgd": "sgd",
    }
    return _choice(names, f"one of: {', '.join(names)}")(value)


_SCHEDULES = {
    None: "constant",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
schedule = _choice(_SCHEDULES, "one of: constant, linear, cosine")


def base_model(value: Any) -> Any:
    presets = {
        "llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "llama-2-13b": "meta-llama/Llama-2-13b-hf",
        "llama-2-70b": "meta-llama/Llama-2-70b-hf",
        "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
        "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
        "llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
        "mistral-7b": "mistralai/Mistral-7B-v0.1",
        "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
        "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    }
    return presets.get(value, value) if isinstance(value, str) else value


def _features(value: Any, what: str, kinds: tuple[str, ...]) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError("expected a list such as [{name: instruction, type: text}]")
    for item in value:
        if not isinstance(item.get("name"), str):
            raise ConfigError(f"every {what} needs a name")
        if item.get("type", "text") not in kinds:
            raise ConfigError(
                f"type {item['type']!r} of {item['name']}: only {' and '.join(kinds)} "
                "can be trained on"
            )
    return value


def input_features(value: Any) -> Values:
    features = _features(value, "input feature", ("text",))
    extra = {key for item in features for key in item} - {"name", "type", "column", "preprocessing"}
    if extra:
        raise ConfigError(f"{', '.join(sorted(extra))}: only name, type and preprocessing are read")
    columns = [str(item.get("column", item["name"])) for item in features]
    found: Values = {"input_columns": columns}
    lengths = [(item.get("preprocessing") or {}).get("max_sequence_length") for item in features]
    if any(length is not None for length in lengths):
        raise ConfigError(
            "preprocessing.max_sequence_length: rows have one limit, for prompt and answer "
            "together; give preprocessing.global_max_sequence_length"
        )
    return found


def output_features(value: Any) -> Values:
    features = _features(value, "output feature", ("text", "category"))
    if len(features) != 1:
        raise ConfigError(f"exactly one answer can be learned; {len(features)} are named")
    feature = dict(features[0])
    column = feature.pop("column", feature.pop("name"))
    prefix = feature.pop("prefix", "")
    feature.pop("name", None)
    feature.pop("type", None)
    if feature.get("decoder"):
        raise ConfigError("decoder: what an answer means is for the evaluation: see lory eval")
    if (feature.pop("preprocessing", None) or {}).get("max_sequence_length") is not None:
        raise ConfigError("preprocessing.max_sequence_length: see global_max_sequence_length")
    feature.pop("decoder", None)
    if feature:
        raise ConfigError(f"{', '.join(sorted(feature))}: only name, type and prefix are read")
    return {"completion": column} | ({"completion_prefix": prefix} if prefix else {})


_METHODS = {"finetune": "sft", "sft": "sft", "dpo": "dpo", "pretrain": "pretrain", "pt": "pretrain"}
_NOT_TRAINED = {
    "none": "nothing would be trained",
    "kto": "kto learns from single marks, measured against the others of their batch; pairs of "
    "answers can be learned from: dpo",
    "grpo": "learning from a reward is left to TRL; its adapters can be served",
    "ppo": "learning from a reward is left to TRL; its adapters can be served",
    "rm": "a reward model is no adapter that answers; pairs can be learned from directly: dpo",
}
_NOT_TRAINED |= {"gdpo": _NOT_TRAINED["grpo"]}


def trainer_type(value: Any) -> Any:
    """What Ludwig and we call methods."""
    _refuse_method(value)
    if value in ("orpo", "simpo"):
        raise ConfigError(f"{value}: is a loss of pairs; give dpo, and dpo.loss: {value}")
    return _choice(_METHODS, "one of: finetune, dpo, pretrain")(value)


def _refuse_method(value: Any) -> None:
    if isinstance(value, str) and value in _NOT_TRAINED:
        raise ConfigError(f"{value}: {_NOT_TRAINED[value]}")


def stage(value: Any) -> Values:
    """LLaMA-Factory's."""
    _refuse_method(value)
    return {"method": _choice(_METHODS, "one of: sft, pt, dpo")(value)}


def task(value: Any) -> Values:
    """Predibase's."""
    _refuse_method(value)
    methods = {"sft": "sft", "instruction_tuning": "sft", "continued_pretraining": "pretrain"}
    return {"method": _choice(methods, f"one of: {', '.join(methods)}")(value)}


def rl(value: Any) -> Values:
    """Axolotl's: a method, or a loss of pairs."""
    _refuse_method(value)
    kinds: dict[Any, Values] = {
        None: {},
        "dpo": {"method": "dpo"},
        "ipo": {"method": "dpo", "dpo.loss": "ipo"},
        "simpo": {"method": "dpo", "dpo.loss": "simpo"},
        "orpo": {"method": "dpo", "dpo.loss": "orpo"},
    }
    return _choice(kinds, "one of: dpo, ipo, simpo, orpo")(value)


_NO_LOSS = {
    "sft": "give dpo.sft_weight, which adds it to any loss",
    "cpo": "it is sigmoid with dpo.reference: none and dpo.sft_weight: 1",
    "cdpo": "it is sigmoid with dpo.label_smoothing",
    "kto_pair": "bco_pair, nca_pair and apo_zero are its kin",
    "discopop": "a mixture found by search, within the noise of sigmoid",
    "alphapo": "give simpo; its powers of probabilities are not done",
}
_NO_LOSS |= dict.fromkeys(
    ("aot", "aot_pair", "aot_unpaired"),
    "compares a pair with the others of its batch, so that accumulation would change it; apo_zero "
    "and nca_pair look at each answer alone too",
)


def pair_loss(value: Any) -> Any:
    """TRL writes a list, of one or of several that are added."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ConfigError(f"{value!r}: one loss, and dpo.sft_weight beside it")
        value = value[0]
    if isinstance(value, str) and value in _NO_LOSS:
        raise ConfigError(f"{value}: {_NO_LOSS[value]}")
    return value


def model_type(value: Any) -> Values:
    """Ludwig's kind of model; Axolotl's is the name of a class."""
    is_class = isinstance(value, str) and value.endswith("ForCausalLM")
    if value not in ("llm", None) and not is_class:
        raise ConfigError(f"{value!r} is not taken: only llm is trained")
    return {}


def target_linear(value: Any) -> Values:
    return {"lora.target_modules": "all-linear"} if _truth(value) else {}


def target_modules(value: Any) -> Any:
    """LLaMA-Factory writes names with commas between them, and `all`."""
    if value == "all":
        return "all-linear"
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else []
    if len(names) > 1 and all(name.isidentifier() for name in names):
        return names
    return value


def adapter_kind(value: Any) -> Values:
    """Axolotl's `adapter: lora`; qlora is lora with load_in_4bit."""
    if value == "lora":
        return {}
    if value == "qlora":
        return {"quantization.bits": 4}
    if value is None or value in ("full", "freeze"):
        raise ConfigError("without an adapter the base itself would be trained; give lora")
    raise ConfigError(f"{value!r}: only lora and qlora are trained; no other kind can be served")


_MEANS_NOTHING: dict[str, tuple[Any, ...]] = {
    "ds_type": (None, "json", "csv", "parquet", "arrow"),
    "split": (None, "train"),
    "name": (None,),
    "shards": (None, 1),
    "field": (None, "text"),
    "field_messages": (None, "messages", "conversations"),
    "field_chosen": (None, "chosen"),
    "field_rejected": (None, "rejected"),
    "chat_template": (None, "tokenizer_default"),
    "roles_to_train": (None, ["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": (None, "turn"),
    "message_property_mappings": (
        None,
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ),
}
"""What may be said of a data set, since it is so here."""
_KINDS_OF_ROWS = (None, "alpaca", "completion", "sharegpt")
_KINDS_OF_ROWS += ("chat_template", "chat_template.default", "chat_template.argilla")
_KINDS_OF_ROWS += ("chatml.intel", "chatml.argilla", "orpo.chat_template")


def datasets(value: Any) -> Values:
    """Axolotl's list of one: its path and what its rows look like."""
    path, kind = _one_dataset(value)
    method: Values = {"method": "pretrain"} if kind == "completion" else {}
    return {"data": path} | method


def test_datasets(value: Any) -> Values:
    return {"eval_data": _one_dataset(value)[0]} if value else {}


def _one_dataset(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise ConfigError(
            "one data set is trained on: [{path: ..., type: alpaca}]; a folder may hold several "
            "files of rows"
        )
    item = dict(value[0])
    path, kind = item.pop("path", None), item.pop("type", None)
    for name, values in _MEANS_NOTHING.items():
        if item.get(name) in values:
            item.pop(name, None)
    if _are_usual(item.get("roles")):
        item.pop("roles", None)
    if item:
        raise ConfigError(
            f"{', '.join(sorted(map(str, item)))}: only path and type are read; what rows mean is "
            "read from their columns"
        )
    if kind not in _KINDS_OF_ROWS:
        raise ConfigError(
            f"type {kind!r}: leave it out where the columns say it, or write the prompt as "
            "`template: ...`"
        )
    return path, kind


_NAMES_OF_ROLES = {
    "system": {"system", "developer"},
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt"},
    "tool": {"tool"},
}


def _are_usual(roles: Any) -> bool:
    """Each role by names that it is known by here."""
    if not isinstance(roles, dict):
        return roles is None
    return all(
        isinstance(names, list) and _NAMES_OF_ROLES.get(role, set()).issuperset(names)
        for role, names in roles.items()
    )


def special_tokens(value: Any) -> Values:
    """Which id fills up rows is of no account: no label is there and nothing looks there."""
    if not isinstance(value, dict | None):
        raise ConfigError("expected `key: value` lines, of which pad_token has no effect")
    named = [str(name) for name, token in (value or {}).items() if token is not None]
    if set(named) - {"pad_token"}:
        raise ConfigError(
            f"{', '.join(named)}: the base's own are used, in training and in serving; leave it out"
        )
    return {}


def val_set_size(value: Any) -> Values:
    if not value:
        return {}
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConfigError(f"{value!r}: a share of the rows, such as 0.05")
    return {"split.type": "random", "split.probabilities": [1.0 - value, value, 0.0]}


def wandb(value: Any) -> Values:
    return {"tracking.to": ["wandb"], "tracking.project": value} if value else {}


def report_to(value: Any) -> Any:
    if value in (None, "none", []):
        return []
    return value if isinstance(value, list) else [value]


def tracker(name: str) -> Callable[[Any], Values]:
    return lambda value: {"tracking.to": [name]} if _truth(value) else {}


def bits_of(bits: int) -> Callable[[Any], Values]:
    return lambda value: {"quantization.bits": bits} if _truth(value) else {}


def _truth(value: Any) -> bool:
    """YAML's `no` in quotes is a text, and no text is false."""
    if value not in (None, True, False):
        raise ConfigError(f"{value!r} is not taken; true or false")
    return bool(value)


def whole(value: Any) -> Any:
    """transformers counts passes in fractions: 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def auto_as_none(value: Any) -> Any:
    return None if value == "auto" else value


def steps_off(value: Any) -> Any:
    return 0 if value in (None, -1) else value


def stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []


def init(value: Any) -> Any:
    table = {None: "default", True: "default", "default": "default"}
    table |= {"gaussian": "gaussian", "orthogonal": "orthogonal"}
    if isinstance(value, str) and value not in table:
        raise ConfigError(
            f"{value}: changes the base's own weights, or needs its data; the base is shared by "
            "every adapter. Use default, gaussian or orthogonal"
        )
    return _choice(table, "one of: default, gaussian, orthogonal")(value)


def evaluation(value: Any) -> Values:
    """No option of training: what it says is checked, so that a run does not end in a typing
    error."""
    try:
        check_section(value)
    except EvaluationError as error:
        raise ConfigError("; ".join(str(error).splitlines())) from error
    return {}
