"""LoRAX's request to sequences for the engine: its rules, its defaults, its words in refusals.

It must not know HTTP or how a reply is framed.
"""

import asyncio
import dataclasses
from dataclasses import dataclass

import msgspec

from lory_router import asking, tokenize, validate
from lory_router.asking import Context, Template
from lory_router.bodies import read_object, read_struct, refuse_unknown
from lory_router.chat_template import TemplateError
from lory_router.engine import SequenceRequest
from lory_router.errors import Invalid
from lory_router.merging import MergeNamed, asked_of, check_merged
from lory_router.schemas_lorax import GenerateBody, Json, MergedAdapters, Parameters
from lory_router.settings import RouterSettings
from lory_router.text import TextModel
from lory_router.transcript import Ending
from lory_router.validate import Ask, Named
from lory_server.messages import EngineInfo, Manner, Sampling

PARAMETER_PLACES = {name: f"parameters.{name}" for name in Parameters.__struct_fields__}
NOT_SUPPORTED = ("return_k_alternatives", "top_n_tokens", "grammar")
PLAIN_FORMATS: tuple[Json, ...] = ({"type": "text"}, {"type": "Text"})


@dataclass(frozen=True, slots=True)
class LoraxJob:
    """What is to be generated, and what of it the reply shows."""

    asks: tuple[Ask, ...]
    """One, or best_of; all of one prompt."""
    adapter_id: str
    adapter_source: str
    is_merge: bool
    """Then adapter_id lists several."""
    prompt_ids: tuple[int, ...]
    prompt_text: str
    """Put before the answer; empty unless return_full_text."""
    num_input_chars: int
    template: Template
    text: TextModel
    """Of its tokens."""
    details: bool
    """Told with prefill_details, too."""
    prefill_details: bool
    sampled: bool
    """Whether tokens are drawn, so that the seed matters."""


def read_body(body: bytes) -> GenerateBody:
    value = read_object(body)
    refuse_unknown(value, GenerateBody, elsewhere=PARAMETER_PLACES)
    parameters = value.get("parameters", {})
    if isinstance(parameters, dict):
        refuse_unknown(parameters, Parameters, inside="parameters.")
        merged = parameters.get("merged_adapters")
        if isinstance(merged, dict):
            refuse_unknown(merged, MergedAdapters, inside="parameters.merged_adapters.")
    return read_struct(value, GenerateBody)


async def accept(body: GenerateBody, stream: bool, context: Context) -> LoraxJob:
    info, settings = context.info, context.settings
    wish = body.parameters
    check_parameters(wish, stream, info, settings)
    named = _named(wish, settings)
    if not body.inputs:
        raise Invalid("`inputs` cannot be empty", param="inputs")
    context = await asking.asked_in_manner(context, named)
    manner, text = context.manner, context.text
    wish = asking.filled_in(wish, manner)
    prompt, template = _prompt(body, manner, named)
    if template == "adapter" and manner.is_chat:
        wish = msgspec.structs.replace(wish, apply_chat_template=True)
    if wish.truncate is None:
        most = validate.max_input_length(info, settings)
        tokenize.check_length("inputs", prompt, text, most)
    prompt_ids, is_cut = await _prompt_ids(prompt, wish, settings, text)
    shown = text.decode(prompt_ids) if is_cut else prompt
    validate.check_prompt("inputs", len(prompt_ids), info, settings)
    asking.check_token_ids("inputs", prompt_ids, context)
    sampling = _sampling(wish, manner, len(prompt_ids), context)
    stops = asking.all_stops(validate.check_stops(wish.stop or (), settings), manner)
    first = asked_of(named, prompt_ids, sampling, manner)
    return LoraxJob(
        asks=_asks(first, wish, validate.ending_of(sampling, info, stops)),
        adapter_id=named.adapter_id,
        adapter_source=named.source_kind,
        is_merge=isinstance(named, MergeNamed),
        prompt_ids=prompt_ids,
        prompt_text=shown if wish.return_full_text else "",
        num_input_chars=len(prompt),
        template=template,
        text=text,
        details=bool(wish.details or wish.decoder_input_details),
        prefill_details=bool(wish.decoder_input_details),
        sampled=_samples(wish),
    )


def _named(wish: Parameters, settings: RouterSettings) -> Named | MergeNamed:
    adapter_id, source, token = wish.adapter_id, wish.adapter_source, wish.api_token
    if wish.merged_adapters is None:
        return validate.check_adapter(adapter_id, source, token, settings)
    return check_merged(wish.merged_adapters, adapter_id, source, token, settings)


def check_parameters(
    wish: Parameters, stream: bool, info: EngineInfo, settings: RouterSettings
) -> None:
    _check_supported(wish)
    _check_ranges(wish, info, settings)
    _check_best_of(wish, stream, settings)
    if stream and wish.decoder_input_details:
        raise Invalid(
            "`decoder_input_details` == true is not supported when streaming tokens",
            param="decoder_input_details",
        )


def _check_supported(wish: Parameters) -> None:
    for name in NOT_SUPPORTED:
        if getattr(wish, name) is not None:
            raise Invalid(f"`{name}` is not supported yet; leave it out or null", param=name)
    _check_format(wish.response_format)
    if wish.watermark:
        raise Invalid("`watermark` is not supported; leave it out or false", param="watermark")


