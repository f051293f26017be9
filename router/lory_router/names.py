"""What an adapter can be called: `support`, `team/support`, `support@prod`, `support@1f3a9c`.

In: a caller's text. Out: its parts, or a refusal that names the field. It must not know which
names there are.
"""

import re
from dataclasses import dataclass

from lory_router.errors import Invalid, shown

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ADAPTER_ID = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})?")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REVISION = re.compile(r"[0-9a-f]{6,32}")

ADAPTER_RULE = "one or two parts of letters, digits, '.', '_' and '-', joined by '/'"
REVISION_RULE = "6 to 32 of a revision's hexadecimal digits"


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """What a name stands for."""

    adapter_id: str
    revision: str = ""
    """Or its beginning; empty: whichever the adapter has."""


def split(name: str) -> tuple[str, str]:
    """An adapter's part, and what stands behind the `@`; in a source's name it is a part of it."""
    if ":" in name:
        return name, ""
    adapter_id, _, rest = name.partition("@")
    return adapter_id, rest


def is_adapter_id(text: str) -> bool:
    return _ADAPTER_ID.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None


def check_new_name(field: str, name: str, base_names: tuple[str, ...]) -> None:
    """Refuse what could not be told from something else afterwards."""
    adapter_id, alias = split(name)
    if not is_adapter_id(adapter_id) or (alias and not _ALIAS.fullmatch(alias)):
        raise Invalid(
            f"`{field}`: {shown(name)} is no name; write {ADAPTER_RULE}, an alias as name@alias",
            param=field,
        )
    if name != adapter_id and not alias:
        raise Invalid(f"`{field}`: {shown(name)} has nothing behind its '@'", param=field)
    if is_revision(alias):
        raise Invalid(
            f"`{field}`: alias {shown(alias)} reads as a revision; add a letter beyond f",
            param=field,
        )
    if name in base_names:
        raise Invalid(f"`{field}`: {shown(name)} is the base's name", param=field)


def check_revision(field: str, revision: str) -> None:
    if revision and not is_revision(revision):
        raise Invalid(f"`{field}`: give {REVISION_RULE}", param=field)
