"""From what a caller wishes to what the engine is asked: ranges, defaults, and the context's end.

Shared by both dialects; each gives its own field names. It must not know JSON, HTTP or text.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from lory_router.engine import SequenceRequest, Unavailable
from lory_router.errors import ContextTooLong, Invalid, adapter_not_found, shown
from lory_router.settings import RouterSettings
from lory_router.sources.reference import (
    BadReferenceError,
    Reference,
    SourceKind,
    read_reference,
)
from lory_router.transcript import Ending
from lory_server.messages import FETCHED, EngineInfo, Sampling
from lory_server.recipes import MERGED

MAX_SEED = 2**64 - 1
MAX_ADAPTER_ID_CHARS = 256
BASE_MODEL = "__base_model__"
TAKE_TOKENS: tuple[SourceKind, ...] = ("hub", "web")
TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
UNSAFE_CHARS = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, slots=True)
class Range:
    """The values a number may take, and how that reads."""

    low: float
    high: float
    open_low: bool = False

    def check(self, name: str, value: float | None) -> None:
        if value is None:
            return
        above = value > self.low if self.open_low else value >= self.low
        if not (above and value <= self.high):
            raise Invalid(f"`{name}` must be {self}", param=name)

    def __str__(self) -> str:
        low = f"> {self.low:g}" if self.open_low else f">= {self.low:g}"
        return f"{low} and <= {self.high:g}"


TEMPERATURE = Range(0, 100)
OPENAI_TEMPERATURE = Range(0, 2)
TOP_P = Range(0, 1, open_low=True)
OPENAI_TOP_P = Range(0, 1)
REPETITION = Range(0.01, 100)
PENALTY = Range(-2, 2)
BIAS = Range(-100, 100)


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence to run: what the engine gets, and what ends it."""

    request: SequenceRequest
    ending: Ending


def engine_info(info: EngineInfo | None) -> EngineInfo:
    if info is None:
        raise Unavailable("loading", "The base is still loading; try again shortly", 5)
    return info


