"""May a tokenizer run here that a stranger may have written? Only if it works as the base's does.

A tokenizer runs on every prompt: a regular expression of its may take for ever on a short one, a
chain of replacements make gigabytes of it, and so may a chat template. So of a stranger's the parts
that cut and join texts must be the base's; vocabulary, special tokens and what is put around a text
are its own. It must not know adapters, files or requests.
"""

from tokenizers import Tokenizer

from lory_router.chat_template import ChatTemplate
from lory_router.text import TextModel

MAX_TOKEN_CHARS = 256
"""Of the longest token, unless the base has a longer one: what a text costs grows with it."""
MAX_AROUND_BYTES = 8192
"""Of what says which tokens are put around a text."""

_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_WAY_OUT = "--trust-tokenizers names the sources whose adapters may bring such"
_NOT_RUN = f"the adapter's own is not run, for whoever likes may have written it; {_WAY_OUT}"


def check_works_as(base: TextModel, tokenizer: Tokenizer) -> None:
    """Raises ValueError naming the part; nothing of `tokenizer` is run for that."""
    for part in _PARTS:
        if _state(tokenizer, part) != _state(base.tokenizer, part):
            raise ValueError(f"its {part} is another than the base's; {_WAY_OUT}")
    if type(tokenizer.model) is not type(base.tokenizer.model):
        raise ValueError(f"its model is of another kind than the base's; {_WAY_OUT}")
    most = max(MAX_TOKEN_CHARS, base.longest_token)
    if max(map(len, tokenizer.get_vocab()), default=1) > most:
        raise ValueError(f"it has a token of more than {most} characters; {_WAY_OUT}")
    if len(_state(tokenizer, "post_processor")) > MAX_AROUND_BYTES:
        raise ValueError(f"its post_processor has over {MAX_AROUND_BYTES} bytes; {_WAY_OUT}")


def not_run() -> ChatTemplate:
    """In place of a stranger's chat template: says why to who asks for a chat."""
    return ChatTemplate(f"{{{{ raise_exception({_NOT_RUN!r}) }}}}", {}, "adapter")


def _state(tokenizer: Tokenizer, part: str) -> bytes:
    """As the library writes it, so that files of other versions compare alike."""
    value = getattr(tokenizer, part)
    return b"" if value is None else value.__getstate__()
