"""The bodies of OpenAI's routes, field by field.

Fields that are known but not used are here too: `HARMLESS` ones are accepted, `NOT_SERVED` ones
refused by name. Any other is unknown. It must not know limits or how fields are used.
"""

import msgspec

from lory_router.schemas_lorax import MergedAdapters, Parameters

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
    api_token: str | None = None
    """LoRAX's names for where the adapter comes from, and the caller's token for it."""
    merged_adapters: MergedAdapters | None = None
    """LoRAX's: several adapters as one; `model` is then the base's name."""
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
) | {"adapter_name", "inputs", "lora_name", "parameters"}
"""Fields of a route, or of another server's; here they are refused, whatever their value but null
or false."""

HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    }
)
"""OpenAI's fields that change nothing in the answer; accepted without a word."""

NOT_SERVED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "guideline": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_request": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tool_prompt": (),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's, vLLM's and LoRAX's fields that would change what happens, with the values beside null
that ask for nothing."""