def check_count(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise Invalid(f"`{name}` must be between {low} and {high}", param=name)


def check_answer_length(name: str, value: int | None, low: int, info: EngineInfo) -> None:
    """Refuses too few; whether the context holds them depends on the prompt: `answer_length`."""
    if value is not None and value < low:
        high = info.max_model_len
        raise Invalid(f"`{name}` must be between {low} and {high}", param=name)


def check_num_sequences(
    name: str, num_prompts: int, num_each: int, settings: RouterSettings
) -> None:
    """Refuses what could never run: all sequences of a request must fit the queue together."""
    num = num_prompts * num_each
    if num > settings.max_sequences:
        most = settings.max_sequences
        raise Invalid(f"prompts times `{name}` must be <= {most}. Given: {num}", param=name)
    if num > settings.max_concurrent_requests:
        most = settings.max_concurrent_requests
        name = name if num_each > 1 else "prompt"
        raise Invalid(
            f"`{name}` asks for {num} sequences; this server's --max-queued is {most}", param=name
        )


def check_seed(seed: int | None, signed: bool = False) -> None:
    if seed is not None and not (-(2**63) if signed else 0) <= seed <= MAX_SEED:
        low = "-2**63" if signed else "0"
        raise Invalid(f"`seed` must be between {low} and 2**64 - 1", param="seed")


def pick_seeds(seed: int | None, num: int) -> list[int]:
    """A seed for each sequence; a request without one still gets seeds it could repeat.

    A negative one is taken modulo 2**64.
    """
    first = secrets.randbits(64) if seed is None else seed
    return [(first + index) & MAX_SEED for index in range(num)]


def check_stops(stops: Sequence[str], settings: RouterSettings) -> tuple[str, ...]:
    if len(stops) > settings.max_stop_sequences:
        most = settings.max_stop_sequences
        raise Invalid(f"`stop` supports up to {most} stop sequences", param="stop")
    if not all(stops):
        raise Invalid("`stop` holds an empty string", param="stop")
    if any(len(stop) > settings.max_stop_chars for stop in stops):
        most = settings.max_stop_chars
        raise Invalid(f"`stop` holds a string longer than {most} characters", param="stop")
    return tuple(stops)


SOURCES_OFF: dict[SourceKind, str] = {
    "hub": "fetched from a hub here; start the server with --adapter-cache FOLDER",
    "s3": "fetched from S3 here; start the server with --adapter-cache FOLDER and --s3-buckets",
    "web": "fetched by URL here; start the server with --adapter-cache FOLDER and --adapter-hosts",
    "upload": "uploaded here; start the server with --adapter-cache FOLDER and --adapter-uploads",
}


@dataclass(frozen=True, slots=True)
class Named:
    """The adapter that a caller named."""

    adapter_id: str
    """Empty: the base."""
    source: Reference | None = None
    """None: the local folder, or a name that was registered."""
    token: str = field(default="", repr=False)
    """The caller's, for the source."""

    @property
    def source_kind(self) -> str:
        return self.source.kind if self.source else "local"


def check_adapter(
    adapter_id: str | None, source: str | None, token: str | None, settings: RouterSettings
) -> Named:
    """What `adapter_id`, `adapter_source` and `api_token` name together."""
    reference = _reference(adapter_id or "", source)
    if reference is not None:
        check_source(reference, token, settings)
        return Named(reference.name, reference, token or "")
    name = check_adapter_id(adapter_id)
    if token and not (name and settings.adapter_sources):
        raise token_without_source()
    return Named(name, None, token or "")


def check_source(reference: Reference, token: str | None, settings: RouterSettings) -> None:
    """Whether it may be fetched at all, and with a token."""
    if reference.kind not in settings.adapter_sources:
        raise Invalid(f"adapters are not {SOURCES_OFF[reference.kind]}", param="adapter_source")
    if token and reference.kind not in TAKE_TOKENS:
        raise token_without_source()
    if token and not TOKEN.fullmatch(token):
        raise Invalid("`api_token` holds what no token holds", param="api_token")


def token_without_source() -> Invalid:
    return Invalid("`api_token` is for the sources hub and https", param="api_token")


def _reference(adapter_id: str, source: str | None) -> Reference | None:
    if adapter_id in ("", BASE_MODEL):
        if source not in (None, "", "local"):
            raise Invalid(
                f"`adapter_source` is {shown(source)}, but no adapter is named",
                param="adapter_source",
            )
        return None
    try:
        return read_reference(adapter_id, source)
    except BadReferenceError as error:
        raise Invalid(error.message, param=error.param) from error


def check_adapter_id(adapter_id: str | None) -> str:
    """The local adapter's name, empty for the base. One that cannot be a name is not found."""
    if adapter_id is None or adapter_id in ("", BASE_MODEL):
        return ""
    if adapter_id.startswith((FETCHED, MERGED)):
        raise adapter_not_found(adapter_id)
    parts = adapter_id.split("/")
    unsafe = UNSAFE_CHARS.search(adapter_id) or len(adapter_id) > MAX_ADAPTER_ID_CHARS
    if unsafe or any(part in ("", ".", "..") for part in parts):
        raise adapter_not_found(adapter_id)
    return adapter_id


def check_token_ids(
    name: str, token_ids: Sequence[int], num_tokens: int, whose: str = "base"
) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < num_tokens):
        raise Invalid(
            f"`{name}` holds a token id outside 0..{num_tokens - 1}, the {whose}'s vocabulary",
            param=name,
        )


def max_input_length(info: EngineInfo, settings: RouterSettings) -> int:
    longest = info.max_model_len - 1
    return min(longest, settings.max_input_length or longest)


def check_prompt(name: str, num_tokens: int, info: EngineInfo, settings: RouterSettings) -> None:
    if num_tokens == 0:
        raise Invalid(f"`{name}` holds no tokens", param=name)
    most = max_input_length(info, settings)
    if num_tokens > most:
        raise ContextTooLong(
            f"`{name}` must have at most {most} tokens. Given: {num_tokens}", param=name
        )


def answer_length(
    name: str, wanted: int | None, num_prompt: int, info: EngineInfo, default: int
) -> int:
    """How many tokens may be generated; without a wish, `default` or what the context holds."""
    room = info.max_model_len - num_prompt
    if wanted is None:
        return min(default or room, room)
    if wanted > room:
        raise ContextTooLong(
            f"prompt tokens + `{name}` must be <= {info.max_model_len}, the context of this"
            f" server. Given: {num_prompt} prompt tokens and {wanted} `{name}`",
            param=name,
        )
    return wanted


def ending_of(sampling: Sampling, info: EngineInfo, stops: tuple[str, ...]) -> Ending:
    return Ending(
        max_new_tokens=sampling.max_new_tokens,
        eos_ids=frozenset() if sampling.ignore_eos else frozenset(info.eos_token_ids),
        stop_ids=frozenset(sampling.stop_token_ids),
        stops=stops,
    )
