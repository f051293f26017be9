"""What OpenAI's two generation routes share in their replies: usage, reasons, log-probabilities.

It must not know HTTP or how sequences run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lory_router.detokenize import Detokenizer
from lory_router.errors import IncompleteGeneration
from lory_router.text import TextModel
from lory_router.transcript import EndReason, Piece, Transcript
from lory_server.messages import Usage

Json = dict[str, object]

FINISH_REASONS: dict[EndReason, str] = {"length": "length", "eos": "stop", "stop": "stop"}
LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON does not have."""


def finish_reason(transcript: Transcript) -> str:
    if transcript.end is None:
        raise IncompleteGeneration("The engine ended the request without a reason")
    return FINISH_REASONS[transcript.end]


def usage_of(prompts: Iterable[Sequence[Transcript]], answer: bool = True) -> Json:
    """Tokens of all sequences; a prompt counts once, however many sequences share it."""
    usages = [[transcript.usage for transcript in group] for group in prompts]
    num_prompt = sum(group[0].prompt_tokens for group in usages)
    num_cached = sum(_cached(group) for group in usages)
    num_generated = sum(usage.generated_tokens for group in usages for usage in group)
    num_generated = num_generated if answer else 0
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def _cached(group: Sequence[Usage]) -> int:
    """The first sequence's: its siblings find the prompt it has just computed."""
    return group[0].cached_tokens


@dataclass(slots=True)
class Shown:
    """What of a transcript the caller may see: nothing that may yet become a stop string."""

    transcript: Transcript
    _text: str = ""
    _num_chars: int = 0
    _pieces: list[Piece] = field(default_factory=list)

    def take(self, fresh: Sequence[Piece]) -> tuple[str, list[Piece]]:
        """The text and tokens that can be shown now, given the newest pieces."""
        safe = self.transcript.safe_length
        self._text += "".join([piece.text for piece in fresh])
        text = self._text[: safe - self._num_chars]
        self._text = self._text[len(text) :]
        self._num_chars += len(text)
        self._pieces += fresh
        return text, self._take_pieces(safe)

    def _take_pieces(self, safe: int) -> list[Piece]:
        if self.transcript.end is not None:
            ready, self._pieces = visible(self.transcript, self._pieces), []
            return ready
        num = 0
        while num < len(self._pieces) and _stop_of(self._pieces[num]) <= safe:
            num += 1
        ready, self._pieces = self._pieces[:num], self._pieces[num:]
        return ready


def _stop_of(piece: Piece) -> int:
    return piece.start + len(piece.text)


def visible(transcript: Transcript, pieces: Sequence[Piece]) -> list[Piece]:
    """The tokens of the answer: not the one that ends it by its id, nor a stop string's."""
    cut = transcript.cut
    if cut is not None:
        return [piece for piece in pieces if piece.start < cut]
    return [piece for piece in pieces if piece.ends in (None, "length")]


def chat_logprobs(pieces: Sequence[Piece], text: TextModel) -> Json:
    return {"content": [_chat_token(piece, text) for piece in pieces], "refusal": None}


def _chat_token(piece: Piece, text: TextModel) -> Json:
    token = piece.token
    return {
        **_chat_entry(token.token_id, token.logprob, text),
        "top_logprobs": [_chat_entry(token_id, logprob, text) for token_id, logprob in token.top],
    }


def _chat_entry(token_id: int, logprob: float, text: TextModel) -> Json:
    return {
        "token": text.token_text(token_id),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(text.bytes_of(token_id)),
    }


def completion_logprobs(
    pieces: Sequence[Piece], text: TextModel, num_top: int, offset: int
) -> Json:
    """The older shape: four lists side by side; `offset` is where the answer begins."""
    tokens = [piece.token for piece in pieces]
    tops = [alternatives(t.token_id, t.logprob, t.top, text) for t in tokens] if num_top else None
    return {
        "tokens": [text.token_name(piece.token.token_id) for piece in pieces],
        "token_logprobs": [max(piece.token.logprob, LEAST_LOGPROB) for piece in pieces],
        "top_logprobs": tops,
        "text_offset": [offset + piece.start for piece in pieces],
    }


def alternatives(
    token_id: int, logprob: float, top: Iterable[tuple[int, float]], text: TextModel
) -> dict[str, float]:
    """The likeliest tokens, and the one that stands there where it is not among them.

    Of two that read the same, such as a special token and its text, the likelier one is told.
    """
    found: dict[str, float] = {}
    for other, other_logprob in (*top, (token_id, logprob)):
        name = text.token_name(other)
        found[name] = max(other_logprob, found.get(name, LEAST_LOGPROB))
    return found


def prompt_logprobs(transcript: Transcript, text: TextModel) -> Json:
    """The prompt's own tokens in the older shape, for echo; the first has no probability."""
    logprobs = [max(lp, LEAST_LOGPROB) for lp in transcript.prompt_logprobs or ()]
    scored = zip(transcript.prompt_ids[1:], logprobs, transcript.prompt_top, strict=False)
    tops = [alternatives(token_id, logprob, top, text) for token_id, logprob, top in scored]
    return {
        "tokens": [text.token_name(token_id) for token_id in transcript.prompt_ids],
        "token_logprobs": [None, *logprobs],
        "top_logprobs": [None, *tops] if transcript.prompt_top else None,
        "text_offset": _offsets(transcript.prompt_ids, text),
    }


def _offsets(token_ids: Sequence[int], text: TextModel) -> list[int]:
    detokenizer = Detokenizer(text)
    offsets, length = [], 0
    for token_id in token_ids:
        offsets.append(length)
        length += len(detokenizer.push(token_id))
    return offsets
