"""Projections that some checkpoints pack into one linear: what an adapter for others is told.

PEFT trains on the modules that the checkpoint has, so an adapter's names say which kind it was made
for. It must not know tensors.
"""

from collections.abc import Collection

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PACKED = {part: packed for packed, parts in _PARTS.items() for part in parts}


def packing_of(module: str, modules: Collection[str]) -> str:
    """How the base has what an adapter calls `module`; empty if packing does not explain it."""
    prefix, dot, name = module.rpartition(".")
    packed, parts = _PACKED.get(name), _PARTS.get(name, ())
    if packed and prefix + dot + packed in modules:
        return f"packs {name} into {packed}"
    if parts and all(prefix + dot + part in modules for part in parts):
        return f"has {', '.join(parts[:-1])} and {parts[-1]} in place of {name}"
    return ""
