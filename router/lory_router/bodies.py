"""Request bodies: JSON text to typed values, refusing what is malformed, mistyped or unknown.

It must not know what the fields mean.
"""

import contextlib
import difflib
import gc
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

import msgspec

from lory_router.errors import BadJson, Invalid, shown

T = TypeVar("T", bound=msgspec.Struct)

AT_PATH = re.compile(r"^(?P<what>.*) - at `(?P<path>\$[^`]*)`$", re.DOTALL)
NOTHING_ELSEWHERE: Mapping[str, str] = MappingProxyType({})
MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")


def read_object(body: bytes) -> dict[str, object]:
    """The JSON object in `body`. NaN, Infinity, numbers out of range and lone surrogates are not
    JSON; of duplicate keys the last counts."""
    try:
        with _uncollected():
            value = msgspec.json.decode(body)
    except RecursionError as error:
        raise BadJson("The body is not acceptable JSON: nested too deeply") from error
    except ValueError as error:
        raise BadJson(f"The body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise Invalid("The body must be a JSON object")
    return value


def read_struct(value: object, kind: type[T]) -> T:
    """`value` as a `kind`; a wrong type is refused, naming the field."""
    try:
        with _uncollected():
            return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        message, param = explain(str(error))
        raise Invalid(message, param=param) from error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would look through all that is there time and again
    while a body of many lists is read: a second of 1 MB, for which every stream stood still. What
    is read has no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def explain(message: str) -> tuple[str, str | None]:
    """msgspec's complaint turned round: the field first, without JSON-path marks."""
    found = AT_PATH.match(message)
    what = found["what"] if found else message
    path = found["path"].removeprefix("$").removeprefix(".").replace("[...]", "") if found else ""
    missing = MISSING.match(what)
    if missing:
        param = f"{path}.{missing['name']}".lstrip(".")
        return f"`{param}` is required", param
    what = what[:1].lower() + what[1:]
    return (f"`{path}`: {what}", path) if path else (what, None)


def unknown_fields(value: dict[str, object], kind: type[msgspec.Struct]) -> list[str]:
    """Those that say something: a null is a field that was not given, whatever its name. Typed
    clients send one for each field of theirs that nobody set, and back what we replied."""
    known = kind.__struct_fields__
    return [name for name, given in value.items() if given is not None and name not in known]


def refuse_unknown(
    value: dict[str, object],
    kind: type[msgspec.Struct],
    inside: str = "",
    elsewhere: Mapping[str, str] = NOTHING_ELSEWHERE,
) -> None:
    """Nothing is accepted and ignored: an unknown field is refused, with the likely one.

    `elsewhere` gives the full names of fields that belong into another object of the body.
    """
    for name in unknown_fields(value, kind):
        raise unknown_field(name, kind.__struct_fields__, inside, elsewhere)


def refuse_unknown_inside(value: dict[str, object], kind: type[msgspec.Struct], path: str) -> None:
    for name in unknown_fields(value, kind):
        raise Invalid(
            f"`{path}`: field {shown(name)} is not supported", param=f"{path}.{name[:80]}"
        )


def unknown_field(
    name: str,
    known: Collection[str],
    inside: str = "",
    elsewhere: Mapping[str, str] = NOTHING_ELSEWHERE,
) -> Invalid:
    """The refusal of a field nobody knows, with the likely one."""
    return Invalid(
        f"unknown field {shown(inside + name)}{_hint(name, known, elsewhere)}",
        param=inside + name[:80],
    )


def _hint(name: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    places = {**elsewhere, **{field: field for field in known}}
    near = difflib.get_close_matches(name[:80], places, n=1)
    return f"; did you mean `{places[near[0]]}`?" if near else f"; known are {_listed(known)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
