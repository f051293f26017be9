"""What the client takes and returns: frozen dataclasses, and the parameters by name.

Plain data; this module must not know HTTP, JSON or how a reply becomes one of these
(`lory_client.replies`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Union

Prompt = Union[str, Mapping[str, str]]
"""A text, or the fields of the adapter's template, which the server fills in."""


@dataclass(frozen=True)
class MergedAdapters:
    """Several adapters as one, for a request: `generate(..., merged_adapters=MergedAdapters(...))`.

    LoRAX's fields, and `rank` (of `svd`) and `seed` (of `dare_linear` and `dare_ties`).
    """

    ids: Sequence[str]
    weights: Sequence[float]
    merge_strategy: str | None = None
    """`linear`, the weighted sum of what they change, unless given."""
    density: float | None = None
    """The share of numbers that is kept, where the strategy prunes."""
    majority_sign_method: str | None = None
    """`total` or `frequency`."""
    rank: int | None = None
    seed: int | None = None


class GenerateParameters(TypedDict, total=False):
    """Parameters of `generate` and `generate_stream`. Only those given are sent."""

    adapter_source: str
    """Where the adapter comes from; unless given, what its name begins with says so."""
    api_token: str
    """The caller's own, for that source."""
    merged_adapters: MergedAdapters | Mapping[str, Any]
    """In place of an adapter."""
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop: Sequence[str]
    ignore_eos_token: bool
    return_full_text: bool
    truncate: int
    best_of: int
    decoder_input_details: bool
    details: bool
    """Finish reason, tokens and usage; sent as true unless given."""
    extra: Mapping[str, Any]
    """More parameters, sent as they are: for a server newer than this client."""


class ChatParameters(TypedDict, total=False):
    """Parameters of `chat` and `chat_stream`. Only those given are sent."""

    adapter_source: str
    api_token: str
    merged_adapters: MergedAdapters | Mapping[str, Any]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    stop: str | Sequence[str]
    n: int
    logprobs: bool
    top_logprobs: int
    ignore_eos_token: bool
    user: str
    extra: Mapping[str, Any]
    """More fields of the body, sent as they are: for a server newer than this client."""


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class PromptToken:
    id: int
    text: str
    logprob: float | None
    """None for the first token: nothing stands before it."""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str
    """What it adds to the answer, as it is to be shown; empty for a special token."""
    logprob: float | None
    special: bool
    """A control token, such as the end of sequence: not part of the answer's text."""
    raw_text: str
    """The token's text as the server sent it, that of a special token too."""


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    generated_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True)
class Candidate:
    """A sequence that `best_of` did not choose."""

    text: str
    finish_reason: str
    tokens: tuple[Token, ...]
    generated_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Generation:
    """The answer to a prompt. With `details=False` only the text and the ids are known."""

    text: str
    finish_reason: str | None = None
    """`length`, `eos_token` or `stop_sequence`."""
    tokens: tuple[Token, ...] = ()
    prompt_tokens: tuple[PromptToken, ...] = ()
    """Filled by `decoder_input_details=True`."""
    usage: Usage | None = None
    seed: int | None = None
    adapter_id: str | None = None
    request_id: str | None = None
    other_candidates: tuple[Candidate, ...] = ()
    adapter_revision: str | None = None
    """A digest of the bytes that gave the answer."""


@dataclass(frozen=True)
class TokenLogprob:
    """A chat token that was asked for with `logprobs`, and the likeliest ones beside it."""

    text: str
    logprob: float
    alternatives: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ChatChoice:
    index: int
    text: str
    finish_reason: str | None
    """`stop` or `length`."""
    role: str = "assistant"
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ChatCompletion:
    """The answer to a conversation."""

    id: str
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


@dataclass(frozen=True)
class ChatDelta:
    """A piece of one choice of a streamed chat."""

    index: int
    text: str
    finish_reason: str | None = None
    """Set in the choice's last piece."""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Model:
    """The base, or an adapter (whose `parent` is the base)."""

    id: str
    parent: str | None = None
    root: str | None = None


@dataclass(frozen=True)
class MatchedModules:
    """The modules of one name, over all layers, that an adapter changes."""

    modules: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class AdapterRevision:
    """A revision that is in the server's memory."""

    revision: str
    state: str
    """`host` or `device`."""
    matched: Mapping[str, MatchedModules]
    host_bytes: int
    device_bytes: int
    requests: int
    pinned: bool
    invocation_tokens: tuple[int, ...] = ()
    """Of an aLoRA: it acts from these on."""


@dataclass(frozen=True)
class Download:
    """An adapter on its way to the server."""

    num_bytes: int
    """That have come."""
    total_bytes: int | None
    """That will have; None: its source does not tell."""
    seconds: float


@dataclass(frozen=True)
class UploadedAdapter:
    """What came of sending one."""

    id: str
    """What requests name: `upload:NAME`."""
    revision: str | None
    """A digest of its bytes; None until it has been read."""
    num_bytes: int


@dataclass(frozen=True)
class MergeSource:
    adapter_id: str
    weight: float
    revision: str | None
    """None: whichever the adapter has."""


@dataclass(frozen=True)
class Merge:
    """A recipe; what its method does not use is None."""

    method: str
    adapters: tuple[MergeSource, ...]
    density: float | None
    majority_sign_method: str | None
    rank: int | None
    seed: int | None


@dataclass(frozen=True)
class Adapter:
    """An adapter, as the server knows it."""

    id: str
    state: str
    """`fetching`, `disk`, `host`, `device`, or `refused`."""
    revision: str | None
    """A digest of its bytes, known once it has been read."""
    matched: Mapping[str, MatchedModules]
    """What it changes; empty while it is not in memory."""
    disk_bytes: int | None
    host_bytes: int
    device_bytes: int
    requests: int
    """Waiting or running now."""
    last_used: float | None
    """In seconds since 1970."""
    pinned: bool
    names: Mapping[str, str | None]
    """Aliases and further names, each with its revision; None: it follows the adapter."""
    revisions: tuple[AdapterRevision, ...]
    """Those in memory, oldest first: one that was replaced stays while requests use it."""
    refused: str | None
    """Why it could not be loaded."""
    invocation_tokens: tuple[int, ...] = ()
    """Of an aLoRA, while it is in memory: it acts from these on."""
    owner: str | None = None
    """The tenant that it is for alone."""
    download: Download | None = None
    """What is on its way."""
    merged: Merge | None = None
    """How it is made of others, if it is."""


@dataclass(frozen=True)
class TextToken:
    """A token of a text, and where it stands in it."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class ServerInfo:
    model_id: str
    model_dtype: str | None
    model_device_type: str | None
    max_input_length: int | None
    max_total_tokens: int | None
    version: str | None
    fields: Mapping[str, Any]
    """The whole reply, for what this version of the client does not name."""
