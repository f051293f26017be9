"""What the cache answers: plain values.

It must not know how an answer was found.
"""

from dataclasses import dataclass

from lory_server.messages import NO_MANNER, AdapterEntry, FailureCode, Manner


@dataclass(frozen=True, slots=True)
class Resolved:
    """A ticket's adapter is on the host and held, until `release(revision)`."""

    ticket: int
    adapter_id: str
    revision: str
    is_latest: bool
    """Whether it is what the name stands for on disk; else it was asked for by its digest."""
    num_bytes: int
    """What it takes in the device's pool, and its full weights beside it."""
    full_bytes: int
    has_own_head: bool
    token_params: int
    """That each token takes a product with, and each row of logits."""
    head_params: int
    invocation_tokens: tuple[int, ...]
    manner: Manner = NO_MANNER
    vocab_size: int = 0
    """Of its own embedding and head; 0: the base's."""


@dataclass(frozen=True, slots=True)
class ResolveFailed:
    ticket: int
    adapter_id: str
    code: FailureCode
    message: str
    source: str = ""
    """Of a merge, the adapter to blame."""


@dataclass(frozen=True, slots=True)
class Listed:
    call_id: int
    adapters: tuple[AdapterEntry, ...]


Outcome = Resolved | ResolveFailed | Listed


@dataclass(frozen=True, slots=True)
class AdapterCounts:
    disk: int
    """As of the last look."""
    host: int
    device: int
    host_bytes: int
    device_bytes: int
    pins_host: int
    pins_device: int
