"""Token ids to text, one token at a time, never splitting a character.

The pieces, joined, are the tokenizer's decoding of the whole; each costs the same however long the
text. It must not know requests, stop strings or the engine.

Three kinds of token:
  bytes in a byte-level vocabulary: through an incremental UTF-8 decoder;
  byte fallback (`<0xE4>`): likewise, so that a malformed byte spoils only its own character, where
    the tokenizer would spoil the whole run of bytes;
  everything else: decoded in a window that begins with the tokens emitted last, since a tokenizer
    may treat a word at the start differently (it drops the leading space).
"""

import codecs
from collections.abc import Sequence

from lory_router.text import TextModel

CONTEXT_TOKENS = 6
"""Prompt tokens that tell the first generated token what it stands behind."""
MAX_HELD_TOKENS = 8
"""A window ending in a replacement character this long is not an unfinished character."""


class Detokenizer:
    """The text of one growing sequence. Special tokens have no text."""

    def __init__(self, text: TextModel, prompt_ids: Sequence[int] = ()) -> None:
        self._decode = text.decode
        self._token_bytes = text.token_bytes
        self._special_ids = text.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._read: list[int] = []
        if not text.token_bytes.all:
            self._read = _context(text, prompt_ids)
        self._read_text = text.decode(self._read) if self._read else ""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text this token completes; empty while a character is unfinished."""
        if token_id in self._special_ids:
            return ""
        known = self._token_bytes.get(token_id)
        if known is None:
            return self._flush_bytes() + self._push_window(token_id)
        if not self._token_bytes.all:
            return self._flush_window() + self._push_fallback(known)
        return self._utf8.decode(known)

    def flush(self) -> str:
        """What is left when no token follows: an unfinished character, shown as replaced."""
        return self._flush_bytes() + self._flush_window()

    def _push_fallback(self, known: bytes) -> str:
        letter = self._token_bytes.ascii_letter
        if letter is not None:
            self._read, self._read_text = [letter], "A"
        return self._utf8.decode(known)

    def _push_window(self, token_id: int) -> str:
        self._held.append(token_id)
        new = self._decode(self._read + self._held)[len(self._read_text) :]
        unfinished = new.endswith("\ufffd") and len(self._held) < MAX_HELD_TOKENS
        if not new or unfinished:
            return ""
        self._advance()
        return new

    def _advance(self) -> None:
        self._read, self._held = self._held, []
        self._read_text = self._decode(self._read)

    def _flush_bytes(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _flush_window(self) -> str:
        if not self._held:
            return ""
        new = self._decode(self._read + self._held)[len(self._read_text) :]
        self._advance()
        return new


def _context(text: TextModel, prompt_ids: Sequence[int]) -> list[int]:
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    return context if text.decode(context) else []
