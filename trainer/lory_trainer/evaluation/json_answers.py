"""Answers that are JSON: whether they are at all, follow a schema, have the right fields.

It must not know where answers come from. Schemas are judged by the jsonschema package, and what a
schema refers to elsewhere is never fetched.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.metrics import Metric, averaged

NOT_JSON = object()


MAX_NESTING = 64


def parsed(text: str) -> Any:
    """The value that the whole answer is, or NOT_JSON; what is nested absurdly is not."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOT_JSON
    return value if _is_shallow(value, MAX_NESTING) else NOT_JSON


def _is_shallow(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def json_valid(answer: str, wanted: str) -> float:
    return float(parsed(answer) is not NOT_JSON)


def json_fields(answer: str, wanted: str) -> float:
    """Of all fields that are wanted or given, the share that are equal; 0 without valid JSON."""
    got, want = parsed(answer), parsed(wanted)
    if want is NOT_JSON:
        raise EvaluationError(f"json_fields: a wanted answer is not JSON: {wanted[:80]!r}")
    if got is NOT_JSON:
        return 0.0
    given, right = dict(_leaves(got)), dict(_leaves(want))
    names = given.keys() | right.keys()
    equal = sum(name in given and name in right and given[name] == right[name] for name in names)
    return equal / len(names)


def _leaves(value: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """Every plain value with its path, as JSON, so that 1 is neither true nor "1", but 1.0."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    elif isinstance(value, float) and value.is_integer():
        yield path, json.dumps(int(value))
    else:
        yield path, json.dumps(value)


def follows(path: Path) -> Callable[[str, str], float]:
    """Whether an answer follows the schema in a file. Raises EvaluationError."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"json_schema needs {error.name}; install it with: pip install 'lory-server[eval]'"
        ) from error
    schema = _read_schema(path)
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise EvaluationError(f"{path.name} is not a JSON schema: {error.message}") from error
    validator = kind(schema, registry=Registry())

    def is_valid(answer: str, wanted: str) -> float:
        value = parsed(answer)
        try:
            return float(value is not NOT_JSON and validator.is_valid(value))
        except Unresolvable as error:
            raise EvaluationError(
                f"{path.name} refers to {error.ref}, which is not in it, and nothing is fetched"
            ) from error
        except RecursionError as error:
            raise EvaluationError(f"{path.name} refers to itself without an end") from error

    return is_valid


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"json_schema: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"json_schema: {path.name} is not JSON: {error}") from error


JSON_VALID = averaged("json_valid", json_valid)
JSON_FIELDS = averaged("json_fields", json_fields, may_refuse=True)


def json_schema(path: Path) -> Metric:
    return averaged("json_schema.valid", follows(path), may_refuse=True)
