"""Which tokenizer does an adapter bring? tokenizer.json and what may stand beside it, bounded.

In: open files. Out: their content and a digest of what of it matters, or why the adapter is
refused. The base's files are read likewise, so that an adapter that brings the base's tokenizer is
seen to bring none. It must not know torch, or how a tokenizer works.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import read_exactly
from lory_server.adapters.tokenizer_steps import NO_STEPS, Steps, check_steps, steps_of

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
COMPANIONS = (CONFIG_NAME, SPECIAL_NAME, TEMPLATE_NAME)
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
MAX_CONFIG_BYTES = 8 * 1024 * 1024
MOST_TIMES_THE_BASE = 4
"""Of a tokenizer.json with a vocabulary of its own, beside a small base's:"""
ALWAYS_ALLOWED_BYTES = 4 * 1024 * 1024
MAX_TEMPLATE_CHARS = 262_144
DIGEST_CHARS = 32

_NOT_OF_CONTENT = ("version", "truncation", "padding")
"""Set by whoever used it last; a server neither cuts nor pads."""

Object = dict[str, object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What an adapter or a base says of its tokenizer."""

    raw: bytes = field(repr=False)
    """tokenizer.json."""
    special_tokens: Mapping[str, str]
    """By name."""
    chat_template: str
    """Empty: it has none."""
    num_tokens: int
    """One more than the largest id."""
    digest: str
    """Of all that matters."""
    content: str
    """Digest of tokenizer.json alone, of what of it matters."""
    steps: Steps = NO_STEPS
    """What it does to a text."""
    model: str = ""
    """Digest of its vocabulary and merges."""
    rest: bytes = field(default=b"", repr=False)
    """tokenizer.json without these."""
    num_bytes: int = 0
    """Of tokenizer.json."""
    sha256: str = ""
    """Of its bytes."""

    def repeats(self, base: "TokenizerFiles") -> bool:
        """Whether it says nothing that `base` does not say."""
        return (
            self.content == base.content
            and self.special_tokens.items() <= base.special_tokens.items()
            and self.chat_template in ("", base.chat_template)
        )


def read_tokenizer(descriptors: Mapping[str, int]) -> TokenizerFiles:
    """Of an adapter's open files, by name; raises AdapterInvalidError."""
    return tokenizer_of({name: _read(fd, name) for name, fd in descriptors.items()})


def read_base_tokenizer(folder: Path) -> TokenizerFiles | None:
    """What is compared with, without its bytes; None: it has no tokenizer.json to compare with."""
    paths = [folder / name for name in (TOKENIZER_NAME, *COMPANIONS)]
    try:
        files = tokenizer_of({path.name: path.read_bytes() for path in paths if path.is_file()})
        return replace(files, raw=b"", rest=b"")
    except (OSError, AdapterInvalidError):
        return None


def tokenizer_of(files: Mapping[str, bytes]) -> TokenizerFiles:
    if TOKENIZER_NAME not in files:
        raise AdapterInvalidError(f"{TOKENIZER_NAME} is missing")
    raw = files[TOKENIZER_NAME]
    value = _object(raw, TOKENIZER_NAME)
    config = _object(files.get(SPECIAL_NAME, b"{}"), SPECIAL_NAME)
    config |= _object(files.get(CONFIG_NAME, b"{}"), CONFIG_NAME)
    special_tokens = named_special_tokens(config)
    template = chat_template_of(config, _text(files.get(TEMPLATE_NAME), TEMPLATE_NAME))
    if len(template) > MAX_TEMPLATE_CHARS:
        raise _invalid(TEMPLATE_NAME, f"longer than {MAX_TEMPLATE_CHARS} characters")
    num_tokens, model, rest = _num_tokens(value), _model(value), _rest(value)
    content = _sha256([model, {n: part for n, part in rest.items() if n not in _NOT_OF_CONTENT}])
    parts = (content, sorted(special_tokens.items()), template)
    digest = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:DIGEST_CHARS]
    return TokenizerFiles(
        raw,
        special_tokens,
        template,
        num_tokens,
        digest,
        content,
        steps_of(value),
        model,
        msgspec.json.encode(rest),
        len(raw),
        hashlib.sha256(raw).hexdigest(),
    )


