"""The names of an adapter's tensors: which module each belongs to, and in which role.

PEFT has a name for each role, with or without the adapter's own in it. A tensor that has no such
name, or whose module the base does not have, is refused. It must not know what the roles mean.
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import TensorSpec
from lory_server.adapters.packed_names import packing_of

Role = Literal[
    "A",
    "B",
    "embedding_A",
    "embedding_B",
    "magnitude",
    "b_bias",
    "base_layer.bias",
    "bias",
    "base_layer.weight",
    "weight",
    "saved.weight",
    "original.weight",
    "rows",
]
Tensors = dict[Role, TensorSpec]
"""Of one module."""

_ROLES: tuple[tuple[Role, str], ...] = (
    ("A", r"lora_A(?:\.default)?\.weight"),
    ("B", r"lora_B(?:\.default)?\.weight"),
    ("embedding_A", r"lora_embedding_A(?:\.default)?"),
    ("embedding_B", r"lora_embedding_B(?:\.default)?"),
    ("magnitude", r"lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
    ("b_bias", r"lora_B(?:\.default)?\.bias"),
    ("base_layer.bias", r"base_layer\.bias"),
    ("bias", r"bias"),
    ("base_layer.weight", r"base_layer\.weight"),
    ("weight", r"(?:default\.)?weight"),
    ("saved.weight", r"modules_to_save\.(?:default\.)?weight"),
    ("original.weight", r"original_module\.weight"),
    ("rows", r"token_adapter\.trainable_tokens_delta(?:\.default)?"),
)
_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    re.escape(_PREFIX)
    + r"(?P<module>.+?)\.(?:"
    + "|".join(f"({pattern})" for _, pattern in _ROLES)
    + ")",
    re.DOTALL,
)


def by_module(specs: Sequence[TensorSpec], modules: Collection[str]) -> dict[str, Tensors]:
    """The tensors by module and role; each must belong to one of the base's `modules`."""
    found: dict[str, Tensors] = {}
    for spec in specs:
        match = _TENSOR_NAME.fullmatch(spec.name)
        if match is None:
            raise invalid(spec.name, _why_no_role(spec.name))
        parts = zip(_ROLES, match.groups()[1:], strict=True)
        role: Role = next(role for (role, _), part in parts if part)
        if match["module"] not in modules:
            raise invalid(spec.name, _why_no_place(match["module"], role, modules))
        tensors = found.setdefault(match["module"], {})
        if role in tensors:
            raise invalid(spec.name, "stands twice, with and without an adapter's name")
        tensors[role] = spec
    return found


def _why_no_role(name: str) -> str:
    if "lora_" not in name:
        return "is not of LoRA on a linear layer, and is not served"
    what = "" if name.startswith(_PREFIX) else f", whose names begin with {_PREFIX!r}"
    return f"is not named as PEFT's save_pretrained names LoRA's tensors{what}; save it with that"


def _why_no_place(module: str, role: Role, modules: Collection[str]) -> str:
    if ".lora_" in module:
        return _why_no_role(_PREFIX + module)
    packing = packing_of(module, modules)
    if packing:
        return f"is not for this base, which {packing}; train it on the checkpoint that is served"
    what = "a linear" if role in ("bias", "base_layer.bias") else "a module"
    return f"is for {what} that the base does not have"


def check_shape(spec: TensorSpec, expected: tuple[int, ...], meaning: str) -> None:
    if spec.shape != expected:
        raise invalid(
            spec.name,
            f"has shape {list(spec.shape)}; the configuration and the base make it"
            f" {list(expected)} {meaning}",
        )


def invalid(name: str, reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"tensor {name[:200]!r} {reason}")
