"""The bodies of LoRAX's routes, field by field, and the shapes of their replies.

Null means not given, as lorax-client sends it. It must not know limits or how fields are used.
"""

from typing import Literal

import msgspec

Json = dict[str, object]


class MergedAdapters(msgspec.Struct, frozen=True, kw_only=True):
    ids: list[str]
    weights: list[float]
    merge_strategy: str | None = None
    density: float | None = None
    """Always sent by LoRAX's client, whether or not the strategy has a use for it."""
    majority_sign_method: str | None = None
    rank: int | None = None
    seed: int | None = None
    """These two are not LoRAX's."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    adapter_id: str | None = None
    adapter_source: str | None = None
    """"local", "hub", "s3", "https", ...; empty is not given."""
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    """The caller's, for a hub or a web server."""
    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    apply_chat_template: bool | None = None
    seed: int | None = None
    response_format: Json | None = None
    """{"type": "text"}, which is what goes without saying."""
    top_n_tokens: int | None = None
    grammar: Json | None = None
    """These two are TGI's."""


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    inputs: str | dict[str, str]
    """A prompt, or the fields of the adapter's template."""
    parameters: Parameters = Parameters()
    """Unlike its fields it may be left out but not be null."""
    stream: bool | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    inputs: str | None = None
    messages: list[Json] | None = None
    """In its place: what the chat template makes of them."""
    tools: list[Json] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    adapter_id: str | None = None
    """Whose tokenizer it is to be; the base's unless it brings one."""
    adapter_source: str | None = None
    api_token: str | None = None


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class TokenReply(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool = False


class PrefillReply(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    logprob: float | None


class SequenceReply(msgspec.Struct, frozen=True, kw_only=True):
    """One of the sequences that best_of did not choose."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillReply]
    tokens: list[TokenReply]


class Details(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillReply]
    tokens: list[TokenReply]
    best_of_sequences: list[SequenceReply] | None = None


class GenerateReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    generated_text: str
    details: Details | None = None


class StreamDetails(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class StreamReply(msgspec.Struct, frozen=True, kw_only=True):
    token: TokenReply
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    start: int
    stop: int
