"""Bodies and replies of the adapters' routes, as types.

It must not know where the facts come from.
"""

import time
from collections.abc import Mapping
from typing import Literal

import msgspec

from lory_router.sources.fetching import Progress
from lory_server.messages import AdapterEntry, Manner, RevisionEntry
from lory_server.recipes import ELECTING, PRUNING, RANDOM, MergeMethod, Recipe, SignMethod

State = Literal["fetching", "disk", "host", "device", "refused"]


class RegisterBody(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    adapter_id: str | None = None
    revision: str | None = None
    owner: str | None = None
    """The tenant that the name is for alone; empty: it is for all."""
    api_token: str | None = None
    """The caller's, for the source."""


class OrderBody(msgspec.Struct, frozen=True, kw_only=True):
    """Of the routes that load and let go."""

    api_token: str | None = None
    """The caller's, for the source."""


class WeightedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    adapter_id: str
    weight: float


class MergeBody(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    adapters: list[WeightedAdapter]
    method: str | None = None
    """linear unless given."""
    density: float | None = None
    majority_sign_method: str | None = None
    rank: int | None = None
    seed: int | None = None


class LoadLoraBody(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraBody(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's."""

    lora_name: str


class MatchedReply(msgspec.Struct, frozen=True):
    modules: int
    """How many of that name, over all layers."""
    ranks: tuple[int, ...]


class BytesReply(msgspec.Struct, frozen=True):
    disk: int | None
    """Of its weights file; None until it has been read."""
    host: int
    device: int


class FetchingReply(msgspec.Struct, frozen=True, kw_only=True):
    """A download under way."""

    bytes: int
    """That have come."""
    total: int | None
    """That will have; None: the source does not tell."""
    seconds: float


class RevisionReply(msgspec.Struct, frozen=True, kw_only=True):
    revision: str
    state: State
    matched: dict[str, MatchedReply]
    invocation_tokens: tuple[int, ...]
    """Of an aLoRA: it acts from these on."""
    bytes: BytesReply
    requests: int
    pinned: bool


class MergeSourceReply(msgspec.Struct, frozen=True):
    adapter_id: str
    weight: float
    revision: str | None
    """None: whichever the adapter has."""


class MergeReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an adapter is merged; what its method does not use is left out."""

    method: MergeMethod
    adapters: tuple[MergeSourceReply, ...]
    density: float | None = None
    majority_sign_method: SignMethod | None = None
    rank: int | None = None
    seed: int | None = None


class AdapterReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["adapter"] = "adapter"
    state: State
    revision: str | None
    """The latest that was read."""
    matched: dict[str, MatchedReply] | None
    """What it changes; None while it is not in memory."""
    invocation_tokens: tuple[int, ...] | None
    """As `matched`; empty: it acts everywhere."""
    bytes: BytesReply
    """Of all its revisions."""
    requests: int
    last_used: int | None
    """In seconds since 1970."""
    pinned: bool
    names: Mapping[str, str | None]
    """Aliases and further names, each with its revision; None: it follows the adapter."""
    revisions: tuple[RevisionReply, ...]
    refused: str | None
    owner: str | None
    """The tenant that it is for alone."""
    fetching: FetchingReply | None = None
    """Under way: what is not here yet, or what will take the place of what is."""
    merged: MergeReply | None = None
    """How it is made of others, if it is."""


class AdapterDetail(AdapterReply, frozen=True, kw_only=True):
    """One adapter, with how it wants to be asked; None: that is not known."""

    template: str | None = None
    fields: tuple[str, ...] | None = None
    chat: bool | None = None
    """Whether its prompts go through the base's chat template."""
    completion_prefix: str | None = None
    """What its answers begin with."""
    defaults: dict[str, float] | None = None
    stop: tuple[str, ...] | None = None
    base_matches: bool | None = None
    """Whether the base served is the one it was trained on; None: its manifest does not tell."""


class AdapterListReply(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[AdapterReply, ...]
    removed: tuple[str, ...]
    """Adapters that lie in the folder and are not served, until registered again."""


class UploadReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    """What requests name."""
    revision: str | None
    """None until it has been read."""
    bytes: int
    object: Literal["adapter"] = "adapter"


class RemovedReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["adapter", "model"] = "adapter"
    deleted: bool = True


def adapter_reply(
    entry: AdapterEntry,
    names: Mapping[str, str],
    age_s: float,
    owner: str = "",
    recipe: Recipe | None = None,
) -> AdapterReply:
    """An adapter as it was `age_s` seconds ago."""
    latest = next((one for one in entry.revisions if one.revision == entry.revision), None)
    used = None
    if entry.idle_seconds is not None:
        used = round(time.time() - age_s - entry.idle_seconds)
    return AdapterReply(
        id=entry.adapter_id,
        state="refused" if entry.refusal else entry.tier,
        revision=entry.revision or None,
        matched=_matched(latest) if latest else None,
        invocation_tokens=latest.invocation_tokens if latest else None,
        bytes=BytesReply(
            disk=latest.file_bytes if latest else None,
            host=sum(one.host_bytes for one in entry.revisions),
            device=sum(one.device_bytes for one in entry.revisions),
        ),
        requests=entry.num_requests,
        last_used=used,
        pinned=any(one.is_pinned for one in entry.revisions),
        names={name: revision or None for name, revision in names.items()},
        revisions=tuple(map(_revision_reply, entry.revisions)),
        refused=entry.refusal or None,
        owner=owner or None,
        merged=_merge_reply(recipe) if recipe else None,
    )


def adapter_detail(
    reply: AdapterReply, manner: Manner | None, base_matches: bool | None
) -> AdapterDetail:
    known = msgspec.structs.asdict(reply)
    if manner is None:
        return AdapterDetail(**known)
    defaults = msgspec.structs.asdict(manner.defaults)
    return AdapterDetail(
        **known,
        template=manner.template or None,
        fields=manner.fields,
        chat=manner.is_chat,
        completion_prefix=manner.completion_prefix or None,
        defaults={name: value for name, value in defaults.items() if value is not None},
        stop=manner.stop,
        base_matches=base_matches,
    )


def fetching_reply(progress: Progress) -> FetchingReply:
    return FetchingReply(
        bytes=progress.num_bytes,
        total=progress.total_bytes,
        seconds=round(progress.seconds, 3),
    )


def arriving_reply(progress: Progress) -> AdapterReply:
    """An adapter of which nothing is here yet."""
    nothing = AdapterEntry(adapter_id=progress.reference.name, tier="disk")
    fields = {"state": "fetching", "fetching": fetching_reply(progress)}
    return msgspec.structs.replace(adapter_reply(nothing, {}, 0.0), **fields)


def _merge_reply(recipe: Recipe) -> MergeReply:
    method = recipe.method
    return MergeReply(
        method,
        tuple(
            MergeSourceReply(one.adapter_id, one.weight, one.revision or None)
            for one in recipe.sources
        ),
        density=recipe.density if method in PRUNING else None,
        majority_sign_method=recipe.majority_sign_method if method in ELECTING else None,
        rank=recipe.rank or None,
        seed=recipe.seed if method in RANDOM else None,
    )


def _revision_reply(one: RevisionEntry) -> RevisionReply:
    return RevisionReply(
        revision=one.revision,
        state=one.tier,
        matched=_matched(one),
        invocation_tokens=one.invocation_tokens,
        bytes=BytesReply(one.file_bytes, one.host_bytes, one.device_bytes),
        requests=one.num_requests,
        pinned=one.is_pinned,
    )


def _matched(one: RevisionEntry) -> dict[str, MatchedReply]:
    return {kind.module: MatchedReply(kind.count, kind.ranks) for kind in one.matched}
