"""Text in, token ids out, and back: the base's fast tokenizer without torch or transformers.

Reads `tokenizer.json`, and from `tokenizer_config.json` the named special tokens and the chat
template. It must not know requests, limits or the engine.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
from tokenizers import AddedToken, Tokenizer

from lory_router.chat_template import ChatTemplate, PromptTemplate
from lory_server.adapters.tokenizer_files import (
    chat_template_of,
    named_special_tokens,
    read_base_tokenizer,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

NO_NAMES: Mapping[str, str] = MappingProxyType({})
UNKNOWN = "?"
"""No digest."""


class TextModel:
    """A tokenizer and its chat template. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: PromptTemplate | None = None,
        special_tokens: Mapping[str, str] = NO_NAMES,
        longest_token: int = 0,
        model_digest: str = UNKNOWN,
    ) -> None:
        """`special_tokens`: those that have names, such as `eos_token`. `longest_token`: in
        characters, if that is known. `model_digest`: of its vocabulary and merges, likewise."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.special_tokens = special_tokens
        self.model_digest = model_digest
        self.special_ids = frozenset(
            token_id
            for token_id, added in tokenizer.get_added_tokens_decoder().items()
            if added.special
        )
        self.longest_token = longest_token or max(map(len, tokenizer.get_vocab()), default=1)
        """Characters."""
        self.long_texts = asyncio.Semaphore(1)
        """Held while a long text is tokenized."""
        self.token_bytes = TokenBytes(tokenizer)
        self._texts: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        # The batch call lets go of the interpreter while it works; the single one does not.
        (encoding,) = self.tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return tuple(encoding.ids)

    def locate(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """Each token of `text`, and the characters from and to which it stands."""
        (encoding,) = self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [(token_id, start, stop) for token_id, (start, stop) in places]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself. Kept: there are as many as the vocabulary has."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode((token_id,), skip_special_tokens=False)
        return text

    def token_name(self, token_id: int) -> str:
        """Its text, or its bytes where these are not whole characters: different tokens' differ."""
        data = self.bytes_of(token_id)
        try:
            data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self.token_text(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token by itself, exact where the tokenizer deals in bytes."""
        known = self.token_bytes.get(token_id)
        return self.token_text(token_id).encode() if known is None else known


class TokenBytes:
    """Which bytes a token stands for, where its tokenizer works byte by byte.

    Either every token does (byte-level BPE), or only the 256 of `byte fallback`, or none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        self.all = kinds == {"ByteLevel"}
        self._known: dict[int, bytes] = {}
        if "ByteFallback" in kinds:
            self._known = _fallback_bytes(tokenizer)
        self.ascii_letter = next((i for i, byte in self._known.items() if byte == b"A"), None)

    def get(self, token_id: int) -> bytes | None:
        """None where the tokenizer must decode the token in its context."""
        known = self._known.get(token_id)
        if known is None and self.all:
            known = self._known[token_id] = self._byte_level(token_id)
        return known

    def _byte_level(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if all(char in BYTE_OF_CHAR for char in token):
            return bytes(BYTE_OF_CHAR[char] for char in token)
        return token.encode()


def load_text_model(model: str) -> TextModel:
    """Read the tokenizer of a local folder or, from its cache or the hub, of a repository."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(
            huggingface_hub.snapshot_download(model, allow_patterns=list(TOKENIZER_FILES))
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{model}: no tokenizer.json; save its fast tokenizer there first")
    tokenizer = Tokenizer.from_file(str(path))
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    special_tokens = named_special_tokens(config)
    mark_special(tokenizer, special_tokens.values())
    own_file = folder / "chat_template.jinja"
    own_source = own_file.read_text(encoding="utf-8") if own_file.is_file() else None
    source = chat_template_of(config, own_source)
    template = ChatTemplate(source, special_tokens) if source else None
    files = read_base_tokenizer(folder)
    model_digest = files.model if files else UNKNOWN
    return TextModel(tokenizer, template, special_tokens, model_digest=model_digest)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected a JSON object")
    return value


def mark_special(tokenizer: Tokenizer, contents: Iterable[str]) -> None:
    """Named special tokens are special even where tokenizer.json only lists them as words."""
    known = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    for content in contents:
        if content not in known and tokenizer.token_to_id(content) is not None:
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    # Written by itself: the whole has the vocabulary, and takes a part of a second.
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    parts = decoder.get("decoders", [decoder])
    return {part.get("type", "") for part in parts}


def _fallback_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    found = {}
    for byte in range(256):
        token_id = tokenizer.token_to_id(f"<0x{byte:02X}>")
        if token_id is not None:
            found[token_id] = bytes((byte,))
    return found


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, turned round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table |= {chr(256 + index): byte for index, byte in enumerate(others)}
    return table


BYTE_OF_CHAR = _byte_of_char()
