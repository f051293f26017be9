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


def trainer_type(value: Any) -> Any:
    table = {"finetune": "sft", "sft": "sft", "dpo": "dpo", "pretrain": "pretrain"}
    refused = {
        "none": "nothing would be trained",
        "kto": "kto learns from single marks; pairs of answers can be learned from: dpo",
        "orpo": "use dpo with dpo.sft_weight",
        "grpo": "learning from a reward is left to TRL; its adapters can be served",
    }
    if value in refused:
        raise ConfigError(f"{value}: {refused[value]}")
    return _choice(table, "one of: finetune, dpo, pretrain")(value)


def target_linear(value: Any) -> Values:
    return {"lora.target_modules": "all-linear"} if value else {}


def adapter_kind(value: Any) -> Values:
    """Axolotl's `adapter: lora`; qlora is lora with load_in_4bit."""
    if value == "lora":
        return {}
    if value == "qlora":
        return {"quantization.bits": 4}
    if value is None:
        raise ConfigError("without an adapter the base itself would be trained; give lora")
    raise ConfigError(f"{value!r}: only lora and qlora are trained; no other kind can be served")


def rl(value: Any) -> Values:
    kinds: dict[Any, Values] = {
        None: {},
        "dpo": {"method": "dpo"},
        "ipo": {"method": "dpo", "dpo.loss": "ipo"},
    }
    if value not in kinds:
        raise ConfigError(f"{value!r}: only dpo and ipo are trained")
    return kinds[value]


def datasets(value: Any) -> Values:
    """Axolotl's list of one: its path and what its rows look like."""
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise ConfigError("one data set is trained on: [{path: ..., type: alpaca}]")
    item = dict(value[0])
    path, kind = item.pop("path", None), item.pop("type", None)
    for ignorable in ("ds_type", "split"):
        if item.get(ignorable) in (None, "json", "csv", "parquet", "train"):
            item.pop(ignorable, None)
    if item:
        raise ConfigError(f"{', '.join(sorted(map(str, item)))}: only path and type are read")
    known = (None, "alpaca", "chat_template", "completion", "chatml.intel", "chat_template.default")
    if kind not in known:
        raise ConfigError(f"type {kind!r}: write the prompt as `template: ...` instead")
    method: Values = {"method": "pretrain"} if kind == "completion" else {}
    return {"data": path} | method


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


def bits_of(bits: int) -> Callable[[Any], Values]:
    return lambda value: {"quantization.bits": bits} if value else {}


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
