"""Is the base that is served the one an adapter was trained on? Told by digests, never by names.

The digest is taken once, off the event loop, when the first adapter asks; the engine has loaded
the base by then, so its files are there. It must not know requests.
"""

import asyncio
import logging
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from lory_server import messages
from lory_trainer.base_digest import FILES, BaseDigest, BaseDigestError, base_digest

log = logging.getLogger(__name__)


class ServedBase:
    def __init__(self, model: str = "") -> None:
        """A local folder or a hub id; without one nothing can be told."""
        self._model = model
        self._digest: asyncio.Future[BaseDigest | None] | None = None

    async def other_parts(self, trained_on: messages.BaseDigest | None) -> tuple[str, ...] | None:
        """The parts of the base that differ; None: the adapter, or the base, does not tell."""
        if trained_on is None or not self._model:
            return None
        if self._digest is None:
            self._digest = asyncio.ensure_future(asyncio.to_thread(_digest_of, self._model))
        served = await asyncio.shield(self._digest)
        wanted = BaseDigest(trained_on.config, trained_on.tokenizer, trained_on.weights)
        return None if served is None else served.other_parts(wanted)


def _digest_of(model: str) -> BaseDigest | None:
    try:
        return base_digest(_folder(model))
    except (BaseDigestError, LocalEntryNotFoundError) as error:
        log.warning("whether adapters were trained on this base cannot be told: %s", error)
        return None


def _folder(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    found = huggingface_hub.snapshot_download(
        model, allow_patterns=list(FILES), local_files_only=True
    )
    return Path(found)