def check_runnable(own: TokenizerFiles, base: TokenizerFiles | None) -> None:
    """Refuses, by AdapterInvalidError, a tokenizer that could run for ever, as the base's does
    not, or that takes too long to be made."""
    if base is not None and own.content == base.content:
        return
    check_steps(own.steps, base.steps if base else NO_STEPS)
    most = max(ALWAYS_ALLOWED_BYTES, MOST_TIMES_THE_BASE * base.num_bytes if base else 0)
    if (base is None or own.model != base.model) and own.num_bytes > most:
        raise _invalid(
            TOKENIZER_NAME,
            f"has {own.num_bytes} bytes and another vocabulary than the base's; at most {most} are"
            " read of such: add tokens to the base's",
        )


def named_special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The named special tokens; each is a string or an object with `content`."""
    found: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def chat_template_of(config: Mapping[str, object], own_file: str | None) -> str:
    """chat_template.jinja goes before the configuration; of several named ones it is `default`."""
    value = config.get("chat_template") if own_file is None else own_file
    if isinstance(value, list):
        named = [one for one in value if isinstance(one, dict) and one.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else ""


def most_file_bytes(name: str) -> int:
    return MAX_TOKENIZER_BYTES if name == TOKENIZER_NAME else MAX_CONFIG_BYTES


def check_file(name: str, raw: bytes) -> None:
    """Whether one of the files is what its name says, by a look that builds nothing: what it means
    is judged when it is read. Raises AdapterInvalidError."""
    if name == TEMPLATE_NAME:
        _text(raw, name)
    else:
        _decoded(raw, name, dict[str, msgspec.Raw])


def _read(fd: int, name: str) -> bytes:
    num_bytes, most = os.fstat(fd).st_size, most_file_bytes(name)
    if num_bytes > most:
        raise _invalid(name, f"larger than {most} bytes")
    return read_exactly(fd, num_bytes, 0, name)


def _object(raw: bytes, name: str) -> Object:
    return _decoded(raw, name, dict[str, object])


def _decoded(raw: bytes, name: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except RecursionError:
        raise _invalid(name, "JSON is nested too deeply") from None
    except ValueError as error:
        raise _invalid(name, f"not a valid JSON object ({str(error)[:200]})") from None


def _text(raw: bytes | None, name: str) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        raise _invalid(name, "not UTF-8") from None


def _num_tokens(value: Object) -> int:
    """Tokens of the model are ids by token, or a list in the order of ids."""
    model = value.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = value.get("added_tokens", [])
    if not isinstance(vocab, dict | list) or not isinstance(added, list):
        raise _invalid(TOKENIZER_NAME, "has no vocabulary under model.vocab")
    own = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    ids = [one.get("id") if isinstance(one, dict) else None for one in added]
    return 1 + max(_checked(own), _checked(ids))


def _checked(ids: Iterable[object]) -> int:
    """The largest; -1 of none."""
    largest = -1
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise _invalid(TOKENIZER_NAME, "has a token whose id is no number of 31 bits")
        largest = max(largest, token_id)
    return largest


def _model(value: Object) -> str:
    model = value["model"]
    assert isinstance(model, dict)
    merges = model.get("merges")
    if isinstance(merges, list):
        model = model | {"merges": [_merge(pair) for pair in merges]}
    return _sha256(model)


def _rest(value: Object) -> Object:
    return {name: part for name, part in value.items() if name != "model"}


def _sha256(value: object) -> str:
    try:
        return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
    except RecursionError:
        raise _invalid(TOKENIZER_NAME, "JSON is nested too deeply") from None


def _merge(pair: object) -> object:
    """Written as "a b" by older versions, as ["a", "b"] by newer ones."""
    return pair.split(" ") if isinstance(pair, str) else pair


def _invalid(name: str, reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"{name}: {reason}")
