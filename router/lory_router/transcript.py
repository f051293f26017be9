"""What one sequence has said so far: its tokens as text, and where and why it ended.

Fed by hand with an engine's events; does no waiting. It must not know HTTP, dialects or sockets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lory_router.detokenize import Detokenizer
from lory_router.stops import StopFinder
from lory_router.text import TextModel
from lory_server.messages import Finished, FinishReason, Token, Usage

EndReason = Literal["length", "eos", "stop"]
"""Why a sequence ended well; "stop" is a stop string or a stop token."""
ENDS: dict[FinishReason, EndReason] = {"length": "length", "eos": "eos", "stop_token": "stop"}


@dataclass(frozen=True, slots=True)
class Ending:
    """What may end a sequence, known before it starts."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    """Empty when end-of-sequence is ignored."""
    stop_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token as text."""

    token: Token
    text: str
    """What it adds to the answer; empty for special tokens and unfinished characters."""
    start: int
    """Where in the answer its text begins."""
    ends: EndReason | None = None
    """Set on the last token alone."""


class Transcript:
    """The answer of one sequence, growing."""

    def __init__(self, text: TextModel, prompt_ids: Sequence[int], ending: Ending) -> None:
        self.prompt_ids = prompt_ids
        self.pieces: list[Piece] = []
        self.prompt_logprobs: tuple[float, ...] | None = None
        self.prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
        self.end: EndReason | None = None
        self.cut: int | None = None
        """Where the stop string begins, once one is found."""
        self.length = 0
        """Characters of text so far."""
        self.finished: Finished | None = None
        self._ending = ending
        self._detokenizer = Detokenizer(text, prompt_ids)
        self._finder = StopFinder(ending.stops)

    @property
    def may_stop_anywhere(self) -> bool:
        """Whether a stop string, which the engine does not know, may end it."""
        return bool(self._ending.stops)

    def feed(self, tokens: Sequence[Token]) -> list[Piece]:
        """Take tokens in; what comes after the end is dropped."""
        fresh: list[Piece] = []
        for token in tokens:
            if self.end is not None:
                break
            piece = self._take(token)
            self.pieces.append(piece)
            fresh.append(piece)
        return fresh

    def finish(self, finished: Finished) -> None:
        """Take the terminal event in; the engine may know of an end that no token told."""
        self.finished = finished
        if self.end is None:
            self.end = ENDS.get(finished.reason)

    def _take(self, token: Token) -> Piece:
        end = self._end_by_id(token.token_id)
        text = "" if end in ("eos", "stop") else self._detokenizer.push(token.token_id)
        start = self.length
        if end is None and self._search(text):
            end = "stop"
        elif end is not None:
            end, text = self._close(end, text)
        self.length = start + len(text)
        self.end = end
        return Piece(token, text, start, end)

    def _close(self, end: EndReason, text: str) -> tuple[EndReason, str]:
        """The last token brings along what was held for an unfinished character."""
        text += self._detokenizer.flush()
        return ("stop" if self._search(text) else end), text

    def _search(self, text: str) -> bool:
        self.cut = self._finder.push(text)
        return self.cut is not None

    def _end_by_id(self, token_id: int) -> EndReason | None:
        if token_id in self._ending.eos_ids:
            return "eos"
        if token_id in self._ending.stop_ids:
            return "stop"
        if len(self.pieces) + 1 >= self._ending.max_new_tokens:
            return "length"
        return None

    @property
    def text(self) -> str:
        """The answer, a stop string and what its last token holds beyond it included."""
        return "".join([piece.text for piece in self.pieces])

    @property
    def stripped_text(self) -> str:
        """The answer up to the stop string."""
        return self.text[: self.cut]

    @property
    def safe_length(self) -> int:
        """How much of the answer may be shown to a caller who must not see a stop string."""
        if self.cut is not None:
            return self.cut
        return self.length if self.end else self._finder.safe_length

    @property
    def mean_logprob(self) -> float:
        logprobs = [piece.token.logprob for piece in self.pieces]
        return sum(logprobs) / max(1, len(logprobs))

    @property
    def usage(self) -> Usage:
        """The engine's figures, but with the tokens the caller got: none beyond the end."""
        told = self.finished.usage if self.finished else None
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.pieces),
            cached_tokens=told.cached_tokens if told else 0,
            queue_seconds=told.queue_seconds if told else 0.0,
            load_seconds=told.load_seconds if told else 0.0,
            engine_seconds=told.engine_seconds if told else 0.0,
        )
