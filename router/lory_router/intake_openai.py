"""OpenAI's requests to sequences for the engine: its rules, its defaults, its words in refusals.

It must not know HTTP or how a reply is framed.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from lory_router import asking, tokenize, validate
from lory_router.asking import Context, Template
from lory_router.bodies import (
    read_object,
    read_struct,
    refuse_unknown_inside,
    unknown_field,
    unknown_fields,
)
from lory_router.chat_prompt import chat_prompt
from lory_router.errors import Invalid, adapter_not_found
from lory_router.merging import MergeNamed, asked_of, check_merged
from lory_router.schemas_lorax import MergedAdapters
from lory_router.schemas_openai import (
    HARMLESS,
    NOT_SERVED,
    OF_OTHER_ROUTES,
    ChatBody,
    CommonBody,
    CompletionBody,
    StreamOptions,
)
from lory_router.settings import RouterSettings
from lory_router.text import TextModel
from lory_router.validate import Ask, Named
from lory_server.messages import Sampling

DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_TOKENS = 64
LEAST_TOP_P = 1e-6
"""The likeliest token alone, which is what OpenAI's 0 means."""
TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
NAMES_HERE = {
    "adapter_id": "model",
    "adapter_name": "model",
    "lora_name": "model",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
}
"""What fields of other routes are called."""

B = TypeVar("B", bound=CommonBody)


@dataclass(frozen=True, slots=True)
class OpenaiJob:
    """What is to be generated, and what of it the reply shows."""

    model: str
    """The name the caller used, or the base's own."""
    adapter_id: str
    is_merge: bool
    """Then adapter_id lists several."""
    asks: tuple[tuple[Ask, ...], ...]
    """For each prompt, its sequences: as many as best_of."""
    prompt_texts: tuple[str, ...]
    """Of each prompt, for echo; empty otherwise."""
    num_choices: int
    """How many of a prompt's sequences are shown."""
    num_top_logprobs: int | None
    """None: no log-probabilities at all."""
    template: Template
    text: TextModel
    """Of its tokens."""
    answer: bool
    """False where only the prompt is echoed (max_tokens 0)."""
    stream: bool
    include_usage: bool
    continuous_usage: bool


def read_body(body: bytes, kind: type[B]) -> B:
    """The body; a field that the route does not use may be there only if it has no effect."""
    value = read_object(body)
    for name in unknown_fields(value, kind):
        _check_unused(name, value.pop(name), kind)
    options = value.get("stream_options")
    if isinstance(options, dict):
        refuse_unknown_inside(options, StreamOptions, "stream_options")
    merged = value.get("merged_adapters")
    if isinstance(merged, dict):
        refuse_unknown_inside(merged, MergedAdapters, "merged_adapters")
    return read_struct(value, kind)


def _check_unused(name: str, value: object, kind: type[CommonBody]) -> None:
    if name in OF_OTHER_ROUTES:
        if value is not False:
            raise _of_other_route(name)
    elif name in NOT_SERVED:
        if value not in NOT_SERVED[name]:
            raise _not_served(name)
    elif name not in HARMLESS:
        known = [*kind.__struct_fields__, *HARMLESS]
        raise unknown_field(name, known, elsewhere=NAMES_HERE)


def _of_other_route(name: str) -> Invalid:
    here = NAMES_HERE.get(name)
    hint = f"it is called `{here}`" if here else "leave it out"
    return Invalid(f"`{name}` is not a field of this route; {hint}", param=name)


def _not_served(name: str) -> Invalid:
    """Names the values that may be given, where they say more than "without it"."""
    telling = [value for value in NOT_SERVED[name] if value and value != "none"]
    listed = " or ".join(json.dumps(value) for value in telling)
    other = f" other than {listed}" if listed else ""
    return Invalid(f"`{name}`{other} is not supported yet", param=name)


def adapter_of(model: str, settings: RouterSettings) -> str:
    """The adapter that `model` names: "adapter" or "base:adapter"; empty for the base."""
    return _named(model, None, None, settings).adapter_id


def _named(model: str, source: str | None, token: str | None, settings: RouterSettings) -> Named:
    """The same with `adapter_source` and `api_token`; an adapter may have its source before it."""
    if model in settings.model_names:
        return validate.check_adapter("", source, token, settings)
    for base in settings.model_names:
        if model.startswith(f"{base}:"):
            name = model.removeprefix(f"{base}:")
            named = validate.check_adapter(name, source, token, settings)
            if not named.adapter_id:
                raise adapter_not_found(model)
            return named
    return validate.check_adapter(model, source, token, settings)


def model_of(adapter_id: str, settings: RouterSettings) -> str:
    """What `adapter_of` turns back: an adapter called as the base is has to be named through it."""
    names = settings.model_names
    if adapter_id in names or adapter_id.startswith(tuple(f"{name}:" for name in names)):
        return f"{names[0]}:{adapter_id}"
    return adapter_id


