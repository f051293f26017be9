"""Adapters' own tokenizers: read from their folders when one is first asked for, and kept.

The engine says which one a revision has, by a digest; what lies in the folder by now is used only
if that is its digest. They are kept by digest, the least recently used let go of first, so that
adapters which share one share it here. A stranger's chat template is not run, any other of an
adapter's apart (`text_process`). It must not know requests or routes.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from lory_router.chat_template import ChatTemplate, PromptTemplate
from lory_router.config import inherited_environment
from lory_router.errors import AdapterInvalid, AdapterReplaced, shown
from lory_router.shared_tokenizer import share_model
from lory_router.sources.flight import Flights
from lory_router.sources.memory import Memory
from lory_router.text import TextModel, mark_special
from lory_router.text_process import AdapterTemplate, TextProcess
from lory_server.adapters.errors import AdapterError
from lory_server.adapters.header import read_exactly
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.tokenizer_files import TOKENIZER_NAME, TokenizerFiles
from lory_server.messages import Manner

MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Of tokenizer.json files, of those that share the base's model without it; in memory each takes
some ten times as much. The newest always stays."""

MAX_REFUSED = 1024
REFUSED_S = 10.0

PROBE = "a b\n"
"""What a tokenizer must be able to encode to be used."""

Read = tuple[TextModel, int]
"""A tokenizer, and the bytes of its file."""
Key = tuple[str, bool]
"""Its digest, and whether its chat template is run."""

NOT_RUN = (
    "{{ raise_exception(\"the adapter's own is not run, for whoever likes may have written it;"
    ' --trust-templates names the sources whose adapters may bring such") }}'
)
"""In place of a stranger's chat template: says why to who asks for a chat."""


class OwnTexts:
    """Used by the event loop; files are read beside it, one at a time."""

    def __init__(
        self,
        base: TextModel,
        adapters_dir: str,
        retry_after_s: int,
        max_kept_bytes: int = MAX_KEPT_BYTES,
        fetched_dir: Path | None = None,
    ) -> None:
        self.base = base
        self._store = AdapterStore(Path(adapters_dir) if adapters_dir else None, fetched_dir)
        self._retry_after_s = retry_after_s
        self._max_kept_bytes = max_kept_bytes
        self._kept: OrderedDict[Key, Read] = OrderedDict()
        self._flights: Flights[tuple[str, Key], Read] = Flights()
        self._refused: Memory[tuple[str, Key], str] = Memory(MAX_REFUSED)
        """Why, so that a storm of requests does not read a broken file each time."""
        self._turn = asyncio.Semaphore(1)
        self._apart = TextProcess(inherited_environment())

    async def of(
        self, adapter_id: str, manner: Manner, is_trusted: bool = True, name: str = ""
    ) -> TextModel:
        """Of an adapter, by the engine's name for its folder; raises an ApiError, which tells of
        it by `name`, if that is another."""
        if not manner.tokenizer:
            return self.base
        key = (manner.tokenizer, is_trusted)
        if key not in self._kept:
            about = name or adapter_id
            # By adapter, too: what is wrong with one is not told of another, that may be others'.
            if (reason := self._refused.get((adapter_id, key))) is not None:
                raise AdapterInvalid(f"adapter {shown(about)}: {reason}")
            found = await self._flights.join(
                (adapter_id, key), lambda: self._read(adapter_id, key, about)
            )
            self._keep(key, found)
            return found[0]
        self._kept.move_to_end(key)
        return self._kept[key][0]

    async def _read(self, adapter_id: str, key: Key, name: str) -> Read:
        async with self._turn:
            try:
                read = await asyncio.to_thread(self._made, adapter_id, key)
            except (AdapterError, OSError) as error:
                raise AdapterInvalid(f"adapter {shown(name)}: {error}") from error
            except ValueError as error:
                why = " ".join(str(error).split())[:300]
                reason = f"its tokenizer cannot be used: {why}"
                self._refused.put((adapter_id, key), reason, REFUSED_S)
                raise AdapterInvalid(f"adapter {shown(name)}: {reason}") from error
        if read is None:
            raise self._replaced(name)
        return read

    def _made(self, adapter_id: str, key: Key) -> Read | None:
        """None: its folder has another by now. Raises ValueError, too."""
        digest, is_trusted = key
        with self._store.locate_tokenizer(adapter_id) as found:
            files = self._apart.look(found.descriptors) if found.descriptors else None
            if files is None or files.digest != digest:
                return None
            tokenizer, longest_token, num_bytes = self._tokenizer(files, found.descriptors)
        # What it does not say of special tokens and template the base does.
        special_tokens = {**self.base.special_tokens, **files.special_tokens}
        mark_special(tokenizer, special_tokens.values())
        template = self._template(files.chat_template, special_tokens, is_trusted)
        return TextModel(tokenizer, template, special_tokens, longest_token), num_bytes

    def _tokenizer(
        self, files: TokenizerFiles, descriptors: Mapping[str, int]
    ) -> tuple[Tokenizer, int, int]:
        """And its longest token, if that is known, and the bytes that are its own."""
        try:
            if files.model == self.base.model_digest:
                shared = share_model(self.base.tokenizer, files.rest)
                if shared is not None:
                    _probe(shared.tokenizer)
                    longest = max(self.base.longest_token, shared.longest_added)
                    return shared.tokenizer, longest, len(files.rest)
            tokenizer = Tokenizer.from_str(_raw(files, descriptors[TOKENIZER_NAME]).decode())
            _probe(tokenizer)
        except BaseException as error:  # the library raises Exception, and panics are not even that
            raise ValueError(f"{TOKENIZER_NAME}: {error}") from error
        return tokenizer, 0, files.num_bytes

    def _template(
        self, own: str, special_tokens: Mapping[str, str], is_trusted: bool
    ) -> PromptTemplate | None:
        """The base's is trusted, whoever brings it."""
        base = self.base.chat_template
        if own and (base is None or own != base.source):
            if not is_trusted:
                return ChatTemplate(NOT_RUN, {}, "adapter")
            return AdapterTemplate(self._apart, own, special_tokens)
        return ChatTemplate(base.source, special_tokens) if base else None

    def _keep(self, key: Key, read: Read) -> None:
        self._kept[key] = read
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self._kept_bytes > self._max_kept_bytes:
            self._kept.popitem(last=False)

    @property
    def _kept_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self._kept.values())

    def _replaced(self, name: str) -> AdapterReplaced:
        return AdapterReplaced(
            f"the tokenizer of adapter {shown(name)} is not in its folder any more as it was"
            " when the adapter was loaded; send the request again",
            retry_after_s=self._retry_after_s,
        )


def _probe(tokenizer: Tokenizer) -> None:
    tokenizer.decode(tokenizer.encode(PROBE).ids)


def _raw(files: TokenizerFiles, fd: int) -> bytes:
    """The bytes that were looked at; raises ValueError if they have been written to since."""
    raw = read_exactly(fd, files.num_bytes, 0, TOKENIZER_NAME)
    if hashlib.sha256(raw).hexdigest() != files.sha256:
        raise ValueError("changed while it was read; send the request again")
    return raw
