"""Is the base that is served the one an adapter was trained on? Told by digests, never by names.

The digests are taken once, off the event loop, when the first adapter asks; the engine has loaded
the base by then, so its files are there. It must not know requests.
"""

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from lory_router.chat_template import PromptTemplate
from lory_server.messages import TrainedOn
from lory_trainer.digests import FILES, base_digests

PARTS = {
    "config": "configuration",
    "tokenizer": "tokenizer",
    "weights": "weights",
    "chat_template": "chat template",
}

SHOWN_CHARS = 12
"""Of a digest, in messages."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OtherPart:
    """What of a base is not as an adapter knew it, with both digests."""

    name: str
    trained_on: str
    served: str

    def __str__(self) -> str:
        digests = self.trained_on[:SHOWN_CHARS], self.served[:SHOWN_CHARS]
        return "{} ({}..., and {}... is served)".format(self.name, *digests)


class ServedBase:
    def __init__(self, model: str = "", chat_template: PromptTemplate | None = None) -> None:
        """A local folder or a hub id; without one nothing can be told."""
        self._model = model
        self._chat_template = chat_template
        self._digests: asyncio.Future[dict[str, str]] | None = None

    async def other_parts(self, trained_on: TrainedOn | None) -> tuple[OtherPart, ...] | None:
        """The parts of the base that differ; None: the adapter, or the base, does not tell."""
        if trained_on is None or not self._model:
            return None
        if self._digests is None:
            digests = asyncio.to_thread(_digests_of, self._model, self._chat_template)
            self._digests = asyncio.ensure_future(digests)
        served = await asyncio.shield(self._digests)
        told = {name: value for name in PARTS if (value := getattr(trained_on, name))}
        if not (told.keys() & served.keys()):
            return None
        return tuple(
            OtherPart(PARTS[name], digest, served[name])
            for name, digest in told.items()
            if name in served and digest != served[name]
        )


def _digests_of(model: str, chat_template: PromptTemplate | None) -> dict[str, str]:
    source = chat_template.source if chat_template else ""
    template = {"chat_template": hashlib.sha256(source.encode()).hexdigest()}
    try:
        return template | base_digests(_folder(model))
    except (OSError, ValueError, LookupError, TypeError, LocalEntryNotFoundError) as error:
        log.warning("whether adapters were trained on this base cannot be told: %s", error)
        return {}


def _folder(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    found = huggingface_hub.snapshot_download(
        model, allow_patterns=list(FILES), local_files_only=True
    )
    return Path(found)