async def accept_completion(body: CompletionBody, context: Context) -> OpenaiJob:
    check_common(body, context)
    _check_completion(body, context)
    prompts = _prompts(body.prompt, context.settings)
    body, context = await _with_manner(body, context)
    ids = [await _completion_ids(prompt, context) for prompt in prompts]
    wanted = body.max_tokens
    if wanted is None and context.manner.defaults.max_new_tokens is None:
        wanted = DEFAULT_COMPLETION_TOKENS
    num = body.best_of or body.n or 1
    least = 1 if wanted == 0 else wanted
    return _job(
        body,
        context,
        asks=_all_asks(body, context, ids, num, least, body.logprobs),
        prompt_texts=tuple(_echo_text(p, context.text) for p in prompts) if body.echo else (),
        num_top_logprobs=body.logprobs,
        template="none",
        answer=wanted != 0,
    )


async def accept_chat(body: ChatBody, context: Context) -> OpenaiJob:
    check_common(body, context)
    wanted = body.max_completion_tokens
    if wanted is None:
        wanted = body.max_tokens
    validate.check_answer_length(_answer_length_name(body), wanted, 1, context.info)
    num_top = _chat_logprobs(body, context.settings)
    body, context = await _with_manner(body, context)
    ids, template = await _chat_ids(body, context)
    return _job(
        body,
        context,
        asks=_all_asks(body, context, [ids], body.n or 1, wanted, num_top),
        prompt_texts=(),
        num_top_logprobs=num_top,
        template=template,
        answer=True,
    )


async def _with_manner(body: B, context: Context) -> tuple[B, Context]:
    """The body filled in by the manner of the adapter that it names."""
    context = await asking.asked_in_manner(context, _adapter(body, context.settings))
    return asking.filled_in(body, context.manner), context


def _answer_length_name(body: CommonBody) -> str:
    """The field that limits the answer, as the caller named it."""
    given = getattr(body, "max_completion_tokens", None)
    return "max_tokens" if given is None else "max_completion_tokens"


def check_common(body: CommonBody, context: Context) -> None:
    settings = context.settings
    validate.OPENAI_TEMPERATURE.check("temperature", body.temperature)
    validate.OPENAI_TOP_P.check("top_p", body.top_p)
    validate.TOP_P.check("typical_p", body.typical_p)
    validate.REPETITION.check("repetition_penalty", body.repetition_penalty)
    validate.PENALTY.check("frequency_penalty", body.frequency_penalty)
    validate.PENALTY.check("presence_penalty", body.presence_penalty)
    validate.check_count("top_k", body.top_k, -1, 2**31 - 1)
    validate.check_count("n", body.n, 1, settings.max_best_of)
    validate.check_seed(body.seed, signed=True)
    _check_lora_path(body, settings)
    _check_format(body)
    if body.stream_options is not None and not body.stream:
        raise Invalid("`stream_options` needs `stream` to be true", param="stream_options")


def _adapter(body: CommonBody, settings: RouterSettings) -> Named | MergeNamed:
    source, token = body.adapter_source, body.api_token
    if body.merged_adapters is None:
        return _named(body.model, source, token, settings)
    adapter_id = "" if body.model in settings.model_names else body.model
    return check_merged(body.merged_adapters, adapter_id, source, token, settings)


def _check_lora_path(body: CommonBody, settings: RouterSettings) -> None:
    """SGLang's name for the adapter: harmless when it says what `model` says."""
    if body.lora_path in (None, body.model, _adapter(body, settings).adapter_id):
        return
    raise Invalid(
        "`lora_path` differs from `model`; name the adapter in `model`", param="lora_path"
    )


def _check_format(body: CommonBody) -> None:
    if body.response_format not in (None, {"type": "text"}):
        raise Invalid(
            '`response_format` other than {"type": "text"} is not supported yet',
            param="response_format",
        )


def _check_completion(body: CompletionBody, context: Context) -> None:
    settings = context.settings
    validate.check_answer_length("max_tokens", body.max_tokens, 0 if body.echo else 1, context.info)
    validate.check_count("logprobs", body.logprobs, 0, settings.max_top_logprobs)
    validate.check_count("best_of", body.best_of, body.n or 1, settings.max_best_of)
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise Invalid("`best_of` > `n` cannot be streamed", param="best_of")
    if body.stream and body.echo:
        raise Invalid("`echo` cannot be streamed", param="echo")


