"""Adapters' own tokenizers: read from their folders when one is first asked for, and kept.

The engine says which one a revision has, by a digest; what lies in the folder by now is used only
if that is its digest. They are kept by digest, the least recently used let go of first, so that
adapters which share one share it here. Strangers' are held to what the base's does
(`tokenizer_trust`). It must not know requests or routes.
"""

import asyncio
from collections import OrderedDict
from pathlib import Path

from tokenizers import Tokenizer

from lory_router.chat_template import ChatTemplate
from lory_router.errors import AdapterInvalid, AdapterReplaced, shown
from lory_router.sources.flight import Flights
from lory_router.text import TextModel, mark_special
from lory_router.tokenizer_trust import check_works_as, not_run
from lory_server.adapters.errors import AdapterError
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.tokenizer_files import TOKENIZER_NAME, TokenizerFiles, read_tokenizer
from lory_server.messages import Manner

MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Of tokenizer.json files; in memory each takes some ten times as much. The newest always stays."""

PROBE = "a b\n"
"""What a tokenizer must be able to encode to be used."""

Read = tuple[TextModel, int]
"""A tokenizer, and the bytes of its file."""
Key = tuple[str, bool]
"""Its digest, and whether it is run whatever it does."""


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
        self._flights: Flights[Key, Read] = Flights()
        self._turn = asyncio.Semaphore(1)

    async def of(
        self, adapter_id: str, manner: Manner, is_trusted: bool = True, name: str = ""
    ) -> TextModel:
        """Of an adapter, by the engine's name for its folder; raises an ApiError, which tells of
        it by `name`, if that is another."""
        if not manner.tokenizer:
            return self.base
        key = (manner.tokenizer, is_trusted)
        if key not in self._kept:
            found = await self._flights.join(
                key, lambda: self._read(adapter_id, key, name or adapter_id)
            )
            self._keep(key, found)
            return found[0]
        self._kept.move_to_end(key)
        return self._kept[key][0]

    async def _read(self, adapter_id: str, key: Key, name: str) -> Read:
        digest, is_trusted = key
        async with self._turn:
            try:
                files = await asyncio.to_thread(self._files, adapter_id)
                if files is None or files.digest != digest:
                    raise self._replaced(name)
                text = await asyncio.to_thread(self._text_model, files, is_trusted)
            except (AdapterError, OSError) as error:
                raise AdapterInvalid(f"adapter {shown(name)}: {error}") from error
            except ValueError as error:
                raise AdapterInvalid(
                    f"adapter {shown(name)}: its tokenizer cannot be used:"
                    f" {' '.join(str(error).split())[:300]}"
                ) from error
        return text, len(files.raw)

    def _files(self, adapter_id: str) -> TokenizerFiles | None:
        with self._store.locate_tokenizer(adapter_id) as found:
            return read_tokenizer(found.descriptors) if found.descriptors else None

    def _text_model(self, files: TokenizerFiles, is_trusted: bool) -> TextModel:
        """Raises ValueError. What it does not say of special tokens and template the base does."""
        try:
            tokenizer = Tokenizer.from_str(files.raw.decode())
            if not is_trusted:
                check_works_as(self.base, tokenizer)
            tokenizer.decode(tokenizer.encode(PROBE).ids)
        except BaseException as error:  # the library raises Exception, and panics are not even that
            raise ValueError(f"{TOKENIZER_NAME}: {error}") from error
        base = self.base.chat_template
        special_tokens = {**self.base.special_tokens, **files.special_tokens}
        mark_special(tokenizer, special_tokens.values())
        source = files.chat_template or (base.source if base else "")
        template = None
        if source and (is_trusted or (base and source == base.source)):
            template = ChatTemplate(source, special_tokens, "adapter")
        elif source:
            template = not_run()
        return TextModel(tokenizer, template, special_tokens)

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
