"""A file's keys, whichever tool they come from, to our options; and complaints in the file's words.

This module must not know what an option means.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from lory_trainer.config_keys import KEYS, OWN_TURNS, Alias, Noted, Only, Several
from lory_trainer.errors import ConfigError

LUDWIG_MARKS = ("input_features", "output_features")
LUDWIG_DEFAULTS = {"lora.dropout": 0.05, "overlong": "cut_prompt"}
"""What a file in Ludwig's form means where it says nothing and we would do something else."""

MOST_KEYS_TOLD = 20
"""Of a group, to whoever names one that is none."""


@dataclass(frozen=True, slots=True)
class Translation:
    """Nested values for our options, and which key of the file each came from."""

    values: dict[str, Any]
    sources: Mapping[str, str]
    notes: tuple[str, ...]
    known: tuple[str, ...]

    def name_of(self, option: str) -> str:
        """As the file calls it."""
        return self.sources.get(option, option)


def option_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every option's dotted path; those of a group after the group's own name."""
    for name, field in model.model_fields.items():
        group = group_of(field.annotation)
        if group is None:
            yield prefix + name
        else:
            yield from option_paths(group, f"{prefix}{name}.")


def group_of(annotation: Any) -> type[BaseModel] | None:
    """The model of an option that is a group of options."""
    choices = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def translate(given: Mapping[str, Any], source: str, model: type[BaseModel]) -> Translation:
    """Raises ConfigError naming every key that is unknown, refused or given twice."""
    reader = _Reader(tuple(option_paths(model)))
    reader.read(given, "")
    if given.get("model_type") == "llm" or any(mark in given for mark in LUDWIG_MARKS):
        reader.found = LUDWIG_DEFAULTS | reader.found
    reader.settle_prompt()
    if reader.problems:
        lines = "\n".join(f"  {line}" for line in reader.problems)
        raise ConfigError(f"{source}:\n{lines}")
    values: dict[str, Any] = {}
    for path, value in reader.found.items():
        *groups, name = path.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return Translation(values, reader.sources, tuple(reader.notes), reader.own)


class _Reader:
    """Walks a file's mapping and collects options, notes and complaints."""

    def __init__(self, own: Sequence[str]) -> None:
        self.own = tuple(own)
        self.found: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._groups = {p.rpartition(".")[0] for p in (*own, *KEYS) if "." in p}
        self._groups |= {group.rpartition(".")[0] for group in self._groups} - {""}

    def read(self, given: Mapping[Any, Any], prefix: str) -> None:
        for key, value in given.items():
            path = f"{prefix}{key}"
            if path in self._groups and isinstance(value, dict):
                self.read(value, f"{path}.")
            elif path in self._groups and value is None and path not in KEYS:
                continue
            elif path in self.own:
                self._take(path, path, OWN_TURNS.get(path, lambda v: v), value)
            elif path in KEYS:
                self._read_foreign(path, value)
            elif path in self._groups:
                self.problems.append(f"{path}: expected `key: value` lines (given: {value!r})")
            else:
                self.problems.append(f"{path}: no such key{self._did_you_mean(prefix, str(key))}")

    def _read_foreign(self, path: str, value: Any) -> None:
        match KEYS[path]:
            case Alias(to=to, turn=turn):
                self._take(path, to, turn, value)
            case Several(read=read):
                self._take_several(path, read, value)
            case Only(values=values, reason=reason):
                if not any(value == one and type(value) is type(one) for one in values):
                    self.problems.append(f"{path}: {value!r} is not taken: {reason}")
            case Noted(note=note):
                self.notes.append(f"{path}: has no effect here: {note}")

    def _take(self, path: str, to: str, turn: Any, value: Any) -> None:
        self._take_several(path, lambda v: {to: turn(v)}, value)

    def _take_several(self, path: str, read: Any, value: Any) -> None:
        try:
            values = read(copy.deepcopy(value))
        except ConfigError as error:
            self.problems.append(f"{path}: {error}")
            return
        for option, turned in values.items():
            other = self.sources.get(option)
            if other is not None and self.found[option] != turned:
                self.problems.append(f"{path}: {other} says something else; keep one of them")
            self.found[option] = turned
            self.sources[option] = path

    def settle_prompt(self) -> None:
        """Ludwig's input features are the prompt where no template is given, and its answer is the
        better one of a pair."""
        if self.found.get("method") == "dpo" and self.found.get("completion") is not None:
            source = self.sources.pop("completion")
            chosen = self.found.pop("completion")
            self._take(source, "chosen", lambda value: value, chosen)
        columns = self.found.pop("input_columns", None)
        self.sources.pop("input_columns", None)
        if columns is None or "template" in self.found:
            return
        if len(columns) == 1:
            self.found["template"] = f"{{{columns[0]}}}"
        else:
            self.problems.append("input_features: several need a prompt.template that names them")

    def _did_you_mean(self, prefix: str, key: str) -> str:
        """Names that do something, and groups."""
        useful = [p for p, found in KEYS.items() if isinstance(found, Alias | Several)]
        beside = [p.removeprefix(prefix) for p in (*self.own, *useful) if p.startswith(prefix)]
        near = [name for name in beside if "." not in name]
        close = get_close_matches(key, [*near, *self._group_names(prefix)], n=1)
        if close:
            return f"; did you mean `{close[0]}`?"
        elsewhere = next((p for p in (*self.own, *KEYS) if p.rpartition(".")[2] == key), None)
        if elsewhere is not None:
            found = KEYS.get(elsewhere)
            return f"; did you mean `{found.to if isinstance(found, Alias) else elsewhere}`?"
        known = [name for name in near if prefix + name in self.own] or near
        if len(known) > MOST_KEYS_TOLD:
            return "; docs/training.md ends with all keys"
        return f"; known: {', '.join(known)}"

    def _group_names(self, prefix: str) -> list[str]:
        names = [g.removeprefix(prefix) for g in self._groups if g.startswith(prefix)]
        return [name for name in names if "." not in name]


def explain(error: ValidationError, found: Translation) -> Iterator[str]:
    """Each complaint under the name that the file uses."""
    told: set[str] = set()
    for problem in error.errors(include_url=False):
        option = _option_of(problem["loc"], found.known)
        place = found.name_of(option)
        if problem["type"] == "missing":
            line = f"{place}: is required"
        else:
            line = f"{place}: {problem['msg']} (given: {problem['input']!r})"
        if place not in told or problem["type"] == "missing":
            yield line
        told.add(place)


def _option_of(loc: Sequence[int | str], known: Sequence[str]) -> str:
    """The option a complaint is about; what a union or a list adds to its place is left out."""
    words = [str(part) for part in loc]
    for end in range(len(words), 0, -1):
        path = ".".join(words[:end])
        if path in known:
            return path
    return ".".join(words)