def _chat_logprobs(body: ChatBody, settings: RouterSettings) -> int | None:
    validate.check_count("top_logprobs", body.top_logprobs, 0, settings.max_top_logprobs)
    if not body.logprobs:
        if body.top_logprobs:
            raise Invalid("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
        return None
    return body.top_logprobs or 0


Prompt = str | tuple[int, ...]


def _prompts(prompt: str | list[str | int | list[int]], settings: RouterSettings) -> list[Prompt]:
    """A text, a list of texts, one list of token ids, or a list of such lists."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [tuple(ids)]
    if ids or not prompt:
        raise Invalid("`prompt` must be texts or token ids, one kind, at least one", param="prompt")
    if len(prompt) > settings.max_prompts:
        raise Invalid(f"`prompt` may hold at most {settings.max_prompts} prompts", param="prompt")
    return [item if isinstance(item, str) else tuple(_ints(item)) for item in prompt]


def _ints(item: int | list[int]) -> list[int]:
    return item if isinstance(item, list) else [item]


async def _completion_ids(prompt: Prompt, context: Context) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if not prompt:
            raise Invalid("`prompt` cannot be empty", param="prompt")
        most = validate.max_input_length(context.info, context.settings)
        tokenize.check_length("prompt", prompt, context.text, most)
        ids = await tokenize.encode(context.text, prompt, context.settings)
    else:
        ids = prompt
    validate.check_prompt("prompt", len(ids), context.info, context.settings)
    asking.check_token_ids("prompt", ids, context)
    return ids


def _echo_text(prompt: Prompt, text: TextModel) -> str:
    return prompt if isinstance(prompt, str) else text.decode(prompt)


async def _chat_ids(body: ChatBody, context: Context) -> tuple[tuple[int, ...], Template]:
    adapter_id = _adapter(body, context.settings).adapter_id
    prompt = await asyncio.to_thread(
        chat_prompt, body, context.text.chat_template, context.manner, adapter_id
    )
    most = validate.max_input_length(context.info, context.settings)
    tokenize.check_length("messages", prompt.text, context.text, most)
    special = not prompt.has_specials
    ids = await tokenize.encode(context.text, prompt.text, context.settings, special)
    validate.check_prompt("messages", len(ids), context.info, context.settings)
    asking.check_token_ids("messages", ids, context)
    return ids, prompt.template


def _job(
    body: CommonBody,
    context: Context,
    asks: tuple[tuple[Ask, ...], ...],
    prompt_texts: tuple[str, ...],
    num_top_logprobs: int | None,
    template: Template,
    answer: bool,
) -> OpenaiJob:
    options = body.stream_options
    return OpenaiJob(
        model=body.model or context.settings.model_names[0],
        adapter_id=_adapter(body, context.settings).adapter_id,
        is_merge=body.merged_adapters is not None,
        asks=asks,
        prompt_texts=prompt_texts,
        num_choices=body.n or 1,
        num_top_logprobs=num_top_logprobs,
        template=template,
        text=context.text,
        answer=answer,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _all_asks(
    body: CommonBody,
    context: Context,
    prompts: Sequence[tuple[int, ...]],
    num: int,
    wanted: int | None,
    num_top: int | None,
) -> tuple[tuple[Ask, ...], ...]:
    most_name = "n" if getattr(body, "best_of", None) is None else "best_of"
    validate.check_num_sequences(most_name, len(prompts), num, context.settings)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    checked = asking.all_stops(validate.check_stops(stops, context.settings), context.manner)
    seeds = iter(validate.pick_seeds(body.seed, num * len(prompts)))
    named = _adapter(body, context.settings)
    found = []
    for ids in prompts:
        base = _sampling(body, context, len(ids), wanted, num_top)
        ending = validate.ending_of(base, context.info, checked)
        samplings = [msgspec.structs.replace(base, seed=next(seeds)) for _ in range(num)]
        requests = [asked_of(named, ids, sampling, context.manner) for sampling in samplings]
        found.append(tuple(Ask(request, ending) for request in requests))
    return tuple(found)


def _sampling(
    body: CommonBody, context: Context, num_prompt: int, wanted: int | None, num_top: int | None
) -> Sampling:
    info, manner = context.info, context.manner
    default = manner.defaults.max_new_tokens or context.settings.default_max_new_tokens
    stop_ids = body.stop_token_ids or []
    if len(stop_ids) > MAX_STOP_TOKENS:
        raise Invalid(
            f"`stop_token_ids` may hold at most {MAX_STOP_TOKENS} ids", param="stop_token_ids"
        )
    asking.check_token_ids("stop_token_ids", stop_ids, context)
    ignores_end = bool(body.ignore_eos or body.ignore_eos_token)
    end_ids = () if ignores_end else asking.end_ids(manner, context.text, info)
    return Sampling(
        max_new_tokens=validate.answer_length(
            _answer_length_name(body), wanted, num_prompt, info, default
        ),
        seed=0,
        temperature=_or(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=max(_or(body.top_p, 1.0), LEAST_TOP_P),
        typical_p=_or(body.typical_p, 1.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        logit_bias=_logit_bias(body, context),
        stop_token_ids=(*stop_ids, *end_ids),
        ignore_eos=ignores_end,
        num_top_logprobs=num_top or 0,
        prompt_logprobs=bool(getattr(body, "echo", False)) and num_top is not None,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(body: CommonBody, context: Context) -> tuple[tuple[int, float], ...]:
    bias = body.logit_bias or {}
    most = context.settings.max_logit_bias
    if len(bias) > most:
        raise Invalid(f"`logit_bias` may hold at most {most} tokens", param="logit_bias")
    if not all(TOKEN_ID.fullmatch(key) for key in bias):
        raise Invalid("`logit_bias` keys must be token ids", param="logit_bias")
    for value in bias.values():
        validate.BIAS.check("logit_bias", value)
    pairs = tuple((int(key), value) for key, value in bias.items())
    asking.check_token_ids("logit_bias", [token_id for token_id, _ in pairs], context)
    return pairs