def _check_format(wanted: Json | None) -> None:
    """LoRAX's client always sends a schema; one beside plain text must be empty."""
    if wanted is None:
        return
    told = {name: value for name, value in wanted.items() if name != "schema" or value}
    if told not in PLAIN_FORMATS:
        raise Invalid(
            '`response_format` other than {"type": "text"} is not supported yet',
            param="response_format",
        )


def _check_ranges(wish: Parameters, info: EngineInfo, settings: RouterSettings) -> None:
    validate.TEMPERATURE.check("temperature", wish.temperature)
    validate.REPETITION.check("repetition_penalty", wish.repetition_penalty)
    validate.PENALTY.check("frequency_penalty", wish.frequency_penalty)
    validate.PENALTY.check("presence_penalty", wish.presence_penalty)
    validate.TOP_P.check("top_p", wish.top_p)
    validate.TOP_P.check("typical_p", wish.typical_p)
    validate.check_count("top_k", wish.top_k, 1, 2**31 - 1)
    validate.check_answer_length("max_new_tokens", wish.max_new_tokens, 1, info)
    longest = validate.max_input_length(info, settings)
    validate.check_count("truncate", wish.truncate, 1, longest)
    validate.check_seed(wish.seed)


def _check_best_of(wish: Parameters, stream: bool, settings: RouterSettings) -> None:
    validate.check_count("best_of", wish.best_of, 1, settings.max_best_of)
    validate.check_num_sequences("best_of", 1, wish.best_of or 1, settings)
    if wish.best_of in (None, 1):
        return
    if not _samples(wish):
        raise Invalid("you must use sampling when `best_of` is > 1", param="best_of")
    if wish.seed is not None:
        raise Invalid("`seed` must not be set when `best_of` > 1", param="seed")
    if stream:
        raise Invalid("`best_of` != 1 is not supported when streaming tokens", param="best_of")


def _samples(wish: Parameters) -> bool:
    """LoRAX samples when told to or when a warper is set; a temperature of 0 never does."""
    if wish.temperature == 0:
        return False
    warped = wish.temperature not in (None, 1.0) or wish.top_k is not None
    narrowed = (wish.top_p or 1.0) < 1.0 or (wish.typical_p or 1.0) < 1.0
    return bool(wish.do_sample) or warped or narrowed


def _prompt(body: GenerateBody, manner: Manner, named: Named | MergeNamed) -> tuple[str, Template]:
    """The text to answer, and whose template made it."""
    has_chat_template = bool(body.parameters.apply_chat_template)
    if isinstance(body.inputs, str):
        return body.inputs, "base" if has_chat_template else "none"
    if has_chat_template:
        raise Invalid(
            "`apply_chat_template` is for `inputs` as text; fields go into the adapter's template",
            param="apply_chat_template",
        )
    return asking.made_of_fields(body.inputs, manner, named.adapter_id), "adapter"


async def _prompt_ids(
    prompt: str, wish: Parameters, settings: RouterSettings, text: TextModel
) -> tuple[tuple[int, ...], bool]:
    """The prompt, and whether `truncate` took something away."""
    if wish.apply_chat_template:
        prompt = await _templated(prompt, text)
    special = not wish.apply_chat_template
    if wish.truncate is not None:
        return await tokenize.encode_end(text, prompt, settings, wish.truncate, special)
    return await tokenize.encode(text, prompt, settings, special), False


async def _templated(inputs: str, text: TextModel) -> str:
    template = text.chat_template
    if template is None:
        raise Invalid(
            "`apply_chat_template`: this base has no chat template", param="apply_chat_template"
        )
    messages = [{"role": "user", "content": inputs}]
    try:
        return await asyncio.to_thread(template.render, messages)
    except TemplateError as error:
        raise Invalid(f"chat template: {error}", param="apply_chat_template") from error


def _sampling(wish: Parameters, manner: Manner, num_prompt: int, context: Context) -> Sampling:
    wanted, info = wish.max_new_tokens, context.info
    default = manner.defaults.max_new_tokens or context.settings.default_max_new_tokens
    end_ids = () if wish.ignore_eos_token else asking.end_ids(manner, context.text, info)
    return Sampling(
        max_new_tokens=validate.answer_length("max_new_tokens", wanted, num_prompt, info, default),
        seed=validate.pick_seeds(wish.seed, 1)[0],
        temperature=_or(wish.temperature, 1.0) if _samples(wish) else 0.0,
        top_k=wish.top_k or 0,
        top_p=_or(wish.top_p, 1.0),
        typical_p=_or(wish.typical_p, 1.0),
        repetition_penalty=_or(wish.repetition_penalty, 1.0),
        frequency_penalty=_or(wish.frequency_penalty, 0.0),
        presence_penalty=_or(wish.presence_penalty, 0.0),
        stop_token_ids=end_ids,
        ignore_eos=bool(wish.ignore_eos_token),
        prompt_logprobs=bool(wish.decoder_input_details),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _asks(first: SequenceRequest, wish: Parameters, ending: Ending) -> tuple[Ask, ...]:
    asks = []
    for seed in validate.pick_seeds(first.sampling.seed, wish.best_of or 1):
        seeded = msgspec.structs.replace(first.sampling, seed=seed)
        asks.append(Ask(dataclasses.replace(first, sampling=seeded), ending))
    return tuple(asks)
