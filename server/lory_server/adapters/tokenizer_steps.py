"""What a tokenizer does to a text, and whether that could take for ever.

A tokenizer.json is a program, too: its regular expressions backtrack, a replacement makes a letter
a megabyte, and all of it runs on prompts, beside everybody else's. What an adapter needs of its own
is tokens. So its steps are the base's, or of kinds that take time in proportion to the text. It
must not know files, or how a tokenizer works.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from lory_server.adapters.errors import AdapterInvalidError

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
"""In which a step of the kind Sequence has others."""

_PLAIN = frozenset(
    {
        "BPEDecoder",
        "BertNormalizer",
        "BertPreTokenizer",
        "BertProcessing",
        "ByteFallback",
        "ByteLevel",
        "CTC",
        "CharDelimiterSplit",
        "Digits",
        "Fuse",
        "Lowercase",
        "Metaspace",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Punctuation",
        "RobertaProcessing",
        "Strip",
        "StripAccents",
        "TemplateProcessing",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
        "WordPiece",
    }
)
"""Kinds of steps that are harmless whatever they are set to, once."""
_PLAIN_MODELS = ("BPE", "WordLevel")
"""The others look at all pieces of a word that begin at each of its letters."""

MAX_STEP_BYTES = 4096
MAX_TOKEN_CHARS = 256
MAX_WORD_CHARS = 200
MAX_AFFIX_CHARS = 16
MAX_DEPTH = 8

Object = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Steps:
    by_part: Mapping[str, tuple[tuple[str, str], ...]]
    """Kind and content of each step."""
    model: str
    """Its kind."""
    longest_token: int
    """Characters."""
    longest_word: int
    """Of a WordPiece model; else 0."""
    affix: int
    """Longest text that a BPE model adds to pieces of words."""
    has_dropout: bool


NO_STEPS = Steps({}, "", 0, 0, 0, has_dropout=False)
"""Of a base that nothing is known of."""


def steps_of(tokenizer: Object) -> Steps:
    """Of the object in a tokenizer.json; raises AdapterInvalidError."""
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    return Steps(
        {part: tuple(_steps(part, tokenizer.get(part), 0)) for part in PARTS},
        _kind_of_model(model),
        max(map(len, _tokens(tokenizer, model)), default=0),
        _number(model.get("max_input_chars_per_word")),
        max(_length(model, name) for name in ("continuing_subword_prefix", "end_of_word_suffix")),
        bool(model.get("dropout")),
    )


def check_steps(own: Steps, base: Steps) -> None:
    """Raises AdapterInvalidError for what is neither plain nor the base's."""
    for part, steps in own.by_part.items():
        of_base = base.by_part.get(part, ())
        if steps != of_base:
            _check_part(part, steps, of_base)
    if own.model not in (*_PLAIN_MODELS, base.model):
        raise _invalid(
            "model.type",
            f"is {own.model[:40]!r}, the base's is {base.model!r}; bring the base's kind, with"
            " tokens added",
        )
    if own.has_dropout:
        raise _invalid("model.dropout", "is for training; set it to null")
    _check_most("model.vocab", "a token", own.longest_token, MAX_TOKEN_CHARS, base.longest_token)
    word = "model.max_input_chars_per_word"
    _check_most(word, "words", own.longest_word, MAX_WORD_CHARS, base.longest_word)
    _check_most("model", "an affix", own.affix, MAX_AFFIX_CHARS, base.affix)


def _check_part(
    part: str, steps: tuple[tuple[str, str], ...], of_base: tuple[tuple[str, str], ...]
) -> None:
    seen: set[str] = set()
    for kind, content in steps:
        is_plain = kind in _PLAIN and len(content) <= MAX_STEP_BYTES
        if not is_plain and (kind, content) not in of_base:
            raise _invalid(
                part,
                f"has a step {kind[:40]!r} ({content[:120]}) that the base's tokenizer does not"
                " have: it would run on prompts for as long as it likes; bring the base's steps,"
                " with tokens added, or take the file out of the folder to use the base's",
            )
        once = kind if is_plain else content
        if once in seen:
            raise _invalid(part, f"has the step {kind[:40]!r} twice, unlike the base's")
        seen.add(once)


def _check_most(field: str, what: str, own: int, most: int, of_base: int) -> None:
    most = max(most, of_base)
    if own > most:
        raise _invalid(field, f"has {what} of {own} characters; at most {most} are served")


def _steps(part: str, value: object, depth: int) -> Iterator[tuple[str, str]]:
    """Those of a sequence each by itself."""
    if value is None:
        return
    if not isinstance(value, dict) or depth > MAX_DEPTH:
        raise _invalid(part, "is no step, or a sequence of steps")
    kind = value.get("type")
    if kind == "Sequence":
        inner = next((value[name] for name in _LISTS if name in value), None)
        if not isinstance(inner, list):
            raise _invalid(part, "has a sequence without steps")
        for one in inner:
            yield from _steps(part, one, depth + 1)
        return
    content = msgspec.json.encode(value, order="sorted").decode()
    yield (kind if isinstance(kind, str) else ""), content


def _kind_of_model(model: Object) -> str:
    """Old files do not say."""
    kind = model.get("type")
    if isinstance(kind, str):
        return kind
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _tokens(tokenizer: Object, model: Object) -> Iterator[str]:
    vocab, added = model.get("vocab"), tokenizer.get("added_tokens")
    for entry in vocab if isinstance(vocab, dict | list) else ():
        token = entry[0] if isinstance(entry, list) and entry else entry
        if isinstance(token, str):
            yield token
    for one in added if isinstance(added, list) else ():
        content = one.get("content") if isinstance(one, dict) else None
        if isinstance(content, str):
            yield content


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _length(model: Object, name: str) -> int:
    value = model.get(name)
    return len(value) if isinstance(value, str) else 0


def _invalid(field: str, reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"tokenizer.json: {field} {reason}")
