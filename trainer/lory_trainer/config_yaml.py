"""YAML text to plain values, with what YAML lets pass in silence refused.

This module must not know which keys there are.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from lory_trainer.errors import ConfigError


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        duplicates = sorted(_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader)))
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply, or an alias within itself") from error
    if duplicates:
        raise ConfigError(f"{source}: given twice: {', '.join(duplicates)}; keep one of each")
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected `key: value` lines; at least base and data")
    return values


def _duplicate_keys(node: yaml.Node | None) -> Iterator[str]:
    """YAML lets the last of two equal keys win, in silence."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"a key must be text, not a list or mapping{key.start_mark}")
        if key.value in seen:
            yield key.value
        seen.add(key.value)
        yield from _duplicate_keys(value)
