"""Why an adapter cannot be served: a tree whose leaves map one to one to failure codes.

    AdapterError
      AdapterNotFoundError   adapter_not_found   nothing of that name in the adapters folder
      AdapterInvalidError    adapter_invalid     damaged, misshapen, unsupported, for another base
      AdapterCapacityError   adapter_capacity    larger than a whole tier, or than pins leave of it
      RevisionNotFoundError  revision_not_found  the adapter is there in other revisions alone

Messages are for the caller: they name the field or tensor and the fix, never a machine's paths.
What is wrong with an adapter does not name it: whoever passes that on does.
"""

from typing import TypeVar

from lory_server.messages import FailureCode
from lory_server.recipes import Recipe


class AdapterError(Exception):
    code: FailureCode
    source: str = ""
    """Of a merge, the adapter to blame."""


class AdapterNotFoundError(AdapterError, LookupError):
    code: FailureCode = "adapter_not_found"


class AdapterInvalidError(AdapterError, ValueError):
    code: FailureCode = "adapter_invalid"


class AdapterCapacityError(AdapterError):
    code: FailureCode = "adapter_capacity"


class RevisionNotFoundError(AdapterError, LookupError):
    code: FailureCode = "revision_not_found"


Blamed = TypeVar("Blamed", bound=AdapterError)


def blaming(error: Blamed, recipe: Recipe, index: int) -> Blamed:
    """The same about one source of a merge."""
    name = recipe.sources[index].adapter_id
    told = type(error)(f"source {index + 1} ({name!r}): {error}")
    told.source = name
    return told


def error_of(code: str, message: str, source: str) -> AdapterError:
    """The error that was told by its code, its text and its source."""
    error = next(kind for kind in AdapterError.__subclasses__() if kind.code == code)(message)
    error.source = source
    return error
