"""The bodies of OpenAI's routes, field by field.

Fields that are understood but not served are here too, so that they can be refused by name; which
is which is told in `REFUSED` and `HARMLESS`. It must not know limits or how fields are used.
"""

import msgspec

from lory_router.schemas_lorax import Parameters

Json = dict[str, object]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonBody(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat share."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = None
    """LoRAX's name for `ignore_eos`."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapter_source: str | None = None
    lora_path: str | None = None
    response_format: Json | None = None


class CompletionBody(CommonBody, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[Json] | None = None
    name: str | None = None


class ChatMessages(msgspec.Struct, frozen=True, kw_only=True):
    messages: list[ChatMessage]


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str


class ChatBody(CommonBody, frozen=True, kw_only=True):
    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: Json | None = None


OF_OTHER_ROUTES = frozenset(
    name for kind in (CompletionBody, ChatBody, Parameters) for name in kind.__struct_fields__
) | {"inputs", "parameters"}
"""Fields of a route; on another they are refused and not ignored, whatever their value but null or
false."""

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
    }
)
"""Known fields that change nothing in the answer; accepted without a word."""

ALLOWED_VALUES: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "min_p": (0, 0.0),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
}
"""Fields that would change the answer and are not served, but for these values of no effect."""

REFUSED = frozenset(
    {
        "adapter_id",
        "adapter_name",
        "api_token",
        "audio",
        "bad_words",
        "chat_template",
        "documents",
        "grammar",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "guideline",
        "lora_name",
        "lora_request",
        "moderation",
        "prediction",
        "prompt_logprobs",
        "reasoning_effort",
        "structured_outputs",
        "tool_prompt",
        "truncate_prompt_tokens",
        "verbosity",
        "web_search_options",
    }
)
"""Fields that would change the answer and are not served, whatever their value but null."""
