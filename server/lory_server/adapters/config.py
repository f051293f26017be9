"""adapter_config.json: what a PEFT LoRA configuration asks for, or why it is refused.

In: bytes. Out: which modules are adapted, and each one's rank and scale, by PEFT's own rules. No
key is ignored unless it is known to change nothing at inference. It must not know tensors.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.first_match import FirstMatch
from lory_server.adapters.pattern import Pattern, Work
from lory_server.adapters.strict_json import parse_object
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_RANK = 256
MAX_NAMES = 64
MAX_NAME_CHARS = 256
"""Of modules_to_save and layers_pattern, and of each name in them."""
MAX_INVOCATION_TOKENS = 1024

_HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",  # these four say how A and B began; init_lora_weights says if it matters
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "lora_dtype",  # ms-swift's: this and the next two are of training
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "merge_weights",  # PEFT's before 0.3, of how it computes
        "fan_in_fan_out",  # PEFT sets it to False for any linear that is no Conv1D
        "inference_mode",
        "lora_dropout",
        "megatron_core",  # acts with megatron_config only
        "peft_version",
        "qalora_group_size",  # acts with use_qalora only
        "revision",
        "runtime_config",
    }
)
_READ = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
_UNSUPPORTED = {
    "layer_replication": "replicated layers are not served",
    "target_parameters": "LoRA on bare parameters is not served; use target_modules",
    "megatron_config": "Megatron layers are not served",
    "arrow_config": "routing among adapters is not served",
    "kasa_config": "KaSA takes a part out of the base's weights, and is not served",
    "monteclora_config": "MonteCLoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "use_qalora": "QA-LoRA is of GPTQ bases, and is not served",
    "velora_config": "VeLoRA is not served",
}
_SELF_CONTAINED_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")
"""How names begin of those that PEFT converts to LoRA for the base as it was."""
_ALL_LINEAR = "all-linear"
MAX_TOKEN_IDS = 65_536
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")

Bias = Literal["none", "all", "lora_only"]
"""Whose biases were trained: nobody's, every linear's, or those of linears with LoRA."""

_BIASES: dict[object, Bias] = {None: "none", "none": "none", "all": "all", "lora_only": "lora_only"}

Matcher = Callable[[str], bool]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A validated configuration; modules are named as in the base's checkpoint."""

    base_model_name: str
    """Empty if the configuration names none."""
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    """B has a bias."""
    bias: Bias
    invocation_tokens: tuple[int, ...]
    """Of an aLoRA: it acts from these on; empty: everywhere."""
    rank_pattern: FirstMatch[int]
    alpha_pattern: FirstMatch[float]
    is_selected: Matcher
    """True for modules that target_modules and its companions choose."""
    saved_modules: tuple[str, ...] = ()
    """modules_to_save: ends of names of modules that are in the file as a whole."""
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """trainable_token_indices: ends of names of modules, and the rows of them that were trained."""
    ties_ends: bool = False
    """ensure_weight_tying: where the base's head is its embedding, what is done to that is done to
    the head."""

    def is_saved(self, module: str) -> bool:
        """As PEFT matches: 'norm' is every module whose name ends so."""
        return module.endswith(self.saved_modules)

    def trained_rows(self, module: str) -> tuple[int, ...]:
        """Of an embedding or a head; none if there are none."""
        return next((ids for name, ids in self.token_ids.items() if module.endswith(name)), ())

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """By the first pattern that matches, else the defaults."""
        rank = self.rank_pattern.get(module) or self.rank
        own_alpha = self.alpha_pattern.get(module)
        alpha = self.alpha if own_alpha is None else own_alpha
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(raw: bytes) -> AdapterConfig:
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_NAME}: larger than {MAX_CONFIG_BYTES} bytes")
    fields = parse_object(raw, CONFIG_NAME)
    _check_kind(fields)
    _check_keys(fields)
    work = Work()
    return AdapterConfig(
        base_model_name=_text(fields, "base_model_name_or_path"),
        rank=_rank("r", fields.get("r", 8)),
        alpha=_alpha("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=_flag(fields, "use_rslora"),
        use_dora=_flag(fields, "use_dora"),
        lora_bias=_lora_bias(fields),
        bias=_bias(fields),
        invocation_tokens=_invocation_tokens(fields),
        rank_pattern=_patterns(fields, "rank_pattern", _rank, work),
        alpha_pattern=_patterns(fields, "alpha_pattern", _alpha, work),
        is_selected=_selection(fields, work),
        saved_modules=_saved_modules(fields),
        token_ids=_token_ids(fields),
        ties_ends=_flag(fields, "ensure_weight_tying"),
    )


def _check_kind(fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise _invalid(
            f"peft_type is {_shown(fields.get('peft_type'))}; only LORA is served: train LoRA, or"
            " convert it with PEFT's save_as_lora, if it can be"
        )
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise _invalid(f"task_type is {_shown(fields['task_type'])}; only CAUSAL_LM is served")
    _check_init(fields.get("init_lora_weights", True))


def _check_init(init: object) -> None:
    """Some begin with a part taken out of the base's weights, and go with what is left of them."""
    name = init.lower() if isinstance(init, str) else ""
    if init in (True, False, None) or name in _SELF_CONTAINED_INITS:
        return
    about = f"init_lora_weights is {_shown(init)}"
    if name.startswith(_CONVERTIBLE_INITS):
        raise _invalid(
            f"{about}, which changes the base's own weights; convert it with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if name == "loftq":
        raise _invalid(
            f"{about}, which changes the base's own weights, and PEFT cannot convert it; train from"
            " replace_lora_weights_loftq, which does not"
        )
    raise _invalid(f"{about}, which is not known to leave the base's weights as they are")


def _check_keys(fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if key in _READ or key in _HARMLESS or _is_off(value):
            continue
        reason = _UNSUPPORTED.get(key, "this key is not known to be harmless, and is not served")
        raise _invalid(f"{repr(key[:100])[1:-1]} is {_shown(value)}: {reason}")


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


# -- numbers --------------------------------------------------------------------------------


def _rank(field: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _invalid(f"{field} is {_shown(value)}; ranks are whole numbers of 1 to {MAX_RANK}")
    return value


def _alpha(field: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e30:
        raise _invalid(f"{field} is {_shown(value)}; a finite number is expected")
    return float(value)


def _flag(fields: dict[str, Any], field: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise _invalid(f"{field} is {_shown(value)}; true or false is expected")
    return bool(value)


def _bias(fields: dict[str, Any]) -> Bias:
    value = fields.get("bias")
    if not isinstance(value, str | None) or value not in _BIASES:
        raise _invalid(f"bias is {_shown(value)}; 'none', 'all' or 'lora_only' is expected")
    return _BIASES[value]


def _lora_bias(fields: dict[str, Any]) -> bool:
    lora_bias = _flag(fields, "lora_bias")
    if lora_bias and _flag(fields, "use_dora"):
        raise _invalid("lora_bias and use_dora are both true, which PEFT itself refuses")
    return lora_bias


def _invocation_tokens(fields: dict[str, Any]) -> tuple[int, ...]:
    """Empty ones are plain LoRA to PEFT on dense weights, and none at all on 4-bit ones."""
    field = "alora_invocation_tokens"
    value = fields.get(field)
    if value is None:
        return ()
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INVOCATION_TOKENS:
        raise _invalid(
            f"{field} is {_shown(value)}; a list of 1 to {MAX_INVOCATION_TOKENS} token ids is"
            " expected, or null for LoRA that acts everywhere"
        )
    if not all(type(item) is int and 0 <= item <= sys.maxunicode for item in value):
        raise _invalid(f"{field} is {_shown(value)}; token ids are whole numbers from 0")
    if fields.get("task_type") != "CAUSAL_LM":
        raise _invalid(f"{field} needs task_type CAUSAL_LM; without it PEFT applies it nowhere")
    if _flag(fields, "use_dora") or fields.get("init_lora_weights") == "mica":
        raise _invalid(f"{field} goes neither with use_dora nor with MiCA, in PEFT itself")
    return tuple(value)


def _text(fields: dict[str, Any], field: str) -> str:
    value = fields.get(field) or ""
    if not isinstance(value, str):
        raise _invalid(f"{field} is {_shown(value)}; a string is expected")
    return value


def _patterns(
    fields: dict[str, Any], field: str, read: Callable[[str, object], Number], work: Work
) -> FirstMatch[Number]:
    value = fields.get(field) or {}
    if not isinstance(value, dict):
        raise _invalid(f"{field} is {_shown(value)}; it maps module names to numbers")
    numbers = {key: read(f"{field}[{key[:100]!r}]", item) for key, item in value.items()}
    return FirstMatch.of(field, numbers, work)


# -- which modules --------------------------------------------------------------------------


def _selection(fields: dict[str, Any], work: Work) -> Matcher:
    """PEFT's `check_target_module_exists`, for the modules of a causal language model."""
    targets = fields.get("target_modules")
    is_target = _target_matcher(fields, targets, work)
    is_excluded = _exclusion(fields, work)
    saved = _saved_modules(fields)

    def is_selected(module: str) -> bool:
        in_saved = any(f".{name}." in f".{module}." for name in saved)
        return is_target(module) and not is_excluded(module) and not in_saved

    return is_selected


def _saved_modules(fields: dict[str, Any]) -> tuple[str, ...]:
    return _module_names("modules_to_save", fields.get("modules_to_save") or [])


def _module_names(field: str, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) > MAX_NAMES:
        raise _invalid(f"{field} must be a list of at most {MAX_NAMES} module names")
    for name in names:
        if isinstance(name, str) and len(name) > MAX_NAME_CHARS:
            raise _invalid(f"{field}: {_shown(name)} is longer than {MAX_NAME_CHARS} characters")
        if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
            raise _invalid(f"{field}: {_shown(name)} is not a module name")
    return tuple(names)


def _token_ids(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    field = "trainable_token_indices"
    value = fields.get(field) or {}
    by_name = value if isinstance(value, dict) else {"embed_tokens": value}
    for name, ids in by_name.items():
        is_end = EMBEDDING_MODULE.endswith(name) or HEAD_MODULE.endswith(name)
        if not name or not is_end:
            raise _invalid(f"{field} names {_shown(name)}; it may name embed_tokens and lm_head")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise _invalid(f"{field} must be a list of token ids, or map modules to such lists")
        if not 0 < len(ids) == len(set(ids)) <= MAX_TOKEN_IDS:
            raise _invalid(f"{field} must hold 1 to {MAX_TOKEN_IDS} token ids, each once")
    return {name: tuple(ids) for name, ids in by_name.items()}


def _target_matcher(fields: dict[str, Any], targets: object, work: Work) -> Matcher:
    if isinstance(targets, str) and targets:
        for field in ("layers_to_transform", "layers_pattern"):
            if not _is_off(fields.get(field)):
                raise _invalid(f"{field} needs target_modules to be a list of names")
        if targets.lower() == _ALL_LINEAR:
            return lambda module: module not in (EMBEDDING_MODULE, HEAD_MODULE)
        return Pattern("target_modules", targets, work=work).matches
    names = _names("target_modules", targets)
    if not names:
        raise _invalid("target_modules is empty: name the modules that the adapter changes")
    in_layers = _layer_matcher(fields)
    return lambda module: module in names or (_ends_in(names, module) and in_layers(module))


def _exclusion(fields: dict[str, Any], work: Work) -> Matcher:
    excluded = fields.get("exclude_modules")
    if _is_off(excluded):
        return lambda module: False
    if isinstance(excluded, str):
        return Pattern("exclude_modules", excluded, work=work).matches
    names = _names("exclude_modules", excluded)
    return lambda module: module in names or _ends_in(names, module)


def _ends_in(names: frozenset[str], module: str) -> bool:
    """Whether a name stands at the end of `module`, after a dot."""
    rest = module
    while "." in rest:
        rest = rest.partition(".")[2]
        if rest in names:
            return True
    return False


def _layer_matcher(fields: dict[str, Any]) -> Matcher:
    wanted = _layers(fields.get("layers_to_transform"))
    expressions = _layer_expressions(fields.get("layers_pattern"))
    if fields.get("layers_to_transform") is None and expressions != (_FIRST_INDEX,):
        raise _invalid("layers_pattern needs layers_to_transform")
    if not wanted:
        return lambda module: True

    def in_layers(module: str) -> bool:
        matches = (expression.match(module) for expression in expressions)
        found = next((match for match in matches if match), None)
        return found is not None and int(found["index"]) in wanted

    return in_layers


def _layers(value: object) -> frozenset[int]:
    layers = [value] if type(value) is int else [] if value is None else value
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise _invalid("layers_to_transform must be a layer number or a list of them")
    return frozenset(layers)


def _layer_expressions(value: object) -> tuple[re.Pattern[str], ...]:
    names = [value] if isinstance(value, str) and value else value or []
    names = _module_names("layers_pattern", names)
    expressions = (rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in names)
    return tuple(re.compile(expression) for expression in expressions) or (_FIRST_INDEX,)


def _names(field: str, value: object) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _invalid(f"{field} must be a string or a list of strings")
    return frozenset(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _invalid(reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"{CONFIG_NAME}: {reason}")
