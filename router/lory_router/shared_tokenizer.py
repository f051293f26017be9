"""An adapter's tokenizer that has the base's vocabulary and merges, and tokens added: made of the
base's, with which it shares them.

Read from its file, one of today's vocabularies takes a hundred megabytes, and half a second in
which nothing else of the process runs: every stream would stand still. Thousands of adapters bring
the base's with a few tokens added. It must not know files or adapters.
"""

from dataclasses import dataclass

import msgspec
from tokenizers import AddedToken, Tokenizer

EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


class _Added(msgspec.Struct, frozen=True):
    """As tokenizer.json has it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def token(self) -> AddedToken:
        return AddedToken(
            self.content,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            normalized=self.normalized,
            special=self.special,
        )


class _Rest(msgspec.Struct, frozen=True):
    added_tokens: list[_Added] = []


@dataclass(frozen=True, slots=True)
class Shared:
    tokenizer: Tokenizer
    longest_added: int
    """Characters of the longest token that is not of the model."""


def share_model(base: Tokenizer, rest: bytes) -> Shared | None:
    """What a tokenizer.json that is `rest` and the base's model stands for; None: it has its tokens
    elsewhere than they come to be, and is to be read whole. Raises ValueError."""
    added = sorted(msgspec.json.decode(rest, type=_Rest).added_tokens, key=lambda one: one.id)
    shell = msgspec.json.decode(rest, type=dict[str, msgspec.Raw])
    told = {**shell, "added_tokens": [], "model": EMPTY_MODEL}
    tokenizer = Tokenizer.from_str(msgspec.json.encode(told).decode())
    tokenizer.model = base.model
    tokenizer.add_tokens([one.token() for one in added])
    if any(tokenizer.token_to_id(one.content) != one.id for one in added):
        return None
    return Shared(tokenizer, max((len(one.content) for one in added), default=0))
