"""Reads a JSON object field by field: unknown fields are let be, wrong ones are named.

This module must not know which objects there are, or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import ProtocolError


class Fields:
    """A JSON object, and the name it goes by in error messages."""

    def __init__(self, value: object, name: str) -> None:
        if not isinstance(value, Mapping):
            raise ProtocolError(f"{name} should be an object, got {_kind(value)}")
        self.value: Mapping[str, Any] = value
        self.name = name

    def has(self, key: str) -> bool:
        return self.value.get(key) is not None

    def text(self, key: str) -> str:
        return self._of(key, str, "a string")

    def integer(self, key: str) -> int:
        return self._of(key, int, "an integer")

    def flag(self, key: str) -> bool:
        return self._of(key, bool, "a boolean")

    def number(self, key: str) -> float:
        return float(self._of(key, (int, float), "a number"))

    def text_or_none(self, key: str) -> str | None:
        return self.text(key) if self.has(key) else None

    def integer_or_none(self, key: str) -> int | None:
        return self.integer(key) if self.has(key) else None

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def object(self, key: str) -> Fields:
        return Fields(self.value.get(key), f"{self.name}.{key}")

    def objects(self, key: str) -> list[Fields]:
        """The objects of a list; an absent or null list is empty."""
        items = self._of(key, list, "a list") if self.has(key) else []
        return [Fields(item, f"{self.name}.{key}[{i}]") for i, item in enumerate(items)]

    def _of(self, key: str, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.value.get(key)
        is_stray_flag = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or is_stray_flag:
            raise ProtocolError(f"{self.name}.{key} should be {wanted}, got {_kind(value)}")
        return value


def parse_json(text: str | bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ProtocolError(f"{name} is not JSON: is this a Lory server?") from None


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
