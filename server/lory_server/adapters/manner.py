"""How does an adapter want to be asked? adapter_manifest.json, which the trainer writes beside it.

In: an open file, or none. Out: a manner, or why the adapter is refused. Whatever else the file
tells is for people. It must not know torch, tokenizers or requests.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from string import Formatter

import msgspec

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import read_exactly
from lory_server.messages import NO_MANNER, Defaults, Manner, TrainedOn

MANIFEST_NAME = "adapter_manifest.json"
MANIFEST_VERSIONS = (1, 2)
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_TEMPLATE_CHARS = 65_536
MAX_STOPS = 16
MAX_STOP_CHARS = 256
DIGEST_CHARS = 32

_WITHOUT = "; take the file out of the folder to serve the adapter without it"
"""What to do with another writer's."""
_HEX = re.compile(r"[0-9a-f]{64}")
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-6, 1),
    "typical_p": (1e-6, 1),
    "repetition_penalty": (0.01, 100),
    "max_new_tokens": (1, 2**31 - 1),
}


class _Generation(Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request is to ask for that does not say so itself."""

    do_sample: bool | None = None
    """False: greedy, whatever the temperature."""
    stop: tuple[str, ...] | None = None


class _Quantization(msgspec.Struct, frozen=True, kw_only=True):
    bits: int | None = None


class _BaseFiles(msgspec.Struct, frozen=True, kw_only=True):
    config: str | None = None
    tokenizer: str | None = None
    weights: str | None = None
    quantization: _Quantization | msgspec.UnsetType | None = msgspec.UNSET


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What of the file is acted on; all else is passed over."""

    manifest_version: int
    template: str | None = None
    fields: tuple[str, ...] | None = None
    chat: bool | None = None
    chat_template_sha256: str | None = None
    completion_prefix: str | None = None
    generation: _Generation | None = None
    stop: tuple[str, ...] | None = None
    eos_token: str | None = None
    base_files: _BaseFiles | None = None


def read_manner_file(fd: int | None) -> Manner:
    """An adapter without a manifest asks for nothing; raises AdapterInvalidError."""
    if fd is None:
        return NO_MANNER
    num_bytes = os.fstat(fd).st_size
    if num_bytes > MAX_MANIFEST_BYTES:
        raise _invalid(f"larger than {MAX_MANIFEST_BYTES} bytes")
    return read_manner(read_exactly(fd, num_bytes, 0, MANIFEST_NAME))


def read_manner(raw: bytes) -> Manner:
    try:
        manifest = msgspec.json.decode(raw, type=_Manifest)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{str(error)[:400]}{_WITHOUT}") from None
    if manifest.manifest_version not in MANIFEST_VERSIONS:
        known = " and ".join(map(str, MANIFEST_VERSIONS))
        raise _invalid(
            f"manifest_version is {manifest.manifest_version}; {known} are known here{_WITHOUT}"
        )
    manner = Manner(
        template=_template(manifest),
        fields=_fields(manifest),
        is_chat=bool(manifest.chat),
        completion_prefix=_optional_text("completion_prefix", manifest.completion_prefix),
        defaults=_defaults(manifest.generation or _Generation()),
        stop=_stops(manifest),
        eos_token=_optional_text("eos_token", manifest.eos_token),
        base=_base(manifest),
    )
    if manner == NO_MANNER:
        return manner
    return msgspec.structs.replace(manner, digest=_digest_of(manner))


def with_tokenizer(manner: Manner, tokenizer: str, vocab_size: int) -> Manner:
    """The same, of an adapter that brings a tokenizer, and perhaps a vocabulary of its own size."""
    if not tokenizer:
        return manner
    told = f"{manner.digest} {tokenizer} {vocab_size}"
    digest = hashlib.sha256(told.encode()).hexdigest()[:DIGEST_CHARS]
    return msgspec.structs.replace(
        manner, digest=digest, tokenizer=tokenizer, vocab_size=vocab_size
    )


def _digest_of(manner: Manner) -> str:
    """Of what the manifest says; the tokenizer has a digest of its own."""
    fields = msgspec.structs.asdict(manner)
    del fields["tokenizer"], fields["vocab_size"]
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()[:DIGEST_CHARS]


def template_fields(template: str) -> tuple[str, ...]:
    """The names in braces, in order, each once. Raises AdapterInvalidError for anything cleverer:
    no attribute, index, conversion or format is ever looked up."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise _invalid(f"template: {error}; write {{{{ and }}}} for literal braces") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise _invalid(f"template: {{{name[:80]}}} is more than a field's name in braces")
    return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def render(template: str, values: Mapping[str, str]) -> str:
    """The prompt. A value is put in as it is, braces and all."""
    return "".join(
        literal + (values[name] if name is not None else "")
        for literal, name, _, _ in Formatter().parse(template)
    )


def _template(manifest: _Manifest) -> str:
    template = manifest.template or ""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise _invalid(f"template: longer than {MAX_TEMPLATE_CHARS} characters")
    return template


def _fields(manifest: _Manifest) -> tuple[str, ...]:
    found = template_fields(_template(manifest))
    if manifest.template and not found:
        raise _invalid("template: names no field; write one in braces, such as {text}")
    if manifest.fields is not None and set(manifest.fields) != set(found):
        raise _invalid("fields: are not those that the template names")
    return found


def _defaults(given: _Generation) -> Defaults:
    for name, (low, high) in _RANGES.items():
        value = getattr(given, name)
        if value is not None and not low <= value <= high:
            raise _invalid(f"generation.{name}: must be between {low:g} and {high:g}")
    values = {name: getattr(given, name) for name in Defaults.__struct_fields__}
    if given.do_sample is False:
        values["temperature"] = 0.0
    return Defaults(**values)


def _stops(manifest: _Manifest) -> tuple[str, ...]:
    of_generation = manifest.generation.stop if manifest.generation else None
    stops = tuple(dict.fromkeys((*(manifest.stop or ()), *(of_generation or ()))))
    _check_texts("stop", stops, MAX_STOP_CHARS)
    if len(stops) > MAX_STOPS:
        raise _invalid(f"stop: more than {MAX_STOPS} texts")
    return stops


def _optional_text(name: str, text: str | None) -> str:
    """Empty where there is none."""
    if text:
        _check_texts(name, (text,), MAX_STOP_CHARS)
    return text or ""


def _check_texts(name: str, texts: Sequence[str], most: int) -> None:
    if not all(0 < len(text) <= most for text in texts):
        raise _invalid(f"{name}: must have 1 to {most} characters")


def _base(manifest: _Manifest) -> TrainedOn | None:
    files = manifest.base_files or _BaseFiles()
    quantization = files.quantization
    base = TrainedOn(
        config=_digest("base_files.config", files.config),
        tokenizer=_digest("base_files.tokenizer", files.tokenizer),
        weights=_digest("base_files.weights", files.weights),
        chat_template=_digest("chat_template_sha256", manifest.chat_template_sha256),
        is_quantized=None if quantization is msgspec.UNSET else bool(quantization),
    )
    return None if base == TrainedOn() else base


def _digest(name: str, value: str | None) -> str:
    if value and not _HEX.fullmatch(value):
        raise _invalid(f"{name}: must be a SHA-256 in hexadecimal")
    return value or ""


def _invalid(reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"{MANIFEST_NAME}: {reason}")
